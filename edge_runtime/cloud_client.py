"""Calls kcm.v1.Cloud: deadline, retries by gRPC's own policy, circuit breaker, checked replies."""

from __future__ import annotations

import asyncio
import enum
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from typing import TypeVar

import grpc
import msgspec

from edge_runtime.breaker import Breaker, State, Ticket
from edge_runtime.config import CloudConfig
from edge_runtime.truths import Truth
from kcm.logs import Alarm
from kcm.rpc import MAX_MESSAGE, channel
from kcm.sample import Float32, scores_from_proto
from protos.kcm.v1 import cloud_pb2, cloud_pb2_grpc

log = logging.getLogger("kcm.edge.cloud")

_CHUNK_BYTES = MAX_MESSAGE // 2
# The only retry layer. Throttling stops it when most calls fail: a dead server must not see three times the calls.
_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": "kcm.v1.Cloud"}],
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
        "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
    }
)


class Kind(enum.Enum):
    """Why the cloud did not answer."""

    UNAVAILABLE = "unavailable"  # can't be reached
    LATE = "late"  # not within the deadline
    PAUSED = "paused"  # the breaker is open: not asked
    REFUSED = "refused"  # it is full: later
    MISMATCH = "mismatch"  # it serves another task or other labels: an update is due
    INVALID = "invalid"  # it can't ever read this sample
    DENIED = "denied"  # it doesn't let this edge in: the certificate doesn't name it
    BAD_REPLY = "bad_reply"  # its reply doesn't fit the question
    UNKNOWN = "unknown"  # an older cloud that has no such call
    ERROR = "error"  # anything else


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    kind: Kind
    reason: str
    retry_after_s: float = 0.0  # the cloud's own wish


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """The large model's answer to one sample."""

    label_id: int
    scores: Float32  # [C]
    stored: bool  # in the teacher store
    teacher_id: str
    prompt_id: str


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What the cloud says to a sample that nobody waits for. Unchecked: `label` may not fit the task."""

    label_id: int
    label: str
    stored: bool
    teacher_id: str
    prompt_id: str


Outcome = Prediction | Failure
R = TypeVar("R")
_KINDS = {
    grpc.StatusCode.UNAVAILABLE: Kind.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: Kind.LATE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Kind.REFUSED,
    grpc.StatusCode.FAILED_PRECONDITION: Kind.MISMATCH,
    grpc.StatusCode.INVALID_ARGUMENT: Kind.INVALID,
    grpc.StatusCode.PERMISSION_DENIED: Kind.DENIED,
    grpc.StatusCode.UNAUTHENTICATED: Kind.DENIED,
    grpc.StatusCode.UNIMPLEMENTED: Kind.UNKNOWN,
}
_DOWN = {Kind.UNAVAILABLE, Kind.LATE, Kind.BAD_REPLY, Kind.DENIED, Kind.UNKNOWN, Kind.ERROR}


class CloudClient:
    """One channel to the cloud. Belongs to one event loop."""

    def __init__(self, config: CloudConfig, edge_id: str) -> None:
        """Raises ConfigError where the target is remote and TLS isn't set."""
        self._config, self._edge_id = config, edge_id
        self._channel = channel(config.target, config.tls, _SERVICE_CONFIG)
        self._stub = cloud_pb2_grpc.CloudStub(self._channel)
        self.breaker = Breaker(failures=config.breaker_failures, base_s=config.breaker_base_ms / 1000, max_s=config.breaker_max_ms / 1000)
        self._alarm = Alarm(log)
        self._denied = ""  # why the last call was not let in; empty where it was, or where the cloud could not be reached
        self.failures: Counter[Kind] = Counter()  # of calls
        self.live = 0  # live calls in flight
        self.last_live = 0.0  # monotonic, when one began

    async def predict(
        self, samples: Sequence[cloud_pb2.PredictSample], *, task_id: str, label_space: str, labels: tuple[str, ...], timeout_s: float
    ) -> list[Outcome]:
        """Ask for every sample, in order; chunks go out side by side under one deadline. Never raises for a failing cloud."""
        ticket = self.breaker.enter()
        if ticket is None:
            return [self._paused()] * len(samples)
        self.live, self.last_live = self.live + 1, time.monotonic()
        verdict: bool | None = None
        try:
            chunks = self._chunks(samples)
            requests = [self._request(chunk, task_id, label_space) for chunk in chunks]
            replies = await asyncio.gather(*(self._call(self._stub.Predict(request, timeout=timeout_s)) for request in requests))
            outcomes: list[Outcome] = []
            for chunk, reply in zip(chunks, replies, strict=True):
                outcomes += self._read(chunk, reply, label_space, labels)
            verdict = self._verdict(outcomes, timeout_s)
            return outcomes
        finally:
            self.live -= 1
            self._leave(ticket, verdict)

    async def backfill(self, samples: Sequence[cloud_pb2.PredictSample], *, task_id: str, label_space: str) -> list[Receipt | Failure]:
        """Send samples of the spool in one call: what became of each. Never raises for a failing cloud."""
        ticket = self.breaker.enter()
        if ticket is None:
            return [self._paused()] * len(samples)
        verdict: bool | None = None
        try:
            request = self._request(samples, task_id, label_space)
            reply = await self._call(self._stub.Predict(request, timeout=self._backfill_s(ticket)))
            failure = reply if isinstance(reply, Failure) else _mismatch(samples, reply)
            if failure is None:
                assert not isinstance(reply, Failure)
                verdict = True
                return [
                    Receipt(label_id=p.label_id, label=p.label, stored=p.stored, teacher_id=reply.teacher_id, prompt_id=reply.prompt_id)
                    for p in reply.predictions
                ]
            if failure is not reply:
                self.failures[failure.kind] += 1
            verdict = failure.kind not in _DOWN
            return [failure] * len(samples)
        finally:
            self._leave(ticket, verdict)

    async def label(self, truths: Sequence[Truth]) -> Failure | None:
        """Send truths of one task in one call; None: the cloud has them all. Never raises for a failing cloud."""
        ticket = self.breaker.enter()
        if ticket is None:
            return self._paused()
        verdict: bool | None = None
        try:
            request = cloud_pb2.LabelRequest(
                edge_id=self._edge_id,
                task_id=truths[0].task_id,
                label_space=truths[0].label_space,
                labels=[cloud_pb2.TrueLabel(sample_id=truth.sample_id, label_id=truth.label_id) for truth in truths],
            )
            reply = await self._call(self._stub.Label(request, timeout=self._backfill_s(ticket)))
            failure = reply if isinstance(reply, Failure) else None
            # One that answers Predict and not this is older, not down.
            verdict = failure is None or failure.kind is Kind.UNKNOWN or failure.kind not in _DOWN
            return failure
        finally:
            self._leave(ticket, verdict)

    async def close(self) -> None:
        await self._channel.close()

    def _backfill_s(self, ticket: Ticket) -> float:
        # A probe must not hold live calls back for a long deadline.
        return (self._config.deadline_ms if ticket is Ticket.PROBE else self._config.backfill_deadline_ms) / 1000

    def _paused(self) -> Failure:
        if self._denied:
            return Failure(kind=Kind.PAUSED, reason=self._denied)
        held = self.breaker.state is State.CLOSED
        return Failure(kind=Kind.PAUSED, reason="the cloud asked for a pause" if held else "cloud unreachable, next try soon")

    def _leave(self, ticket: Ticket, verdict: bool | None) -> None:
        before = self.breaker.state is State.CLOSED
        self.breaker.leave(ticket, verdict)
        after = self.breaker.state is State.CLOSED
        if before and not after:
            why = "does not let this edge in" if self._denied else "is unreachable"
            log.warning("the cloud %s: answers are degraded until that changes", why)
        elif after and not before:
            log.info("the cloud is back")

    def _request(self, samples: Sequence[cloud_pb2.PredictSample], task_id: str, label_space: str) -> cloud_pb2.PredictRequest:
        return cloud_pb2.PredictRequest(edge_id=self._edge_id, task_id=task_id, label_space=label_space, samples=samples)

    async def _call(self, call: Awaitable[R]) -> R | Failure:
        try:
            reply = await call
            self._denied = ""
            return reply
        except grpc.aio.AioRpcError as error:
            failure = _failure(error)
        self.failures[failure.kind] += 1
        self._denied = failure.reason if failure.kind is Kind.DENIED else ""
        if failure.retry_after_s > 0:
            self.breaker.hold(failure.retry_after_s)
        if failure.kind is Kind.MISMATCH:
            self._alarm("mismatch", f"the cloud serves another task or label space than this bundle: {failure.reason}")
        elif failure.kind is Kind.INVALID:
            self._alarm("invalid", f"the cloud refuses a call's content for good: {failure.reason}")
        elif failure.kind is Kind.DENIED:
            certificate = self._config.tls.certificate or "(no TLS here)"
            self._alarm(
                "denied", f"{failure.reason}; edge_id {self._edge_id!r} must be a DNS name (SAN) of this edge's certificate {certificate}"
            )
        return failure

    def _read(
        self, chunk: Sequence[cloud_pb2.PredictSample], reply: cloud_pb2.PredictReply | Failure, label_space: str, labels: tuple[str, ...]
    ) -> list[Outcome]:
        failure = reply if isinstance(reply, Failure) else _mismatch(chunk, reply)
        if failure is not None:
            if failure is not reply:
                self.failures[failure.kind] += 1
            # Refused as a whole, only one of many may be at fault: the spool tries them in halves.
            if failure.kind is Kind.INVALID and len(chunk) > 1:
                failure = Failure(kind=Kind.REFUSED, reason=failure.reason)
            return [failure] * len(chunk)
        assert not isinstance(reply, Failure)
        outcomes: list[Outcome] = []
        for prediction in reply.predictions:
            try:
                outcomes.append(_prediction(prediction, reply, label_space, labels))
            except ValueError as error:
                self.failures[Kind.BAD_REPLY] += 1
                self._alarm("reply", f"the cloud's reply to sample {prediction.sample_id} is unusable: {error}")
                outcomes.append(Failure(kind=Kind.BAD_REPLY, reason=f"the cloud's reply is unusable: {error}"))
        return outcomes

    def _chunks(self, samples: Sequence[cloud_pb2.PredictSample]) -> list[list[cloud_pb2.PredictSample]]:
        chunks: list[list[cloud_pb2.PredictSample]] = []
        size = 0
        for sample in samples:
            bytes_ = sample.ByteSize()
            if not chunks or len(chunks[-1]) >= self._config.max_samples or size + bytes_ > _CHUNK_BYTES:
                chunks.append([])
                size = 0
            chunks[-1].append(sample)
            size += bytes_
        return chunks

    def _verdict(self, outcomes: Sequence[Outcome], timeout_s: float) -> bool | None:
        """What the breaker learns. An application's own deadline, shorter than ours, isn't the cloud's fault."""
        kinds = {outcome.kind if isinstance(outcome, Failure) else None for outcome in outcomes}
        if kinds <= _DOWN:
            only_late = kinds == {Kind.LATE}
            return None if only_late and timeout_s < 0.9 * self._config.deadline_ms / 1000 else False
        return True


def _failure(error: grpc.aio.AioRpcError) -> Failure:
    kind = _KINDS.get(error.code(), Kind.ERROR)
    details = (error.details() or error.code().name).splitlines()[0][:200]
    if kind is Kind.LATE:
        return Failure(kind=kind, reason="the cloud did not answer in time")
    if kind is Kind.UNAVAILABLE:
        return Failure(kind=kind, reason=f"cloud unreachable: {details}")
    if kind is Kind.DENIED:
        return Failure(kind=kind, reason=f"the cloud does not let this edge in: {details}")
    wish = 0.0
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-retry-pushback-ms" and str(value).isdigit():
            wish = int(value) / 1000
    text = details if kind is not Kind.ERROR else f"{error.code().name}: {details}"
    return Failure(kind=kind, reason=f"the cloud refused: {text}", retry_after_s=wish)


def _mismatch(samples: Sequence[cloud_pb2.PredictSample], reply: cloud_pb2.PredictReply) -> Failure | None:
    if [p.sample_id for p in reply.predictions] == [s.sample_id for s in samples]:
        return None
    return Failure(
        kind=Kind.BAD_REPLY, reason=f"the cloud answered {len(reply.predictions)} of {len(samples)} samples, or others than asked"
    )


def _prediction(message: cloud_pb2.Prediction, reply: cloud_pb2.PredictReply, label_space: str, labels: tuple[str, ...]) -> Prediction:
    """Raises ValueError where label and scores don't fit the task."""
    if message.label_id >= len(labels) or message.label != labels[message.label_id]:
        raise ValueError(f"label {message.label_id} is called {message.label!r} there")
    scores = scores_from_proto(message.scores, label_space, len(labels))
    return Prediction(
        label_id=message.label_id, scores=scores, stored=message.stored, teacher_id=reply.teacher_id, prompt_id=reply.prompt_id
    )
