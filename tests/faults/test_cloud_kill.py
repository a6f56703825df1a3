"""kill -9 of the cloud in mid-traffic: what was acknowledged as stored is in the store, once. And SIGTERM loses nothing."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import cloud_kit
import grpc
import picture_kit
import pytest
from cloud_kit import request, sample

from cloud_server.compact import compact
from kcm.sample import Payload
from protos.kcm.v1 import cloud_pb2_grpc

TRIALS = int(os.environ.get("KCM_FAULT_TRIALS", "8"))

# Mutants that the test below must catch, else it proves nothing.
# Acknowledges as stored, and commits half a second later.
REPLY_FIRST = """
import asyncio, cloud_server.service as service
class LateStore:
    def __init__(self, store): self._store = store
    def __getattr__(self, name): return getattr(self._store, name)
    def commit(self, rows):
        from concurrent.futures import Future
        asyncio.get_running_loop().call_later(0.5, self._store.commit, rows)
        done = Future(); done.set_result([None] * len(rows)); return done
plain = service.CloudService.__init__
def late(self, **parts): plain(self, **{**parts, "store": LateStore(parts["store"])})
service.CloudService.__init__ = late
"""
# Answers a resend without looking, and stores it as a row of its own.
NO_KEY = """
import cloud_server.store as store
store.SCHEMA = store.SCHEMA.replace("compacted_ms INTEGER,\\n    UNIQUE (edge_id, sample_id)", "compacted_ms INTEGER")
assert "UNIQUE (edge_id, sample_id)" not in store.SCHEMA
store._find = lambda db, edge_id, sample_id: None
"""


class Traffic:
    """Edges that call without pause, and send again what wasn't acknowledged: the same ids, in other calls."""

    def __init__(self, address: str, edges: int, waiting: list[tuple[str, str]], counter: list[int], modality: str = "text") -> None:
        self.acknowledged: list[tuple[str, str]] = []
        self.unsure: list[tuple[str, str]] = []
        self._modality = modality
        self._waiting, self._counter, self._lock, self._stop = waiting, counter, threading.Lock(), threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(address, f"edge-{edge}")) for edge in range(edges)]
        for thread in self._threads:
            thread.start()

    def _run(self, address: str, edge_id: str) -> None:
        with grpc.insecure_channel(address) as channel:
            cloud = cloud_pb2_grpc.CloudStub(channel)
            while not self._stop.is_set():
                keys = self._next(edge_id)
                try:
                    reply = cloud.Predict(request(*(sample(key[1], self._payload(key[1])) for key in keys), edge_id=edge_id), timeout=5)
                except grpc.RpcError:
                    with self._lock:
                        self.unsure += keys
                    return
                stored = [p.sample_id for p in reply.predictions if p.stored]
                with self._lock:
                    self.acknowledged += [key for key in keys if key[1] in stored]
                    self.unsure += [key for key in keys if key[1] not in stored]

    def _payload(self, sample_id: str) -> Payload:
        """The same for the same id: what is sent again is the same sample."""
        return "profit rose" if self._modality == "text" else picture_kit.noisy(int(sample_id[1:]))

    def _next(self, edge_id: str) -> list[tuple[str, str]]:
        with self._lock:
            mine = [key for key in self._waiting if key[0] == edge_id][:4]
            for key in mine:
                self._waiting.remove(key)
            while len(mine) < 4:
                self._counter[0] += 1
                mine.append((edge_id, f"s{self._counter[0]}"))
            return mine

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def kill_loop(
    folder: Path, trials: int, code: str = "", seed: int = 0, modality: str = "text"
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(acknowledged, stored) keys after `trials` kills, a last clean run, and compaction, which a kill may precede, too."""
    rng, counter = random.Random(seed), [0]
    if modality == "image":
        # The real model: its images are decoded beside its thread, which a kill may hit as well.
        task, large, start = picture_kit.write_image_task(folder / "task"), picture_kit.write_image_large(folder / "large"), code
    else:
        task, large = cloud_kit.write_task(folder / "task"), cloud_kit.write_large(folder / "large", "encoder", "weights")
        start = cloud_kit.by_rule(0.001) + code
    acknowledged: list[tuple[str, str]] = []
    waiting: list[tuple[str, str]] = []
    for trial in range(trials + 1):
        with cloud_kit.cloud_process(task, large, folder / "store", code=start) as server:
            traffic = Traffic(server.address, 3, waiting, counter, modality)
            time.sleep(rng.uniform(0.2, 0.6))
            if trial < trials:
                server.kill()
            traffic.end()
            acknowledged += traffic.acknowledged
            waiting = waiting + traffic.unsure
            if trial % 3 == 1:
                compact(folder / "store")
    compact(folder / "store")
    return acknowledged, cloud_kit.stored_keys(folder / "store")


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("modality", ["text", "image"])
def test_every_acknowledged_sample_is_stored_once_whenever_the_server_is_killed(tmp_path: Path, modality: str) -> None:
    acknowledged, stored = kill_loop(tmp_path, TRIALS, modality=modality)
    assert len(acknowledged) >= 20 * TRIALS, "too little traffic to mean anything"
    assert set(acknowledged) <= set(stored), f"{len(set(acknowledged) - set(stored))} acknowledged samples are lost"
    assert [key for key, times in Counter(stored).items() if times > 1] == []


@pytest.mark.slow
@pytest.mark.fault
def test_the_kill_loop_catches_a_server_that_replies_before_the_commit(tmp_path: Path) -> None:
    acknowledged, stored = kill_loop(tmp_path, 2, REPLY_FIRST)
    assert set(acknowledged) - set(stored), "the mutant lost nothing: the kill loop is blind"


@pytest.mark.slow
@pytest.mark.fault
def test_a_resend_makes_no_second_row_and_a_store_without_the_key_is_caught(tmp_path: Path) -> None:
    def rows_after_resends(folder: Path, code: str) -> Any:
        import apsw

        task, large = cloud_kit.write_task(folder / "task"), cloud_kit.write_large(folder / "large", "encoder", "weights")
        with cloud_kit.cloud_process(task, large, folder / "store", code=cloud_kit.by_rule() + code) as server:
            with cloud_kit.stub(server.address) as cloud:
                for _ in range(3):
                    cloud.Predict(request(sample("s1")), timeout=5)
        with apsw.Connection(str(folder / "store" / "inbox-0.db")) as db:
            return db.execute("SELECT count(*) FROM rows").fetchall()[0][0]

    assert rows_after_resends(tmp_path / "ours", "") == 1
    assert rows_after_resends(tmp_path / "mutant", NO_KEY) == 3


@pytest.mark.slow
@pytest.mark.fault
def test_sigterm_under_load_loses_nothing(tmp_path: Path) -> None:
    task, large = cloud_kit.write_task(tmp_path / "task"), cloud_kit.write_large(tmp_path / "large", "encoder", "weights")
    acknowledged: list[tuple[str, str]] = []
    counter = [0]
    for _ in range(3):
        with cloud_kit.cloud_process(task, large, tmp_path / "store", code=cloud_kit.by_rule(0.005)) as server:
            traffic = Traffic(server.address, 4, [], counter)
            time.sleep(0.6)
            assert server.terminate() == 0
            traffic.end()
            assert len(traffic.acknowledged) >= 40, "too little traffic to mean anything"
            acknowledged += traffic.acknowledged
            assert '"stopped"' in server.log.read_text()
    compact(tmp_path / "store")
    stored = cloud_kit.stored_keys(tmp_path / "store")
    assert set(acknowledged) <= set(stored) and len(stored) == len(set(stored))
