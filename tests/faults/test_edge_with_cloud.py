"""`kcm edge` and `kcm cloud` as they are shipped, one against the other, down to the compacted teacher store."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import cloud_kit
import edge_kit
import pytest
from edge_kit import EASY, HARD, Traffic, depth, request, stub, until

from edge_runtime.config import EdgeConfig
from kcm.policy import explores
from protos.kcm.v1 import edge_pb2

pytestmark = [pytest.mark.fault, pytest.mark.slow]
CLOUD, DEGRADED = edge_pb2.InferAnswer.SOURCE_CLOUD, edge_pb2.InferAnswer.SOURCE_DEGRADED
KCM = [sys.executable, "-c", "from kcm.app.cli import main; main()"]
QUICK = {"KCM_EDGE__SPOOL__DRAIN_MAX_MS": "500", "KCM_EDGE__CLOUD__BREAKER_MAX_MS": "800", "KCM_EDGE__CLOUD__BREAKER_BASE_MS": "200"}


def test_kill_9_of_the_cloud_loses_nothing_and_stores_nothing_twice(tmp_path: Path) -> None:
    bundle = edge_kit.make_bundle(tmp_path / "bundle")
    large = cloud_kit.tiny_encoder(tmp_path / "large", labels=list(edge_kit.LABELS), task_id="tiny")
    store, task = tmp_path / "store", bundle / "task.toml"
    port = edge_kit.free_port()
    target = ("--listen", f"127.0.0.1:{port}")
    command = [
        *KCM,
        "edge",
        "--bundle",
        str(bundle),
        "--listen",
        "127.0.0.1:0",
        "--state",
        str(tmp_path / "state"),
        "--cloud",
        f"127.0.0.1:{port}",
    ]
    with cloud_kit.cloud_process(task, large, store, *target) as cloud, edge_kit.running(command, tmp_path / "edge.log", QUICK) as edge:
        made, channel = stub(edge.address)
        with channel:
            (answer,) = made.Infer(request(HARD[0], ids=("first",)), timeout=20).answers
            assert answer.source == CLOUD and answer.label in edge_kit.LABELS and answer.model_id not in ("", "rule")
        with Traffic(edge.address) as traffic:
            time.sleep(1.5)
            cloud.kill()
            time.sleep(1.0)
            with cloud_kit.cloud_process(task, large, store, *target) as second:
                time.sleep(1.5)
                second.kill()
                time.sleep(0.5)
        waiting = depth(edge.address)
        assert waiting > 50
        with cloud_kit.cloud_process(task, large, store, *target) as third:
            until(lambda: depth(edge.address) == 0, 60, "drained")
            assert third.terminate() == 0
        assert edge.stop() == 0
    assert not traffic.failed and len(traffic.of(DEGRADED)) > 50 and len(traffic.of(CLOUD)) > 50
    for _ in range(2):  # the second run finds nothing new
        subprocess.run([*KCM, "store", "compact", str(store), "--json"], check=True, timeout=120, capture_output=True)
    keys = Counter(sample_id for _, sample_id in cloud_kit.stored_keys(store))
    assert traffic.of(DEGRADED) | traffic.of(CLOUD) | {"first"} <= set(keys), "acknowledged, and lost"
    assert set(keys.values()) == {1}, "twice in the teacher store"
    assert all(explores(name, EdgeConfig().explore) for name in traffic.of(edge_pb2.InferAnswer.SOURCE_LOCAL) & set(keys))


def test_a_cloud_of_another_task_is_an_alarm_and_no_outage(tmp_path: Path) -> None:
    bundle = edge_kit.make_bundle(tmp_path / "bundle")
    labels = ["alpha", "beta", "delta", "gamma"]  # in another order
    large = cloud_kit.tiny_encoder(tmp_path / "large", labels=labels, task_id="tiny")
    (tmp_path / "task").mkdir()
    task = cloud_kit.write_task(tmp_path / "task", labels)
    task.write_text(task.read_text().replace('"toy"', '"tiny"'))
    with cloud_kit.cloud_process(task, large, tmp_path / "store") as cloud:
        command = [
            *KCM,
            "edge",
            "--bundle",
            str(bundle),
            "--listen",
            "127.0.0.1:0",
            "--state",
            str(tmp_path / "state"),
            "--cloud",
            cloud.address,
        ]
        with edge_kit.running([*command, "--metrics", "127.0.0.1:0", "--json"], tmp_path / "edge.log") as edge:
            made, channel = stub(edge.address)
            with channel:
                easy, hard = made.Infer(request(EASY[0], HARD[0]), timeout=20).answers
            assert hard.source == DEGRADED and "label" in hard.reason and easy.label == "alpha"
            assert edge.scrape()['kcm_edge_cloud_failures_total{kind="mismatch"}'] >= 1
            assert edge.scrape()["kcm_edge_spool_depth"] == 1
    alarms = [line for line in map(json.loads, edge.log.splitlines()) if line["level"] == "error"]
    assert len(alarms) == 1 and "another task or label space" in alarms[0]["message"]


def test_explored_samples_and_truths_arrive_in_the_teacher_store(tmp_path: Path) -> None:
    bundle = edge_kit.make_bundle(tmp_path / "bundle")
    large = cloud_kit.tiny_encoder(tmp_path / "large", labels=list(edge_kit.LABELS), task_id="tiny")
    store = tmp_path / "store"
    names = tuple(str(i) for i in range(40))
    with cloud_kit.cloud_process(bundle / "task.toml", large, store) as cloud:
        command = [*KCM, "edge", "--bundle", str(bundle), "--listen", "127.0.0.1:0", "--state", str(tmp_path / "state"), "--explore", "1"]
        with edge_kit.running([*command, "--cloud", cloud.address], tmp_path / "edge.log", QUICK) as edge:
            made, channel = stub(edge.address)
            with channel:
                made.Infer(request(*[EASY[0], HARD[0]] * 20, ids=names), timeout=20)
                reply = made.Feedback(edge_kit.feedback(*((name, "gamma") for name in (*names, "elsewhere"))), timeout=10)
                assert (reply.kept, reply.matched) == (41, 40)
                made.Feedback(edge_kit.feedback(("0", "delta")), timeout=10)
                until(lambda: made.Status(edge_pb2.StatusRequest(), timeout=5).explored == 20 and depth(edge.address) == 0, 20, "explored")
            assert edge.stop() == 0
        with edge_kit.running([*command, "--cloud", cloud.address, "--metrics", "127.0.0.1:0", "--json"], tmp_path / "edge.log") as edge:
            until(lambda: edge.scrape()["kcm_edge_feedback_waiting"] == 0, 20, "truths sent, by this daemon or the one before")
        assert cloud.terminate() == 0
    subprocess.run([*KCM, "store", "compact", str(store), "--json"], check=True, timeout=120, capture_output=True)
    assert Counter(sample_id for _, sample_id in cloud_kit.stored_keys(store)) == dict.fromkeys(names, 1)
    labels = cloud_kit.stored_labels(store)
    assert {name: labels[name] for name in names} == {name: 3 if name == "0" else 2 for name in names}
