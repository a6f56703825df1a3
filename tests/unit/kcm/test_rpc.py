"""Where servers may listen, what they say of their health, and that plain text never leaves the machine."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import msgspec
import prometheus_client
import pytest
import tls_kit
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kcm.errors import ConfigError, UnavailableError
from kcm.rpc import TlsConfig, channel, is_local, metrics_endpoint, require_tls_beyond_loopback, split_host_port, start_server

PLAIN = TlsConfig()
SERVICE = "kcm.v1.Edge"
Check = Callable[[str], Coroutine[Any, Any, int]]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:50051", "localhost:0", "unix:/tmp/x.sock", "unix:relative.sock"])
def test_this_machine_only(address: str) -> None:
    assert is_local(address)
    require_tls_beyond_loopback(address, PLAIN)
    # A channel needs a loop to live in.
    asyncio.run(_open(address, PLAIN))


@pytest.mark.parametrize(
    "address", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:443", "localhost.example.org:1", "127.0.0.1.example.org:1", ":5"]
)
def test_beyond_this_machine_needs_tls(address: str) -> None:
    assert not is_local(address)
    for refused in (lambda: require_tls_beyond_loopback(address, PLAIN), lambda: asyncio.run(_open(address, PLAIN))):
        with pytest.raises(ConfigError, match="without TLS") as error:
            refused()
        assert "tls.certificate" in error.value.fix
    require_tls_beyond_loopback(address, TlsConfig(certificate="c", key="k", ca="a"))


async def _open(address: str, tls: TlsConfig) -> None:
    await channel(address, tls, "{}").close()


@pytest.mark.parametrize("address", ["", "nonsense", "host:", "host:port", "host:65536", "host:-1", "1.2.3.4"])
def test_what_is_no_address_is_said(address: str) -> None:
    with pytest.raises(ConfigError, match="no address") as error:
        split_host_port(address)
    assert "HOST:PORT" in error.value.fix


def test_ipv6_brackets_are_taken_off() -> None:
    assert split_host_port("[::1]:50051") == ("::1", 50051)


def test_half_of_mtls_is_refused(tmp_path: Path) -> None:
    good = tls_kit.issue(trustme.CA(), tmp_path, "localhost")
    with pytest.raises(ConfigError, match="ca is missing"):
        TlsConfig(certificate=good.certificate, key=good.key).read()
    with pytest.raises(ConfigError, match="can't be read"):
        msgspec.structs.replace(good, ca=str(tmp_path / "none.pem")).read()
    assert good.read() == tuple(Path(name).read_bytes() for name in (good.certificate, good.key, good.ca))


@pytest.mark.parametrize(
    ("field", "content", "message"),
    [
        ("key", "other", r"\[edge.tls\] key .*bad.pem does not belong to certificate .*certificate.pem"),
        ("key", "junk", r"key .*bad.pem holds no PEM private key"),
        ("key", "encrypted", r"key .*bad.pem holds no PEM private key without a password"),
        ("certificate", "junk", r"\[edge.tls\] certificate .*bad.pem holds no readable PEM certificate"),
        ("certificate", "cut", r"certificate .*bad.pem holds no readable PEM certificate"),
        ("certificate", "other", r"key .*key.pem does not belong to certificate .*bad.pem"),
        ("ca", "junk", r"\[edge.tls\] ca .*bad.pem holds no readable PEM certificate: no certificate or crl found"),
    ],
)
def test_tls_files_that_do_not_fit_name_the_file_and_the_reason(tmp_path: Path, field: str, content: str, message: str) -> None:
    authority = trustme.CA()
    good, other = tls_kit.issue(authority, tmp_path / "good", "edge-1"), tls_kit.issue(authority, tmp_path / "other", "edge-1")
    bad = tmp_path / "bad.pem"
    if content == "encrypted":
        command = ["openssl", "pkey", "-in", good.key, "-aes256", "-passout", "pass:secret", "-out", str(bad)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    else:
        whole = Path(getattr(other, field)).read_bytes()
        bad.write_bytes({"other": whole, "junk": b"junk", "cut": whole[:200]}[content])
    with pytest.raises(ConfigError, match=message):
        msgspec.structs.replace(good, **{field: str(bad)}).read("[edge.tls]")


def nothing(_: grpc.aio.Server) -> None:
    """No service but health and reflection."""


async def status(address: str, service: str, **credentials: Any) -> int:
    open_channel = grpc.aio.secure_channel if credentials else grpc.aio.insecure_channel
    async with open_channel(address, *credentials.values()) as opened:
        reply = await health_pb2_grpc.HealthStub(opened).Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        return int(reply.status)


def test_health_follows_serving_and_drain() -> None:
    async def run() -> list[int]:
        server = await start_server(nothing, [SERVICE], listen="127.0.0.1:0", tls=PLAIN)
        seen = [await status(server.address, SERVICE), await status(server.address, "")]
        await server.set_serving(True)
        seen += [await status(server.address, SERVICE), await status(server.address, "")]
        await server.drain(0.1)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await status(server.address, SERVICE)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        return seen

    not_serving, serving = health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVING
    assert asyncio.run(run()) == [not_serving, not_serving, serving, serving]


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0", "unix:{folder}/a.sock"])
def test_the_address_that_was_bound_is_told(listen: str, tmp_path: Path) -> None:
    async def run() -> str:
        server = await start_server(nothing, [SERVICE], listen=listen.format(folder=tmp_path), tls=PLAIN)
        await server.set_serving(True)
        assert await status(server.address, SERVICE) == health_pb2.HealthCheckResponse.SERVING
        await server.drain(0)
        return server.address

    address = asyncio.run(run())
    assert address.startswith("unix:") or split_host_port(address)[1] > 0


def test_a_taken_port_is_an_error() -> None:
    """Two daemons on one port would share the calls by chance."""

    async def run() -> None:
        first = await start_server(nothing, [SERVICE], listen="127.0.0.1:0", tls=PLAIN)
        try:
            with pytest.raises(UnavailableError, match="taken"):
                await start_server(nothing, [SERVICE], listen=first.address, tls=PLAIN)
        finally:
            await first.drain(0)

    asyncio.run(run())


def test_mtls_lets_in_only_who_has_a_certificate(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    server_cert, client_cert, foreign = authority.issue_cert("localhost"), authority.issue_cert("edge-1"), stranger.issue_cert("edge-1")
    paths = {"certificate": server_cert.cert_chain_pems[0], "key": server_cert.private_key_pem, "ca": authority.cert_pem}
    for name, blob in paths.items():
        blob.write_to_path(tmp_path / f"{name}.pem")
    tls = TlsConfig(**{name: str(tmp_path / f"{name}.pem") for name in paths})
    root = authority.cert_pem.bytes()

    async def run() -> list[object]:
        server = await start_server(nothing, [SERVICE], listen="localhost:0", tls=tls)
        await server.set_serving(True)
        seen: list[object] = []
        for certificate in (client_cert, foreign, None):
            pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes()) if certificate else (None, None)
            try:
                seen.append(await status(server.address, SERVICE, tls=grpc.ssl_channel_credentials(root, *pair)))
            except grpc.aio.AioRpcError as error:
                seen.append(error.code())
        await server.drain(0)
        return seen

    assert asyncio.run(run()) == [health_pb2.HealthCheckResponse.SERVING, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE]


def test_metrics_are_served_on_loopback_and_nowhere_else() -> None:
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.Counter("answers", "n", registry=registry).inc(3)

    async def run() -> str:
        async with metrics_endpoint("", registry) as off:
            assert off == ""
        for listen in ("0.0.0.0:0", "unix:/tmp/m.sock"):
            with pytest.raises(ConfigError, match="loopback only"):
                async with metrics_endpoint(listen, registry):
                    pass
        async with metrics_endpoint("127.0.0.1:0", registry) as address:
            with pytest.raises(UnavailableError, match="metrics"):
                async with metrics_endpoint(address, registry):
                    pass
            return await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{address}/metrics", timeout=5).read().decode())

    assert "answers_total 3.0" in asyncio.run(run())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_ends_it_cleanly_and_the_second_at_once(number: signal.Signals) -> None:
    program = """
import asyncio, sys, kcm.rpc
async def main():
    asked = asyncio.create_task(kcm.rpc.until_signal())
    await asyncio.sleep(0)  # its handlers are set
    print("up", flush=True)
    await asked
    print("asked", flush=True)
    await asyncio.sleep(60 if sys.argv[1] == "slow" else 0)
asyncio.run(main())
print("clean", flush=True)
"""
    for speed, code in (("fast", 0), ("slow", -number)):
        process = subprocess.Popen([sys.executable, "-c", program, speed], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.stdout.readline() == "asked\n"
        if speed == "slow":
            process.send_signal(number)
        rest = process.stdout.read()
        process.stdout.close()
        assert (process.wait(10), rest) == (code, "clean\n" if code == 0 else "")
