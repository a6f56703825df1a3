"""The demo's figures as JSON, as a table, and as one self-contained report.html."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kcm.app.demo.steps import Outcome
from kcm.app.demo.traffic import Pass
from kcm.sample import Source
from training.evaluate import paired_interval, wilson
from training.judge import Judge

Bool = NDArray[np.bool_]
_ROWS = (
    ("small", "always small"),
    ("large", "always large"),
    ("before", "KCM before"),
    ("control", "recalibrated, not distilled"),
    ("after", "KCM after"),
)


def summary(outcome: Outcome) -> dict[str, Any]:
    """Accuracy, cloud rate and latency of each row, each with its 95 % interval, and the paired differences after − before."""
    truth = outcome.parts.test.y
    passes = {"small": outcome.small, "large": outcome.large, "before": outcome.before, "after": outcome.after}
    result: dict[str, Any] = {name: _row(done, truth) for name, done in passes.items()}
    control = outcome.control
    n = len(truth)
    result["control"] = {
        "accuracy": control.accuracy,
        "accuracy_interval": wilson(int(control.right.sum()), n),
        "cloud_rate": control.cloud_rate,
        "cloud_rate_interval": wilson(round(control.cloud_rate * n), n),
        "cloud_calls": round(control.cloud_rate * n),
    }
    before, after = outcome.before, outcome.after
    accuracy = after.right(truth).astype(float) - before.right(truth)
    calls = after.escalated().astype(float) - before.escalated()
    return {
        "schema": 1,
        "task": outcome.task.id,
        "documents": n,
        "target": outcome.target,
        **result,
        "after_minus_before": {
            "accuracy": dict(zip(("mean", "low", "high"), paired_interval(accuracy), strict=True)),
            "cloud_rate": dict(zip(("mean", "low", "high"), paired_interval(calls), strict=True)),
        },
        "calls_ratio": after.cloud_rate / before.cloud_rate if before.cloud_rate else None,
        "learnt_from": {
            "streamed": len(outcome.learning),
            "answered_by_cloud": outcome.learning.count(Source.CLOUD),
            "rows_distilled": outcome.runs[1].metrics["teacher_rows"],
        },
        "degraded": sum(done.count(Source.DEGRADED) for done in (*passes.values(), outcome.learning)),
        "seconds": round(outcome.seconds, 1),
    }


def _row(done: Pass, truth: NDArray[np.int64]) -> dict[str, Any]:
    right, escalated = int(done.right(truth).sum()), int(done.escalated().sum())
    return {
        "accuracy": right / len(done),
        "accuracy_interval": wilson(right, len(done)),
        "cloud_rate": escalated / len(done),
        "cloud_rate_interval": wilson(escalated, len(done)),
        "cloud_calls": escalated,
        "p50_ms": done.percentile(50),
        "p99_ms": done.percentile(99),
    }


def table(result: dict[str, Any]) -> str:
    """For a terminal."""
    lines = [
        f"{result['task']}: {result['documents']} test documents through the daemon; target of both calibrations: {result['target']}",
        "",
        f"{'':30}{'accuracy':>22}{'cloud calls':>30}{'p50':>10}{'p99':>10}",
    ]
    for key, title in _ROWS:
        row = result[key]
        latency = f"{row['p50_ms']:8.1f}ms{row['p99_ms']:8.1f}ms" if "p50_ms" in row else f"{'–':>10}{'–':>10}"
        calls = f"{row['cloud_calls']} = {_share(row, 'cloud_rate')}"
        lines.append(f"{title:30}{_share(row, 'accuracy'):>22}{calls:>30}{latency}")
    difference, learnt = result["after_minus_before"], result["learnt_from"]
    ratio = "" if result["calls_ratio"] is None else f" ({result['calls_ratio']:.2f} of before)"
    lines += [
        "",
        f"after − before, paired: accuracy {_points(difference['accuracy'])}, cloud calls {_points(difference['cloud_rate'])}{ratio}",
        f"learnt from {learnt['rows_distilled']} answers of the large model to {learnt['streamed']} unlabelled documents; "
        f"{result['degraded']} answers were degraded; {result['seconds']:.0f} s in all",
        "in brackets: 95 % intervals (Wilson; bootstrap for differences)",
    ]
    return "\n".join(lines)


def _share(row: dict[str, Any], key: str) -> str:
    low, high = row[f"{key}_interval"]
    return f"{100 * row[key]:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def _points(d: dict[str, float]) -> str:
    return f"{100 * d['mean']:+.1f} points [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"


def write_report(path: Path, outcome: Outcome, result: dict[str, Any]) -> None:
    """One HTML file, plots inside."""
    figures = [
        (
            "Accuracy against cloud calls",
            _tradeoff(outcome, result),
            "Every ε of the judge on the test documents; dots: the ε that calibration chose.",
        ),
        (
            "Does C_x mean what it says?",
            _reliability(outcome),
            "Out-of-fold: share of right answers among samples of like C_x, before and after.",
        ),
        ("Latency per document", _latency(outcome), "One document a call through the daemon, log scale."),
        (
            "The judge, curve by curve",
            _curves(outcome.runs[1].judge),
            "What each input adds to the log-odds that the small model is right.",
        ),
    ]
    template = jinja2.Environment(autoescape=True).from_string(_TEMPLATE)
    path.write_text(
        template.render(
            result=result,
            rows=[(title, result[key]) for key, title in _ROWS],
            figures=[(title, _png(figure), note) for title, figure, note in figures],
            share=_share,
            points=_points,
        ),
        encoding="utf-8",
    )


def _png(figure: Figure) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, bbox_inches="tight")
    return base64.b64encode(data.getvalue()).decode()


def _tradeoff(outcome: Outcome, result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(6, 3.6))
    axes = figure.subplots()
    large_right = outcome.large.right(outcome.parts.test.y)
    for name, curve in zip(("before", "after"), outcome.curves, strict=True):
        order = np.argsort(curve.confidence, kind="stable")
        # accuracy where the k least confident go to the large model
        gained = np.concatenate([[0], np.cumsum(large_right[order].astype(int) - curve.right[order])])
        accuracy = (curve.right.sum() + gained) / len(order)
        (line,) = axes.plot(np.linspace(0, 100, len(accuracy)), 100 * accuracy, label=f"KCM {name}")
        axes.plot(100 * result[name]["cloud_rate"], 100 * result[name]["accuracy"], "o", color=line.get_color())
    axes.axhline(100 * result["large"]["accuracy"], color="grey", linestyle="--", linewidth=1, label="always large")
    axes.set(xlabel="cloud calls, %", ylabel="accuracy, %")
    axes.legend()
    return figure


def _reliability(outcome: Outcome) -> Figure:
    figure = Figure(figsize=(6, 3.6))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
    for name, run in zip(("before", "after"), outcome.runs, strict=True):
        confidence = run.judge.confidence(run.out_of_fold)
        right = run.out_of_fold.logits.argmax(1) == run.targets.argmax(1)
        bins = np.array_split(np.argsort(confidence, kind="stable"), 10)
        axes.plot([confidence[b].mean() for b in bins if len(b)], [right[b].mean() for b in bins if len(b)], "o-", label=name)
    axes.set(xlabel="C_x", ylabel="share right (label, or the large model's answer)", xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    return figure


def _latency(outcome: Outcome) -> Figure:
    figure = Figure(figsize=(6, 3.6))
    axes = figure.subplots()
    every = outcome.before.latency_ms + outcome.after.latency_ms
    bins = np.geomspace(min(every), max(every) * 1.01, 40).tolist()
    for name, done in (("before", outcome.before), ("after", outcome.after)):
        axes.hist(done.latency_ms, bins=bins, histtype="step", label=name)
    axes.set(xscale="log", xlabel="ms", ylabel="documents")
    axes.legend()
    return figure


def _curves(judge: Judge) -> Figure:
    """The edges into "rank 1 is right" of a one-layer KAN, over each input's range on the grid."""
    from training.judge import FEATURES
    from training.kan import KanLayer

    layer = judge.layers[0]
    names = [f"ln p, rank {rank + 1}" for rank in range(judge.ranks)] + list(FEATURES)
    figure = Figure(figsize=(9, 4.2))
    if not isinstance(layer, KanLayer):
        return figure
    u = np.linspace(0, layer.grid, 100)
    values = layer.values(u)[0]  # [in, N] into the first output
    slope, shift = layer.scale_and_shift()
    for place, (axes, name) in enumerate(zip(figure.subplots(2, (len(names) + 1) // 2).flat, names, strict=False)):
        axes.plot((u - shift[place]) / slope[place], values[place])
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=6)
        axes.set_ylim(values.min() - 0.02, values.max() + 0.02)
    figure.tight_layout()
    return figure


_TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>kcm demo: {{ result.task }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid #d8dee6; }
th:first-child, td:first-child { text-align: left; } figure { margin: 2rem 0; } img { max-width: 100%; } figcaption { color: #566; }
.lead { font-size: 1.2rem; }
</style>
<h1>{{ result.task }}: before and after one distillation round</h1>
<p class="lead">The same {{ result.documents }} documents, the same target ({{ result.target }}):
{{ result.before.cloud_calls }} cloud calls before, {{ result.after.cloud_calls }} after;
accuracy {{ points(result.after_minus_before.accuracy) }}.</p>
<table><tr><th></th><th>accuracy [95 %]</th><th>cloud calls [95 %]</th><th>p50, ms</th><th>p99, ms</th></tr>
{% for title, row in rows %}<tr><td>{{ title }}</td><td>{{ share(row, "accuracy") }}</td>
<td>{{ row.cloud_calls }} = {{ share(row, "cloud_rate") }}</td>
{% for key in ("p50_ms", "p99_ms") %}<td>{{ "%.1f"|format(row[key]) if key in row else "–" }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p>Learnt from {{ result.learnt_from.rows_distilled }} answers of the large model
to {{ result.learnt_from.streamed }} unlabelled documents. {{ result.degraded }} answers were degraded.
The row without latency is computed from the daemon's answers; the others were measured through it.</p>
{% for title, png, note in figures %}<figure><h2>{{ title }}</h2><img alt="{{ title }}" src="data:image/png;base64,{{ png }}">
<figcaption>{{ note }}</figcaption></figure>
{% endfor %}</html>
"""
