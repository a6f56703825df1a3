"""The Cloud service. Predict: check → look up → read → model → commit → reply. Label: check → commit → reply."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from typing import NoReturn, TypeVar

import grpc
from prometheus_client import Counter

from cloud_server.batcher import Batcher, Closed, DeadlinePassed, ModelFailed, Overloaded, Unreadable, Urgency
from cloud_server.config import CloudConfig
from cloud_server.metrics import CloudMetrics
from cloud_server.models import LargeModel
from cloud_server.prompt import hint_arm
from cloud_server.requests import Asked, check_labels, check_request, peer_identities, printable
from cloud_server.store import Row, Stored, TeacherStore, hash_payload
from kcm.errors import StoreError
from kcm.logs import Alarm
from kcm.sample import Float32, HintArm, Purpose, scores_to_proto
from kcm.task import Task
from protos.kcm.v1 import cloud_pb2, cloud_pb2_grpc

_log = logging.getLogger(__name__)

SERVICE_NAME = "kcm.v1.Cloud"
Context = grpc.aio.ServicerContext[cloud_pb2.PredictRequest, cloud_pb2.PredictReply]
LabelContext = grpc.aio.ServicerContext[cloud_pb2.LabelRequest, cloud_pb2.LabelReply]
Reply = TypeVar("Reply")
# An explored sample was answered on its device: nobody waits.
_URGENT = {
    Purpose.LIVE: Urgency.LIVE,
    Purpose.EXPLORE: Urgency.BACKFILL,
    Purpose.BACKFILL: Urgency.BACKFILL,
    Purpose.SHADOW: Urgency.BACKFILL,
}
_LABEL_RETRY_S = 1.0  # a group commit takes milliseconds: by then the queue is gone


class _Refused(Exception):
    """Ends a call with a status; `details` goes to the client."""

    def __init__(self, code: grpc.StatusCode, details: str, retry_s: float | None = None) -> None:
        super().__init__(details)
        self.code, self.details, self.retry_s = code, details, retry_s


class CloudService(cloud_pb2_grpc.CloudServicer):  # type: ignore[misc]  # generated, untyped
    """Answers Predict, Label and Describe for one task with one large model."""

    def __init__(
        self, *, config: CloudConfig, task: Task, model: LargeModel, batcher: Batcher, store: TeacherStore, metrics: CloudMetrics
    ) -> None:
        self._config, self._task, self._model = config, task, model
        self._batcher, self._store, self._metrics = batcher, store, metrics
        self._alarm = Alarm(_log)
        self._labels_waiting = 0

    async def Predict(self, request: cloud_pb2.PredictRequest, context: Context) -> cloud_pb2.PredictReply:
        """See cloud.proto. Every answered sample is committed before the reply, or carries stored=false."""
        started = time.monotonic()
        try:
            return await self._answered(self._predict(request, context), context, self._metrics.requests)
        finally:
            self._metrics.request_seconds.observe(time.monotonic() - started)

    async def Label(self, request: cloud_pb2.LabelRequest, context: LabelContext) -> cloud_pb2.LabelReply:
        """See cloud.proto. All of a call's truths are committed before the reply, or none is and the call fails."""
        return await self._answered(self._label(request, context), context, self._metrics.label_requests)

    async def Describe(self, request: cloud_pb2.DescribeRequest, context: Context) -> cloud_pb2.DescribeReply:
        """What this server answers for."""
        if context.time_remaining() is None:
            await _abort(context, _Refused(grpc.StatusCode.INVALID_ARGUMENT, "the call carries no deadline"))
        return cloud_pb2.DescribeReply(
            task_id=self._task.id,
            label_space=self._task.label_space,
            teacher_id=self._model.teacher_id,
            prompt_id=self._model.prompt_id,
            reads_hints=self._model.reads_hints,
            max_samples=self._config.max_samples,
        )

    async def _answered(self, work: Awaitable[Reply], context: Context | LabelContext, calls: Counter) -> Reply:
        """What `work` returns, or the call aborted with the status of its failure. Either way it is counted in `calls`."""
        code = grpc.StatusCode.CANCELLED
        try:
            reply = await work
            code = grpc.StatusCode.OK
            return reply
        except _Refused as refused:
            code = refused.code
            await _abort(context, refused)
        except Exception:
            code = grpc.StatusCode.INTERNAL
            _log.exception("a call failed")
            await _abort(context, _Refused(code, "internal error; the server's log has it"))
        finally:
            calls.labels(code.name).inc()

    def _admit(self, request: cloud_pb2.PredictRequest | cloud_pb2.LabelRequest, context: Context | LabelContext) -> float:
        """The call's deadline, on the monotonic clock. Refuses a call without one, of a wrong peer, or for another task."""
        remaining = context.time_remaining()
        if remaining is None:
            raise _Refused(grpc.StatusCode.INVALID_ARGUMENT, "the call carries no deadline")
        self._check_peer(request.edge_id, context)
        self._check_task(request)
        return time.monotonic() + remaining

    async def _label(self, request: cloud_pb2.LabelRequest, context: LabelContext) -> cloud_pb2.LabelReply:
        self._admit(request, context)
        try:
            labels = check_labels(request, self._task, self._config)
        except ValueError as error:
            raise _Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
        number = len(request.labels)
        if self._labels_waiting + number > self._config.max_queue:
            raise _Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many labels wait for the disk", _LABEL_RETRY_S)
        self._labels_waiting += number
        try:
            await asyncio.wrap_future(self._store.tell(request.edge_id, request.label_space, labels))
        except StoreError as error:
            _log.error("the teacher store can't commit labels", extra={"labels": number, "cause": error.message})
            self._metrics.labels.labels("failed").inc(number)
            raise _Refused(grpc.StatusCode.UNAVAILABLE, "the labels could not be stored; send them again") from None
        finally:
            self._labels_waiting -= number
        self._metrics.labels.labels("stored").inc(number)
        return cloud_pb2.LabelReply(stored=number)

    async def _predict(self, request: cloud_pb2.PredictRequest, context: Context) -> cloud_pb2.PredictReply:
        deadline = self._admit(request, context)
        try:
            asked = check_request(request, self._task, self._config)
        except ValueError as error:
            raise _Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
        known = await self._known(request.edge_id, asked)
        fresh = [sample for sample in asked if sample.sample_id not in known]
        scores = await self._score(fresh, deadline)
        answers = await self._commit(request.edge_id, fresh, scores)
        for sample in asked:
            if row := known.get(sample.sample_id):
                answers[sample.sample_id] = self._prediction(sample.sample_id, row.answer_logits, row.hint_arm, stored=True)
            self._metrics.samples.labels(sample.purpose.name.lower()).inc()
            self._metrics.hint_arm.labels(HintArm(answers[sample.sample_id].hint_arm).name.lower()).inc()
        return cloud_pb2.PredictReply(
            teacher_id=self._model.teacher_id, prompt_id=self._model.prompt_id, predictions=[answers[sample.sample_id] for sample in asked]
        )

    def _check_task(self, request: cloud_pb2.PredictRequest | cloud_pb2.LabelRequest) -> None:
        task = self._task
        if request.task_id != task.id:
            raise _Refused(grpc.StatusCode.FAILED_PRECONDITION, f"this server answers for task {task.id}, not {printable(request.task_id)}")
        if request.label_space != task.label_space:
            raise _Refused(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"label space {printable(request.label_space)} is not this server's ({task.label_space}): the bundle is of other labels",
            )

    def _check_peer(self, edge_id: str, context: Context | LabelContext) -> None:
        names = peer_identities({str(key): list(values) for key, values in context.auth_context().items()})
        if names is None or edge_id in names:
            return
        seen = ", ".join(map(printable, sorted(names)[:4])) or "nobody"
        details = f"the certificate names {seen}, the call comes as edge {printable(edge_id)}"
        # Kept apart by certificate, which the authority limits, not by edge_id, which a caller makes up.
        self._alarm(f"peer {seen}", f"refused: {details}")
        raise _Refused(grpc.StatusCode.PERMISSION_DENIED, details)

    async def _known(self, edge_id: str, asked: Sequence[Asked]) -> dict[str, Stored]:
        """Stored answers of this teacher to these very samples; none where the store can't be read."""
        try:
            found = await asyncio.wrap_future(self._store.lookup(edge_id, [sample.sample_id for sample in asked]))
        except StoreError:
            _log.warning("the teacher store can't be read: samples are scored anew")
            return {}
        for sample in asked:
            row = found.get(sample.sample_id)
            if row is not None and row.payload_hash != hash_payload(sample.payload):
                raise _refused_sample(sample, "its sample_id was used before for another payload")
        self._metrics.store_rows.labels("resent").inc(len(found))
        return {sample_id: row for sample_id, row in found.items() if self._is_current(row)}

    def _is_current(self, row: Stored) -> bool:
        """A reply names one teacher: another one's answer is no answer to this call, though its row stays stored."""
        return (row.teacher_id, row.prompt_id, row.label_space) == (self._model.teacher_id, self._model.prompt_id, self._task.label_space)

    async def _score(self, fresh: Sequence[Asked], deadline: float) -> list[Float32]:
        if not fresh:
            return []
        # A call goes with its most urgent sample.
        urgency = min(_URGENT[sample.purpose] for sample in fresh)
        hints = [sample.hint if self._arm(sample) is not HintArm.NONE else None for sample in fresh]
        try:
            return await self._batcher.submit([sample.payload for sample in fresh], hints, deadline=deadline, urgency=urgency)
        except Overloaded as error:
            self._metrics.shed.labels("overload").inc(len(fresh))
            raise _Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, error.reason, error.retry_s) from None
        except DeadlinePassed:
            self._metrics.shed.labels("deadline").inc(len(fresh))
            raise _Refused(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed in the queue") from None
        except Unreadable as error:
            self._metrics.shed.labels("unreadable").inc()
            raise _refused_sample(fresh[error.place], error.reason) from None
        except ModelFailed:
            raise _Refused(grpc.StatusCode.INTERNAL, "the model failed; the server's log has it") from None
        except Closed:
            raise _Refused(grpc.StatusCode.UNAVAILABLE, "the server is shutting down") from None

    async def _commit(self, edge_id: str, fresh: Sequence[Asked], scores: Sequence[Float32]) -> dict[str, cloud_pb2.Prediction]:
        """The predictions by sample id, made after the commit."""
        rows = [self._row(edge_id, sample, row_C) for sample, row_C in zip(fresh, scores, strict=True)]
        if not rows:
            return {}
        try:
            earlier = await asyncio.wrap_future(self._store.commit(rows))
        except StoreError as error:
            # A full or broken disk must not be an outage: the answer goes out, and the edge keeps the sample.
            _log.error("the teacher store can't commit", extra={"rows": len(rows), "cause": error.message})
            self._metrics.store_rows.labels("failed").inc(len(rows))
            return {row.sample_id: self._prediction(row.sample_id, row.answer_logits, row.hint_arm, stored=False) for row in rows}
        self._metrics.store_rows.labels("stored").inc(sum(found is None for found in earlier))
        return {row.sample_id: self._after_commit(row, found) for row, found in zip(rows, earlier, strict=True)}

    def _after_commit(self, row: Row, earlier: Stored | None) -> cloud_pb2.Prediction:
        """Two calls may carry one sample at once: the first commit's answer is the answer, to both."""
        if earlier is None:
            return self._prediction(row.sample_id, row.answer_logits, row.hint_arm, stored=True)
        if earlier.payload_hash != hash_payload(row.payload):
            return self._prediction(row.sample_id, row.answer_logits, row.hint_arm, stored=False)
        kept = earlier if self._is_current(earlier) else row
        return self._prediction(row.sample_id, kept.answer_logits, kept.hint_arm, stored=True)

    def _arm(self, sample: Asked) -> HintArm:
        return hint_arm(sample.hint) if self._model.reads_hints else HintArm.NONE

    def _row(self, edge_id: str, sample: Asked, logits: Float32) -> Row:
        return Row(
            edge_id=edge_id,
            sample_id=sample.sample_id,
            purpose=int(sample.purpose),
            p_escalate=sample.p_escalate,
            p_hint=sample.p_hint,
            task_id=self._task.id,
            label_space=self._task.label_space,
            bundle_id=sample.bundle_id,
            payload=sample.payload,
            confidence=sample.confidence,
            small_logits=sample.small_logits,
            answer_logits=logits,
            hint_arm=self._arm(sample),
            teacher_id=self._model.teacher_id,
            prompt_id=self._model.prompt_id,
        )

    def _prediction(self, sample_id: str, logits: Float32, arm: HintArm, *, stored: bool) -> cloud_pb2.Prediction:
        label_id = int(logits.argmax())
        return cloud_pb2.Prediction(
            sample_id=sample_id,
            label_id=label_id,
            label=self._task.labels[label_id],
            scores=scores_to_proto(logits, self._task.label_space, self._model.scores_kind),
            hint_arm=int(arm),  # type: ignore[arg-type]
            stored=stored,
        )


def _refused_sample(sample: Asked, reason: str) -> _Refused:
    return _Refused(grpc.StatusCode.INVALID_ARGUMENT, f"sample {sample.place} ({printable(sample.sample_id)}): {reason}")


async def _abort(context: Context | LabelContext, refused: _Refused) -> NoReturn:
    metadata = () if refused.retry_s is None else (("grpc-retry-pushback-ms", str(max(1, round(refused.retry_s * 1000)))),)
    await context.abort(refused.code, refused.details, metadata)
