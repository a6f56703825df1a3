"""`kcm distill`: the next round's run from the teacher store, and the gate that it must pass before it is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from kcm.app.folders import RUNS, claim, claim_run, writable
from kcm.app.progress import Steps, left_behind
from kcm.errors import ConfigError, DataError, VerifyError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kcm.sample import Payload
    from kcm.task import Task
    from training.data import Split
    from training.run import Run
    from training.small import Small

_HELD_BACK = ("test", "calibration", "selection", "gold")


def distill(
    run: Annotated[Path, typer.Argument(help="The run whose bundle the devices use now.")],
    store: Annotated[Path, typer.Option("--store", help="The teacher store, compacted (`kcm store compact`).")],
    out: Annotated[Path | None, typer.Option("--out", help="The new run's folder; default runs/distill/<n>.")] = None,
    bundle: Annotated[Path | None, typer.Option("--bundle", help="Also export the new run as a bundle here.")] = None,
    large: Annotated[
        Path | None,
        typer.Option("--large", help="Folder of the large model: calibrates ε_l on labelled samples, and the gate compares whole systems."),
    ] = None,
    teacher: Annotated[str, typer.Option("--teacher", help="Read only this teacher's rows.")] = "",
    method: Annotated[str, typer.Option("--method", help="d, kd, mcm or kcm, instead of the task's.")] = "",
    gated: Annotated[bool, typer.Option("--gate/--no-gate", help="Export only a run that is no worse than the one before.")] = True,
    seed: Annotated[int, typer.Option(help="Draws the folds, and which rows stay where a cap leaves some out.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a run or bundle that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """One distillation round: labels, the large model's logits from the store, and the judge's confidence make a better run.

    A tenth of all samples is never learnt from (call rates are calibrated on it), nor is any sample of the test, calibration, selection
    and gold files. Prints before and after.
    The new run's ε keeps the old one's call rate, or its ε; head, hint gate and a promise take `kcm calibrate`.

    The gate compares both runs on the task's gold file; without one on the labels of round 0, which is weaker. A run that may be
    worse is kept, but not exported: exit code 6.

    Try it: kcm distill runs/train/1 --store ./store --bundle bundle-2
    """
    from kcm.app.models import large_logits, load_small_kind, one_thread
    from kcm.bundle import MANIFEST
    from kcm.task import with_method
    from training.data import identity, load_split
    from training.gate import gate
    from training.program import distil_run
    from training.run import load_run, next_run_folder, save_run
    from training.teacher_rows import read_lessons

    one_thread()
    steps = Steps()
    if out is not None and out.resolve() == run.resolve():
        raise ConfigError(f"{out} is the run to distil from", fix="give another --out")
    claim_run(out, "distill", "run.json", force=force)
    if bundle is not None:
        claim(bundle, MANIFEST, force=force)
        writable(bundle.parent)  # the bundle is made beside its place
    previous = load_run(run)
    task = with_method(previous.task, method) if method else previous.task
    train, test, gold = load_split(task, "train"), _optional(task, "test"), _optional(task, "gold")
    if gold is not None and (shared := set(map(identity, gold.payloads)) & set(map(identity, train.payloads))):
        raise DataError(f"{len(shared)} text(s) of {task.data.gold} are in {task.data.train}, too", fix="take them out of one of the two")
    lessons = read_lessons(store, task, teacher, held_back(task), seed=seed)
    steps(f"{len(lessons.payloads)} of the {lessons.stored} rows that {lessons.teacher_id} answered are to be learnt from")
    with left_behind(f"no run was written, {run} is as it was"):
        kind = load_small_kind(task, steps)
        new = distil_run(
            previous,
            kind,
            train,
            test,
            lessons.payloads,
            lessons.logits,
            parent=_bundle_of(previous, run),
            teacher_id=lessons.teacher_id,
            gauge=_gauge(task, large, steps) if large else None,
            seed=seed,
            progress=steps,
            p_escalate=lessons.p_escalate,
            method=method,
        )
        new = recalibrated(new, previous, kind)
        verdict = gate(previous, new, kind, gold, large_logits(large, gold, steps) if large and gold else None)
    new.metrics["gate"] = {**verdict, "overridden": not gated}
    folder = out or next_run_folder(RUNS, "distill")
    with left_behind(f"{folder} is unfinished"):
        save_run(folder, new)
    if not as_json:
        typer.echo(before_after(previous, new))
        typer.echo(threshold_change(previous, new))
    if not verdict["passed"]:
        _refuse(folder, run, verdict, gated=gated)
    if bundle:
        from kcm.app.export import export_run

        with left_behind(f"the new run is in {folder}, no bundle was written; kcm export {folder} --out {bundle}"):
            export_run(folder, bundle, force=force)
    if as_json:
        typer.echo(json.dumps({"run": str(folder), "before": previous.metrics, "after": new.metrics}))
        return
    typer.echo(f"{folder}: round {new.info.round}" + (f", bundle {bundle}" if bundle else f"; next: kcm export {folder} --out BUNDLE"))


def recalibrated(new: Run, previous: Run, kind: Small) -> Run:
    """The new run with ε chosen as the previous one's was, where that needs no labels; else at the previous ε, to be calibrated."""
    from dataclasses import replace

    from kcm.app.samples import unlabelled_scores
    from training.calibrate import fixed, for_rate, reference

    scores, _ = unlabelled_scores(new, kind)
    old = previous.threshold
    if old.method == "cloud-rate" and old.target is not None:
        threshold = for_rate(scores, old.target)
    elif old.head.head != "confidence" and old.cloud_rate is not None:
        # The new run routes by confidence until it is calibrated: an ε on another score would say nothing. The calls do.
        threshold = for_rate(scores, old.cloud_rate)
    else:
        threshold = fixed(scores, old.epsilon)
    return replace(new, threshold=msgspec.structs.replace(threshold, reference=reference(scores, threshold.epsilon)))


def threshold_change(previous: Run, new: Run) -> str:
    """ε before and after, and what of the old calibration the new run doesn't have."""
    old, now = previous.threshold, new.threshold
    rate = "" if now.cloud_rate is None else f", {now.cloud_rate:.1%} cloud calls"
    line = f"ε {old.epsilon:.4f} → {now.epsilon:.4f} by {now.method}{rate}"
    lost = [f"head {old.head.head}"] if old.head.head != now.head.head else []
    lost += ["the promise on accuracy"] if old.guarantee else []
    lost += [f"hint gate {old.hint.arm}"] if old.hint.arm != now.hint.arm else []
    if not lost:
        return line
    return f"{line}; not carried over: {', '.join(lost)}: kcm calibrate the new run as the old one was, then export it"


def before_after(previous: Run, new: Run) -> str:
    """A table of the two rounds' metrics, what was forgotten, and the gate's verdict where there is one."""
    lines = [f"{'':24}{'round ' + str(previous.info.round):>24}{'round ' + str(new.info.round):>24}"]
    for split in ("test", "out_of_fold"):
        if split in previous.metrics and split in new.metrics:
            cells = []
            for run in (previous, new):
                m = run.metrics[split]
                low, high = m["accuracy_interval"]
                cells.append(f"{m['accuracy']:.1%} [{low:.1%}, {high:.1%}]")
            lines.append(f"{'small model, ' + split.replace('_', ' '):24}" + "".join(f"{cell:>24}" for cell in cells))
    lines.append(f"teacher rows: {new.metrics['teacher_rows']}, {new.metrics['teacher_rows_used']:.1%} above ε_l")
    forgotten = new.metrics["forgetting"]
    for name, figures in (("out of fold", forgotten), ("test", forgotten.get("test"))):
        if figures:
            falls = [f"{label} {100 * fall:+.0f}" for label, fall in list(figures["classes"].items())[:3]]
            lines.append(
                f"forgetting, {name}: {_difference(figures)}; classes that fell: {len(figures['classes'])} {', '.join(falls)}".rstrip()
            )
    if verdict := new.metrics.get("gate"):
        lines.append(("gate passed: " if verdict["passed"] else "gate FAILED: ") + _figures(verdict))
        if verdict["weak"]:
            lines.append("the gate had no gold file (under [data]) and read out-of-fold predictions of round 0, which is weaker")
    return "\n".join(lines)


def _refuse(folder: Path, run: Path, verdict: dict[str, Any], *, gated: bool) -> None:
    """Raises VerifyError, or warns where the gate is overridden."""
    said = f"{folder} may be worse than {run} by more than {100 * verdict['tolerance']:.1f} points: {_figures(verdict)}"
    if not gated:
        typer.echo(f"warning: --no-gate: {said}", err=True)
        return
    raise VerifyError(
        f"{said}; the run is kept, no bundle was written",
        fix="more gold or teacher rows, or a higher gate_tolerance under [distill]; "
        f"--no-gate, or kcm export {folder}, publishes it all the same",
    )


def _figures(verdict: dict[str, Any]) -> str:
    failed = verdict["failed"]
    said = (f"{name} {_difference(figures)}{' (fails)' if name in failed else ''}" for name, figures in verdict["figures"].items())
    return "; ".join(said)


def _difference(figures: dict[str, Any]) -> str:
    low, high = figures["interval"]
    change = f"{100 * figures['difference']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{figures['before']:.1%} → {figures['after']:.1%}, {change} on {figures['samples']}"


def held_back(task: Task) -> set[Payload]:
    """Identities of the samples of the task's test, calibration, selection and gold files: never learnt from, whoever sends them."""
    from training.data import identity

    splits = (_optional(task, name) for name in _HELD_BACK)
    return {identity(payload) for split in splits if split is not None for payload in split.payloads}


def _gauge(task: Task, large: Path, steps: Steps) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The large model's logits for labelled samples that were kept back, else for the edge's own."""
    from kcm.app.models import large_logits
    from training.data import load_split

    split = load_split(task, "calibration" if task.data.calibration else "train")
    return large_logits(large, split, steps), split.y


def _optional(task: Task, name: str) -> Split | None:
    from training.data import load_split

    return load_split(task, name) if getattr(task.data, name) else None


def _bundle_of(run: Run, folder: Path) -> str:
    """The id of the bundle that was exported from a run, "" where none was."""
    marker = folder / "bundle_id"
    return marker.read_text().strip() if marker.exists() else ""
