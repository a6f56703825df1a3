"""`kcm train` and `kcm train-large`: the first run, and the large model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kcm.app.folders import RUNS, claim, claim_run
from kcm.app.progress import Steps, left_behind

if TYPE_CHECKING:
    from kcm.task import Task
    from training.data import Split
    from training.run import Run

TaskName = Annotated[str, typer.Option("--task", help="A task.toml or its folder, or a fetched task's name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def train(
    task: TaskName,
    out: Annotated[Path | None, typer.Option("--out", help="The run's folder; default runs/train/<n>.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the folds, the judge's start, and an image net's first weights and batches.")] = 0,
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
    claim_run(out, "train", "run.json", force=force)
    loaded = load_task(task_path(task))
    train_split = load_split(loaded, "train")
    test = _test(loaded)
    unseen = [label for i, label in enumerate(loaded.labels) if i not in set(train_split.y.tolist())]
    if unseen and not loaded.gallery.file:
        shown = ", ".join(unseen[:5]) + (", …" if len(unseen) > 5 else "")
        typer.echo(f"warning: {len(unseen)} label(s) have no row in train, so the small model can't learn them: {shown}", err=True)
    with left_behind("no run was written"):
        kind = load_small_kind(loaded, steps)
        run = train_run(loaded, kind, train_split, test, seed=seed, progress=steps)
    folder = out or next_run_folder(RUNS, "train")
    with left_behind(f"{folder} is unfinished"):
        save_run(folder, run)
    _report(folder, run, as_json, f"next: kcm calibrate {folder} --cloud-rate 0.3, then kcm export {folder} --out BUNDLE")


def train_large(
    task: TaskName,
    out: Annotated[Path, typer.Option("--out", help="Folder of the large model, for `kcm cloud --large`.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a large model that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fit the task's large model on large_train: an encoder's head, or an image net (a causal model needs no fitting; of the
    task's own ONNX classifier only a temperature and the hint's weight are fitted).

    An image net that Ctrl-C cut goes on from its last checkpoint when the same command runs again.

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
    # A user's own model was fitted on what nobody here knows: only rows named for it are looked at.
    named = "large_train" if loaded.data.large_train or loaded.large.kind == "onnx" else "train"
    if loaded.gallery.file:
        named = "train"  # for temperature and hint weight: a retrieval task's large_train are pairs without labels
    split = load_split(loaded, named) if loaded.large.kind != "causal" and getattr(loaded.data, named) else None
    with left_behind("no large model was written"):
        model = LargeInProcess(loaded, out, split, steps)
    test = _test(loaded)
    with left_behind(f"the large model is in {out}, not measured on test"):
        accuracy = (
            None if test is None or loaded.large.kind == "causal" else float((model.logits(test.payloads).argmax(1) == test.y).mean())
        )
    if as_json:
        typer.echo(json.dumps({"folder": str(out), "test_accuracy": accuracy}))
    else:
        typer.echo(f"{out}: large model of task {loaded.id}" + ("" if accuracy is None else f", {accuracy:.1%} on test"))


def _test(task: Task) -> Split | None:
    from training.data import load_split

    return load_split(task, "test") if task.data.test else None


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
