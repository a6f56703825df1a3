"""What both gRPC servers share: where they may listen, mTLS, health, reflection, metrics, and a clean end on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import grpc
import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kcm.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

MAX_MESSAGE = 16 * 2**20
# Of one payload, on either side: half a message leaves room for the scores, the hint and the framing.
SampleBytes = Annotated[int, msgspec.Meta(gt=0, le=MAX_MESSAGE // 2)]
# What OpenSSL says where a key and a certificate are both sound and don't fit.
_STRANGERS = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """PEM files of one side of mTLS. All three, or none."""

    certificate: str = ""
    key: str = ""
    ca: str = ""

    @property
    def enabled(self) -> bool:
        return bool(self.certificate or self.key or self.ca)

    def read(self, where: str = "[tls]") -> tuple[bytes, bytes, bytes]:
        """(certificate, key, ca), checked: gRPC itself would only say that it can't bind or connect.

        Args:
            where: the table that an error names.

        Raises:
            ConfigError: a file is missing, can't be read, is no PEM, or the key isn't the certificate's.
        """
        for field in ("certificate", "key", "ca"):
            if not getattr(self, field):
                raise ConfigError(f"{where} {field} is missing: mTLS needs certificate, key and ca")
        try:
            certificate, key, ca = (Path(name).read_bytes() for name in (self.certificate, self.key, self.ca))
        except OSError as error:
            raise ConfigError(f"{where} {error.filename} can't be read: {error.strerror}") from error
        _check_certificates(self.certificate, f"{where} certificate")
        _check_certificates(self.ca, f"{where} ca")
        self._check_pair(where)
        return certificate, key, ca

    def _check_pair(self, where: str) -> None:
        try:
            # A password at once: OpenSSL would ask for it on the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, password=lambda: b"")
        except (ssl.SSLError, ValueError) as error:
            reason = getattr(error, "reason", None)
            if reason in _STRANGERS:
                message = f"{where} key {self.key} does not belong to certificate {self.certificate}"
                raise ConfigError(message, fix="give the key that the certificate was made from") from error
            if reason:
                raise ConfigError(f"{where} certificate {self.certificate} with key {self.key}: {_words(reason)}") from error
            message = f"{where} key {self.key} holds no PEM private key without a password"
            raise ConfigError(message, fix=f"openssl pkey -in {self.key} -out PLAIN.key   takes a password off") from error


def _check_certificates(path: str, what: str) -> None:
    """Raises ConfigError where the file holds no readable certificate."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError as error:
        raise ConfigError(f"{what} {path} holds no readable PEM certificate: {_words(error.reason or 'damaged')}") from error


def _words(reason: str) -> str:
    """OpenSSL's NO_CERTIFICATE_OR_CRL_FOUND as a reader would say it."""
    return reason.lower().replace("_", " ")


def is_local(address: str) -> bool:
    """True for a Unix socket and for loopback addresses; names other than localhost count as remote."""
    if address.startswith("unix:"):
        return True
    host = split_host_port(address)[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split_host_port(address: str) -> tuple[str, int]:
    """("::1", 50051) of "[::1]:50051". Raises ConfigError where it is no HOST:PORT."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or not 0 <= int(port) < 65536:
        raise ConfigError(f"{address!r} is no address", fix="use HOST:PORT, [IPv6]:PORT or unix:/path/to.sock")
    return host.strip("[]"), int(port)


def require_tls_beyond_loopback(address: str, tls: TlsConfig) -> None:
    """Raises ConfigError: without mTLS a server is for this machine only."""
    if not tls.enabled and not is_local(address):
        raise ConfigError(
            f"refusing to listen on {address} without TLS", fix="set tls.certificate, tls.key and tls.ca, or listen on 127.0.0.1 or unix:"
        )


def channel(address: str, tls: TlsConfig, service_config: str) -> grpc.aio.Channel:
    """A client channel: mTLS where configured, plain to this machine only.

    Raises:
        ConfigError: a remote address without TLS.
    """
    options: list[tuple[str, str | int]] = [
        ("grpc.service_config", service_config),
        ("grpc.max_receive_message_length", MAX_MESSAGE),
        ("grpc.max_send_message_length", MAX_MESSAGE),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5000),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 5_000),
    ]
    if tls.enabled:
        certificate, key, ca = tls.read()
        return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate), options=options)
    if not is_local(address):
        raise ConfigError(f"refusing to call {address} without TLS", fix="set tls.certificate, tls.key and tls.ca")
    return grpc.aio.insecure_channel(address, options=options)


class Server:
    """A started gRPC server with its health service."""

    def __init__(self, server: grpc.aio.Server, health_servicer: health.aio.HealthServicer, services: Sequence[str], address: str) -> None:
        self._server, self._health, self._services = server, health_servicer, services
        self.address = address

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *self._services):
            await self._health.set(service, status)

    async def drain(self, grace_s: float) -> None:
        """Not ready any more, no new calls, calls in flight get `grace_s` to end."""
        await self.set_serving(False)
        await self._server.stop(grace_s)


async def start_server(
    register: Callable[[grpc.aio.Server], None],
    services: Sequence[str],
    *,
    listen: str,
    tls: TlsConfig,
    reflect: bool = True,
) -> Server:
    """Bind and start; not serving (health) until set_serving(True).

    Args:
        register: adds the servicers.
        services: their full names, for health and reflection.
        listen: HOST:PORT (port 0: a free one, see Server.address) or unix:/path.

    Raises:
        ConfigError: an address beyond loopback without TLS.
        UnavailableError: the address is taken.
    """
    require_tls_beyond_loopback(listen, tls)
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.max_send_message_length", MAX_MESSAGE),
            ("grpc.so_reuseport", 0),  # a second daemon on one port is a mistake, not a load balancer
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.server_handshake_timeout_ms", 2_000),
        ]
    )
    register(server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    if reflect:
        reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        if tls.enabled:
            certificate, key, ca = tls.read()
            credentials = grpc.ssl_server_credentials([(key, certificate)], root_certificates=ca, require_client_auth=True)
            port = server.add_secure_port(listen, credentials)
        else:
            port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise UnavailableError(
            f"can't listen on {listen}: it is taken or not an address of this machine", fix="choose another --listen"
        ) from error
    address = listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"
    started = Server(server, health_servicer, services, address)
    await started.set_serving(False)
    await server.start()
    return started


@contextlib.asynccontextmanager
async def metrics_endpoint(listen: str, registry: CollectorRegistry) -> AsyncIterator[str]:
    """Serve /metrics over HTTP on loopback; "" serves none. Yields the address.

    Raises:
        ConfigError: an address beyond loopback (a scraper on another machine comes through its own proxy).
        UnavailableError: the address is taken.
    """
    if not listen:
        yield ""
        return
    from prometheus_client import start_http_server

    if not is_local(listen) or listen.startswith("unix:"):
        raise ConfigError(f"metrics listen on loopback only, not on {listen}")
    host, port = split_host_port(listen)
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise UnavailableError(f"can't listen on {listen} for metrics: {error.strerror}", fix="choose another metrics_listen") from error
    try:
        yield f"{host}:{server.server_port}"
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        thread.join()


async def until_signal() -> None:
    """Return on the first SIGTERM or SIGINT; a second one ends the process at once."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def first(number: int) -> None:
        stop.set()
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, first, number)
    await stop.wait()
