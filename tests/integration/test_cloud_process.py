"""Real `kcm cloud` processes with real models over loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cloud_kit
import grpc
import numpy as np
import pytest
import trustme
from cloud_kit import HINT, SPACE, labels_request, request, sample
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cloud_server.compact import compact, read_stats
from cloud_server.hint_effect import hint_effects
from cloud_server.models import load_large
from kcm.sample import scores_from_proto
from protos.kcm.v1 import cloud_pb2, cloud_pb2_grpc, sample_pb2


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("cloud")
    return cloud_kit.write_task(folder / "task"), cloud_kit.tiny_encoder(folder / "large", hint_dropout=0.3)


@pytest.mark.slow
def test_a_process_serves_stores_and_ends(parts: tuple[Path, Path], tmp_path: Path) -> None:
    task, large = parts
    model = load_large(large)
    with cloud_kit.cloud_process(task, large, tmp_path / "store", "--metrics", "127.0.0.1:0") as server:
        with cloud_kit.stub(server.address) as cloud:
            assert cloud.Describe(cloud_pb2.DescribeRequest(), timeout=5).teacher_id == "encoder-f00d"
            sent = [sample(f"s{i}", text, hint=HINT if i % 2 else None, p_hint=0.5) for i, text in enumerate(cloud_kit.TEXTS)]
            assert cloud.Label(labels_request(s4=2), timeout=5).stored == 1
            reply = cloud.Predict(request(*sent), timeout=10)
            assert cloud.Label(labels_request(s0=3, s1=0), timeout=5).stored == 2
        expected = model.logits(cloud_kit.TEXTS, [HINT if i % 2 else None for i in range(5)])
        for row, prediction in zip(expected, reply.predictions, strict=True):
            np.testing.assert_allclose(scores_from_proto(prediction.scores, SPACE, 4), row, atol=1e-5)
            assert prediction.stored
        with grpc.insecure_channel(server.address) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            ask = reflection_pb2.ServerReflectionRequest(list_services="")
            (listed,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]), timeout=5)
            assert "kcm.v1.Cloud" in {service.name for service in listed.list_services_response.service}
        assert "kcm_cloud_samples_total" in urllib.request.urlopen(f"http://{server.metrics}/metrics").read().decode()
        cloud_kit.wait_until(lambda: read_stats(tmp_path / "store").inboxes[0].unfilled == 0)
        assert server.terminate() == 0
        lines = [json.loads(line) for line in server.log.read_text().splitlines()]
        assert [line["message"] for line in lines if line["logger"] == "cloud_server.server"] == ["warm", "serving", "draining", "stopped"]
        assert not any(text in server.log.read_text() for text in cloud_kit.TEXTS), "no payload in a log"
    assert compact(tmp_path / "store").written == 5
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "store" / "parquet").sort_by("sample_id").to_pydict()
    teacher = model.logits(cloud_kit.TEXTS, [None] * 5)
    np.testing.assert_allclose(np.array(table["teacher_logits"], np.float32), teacher, rtol=2e-3, atol=2e-3)
    assert table["label"] == [3, 0, None, None, 2] and table["p_hint"] == [0.5] * 5
    (found,) = hint_effects(tmp_path / "store")
    changed = int((np.array(table["answer_logits"]).argmax(1) != teacher.argmax(1)).sum())
    assert (found.teacher_id, found.labelled, found.randomised.shown, found.randomised.withheld) == ("encoder-f00d", 3, 2, 3)
    assert (found.pairs[0].samples, round(found.pairs[0].changed.share * 2)) == (2, changed)


def test_a_taken_address_ends_with_exit_code_8(tmp_path: Path) -> None:
    task, large = cloud_kit.write_task(tmp_path / "task"), cloud_kit.write_large(tmp_path / "large", "encoder", "weights")
    with cloud_kit.cloud_process(task, large, tmp_path / "store", code=cloud_kit.by_rule()) as server:
        code = cloud_kit.by_rule() + "from kcm.app.cli import main; main()"
        flags = ["--task", str(task), "--large", str(large), "--store", str(tmp_path / "other"), "--listen", server.address, "--json"]
        done = subprocess.run([sys.executable, "-c", code, "cloud", *flags], capture_output=True, text=True, timeout=60)
    assert done.returncode == 8 and json.loads(done.stdout)["fix"] == "choose another --listen"


def test_two_processes_never_share_an_inbox(tmp_path: Path) -> None:
    task, large = cloud_kit.write_task(tmp_path / "task"), cloud_kit.write_large(tmp_path / "large", "encoder", "weights")
    with cloud_kit.cloud_process(task, large, tmp_path / "store", code=cloud_kit.by_rule()):
        code = cloud_kit.by_rule() + "from kcm.app.cli import main; main()"
        flags = ["--task", str(task), "--large", str(large), "--store", str(tmp_path / "store"), "--listen", "127.0.0.1:0", "--json"]
        done = subprocess.run([sys.executable, "-c", code, "cloud", *flags], capture_output=True, text=True, timeout=60)
        assert done.returncode == 9 and json.loads(done.stdout)["fix"].startswith("--replica NAME")
        with cloud_kit.cloud_process(task, large, tmp_path / "store", "--replica", "b", code=cloud_kit.by_rule()):
            assert {inbox.name for inbox in read_stats(tmp_path / "store").inboxes} == {"inbox-0", "inbox-b"}


@pytest.mark.slow
def test_mutual_tls_ties_the_edge_id_to_the_certificate(parts: tuple[Path, Path], tmp_path: Path) -> None:
    ca, rogue = trustme.CA(), trustme.CA()
    for name, issued in (("server", ca.issue_cert("localhost", "127.0.0.1")), ("edge", ca.issue_cert("edge-1"))):
        issued.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        issued.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    config = tmp_path / "kcm.toml"
    config.write_text(f'[cloud.tls]\ncertificate = "{tmp_path}/server.pem"\nkey = "{tmp_path}/server.key"\nca = "{tmp_path}/ca.pem"\n')
    with cloud_kit.cloud_process(*parts, tmp_path / "store", "--config", str(config)) as server:
        address = server.address.replace("127.0.0.1", "localhost")
        root = (tmp_path / "ca.pem").read_bytes()

        def call(key: bytes | None, chain: bytes | None, edge_id: str) -> cloud_pb2.PredictReply:
            with grpc.secure_channel(address, grpc.ssl_channel_credentials(root, key, chain)) as channel:
                return cloud_pb2_grpc.CloudStub(channel).Predict(request(sample("s1"), edge_id=edge_id), timeout=5)

        key, chain = (tmp_path / "edge.key").read_bytes(), (tmp_path / "edge.pem").read_bytes()
        assert call(key, chain, "edge-1").predictions[0].stored
        with pytest.raises(grpc.RpcError) as caught:
            call(key, chain, "edge-2")
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with grpc.secure_channel(address, grpc.ssl_channel_credentials(root, key, chain)) as channel:
            cloud = cloud_pb2_grpc.CloudStub(channel)
            assert cloud.Label(labels_request(s1=1), timeout=5).stored == 1
            with pytest.raises(grpc.RpcError) as caught:
                cloud.Label(labels_request("edge-2", s1=2), timeout=5)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED, "an edge speaks for its own samples alone"
        other = rogue.issue_cert("edge-1")
        for bad_key, bad_chain in ((None, None), (other.private_key_pem.bytes(), other.cert_chain_pems[0].bytes())):
            with pytest.raises(grpc.RpcError) as caught:
                call(bad_key, bad_chain, "edge-1")
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(grpc.RpcError), cloud_kit.stub(server.address) as plain:
            plain.Predict(request(sample("s1")), timeout=3)


@pytest.mark.slow
def test_compaction_beside_a_serving_process_disturbs_no_commit(tmp_path: Path) -> None:
    """Six callers at once, so that the inbox's transactions read for one and write for another while compaction writes."""
    store, end = tmp_path / "store", time.monotonic() + 5
    task, large = cloud_kit.write_task(tmp_path / "task"), cloud_kit.write_large(tmp_path / "large", "encoder", "weights")

    def traffic(address: str, edge_id: str) -> list[tuple[str, str, bool]]:
        answered = []
        with cloud_kit.stub(address) as cloud:
            while time.monotonic() < end:
                reply = cloud.Predict(request(*(sample(f"s{len(answered) + i}") for i in range(4)), edge_id=edge_id), timeout=10)
                answered += [(edge_id, prediction.sample_id, prediction.stored) for prediction in reply.predictions]
        return answered

    with cloud_kit.cloud_process(task, large, store, code=cloud_kit.by_rule()) as server, ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(traffic, server.address, f"edge-{edge}") for edge in range(6)]
        compactions = 0
        while time.monotonic() < end:
            compact(store)
            compactions += 1
        answered = [answer for call in calls for answer in call.result()]
    assert len(answered) >= 400 and compactions >= 5, "too little traffic to mean anything"
    assert all(stored for _, _, stored in answered)
    compact(store)
    assert sorted(cloud_kit.stored_keys(store)) == sorted((edge_id, sample_id) for edge_id, sample_id, _ in answered)


@pytest.mark.slow
def test_minilm_answers_through_the_process(tmp_path: Path) -> None:
    cloud_kit.real_model("minilm")
    from cloud_server.models.encoder import Encoder
    from kcm.assets import model_path

    large = cloud_kit.write_large(tmp_path / "large", "encoder", "minilm", dimension=384)
    with cloud_kit.cloud_process(cloud_kit.write_task(tmp_path / "task"), large, tmp_path / "store") as server:
        with cloud_kit.stub(server.address) as cloud:
            reply = cloud.Predict(request(*(sample(f"s{i}", text) for i, text in enumerate(cloud_kit.TEXTS))), timeout=30)
    import safetensors.numpy

    head = safetensors.numpy.load_file(str(large / "head.safetensors"))
    expected = Encoder(model_path("minilm"), 64).embed(cloud_kit.TEXTS) @ head["weight"].T + head["bias"]
    got = [scores_from_proto(prediction.scores, SPACE, 4) for prediction in reply.predictions]
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.slow
def test_smollm2_answers_through_the_process(tmp_path: Path) -> None:
    cloud_kit.real_model("smollm2")
    large = cloud_kit.write_large(tmp_path / "large", "causal", "smollm2")
    with cloud_kit.cloud_process(cloud_kit.write_task(tmp_path / "task"), large, tmp_path / "store") as server:
        with cloud_kit.stub(server.address) as cloud:
            reply = cloud.Predict(
                request(sample("s1", "The price of oil rose to 20 dollars a barrel."), sample("s2", hint=HINT)), timeout=60
            )
    assert reply.predictions[0].label == "crude oil" and reply.predictions[0].scores.kind == sample_pb2.Scores.PMI
    assert [prediction.hint_arm for prediction in reply.predictions] == [sample_pb2.HINT_NONE, sample_pb2.HINT_CANDIDATES]
