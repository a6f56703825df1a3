"""Empties the spool into the cloud, truths first: one call at a time, with jitter, behind live traffic."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence

from edge_runtime.breaker import State
from edge_runtime.cloud_client import CloudClient, Failure, Kind, Receipt
from edge_runtime.config import EdgeConfig
from edge_runtime.spool import Spool, Waiting
from edge_runtime.truths import Truth
from kcm.errors import StoreError
from kcm.logs import Alarm
from kcm.sample import Purpose
from protos.kcm.v1 import cloud_pb2

log = logging.getLogger("kcm.edge.drain")

_BESIDE_LIVE = 8  # samples per call while live traffic is about: a large batch would make it late
_LIVE_RECENT_S = 1.0
_STARVED_S = 5.0  # under steady traffic, one small call may go at least this often
_IDLE_S = 0.2
_RARELY = 20  # longest pauses until a cloud that takes no truths is asked again

Learned = Callable[[cloud_pb2.PredictSample, Receipt], None]


class Drain:
    """Owns no state that must survive: what was not settled is sent again."""

    def __init__(self, config: EdgeConfig, spool: Spool, client: CloudClient, learned: Learned = lambda sample, receipt: None) -> None:
        """
        Args:
            learned: is told the cloud's answer to each sample that is stored there now.
        """
        self._max_samples, self._spool_config = config.cloud.max_samples, config.spool
        self._spool, self._client, self._learned = spool, client, learned
        self._failed = 0  # rounds in a row
        self._skip: dict[tuple[str, str], float] = {}  # (task, label space) that the cloud doesn't serve → try again then
        self._no_truths_until = 0.0  # monotonic
        self._alarm = Alarm(log)
        self.drained = 0
        self.labelled = 0  # truths that the cloud has stored
        self.refused = 0  # truths that it never will

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._pause_s())
            if not self._waiting:
                continue
            await self._behind_live()
            try:
                done = await self._round()
            except StoreError as error:
                self._alarm("spool", f"spool: {error}")
                done = False
            self._failed = 0 if done else self._failed + 1

    @property
    def _waiting(self) -> bool:
        return bool(self._spool.waiting or self._truths_waiting)

    @property
    def _truths_waiting(self) -> bool:
        return bool(self._spool.truths.waiting) and time.monotonic() >= self._no_truths_until

    async def _round(self) -> bool:
        """Send one batch of each. False: nothing got through, wait longer."""
        now = time.monotonic()
        self._skip = {key: until for key, until in self._skip.items() if until > now}
        done = False
        if self._truths_waiting and (truths := await self._spool.truths.take(self._batch(), skip=self._skip)):
            done = await self._send_truths(truths)
        if self._spool.waiting and (rows := await self._spool.take(self._batch(), skip=self._skip)):
            done = await self._send(rows) or done
        return done

    async def _send(self, rows: Sequence[Waiting]) -> bool:
        for row in rows:
            if row.sample.purpose != cloud_pb2.EXPLORE:
                row.sample.purpose = int(Purpose.BACKFILL)  # type: ignore[assignment]
        outcomes = await self._client.backfill([row.sample for row in rows], task_id=rows[0].task_id, label_space=rows[0].label_space)
        first = outcomes[0]
        if not isinstance(first, Failure):
            ids = [row.sample.sample_id for row in rows]
            receipts = [(row.sample, outcome) for row, outcome in zip(rows, outcomes, strict=True) if isinstance(outcome, Receipt)]
            stored = [sample.sample_id for sample, receipt in receipts if receipt.stored]
            await self._spool.settle(stored=stored, again=sorted(set(ids) - set(stored)), reason="the cloud could not store it")
            self.drained += len(stored)
            for sample, receipt in receipts:
                if receipt.stored:
                    self._learned(sample, receipt)
            return bool(stored)
        if first.kind is Kind.INVALID:
            if len(rows) > 1:  # one bad sample must not take the others along
                half = len(rows) // 2
                left = await self._send(rows[:half])
                return await self._send(rows[half:]) or left
            await self._spool.settle(dead=[rows[0].sample.sample_id], reason=first.reason)
            return True
        if first.kind is Kind.MISMATCH:
            self._wait_for(rows[0])
        elif first.kind is Kind.BAD_REPLY:
            await self._spool.settle(again=[row.sample.sample_id for row in rows], reason=first.reason)
        return False

    async def _send_truths(self, truths: Sequence[Truth]) -> bool:
        failure = await self._client.label(truths)
        if failure is None:
            await self._spool.truths.settle(truths)
            self.labelled += len(truths)
            return True
        if failure.kind is Kind.INVALID:
            if len(truths) > 1:
                half = len(truths) // 2
                left = await self._send_truths(truths[:half])
                return await self._send_truths(truths[half:]) or left
            await self._spool.truths.settle(truths)
            self.refused += 1
            self._alarm("truth", f"the cloud never takes the truth about sample {truths[0].sample_id}, it is dropped: {failure.reason}")
            return True
        if failure.kind is Kind.MISMATCH:
            self._wait_for(truths[0])
        elif failure.kind is Kind.UNKNOWN:
            self._no_truths_until = time.monotonic() + _RARELY * self._spool_config.drain_max_ms / 1000
            self._alarm("truths", "this cloud takes no truths (it has no Label call: update it); they are kept here")
        return False

    def _wait_for(self, row: Waiting | Truth) -> None:
        """The cloud serves another task: what belongs to this one waits."""
        self._skip[row.task_id, row.label_space] = time.monotonic() + self._spool_config.drain_max_ms / 1000

    async def _behind_live(self) -> None:
        """Wait for a gap between live calls, but not for ever."""
        until = time.monotonic() + _STARVED_S
        while self._client.live and time.monotonic() < until:
            await asyncio.sleep(0.01)

    def _batch(self) -> int:
        if self._client.breaker.state is not State.CLOSED:
            return 1  # a probe
        recent = time.monotonic() - self._client.last_live < _LIVE_RECENT_S
        return min(_BESIDE_LIVE, self._max_samples) if recent else self._max_samples

    def _pause_s(self) -> float:
        if not self._waiting:
            return _IDLE_S
        base = self._spool_config.drain_interval_ms / 1000
        backoff = min(base * 2.0 ** min(self._failed, 30), self._spool_config.drain_max_ms / 1000)
        # The breaker knows better than our count when the cloud may be back.
        if self._client.breaker.state is not State.CLOSED:
            backoff = base
        return max(backoff, self._client.breaker.wait_s) * random.uniform(0.5, 1.5) + 0.001
