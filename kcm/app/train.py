"""`kcm train`, `kcm train-large` and `kcm distill`: runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kcm.app.folders import claim
from kcm.app.progress import Steps
from kcm.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kcm.task import Task
    from training.data import Split
    from training.run import Run
    from training.small import Small

TaskName = Annotated[str, typer.Option("--task", help="A task.toml or its folder, or a fetched task's name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def train(
    task: TaskName,
    out: Annotated[Path | None, typer.Option("--out", help="The run's folder; default runs/train/<n>.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the folds.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fit the small model and its judge on the task's own labels: a run, which `kcm export` turns into a bundle.

    Try it: kcm train --task r52
    """
    from kcm.app.models import load_small_kind, one_thread
    from kcm.assets import task_path
    from kcm.task import load_task
    from training.data import load_split
    from training.program import train_run
    from training.run import next_run_folder, save_run

    one_thread()
    steps = Steps()
    if out is not None:
        claim(out, "run.json", force=force)
    loaded = load_task(task_path(task))
    train_split = load_split(loaded, "train")
    test = _test(loaded)
    kind = load_small_kind(loaded, steps)
    run = train_run(loaded, kind, train_split, test, seed=seed, progress=steps)
    folder = out or next_run_folder(Path("runs"), "train")
    save_run(folder, run)
    _report(folder, run, as_json, f"next: kcm calibrate {folder} --cloud-rate 0.3, then kcm export {folder} --out BUNDLE")


def train_large(
    task: TaskName,
    out: Annotated[Path, typer.Option("--out", help="Folder of the large model, for `kcm cloud --large`.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a large model that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fit the head of the task's large encoder on large_train (or describe a causal model, which needs no fitting).

    Try it: kcm train-large --task r52 --out large
    """
    from kcm.app.models import LargeInProcess, one_thread
    from kcm.assets import task_path
    from kcm.task import load_task
    from training.data import load_split

    one_thread()
    steps = Steps()
    claim(out, "large.json", force=force)
    loaded = load_task(task_path(task))
    split = load_split(loaded, "large_train" if loaded.data.large_train else "train") if loaded.large.kind == "encoder" else None
    model = LargeInProcess(loaded, out, split, steps)
    test = _test(loaded)
    accuracy = None if test is None or split is None else float((model.logits(test.texts).argmax(1) == test.y).mean())
    if as_json:
        typer.echo(json.dumps({"folder": str(out), "test_accuracy": accuracy}))
    else:
        typer.echo(f"{out}: large model of task {loaded.id}" + ("" if accuracy is None else f", {accuracy:.1%} on test"))


def distill(
    run: Annotated[Path, typer.Argument(help="The run whose bundle the devices use now.")],
    store: Annotated[Path, typer.Option("--store", help="The teacher store, compacted (`kcm store compact`).")],
    out: Annotated[Path | None, typer.Option("--out", help="The new run's folder; default runs/distill/<n>.")] = None,
    bundle: Annotated[Path | None, typer.Option("--bundle", help="Also export the new run as a bundle here.")] = None,
    large: Annotated[
        Path | None, typer.Option("--large", help="Folder of the large model, to calibrate ε_l on labelled samples; without it ε_l is 0.")
    ] = None,
    teacher: Annotated[str, typer.Option("--teacher", help="Read only this teacher's rows.")] = "",
    seed: Annotated[int, typer.Option(help="Draws the folds.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a run or bundle that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """One distillation round: labels, the large model's logits from the store, and the judge's confidence make a better run.

    A tenth of all texts is never learnt from (call rates are calibrated on it), nor is any text of the test and calibration
    files. Prints before and after. The new run's ε is calibrated the same way as the old one's, for the same target.

    Try it: kcm distill runs/train/1 --store ./store --bundle bundle-2
    """
    from kcm.app.models import load_small_kind, one_thread
    from kcm.bundle import MANIFEST
    from training.data import load_split
    from training.program import distil_run
    from training.run import load_run, next_run_folder, save_run
    from training.teacher_rows import read_lessons

    one_thread()
    steps = Steps()
    if out is not None:
        if out.resolve() == run.resolve():
            raise ConfigError(f"{out} is the run to distil from", fix="give another --out")
        claim(out, "run.json", force=force)
    if bundle is not None:
        claim(bundle, MANIFEST, force=force)
    previous = load_run(run)
    task = previous.task
    texts, logits, teacher_id = read_lessons(store, task, teacher, held_back_texts(task))
    kind = load_small_kind(task, steps)
    new = distil_run(
        previous,
        kind,
        load_split(task, "train"),
        _test(task),
        texts,
        logits,
        parent=_bundle_of(previous, run),
        teacher_id=teacher_id,
        gauge=_gauge(task, large, steps) if large else None,
        seed=seed,
        progress=steps,
    )
    folder = out or next_run_folder(Path("runs"), "distill")
    save_run(folder, recalibrated(new, previous, kind))
    if bundle:
        from kcm.app.export import export_run

        export_run(folder, bundle, force=force)
    if as_json:
        typer.echo(json.dumps({"run": str(folder), "before": previous.metrics, "after": new.metrics}))
        return
    typer.echo(before_after(previous, new))
    typer.echo(f"{folder}: round {new.info.round}" + (f", bundle {bundle}" if bundle else f"; next: kcm export {folder} --out BUNDLE"))


def recalibrated(new: Run, previous: Run, kind: Small) -> Run:
    """The new run with ε chosen as the previous one's was, where that needs no labels; else at the previous ε, to be calibrated."""
    from dataclasses import replace

    from kcm.app.export import unlabelled_confidences
    from training.calibrate import fixed, for_rate

    confidence, _ = unlabelled_confidences(new, kind)
    old = previous.threshold
    rate = old.method == "cloud-rate" and old.target is not None
    return replace(new, threshold=for_rate(confidence, old.target or 0.0) if rate else fixed(confidence, old.epsilon))


def before_after(previous: Run, new: Run) -> str:
    """A table of the two rounds' metrics."""
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
    return "\n".join(lines)


def held_back_texts(task: Task) -> set[str]:
    """The texts of the task's test and calibration files: whoever sends them through an edge, they are never learnt from."""
    from training.data import load_split

    return {text for name in ("test", "calibration") if getattr(task.data, name) for text in load_split(task, name).texts}


def _gauge(task: Task, large: Path, steps: Steps) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The large model's logits for labelled samples that were kept back, else for the edge's own."""
    from kcm.app.models import large_logits
    from training.data import load_split

    split = load_split(task, "calibration" if task.data.calibration else "train")
    return large_logits(large, split, steps), split.y


def _test(task: Task) -> Split | None:
    from training.data import load_split

    return load_split(task, "test") if task.data.test else None


def _bundle_of(run: Run, folder: Path) -> str:
    """The id of the bundle that was exported from a run, "" where none was."""
    marker = folder / "bundle_id"
    return marker.read_text().strip() if marker.exists() else ""


def _report(folder: Path, run: Run, as_json: bool, next_step: str) -> None:
    if as_json:
        typer.echo(json.dumps({"run": str(folder), **run.metrics}))
        return
    for split, m in run.metrics.items():
        kind = run.task.judge.kind
        judge, softmax = m[f"auroc_{kind}"], m["auroc_max_softmax"]
        ranking = "all alike" if judge is None else f"judge {judge:.3f}, max-softmax {softmax:.3f}"
        typer.echo(f"{split.replace('_', ' ')}: small model {m['accuracy']:.1%} on {m['samples']}; AUROC of being right: {ranking}")
    typer.echo(f"{folder}: {next_step}")
