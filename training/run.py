"""A training run on disk: what `kcm train` and `kcm distill` write, and calibrate, export and the next round read.

run.json  small.safetensors  judge.safetensors  predictions.safetensors  examples.jsonl  calibration.json  metrics.json
head.safetensors, where `kcm calibrate` chose a head that is fitted on outcomes; answered.jsonl, where it weighed ε on labels
A run of the user's own graph holds small.onnx (and tokenizer.json) in place of small.safetensors.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from kcm.calibration import Threshold
from kcm.errors import ConfigError
from kcm.sample import Payload
from kcm.task import Task
from training.encoder import EncoderHead
from training.fixed import FixedGraph
from training.heads import OutcomeHead
from training.judge import Judge, Predictions
from training.ngrams import NgramModel
from training.select import Router, Taught
from training.vision.kind import VisionModel

Float32 = NDArray[np.float32]
SCHEMA = 1
HEAD = "head.safetensors"
ANSWERED = "answered.jsonl"


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """run.json."""

    schema: int
    kcm_version: str
    task: Task
    round: int
    parent: str
    teacher_id: str
    seed: int
    temperature: float


class _Sample(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of examples.jsonl: a text, or an image file as base64."""

    text: str | None = None
    image: bytes | None = None

    @property
    def payload(self) -> Payload:
        """Raises ValueError where the line holds neither."""
        found = self.text if self.text is not None else self.image
        if found is None:
            raise ValueError("a sample without text or image")
        return found


class _Row(_Sample, frozen=True, kw_only=True):
    """A line of answered.jsonl: with ids of the true label and of the large model's answer."""

    label: int
    large: int


def _field(payload: Payload) -> dict[str, Any]:
    return {"text" if isinstance(payload, str) else "image": payload}


@dataclass(frozen=True)
class Answered:
    """The labelled samples [N] that ε was weighed on: label ids [N] and the large model's answers [N], under the hint's gate.

    Kept for what computes other scores of them: the run in another precision.
    """

    payloads: Sequence[Payload]
    labels: NDArray[np.int64]
    large: NDArray[np.int64]

    def save(self, file: Path) -> None:
        rows = zip(self.payloads, self.labels.tolist(), self.large.tolist(), strict=True)
        building = file.with_name(f".{file.name}.building")
        building.write_bytes(
            msgspec.json.Encoder().encode_lines(_Row(**_field(payload), label=label, large=large) for payload, label, large in rows)
        )
        building.replace(file)

    @staticmethod
    def load(file: Path) -> Answered | None:
        """None where there is none."""
        if not file.exists():
            return None
        rows = msgspec.json.Decoder(_Row).decode_lines(file.read_bytes())
        return Answered([r.payload for r in rows], np.array([r.label for r in rows], np.int64), np.array([r.large for r in rows], np.int64))


@dataclass(frozen=True)
class Run:
    """`payloads` [N] with `targets` [N, C], `weights` [N] and `labelled` [N] are what it was fitted on, the labelled ones first.

    The next round reads its labels from the task and its answers from the store; of these it needs the out-of-fold predictions.
    """

    info: RunInfo
    small: Any
    judge: Judge
    out_of_fold: Predictions
    payloads: Sequence[Payload]
    targets: Float32
    weights: Float32
    labelled: NDArray[np.bool_]
    threshold: Threshold
    metrics: dict[str, Any] = field(default_factory=dict)
    head: OutcomeHead | None = None  # the head of correctness or benefit, where calibration chose one
    answered: Answered | None = None

    @property
    def taught(self) -> Taught:
        """What the large model answered in earlier rounds, with out-of-fold predictions of it."""
        rows = np.flatnonzero(~self.labelled)
        return Taught(self.out_of_fold.take(rows), np.log(np.maximum(self.targets[rows], 1e-9)))

    @property
    def router(self) -> Router:
        return Router(self.judge, self.threshold.head, self.head)

    def score(self, predictions: Predictions) -> Float32:
        """The routing score [N]: above ε the small model answers."""
        return self.router.score(predictions)

    @property
    def task(self) -> Task:
        return self.info.task


def run_info(task: Task, *, round_: int, parent: str, teacher_id: str, seed: int, temperature: float) -> RunInfo:
    return RunInfo(
        schema=SCHEMA,
        kcm_version=version("kcm"),
        task=task,
        round=round_,
        parent=parent,
        teacher_id=teacher_id,
        seed=seed,
        temperature=temperature,
    )


def save_run(folder: Path, run: Run) -> None:
    """Write everything; run.json comes last, so that a folder without it is an unfinished run.

    Raises:
        ConfigError: the folder can't be made.
    """
    from safetensors.numpy import save_file

    made(folder)
    (folder / "run.json").unlink(missing_ok=True)
    save_small(folder, run.small)
    save_file({name: tensor.numpy() for name, tensor in run.judge.state_dict().items()}, folder / "judge.safetensors")
    p = run.out_of_fold
    arrays = {"logits": p.logits, "length": p.length, "unknown": p.unknown, "targets": run.targets, "weights": run.weights}
    save_file({**arrays, "labelled": run.labelled.astype(np.uint8)}, folder / "predictions.safetensors")
    (folder / "examples.jsonl").write_bytes(msgspec.json.Encoder().encode_lines(_Sample(**_field(payload)) for payload in run.payloads))
    (folder / "metrics.json").write_text(json.dumps({"schema": SCHEMA, **run.metrics}, indent=1))
    save_calibrated(folder, run)
    (folder / "run.json").write_bytes(msgspec.json.format(msgspec.json.encode(run.info), indent=1))


def save_calibrated(folder: Path, run: Run) -> None:
    """Write what calibration may change: threshold, the head and the answers it stands on. A cut in between leaves a run that says so."""
    from safetensors.numpy import save_file

    target = folder / HEAD
    if run.head is None:
        target.unlink(missing_ok=True)
    else:
        arrays = {name: tensor.numpy() for name, tensor in run.head.state_dict().items()}
        save_file(arrays, folder / ".building")
        (folder / ".building").replace(target)
    if run.answered is None:
        (folder / ANSWERED).unlink(missing_ok=True)
    else:
        run.answered.save(folder / ANSWERED)
    building = folder / ".calibration.building"
    building.write_bytes(msgspec.json.format(msgspec.json.encode(run.threshold), indent=1))
    building.replace(folder / "calibration.json")


def load_run(folder: Path) -> Run:
    """Read a run.

    Raises:
        ConfigError: no finished run is there, or it is of another schema.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not (folder / "run.json").exists():
        raise ConfigError(f"{folder} holds no finished run", fix="kcm train --task T --out RUN   makes one")
    try:
        info = msgspec.json.decode((folder / "run.json").read_bytes(), type=RunInfo)
        threshold = msgspec.json.decode((folder / "calibration.json").read_bytes(), type=Threshold)
        if info.schema != SCHEMA:
            raise ConfigError(f"{folder} has run schema {info.schema}, this kcm reads {SCHEMA}")
        judge = Judge(info.task.judge, len(info.task.labels))
        judge.load_state_dict({name: torch.from_numpy(array) for name, array in load_file(folder / "judge.safetensors").items()})
        arrays = load_file(folder / "predictions.safetensors")
        payloads = [row.payload for row in msgspec.json.Decoder(_Sample).decode_lines((folder / "examples.jsonl").read_bytes())]
        metrics = json.loads((folder / "metrics.json").read_text())
        small = load_small(folder, info.task)
        head = _load_head(folder, info.task, threshold)
        answered = Answered.load(folder / ANSWERED)
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{folder} can't be read as a run: {error}") from error
    return Run(
        info=info,
        small=small,
        judge=judge.eval(),
        out_of_fold=Predictions(arrays["logits"], arrays["length"], arrays["unknown"]),
        payloads=payloads,
        targets=arrays["targets"],
        weights=arrays["weights"],
        labelled=arrays["labelled"].astype(bool),
        threshold=threshold,
        metrics=metrics,
        head=head,
        answered=answered,
    )


def _load_head(folder: Path, task: Task, threshold: Threshold) -> OutcomeHead | None:
    from safetensors.numpy import load_file

    kind = threshold.head.head
    if kind != "correctness" and kind != "benefit":
        return None
    head = OutcomeHead(task.judge, kind, len(task.labels))
    head.load_state_dict({name: torch.from_numpy(array) for name, array in load_file(folder / HEAD).items()})
    return head.eval()


def save_small(folder: Path, small: Any) -> None:
    from safetensors.numpy import save_file

    if isinstance(small, NgramModel):
        save_file({name: tensor.numpy() for name, tensor in small.state_dict().items()}, folder / "small.safetensors")
    else:
        small.save(folder)


def load_small(folder: Path, task: Task) -> NgramModel | EncoderHead | FixedGraph | VisionModel:
    """Raises ConfigError where the encoder below a head has changed, or a file is gone."""
    from safetensors.numpy import load_file

    if task.small.kind == "encoder":
        return EncoderHead.load(folder, task)
    if task.small.kind == "onnx":
        return FixedGraph.load(folder, task)
    if task.small.kind in ("resnet", "efficientnet-lite"):
        return VisionModel.load(folder, task)
    if task.small.kind == "dual" and task.modality == "image":
        from training.retrieval.image_query import load_dual_images

        return load_dual_images(folder, task)
    return NgramModel(load_file(folder / "small.safetensors"))


def next_run_folder(root: Path, verb: str) -> Path:
    """runs/<verb>/<n>: the next free number, made.

    Raises:
        ConfigError: it can't be made.
    """
    parent = made(root / verb)
    while True:
        number = 1 + max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0)
        with contextlib.suppress(FileExistsError):  # another process took it just now
            (parent / str(number)).mkdir()
            return parent / str(number)


def made(folder: Path) -> Path:
    """`folder`, made where it isn't there.

    Raises:
        ConfigError: it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} can't be made: {error.strerror}", fix="give a folder that you may write") from error
    return folder
