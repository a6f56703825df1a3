"""When and where the device decides: what has come in together is decided in one run, on the event loop or on a thread beside it.

Nothing waits for company: a request is decided in the same turn of the loop in which it came, with those that came in that turn. A run
costs much before its first sample, so a busy device gets more done for it and a quiet one loses nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from edge_runtime.drift import Drift
from edge_runtime.runtime import Decision, EdgeRuntime
from kcm.sample import Sample

TURN = 32  # samples per run, and so per turn of the event loop
_INLINE_S = 0.004  # what other requests may have to wait for; a thread costs a busy device a third more CPU


class Serving(NamedTuple):
    """What serves: a bundle, and the estimates that its decisions count in."""

    runtime: EdgeRuntime
    drift: Drift


class _Asked(NamedTuple):
    samples: Sequence[Sample]
    first: int  # index of the first in the caller's request, for an error's message
    serving: Serving
    then: Callable[[list[Decision] | Exception], None]


class Decider:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._waiting: deque[_Asked] = deque()
        self._called = False  # _go comes in the next turn
        self._apart: asyncio.Task[None] | None = None  # what the thread has
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")  # starts with its first use
        # Of a sample, alone and among others, smoothed; none yet: no such run so far. A run costs much before its first sample.
        self._pace_s: dict[bool, float] = {}

    def ask(self, samples: Sequence[Sample], serving: Serving, then: Callable[[list[Decision] | Exception], None], first: int = 0) -> None:
        """Have at most TURN samples decided, soon.

        Args:
            then: is told the decisions, or what EdgeRuntime.decide raised, on the event loop.
        """
        self._waiting.append(_Asked(samples, first, serving, then))
        self._call()

    async def decisions(self, samples: Sequence[Sample], serving: Serving, first: int = 0) -> list[Decision]:
        """As `ask`, awaited."""
        found: asyncio.Future[list[Decision]] = asyncio.get_running_loop().create_future()

        def then(decided: list[Decision] | Exception) -> None:
            if found.cancelled():
                return
            if isinstance(decided, Exception):
                found.set_exception(decided)
            else:
                found.set_result(decided)

        self.ask(samples, serving, then, first)
        return await found

    def _call(self) -> None:
        if not self._called and self._apart is None and self._waiting:
            self._called = True
            asyncio.get_running_loop().call_soon(self._go)

    def _go(self) -> None:
        self._called = False
        batch = self._together()
        samples = sum(len(asked.samples) for asked in batch)
        if self._expected_s(samples) > _INLINE_S:
            self._apart = asyncio.create_task(self._in_thread(batch))
            return
        began = time.perf_counter()
        decided = _decide(batch)
        self._took(time.perf_counter() - began, samples)
        self._call()  # what is left, after whatever else the loop has to do
        _tell(batch, decided)

    async def _in_thread(self, batch: list[_Asked]) -> None:
        """The event loop would feel it."""
        try:
            seconds, decided = await asyncio.get_running_loop().run_in_executor(self._thread, _timed, batch)
            self._took(seconds, sum(len(asked.samples) for asked in batch))
        finally:
            self._apart = None
            self._call()
        _tell(batch, decided)

    def _together(self) -> list[_Asked]:
        """The longest waiting, and those behind it of the same bundle that still fit into one run."""
        batch = [self._waiting.popleft()]
        room = TURN - len(batch[0].samples)
        while self._waiting and self._waiting[0].serving is batch[0].serving and len(self._waiting[0].samples) <= room:
            batch.append(self._waiting.popleft())
            room -= len(batch[-1].samples)
        return batch

    def _expected_s(self, samples: int) -> float:
        """As measured of as few or as many; else of the others, which says too much of many rather than too little."""
        many = samples > 1
        return samples * self._pace_s.get(many, self._pace_s.get(not many, 0.0))

    def _took(self, seconds: float, samples: int) -> None:
        if samples:
            each, many = seconds / samples, samples > 1
            before = self._pace_s.get(many, each)
            self._pace_s[many] = before + 0.1 * (each - before)


Decided = list[list[Decision] | Exception]


def _decide(batch: list[_Asked]) -> Decided:
    """Per request its decisions or its error. One that can't be read takes no other along."""
    runtime = batch[0].serving.runtime
    try:
        decisions = iter(runtime.decide([sample for asked in batch for sample in asked.samples], batch[0].first))
        return [[next(decisions) for _ in asked.samples] for asked in batch]
    except Exception as error:
        return [error] if len(batch) == 1 else [_decide([asked])[0] for asked in batch]


def _timed(batch: list[_Asked]) -> tuple[float, Decided]:
    began = time.perf_counter()
    decided = _decide(batch)
    return time.perf_counter() - began, decided


def _tell(batch: list[_Asked], decided: Decided) -> None:
    for asked, found in zip(batch, decided, strict=True):
        asked.then(found)
