"""A disk that is full: the lowest value goes, it is counted, and every request is answered."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import edge_kit
import pytest
from edge_kit import EASY, HARD, Cloud, request, stub, until

from kcm.policy import explores
from protos.kcm.v1 import edge_pb2

pytestmark = [pytest.mark.fault, pytest.mark.slow]


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a tmpfs can't be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("fill", [False, True])
def test_a_two_mebibyte_disk(tmp_path: Path, fill: bool) -> None:
    cloud = Cloud(tmp_path / "c")
    bundle = edge_kit.make_bundle(tmp_path / "bundle")
    with small_disk(tmp_path / "disk", "2m") as disk:
        arguments = ("--bundle", str(bundle), "--listen", "127.0.0.1:0", "--state", str(disk / "state"), "--cloud", cloud.address)
        command = edge_kit.edge_command(*arguments, "--metrics", "127.0.0.1:0", "--json")
        env = {"KCM_EDGE__SPOOL__MAX_MB": "1", "KCM_EDGE__SPOOL__DRAIN_MAX_MS": "500", "KCM_EDGE__EXPLORE": "0.2"}
        with edge_kit.running(command, tmp_path / "edge.log", env) as edge:
            made, channel = stub(edge.address)
            with channel:
                kept = 0
                for i in range(150):
                    if fill and i == 50:  # somebody else takes all that is left
                        with (disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
                            while True:
                                ballast.write(os.urandom(4096))
                    texts = [f"{HARD[j % 3]} {'x' * 900}" for j in range(20)]
                    answers = made.Infer(request(*texts, ids=tuple(f"{i}-{j}" for j in range(20))), timeout=10).answers
                    assert {a.source for a in answers} == {edge_pb2.InferAnswer.SOURCE_DEGRADED}
                    kept += sum("not kept" not in a.reason for a in answers)
                    assert made.Infer(request(EASY[0], ids=(f"easy{i}",)), timeout=10).answers[0].label == "alpha"
                explored = sum(explores(f"easy{i}", 0.2) for i in range(150))

                def counted() -> tuple[float, float, float]:
                    metrics = edge.scrape()
                    return tuple(metrics[f"kcm_edge_spool_{name}"] for name in ("depth", "evicted_total", "errors_total"))  # type: ignore[return-value]

                until(
                    lambda: sum(counted()) == 3000 + explored, 5, "every sample is kept, or its loss is counted; so are the explored ones"
                )
                metrics = edge.scrape()
                evicted, errors = metrics["kcm_edge_spool_evicted_total"], metrics["kcm_edge_spool_errors_total"]
                assert explored > 10 and evicted + errors > 0
                assert errors > 0 if fill else errors == 0
                assert metrics["kcm_edge_spool_bytes"] <= 2**20
                if fill:
                    (disk / "ballast").unlink()
                with cloud.run():
                    depth = metrics["kcm_edge_spool_depth"]
                    until(lambda: edge.scrape()["kcm_edge_spool_depth"] == 0, 30, "drained, which deletes on a disk that was full")
                assert len(cloud.rows()) >= depth > 200
            assert edge.stop() == 0
