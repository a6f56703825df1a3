"""kill -9 of the cloud while applications tell it truths: the last one that was acknowledged about a sample is in its row."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path

import cloud_kit
import grpc
import pytest
from cloud_kit import labels_request, request, sample

from cloud_server.compact import compact
from protos.kcm.v1 import cloud_pb2_grpc

TRIALS = int(os.environ.get("KCM_FAULT_TRIALS", "8"))
Key = tuple[str, str]

# A mutant that the test below must catch, else it proves nothing: acknowledges truths, and commits them half a second later.
REPLY_FIRST = """
import asyncio, cloud_server.service as service
class LateStore:
    def __init__(self, store): self._store = store
    def __getattr__(self, name): return getattr(self._store, name)
    def tell(self, *told):
        from concurrent.futures import Future
        asyncio.get_running_loop().call_later(0.5, self._store.tell, *told)
        done = Future(); done.set_result(None); return done
plain = service.CloudService.__init__
def late(self, **parts): plain(self, **{**parts, "store": LateStore(parts["store"])})
service.CloudService.__init__ = late
"""


class Truths:
    """What edges told of their samples: the last truth that was acknowledged, and those after it whose fate nobody knows."""

    def __init__(self) -> None:
        self.acknowledged: dict[Key, int] = {}
        self.unsure: dict[Key, set[int]] = {}
        self.calls = 0

    def allowed(self, key: Key) -> set[int | None]:
        return {self.acknowledged.get(key)} | self.unsure.get(key, set())


def edge(address: str, edge_id: str, truths: Truths, samples: set[Key], stop: threading.Event, seed: int) -> None:
    """Sends samples, and tells truths of new ones before or after, and of old ones again; ends with the server."""
    rng = random.Random(f"{edge_id}{seed}")
    with grpc.insecure_channel(address) as channel:
        cloud = cloud_pb2_grpc.CloudStub(channel)
        while not stop.is_set():
            mine = [f"{seed}-{rng.randrange(200)}" for _ in range(3)]
            labels = {name: rng.randrange(4) for name in mine}
            samples.update((edge_id, name) for name in mine)
            try:
                if rng.random() < 0.3:
                    cloud.Predict(request(*(sample(name) for name in labels), edge_id=edge_id), timeout=5)
            except grpc.RpcError:
                return
            try:
                cloud.Label(labels_request(edge_id, **labels), timeout=5)
            except grpc.RpcError:
                for name, label in labels.items():
                    truths.unsure.setdefault((edge_id, name), set()).add(label)
                return
            for name, label in labels.items():
                truths.acknowledged[edge_id, name] = label
                truths.unsure.pop((edge_id, name), None)
            truths.calls += 1


def kill_loop(folder: Path, trials: int, code: str = "") -> tuple[Truths, dict[Key, int | None]]:
    """What was told, and what stands in the rows after `trials` kills, compactions in between, and every sample sent at last."""
    import pyarrow.parquet as pq

    rng, truths, samples = random.Random(0), Truths(), set[Key]()
    task, large = cloud_kit.write_task(folder / "task"), cloud_kit.write_large(folder / "large", "encoder", "weights")
    for trial in range(trials):
        with cloud_kit.cloud_process(task, large, folder / "store", code=cloud_kit.by_rule() + code) as server:
            stop = threading.Event()
            names = [f"edge-{number}" for number in range(3)]
            threads = [threading.Thread(target=edge, args=(server.address, name, truths, samples, stop, trial // 3)) for name in names]
            for thread in threads:
                thread.start()
            time.sleep(rng.uniform(0.2, 0.6))
            server.kill()
            stop.set()
            for thread in threads:
                thread.join()
            if trial % 2:
                compact(folder / "store")
    with cloud_kit.cloud_process(task, large, folder / "store", code=cloud_kit.by_rule()) as server:
        with cloud_kit.stub(server.address) as cloud:
            for edge_id, name in sorted(samples):
                cloud.Predict(request(sample(name), edge_id=edge_id), timeout=5)
        assert server.terminate() == 0
    compact(folder / "store")
    rows = [row for part in (folder / "store" / "parquet").glob("*.parquet") for row in pq.read_table(part).to_pylist()]
    assert len({(row["edge_id"], row["sample_id"]) for row in rows}) == len(rows) == len(samples)
    return truths, {(row["edge_id"], row["sample_id"]): row["label"] for row in rows}


@pytest.mark.slow
@pytest.mark.fault
def test_every_acknowledged_truth_is_in_its_row_whenever_the_server_is_killed(tmp_path: Path) -> None:
    truths, stored = kill_loop(tmp_path, TRIALS)
    assert truths.calls >= 10 * TRIALS, "too little traffic to mean anything"
    wrong = {key: (label, truths.allowed(key)) for key, label in stored.items() if label not in truths.allowed(key)}
    assert not wrong, f"{len(wrong)} of {len(stored)} rows: {list(wrong.items())[:3]}"


@pytest.mark.slow
@pytest.mark.fault
def test_the_kill_loop_catches_a_server_that_acknowledges_truths_before_the_commit(tmp_path: Path) -> None:
    truths, stored = kill_loop(tmp_path, 2, REPLY_FIRST)
    assert any(label not in truths.allowed(key) for key, label in stored.items()), "the mutant lost nothing: the kill loop is blind"
