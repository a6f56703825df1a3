"""The edge's link to the cloud: failures by kind, the spool behind it, TLS, and the same in process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import edge_kit
import grpc
import pytest
from edge_kit import EASY, HARD, Cloud, Process, request, running_edge, stub, until

from kcm.sample import Purpose
from protos.kcm.v1 import edge_pb2, edge_pb2_grpc

LOCAL, CLOUD, DEGRADED = edge_pb2.InferAnswer.SOURCE_LOCAL, edge_pb2.InferAnswer.SOURCE_CLOUD, edge_pb2.InferAnswer.SOURCE_DEGRADED


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edge_kit.make_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path / "c")
    with made.run():
        yield made


@pytest.fixture
def edge(tiny_bundle: Path, cloud: Cloud, tmp_path: Path) -> Iterator[Process]:
    with running_edge(tiny_bundle, tmp_path, "--cloud", cloud.address, "--metrics", "127.0.0.1:0") as process:
        yield process


@pytest.fixture
def client(edge: Process) -> Iterator[edge_pb2_grpc.EdgeStub]:
    made, channel = stub(edge.address)
    with channel:
        yield made


@pytest.mark.parametrize(
    ("mode", "reason", "kind"),
    [
        ("full", "the cloud refused: queue full", "refused"),
        ("mismatch", "the cloud refused: another label space", "mismatch"),
        ("garbage", "the cloud's reply is unusable: scores are not finite", "bad_reply"),
        ("wrong-ids", "the cloud answered 1 of 1 samples, or others than asked", "bad_reply"),
        ("broken", "the cloud refused: UNKNOWN: Unexpected", "error"),
    ],
)
def test_a_failing_cloud_degrades_and_the_sample_is_sent_later(
    tiny_bundle: Path, cloud: Cloud, tmp_path: Path, mode: str, reason: str, kind: str
) -> None:
    cloud.set(mode=mode)
    env = {"KCM_EDGE__SPOOL__DRAIN_MAX_MS": "300", "KCM_EDGE__CLOUD__BREAKER_MAX_MS": "500"}
    with running_edge(tiny_bundle, tmp_path, "--cloud", cloud.address, "--metrics", "127.0.0.1:0", "--json", **env) as edge:
        made, channel = stub(edge.address)
        with channel:
            (answer,) = made.Infer(request(HARD[0], ids=("x",)), timeout=10).answers
            assert answer.source == DEGRADED and answer.reason.startswith(reason)
            status = made.Status(edge_pb2.StatusRequest(), timeout=5)
            assert status.spool_depth == 1 and status.bundle.bundle_id == answer.model_id
            assert edge.scrape()[f'kcm_edge_cloud_failures_total{{kind="{kind}"}}'] >= 1
            cloud.set()
            until(lambda: made.Status(edge_pb2.StatusRequest(), timeout=5).spool_depth == 0, 10, "drained")
    rows = cloud.rows()
    assert set(rows) == {"x"}
    if mode not in ("garbage", "wrong-ids"):  # those had stored it already
        assert rows["x"][0] == Purpose.BACKFILL


def test_an_answer_that_the_cloud_could_not_store_is_kept_here(edge: Process, client: edge_pb2_grpc.EdgeStub, cloud: Cloud) -> None:
    cloud.set(mode="unstored")
    (answer,) = client.Infer(request(HARD[0], ids=("x",)), timeout=10).answers
    assert answer.source == CLOUD
    for _ in range(10):  # backfills that aren't stored either let go of nothing
        time.sleep(0.1)
        assert client.Status(edge_pb2.StatusRequest(), timeout=5).spool_depth == 1
    cloud.set()
    until(lambda: "x" in cloud.rows(), 10, "stored in the end")
    until(lambda: client.Status(edge_pb2.StatusRequest(), timeout=5).spool_depth == 0, 5, "and let go")


def test_one_bad_sample_is_a_dead_letter_and_takes_no_other_along(client: edge_pb2_grpc.EdgeStub, cloud: Cloud, tmp_path: Path) -> None:
    cloud.set(mode="poison")
    texts = ("good one", "poison", "good two", "good three")
    reply = client.Infer(request(*texts, ids=("a", "bad", "b", "c")), timeout=10)
    assert {a.source for a in reply.answers} == {DEGRADED}
    until(lambda: client.Status(edge_pb2.StatusRequest(), timeout=5).spool_depth == 0, 10, "all settled")
    assert set(cloud.rows()) == {"a", "b", "c"}
    (again,) = client.Infer(request("poison", ids=("bad2",)), timeout=10).answers
    assert again.source == DEGRADED and client.Status(edge_pb2.StatusRequest(), timeout=5).spool_depth == 0
    cloud.set()
    time.sleep(1.0)
    assert set(cloud.rows()) == {"a", "b", "c"}, "a dead letter is never sent again"


def test_without_a_cloud_hard_samples_are_degraded_and_not_kept(tiny_bundle: Path, tmp_path: Path) -> None:
    with running_edge(tiny_bundle, tmp_path) as edge:
        made, channel = stub(edge.address)
        with channel:
            (answer,) = made.Infer(request(HARD[0]), timeout=10).answers
            status = made.Status(edge_pb2.StatusRequest(), timeout=5)
    assert (answer.source, answer.reason) == (DEGRADED, "no cloud configured")
    assert (status.cloud, status.spool_depth) == ("off", 0)


def test_a_short_deadline_of_the_application_is_kept_and_blames_nobody(client: edge_pb2_grpc.EdgeStub, cloud: Cloud) -> None:
    cloud.set(delay_ms=400)
    for i in range(5):  # more than the breaker's three
        (answer,) = client.Infer(request(HARD[0], ids=(str(i),)), timeout=0.2).answers
        assert (answer.source, answer.reason) == (DEGRADED, "the cloud did not answer in time")
    status = client.Status(edge_pb2.StatusRequest(), timeout=5)
    assert status.cloud == "ready" and client.Infer(request(HARD[0]), timeout=5).answers[0].source == CLOUD


def test_a_caller_that_hangs_up_leaves_no_trace(client: edge_pb2_grpc.EdgeStub, cloud: Cloud) -> None:
    cloud.set(delay_ms=300)
    for i in range(20):
        call = client.Infer.future(request(HARD[0], ids=(str(i),)), timeout=10)
        time.sleep(0.01)
        call.cancel()
    cloud.set()
    assert client.Infer(request(HARD[0]), timeout=5).answers[0].source == CLOUD
    assert client.Status(edge_pb2.StatusRequest(), timeout=5).cloud == "ready"


def test_mutual_tls_on_both_sides(tiny_bundle: Path, tmp_path: Path) -> None:
    import trustme

    authority = trustme.CA()
    cloud = Cloud(tmp_path / "c")
    device = tmp_path / "device"
    device.mkdir()
    for folder in (tmp_path / "c", device):
        issued = authority.issue_cert("localhost")
        issued.private_key_pem.write_to_path(folder / "key.pem")
        issued.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
        authority.cert_pem.write_to_path(folder / "ca.pem")
    with cloud.run() as server:
        config = tmp_path / "edge.toml"
        files = "\n".join(f"{name} = '{device / name}.pem'" for name in ("certificate", "key", "ca"))
        config.write_text(f"[edge]\nlisten = 'localhost:0'\nedge_id = 'localhost'\n[edge.tls]\n{files}\n[edge.cloud.tls]\n{files}\n")
        with running_edge(tiny_bundle, tmp_path, "--config", str(config), "--cloud", server.address, "--listen", "localhost:0") as edge:
            ca, key, certificate = ((device / f"{name}.pem").read_bytes() for name in ("ca", "key", "certificate"))
            with grpc.secure_channel(edge.address, grpc.ssl_channel_credentials(ca, key, certificate)) as channel:
                (answer,) = edge_pb2_grpc.EdgeStub(channel).Infer(request(HARD[0]), timeout=10).answers
                assert answer.source == CLOUD
            with grpc.secure_channel(edge.address, grpc.ssl_channel_credentials(ca)) as channel:  # no certificate of its own
                with pytest.raises(grpc.RpcError):
                    edge_pb2_grpc.EdgeStub(channel).Infer(request(EASY[0]), timeout=3)


def test_the_spool_drains_in_small_calls_while_live_traffic_goes_on(tiny_bundle: Path, tmp_path: Path) -> None:
    cloud = Cloud(tmp_path / "c")
    env = {"KCM_EDGE__CLOUD__BREAKER_MAX_MS": "200", "KCM_EDGE__SPOOL__DRAIN_INTERVAL_MS": "20"}
    with running_edge(tiny_bundle, tmp_path, "--cloud", cloud.address, **env) as edge:
        made, channel = stub(edge.address)
        with channel:
            made.Infer(request(*[HARD[0]] * 1000, ids=tuple(f"old{i}" for i in range(1000))), timeout=10)
            with cloud.run():
                until(lambda: made.Infer(request(HARD[1]), timeout=5).answers[0].source == CLOUD, 10, "the cloud is back")
                for _ in range(60):
                    assert made.Infer(request(HARD[1]), timeout=5).answers[0].source == CLOUD
                    time.sleep(0.01)
                busy = cloud.calls()
                until(lambda: made.Status(edge_pb2.StatusRequest()).spool_depth == 0, 20, "drained")
                idle = cloud.calls()[len(busy) :]
    sizes = [samples for purpose, samples in busy if purpose == Purpose.BACKFILL]
    assert sizes and max(sizes) <= 8 and sum(sizes) < 900, "backfill beside live traffic"
    assert max(samples for _, samples in idle) == 64, "and at full size after it"
    assert {f"old{i}" for i in range(1000)} <= set(cloud.rows())


def test_a_slow_model_does_not_hold_up_the_event_loop(tiny_bundle: Path) -> None:
    from edge_runtime import EdgeRuntime
    from edge_runtime.config import EdgeConfig
    from edge_runtime.router import Router
    from edge_runtime.runtime import Decision
    from edge_runtime.stats import Stats
    from kcm.sample import Sample

    class Slow(EdgeRuntime):
        def decide(self, samples: Sequence[Sample], first: int = 0) -> list[Decision]:
            time.sleep(0.02 * len(samples))
            return super().decide(samples, first)

    fast = EdgeRuntime.load(tiny_bundle)
    slow = Slow(
        manifest=fast.manifest,
        task=fast.task,
        calibration=fast.calibration,
        precision="fp32",
        preprocessor=fast._preprocessor,
        engine=fast._engine,
    )

    async def longest_gap(runtime: EdgeRuntime) -> float:
        router = Router(EdgeConfig(bundle="b"), runtime, client=None, spool=None, stats=Stats())
        for _ in range(3):  # it has to notice
            await router.infer([Sample(payload=EASY[0])])
        work = asyncio.create_task(router.infer([Sample(payload=EASY[0])] * 16))
        gap = 0.0
        while not work.done():
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            gap = max(gap, time.perf_counter() - before)
        assert len(work.result()) == 16
        return gap

    assert asyncio.run(longest_gap(slow)) < 0.1  # the work takes 0.32 s


def test_a_router_in_process_uses_cloud_and_spool(tiny_bundle: Path, cloud: Cloud, tmp_path: Path) -> None:
    from edge_runtime import EdgeRuntime
    from edge_runtime.cloud_client import CloudClient
    from edge_runtime.config import CloudConfig, EdgeConfig
    from edge_runtime.router import Router
    from edge_runtime.spool import Spool
    from edge_runtime.stats import Stats
    from kcm.sample import Sample, Source

    async def scenario() -> None:
        config = EdgeConfig(bundle=str(tiny_bundle), cloud=CloudConfig(target=cloud.address))
        client = CloudClient(config.cloud, "in-process")
        spool = Spool(tmp_path / "spool.db", max_bytes=2**22)
        router = Router(config, EdgeRuntime.load(tiny_bundle), client=client, spool=spool, stats=Stats())
        answers = await router.infer([Sample(payload=EASY[0]), Sample(payload=HARD[0], sample_id="h")])
        assert [a.source for a in answers] == [Source.LOCAL, Source.CLOUD]
        await client.close()
        spool.close()

    asyncio.run(scenario())
    assert set(cloud.rows()) == {"h"}
