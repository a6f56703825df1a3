"""`kcm calibrate`, `kcm export` and `kcm verify`: from a run to a bundle that a device may trust."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from kcm.app.folders import claim
from kcm.app.progress import Steps
from kcm.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kcm.bundle import Manifest
    from kcm.calibration import Threshold
    from training.run import Run
    from training.small import Small

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run of `kcm train` or `kcm distill`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_CURVE = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


def calibrate(
    run: RunFolder,
    cloud_rate: Annotated[float | None, typer.Option("--cloud-rate", min=0.0, max=1.0, help="Share of samples that may go up.")] = None,
    accuracy: Annotated[float | None, typer.Option("--accuracy", min=0.0, max=1.0, help="Accuracy to reach with the fewest calls.")] = None,
    below_large: Annotated[
        float | None,
        typer.Option("--below-large", min=0.0, max=1.0, help="The same, as a distance below the large model: 0.01 is a point."),
    ] = None,
    epsilon: Annotated[float | None, typer.Option("--epsilon", min=-1.0, max=1.0, help="This ε; the paper's is 0.98.")] = None,
    large: Annotated[Path | None, typer.Option("--large", help="Folder of the large model, for --accuracy and --below-large.")] = None,
    as_json: AsJson = False,
) -> None:
    """Choose ε for a budget of cloud calls, for an accuracy, or by hand; print what it costs, and the curve.

    A rate is read off samples that the small model hasn't seen: the task's stream, after a distillation round the tenth of it
    that is never distilled; without a stream the run's out-of-fold predictions. An accuracy needs labels that were kept back
    (calibration under [data]) and the large model's answers to them; it is an estimate without a guarantee.

    Try it: kcm calibrate runs/train/1 --cloud-rate 0.3
    """
    from kcm.app.models import large_logits, load_small_kind, one_thread
    from kcm.policy import epsilon_for_rate
    from training.calibrate import fixed, for_accuracy, for_rate
    from training.data import load_split
    from training.run import load_run, save_threshold

    if [cloud_rate, accuracy, below_large, epsilon].count(None) != 3:
        raise ConfigError("choose one of --cloud-rate, --accuracy, --below-large and --epsilon")
    one_thread()
    steps = Steps(quiet=as_json)
    loaded = load_run(run)
    kind = load_small_kind(loaded.task, steps)
    if accuracy is not None or below_large is not None:
        if large is None:
            raise ConfigError("an accuracy needs the large model's answers", fix="--large FOLDER (kcm train-large makes one)")
        split = load_split(loaded.task, "calibration")
        confidence, right = confidences(loaded, kind, split.texts)
        large_right = large_logits(large, split, steps).argmax(1) == split.y
        target = accuracy if accuracy is not None else float(large_right.mean()) - (below_large or 0.0)
        threshold = for_accuracy(confidence, right == split.y, large_right, target)
        source = f"{len(split)} labelled calibration samples"
    else:
        confidence, source = unlabelled_confidences(loaded, kind)
        threshold = for_rate(confidence, cloud_rate) if cloud_rate is not None else fixed(confidence, epsilon or 0.0)
    save_threshold(run, threshold)
    curve = {str(rate): epsilon_for_rate(confidence, rate) for rate in _CURVE}
    if as_json:
        typer.echo(json.dumps({**msgspec.to_builtins(threshold), "source": source, "curve": curve}))
        return
    typer.echo(_describe(threshold, source))
    typer.echo("calls   ε\n" + "\n".join(f"{float(rate):5.0%}   {value:.4f}" for rate, value in curve.items()))
    typer.echo(f"{run / 'calibration.json'} written; next: kcm export {run} --out BUNDLE")


def _describe(threshold: Threshold, source: str) -> str:
    assert threshold.cloud_rate is not None and threshold.cloud_rate_interval is not None
    low, high = threshold.cloud_rate_interval
    text = f"ε = {threshold.epsilon:.4f}: {threshold.cloud_rate:.1%} cloud calls [{low:.1%}, {high:.1%}] on {source}"
    return text if threshold.accuracy is None else f"{text}, accuracy {threshold.accuracy:.1%} there"


def confidences(run: Run, kind: Small, texts: list[str]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """C_x [N] and the small model's answers [N] for texts that it wasn't fitted on."""
    predictions = kind.predict(run.small, kind.featurise(texts))
    return run.judge.confidence(predictions), predictions.logits.argmax(1)


def unlabelled_confidences(run: Run, kind: Small) -> tuple[NDArray[np.float32], str]:
    """C_x of what a call rate is read off, and what that is: fresh texts of the stream, else out of fold."""
    texts = fresh_texts(run)
    if texts:
        return confidences(run, kind, texts)[0], f"{len(texts)} fresh samples of the stream"
    return run.judge.confidence(run.out_of_fold), f"{len(run.texts)} out-of-fold predictions"


def fresh_texts(run: Run) -> list[str]:
    """Texts of the task's stream that are like its traffic and that no run was fitted on; empty where the task names no stream.

    Round 0 learnt from none of it. A later round learnt from what escalated, which leaves easy texts behind: there only the
    reserved tenth is still like the traffic.
    """
    from training.data import load_split
    from training.reserve import reserved

    if not run.task.data.stream:
        return []
    seen = set(run.texts)
    return [text for text in load_split(run.task, "stream").texts if text not in seen and (run.info.round == 0 or reserved(text))]


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
