"""The edge daemon: one process, one event loop. Ready only after the bundle's golden check; SIGTERM loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable

from edge_runtime.assembly import Parts, assembled, ended
from edge_runtime.config import EdgeConfig, check
from edge_runtime.service import NAME, EdgeService
from kcm.rpc import Server, metrics_endpoint, start_server, until_signal
from protos.kcm.v1 import edge_pb2_grpc

log = logging.getLogger("kcm.edge")

_TELL_S = 0.1


async def serve(config: EdgeConfig, ready: Callable[[str, str], None]) -> None:
    """Run until SIGTERM or SIGINT.

    Args:
        ready: called once, with the address and the metrics' address ("" without), when requests are answered.

    Raises:
        ConfigError, BundleError, EngineError, StoreError, UnavailableError: it can't start.
    """
    check(config)
    async with assembled(config) as parts:
        service = EdgeService(config, parts.router, parts.updater, parts.stats, client=parts.client, spool=parts.spool)
        async with _metrics(config, parts) as metrics:
            server = await start_server(
                lambda grpc_server: edge_pb2_grpc.add_EdgeServicer_to_server(service, grpc_server),
                [NAME],
                listen=config.listen,
                tls=config.tls,
            )
            work = parts.start()
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, parts.updater.look_again)
            await server.set_serving(True)
            log.info("edge %s serves bundle %s on %s", parts.edge_id, parts.router.runtime.bundle_id, server.address)
            ready(server.address, metrics)
            try:
                await ended(work, asyncio.create_task(until_signal()))
            finally:
                await _end(server, service, config.drain_s)


async def _end(server: Server, service: EdgeService, grace_s: float) -> None:
    log.info("shutting down: answering what is in flight")
    service.stop_reading()
    await server.set_serving(False)
    # gRPC cancels without a word what arrives at a server that stops: so callers are told first, on the connections that they have.
    await asyncio.sleep(min(_TELL_S, grace_s))
    await server.drain(grace_s)


@contextlib.asynccontextmanager
async def _metrics(config: EdgeConfig, parts: Parts) -> AsyncIterator[str]:
    if not config.metrics_listen:
        yield ""
        return
    from edge_runtime.metrics import EdgeCollector, registry

    collector = EdgeCollector(parts.stats, parts.router, client=parts.client, spool=parts.spool, drain=parts.drain)
    async with metrics_endpoint(config.metrics_listen, registry(collector)) as address:
        yield address
