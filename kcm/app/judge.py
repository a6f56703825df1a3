"""`kcm judge show`: what a run's KAN judge has learnt, edge by edge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kcm.app.folders import claim
from kcm.errors import ConfigError

if TYPE_CHECKING:
    from training.judge import Judge, Predictions
    from training.kan_look import Edge, Effect
    from training.run import Run

judge = typer.Typer(help="Look into a run's judge.", no_args_is_help=True, rich_markup_mode=None)
RESULT = "judge.json"


@judge.callback()
def _verbs() -> None:
    """Look into a run's judge: the curves by which it decides, and what is lost without the weak ones.

    Try it: kcm judge show runs/train/1
    """


@judge.command()
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run of `kcm train` or `kcm distill` whose judge is a KAN.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of edges.png, effects.png, judge.json; default RUN/judge.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="So many edges in the table and in edges.png.")] = 12,
    samples: Annotated[int, typer.Option("--samples", min=2, help="Look at no more out-of-fold samples than these.")] = 5000,
    prune: Annotated[
        float | None, typer.Option("--prune", min=0.0, max=1.0, help="Cut edges with a smaller share than this; the run stays as it is.")
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", help="With --prune: write the pruned run into this folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is at --save.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print judge.json on stdout.")] = False,
) -> None:
    """Show the edges of a KAN judge by importance, in a table, plots and JSON.

    An edge is a curve from an input of the judge to an outcome: "rank 1" (the small model's answer is right; C_x is its
    probability), "rank 2" and so on, "none". share: its part of the judge's movement on the run's out-of-fold predictions. adds:
    the least and the most that it adds to the outcome's logit, around its mean. bend: 0 is a straight line. Several layers have
    hidden nodes h1, h2, ...; each layer's shares sum to 1.

    trend: "rising", the larger the input is, the more it speaks for the outcome; "falling", the less; "mixed", it turns on the way;
    "flat", it says nothing.

    Try it: kcm judge show runs/train/1
            kcm judge show runs/train/1 --prune 0.01 --save pruned
    """
    from kcm.app.models import one_thread
    from kcm.errors import require
    from training import kan_look
    from training.run import load_run

    require("matplotlib", "train")  # now, not after the work
    if save is not None and prune is None:
        raise ConfigError("--save writes a pruned run", fix="give --prune SHARE, too")
    one_thread()
    loaded = load_run(run)
    kan_look.kan_layers(loaded.judge)
    # What is there is our own output of an earlier look, and the same run gives it again.
    folder = claim(out or run / "judge", RESULT, force=True)
    if save is not None:
        claim(save, "run.json", force=force)
    data = _drawn(loaded.out_of_fold, samples)
    shown, cut = loaded.judge, None
    if prune is not None:
        shown, left = kan_look.prune(loaded.judge, data, prune)
        cut = _compared(loaded, shown, prune, left)
    edges, effects = kan_look.look(shown, data), kan_look.effects(shown, data)
    result = _described(loaded, shown, len(data), edges, effects, cut)
    _write(folder, result, edges[:top], effects)
    if save is not None:
        _save(save, loaded, shown, cut)
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False, allow_nan=False))
        return
    typer.echo(table(result, top))
    typer.echo(f"{folder / 'edges.png'}, effects.png and {RESULT} written")
    if save is not None:
        typer.echo(f"{save}: the pruned run, its ε not calibrated; next: kcm calibrate {save} --cloud-rate 0.3")


def _drawn(predictions: Predictions, most: int) -> Predictions:
    import numpy as np

    if len(predictions) <= most:
        return predictions
    return predictions.take(np.sort(np.random.default_rng(0).choice(len(predictions), most, replace=False)))


def _compared(run: Run, pruned: Judge, threshold: float, left: int) -> dict[str, Any]:
    """What pruning costs on the run's out-of-fold predictions; AUROC is of the labelled ones, of the small model being right."""
    import numpy as np

    from training.evaluate import auroc
    from training.kan_look import kan_layers

    before, after = run.judge.confidence(run.out_of_fold), pruned.confidence(run.out_of_fold)
    right = (run.out_of_fold.logits.argmax(1) == run.targets.argmax(1))[run.labelled]
    ranked = 0 < right.sum() < right.size
    return {
        "threshold": threshold,
        "edges_before": sum(layer.base.numel() for layer in kan_layers(run.judge)),
        "edges_after": left,
        "confidence_change": float(np.abs(after - before).max()),
        "auroc_before": auroc(before[run.labelled], right) if ranked else None,
        "auroc_after": auroc(after[run.labelled], right) if ranked else None,
    }


def _described(
    run: Run, shown: Judge, samples: int, edges: list[Edge], effects: list[Effect], cut: dict[str, Any] | None
) -> dict[str, Any]:
    """judge.json: every curve in its input's own unit."""
    from training.kan_look import node_names, unit

    names = node_names(shown)
    return {
        "schema": 1,
        "task": run.task.id,
        "round": run.info.round,
        "routes_by": run.threshold.head.head,
        "samples": samples,
        "grid": shown.spec.grid,
        "degree": shown.spec.degree,
        "nodes": names,
        "pruned": cut,
        "edges": [
            {
                "layer": e.layer + 1,
                "input": names[e.layer][e.input],
                "unit": unit(names[e.layer][e.input]),
                "output": names[e.layer + 1][e.output],
                **{key: _short(getattr(e, key)) for key in ("share", "low", "high", "mean", "bend")},
                "trend": e.trend,
                "x": [_short(v) for v in e.x],
                "y": [_short(v) for v in e.y],
            }
            for e in edges
        ],
        "effects": [
            {
                "input": names[0][e.input],
                "unit": unit(names[0][e.input]),
                "spread": _short(e.spread),
                **{key: [_short(v) for v in getattr(e, key)] for key in ("x", "mean", "low", "high")},
            }
            for e in effects
        ],
    }


def _short(value: float) -> float:
    """Six digits: a file to read."""
    return float(f"{float(value):.6g}")


def _write(folder: Path, result: dict[str, Any], edges: list[Edge], effects: list[Effect]) -> None:
    """judge.json first: it marks the folder as ours."""
    from training.kan_plots import draw_edges, draw_effects

    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).write_text(json.dumps(result, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    of = f"task {result['task']}, round {result['round']}, {result['samples']} out-of-fold samples"
    names = result["nodes"]
    for name, figure in (
        ("edges.png", draw_edges(edges, names, f"The judge's strongest edges: {of}")),
        ("effects.png", draw_effects(effects, names, f"What each input does to C_x: {of}")),
    ):
        figure.savefig(folder / name, dpi=150, facecolor="white")


def _save(folder: Path, run: Run, pruned: Judge, cut: dict[str, Any] | None) -> None:
    """The run with the pruned judge. ε and head were chosen for another one, and its figures measured on it."""
    from dataclasses import replace

    from training.calibrate import fixed
    from training.run import save_run

    threshold = fixed(pruned.confidence(run.out_of_fold), run.task.judge.epsilon)
    save_run(folder, replace(run, judge=pruned, threshold=threshold, head=None, metrics={"pruned": cut}))


def table(result: dict[str, Any], top: int) -> str:
    """The strongest edges, and what each input does to C_x."""
    edges, layers = result["edges"], len(result["nodes"]) - 1
    lines = [f"{'edge':31}  share   adds from … to   trend     bend"]
    for e in edges[:top]:
        where = f"{e['input']} → {e['output']}"
        lines.append(f"{where:31} {e['share']:6.1%}  {e['low']:+7.3f} {e['high']:+7.3f}   {e['trend']:8} {e['bend']:5.2f}")
    if len(edges) > top:
        rest = sum(e["share"] for e in edges[top:]) / layers
        lines.append(f"{len(edges) - top} more edges hold {rest:.0%}; --top {len(edges)} lists them")
    lines.append("trend: as the input grows, it speaks more (rising) or less (falling) for the outcome, first one then the other (mixed)")
    lines += ["", f"{'input':31}  moves C_x by (sd, points)"]
    lines += [f"{e['input']:31} {100 * e['spread']:6.2f}" for e in result["effects"]]
    if cut := result["pruned"]:
        kept = f"{cut['edges_after']} of {cut['edges_before']} edges left at --prune {cut['threshold']:g}"
        ranking = "" if cut["auroc_before"] is None else f"; AUROC {cut['auroc_before']:.4f} → {cut['auroc_after']:.4f}"
        lines += ["", f"{kept}: C_x moves by at most {cut['confidence_change']:.4f}{ranking}"]
    if result["routes_by"] != "confidence":
        lines += ["", f"this run routes by {result['routes_by']}, not by the judge's C_x"]
    return "\n".join(lines)
