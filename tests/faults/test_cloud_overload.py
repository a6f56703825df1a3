"""Five times more than the server can do, and a disk that is really full: refused at once or answered, never a crash."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import cloud_kit
import grpc
import psutil
import pytest
from cloud_kit import request, sample

from cloud_server.compact import compact
from kcm.errors import StoreError
from protos.kcm.v1 import cloud_pb2_grpc

SECONDS = float(os.environ.get("KCM_OVERLOAD_SECONDS", "6"))
EACH_S = 0.02  # the model's, so 50 samples a second is all it can do


def start(folder: Path, *flags: str, store: Path | None = None, seconds_each: float = EACH_S) -> Any:
    task, large = cloud_kit.write_task(folder / "task"), cloud_kit.write_large(folder / "large", "encoder", "weights")
    return cloud_kit.cloud_process(task, large, store or folder / "store", *flags, code=cloud_kit.by_rule(seconds_each))


async def offer(address: str, per_second: float, seconds: float, deadline_s: float) -> Counter[str]:
    """Calls at a fixed pace, whatever becomes of them; how they ended."""
    ends: Counter[str] = Counter()
    async with grpc.aio.insecure_channel(address) as channel:
        cloud = cloud_pb2_grpc.CloudStub(channel)

        async def one(number: int) -> None:
            try:
                await cloud.Predict(request(sample(f"p{per_second}-{number}")), timeout=deadline_s)
                ends["OK"] += 1
            except grpc.aio.AioRpcError as error:
                ends[error.code().name] += 1
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    metadata = error.trailing_metadata()
                    assert metadata is not None and int(metadata["grpc-retry-pushback-ms"]) > 0

        started, calls = time.monotonic(), []
        for number in range(round(per_second * seconds)):
            await asyncio.sleep(max(0.0, started + number / per_second - time.monotonic()))
            calls.append(asyncio.ensure_future(one(number)))
        await asyncio.gather(*calls)
    return ends


@pytest.mark.slow
@pytest.mark.fault
def test_five_times_too_much_load_keeps_goodput_and_memory(tmp_path: Path) -> None:
    with start(tmp_path, "--max-batch", "8") as server:
        process = psutil.Process(server.process.pid)
        peak = asyncio.run(offer(server.address, 0.9 / EACH_S, 3.0, 2.0))
        assert peak["OK"] >= 0.95 * peak.total(), f"within its means it answers: {peak}"
        before = process.memory_info().rss
        ends = asyncio.run(offer(server.address, 5 / EACH_S, SECONDS, 0.5))
        goodput = ends["OK"] / SECONDS
        assert goodput >= 0.8 * peak["OK"] / 3.0, f"{goodput:.0f}/s of {peak['OK'] / 3:.0f}/s: {ends}"
        assert ends["RESOURCE_EXHAUSTED"] > ends["DEADLINE_EXCEEDED"], f"refused at once, not late: {ends}"
        assert set(ends) <= {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
        assert process.memory_info().rss - before < 64 * 2**20
        assert server.terminate() == 0


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.fault
def test_a_full_disk_is_no_outage_and_the_store_recovers(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk, start(tmp_path, store=disk / "store", seconds_each=0.0) as server:
        acknowledged: list[tuple[str, str]] = []
        with cloud_kit.stub(server.address) as cloud:

            def send(number: int) -> bool:
                reply = cloud.Predict(request(sample(f"s{number}", f"{number} " + "word " * 2000)), timeout=5)
                if reply.predictions[0].stored:
                    acknowledged.append(("edge-1", f"s{number}"))
                return bool(reply.predictions[0].stored)

            (disk / "ballast").write_bytes(bytes(700_000))
            stored = [send(number) for number in range(250)]
            assert stored.count(True) > 20 and not any(stored[-20:]), "the disk must really have filled"
            (disk / "ballast").unlink()
            assert [send(number) for number in range(250, 255)][-1], "with room again, it stores again"
        assert server.terminate() == 0
        with apsw.Connection(str(disk / "store" / "inbox-0.db")) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            found: Any = db.execute("SELECT edge_id, sample_id FROM rows").fetchall()
        assert set(acknowledged) <= set(found)


@pytest.mark.slow
@pytest.mark.fault
def test_a_compaction_without_room_fails_cleanly_and_succeeds_with_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        cloud_kit.put(disk, *(cloud_kit.row(f"s{i}", text=os.urandom(2000).hex()) for i in range(500)))
        (disk / "ballast").write_bytes(b"")
        with contextlib.suppress(OSError), (disk / "ballast").open("wb") as ballast:
            while True:
                ballast.write(bytes(4096))
                ballast.flush()
        with pytest.raises(StoreError, match=r"can't be|full"):
            compact(disk)
        (disk / "ballast").unlink()
        assert compact(disk).written == 500
        assert len(set(cloud_kit.stored_keys(disk))) == len(cloud_kit.stored_keys(disk)) == 500
