"""The edge or the cloud dies while truths come in: what Feedback acknowledged reaches the cloud."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import edge_kit
import grpc
import pytest
from edge_kit import LABELS, Cloud, feedback, request, stub, until

pytestmark = [pytest.mark.fault, pytest.mark.slow]
QUICK = {
    "KCM_EDGE__SPOOL__DRAIN_MAX_MS": "300",
    "KCM_EDGE__SPOOL__DRAIN_INTERVAL_MS": "20",
    "KCM_EDGE__CLOUD__BREAKER_MAX_MS": "300",
    "KCM_EDGE__CLOUD__BREAKER_BASE_MS": "100",
}


def command(bundle: Path, folder: Path, target: str) -> list[str]:
    return edge_kit.edge_command(
        *("--bundle", str(bundle), "--listen", "127.0.0.1:0", "--state", str(folder / "state"), "--cloud", target),
        *("--metrics", "127.0.0.1:0", "--json"),
    )


def truths(turn: int, client: int, call: int) -> list[tuple[str, str]]:
    return [(f"{turn}-{client}-{call}-{i}", LABELS[(turn + client + call + i) % 4]) for i in range(3)]


@pytest.mark.parametrize("up", [False, True])
def test_kill_9_of_the_edge_loses_no_truth_that_it_acknowledged(tmp_path: Path, up: bool) -> None:
    bundle = edge_kit.make_bundle(tmp_path / "bundle")
    cloud = Cloud(tmp_path / "c")
    acknowledged: dict[str, str] = {}

    def send(address: str, turn: int, client: int, into: dict[str, str]) -> None:
        made, channel = stub(address)
        with channel, contextlib.suppress(grpc.RpcError):
            for call in range(10**6):
                rows = truths(turn, client, call)
                assert made.Feedback(feedback(*rows), timeout=5).kept == 3
                into.update(rows)

    with cloud.run() if up else contextlib.nullcontext():  # with it: killed while it drains, too
        for turn in range(4):
            with edge_kit.running(command(bundle, tmp_path, cloud.address), tmp_path / "edge.log", QUICK) as edge:
                into: list[dict[str, str]] = [{} for _ in range(4)]
                threads = [threading.Thread(target=send, args=(edge.address, turn, k, into[k])) for k in range(4)]
                for thread in threads:
                    thread.start()
                until(lambda found=into: min(map(len, found)) > 60, 20, "traffic")  # type: ignore[misc]
                edge.kill()
                for thread in threads:
                    thread.join()
                for found in into:
                    acknowledged |= found
    assert len(acknowledged) > 900
    with cloud.run(), edge_kit.running(command(bundle, tmp_path, cloud.address), tmp_path / "edge.log", QUICK) as edge:
        until(lambda: edge.scrape()["kcm_edge_feedback_waiting"] == 0, 30, "drained")
    got = cloud.truths()
    assert {name: LABELS.index(label) for name, label in acknowledged.items()}.items() <= got.items()


def test_a_cloud_that_dies_and_comes_back_gets_every_truth(tmp_path: Path) -> None:
    bundle = edge_kit.make_bundle(tmp_path / "bundle")
    cloud = Cloud(tmp_path / "c")
    sent: dict[str, str] = {}
    with edge_kit.running(command(bundle, tmp_path, cloud.address), tmp_path / "edge.log", QUICK) as edge:
        made, channel = stub(edge.address)
        with channel:
            for turn in range(3):
                with cloud.run() as process:
                    for call in range(60):
                        rows = truths(turn, 0, call)
                        made.Feedback(feedback(*rows), timeout=5)
                        sent.update(rows)
                        if call == 30:
                            process.kill()
                        assert made.Infer(request(edge_kit.EASY[0]), timeout=5).answers[0].label == "alpha"
            cloud.set(mode="full")
            with cloud.run():
                until(lambda: edge.scrape()['kcm_edge_cloud_failures_total{kind="refused"}'] > 0, 10, "refused for now")
                cloud.set()
                until(lambda: edge.scrape()["kcm_edge_feedback_waiting"] == 0, 30, "drained")
        assert edge.scrape()['kcm_edge_feedback_dropped_total{why="refused"}'] == 0
    assert cloud.truths() == {name: LABELS.index(label) for name, label in sent.items()}
