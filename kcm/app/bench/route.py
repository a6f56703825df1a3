"""`kcm bench route`: routing on recorded outcomes, with the baselines beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kcm.app.folders import writable
from kcm.app.progress import Steps
from kcm.errors import ConfigError

if TYPE_CHECKING:
    from training.outcomes import Outcomes
    from training.recorded import Trial


def route(
    train: Annotated[Path, typer.Option("--train", help="CSV: prompt, weak_correct, strong_correct; optionally weak_response, subject.")],
    test: Annotated[Path | None, typer.Option("--test", help="Another such file, to score on.")] = None,
    cv: Annotated[int, typer.Option("--cv", min=2, help="Without --test: folds of cross-validation on the first file.")] = 5,
    group_by: Annotated[str, typer.Option("--group-by", help="prompt, or subject: whole subjects are left out.")] = "prompt",
    answers: Annotated[bool, typer.Option("--answer/--no-answer", help="Read the weak model's answer too, where it is recorded.")] = True,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Shuffles of the folds.")] = 5,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for route.json and route.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Would routing between two models pay? Learns on recorded outcomes of both, and scores on prompts that it hasn't seen.

    APGR is the share of the gap between weak and strong model that routing recovers, over all budgets: 0.5 is chance. CPT(80) is the share
    of strong calls that recovers 80 % of the gap. Beside ours: the same judge as an MLP of equal size, a forest on the same numbers,
    ridge on TF-IDF, prompt length, random, and the oracle.

    Try it: kcm bench route --train outcomes.csv --cv 5
            kcm bench route --train outcomes.csv --test later.csv --json
    """
    from kcm.app.models import one_thread
    from training.outcomes import read_outcomes
    from training.recorded import cross_validated, held_out, measure

    if group_by not in ("prompt", "subject"):
        raise ConfigError(f"--group-by {group_by!r} is unknown", fix="--group-by prompt or subject")
    if test is not None and group_by == "subject":
        raise ConfigError("--group-by leaves groups of one file out; with --test nothing is left out", fix="drop --group-by or --test")
    if out is not None:
        writable(out)
    one_thread()
    steps = Steps(quiet=as_json)
    data = read_outcomes(train)
    scored = read_outcomes(test) if test is not None else data
    reads = answers and bool(data.answers) and bool(scored.answers)
    steps(
        f"{len(data)} rows, weak {data.weak.mean():.1%}, strong {data.strong.mean():.1%}; " + ("with" if reads else "without") + " answers"
    )
    if test is not None:
        trials = [held_out(data, scored, answers=reads, progress=steps)]
    else:
        trials = [cross_validated(data, cv, group_by, seed, answers=reads, progress=steps) for seed in range(seeds)]
    result: dict[str, Any] = {
        **measure(scored, trials),
        "schema": 1,
        "rows": len(scored),
        "weak": float(scored.weak.mean()),
        "strong": float(scored.strong.mean()),
        "answers": reads,
        "protocol": f"fitted on {train.name}, scored on {test.name}" if test else f"{cv}-fold by {group_by}, {seeds} shuffle(s)",
        "seconds": round(steps.seconds, 1),
    }
    if out is not None:
        _write(out, result, scored, trials)
    typer.echo(json.dumps(result) if as_json else table(result))


def table(result: dict[str, Any]) -> str:
    """A line per system, the paired differences below."""
    lines = [
        f"{result['rows']} rows, weak {result['weak']:.1%}, strong {result['strong']:.1%}; {result['protocol']}; {result['seconds']:.0f} s",
        "",
        f"{'':14} {'APGR exact':15} {'APGR (10 quantiles)':20} CPT(50)  CPT(80)  CPT(95)",
    ]
    for name in result["systems"]:
        at = result[name]
        exact, rough = (f"{at[key]:.3f} ± {at[key + '_sd']:.3f}" for key in ("apgr_exact", "apgr"))
        parts = ["      –" if at[key] is None else f"{at[key]:7.1%}" for key in ("cpt50", "cpt80", "cpt95")]
        lines.append(f"{name:14} {exact:15} {rough:20} {'  '.join(parts)}")
    lines.append("")
    for name, at in result["paired"].items():
        lines.append(f"{name.replace('_minus_', ' − '):24} {at['mean']:+.3f} [{at['low']:+.3f}, {at['high']:+.3f}]")
    lines.append("mean ± sd over shuffles; differences in exact APGR with 95 % intervals, paired, prompts resampled")
    return "\n".join(lines)


def _write(out: Path, result: dict[str, Any], data: Outcomes, trials: list[Trial]) -> None:
    from matplotlib.figure import Figure

    from training.recorded import mean_curve

    out.mkdir(parents=True, exist_ok=True)
    (out / "route.json").write_text(json.dumps(result, indent=1))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in result["systems"]:
        shares, accuracy = mean_curve(data, trials, name)
        axes.plot(
            100 * shares, 100 * accuracy, label=f"{name} ({result[name]['apgr_exact']:.3f})", linewidth=2.5 if name == "ours" else 1.2
        )
    axes.set_xlabel("calls of the strong model, %")
    axes.set_ylabel("accuracy, %")
    axes.set_title(result["protocol"])
    axes.grid(alpha=0.3)
    axes.legend(title="APGR", frameon=False, fontsize=8)
    figure.savefig(out / "route.png", dpi=150)
