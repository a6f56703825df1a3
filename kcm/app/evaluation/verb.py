"""The verb `kcm eval`: runs, large model, protocol, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs of `kcm train` or `kcm distill`; several are seeds.")],
    large: Annotated[Path, typer.Option("--large", help="Folder of the large model (kcm train-large makes one).")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of report.html, eval.json and plots; default runs/eval/<n>.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an evaluation that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print eval.json on stdout.")] = False,
) -> None:
    """Measure how a run routes on its frozen test split, beside every baseline, in one report.html.

    Accuracy against cloud calls, APGR, CPT, selective risk, calibration, target against realised rates, cost, latency and bytes; paired
    bootstrap against each baseline; accuracy by class frequency. ε is never chosen on the test split. Five runs of different
    seeds are the protocol: mean ± sd is over them, and one run gets bootstrap intervals alone. The large model is asked in process.

    Try it: kcm eval runs/train/1 --large large
    """
    import shutil

    from kcm.app.evaluation.assemble import assemble
    from kcm.app.evaluation.measure import load_runs
    from kcm.app.evaluation.report import RESULT, table, write
    from kcm.app.folders import RUNS, claim_run, writable
    from kcm.app.models import one_thread
    from kcm.app.progress import Steps, left_behind
    from kcm.errors import require
    from training.run import next_run_folder

    for module in ("matplotlib", "jinja2", "sklearn"):
        require(module, "train")  # now, not after the work
    one_thread()
    steps = Steps(quiet=as_json)
    claim_run(out, "eval", RESULT, force=force)
    if out is not None:
        writable(out.parent)  # the report is made beside its place
    with left_behind("no report was written"):
        result = assemble(runs, load_runs(runs), large, steps)
    folder = out or next_run_folder(RUNS, "eval")
    building = folder.with_name(f".{folder.name}.building")
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        write(building, result)
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False, allow_nan=False))
        return
    typer.echo(table(result))
    typer.echo(f"{folder / 'report.html'} written")
