"""Truths on real files: durable, bounded, one row per sample_id, beside the spool's samples."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_edge_spool import waiting

from edge_runtime.spool import Spool
from edge_runtime.truths import Truth
from kcm.database import Database
from kcm.errors import StoreError

MB = 2**20


def truth(sample_id: str, label_id: int = 1, space: str = "s") -> Truth:
    return Truth(sample_id=sample_id, label_id=label_id, task_id="t", label_space=space)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path / "spool.db", max_bytes=64 * MB)
    yield made
    made.close()


def test_what_was_put_is_there_after_a_restart_until_it_is_settled(spool: Spool, tmp_path: Path) -> None:
    rows = [truth("b", 2), truth("a", 0)]
    assert asyncio.run(spool.truths.put(rows)) == 0
    spool.close()
    again = Spool(tmp_path / "spool.db", max_bytes=64 * MB)
    assert again.truths.waiting == 2 and asyncio.run(again.truths.take(10)) == rows
    asyncio.run(again.truths.settle(rows[:1]))
    assert again.truths.waiting == 1 and asyncio.run(again.truths.take(10)) == rows[1:]
    again.close()


def test_the_last_truth_holds_and_one_that_was_corrected_on_the_way_stays(spool: Spool) -> None:
    async def scenario() -> None:
        await spool.truths.put([truth("a", 1), truth("b", 1), truth("a", 2)])
        assert spool.truths.waiting == 2
        sent = await spool.truths.take(10)
        assert sent == [truth("b", 1), truth("a", 2)]
        await spool.truths.put([truth("a", 3)])
        await spool.truths.settle(sent)
        assert await spool.truths.take(10) == [truth("a", 3)] and spool.truths.waiting == 1

    asyncio.run(scenario())


def test_one_take_is_of_one_task_and_others_can_be_skipped(spool: Spool) -> None:
    async def scenario() -> None:
        await spool.truths.put([truth("a", space="old"), truth("b", space="new"), truth("c", space="old")])
        assert await spool.truths.take(10) == [truth("a", space="old")]
        assert await spool.truths.take(10, skip={("t", "old"): 1.0}) == [truth("b", space="new")]
        assert await spool.truths.take(1, skip=[("t", "old"), ("t", "new")]) == []

    asyncio.run(scenario())


def test_a_full_table_drops_the_oldest_and_counts_them(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", max_bytes=MB)
    most = spool.truths.most

    async def scenario() -> None:
        assert await spool.truths.put([truth(str(i)) for i in range(most)]) == 0
        assert await spool.truths.put([truth("0", 3), *(truth(f"new{i}") for i in range(5))]) == 5
        assert (spool.truths.waiting, spool.truths.dropped) == (most, 5)
        left = {row.sample_id: row.label_id for row in await spool.truths.take(10**6)}
        assert {"1", "5"}.isdisjoint(left) and {"6", "new0", "new4"} <= set(left) and left["0"] == 3, "a correction makes it new"
        with pytest.raises(StoreError, match=f"{most + 1} truths at once, at most {most} are kept"):
            await spool.truths.put([truth(f"x{i}") for i in range(most + 1)])
        assert spool.truths.waiting == most

    asyncio.run(scenario())
    spool.close()


def test_a_spool_that_is_full_of_samples_has_room_for_truths(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", max_bytes=MB)

    async def scenario() -> None:
        for size in (20, 900, 20_000):
            for start in range(0, 3 * MB // (size + 600), 100):
                await spool.put([waiting(f"{size}-{i}", 0.5, size=size) for i in range(start, start + 100)])
        assert await spool.truths.put([truth(f"{i:036d}") for i in range(300)]) == 0
        assert spool.truths.waiting == 300 and spool.waiting > 20

    asyncio.run(scenario())
    spool.close()


def test_ids_that_are_too_long_for_the_tables_share_make_room_among_themselves(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", max_bytes=MB)

    async def scenario() -> None:
        await spool.put([waiting(str(i), 0.5, size=20_000) for i in range(100)])
        for start in range(0, 1000, 100):
            await spool.truths.put([truth(f"{i}{'ß' * 250}") for i in range(start, start + 100)])
        assert spool.truths.waiting + spool.truths.dropped == 1000 and spool.truths.dropped > 0
        assert (await spool.truths.take(10**6))[-1].sample_id.startswith("999")
        assert await spool.put([waiting("after", 0.1)]) == ()

    asyncio.run(scenario())
    spool.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1.6 * MB


def test_a_spool_of_an_older_daemon_gets_the_table(tmp_path: Path) -> None:
    from edge_runtime import spool as module

    old = Database(tmp_path / "spool.db", module._SCHEMA)
    old.submit(lambda c: c.execute("INSERT INTO spool VALUES (1, 'a', 0, 0.5, 0, 0, 't', 's', 'b', '', x'')").fetchall()).result()
    old.close()
    spool = Spool(tmp_path / "spool.db", max_bytes=MB)
    asyncio.run(spool.truths.put([truth("a")]))
    assert (spool.waiting, spool.truths.waiting) == (1, 1)
    spool.close()
