"""Explored samples reach the spool behind the answers: never in their way, all of them at a clean end, and bounded on a slow disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_edge_spool import ids, waiting

from edge_runtime.explorer import _MOST, Explorer
from edge_runtime.spool import Spool
from edge_runtime.stats import Stats


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path / "spool.db", max_bytes=2**24)
    yield made
    made.close()


def test_what_comes_together_is_written_together_and_counted_when_it_is_there(spool: Spool) -> None:
    async def scenario() -> None:
        stats = Stats()
        explorer = Explorer(0.1, spool, stats)
        for turn in ("first", "second"):
            for i in range(10):
                explorer.keep(waiting(f"{turn}{i}", explored=True))
            assert stats.explored == spool.waiting == (0 if turn == "first" else 10)
            await asyncio.sleep(0.5)
            assert stats.explored == spool.waiting == (10 if turn == "first" else 20)

    asyncio.run(scenario())


def test_the_end_waits_for_what_is_gathered(spool: Spool) -> None:
    async def scenario() -> list[str]:
        explorer = Explorer(0.1, spool, Stats())
        await explorer.close()  # nothing was explored yet
        explorer.keep(waiting("a", explored=True))
        await asyncio.sleep(0)
        explorer.keep(waiting("b", explored=True))
        await explorer.close()
        return ids(await spool.take(10))

    assert asyncio.run(scenario()) == ["a", "b"]


def test_a_slow_disk_holds_nothing_up_and_what_waits_for_it_is_bounded(spool: Spool) -> None:
    async def scenario() -> None:
        explorer = Explorer(1.0, spool, stats := Stats())
        spool._db.submit(lambda connection: time.sleep(1.0))
        began = time.monotonic()
        for i in range(3 * _MOST):
            explorer.keep(waiting(str(i), explored=True))
        assert time.monotonic() - began < 0.9
        await explorer.close()
        assert stats.explored == spool.waiting == _MOST

    asyncio.run(scenario())


def test_a_disk_that_fails_is_counted_and_breaks_nothing(spool: Spool) -> None:
    async def scenario() -> None:
        explorer = Explorer(1.0, spool, stats := Stats())
        spool.close()
        explorer.keep(waiting("a", explored=True))
        await explorer.close()
        assert (stats.explored, stats.spool_errors) == (0, 1)

    asyncio.run(scenario())
