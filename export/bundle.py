"""From a run to a bundle: fuse, calibrate by name, make the golden outputs, verify, hash."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tomli_w

from export.precisions import Graphs, preprocessor_of, tokenizer_json
from export.recalibrate import Basis, basis, recalibrated
from export.session import Session
from kcm.bundle import GraphSpec, Manifest, Precision, golden_name, write_manifest
from kcm.calibration import Calibration, Threshold
from kcm.images import ImagePreprocessor, png
from kcm.preprocess import as_text, check_sums, longest_of
from kcm.sample import Payload
from training.run import Run, made

CANDIDATES = 5  # of the hint
GOLDEN = 64
_ORDER: tuple[Precision, ...] = ("fp32", "fp16", "int8")
_GOLDEN_CHARACTERS = 2000  # of each golden text
_GOLDEN_PIXELS, _GOLDEN_ALONE = 2**20, 8  # of all golden images together; and how many there are at least


def export_bundle(
    run: Run,
    out: Path,
    *,
    golden_payloads: Sequence[Payload],
    precisions: Sequence[Precision] = ("fp32",),
    fresh_payloads: Sequence[Payload] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Write the bundle of `run` to `out`; its manifest comes last.

    Args:
        out: is emptied first; `kcm export` builds beside the target and renames.
        golden_payloads: up to GOLDEN are shipped with their expected outputs; the edge refuses a bundle that answers otherwise.
        precisions: fp32 is always among them: the others are verified against it.
        fresh_payloads: what the others' ε is chosen on (export.recalibrate).

    Raises:
        ConfigError: the folder can't be made, or the user's own graph can't be converted.
        DataError: a precision other than fp32 can't be calibrated for what the run's ε was chosen for.
    """
    shutil.rmtree(out, ignore_errors=True)
    made(out / "models")
    candidates = min(CANDIDATES, len(run.task.labels))
    tokenizer = tokenizer_json(run)
    if tokenizer:
        (out / "tokenizer.json").write_bytes(tokenizer)
    (out / "task.toml").write_text(tomli_w.dumps(run.task.shipped()), encoding="utf-8")
    preprocessor = preprocessor_of(run)
    graphs, sizes = Graphs(run, candidates), dict[Precision, int]()
    calibration: dict[str, Calibration] = {}
    on: Basis | None = None
    for precision in [p for p in _ORDER if p == "fp32" or p in precisions]:
        progress(f"{precision} graph")
        model = graphs.fuse(precision)
        (out / "models" / f"{precision}.onnx").write_bytes(model)
        session = Session(model)
        if precision == "fp32":
            plain, threshold = session, run.threshold
        else:
            progress(f"ε of {precision}")
            on = on or basis(run, plain, preprocessor, fresh_payloads)
            threshold = recalibrated(run, on, session, Session(graphs.judge(precision)))
        calibration[precision] = calibrated(threshold, calibration_id(run, model, precision))
        sizes[precision] = len(model)
        np.savez(out / golden_name(precision), **golden(session, preprocessor, golden_payloads))
    (out / "calibration.json").write_bytes(msgspec.json.encode(calibration))
    (out / "metrics.json").write_text(json.dumps(run.metrics, indent=1))
    (out / "MODEL_CARD.md").write_text(model_card(run, sizes, calibration), encoding="utf-8")
    return write_manifest(
        out,
        task=run.task,
        graph=GraphSpec(inputs=longest_of(preprocessor), candidates=candidates),
        version=version("kcm"),
        round_=run.info.round,
        parent=run.info.parent,
        teacher_id=run.info.teacher_id,
    )


def fuse(run: Run, candidates: int, precision: Precision = "fp32") -> bytes:
    """The fused graph of a run, serialised."""
    return Graphs(run, candidates).fuse(precision)


def golden(session: Session, preprocessor: Any, payloads: Sequence[Payload]) -> dict[str, Any]:
    """The arrays of golden.npz: inputs as bytes with offsets, and what preprocessing and graph made of them here.

    Texts are UTF-8. Images are the pixels that the graph reads, as PNG: they mean the same to every decoder, and are small.
    """
    images = isinstance(preprocessor, ImagePreprocessor)
    shown: list[Payload]
    if images:
        most = max(_GOLDEN_ALONE, _GOLDEN_PIXELS // math.prod(preprocessor.inputs["image"].shape[:2]))
        shown = [png(image) for image in preprocessor.batch(payloads[: min(GOLDEN, most)])["image"]]
    else:
        shown = [as_text(payload)[:_GOLDEN_CHARACTERS] for payload in payloads[:GOLDEN]]
    encoded = [payload.encode() if isinstance(payload, str) else payload for payload in shown]
    # One by one: padding to a batch must not be what the expectation rests on.
    inputs = [preprocessor.batch([payload]) for payload in shown]
    outputs = [session.run(i) for i in inputs]
    return {
        "image" if images else "text": np.frombuffer(b"".join(encoded), np.uint8),
        "offsets": np.cumsum([0, *map(len, encoded)]).astype(np.int64),
        "input_sums": np.concatenate([check_sums(i) for i in inputs]),
        "logits": np.concatenate([o["logits"] for o in outputs]),
        "confidence": np.concatenate([o["confidence"] for o in outputs]),
        "score": np.concatenate([o["score"] for o in outputs]),
        "top_ids": np.concatenate([o["top_ids"] for o in outputs]),
    }


def calibrated(threshold: Threshold, identity: str) -> Calibration:
    return Calibration(calibration_id=identity, **msgspec.structs.asdict(threshold))


def calibration_id(run: Run, model: bytes, precision: str) -> str:
    """What a calibration holds for: graph (head and temperature in it), precision, preprocessing, labels, teacher, prompt, hint gate."""
    task, threshold = run.task, run.threshold
    parts = [hashlib.sha256(model).hexdigest(), precision, task.label_space, run.info.teacher_id, threshold.teacher_id, threshold.prompt_id]
    gate = (threshold.hint.arm, threshold.hint.lowest)
    parts += [msgspec.json.encode(part).decode() for part in (task.preprocess, task.prompt, gate)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def model_card(run: Run, sizes: Mapping[Precision, int], calibration: Mapping[str, Calibration]) -> str:
    """Args: sizes: of each precision's graph, in bytes."""
    task, threshold = run.task, run.threshold
    labelled = int(run.labelled.sum())
    rate = "" if threshold.cloud_rate is None else f", {threshold.cloud_rate:.1%} cloud calls on {threshold.samples} calibration samples"
    small, judge, size = task.small.kind, task.judge.kind, sizes["fp32"] / 1e6
    return (
        f"# {task.id}, round {run.info.round}\n\n"
        f"- {len(task.labels)} labels; small model `{small}`, judge `{judge}`; fp32 graph of {size:.1f} MB\n"
        f"- fitted on {labelled} labelled samples and {len(run.labelled) - labelled} that the large model answered"
        f" (`{run.info.teacher_id or 'none'}`), seed {run.info.seed}\n"
        f"- ε = {threshold.epsilon:.4f} by {threshold.method}{rate}\n"
        f"{''.join(_lowered(precision, sizes[precision], calibration[precision]) for precision in sizes if precision != 'fp32')}"
        f"- routes by {threshold.head.head}: {threshold.head.reason}\n"
        f"- hint: {threshold.hint.arm} ({threshold.hint.reason})\n"
        f"- promise: {_promised(threshold)}\n"
        f"- made by kcm {run.info.kcm_version}; parent bundle `{run.info.parent or 'none'}`\n"
        f"- golden.npz carries up to {GOLDEN} samples of the training data in the clear\n"
    )


def _lowered(precision: Precision, size: int, threshold: Threshold) -> str:
    how = {"fp16": "fp16 small model and judge layers", "int8": "int8 small model, fp32 judge"}[precision]
    rate = f"{threshold.cloud_rate:.1%} cloud calls on {threshold.samples} samples"
    return f"- {precision}: {size / 1e6:.1f} MB ({how}), ε = {threshold.epsilon:.4f}, {rate}\n"


def _promised(threshold: Threshold) -> str:
    if threshold.guarantee is None:
        return "none"
    promise = threshold.guarantee
    drop, confidence = 100 * promise.max_drop, 100 * promise.confidence
    return f"at most {drop:g} points below the large model `{threshold.teacher_id}` with {confidence:g}% confidence"
