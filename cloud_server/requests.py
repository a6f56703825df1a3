"""From a request to checked values: every refusal names the sample and the reason, never the payload."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from cloud_server.config import CloudConfig
from kcm.sample import Float32, Hint, Payload, Purpose, payload_from_proto, scores_from_proto
from kcm.task import Task
from protos.kcm.v1 import cloud_pb2

_MAX_ID = 256
IDENTITY_KEYS = ("x509_subject_alternative_name", "x509_common_name")


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One sample of a call, checked. An image's bytes are not decoded yet."""

    place: int  # in the call
    sample_id: str
    purpose: Purpose
    p_escalate: float
    p_hint: float
    hint: Hint | None
    payload: Payload
    small_logits: Float32 | None
    confidence: float
    bundle_id: str


def check_request(request: cloud_pb2.PredictRequest, task: Task, config: CloudConfig) -> list[Asked]:
    """The samples of a call.

    Raises:
        ValueError: the call or one of its samples can never be answered.
    """
    check_id("edge_id", request.edge_id)
    _check_number("samples", len(request.samples), config)
    seen: set[str] = set()
    asked: list[Asked] = []
    for place, message in enumerate(request.samples):
        try:
            asked.append(_check_sample(place, message, task, config))
        except ValueError as error:
            raise ValueError(f"sample {place} ({printable(message.sample_id)}): {error}") from None
        if message.sample_id in seen:
            raise ValueError(f"sample {place} ({printable(message.sample_id)}): its sample_id appears twice in this call")
        seen.add(message.sample_id)
    return asked


def check_labels(request: cloud_pb2.LabelRequest, task: Task, config: CloudConfig) -> dict[str, int]:
    """The truths of a call: sample id → label id, the last one about a sample.

    Raises:
        ValueError: the call or one of its labels can never be taken.
    """
    check_id("edge_id", request.edge_id)
    _check_number("labels", len(request.labels), config)
    labels: dict[str, int] = {}
    for place, message in enumerate(request.labels):
        try:
            check_id("sample_id", message.sample_id)
            if message.label_id >= len(task.labels):
                raise ValueError(f"label_id is {message.label_id}, the task has {len(task.labels)} labels")
        except ValueError as error:
            raise ValueError(f"label {place} ({printable(message.sample_id)}): {error}") from None
        labels[message.sample_id] = message.label_id
    return labels


def check_id(name: str, value: str) -> None:
    """Raises ValueError where `value` can't name an edge or a sample."""
    if not value:
        raise ValueError(f"{name} is empty")
    if len(value) > _MAX_ID or not value.isprintable():
        raise ValueError(f"{name} is longer than {_MAX_ID} characters or not printable")


def printable(text: str) -> str:
    """An id as an error may show it: short and on one line."""
    return repr(text if len(text) <= 64 else text[:64] + "…")


def peer_identities(auth_context: Mapping[str, Sequence[bytes]]) -> set[str] | None:
    """The names in the peer's certificate: its subject alternative names, else its common name. None: no TLS."""
    if b"ssl" not in auth_context.get("transport_security_type", ()):
        return None
    for key in IDENTITY_KEYS:
        if names := {name.decode("utf-8", "replace") for name in auth_context.get(key, ())}:
            return names
    return set()


def _check_number(what: str, number: int, config: CloudConfig) -> None:
    if not number:
        raise ValueError(f"the call has no {what}")
    if number > config.max_samples:
        raise ValueError(f"the call has {number} {what}, at most {config.max_samples} are taken")


def _check_sample(place: int, message: cloud_pb2.PredictSample, task: Task, config: CloudConfig) -> Asked:
    check_id("sample_id", message.sample_id)
    classes = len(task.labels)
    if message.purpose not in {int(p) for p in Purpose}:
        raise ValueError("purpose is not set, or unknown")
    payload = payload_from_proto(message.payload)
    given, most = ("text", config.max_sample_bytes) if isinstance(payload, str) else ("image", task.preprocess.max_bytes)
    if given != task.modality:
        raise ValueError(f"task {task.id} reads {task.modality}, the payload is {'a text' if given == 'text' else 'an image'}")
    if (size := len(payload.encode() if isinstance(payload, str) else payload)) > most:
        raise ValueError(f"payload has {size} bytes, at most {most} are taken")
    for name in ("confidence", "p_escalate", "p_hint"):
        value = getattr(message, name)
        if not (math.isfinite(value) and 0.0 <= value <= 1.0):
            raise ValueError(f"{name} is outside 0..1")
    return Asked(
        place=place,
        sample_id=message.sample_id,
        purpose=Purpose(message.purpose),
        p_escalate=message.p_escalate,
        p_hint=message.p_hint,
        hint=Hint.from_proto(message.hint, classes) if message.HasField("hint") else None,
        payload=payload,
        small_logits=scores_from_proto(message.small, task.label_space, classes) if message.HasField("small") else None,
        confidence=message.confidence,
        bundle_id=message.bundle_id,
    )
