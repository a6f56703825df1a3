"""Who an edge is to a cloud with mTLS, what both say where that is wrong, and that what the edge takes the cloud takes too."""

from __future__ import annotations

import json
from pathlib import Path

import cloud_kit
import edge_kit
import grpc
import pytest
import tls_kit
import trustme
from edge_kit import HARD, request, running_edge, stub, until

from protos.kcm.v1 import cloud_pb2, cloud_pb2_grpc, edge_pb2

CLOUD, DEGRADED = edge_pb2.InferAnswer.SOURCE_CLOUD, edge_pb2.InferAnswer.SOURCE_DEGRADED
# Answers at once, however long the text.
CONSTANT = "import numpy\ncloud_kit.RuleModel.row = staticmethod(lambda text, hint=None: numpy.arange(4, dtype='f4'))\n"


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edge_kit.make_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


def cloud_of(bundle: Path, folder: Path, *flags: str, **environ: str) -> cloud_kit.CloudProcess:
    large = cloud_kit.write_large(folder / "large", "encoder", "weights", labels=list(edge_kit.LABELS), task_id="tiny")
    code = cloud_kit.by_rule() + CONSTANT
    return cloud_kit.CloudProcess(bundle / "task.toml", large, folder / "store", *flags, code=code, environ=environ)


def test_a_certificate_that_names_another_edge_is_said_on_both_sides(tiny_bundle: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    config = tmp_path / "kcm.toml"
    mine = tls_kit.issue(authority, tmp_path / "edge", "edge-1")
    server = tls_kit.issue(authority, tmp_path / "server", "127.0.0.1")
    config.write_text(tls_kit.table("cloud.tls", server) + tls_kit.table("edge.cloud.tls", mine))
    cloud = cloud_of(tiny_bundle, tmp_path, "--config", str(config))
    try:
        flags = ("--config", str(config), "--cloud", cloud.address, "--metrics", "127.0.0.1:0", "--json")
        with running_edge(tiny_bundle, tmp_path, *flags, "--edge-id", "edge-2", KCM_EDGE__CLOUD__BREAKER_BASE_MS="60000") as edge:
            made, channel = stub(edge.address)
            with channel:
                reasons = [made.Infer(request(HARD[0], ids=(str(i),)), timeout=10).answers[0].reason for i in range(6)]
                status = made.Status(edge_pb2.StatusRequest(), timeout=5)
            values = edge.scrape()
        assert status.cloud == "unreachable", "the breaker is open"
        for reason in reasons:
            assert "does not let this edge in: the certificate names 'edge-1', the call comes as edge 'edge-2'" in reason
        assert values['kcm_edge_cloud_failures_total{kind="denied"}'] >= 1 and values['kcm_edge_cloud_failures_total{kind="error"}'] == 0
        assert values["kcm_edge_spool_depth"] == 6 and values["kcm_edge_spool_dead"] == 0
        lines = [json.loads(line) for line in edge.log.splitlines()]
        (alarm,) = [line["message"] for line in lines if line["level"] == "error"]
        assert "edge_id 'edge-2' must be a DNS name (SAN) of this edge's certificate" in alarm and mine.certificate in alarm
        assert any("does not let this edge in: answers are degraded" in line["message"] for line in lines)
        refusals = [line["message"] for line in map(json.loads, cloud.log.read_text().splitlines()) if line["level"] == "error"]
        assert refusals == ["refused: the certificate names 'edge-1', the call comes as edge 'edge-2'"]
        assert HARD[0] not in cloud.log.read_text()
        # Under its own name the same certificate is let in, and what waited goes out.
        with running_edge(tiny_bundle, tmp_path, *flags, "--edge-id", "edge-1") as edge:
            made, channel = stub(edge.address)
            with channel:
                assert made.Infer(request(HARD[0]), timeout=10).answers[0].source == CLOUD
                until(lambda: made.Status(edge_pb2.StatusRequest(), timeout=5).spool_depth == 0, 10, "drained")
    finally:
        cloud.end()


@pytest.mark.slow
@pytest.mark.parametrize("verbosity", ["", "INFO"])
def test_grpc_writes_no_lines_between_ours_unless_asked(tiny_bundle: Path, tmp_path: Path, verbosity: str) -> None:
    """A handshake without a certificate makes gRPC's core complain; both daemons' logs stay JSON."""
    authority = trustme.CA()
    config = tmp_path / "kcm.toml"
    server, stranger = tls_kit.issue(authority, tmp_path / "server", "localhost"), tls_kit.issue(trustme.CA(), tmp_path / "other", "x")
    config.write_text(tls_kit.table("cloud.tls", server) + tls_kit.table("edge.tls", server))
    environ = {"GRPC_VERBOSITY": verbosity} if verbosity else {}
    # A real model: the rule's stand-in imports gRPC before the verb can set anything.
    large = cloud_kit.tiny_encoder(tmp_path / "large", labels=list(edge_kit.LABELS), task_id="tiny")
    flags = ("--config", str(config), "--listen", "localhost:0")
    cloud = cloud_kit.CloudProcess(tiny_bundle / "task.toml", large, tmp_path / "store", *flags, environ=environ)
    try:
        with running_edge(tiny_bundle, tmp_path, *flags, **environ) as edge:
            certificate, key, _ = stranger.read()
            credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes(), key, certificate)
            for address in (edge.address, cloud.address):
                with grpc.secure_channel(address, credentials) as channel, pytest.raises(grpc.RpcError):
                    cloud_pb2_grpc.CloudStub(channel).Describe(cloud_pb2.DescribeRequest(), timeout=3)
            logs = [edge.log, cloud.log.read_text()]
    finally:
        cloud.end()
    for log in logs:
        foreign = [line for line in log.splitlines() if not line.startswith("{")]
        assert bool(foreign) == bool(verbosity), foreign


def test_what_the_edge_takes_the_cloud_takes(tiny_bundle: Path, tmp_path: Path) -> None:
    """Sixteen samples of just under 1 MiB: one Infer call just carries them; with hints and scores no one Predict call could."""
    cloud = cloud_of(tiny_bundle, tmp_path)
    texts = [f"{i:02}" + "x" * (2**20 - 62) for i in range(16)]
    try:
        flags = ("--cloud", cloud.address, "--deadline-ms", "20000", "--metrics", "127.0.0.1:0", "--json")
        with running_edge(tiny_bundle, tmp_path, *flags) as edge:
            made, channel = stub(edge.address)
            with channel:
                reply = made.Infer(request(*texts, ids=tuple(map(str, range(16)))), timeout=30)
            assert [(a.source, a.reason) for a in reply.answers] == [(CLOUD, "")] * 16
            assert edge.scrape()["kcm_edge_spool_dead"] == 0
        # The same on the second way: spooled while the cloud is away, then drained.
        cloud.kill()
        with running_edge(tiny_bundle, tmp_path, *flags, KCM_EDGE__CLOUD__BREAKER_MAX_MS="300") as edge:
            made, channel = stub(edge.address)
            with channel:
                late = made.Infer(request(*texts, ids=tuple(f"late{i}" for i in range(16))), timeout=30)
                assert {a.source for a in late.answers} == {DEGRADED}
                again = cloud_of(tiny_bundle, tmp_path, "--listen", cloud.address)
                try:
                    until(lambda: made.Status(edge_pb2.StatusRequest(), timeout=5).spool_depth == 0, 20, "drained")
                    assert edge.scrape()["kcm_edge_spool_dead"] == 0
                finally:
                    again.end()
    finally:
        cloud.end()
