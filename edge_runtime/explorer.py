"""Puts explored samples into the spool in the background: their answers are out already, and must not wait for the disk."""

from __future__ import annotations

import asyncio
import logging

from edge_runtime.spool import Spool, Waiting
from edge_runtime.stats import Stats
from kcm.errors import StoreError
from kcm.logs import Alarm

log = logging.getLogger("kcm.edge.explorer")

_SOON_S = 0.05  # gathers what comes meanwhile into one commit
# Samples that wait for a slow disk, and their bytes (images are large); more are not explored.
_MOST, _MOST_BYTES = 1024, 32 * 2**20


class Explorer:
    """Belongs to one event loop. A crash may lose what was explored in the last moment; no answer hangs on it."""

    def __init__(self, share: float, spool: Spool, stats: Stats) -> None:
        """
        Args:
            share: of the samples that stay here, in 0..1.
        """
        self.share = share
        self._spool, self._stats = spool, stats
        self._rows: list[Waiting] = []
        self._bytes = 0  # of their samples
        self._task: asyncio.Task[None] | None = None
        self._alarm = Alarm(log)

    def keep(self, row: Waiting) -> None:
        """Returns at once."""
        size = row.sample.ByteSize()
        if len(self._rows) >= _MOST or self._bytes + size > _MOST_BYTES:
            self._alarm("slow", "the disk is too slow to keep what is explored; some of it is not")
            return
        self._rows.append(row)
        self._bytes += size
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write_soon())

    async def close(self) -> None:
        """Write what is left."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._write()

    async def _write_soon(self) -> None:
        while self._rows:
            await asyncio.sleep(_SOON_S)
            await self._write()

    async def _write(self) -> None:
        rows, self._rows, self._bytes = self._rows, [], 0
        if not rows:
            return
        try:
            lost = await self._spool.put(rows)
        except StoreError as error:
            self._stats.spool_errors += len(rows)
            self._alarm("spool", f"spool: {error}")
            return
        self._stats.explored += len(rows) - len(lost)
