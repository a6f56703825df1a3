"""Sample, Hint, Scores, Answer: the values that travel, and their protobuf form."""

from __future__ import annotations

import enum
import os
import time
import uuid
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from protos.kcm.v1 import cloud_pb2, edge_pb2, sample_pb2

Float32 = NDArray[np.float32]
Payload = str | bytes  # UTF-8 text, or the bytes of an image file: what an edge and a large model can read


class Route(enum.IntEnum):
    """Who may answer: what the application asks for."""

    AUTO = edge_pb2.AUTO
    LOCAL = edge_pb2.LOCAL
    CLOUD = edge_pb2.CLOUD


class Source(enum.IntEnum):
    """Who answered."""

    LOCAL = edge_pb2.InferAnswer.SOURCE_LOCAL
    CLOUD = edge_pb2.InferAnswer.SOURCE_CLOUD
    DEGRADED = edge_pb2.InferAnswer.SOURCE_DEGRADED


class Purpose(enum.IntEnum):
    """Why a sample goes to the cloud."""

    LIVE = cloud_pb2.LIVE
    BACKFILL = cloud_pb2.BACKFILL
    EXPLORE = cloud_pb2.EXPLORE
    SHADOW = cloud_pb2.SHADOW


class HintArm(enum.IntEnum):
    """What of the hint the large model saw."""

    NONE = sample_pb2.HINT_NONE
    CANDIDATES = sample_pb2.HINT_CANDIDATES
    ASSERTION = sample_pb2.HINT_ASSERTION


class Tensors(msgspec.Struct, frozen=True):
    """One row of each of the graph's inputs by name, preprocessed by the application: arrays [L], or their little-endian bytes."""

    inputs: Mapping[str, NDArray[Any] | bytes]


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One input: UTF-8 text, the bytes of an image file, or tensors, which only the device can answer."""

    payload: Payload | Tensors
    sample_id: str = ""
    route: Route = Route.AUTO


class Hint(msgspec.Struct, frozen=True, kw_only=True):
    """The small model's best labels with their probabilities, and C_x."""

    label_ids: tuple[int, ...]
    probabilities: tuple[float, ...]
    confidence: float

    def to_proto(self) -> sample_pb2.Hint:
        return sample_pb2.Hint(label_ids=self.label_ids, probabilities=self.probabilities, confidence=self.confidence)

    @classmethod
    def from_proto(cls, message: sample_pb2.Hint, classes: int) -> Hint:
        """Raises ValueError where ids and probabilities don't fit each other or the label space."""
        ids, probabilities = tuple(message.label_ids), tuple(message.probabilities)
        if len(ids) != len(probabilities):
            raise ValueError(f"hint has {len(ids)} labels but {len(probabilities)} probabilities")
        if any(i >= classes for i in ids):
            raise ValueError(f"hint names label {max(ids)}, the task has {classes}")
        if not all(0.0 <= p <= 1.0 for p in (*probabilities, message.confidence)):
            raise ValueError("hint has a probability outside 0..1")
        return cls(label_ids=ids, probabilities=probabilities, confidence=message.confidence)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the application gets. `confidence` is C_x; `candidates` are (label id, probability) of the model that answered."""

    sample_id: str
    label_id: int
    label: str
    source: Source
    confidence: float
    candidates: tuple[tuple[int, float], ...]
    model_id: str
    reason: str = ""

    def add_to(self, reply: edge_pb2.InferReply) -> None:
        """As the reply's next answer. Built in place, which takes half as long as handing messages in."""
        message = reply.answers.add(
            sample_id=self.sample_id,
            label_id=self.label_id,
            label=self.label,
            source=int(self.source),
            confidence=self.confidence,
            model_id=self.model_id,
            reason=self.reason,
        )
        for label_id, probability in self.candidates:
            message.candidates.add(label_id=label_id, probability=probability)


def payload_to_proto(payload: Payload) -> sample_pb2.Payload:
    return sample_pb2.Payload(text=payload) if isinstance(payload, str) else sample_pb2.Payload(image=payload)


def payload_from_proto(message: sample_pb2.Payload) -> Payload:
    """What a large model may read. Raises ValueError where no kind is set, or tensors are."""
    kind = message.WhichOneof("kind")
    if kind == "text":
        return message.text
    if kind == "image":
        return message.image
    raise ValueError("payload is empty: set text or image" if kind is None else "tensors are for the device alone: set text or image")


def edge_payload_from_proto(message: sample_pb2.Payload) -> Payload | Tensors:
    """What the device may read. Raises ValueError where no kind is set."""
    kind = message.WhichOneof("kind")
    if kind is None:
        raise ValueError("payload is empty: set text, image or tensors")
    return Tensors(dict(message.tensors.inputs)) if kind == "tensors" else payload_from_proto(message)


def scores_to_proto(values: Float32, label_space: str, kind: sample_pb2.Scores.Kind = sample_pb2.Scores.LOGIT) -> sample_pb2.Scores:
    """Dense scores `values` [C] as raw little-endian bytes (40× cheaper than packed floats from an array)."""
    return sample_pb2.Scores(
        label_space=label_space, kind=kind, dtype=sample_pb2.Scores.FLOAT32, values=values.astype("<f4", copy=False).tobytes()
    )


def scores_from_proto(message: sample_pb2.Scores, label_space: str, classes: int) -> Float32:
    """Dense float32 [C] of a dense message.

    Raises:
        ValueError: another label space, an unknown type, a wrong length, or a value that isn't finite.
    """
    if message.label_space != label_space:
        raise ValueError(f"scores are over label space {message.label_space!r}, expected {label_space!r}")
    if message.ids:
        raise ValueError("sparse scores are not supported here")
    dtypes = {sample_pb2.Scores.FLOAT32: "<f4", sample_pb2.Scores.FLOAT16: "<f2"}
    if message.dtype not in dtypes:
        raise ValueError(f"unknown dtype {message.dtype}")
    dtype = np.dtype(dtypes[message.dtype])
    if len(message.values) != classes * dtype.itemsize:
        raise ValueError(f"scores have {len(message.values)} bytes, expected {classes * dtype.itemsize}")
    values = np.frombuffer(message.values, dtype).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("scores are not finite")
    return values


def new_sample_id() -> str:
    """A UUIDv7 (RFC 9562, section 5.7): 48 bits of milliseconds, then random, so ids sort by time."""
    millis = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    value = (millis & (2**48 - 1)) << 80 | 0x7 << 76 | (random >> 68) << 64 | 0b10 << 62 | random & (2**62 - 1)
    return str(uuid.UUID(int=value))
