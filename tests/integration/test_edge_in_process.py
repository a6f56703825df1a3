"""An edge inside an application: futures, a real cloud process, threads."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path

import edge_kit
import pytest
from edge_kit import EASY, HARD, Cloud

from edge_runtime import Edge
from edge_runtime.config import CloudConfig, EdgeConfig
from edge_runtime.runtime import InvalidSample
from kcm.errors import BundleError, StoreError, UnavailableError
from kcm.sample import Answer, Route, Sample, Source


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edge_kit.make_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path / "c")
    with made.run():
        yield made


def config(bundle: Path, folder: Path, cloud: Cloud | None = None, deadline_ms: int = 2000) -> EdgeConfig:
    target = CloudConfig(target=cloud.address if cloud else "", deadline_ms=deadline_ms)
    return EdgeConfig(bundle=str(bundle), state_dir=str(folder / "s"), cloud=target, explore=0.0)


def test_what_stays_is_done_at_once_and_the_cloud_fills_in_the_rest(tiny_bundle: Path, cloud: Cloud, tmp_path: Path) -> None:
    cloud.set(delay_ms=200)
    with Edge(config(tiny_bundle, tmp_path, cloud)) as edge:
        easy, hard = edge.submit([Sample(payload=EASY[1]), Sample(payload=HARD[0], sample_id="h")])
        assert easy.done() and easy.result().source is Source.LOCAL
        assert not hard.done() and hard.result(timeout=5).source is Source.CLOUD
        assert edge.infer([Sample(payload=EASY[1])])[0].label == easy.result().label
        edge.feedback([("h", edge_kit.LABELS[0])])
    assert set(cloud.rows()) == {"h"}


def test_a_dead_cloud_degrades_and_nothing_is_lost_over_a_restart(tiny_bundle: Path, cloud: Cloud, tmp_path: Path) -> None:
    cloud.set(mode="broken")
    with Edge(config(tiny_bundle, tmp_path, cloud, deadline_ms=300)) as edge:
        answer = edge.infer([Sample(payload=HARD[0], sample_id="h")])[0]
        assert answer.source is Source.DEGRADED and answer.reason
    cloud.set()
    with Edge(config(tiny_bundle, tmp_path, cloud)):
        edge_kit.until(lambda: "h" in cloud.rows(), what="the spool to drain")


def test_many_threads_get_their_own_answers(tiny_bundle: Path, cloud: Cloud, tmp_path: Path) -> None:
    texts = [*EASY, *HARD]
    wrong: list[str] = []
    with Edge(config(tiny_bundle, tmp_path, cloud)) as edge:
        want = {text: edge.infer([Sample(payload=text, route=Route.LOCAL)])[0].label for text in texts}

        def work(k: int) -> None:
            for i in range(60):
                text = texts[(i + k) % len(texts)]
                local, other = edge.submit([Sample(payload=text, route=Route.LOCAL, sample_id=f"{k}-{i}"), Sample(payload=text)])
                if local.result().label != want[text] or local.result().sample_id != f"{k}-{i}":
                    wrong.append(text)
                other.result(timeout=10)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        edge_kit.until(lambda: edge._parts.stats.answers[Source.LOCAL] >= 4 * 60 + len(texts), what="the counts")
    assert not wrong


def test_closing_answers_what_is_in_flight_and_then_refuses(tiny_bundle: Path, cloud: Cloud, tmp_path: Path) -> None:
    cloud.set(delay_ms=300)
    edge = Edge(config(tiny_bundle, tmp_path, cloud))
    futures = edge.submit([Sample(payload=HARD[0]), Sample(payload=HARD[1])])
    edge.close()
    assert not wait(futures, timeout=0).not_done and {future.result().source for future in futures} == {Source.CLOUD}
    edge.close()
    with pytest.raises(UnavailableError, match="the edge is closed"):
        edge.submit([Sample(payload="x")])


def test_a_caller_that_gives_up_harms_nobody(tiny_bundle: Path, cloud: Cloud, tmp_path: Path) -> None:
    cloud.set(delay_ms=200)
    with Edge(config(tiny_bundle, tmp_path, cloud)) as edge:
        first, second = edge.submit([Sample(payload=HARD[0]), Sample(payload=HARD[1])])
        assert first.cancel() and second.result(timeout=5).source is Source.CLOUD


def test_errors_come_from_the_call_that_makes_them(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        Edge(config(tmp_path / "none", tmp_path))
    with Edge(config(tiny_bundle, tmp_path)) as edge:
        with pytest.raises(InvalidSample, match="sample 1"):
            edge.submit([Sample(payload="x"), Sample(payload=b"an image")])
        with pytest.raises(StoreError, match="another kcm edge uses"):
            Edge(config(tiny_bundle, tmp_path))
        assert edge.infer([Sample(payload=HARD[0])])[0].source is Source.DEGRADED


def test_estimates_hear_of_what_stayed_without_waking_the_loop_each_time(tiny_bundle: Path, tmp_path: Path) -> None:
    with Edge(config(tiny_bundle, tmp_path)) as edge:
        for _ in range(50):
            edge.submit([Sample(payload=EASY[0])])
        time.sleep(0.1)
        assert edge._parts.stats.answers[Source.LOCAL] == 50 and edge._parts.router.drift._decided == 50


def test_whoever_submits_while_it_closes_is_answered_or_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    for round_ in range(5):
        edge = Edge(config(tiny_bundle, tmp_path / str(round_)))
        taken: list[Future[Answer]] = []

        def work(edge: Edge = edge, taken: list[Future[Answer]] = taken) -> None:
            with contextlib.suppress(UnavailableError):
                while True:
                    taken.extend(edge.submit([Sample(payload=HARD[0])]))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        edge.close()
        for thread in threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in threads)
        assert taken and not wait(taken, timeout=1).not_done
