"""The verb `kcm demo`: folder, steps, table, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def demo(
    task: Annotated[str, typer.Option("--task", help="A fetched task's name, or a task.toml with all five data files.")] = "20newsgroups",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for models, store, logs and report.html; default runs/demo/<n>.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the documents and the folds.")] = 0,
    stream: Annotated[int, typer.Option(min=50, help="Unlabelled documents that the edge learns from.")] = 2200,
    test: Annotated[int, typer.Option(min=20, help="Documents that every row of the table answers.")] = 500,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON on stdout.")] = False,
) -> None:
    """The real thing in small, offline, in about three minutes on two cores.

    Fits a small model on a few labels and a head on the large one, starts `kcm cloud` and `kcm edge` as processes, streams
    unlabelled documents through gRPC, distils the large model's answers, swaps the bundle under the running edge, and compares
    on the same documents: always small, always large, KCM before, KCM after, and a control that recalibrates without distilling.
    """
    from kcm.app.demo.report import summary, table, write_report
    from kcm.app.demo.steps import Demo, Sizes
    from kcm.app.folders import RUNS, writable
    from kcm.app.models import one_thread
    from kcm.app.progress import Steps
    from kcm.assets import task_path
    from kcm.errors import ConfigError
    from kcm.task import load_task
    from training.run import next_run_folder

    one_thread()
    loaded = load_task(task_path(task))
    if missing := [name for name in ("train", "large_train", "stream", "calibration", "test") if not getattr(loaded.data, name)]:
        raise ConfigError(f"the demo needs all five data files; task {loaded.id} has no {missing[0]}", fix="add it under [data]")
    writable(out or RUNS / "demo")
    folder = (out or next_run_folder(RUNS, "demo")).resolve()
    if (folder / "edge").exists():
        raise ConfigError(f"{folder} holds an earlier demo", fix="choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    outcome = Demo(loaded, Sizes(stream=stream, test=test), folder, seed=seed, steps=Steps()).run()
    result = summary(outcome)
    (folder / "metrics.json").write_text(json.dumps(result, indent=1))
    write_report(folder / "report.html", outcome, result)
    typer.echo(json.dumps(result) if as_json else table(result))
    typer.echo(f"report: {folder / 'report.html'}", err=True)
