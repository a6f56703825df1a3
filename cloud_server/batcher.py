"""Work-conserving batches: the model runs as soon as it is free, with all that waits up to max_batch. No timer, no delay.

Payloads that cost time to read (images: 32 photos keep a core busy for 30 to 80 ms) are read in threads of their own before they
queue: the model doesn't wait for it, and one that can't be read costs its own call alone, never the batch that it would have been in.

Invariants (tests/unit/cloud_server/test_batcher.py):
  every sample that was taken in gets exactly one outcome: its scores, or one error;
  none gets scores after its deadline; a more urgent class goes first, and within a class the older first;
  never more than max_queue samples wait or are being read, and a call is taken in whole or refused whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

from kcm.sample import Float32, Hint, Payload

_log = logging.getLogger(__name__)

Read = Callable[[Payload], Any]
Run = Callable[[Sequence[Any], Sequence[Hint | None]], Float32]  # of payloads, or of what Read makes of them
OnBatch = Callable[[int, float], None]
_SMOOTHING = 0.2  # of the seconds per sample, over batches
_LEAST_PUSHBACK_S = 0.05
_READ_AT_ONCE = 8  # payloads of a call that a thread reads in one go: a call of many lets others in between


class Urgency(enum.IntEnum):
    """Who waits for the answer. Lower goes first."""

    LIVE = 0
    BACKFILL = 1
    FILL = 2  # the store's own: scores without the hint


class Overloaded(Exception):
    """Not taken in: the queue is full, or the wait would outlast the deadline. Try again after `retry_s`."""

    def __init__(self, reason: str, retry_s: float) -> None:
        super().__init__(reason)
        self.reason, self.retry_s = reason, retry_s


class DeadlinePassed(Exception):
    """The sample's deadline passed before its scores were there."""


class ModelFailed(Exception):
    """The model raised, or gave scores that aren't finite or not one row per sample. The log has the cause."""


class Unreadable(Exception):
    """The payload at `place` of the call can't be read. `reason` says why, and nothing of its content."""

    def __init__(self, place: int, reason: str) -> None:
        super().__init__(f"payload {place}: {reason}")
        self.place, self.reason = place, reason


class Closed(Exception):
    """The batcher is draining: nothing more is taken in."""


class _Entry:
    __slots__ = ("deadline", "future", "hint", "ready")

    def __init__(self, ready: Any, hint: Hint | None, deadline: float, future: asyncio.Future[Float32]) -> None:
        self.ready, self.hint, self.deadline, self.future = ready, hint, deadline, future


class Batcher:
    """One model, one thread. All methods belong to one event loop; `run` is called in the thread."""

    def __init__(
        self,
        run: Run,
        *,
        max_batch: int,
        max_queue: int,
        read: Read | None = None,
        readers: int = 1,
        on_batch: OnBatch = lambda size, seconds: None,
        on_read: OnBatch = lambda size, seconds: None,
        executor: Executor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            run: the model's. read: makes of a payload what `run` takes, in `readers` threads; raises ValueError for one that it can't.
            on_batch: is told of every run, on_read of every call's payloads that were read: (samples, seconds).
            clock: monotonic seconds, also of the deadlines.
        """
        self._run, self._on_batch, self._on_read, self._clock = run, on_batch, on_read, clock
        self._read, self._readers = read, readers
        self._reading: dict[Urgency, int] = dict.fromkeys(Urgency, 0)  # samples that are being read
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="read") if read is not None else None
        self._max_batch, self._max_queue = max_batch, max_queue
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="model")
        self._queues: dict[Urgency, deque[_Entry]] = {urgency: deque() for urgency in Urgency}
        self._wake = asyncio.Event()
        self._closed = False
        self._busy = 0  # samples in the model now
        self._seconds_each = 0.0
        self._worker = asyncio.ensure_future(self._work())

    @property
    def waiting(self) -> int:
        """Samples in the queue, or being read for it, that still want an answer."""
        return sum(len(self._queues[urgency]) + self._reading[urgency] for urgency in Urgency)

    @property
    def idle(self) -> bool:
        return not self._busy and not self.waiting

    async def submit(
        self, payloads: Sequence[Payload], hints: Sequence[Hint | None], *, deadline: float, urgency: Urgency = Urgency.LIVE
    ) -> list[Float32]:
        """Scores [C] of each payload, in order. Cancelling the call takes its samples out of the queue.

        Raises:
            Overloaded: not taken in.
            DeadlinePassed: at least one sample wasn't scored by `deadline`.
            Unreadable: a payload can't be read; none of the call's was scored.
            ModelFailed: the model failed on a batch that held one of them.
            Closed: the batcher is draining.
        """
        self._admit(len(payloads), deadline, urgency)
        loop = asyncio.get_running_loop()
        ready = payloads if self._read is None else await self._read_ahead(self._read, payloads, deadline, urgency)
        entries = [_Entry(item, hint, deadline, loop.create_future()) for item, hint in zip(ready, hints, strict=True)]
        self._queues[urgency].extend(entries)
        self._wake.set()
        try:
            return await asyncio.gather(*(entry.future for entry in entries))
        finally:
            # Where one failed or the call was cancelled, nobody waits for the others.
            if any(not entry.future.done() or entry.future.cancelled() or entry.future.exception() for entry in entries):
                self._withdraw(entries, urgency)

    async def drain(self) -> None:
        """Take nothing more in, answer what waits, stop the thread."""
        self._closed = True
        self._wake.set()
        with contextlib.suppress(asyncio.CancelledError):
            await self._worker
        self._executor.shutdown(wait=False)
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    def _admit(self, samples: int, deadline: float, urgency: Urgency) -> None:
        if self._closed:
            raise Closed
        now = self._clock()
        if now >= deadline:
            raise DeadlinePassed
        ahead = self._busy + sum(len(queue) + self._reading[level] for level, queue in self._queues.items() if level <= urgency)
        wait_s = ahead * self._seconds_each
        if self.waiting + samples > self._max_queue:
            raise Overloaded("queue is full", max(_LEAST_PUSHBACK_S, wait_s))
        # Only behind others: were the estimate too high, an idle model would refuse for ever and never measure again.
        if ahead and now + wait_s + samples * self._seconds_each > deadline:
            raise Overloaded("the wait would outlast the deadline", max(_LEAST_PUSHBACK_S, wait_s))

    async def _read_ahead(self, read: Read, payloads: Sequence[Payload], deadline: float, urgency: Urgency) -> list[Any]:
        """What the model takes, in order. A call has at most a task per thread in the pool: calls take turns there."""
        loop, started = asyncio.get_running_loop(), self._clock()
        self._reading[urgency] += len(payloads)
        ready: list[Any] = []
        try:
            while len(ready) < len(payloads):
                if self._clock() >= deadline:
                    raise DeadlinePassed
                starts = range(len(ready), len(payloads), _READ_AT_ONCE)[: self._readers]
                jobs = [loop.run_in_executor(self._pool, read_all, read, payloads, start, start + _READ_AT_ONCE) for start in starts]
                for part in await asyncio.gather(*jobs):
                    ready += part
        finally:
            self._reading[urgency] -= len(payloads)
            self._wake.set()  # where it fails while the batcher drains, nothing else would
        self._on_read(len(payloads), self._clock() - started)
        return ready

    def _withdraw(self, entries: Sequence[_Entry], urgency: Urgency) -> None:
        for entry in entries:
            if not entry.future.done():
                entry.future.cancel()
            elif not entry.future.cancelled():
                entry.future.exception()  # seen: the first one was raised
        gone = set(map(id, entries))
        self._queues[urgency] = deque(entry for entry in self._queues[urgency] if id(entry) not in gone)

    def _take(self) -> list[_Entry]:
        """Up to max_batch samples whose deadline is ahead; the late ones met on the way are told so."""
        batch: list[_Entry] = []
        now = self._clock()
        for queue in (self._queues[urgency] for urgency in Urgency):
            while queue and len(batch) < self._max_batch:
                entry = queue.popleft()
                if entry.future.done():
                    continue
                if now >= entry.deadline:
                    entry.future.set_exception(DeadlinePassed())
                else:
                    batch.append(entry)
        return batch

    async def _work(self) -> None:
        while True:
            batch = self._take()
            if batch:
                await self._score(batch)
            else:  # what is being read wakes it later
                if self._closed and not self.waiting:
                    return
                self._wake.clear()
                await self._wake.wait()

    async def _score(self, batch: list[_Entry]) -> None:
        self._busy = len(batch)
        started = self._clock()
        scores: Float32 | None = None
        try:
            ready, hints = [entry.ready for entry in batch], [entry.hint for entry in batch]
            scores = await asyncio.get_running_loop().run_in_executor(self._executor, checked, self._run, ready, hints)
        except Exception:
            _log.exception("the model failed on a batch", extra={"samples": len(batch)})
        finally:
            self._busy = 0
        now = self._clock()
        self._note(len(batch), now - started)
        for row, entry in enumerate(batch):
            if entry.future.done():
                continue
            if scores is None:
                entry.future.set_exception(ModelFailed())
            elif now >= entry.deadline:
                entry.future.set_exception(DeadlinePassed())
            else:
                entry.future.set_result(scores[row])

    def _note(self, samples: int, seconds: float) -> None:
        each = seconds / samples
        self._seconds_each = each if self._seconds_each == 0.0 else (1 - _SMOOTHING) * self._seconds_each + _SMOOTHING * each
        self._on_batch(samples, seconds)


def checked(run: Run, ready: Sequence[Any], hints: Sequence[Hint | None]) -> Float32:
    """What `run` gives, float32 [B, C].

    Raises:
        ValueError: not one row per sample, or a score that isn't finite: neither may reach a client or the store.
    """
    import numpy as np

    scores = np.asarray(run(ready, hints), np.float32)
    if scores.ndim != 2 or len(scores) != len(ready):
        raise ValueError(f"the model gave scores of shape {scores.shape} for {len(ready)} samples")
    if not np.isfinite(scores).all():
        raise ValueError("the model gave scores that are not finite")
    return scores


def read_all(read: Read, payloads: Sequence[Payload], start: int, end: int) -> list[Any]:
    """`read` of payloads[start:end]. Raises Unreadable."""
    ready = []
    for place, payload in enumerate(payloads[start:end], start):
        try:
            ready.append(read(payload))
        except ValueError as error:
            raise Unreadable(place, str(error)) from None
    return ready
