"""The protocol's plots from its JSON (training.protocol), drawn without a display and without pyplot's global state.

Colours: Okabe & Ito's palette, told apart with any colour vision; line styles say the same again in grey.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.protocol import ORACLE, OURS

Json = Mapping[str, Any]

# Baselines that a reader compares first get colour; the others stay in the background.
_COLOUR = {
    OURS: "#0072B2",
    "tempered": "#D55E00",
    "mlp": "#009E73",
    "kan": "#009E73",
    "confidence": "#56B4E9",
    "max-softmax": "#E69F00",
    "entropy": "#CC79A7",
    "margin": "#7F6A00",
    "length": "#8C8C8C",
    "random": "#8C8C8C",
    ORACLE: "#000000",
}
_DASH: dict[str, Any] = {
    "tempered": "--",
    "mlp": "-.",
    "kan": "-.",
    "max-softmax": (0, (5, 1, 1, 1, 1, 1)),
    "entropy": (0, (3, 1)),
    "margin": (0, (1, 1)),
    "length": (0, (4, 3)),
    "random": ":",
    ORACLE: (0, (8, 2)),
}
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E6EA",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.edgecolor": "#5A6470",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "kcm",  # the same figure gives the same file
    "svg.fonttype": "path",
}


def draw(result: Json, titles: Mapping[str, str]) -> dict[str, tuple[Figure, str]]:
    """Name → (figure, what it shows). A figure whose data is missing is left out."""
    with rc_context(_STYLE):
        figures = {
            "accuracy-against-calls": (
                _tradeoff(result, titles),
                "Every threshold on the test split, ties in expectation; the band is " + _band_name(result) + ". "
                "The diamond is the run's own ε, chosen on calibration samples.",
            ),
            "targets": (
                _targets(result, titles),
                "ε for each target was read off the same calibration samples for every system; on the diagonal the target was met.",
            ),
            "risk-coverage": (
                _risk(result, titles),
                "The small model's error among its most confident answers, by each score: lower is better.",
            ),
            "reliability": (
                _reliability(result, titles),
                "Ten bins of equally many test samples; bars are 95 % Wilson intervals. On the diagonal the claim is true.",
            ),
        }
        if result["latency"]["cloud"] is not None:
            figures["latency"] = (_latency(result), "One sample at a time, on " + result["latency"]["machine"] + ", without a network.")
    return figures


def svg(figure: Figure) -> str:
    """As a data URI: one file, sharp at any size, and no ids that could clash with another figure's."""
    data = io.BytesIO()
    with rc_context(_STYLE):
        figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    return "data:image/svg+xml;base64," + base64.b64encode(data.getvalue()).decode()


def png(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=130, facecolor="white")


def _band_name(result: Json) -> str:
    return f"± 1 sd over {len(result['runs'])} seeds" if len(result["runs"]) > 1 else "the 95 % bootstrap interval over test samples"


def _line(axes: Axes, name: str, x: Any, y: Any, titles: Mapping[str, str]) -> None:
    ours = name == OURS
    axes.plot(
        x,
        y,
        label=titles[name],
        color=_COLOUR[name],
        linestyle=_DASH.get(name, "-"),
        linewidth=2.4 if ours else 1.3,
        zorder=4 if ours else 3,
    )


def _canvas(width: float = 7.2, height: float = 4.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _legend_beside(axes: Axes) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))


def _tradeoff(result: Json, titles: Mapping[str, str]) -> Figure:
    figure, axes = _canvas()
    for name, system in result["systems"].items():
        curve = system["curve"]
        rate = 100 * np.array(curve["rate"])
        _line(axes, name, rate, 100 * np.array(curve["accuracy"]), titles)
        if name == OURS and curve["low"] is not None:
            axes.fill_between(
                rate, 100 * np.array(curve["low"]), 100 * np.array(curve["high"]), color=_COLOUR[name], alpha=0.2, linewidth=0
            )
    for name, words, style in (("always-large", "always large", "-"), ("always-small", "always small", (0, (1, 2)))):
        level = 100 * result["references"][name]["accuracy"]["mean"]
        axes.axhline(level, color="#5A6470", linewidth=1, linestyle=style, zorder=2, label=f"{words}, {level:.1f} %")
    point = result["operating_point"]
    x, y = 100 * point["calls"]["mean"], 100 * point["accuracy"]["mean"]
    axes.plot(
        [x], [y], marker="D", color=_COLOUR[OURS], markeredgecolor="white", markersize=8, linestyle="", zorder=6, label="at the run's ε"
    )
    axes.set(xlabel="cloud calls, %", ylabel="accuracy, %", xlim=(0, 100))
    _legend_beside(axes)
    return figure


def _targets(result: Json, titles: Mapping[str, str]) -> Figure:
    figure, axes = _canvas(7.2, 3.8)
    axes.plot([0, 100], [0, 100], color="#5A6470", linewidth=0.9, zorder=2)
    for name, system in result["systems"].items():
        if name != ORACLE:
            points = system["targets"]
            _line(axes, name, [100 * p["target"] for p in points], [100 * p["calls"]["mean"] for p in points], titles)
    axes.set(xlabel="target share of cloud calls, %", ylabel="realised on the test split, %", xlim=(0, 100), ylim=(0, 100))
    _legend_beside(axes)
    return figure


def _risk(result: Json, titles: Mapping[str, str]) -> Figure:
    figure, axes = _canvas()
    for name, system in result["systems"].items():
        curve = system["risk_coverage"]
        _line(axes, name, 100 * np.array(curve["coverage"]), 100 * np.array(curve["risk"]), titles)
    axes.set(xlabel="coverage: share that the small model answers, %", ylabel="its error there, %", xlim=(0, 100))
    # With hardly any coverage a poor score's error jumps about: the axis is for the rest.
    axes.set_ylim(0, 100 * min(1.0, 1.4 * max(curve["risk"][-1], 0.01)))
    _legend_beside(axes)
    return figure


def _reliability(result: Json, titles: Mapping[str, str]) -> Figure:
    figure, axes = _canvas(7.2, 4.2)
    axes.plot([0, 1], [0, 1], color="#5A6470", linewidth=0.9, zorder=2)
    for name, system in result["systems"].items():
        rows = system["reliability"]
        if rows is None or name == "max-softmax":  # untempered, it is known to be off: its ECE is in the table
            continue
        claimed, right, low, high = (np.array([row[key] for row in rows]) for key in ("claimed", "right", "low", "high"))
        bars = np.maximum(0, [right - low, high - right])
        label = f"{titles[name]}, ECE {100 * system['ece']['mean']:.1f} %"
        axes.errorbar(
            claimed,
            right,
            bars,
            label=label,
            color=_COLOUR[name],
            linestyle=_DASH.get(name, "-"),
            marker="o",
            markersize=4,
            linewidth=1.3,
            elinewidth=0.8,
        )
    axes.set(xlabel="claimed probability that the small model is right", ylabel="share right", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="upper left")
    return figure


def _latency(result: Json) -> Figure:
    figure, axes = _canvas(7.2, 3.2)
    for path, colour, words in (("local", _COLOUR[OURS], "local"), ("cloud", _COLOUR["tempered"], "large model in process")):
        found = result["latency"][path]
        values = np.sort(found["milliseconds"])
        label = f"{words}: p50 {found['p50_ms']:.2f} ms, p99 {found['p99_ms']:.2f} ms"
        axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post", color=colour, label=label, linewidth=1.8)
    axes.set(xscale="log", xlabel="milliseconds a sample", ylabel="share done by then", ylim=(0, 1.02))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
    return figure
