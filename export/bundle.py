"""From a run to a bundle: fuse, calibrate by name, make the golden outputs, verify, hash."""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tomli_w

from export.graph import fuse_ngrams
from export.session import Session
from kcm.bundle import GraphSpec, Manifest, write_manifest
from kcm.calibration import Calibration, Threshold
from kcm.preprocess import load_preprocessor
from training.encoder import EncoderHead
from training.ngrams import NgramModel
from training.run import Run

CANDIDATES = 5  # of the hint
GOLDEN = 64
_GOLDEN_CHARACTERS = 2000  # of each golden text


def export_bundle(run: Run, out: Path, *, golden_texts: list[str]) -> Manifest:
    """Write the bundle of `run` to `out`; its manifest comes last.

    Args:
        out: is emptied first; `kcm export` builds beside the target and renames.
        golden_texts: up to GOLDEN are shipped with their expected outputs; the edge refuses a bundle that answers otherwise.
    """
    shutil.rmtree(out, ignore_errors=True)
    (out / "models").mkdir(parents=True)
    candidates = min(CANDIDATES, len(run.task.labels))
    model = fuse(run, candidates)
    (out / "models" / "fp32.onnx").write_bytes(model)
    tokenizer = tokenizer_json(run)
    if tokenizer:
        (out / "tokenizer.json").write_bytes(tokenizer)
    (out / "task.toml").write_text(tomli_w.dumps(run.task.shipped()), encoding="utf-8")
    calibration = {"fp32": calibrated(run.threshold, calibration_id(run, model, "fp32"))}
    (out / "calibration.json").write_bytes(msgspec.json.encode(calibration))
    preprocessor = load_preprocessor(run.task.preprocess, {"tokenizer.json": tokenizer} if tokenizer else {})
    np.savez(out / "golden.npz", **golden(Session(model), preprocessor, golden_texts))
    (out / "metrics.json").write_text(json.dumps(run.metrics, indent=1))
    (out / "MODEL_CARD.md").write_text(model_card(run, len(model)), encoding="utf-8")
    return write_manifest(
        out,
        task=run.task,
        graph=GraphSpec(inputs=tuple(preprocessor.names), candidates=candidates, max_length=preprocessor.longest),
        version=version("kcm"),
        round_=run.info.round,
        parent=run.info.parent,
        teacher_id=run.info.teacher_id,
    )


def fuse(run: Run, candidates: int) -> bytes:
    """The fused graph of a run, serialised."""
    if isinstance(run.small, NgramModel):
        return bytes(fuse_ngrams(run.small, run.router, candidates).SerializeToString())
    if isinstance(run.small, EncoderHead):
        from export.encoder import fuse_encoder

        return fuse_encoder(run.small, run.router, candidates)
    from export.fixed import fuse_fixed

    return fuse_fixed(run.small, run.router, candidates)


def tokenizer_json(run: Run) -> bytes:
    """What the device's tokenizer reads; empty for n-grams, which need no file."""
    return b"" if isinstance(run.small, NgramModel) else bytes(run.small.tokenizer_json)


def golden(session: Session, preprocessor: Any, texts: list[str]) -> dict[str, Any]:
    """The arrays of golden.npz: texts as UTF-8 with offsets, and what preprocessing and graph made of them here."""
    texts = [text[:_GOLDEN_CHARACTERS] for text in texts[:GOLDEN]]
    encoded = [text.encode() for text in texts]
    # One by one: padding to a batch must not be what the expectation rests on.
    inputs = [preprocessor.batch([text]) for text in texts]
    outputs = [session.run(i) for i in inputs]
    return {
        "text": np.frombuffer(b"".join(encoded), np.uint8),
        "offsets": np.cumsum([0, *map(len, encoded)]).astype(np.int64),
        "input_sums": np.array([int(i[preprocessor.names[0]].sum(dtype=np.int64)) for i in inputs], np.int64),
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


def model_card(run: Run, size: int) -> str:
    task, threshold = run.task, run.threshold
    labelled = int(run.labelled.sum())
    rate = "" if threshold.cloud_rate is None else f", {threshold.cloud_rate:.1%} cloud calls on {threshold.samples} calibration samples"
    return (
        f"# {task.id}, round {run.info.round}\n\n"
        f"- {len(task.labels)} labels; small model `{task.small.kind}`, judge `{task.judge.kind}`; fp32 graph of {size / 1e6:.1f} MB\n"
        f"- fitted on {labelled} labelled texts and {len(run.labelled) - labelled} that the large model answered"
        f" (`{run.info.teacher_id or 'none'}`), seed {run.info.seed}\n"
        f"- ε = {threshold.epsilon:.4f} by {threshold.method}{rate}\n"
        f"- routes by {threshold.head.head}: {threshold.head.reason}\n"
        f"- hint: {threshold.hint.arm} ({threshold.hint.reason})\n"
        f"- promise: {_promised(threshold)}\n"
        f"- made by kcm {run.info.kcm_version}; parent bundle `{run.info.parent or 'none'}`\n"
        f"- golden.npz carries up to {GOLDEN} texts of the training data in the clear\n"
    )


def _promised(threshold: Threshold) -> str:
    if threshold.guarantee is None:
        return "none"
    promise = threshold.guarantee
    return (
        f"at most {100 * promise.max_drop:g} points below the large model `{threshold.teacher_id}` with {promise.confidence:.0%} confidence"
    )
