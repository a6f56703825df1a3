"""`kcm export` and `kcm verify`: from a run to a bundle that a device may trust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kcm.app.folders import claim
from kcm.app.progress import Steps

if TYPE_CHECKING:
    from kcm.bundle import Manifest
    from training.run import Run
    from training.small import Small

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run of `kcm train` or `kcm distill`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option("--out", help="The bundle's folder.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """One fused ONNX graph (small model, judge, candidates, C_x), verified against torch, in a bundle with hashes.

    Try it: kcm export runs/train/1 --out bundle
    """
    manifest = export_run(run, out, force=force)
    if as_json:
        typer.echo(json.dumps({"bundle": str(out), "bundle_id": manifest.bundle_id}))
        return
    size = sum(entry.size for entry in manifest.files.values())
    typer.echo(f"{out}: bundle {manifest.bundle_id}, {size / 1e6:.1f} MB; next: kcm edge --bundle {out}")


def export_run(folder: Path, out: Path, *, force: bool) -> Manifest:
    """Export and verify beside `out`, then put it in place: a bundle that doesn't agree with torch never appears there."""
    import shutil

    from export.bundle import export_bundle
    from kcm.app.models import load_small_kind
    from kcm.bundle import MANIFEST
    from training.run import load_run

    claim(out, MANIFEST, force=force)
    run = load_run(folder)
    building = out.with_name(f".{out.name}.building")
    try:
        manifest = export_bundle(run, building, golden_texts=run.texts)
        check(run, load_small_kind(run.task, Steps(quiet=True)), building, run.texts[:256])
        shutil.rmtree(out, ignore_errors=True)
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    (folder / "bundle_id").write_text(manifest.bundle_id)
    return manifest


def check(run: Run, kind: Small, bundle: Path, texts: list[str]) -> dict[str, float]:
    """Raises VerifyError or BundleError where the bundle isn't the run's."""
    from export.verify import verify as compare
    from kcm.bundle import load_bundle

    return compare(run, kind, load_bundle(bundle), texts).to_dict()


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle of `kcm export`.")],
    run: Annotated[Path, typer.Option("--run", help="The run that it was exported from.")],
    texts: Annotated[Path | None, typer.Option("--texts", help="A file of texts; default: the task's test or train file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare torch and ONNX Runtime on logits, answers, C_x and decisions; exit code 6 where they differ.

    Try it: kcm verify bundle --run runs/train/1
    """
    from kcm.app.models import load_small_kind, one_thread
    from training.data import load_split, read_rows
    from training.run import load_run

    one_thread()
    loaded = load_run(run)
    task = loaded.task
    if texts is not None:
        chosen = read_rows(texts, task.data.text_column, task.data.label_column, labels_optional=True)[0]
    else:
        chosen = load_split(task, "test" if task.data.test else "train").texts
    report: dict[str, Any] = check(loaded, load_small_kind(task, Steps(quiet=True)), bundle, chosen)
    if as_json:
        typer.echo(json.dumps(report))
        return
    typer.echo(
        f"{report['samples']} samples: logits within {report['logits_error']:.1e} (relative), C_x within {report['confidence_error']:.1e}, "
        f"{report['labels']} answers differ, {report['decisions']} decisions differ ({report['excused']} of them at ε itself)"
    )
