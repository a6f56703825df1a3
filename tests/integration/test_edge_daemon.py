"""The edge daemon as a real process, and a real gRPC cloud beside it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import edge_kit
import grpc
import pytest
from edge_kit import EASY, HARD, Cloud, Process, request, running_edge, stub
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from edge_runtime import EdgeRuntime
from edge_runtime.metrics import NAMES
from kcm.sample import Purpose, Route
from protos.kcm.v1 import edge_pb2, edge_pb2_grpc, sample_pb2

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


def test_easy_stays_and_hard_is_answered_by_the_cloud(client: edge_pb2_grpc.EdgeStub, cloud: Cloud) -> None:
    texts = (EASY[1], HARD[0], EASY[2], HARD[1])
    reply = client.Infer(request(*texts, ids=("a", "b", "c", "d")), timeout=10)
    assert [a.sample_id for a in reply.answers] == ["a", "b", "c", "d"]
    assert [a.source for a in reply.answers] == [LOCAL, CLOUD, LOCAL, CLOUD]
    assert [a.label for a in reply.answers] == ["beta", edge_kit.LABELS[len(HARD[0]) % 4], "gamma", edge_kit.LABELS[len(HARD[1]) % 4]]
    assert reply.answers[1].model_id == "rule" and reply.answers[1].candidates[0].label_id == reply.answers[1].label_id
    assert reply.answers[1].candidates[0].probability == pytest.approx(0.98, abs=0.01)
    assert set(cloud.rows()) == {"b", "d"}
    assert {row[0] for row in cloud.rows().values()} == {Purpose.LIVE}


def test_the_route_is_kept(client: edge_pb2_grpc.EdgeStub, cloud: Cloud) -> None:
    assert client.Infer(request(HARD[0], route=Route.LOCAL), timeout=10).answers[0].source == LOCAL
    assert cloud.rows() == {}
    assert client.Infer(request(EASY[0], ids=("x",), route=Route.CLOUD), timeout=10).answers[0].source == CLOUD
    assert set(cloud.rows()) == {"x"}


def test_tensors_are_answered_here_and_never_leave_the_device(client: edge_pb2_grpc.EdgeStub, cloud: Cloud, tiny_bundle: Path) -> None:
    preprocessor = EdgeRuntime.load(tiny_bundle)._preprocessor

    def tensors(text: str, route: int = 0) -> edge_pb2.InferSample:
        row = {name: array[0].tobytes() for name, array in preprocessor.batch([text]).items()}
        return edge_pb2.InferSample(payload=sample_pb2.Payload(tensors=sample_pb2.Tensors(inputs=row)), route=route)  # type: ignore[arg-type]

    mixed = edge_pb2.InferRequest(
        samples=[tensors(EASY[1]), tensors(HARD[0]), *request(HARD[0], EASY[1]).samples, tensors(HARD[0], Route.CLOUD)]
    )
    answers = client.Infer(mixed, timeout=10).answers
    assert [a.source for a in answers] == [LOCAL, DEGRADED, CLOUD, LOCAL, DEGRADED]
    assert answers[0].label == answers[3].label and answers[0].confidence == pytest.approx(answers[3].confidence, abs=1e-6)
    assert "tensors can't be sent" in answers[1].reason and len(cloud.calls()) == 1
    assert client.Status(edge_pb2.StatusRequest(), timeout=10).spool_depth == 0
    broken = tensors(EASY[0])
    broken.payload.tensors.inputs["input_ids"] = (-1).to_bytes(8, "little", signed=True)
    with pytest.raises(grpc.RpcError, match="sample 1: tensor") as refused:
        client.Infer(edge_pb2.InferRequest(samples=[tensors(EASY[0]), broken]), timeout=10)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_missing_ids_are_made_and_an_empty_call_is_fine(client: edge_pb2_grpc.EdgeStub) -> None:
    first, second = client.Infer(request(EASY[0], EASY[0]), timeout=10).answers
    assert first.sample_id and second.sample_id and first.sample_id != second.sample_id
    assert not client.Infer(edge_pb2.InferRequest(), timeout=10).answers


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request("a", "b", ids=("x", "x")), "sample 1 has the sample_id of sample 0: 'x'"),
        (edge_pb2.InferRequest(samples=[edge_pb2.InferSample()]), "sample 0: payload is empty: set text, image or tensors"),
        (
            edge_pb2.InferRequest(samples=[request("a").samples[0], edge_pb2.InferSample(payload={"image": b"\xff\xd8"})]),
            "sample 1: this task reads text, the payload is an image",
        ),
        (request(*["a"] * 1025), "1025 samples in one call, at most 1024"),
        (request("ok", "a" * (2**20 + 1)), r"sample 1: \d+ bytes, at most 1048576"),
        (request("a", ids=("i" * 300,)), "sample 0: sample_id has 300 characters, at most 256"),
        (request("a", route=17), "sample 0: 17 is not a valid Route"),
    ],
)
def test_input_errors_say_which_sample_and_why(client: edge_pb2_grpc.EdgeStub, bad: edge_pb2.InferRequest, message: str) -> None:
    with pytest.raises(grpc.RpcError, match=message) as caught:
        client.Infer(bad, timeout=10)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert client.Infer(request(EASY[0]), timeout=10).answers[0].source == LOCAL


def test_a_thousand_samples_go_in_several_calls_to_the_cloud(client: edge_pb2_grpc.EdgeStub, cloud: Cloud) -> None:
    texts = [f"{HARD[i % 3]} {'x' * (i % 7)}" for i in range(1000)]
    reply = client.Infer(request(*texts, ids=tuple(map(str, range(1000)))), timeout=20)
    assert [a.sample_id for a in reply.answers] == list(map(str, range(1000)))
    assert {a.source for a in reply.answers} == {CLOUD}
    assert [a.label_id for a in reply.answers] == [len(text) % 4 for text in texts]
    assert {row[1] for row in cloud.rows().values()} == {1}


def test_a_stream_answers_in_order_while_requests_overlap(client: edge_pb2_grpc.EdgeStub, cloud: Cloud) -> None:
    cloud.set(delay_ms=100)
    texts = [EASY[i % 4] if i % 2 else HARD[i % 3] for i in range(40)]
    began = time.monotonic()
    replies = list(client.InferStream((request(text, ids=(str(i),)) for i, text in enumerate(texts)), timeout=30))
    assert [reply.answers[0].sample_id for reply in replies] == list(map(str, range(40)))
    assert [reply.answers[0].source for reply in replies] == [LOCAL if i % 2 else CLOUD for i in range(40)]
    assert time.monotonic() - began < 1.5, "20 calls of 100 ms one after the other"


def test_a_bad_request_ends_its_stream_after_what_came_before(client: edge_pb2_grpc.EdgeStub) -> None:
    replies = client.InferStream(iter([request(EASY[0]), edge_pb2.InferRequest(samples=[edge_pb2.InferSample()])]), timeout=10)
    assert next(replies).answers[0].source == LOCAL
    with pytest.raises(grpc.RpcError, match=r"request 1: sample 0: .*payload is empty") as caught:
        next(replies)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_request_that_is_read_and_cannot_be_answered_is_named_by_its_place_too(client: edge_pb2_grpc.EdgeStub) -> None:
    """Tensors of another graph: seen only when the batch is made."""
    bad = request(EASY[0])
    bad.samples.add(payload=sample_pb2.Payload(tensors=sample_pb2.Tensors(inputs={"x": b"1234"})))
    replies = client.InferStream(iter([request(EASY[0]), request(EASY[1]), bad, request(EASY[2])]), timeout=10)
    assert [next(replies).answers[0].source for _ in range(2)] == [LOCAL, LOCAL]
    with pytest.raises(grpc.RpcError, match="request 2: sample 1: tensors x given") as caught:
        next(replies)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as alone:
        client.Infer(bad, timeout=10)
    assert alone.value.details().startswith("sample 1: tensors x given"), "outside of a stream there is but one request"


def test_status_health_and_reflection(client: edge_pb2_grpc.EdgeStub, edge: Process, tiny_bundle: Path) -> None:
    client.Infer(request(EASY[0], HARD[0]), timeout=10)
    status = client.Status(edge_pb2.StatusRequest(), timeout=10)
    assert status.bundle.engine == "CPUExecutionProvider" and status.bundle.task_id == "tiny"
    assert (status.answered_local, status.answered_cloud, status.answered_degraded) == (1, 1, 0)
    assert (status.cloud, status.spool_depth, status.last_refusal, status.epsilon) == ("ready", 0, "", edge_kit.EPSILON)
    with grpc.insecure_channel(edge.address) as channel:
        for service in ("", "kcm.v1.Edge"):
            check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert check.status == health_pb2.HealthCheckResponse.SERVING
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        (listed,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]), timeout=5)
        assert "kcm.v1.Edge" in {service.name for service in listed.list_services_response.service}


def test_metrics_have_the_names_that_dashboards_use(tiny_bundle: Path, cloud: Cloud, tmp_path: Path) -> None:
    with running_edge(tiny_bundle, tmp_path, "--cloud", cloud.address, "--metrics", "127.0.0.1:0", "--json") as edge:
        made, channel = stub(edge.address)
        with channel:
            made.Infer(request(EASY[0], EASY[1], HARD[0]), timeout=10)
            text = urllib.request.urlopen(f"http://{edge.metrics}/metrics", timeout=5).read().decode()
            values = edge.scrape()
    found = {line.split()[2].removesuffix("_total") for line in text.splitlines() if line.startswith("# TYPE")}
    assert found == set(NAMES)
    assert values['kcm_edge_answers_total{source="local"}'] == 2 and values['kcm_edge_answers_total{source="cloud"}'] == 1
    assert values['kcm_edge_latency_seconds_count{source="local"}'] == 2
    assert values["kcm_edge_escalations_total"] == 1 and values["kcm_edge_cloud_up"] == 1


def test_it_serves_on_a_unix_socket(tiny_bundle: Path, tmp_path: Path) -> None:
    with running_edge(tiny_bundle, tmp_path, "--listen", f"unix:{tmp_path}/e.sock") as edge:
        made, channel = stub(edge.address)
        with channel:
            assert made.Infer(request(EASY[0]), timeout=10).answers[0].source == LOCAL


def test_sigterm_tells_callers_to_send_again(tiny_bundle: Path, tmp_path: Path) -> None:
    ended: list[tuple[grpc.StatusCode, str]] = []

    def call_until_refused(address: str) -> None:
        client, channel = stub(address)
        with channel:
            while True:
                try:
                    client.Infer(request(EASY[0]), timeout=5)
                except grpc.RpcError as error:
                    ended.append((error.code(), error.details()))
                    return

    with running_edge(tiny_bundle, tmp_path) as process:
        threads = [threading.Thread(target=call_until_refused, args=(process.address,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(10) == 0
        for thread in threads:
            thread.join(10)
    # One that comes between two connections may find nobody; none may be cancelled without a word.
    assert len(ended) == 6 and {code for code, _ in ended} == {grpc.StatusCode.UNAVAILABLE}
    assert any("shutting down: send what was not answered again" in details for _, details in ended)


def test_sigterm_answers_what_is_in_flight_and_ends_streams(tiny_bundle: Path, cloud: Cloud, tmp_path: Path) -> None:
    cloud.set(delay_ms=600)
    with running_edge(tiny_bundle, tmp_path, "--cloud", cloud.address, "--deadline-ms", "3000") as edge:
        made, channel = stub(edge.address)
        with channel:
            pending = [made.Infer.future(request(HARD[i % 3], ids=(str(i),)), timeout=10) for i in range(20)]

            def endless() -> Iterator[edge_pb2.InferRequest]:
                yield request(HARD[0], ids=("stream",))
                time.sleep(20)

            stream = made.InferStream(endless(), timeout=20)
            time.sleep(0.3)
            began = time.monotonic()
            edge.signal(signal.SIGTERM)
            assert [call.result().answers[0].source for call in pending] == [CLOUD] * 20
            assert next(stream).answers[0].source == CLOUD
            with pytest.raises(grpc.RpcError, match="shutting down") as caught:
                next(stream)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert edge.popen.wait(10) == 0
            assert time.monotonic() - began < 5
    assert len(cloud.rows()) == 21
    assert all(json.loads(line)["level"] for line in edge.log.splitlines()), "every line of the log is JSON"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--bundle", "nowhere"], 5, "is not a bundle"),
        (["--listen", "0.0.0.0:0"], 3, "without TLS"),
        ([], 3, "needs one of store and bundle"),
    ],
)
def test_a_daemon_that_cannot_start_says_why(tiny_bundle: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    if "--listen" in arguments:
        arguments = [*arguments, "--bundle", str(tiny_bundle)]
    program = (
        "import sys, typer\nfrom edge_runtime.cli import edge\nfrom kcm.errors import KcmError\n"
        "try:\n typer.run(edge)\nexcept KcmError as e:\n print(e, file=sys.stderr); sys.exit(e.exit_code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--state", str(tmp_path / "s"), *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=tmp_path,
    )
    assert done.returncode == code and message in done.stderr and "Traceback" not in done.stderr


def test_two_daemons_never_share_a_state_folder_or_a_port(edge: Process, tiny_bundle: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["--state", str(tmp_path / "state"), "--listen", "127.0.0.1:0"], "another kcm edge uses"),
        (["--state", str(tmp_path / "other"), "--listen", edge.address], "can't listen on"),
    ):
        command = edge_kit.edge_command("--bundle", str(tiny_bundle), *arguments)
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert done.returncode != 0 and message in done.stderr


def test_the_edge_keeps_its_name_over_restarts(tiny_bundle: Path, cloud: Cloud, tmp_path: Path) -> None:
    for turn in ("a", "b"):
        with running_edge(tiny_bundle, tmp_path, "--cloud", cloud.address) as edge:
            made, channel = stub(edge.address)
            with channel:
                made.Infer(request(HARD[0], ids=(turn,)), timeout=10)
            assert edge.stop() == 0
    import sqlite3

    with sqlite3.connect(cloud.database) as connection:
        assert connection.execute("SELECT count(DISTINCT edge_id), count(*) FROM inbox").fetchone() == (1, 2)
