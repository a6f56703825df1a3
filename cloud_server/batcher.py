"""Work-conserving batches: the model runs as soon as it is free, with all that waits up to max_batch. No timer, no delay.

Invariants (tests/unit/cloud_server/test_batcher.py):
  every sample that was taken in gets exactly one outcome: its scores, or one error;
  none gets scores after its deadline; a more urgent class goes first, and within a class the older first;
  never more than max_queue samples wait, and a call is taken in whole or refused whole.
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

from kcm.sample import Float32, Hint

_log = logging.getLogger(__name__)

Run = Callable[[Sequence[str], Sequence[Hint | None]], Float32]
OnBatch = Callable[[int, float], None]
_SMOOTHING = 0.2  # of the seconds per sample, over batches
_LEAST_PUSHBACK_S = 0.05


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


class Closed(Exception):
    """The batcher is draining: nothing more is taken in."""


class _Entry:
    __slots__ = ("deadline", "future", "hint", "text")

    def __init__(self, text: str, hint: Hint | None, deadline: float, future: asyncio.Future[Float32]) -> None:
        self.text, self.hint, self.deadline, self.future = text, hint, deadline, future


class Batcher:
    """One model, one thread. All methods belong to one event loop; `run` is called in the thread."""

    def __init__(
        self,
        run: Run,
        *,
        max_batch: int,
        max_queue: int,
        on_batch: OnBatch = lambda size, seconds: None,
        executor: Executor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_batch(size, seconds)` is told of every run. `clock` is monotonic seconds, also of the deadlines."""
        self._run, self._on_batch, self._clock = run, on_batch, clock
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
        """Samples in the queue that still want an answer."""
        return sum(len(queue) for queue in self._queues.values())

    @property
    def idle(self) -> bool:
        return not self._busy and not self.waiting

    async def submit(
        self, texts: Sequence[str], hints: Sequence[Hint | None], *, deadline: float, urgency: Urgency = Urgency.LIVE
    ) -> list[Float32]:
        """Scores [C] of each text, in order. Cancelling the call takes its samples out of the queue.

        Raises:
            Overloaded: not taken in.
            DeadlinePassed: at least one sample wasn't scored by `deadline`.
            ModelFailed: the model failed on a batch that held one of them.
            Closed: the batcher is draining.
        """
        self._admit(len(texts), deadline, urgency)
        loop = asyncio.get_running_loop()
        entries = [_Entry(text, hint, deadline, loop.create_future()) for text, hint in zip(texts, hints, strict=True)]
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

    def _admit(self, samples: int, deadline: float, urgency: Urgency) -> None:
        if self._closed:
            raise Closed
        now = self._clock()
        if now >= deadline:
            raise DeadlinePassed
        ahead = self._busy + sum(len(queue) for level, queue in self._queues.items() if level <= urgency)
        wait_s = ahead * self._seconds_each
        if self.waiting + samples > self._max_queue:
            raise Overloaded("queue is full", max(_LEAST_PUSHBACK_S, wait_s))
        # Only behind others: were the estimate too high, an idle model would refuse for ever and never measure again.
        if ahead and now + wait_s + samples * self._seconds_each > deadline:
            raise Overloaded("the wait would outlast the deadline", max(_LEAST_PUSHBACK_S, wait_s))

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
            elif self.waiting == 0:
                if self._closed:
                    return
                self._wake.clear()
                await self._wake.wait()

    async def _score(self, batch: list[_Entry]) -> None:
        self._busy = len(batch)
        started = self._clock()
        scores: Float32 | None = None
        try:
            texts, hints = [entry.text for entry in batch], [entry.hint for entry in batch]
            scores = await asyncio.get_running_loop().run_in_executor(self._executor, checked, self._run, texts, hints)
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


def checked(run: Run, texts: Sequence[str], hints: Sequence[Hint | None]) -> Float32:
    """What `run` gives, float32 [B, C].

    Raises:
        ValueError: not one row per text, or a score that isn't finite: neither may reach a client or the store.
    """
    import numpy as np

    scores = np.asarray(run(texts, hints), np.float32)
    if scores.ndim != 2 or len(scores) != len(texts):
        raise ValueError(f"the model gave scores of shape {scores.shape} for {len(texts)} samples")
    if not np.isfinite(scores).all():
        raise ValueError("the model gave scores that are not finite")
    return scores
