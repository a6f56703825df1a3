"""kcm.v1.Edge over gRPC: reads requests, refuses what can't be read, hands the rest to the router."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from edge_runtime.breaker import State
from edge_runtime.cloud_client import CloudClient
from edge_runtime.config import EdgeConfig
from edge_runtime.router import Router
from edge_runtime.runtime import InvalidSample
from edge_runtime.spool import Spool
from edge_runtime.stats import Stats
from edge_runtime.updater import Updater
from kcm.errors import StoreError
from kcm.sample import Answer, Route, Sample, Source, edge_payload_from_proto, new_sample_id
from protos.kcm.v1 import bundle_pb2, edge_pb2, edge_pb2_grpc

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[edge_pb2.InferRequest, edge_pb2.InferReply]

NAME = "kcm.v1.Edge"
_WINDOW = 64  # requests of one stream that are worked on at once
_MAX_ID = 256
_ENDING = "the edge is shutting down: send what was not answered again"


class EdgeService(edge_pb2_grpc.EdgeServicer):  # type: ignore[misc]
    """The servicer. `stop_reading` begins the end of streams that would never end by themselves."""

    def __init__(
        self, config: EdgeConfig, router: Router, updater: Updater, stats: Stats, *, client: CloudClient | None, spool: Spool | None
    ) -> None:
        self._config, self._router, self._updater, self._stats = config, router, updater, stats
        self._client, self._spool = client, spool
        self._readers: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def Infer(self, request: edge_pb2.InferRequest, context: Context) -> edge_pb2.InferReply:
        if self._stopping:
            await context.abort(grpc.StatusCode.UNAVAILABLE, _ENDING)
        try:
            return _reply(await self._router.ask(self._samples(request), context.time_remaining()))
        except InvalidSample as error:
            await self._refuse(context, error)

    async def InferStream(self, requests: AsyncIterator[edge_pb2.InferRequest], context: Context) -> None:
        replies = _Replies(context)

        async def read() -> None:
            place = -1
            async for request in requests:
                place += 1
                try:
                    samples = self._samples(request)
                except InvalidSample as error:
                    raise _in_stream(place, error) from error
                await replies.put(self._router.ask(samples, context.time_remaining()))

        reader = asyncio.create_task(read())
        self._readers.add(reader)
        if self._stopping:
            reader.cancel()
        try:
            await asyncio.wait({reader, replies.failed}, return_when=asyncio.FIRST_COMPLETED)
            await replies.finish()
            if self._stopping:
                await context.abort(grpc.StatusCode.UNAVAILABLE, _ENDING)
            reader.result()
        except InvalidSample as error:
            await self._refuse(context, error)
        finally:
            self._readers.discard(reader)
            _drop(reader)
            replies.drop()

    async def Feedback(self, request: edge_pb2.FeedbackRequest, context: Context) -> edge_pb2.FeedbackReply:
        try:
            taken = await self._router.feedback(self._truths(request))
        except InvalidSample as error:
            await self._refuse(context, error)
        except StoreError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"not kept, send it again: {error.message}")
            raise AssertionError("abort raises") from None
        return edge_pb2.FeedbackReply(kept=taken.kept, matched=taken.matched, dropped=taken.dropped)

    async def Status(self, request: edge_pb2.StatusRequest, context: object) -> edge_pb2.StatusReply:
        runtime, stats = self._router.runtime, self._stats
        manifest = runtime.manifest
        cloud = "off" if self._client is None else "ready" if self._client.breaker.state is State.CLOSED else "unreachable"
        return edge_pb2.StatusReply(
            bundle=bundle_pb2.BundleInfo(
                bundle_id=manifest.bundle_id,
                task_id=manifest.task_id,
                label_space=manifest.label_space,
                precision=runtime.precision,
                calibration_id=runtime.calibration.calibration_id,
                round=manifest.round,
                engine=runtime.provider,
            ),
            cloud=cloud,
            answered_local=stats.answers[Source.LOCAL],
            answered_cloud=stats.answers[Source.CLOUD],
            answered_degraded=stats.answers[Source.DEGRADED],
            spool_depth=self._spool.waiting if self._spool else 0,
            last_refusal=self._updater.last_refusal,
            epsilon=runtime.epsilon,
            guaranteed=self._router.drift.guaranteed,
            drift=self._router.drift.verdict(),
            explored=stats.explored,
            feedback=stats.feedback,
        )

    def stop_reading(self) -> None:
        """Take no more: what was read is answered, then streams end as UNAVAILABLE, and so does each new call."""
        self._stopping = True
        for reader in self._readers:
            reader.cancel()

    def _samples(self, request: edge_pb2.InferRequest) -> list[Sample]:
        """Raises InvalidSample: which sample can't be read, and why."""
        if len(request.samples) > self._config.max_samples:
            raise InvalidSample(f"{len(request.samples)} samples in one call, at most {self._config.max_samples} are taken")
        samples = []
        for index, message in enumerate(request.samples):
            try:
                samples.append(self._sample(message))
            except ValueError as error:
                raise InvalidSample(f"sample {index}: {error}") from error
        return samples

    def _sample(self, message: edge_pb2.InferSample) -> Sample:
        # An image's limits are the task's own: what decodes it knows them, and refuses it with the same words everywhere.
        if message.payload.WhichOneof("kind") != "image" and message.payload.ByteSize() > self._config.max_sample_bytes:
            raise ValueError(f"{message.payload.ByteSize()} bytes, at most {self._config.max_sample_bytes} are taken")
        _check_id(message.sample_id)
        return Sample(
            payload=edge_payload_from_proto(message.payload), sample_id=message.sample_id or new_sample_id(), route=Route(message.route)
        )

    def _truths(self, request: edge_pb2.FeedbackRequest) -> list[tuple[str, str]]:
        """Raises InvalidSample: which truth can't be read, and why."""
        if len(request.truths) > self._config.max_samples:
            raise InvalidSample(f"{len(request.truths)} truths in one call, at most {self._config.max_samples} are taken")
        for index, truth in enumerate(request.truths):
            try:
                _check_id(truth.sample_id)
            except ValueError as error:
                raise InvalidSample(f"truth {index}: {error}") from error
        return [(truth.sample_id, truth.label) for truth in request.truths]

    async def _refuse(self, context: Context, error: InvalidSample) -> NoReturn:
        self._stats.invalid_requests += 1
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        raise AssertionError("abort raises")


class _Replies:
    """Replies of one stream, in the order of its requests. It reads on while earlier ones are worked on, _WINDOW at most."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._waiting: deque[asyncio.Future[list[Answer]]] = deque()
        self._sent = 0
        self._window = asyncio.Semaphore(_WINDOW)
        self._writer: asyncio.Task[None] | None = None
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def put(self, answers: asyncio.Future[list[Answer]]) -> None:
        """Returns once there is room for more."""
        self._waiting.append(answers)
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        await self._window.acquire()

    async def finish(self) -> None:
        """Returns once all of them are out. Raises what one of them raised."""
        if self._writer is not None:
            await self._writer
        if self.failed.done():
            self.failed.result()

    def drop(self) -> None:
        """End what nobody will read any more."""
        for task in (self.failed, *self._waiting, *((self._writer,) if self._writer else ())):
            _drop(task)

    async def _write(self) -> None:
        try:
            while self._waiting:
                await self._context.write(_reply(await self._waiting[0]))
                self._waiting.popleft()
                self._window.release()
                self._sent += 1
            self._writer = None
        except InvalidSample as error:
            self.failed.set_exception(_in_stream(self._sent, error))
        except Exception as error:  # the stream ends with it, whatever it is
            self.failed.set_exception(error)


def _reply(answers: list[Answer]) -> edge_pb2.InferReply:
    reply = edge_pb2.InferReply()
    for answer in answers:
        answer.add_to(reply)
    return reply


def _in_stream(place: int, error: InvalidSample) -> InvalidSample:
    """Which of a stream's requests it is of, counted from 0 as its samples are: replies come in their order."""
    return InvalidSample(f"request {place}: {error}")


def _check_id(sample_id: str) -> None:
    if len(sample_id) > _MAX_ID:
        raise ValueError(f"sample_id has {len(sample_id)} characters, at most {_MAX_ID} are taken")


def _drop(task: asyncio.Future[Any]) -> None:
    """End what nobody will read the result of."""
    task.cancel()
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
