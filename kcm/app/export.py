"""`kcm export` and `kcm verify`: from a run to a bundle that a device may trust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kcm.app.folders import claim, writable
from kcm.app.progress import Steps
from kcm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from kcm.bundle import Manifest, Precision
    from kcm.sample import Payload
    from kcm.task import Task
    from training.run import Run
    from training.small import Small

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run of `kcm train` or `kcm distill`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option("--out", help="The bundle's folder.")],
    precision: Annotated[
        list[str] | None, typer.Option("--precision", help="fp32, fp16, int8 or all; several with commas. fp32 is always in.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="Also build engines: tensorrt (on a GPU here) or tensorrt-rtx (also without one)."),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option("--target", help="With tensorrt-rtx: sm86, sm89, sm120, ...; default: this machine's GPU.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """One fused ONNX graph (small model, judge, candidates, C_x), verified against torch, in a bundle with hashes.

    fp32 answers as the run does. fp16 halves the graph: for GPUs and for memory (a CPU computes it in fp32). int8 leaves a third of
    an n-gram model and a quarter of an encoder or image net: tables as int8 rows, products by ranges that the run's own samples give;
    the judge stays fp32. Each of them gets its own ε: the calls, accuracy or promise that `kcm calibrate` was asked for, chosen again on
    its own scores. `kcm verify` says what each one loses.

    Try it: kcm export runs/train/1 --out bundle
            kcm export runs/train/1 --out bundle --precision fp16 --precision int8
            kcm export runs/train/1 --out bundle --precision all --engine tensorrt-rtx --target sm89

    An engine never becomes part of the bundle: a device builds its own from the verified ONNX. Engines built here go to the cache
    folder, where `kcm edge` on this machine finds them.
    """
    from kcm.app.engines import build_engines, check_engine
    from kcm.app.engines import table as engine_table

    chosen = parse_precisions([name.strip() for names in precision or ["fp32"] for name in names.split(",")])
    targets = target or []
    if engine is not None:
        check_engine(engine, targets)
    elif targets:
        raise ConfigError("--target goes with an engine", fix="--engine tensorrt-rtx")
    manifest = export_run(run, out, force=force, precisions=chosen, steps=Steps(quiet=as_json or len(chosen) == 1))
    sizes = {name: manifest.files[f"models/{name}.onnx"].size for name in manifest.precisions}
    engines = build_engines(out, engine, targets, Steps(quiet=as_json)) if engine is not None else []
    if as_json:
        typer.echo(json.dumps({"bundle": str(out), "bundle_id": manifest.bundle_id, "model_bytes": sizes, "engines": engines}))
        return
    if engines:
        typer.echo(engine_table(engines))
    if len(sizes) > 1:
        typer.echo("models: " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items()))
    size = sum(entry.size for entry in manifest.files.values())
    then = f"kcm verify {out} --run {run}   says what each precision loses" if len(sizes) > 1 else f"kcm edge --bundle {out}"
    typer.echo(f"{out}: bundle {manifest.bundle_id}, {size / 1e6:.1f} MB; next: {then}")


def parse_precisions(names: Sequence[str]) -> tuple[Precision, ...]:
    """fp32 and those named, in order of width; "all" stands for the three.

    Raises:
        ConfigError: an unknown name.
    """
    from typing import get_args

    from kcm.bundle import Precision, as_precision

    chosen = {"fp32", *(as_precision(name) for name in names if name != "all")}
    return tuple(name for name in get_args(Precision) if name in chosen or "all" in names)


def export_run(
    folder: Path, out: Path, *, force: bool, precisions: Sequence[Precision] = ("fp32",), steps: Steps | None = None
) -> Manifest:
    """Export and verify beside `out`, then put it in place: a bundle that doesn't agree with torch never appears there."""
    import shutil

    from export.bundle import export_bundle
    from kcm.app.models import load_small_kind, one_thread
    from kcm.app.samples import fresh_payloads
    from kcm.bundle import MANIFEST
    from training.run import load_run

    claim(out, MANIFEST, force=force)
    writable(out.parent)  # the bundle is made beside its place
    run = load_run(folder)
    writable(folder)  # bundle_id goes there
    one_thread()
    steps = steps or Steps(quiet=True)
    building = out.with_name(f".{out.name}.building")
    fresh = fresh_payloads(run) if len(precisions) > 1 else []
    try:
        manifest = export_bundle(run, building, golden_payloads=run.payloads, precisions=precisions, fresh_payloads=fresh, progress=steps)
        steps("verified against torch and fp32")
        check(run, load_small_kind(run.task, Steps(quiet=True)), building, run.payloads[:256])
        _check_narrow(run, building)
        shutil.rmtree(out, ignore_errors=True)
        building.rename(out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    (folder / "bundle_id").write_text(manifest.bundle_id)
    return manifest


def check(run: Run, kind: Small, bundle: Path, payloads: Sequence[Payload]) -> dict[str, float]:
    """Raises VerifyError or BundleError where the bundle isn't the run's."""
    from export.verify import verify as compare
    from kcm.bundle import load_bundle

    return compare(run, kind, load_bundle(bundle), payloads).to_dict()


def _check_narrow(run: Run, folder: Path) -> None:
    """The other precisions beside fp32, on the labelled samples that ε was weighed on; else on samples that the run was fitted on.

    Raises:
        VerifyError: one of them answers worse than the bar allows, or is broken.
    """
    from export.agreement import agreements, hold
    from kcm.bundle import load_bundle

    bundle = load_bundle(folder)
    # Of samples that it was fitted on, labels would say nothing.
    known = (run.answered.payloads, run.answered.labels) if run.answered else (run.payloads[:256], None)
    hold(agreements(bundle, *known), bundle)


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle of `kcm export`.")],
    run: Annotated[Path, typer.Option("--run", help="The run that it was exported from.")],
    samples: Annotated[
        Path | None, typer.Option("--samples", "--texts", help="Texts or images, as under [data]; default: the task's test or train file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare torch and ONNX Runtime on logits, answers, C_x and decisions; exit code 6 where they differ.

    fp32 must decide as torch does, but where the routing score is within 0.001 of ε. fp16 and int8 are compared with fp32, each at its
    own ε: exit code 6 where one loses more than 0.3 points of right local answers at the same share of cloud calls. That takes
    labels: a file of --samples that has them, or the task's test file.

    Try it: kcm verify bundle --run runs/train/1
    """
    from export.agreement import agreements, hold, table
    from kcm.app.models import load_small_kind, one_thread
    from kcm.bundle import load_bundle
    from training.data import load_split
    from training.run import load_run

    one_thread()
    loaded = load_run(run)
    task = loaded.task
    truth = None
    chosen: Sequence[Payload]
    if samples is not None:
        chosen, truth = _read(samples, task)
    elif task.data.test:
        split = load_split(task, "test")
        chosen, truth = split.payloads, split.y
    else:
        chosen = load_split(task, "train").payloads  # its labels would say nothing: the run was fitted on them
    report: dict[str, Any] = check(loaded, load_small_kind(task, Steps(quiet=True)), bundle, chosen)
    read = load_bundle(bundle)
    narrow = agreements(read, chosen, truth)
    if as_json:
        hold(narrow, read)
        typer.echo(json.dumps({**report, "precisions": {a.precision: a.to_dict() for a in narrow}}))
        return
    typer.echo(
        f"{report['samples']} samples: logits within {report['logits_error']:.1e} (relative), C_x within {report['confidence_error']:.1e}, "
        f"{report['labels']} answers differ, {report['decisions']} decisions differ ({report['excused']} of them at ε itself)"
    )
    if narrow:
        typer.echo(table(narrow))
        hold(narrow, read)


def _read(path: Path, task: Task) -> tuple[Sequence[Payload], NDArray[np.int64] | None]:
    """Samples of the task's modality, and ids of their labels where they have any.

    Raises:
        DataError: unreadable, a bad row, or an unknown label.
    """
    from training.data import encode_labels, label_ids, read_rows
    from training.image_files import read_images

    if task.modality == "image":
        images, labels, where = read_images(path, task.data, task.preprocess, labels_optional=True)
        return images, label_ids(labels, task, where) if labels else None
    texts, labels, lines = read_rows(path, task.data.text_column, task.data.label_column, labels_optional=True)
    return texts, encode_labels(labels, lines, task, path) if labels else None
