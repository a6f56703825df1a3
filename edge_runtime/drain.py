"""Empties the spool into the cloud: one call at a time, with jitter, behind live traffic."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence

from edge_runtime.breaker import State
from edge_runtime.cloud_client import CloudClient, Failure, Kind
from edge_runtime.config import EdgeConfig
from edge_runtime.spool import Spool, Waiting
from kcm.errors import StoreError
from kcm.logs import Alarm
from kcm.sample import Purpose

log = logging.getLogger("kcm.edge.drain")

_BESIDE_LIVE = 8  # samples per call while live traffic is about: a large batch would make it late
_LIVE_RECENT_S = 1.0
_STARVED_S = 5.0  # under steady traffic, one small call may go at least this often
_IDLE_S = 0.2


class Drain:
    """Owns no state that must survive: what was not settled is sent again."""

    def __init__(self, config: EdgeConfig, spool: Spool, client: CloudClient) -> None:
        self._max_samples, self._spool_config = config.cloud.max_samples, config.spool
        self._spool, self._client = spool, client
        self._failed = 0  # rounds in a row
        self._skip: dict[tuple[str, str], float] = {}  # (task, label space) that the cloud doesn't serve → try again then
        self._alarm = Alarm(log)
        self.drained = 0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._pause_s())
            if not self._spool.waiting:
                continue
            await self._behind_live()
            try:
                done = await self._round()
            except StoreError as error:
                self._alarm("spool", f"spool: {error}")
                done = False
            self._failed = 0 if done else self._failed + 1

    async def _round(self) -> bool:
        """Send one batch. False: nothing got through, wait longer."""
        now = time.monotonic()
        self._skip = {key: until for key, until in self._skip.items() if until > now}
        rows = await self._spool.take(self._batch(), skip=self._skip)
        return bool(rows) and await self._send(rows)

    async def _send(self, rows: Sequence[Waiting]) -> bool:
        for row in rows:
            row.sample.purpose = int(Purpose.BACKFILL)  # type: ignore[assignment]
        outcomes = await self._client.backfill([row.sample for row in rows], task_id=rows[0].task_id, label_space=rows[0].label_space)
        first = outcomes[0]
        if not isinstance(first, Failure):
            ids = [row.sample.sample_id for row in rows]
            stored = [id_ for id_, outcome in zip(ids, outcomes, strict=True) if outcome is True]
            kept = [id_ for id_, outcome in zip(ids, outcomes, strict=True) if outcome is not True]
            await self._spool.settle(stored=stored, again=kept, reason="the cloud could not store it")
            self.drained += len(stored)
            return bool(stored)
        if first.kind is Kind.INVALID:
            if len(rows) > 1:  # one bad sample must not take the others along
                half = len(rows) // 2
                left = await self._send(rows[:half])
                return await self._send(rows[half:]) or left
            await self._spool.settle(dead=[rows[0].sample.sample_id], reason=first.reason)
            return True
        if first.kind is Kind.MISMATCH:
            self._skip[rows[0].task_id, rows[0].label_space] = time.monotonic() + self._spool_config.drain_max_ms / 1000
        elif first.kind is Kind.BAD_REPLY:
            await self._spool.settle(again=[row.sample.sample_id for row in rows], reason=first.reason)
        return False

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
        if not self._spool.waiting:
            return _IDLE_S
        base = self._spool_config.drain_interval_ms / 1000
        backoff = min(base * 2.0 ** min(self._failed, 30), self._spool_config.drain_max_ms / 1000)
        # The breaker knows better than our count when the cloud may be back.
        if self._client.breaker.state is not State.CLOSED:
            backoff = base
        return max(backoff, self._client.breaker.wait_s) * random.uniform(0.5, 1.5) + 0.001
