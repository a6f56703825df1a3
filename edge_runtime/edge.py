"""An edge inside an application's own process, without gRPC between: answers are futures.

with Edge(EdgeConfig(bundle="bundles/r52", cloud=CloudConfig(target="127.0.0.1:50071"))) as edge:
    futures = edge.submit([Sample(payload="the price of oil rose")])
    print(futures[0].result().label)

Threads: `submit` decides in the caller's thread, any of them, one at a time. What stays here is answered when it returns. Cloud,
spool, updates and estimates live on one event loop in a thread of their own, which is told of decisions, at once where the cloud is
to be asked, else in batches, so that it doesn't wake up for each.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

from edge_runtime.assembly import assembled, ended
from edge_runtime.config import EdgeConfig, check
from edge_runtime.router import Begun
from edge_runtime.runtime import EdgeRuntime, check_samples
from kcm.errors import UnavailableError
from kcm.sample import Answer, Sample

log = logging.getLogger("kcm.edge")

_SOON_S = 0.02  # how late the estimates may hear of what stayed here


class Edge:
    """The parts of `kcm edge` without its server. One per state folder; close it, or use `with`."""

    def __init__(self, config: EdgeConfig) -> None:
        """Start it: the bundle is loaded and warm when this returns.

        Raises:
            ConfigError, BundleError, EngineError, StoreError: it can't start.
        """
        check(config)
        self._config = config
        self._told: deque[tuple[Begun, list[Future[Answer]]]] = deque()
        self._asleep = True  # nobody has told the loop that there is something
        self._stop: asyncio.Event | None = None
        self._failure: BaseException | None = None
        self._gate = threading.Lock()  # between telling the loop something and its end
        started: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(started)), name="kcm-edge", daemon=True)
        self._thread.start()
        started.result()

    @property
    def runtime(self) -> EdgeRuntime:
        """What serves now."""
        return self._parts.router.runtime

    def submit(self, samples: Sequence[Sample]) -> list[Future[Answer]]:
        """A future per sample, in order. Done already: what stays here. The others end as CLOUD or DEGRADED within the cloud's deadline.

        Raises:
            InvalidSample: another modality, or a sample_id twice; the message names the sample's index.
            TypeError: no sequence of Sample.
            UnavailableError: it was closed, or its background work has failed.
        """
        self._check_open()
        check_samples(samples)
        begun = self._parts.router.decide(samples, time.perf_counter())
        futures: list[Future[Answer]] = [Future() for _ in begun.decisions]
        for decision, future in zip(begun.decisions, futures, strict=True):
            if decision.local:
                future.set_result(decision.answer)
        with self._gate:
            self._check_open()  # it may have been closed since: what is told afterwards nobody would answer
            self._told.append((begun, futures))
            if begun.away:
                self._loop.call_soon_threadsafe(self._take)
            elif self._asleep:
                self._asleep = False
                self._loop.call_soon_threadsafe(self._loop.call_later, _SOON_S, self._take)
        return futures

    def infer(self, samples: Sequence[Sample]) -> list[Answer]:
        """Answers, in order, once all of them are there. Raises as `submit` does."""
        return [future.result() for future in self.submit(samples)]

    def feedback(self, truths: Sequence[tuple[str, str]]) -> None:
        """(sample_id, label) pairs; returns after the commit. Raises as Router.feedback does."""
        self._check_open()
        asyncio.run_coroutine_threadsafe(self._parts.router.feedback(truths), self._loop).result()

    def close(self) -> None:
        """Answer what is in flight, keep what waits, end the thread. More than once is fine."""
        if self._thread.is_alive() and self._stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop ended meanwhile
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def __enter__(self) -> Edge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise UnavailableError(f"the edge has failed: {self._failure}") from self._failure
        if not self._thread.is_alive() or (self._stop is not None and self._stop.is_set()):
            raise UnavailableError("the edge is closed")

    async def _run(self, started: Future[None]) -> None:
        try:
            async with assembled(self._config) as parts:
                self._parts, self._loop, self._stop = parts, asyncio.get_running_loop(), asyncio.Event()
                self._asking: set[asyncio.Task[None]] = set()
                started.set_result(None)
                try:
                    await ended(parts.start(), asyncio.create_task(self._stopped()))
                finally:
                    with self._gate:
                        self._stop.set()
                    self._take()
                    while self._asking:
                        await asyncio.wait(self._asking)
        except BaseException as error:
            self._failure = error
            if not started.done():
                started.set_exception(error)

    async def _stopped(self) -> None:
        assert self._stop is not None
        await self._stop.wait()

    def _take(self) -> None:
        """On the loop: note what was decided, and ask the cloud for what doesn't stay."""
        self._asleep = True
        while self._told:
            begun, futures = self._told.popleft()
            try:
                taken = self._parts.router.taken(begun)
            except Exception as error:  # the loop must live on; whoever waits is told
                log.exception("a decision could not be noted")
                _fail(futures, error)
                continue
            if not isinstance(taken, list):
                task = asyncio.create_task(_settle(taken, futures))
                self._asking.add(task)
                task.add_done_callback(self._asking.discard)


async def _settle(answers: Coroutine[Any, Any, list[Answer]], futures: list[Future[Answer]]) -> None:
    try:
        for answer, future in zip(await answers, futures, strict=True):
            with contextlib.suppress(InvalidStateError):  # it stayed here, or the caller gave up on it
                future.set_result(answer)
    except BaseException as error:
        _fail(futures, error)
        raise


def _fail(futures: list[Future[Answer]], error: BaseException) -> None:
    for future in futures:
        with contextlib.suppress(InvalidStateError):
            future.set_exception(error)
