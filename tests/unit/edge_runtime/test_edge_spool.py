"""The spool on real files: durable, bounded, one row per sample_id."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.spool import Spool, Waiting
from kcm.errors import StoreError
from protos.kcm.v1 import cloud_pb2, sample_pb2

MB = 2**20


def waiting(
    sample_id: str, confidence: float = 0.5, *, size: int = 20, space: str = "s", dead: bool = False, explored: bool = False
) -> Waiting:
    sample = cloud_pb2.PredictSample(
        sample_id=sample_id,
        confidence=confidence,
        payload=sample_pb2.Payload(text="x" * size),
        hint=sample_pb2.Hint(label_ids=[1, 2], probabilities=[0.5, 0.25], confidence=confidence),
        bundle_id="b",
        purpose=cloud_pb2.EXPLORE if explored else cloud_pb2.LIVE,
    )
    return Waiting(sample=sample, task_id="t", label_space=space, dead=dead, reason="because")


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path / "spool.db", max_bytes=64 * MB)
    yield made
    made.close()


def ids(rows: list[Waiting]) -> list[str]:
    return [row.sample.sample_id for row in rows]


def test_what_was_put_is_taken_unchanged_and_stays_until_settled(spool: Spool, tmp_path: Path) -> None:
    async def scenario() -> None:
        rows = [waiting("b", 0.4), waiting("a", 0.3)]
        assert await spool.put(rows) == ()
        assert spool.waiting == 2
        taken = await spool.take(10)
        assert [row.sample for row in taken] == [row.sample for row in rows]
        assert (taken[0].task_id, taken[0].label_space, taken[0].reason) == ("t", "s", "because")
        assert ids(await spool.take(10)) == ["b", "a"]
        await spool.settle(stored=["b"])
        assert ids(await spool.take(10)) == ["a"] and spool.waiting == 1

    asyncio.run(scenario())
    spool.close()
    again = Spool(tmp_path / "spool.db", max_bytes=64 * MB)
    assert again.waiting == 1
    again.close()


def test_a_resend_is_one_row_and_the_first_stays(spool: Spool) -> None:
    async def scenario() -> None:
        await spool.put([waiting("a", 0.1)])
        await spool.put([waiting("a", 0.9), waiting("a", 0.8)])
        (row,) = await spool.take(10)
        assert row.sample.confidence == pytest.approx(0.1) and spool.waiting == 1

    asyncio.run(scenario())


def test_refused_samples_go_to_the_back_and_dead_ones_never_out(spool: Spool) -> None:
    async def scenario() -> None:
        await spool.put([waiting(i) for i in "abc"])
        await spool.settle(again=["a"], reason="not stored")
        assert ids(await spool.take(10)) == ["b", "c", "a"]
        await spool.settle(dead=["b"], reason="can't be read")
        assert ids(await spool.take(10)) == ["c", "a"]
        assert (spool.waiting, spool.dead) == (2, 1)
        await spool.settle(stored=["b"])  # a dead row is kept to be looked at
        assert spool.dead == 1

    asyncio.run(scenario())


def test_one_take_is_of_one_task_and_others_can_be_skipped(spool: Spool) -> None:
    async def scenario() -> None:
        await spool.put([waiting("a", space="old"), waiting("b", space="new"), waiting("c", space="old")])
        assert ids(await spool.take(10)) == ["a"]
        assert ids(await spool.take(10, skip={("t", "old"): 1.0})) == ["b"]
        assert await spool.take(10, skip=[("t", "old"), ("t", "new")]) == []

    asyncio.run(scenario())


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("size", [50, 1500, 20_000])
def test_a_full_spool_evicts_the_most_confident_and_never_grows(tmp_path: Path, size: int) -> None:
    spool = Spool(tmp_path / "spool.db", max_bytes=MB)
    count = 3 * MB // (size + 600)

    async def scenario() -> None:
        for start in range(0, count, 50):
            # confidences in a scattered order: i·7919 mod count
            rows = [waiting(f"{i:06d}", (i * 7919 % count) / count, size=size) for i in range(start, min(start + 50, count))]
            await spool.put(rows)
        left = await spool.take(count)
        kept = [row.sample.confidence for row in left]
        assert len(kept) == spool.waiting and spool.waiting + spool.evicted == count
        # nothing of lower value was kept over something of higher value, up to the raggedness of shared pages: an eviction frees whole
        # pages, so that a row or two of any value find room after it
        assert sorted(kept)[-3] < 1.15 * len(kept) / count + 0.05
        assert len(kept) * (size + 100) > 0.3 * MB, "it evicts far more than it must"
        await spool.settle(stored=ids(left))
        assert spool.waiting == 0
        assert await spool.put([waiting("after", 0.9)]) == ()

    asyncio.run(scenario())
    assert size_of(tmp_path) <= 1.6 * MB
    spool.close()


def test_a_sample_of_less_value_than_all_others_is_the_one_that_goes(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", max_bytes=MB)

    async def scenario() -> None:
        for i in range(120):
            await spool.put([waiting(str(i), 0.2, size=20_000)])
        full = spool.waiting
        assert await spool.put([waiting("sure", 0.97, size=20_000)]) == ("sure",)
        assert spool.waiting == full
        assert await spool.put([waiting("unsure", 0.1, size=20_000)]) == ()
        assert "unsure" in ids(await spool.take(1000))

    asyncio.run(scenario())
    spool.close()


def test_explored_samples_go_last_and_make_room_first(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", max_bytes=MB)

    async def scenario() -> None:
        await spool.put([waiting(f"explored{i}", 0.01, size=20_000, explored=True) for i in range(20)])
        await spool.put([waiting("0", 0.9), waiting("1", 0.9)])
        assert ids(await spool.take(3)) == ["0", "1", "explored0"]
        await spool.settle(again=["0", "1"], reason="not stored")
        assert ids(await spool.take(3)) == ["0", "1", "explored0"], "also after a refusal"
        late = [f"late{i}" for i in range(36)]
        for name in late:
            await spool.put([waiting(name, 0.2, size=20_000)])
        left = ids(await spool.take(1000))
        assert {"0", "1", *late} <= set(left) and len(left) < 2 + len(late) + 20, "only explored ones made room"
        assert await spool.put([waiting("explored", 0.02, size=20_000, explored=True)]) == ("explored",)

    asyncio.run(scenario())
    spool.close()


def test_dead_letters_make_room_first(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", max_bytes=MB)

    async def scenario() -> None:
        await spool.put([waiting(f"dead{i}", 0.01, size=20_000, dead=True) for i in range(20)])
        for i in range(100):
            await spool.put([waiting(str(i), 0.2, size=20_000)])
        assert spool.dead == 0 and "0" in ids(await spool.take(1000))

    asyncio.run(scenario())
    spool.close()


def test_a_sample_larger_than_the_whole_spool_is_not_kept_and_nothing_breaks(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", max_bytes=MB)

    async def scenario() -> None:
        await spool.put([waiting("small", 0.5)])
        assert await spool.put([waiting("huge", 0.9, size=2 * MB)]) == ("huge",)
        assert ids(await spool.take(10)) == ["small"]

    asyncio.run(scenario())
    spool.close()


def test_a_caller_that_goes_away_does_not_undo_or_break_the_commit(spool: Spool) -> None:
    async def scenario() -> None:
        tasks = [asyncio.create_task(spool.put([waiting(str(i))])) for i in range(20)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await spool.put([waiting("after")])
        assert spool.waiting == 21

    asyncio.run(scenario())
    assert not spool._db.submit(lambda connection: None).cancel(), "a commit can't be called back"


def test_one_take_stays_within_four_mebibytes(spool: Spool) -> None:
    async def scenario() -> None:
        await spool.put([waiting(str(i), size=1_500_000) for i in range(5)])
        assert ids(await spool.take(10)) == ["0", "1"]
        await spool.put([waiting("huge", size=5_000_000)])
        await spool.settle(stored=[str(i) for i in range(5)])
        assert ids(await spool.take(10)) == ["huge"]

    asyncio.run(scenario())


def test_a_damaged_file_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "spool.db").write_bytes(b"this is no database, and it is long enough to be looked at" * 100)
    with pytest.raises(StoreError, match=r"spool.db can't be opened"):
        Spool(tmp_path / "spool.db", max_bytes=MB)


@pytest.mark.parametrize("where", ["head", "index"])
def test_a_damaged_file_is_set_aside_and_an_empty_spool_begins(tmp_path: Path, where: str) -> None:
    path = tmp_path / "spool.db"
    spool = Spool(path, max_bytes=MB)
    asyncio.run(spool.put([waiting(str(i)) for i in range(200)]))
    spool.close()
    data = bytearray(path.read_bytes())
    if where == "head":
        data[:100] = b"x" * 100
    else:
        data[4096:] = b"x" * (len(data) - 4096)  # the schema is well, every page behind it is not
    path.write_bytes(data)
    again = Spool.open(path, max_bytes=MB)
    assert again.waiting == 0
    asyncio.run(again.put([waiting("a")]))
    again.close()
    (aside,) = (p for p in tmp_path.iterdir() if ".damaged-" in p.name and p.name[-1].isdigit())
    assert aside.read_bytes() == bytes(data)


def test_a_folder_without_rights_is_no_damage(tmp_path: Path) -> None:
    (tmp_path / "spool.db").mkdir()
    with pytest.raises(StoreError):
        Spool.open(tmp_path / "spool.db", max_bytes=MB)
    assert [p.name for p in tmp_path.iterdir()] == ["spool.db"]


_WRITER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_edge_spool import waiting
from edge_runtime.spool import Spool

async def main():
    spool = Spool(Path(sys.argv[1]), max_bytes=2**26)
    async def one(k):
        for i in range(10**6):
            await spool.put([waiting(f"{{k}}-{{i}}")])
            print(f"{{k}}-{{i}}", flush=True)
    await asyncio.gather(*(one(k) for k in range(8)))
asyncio.run(main())
"""


@pytest.mark.fault
@pytest.mark.slow
def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    acknowledged: set[str] = set()
    for turn in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER.format(tests=str(Path(__file__).parent)), str(tmp_path / f"{turn}.db")],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        seen = [process.stdout.readline().strip() for _ in range(20 + 17 * turn)]
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read()
        seen += rest[: rest.rfind("\n") + 1].split()
        process.wait(10)
        process.stdout.close()
        spool = Spool(tmp_path / f"{turn}.db", max_bytes=2**26)
        kept = set(ids(asyncio.run(spool.take(10**6))))
        spool.close()
        assert set(seen) <= kept
        acknowledged |= {f"{turn}:{name}" for name in seen}
    assert len(acknowledged) > 500
