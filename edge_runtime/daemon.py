"""The edge daemon: one process, one event loop. Ready only after the bundle's golden check; SIGTERM loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from edge_runtime.bundles import write_synced
from edge_runtime.cloud_client import CloudClient
from edge_runtime.config import EdgeConfig, check
from edge_runtime.drain import Drain
from edge_runtime.router import Router
from edge_runtime.service import NAME, EdgeService
from edge_runtime.spool import Spool
from edge_runtime.stats import Stats
from edge_runtime.updater import Updater
from kcm.errors import StoreError
from kcm.lock import exclusive
from kcm.rpc import Server, metrics_endpoint, start_server, until_signal
from kcm.sample import new_sample_id
from protos.kcm.v1 import edge_pb2_grpc

log = logging.getLogger("kcm.edge")


async def serve(config: EdgeConfig, ready: Callable[[str, str], None]) -> None:
    """Run until SIGTERM or SIGINT.

    Args:
        ready: called once, with the address and the metrics' address ("" without), when requests are answered.

    Raises:
        ConfigError, BundleError, StoreError, UnavailableError: it can't start.
    """
    check(config)
    stats = Stats()
    async with contextlib.AsyncExitStack() as stack:
        edge_id = stack.enter_context(_identity(config))
        updater = Updater(config, stats)
        runtime = updater.first()  # runs the golden inputs: warm before it is ready
        client = CloudClient(config.cloud, edge_id) if config.cloud.target else None
        if client is not None:
            stack.push_async_callback(client.close)
        # Opened without a cloud too: what waits from before must be seen.
        spool = Spool.open(config.state_path / "spool.db", max_bytes=config.spool.max_mb * 2**20)
        stack.callback(spool.close)
        router = Router(config, runtime, client=client, spool=spool, stats=stats)
        stack.push_async_callback(router.close)
        service = EdgeService(config, router, updater, stats, client=client, spool=spool)
        drain = Drain(config, spool, client, router.learned) if client is not None else None
        metrics = await stack.enter_async_context(_metrics(config, stats, router, client, spool, drain))
        server = await start_server(
            lambda grpc_server: edge_pb2_grpc.add_EdgeServicer_to_server(service, grpc_server), [NAME], listen=config.listen, tls=config.tls
        )
        work = {asyncio.create_task(updater.run(router), name="updater")}
        if drain is not None:
            work.add(asyncio.create_task(drain.run(), name="drain"))
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, updater.look_again)
        await server.set_serving(True)
        log.info("edge %s serves bundle %s on %s", edge_id, runtime.bundle_id, server.address)
        ready(server.address, metrics)
        try:
            await _until_end(work)
        finally:
            await _end(server, service, config.drain_s)


async def _until_end(work: set[asyncio.Task[None]]) -> None:
    """Until a signal. A background task that dies ends the daemon too: one that neither drains nor swaps must be restarted."""
    stop = asyncio.create_task(until_signal())
    done, _ = await asyncio.wait({stop, *work}, return_when=asyncio.FIRST_COMPLETED)
    for task in work - done:
        task.cancel()
    await asyncio.gather(*(work - done), return_exceptions=True)
    for task in done & work:
        log.error("the %s ended", task.get_name(), exc_info=task.exception())
        task.result()


async def _end(server: Server, service: EdgeService, grace_s: float) -> None:
    log.info("shutting down: answering what is in flight")
    service.stop_reading()
    await server.drain(grace_s)


@contextlib.asynccontextmanager
async def _metrics(
    config: EdgeConfig, stats: Stats, router: Router, client: CloudClient | None, spool: Spool, drain: Drain | None
) -> AsyncIterator[str]:
    if not config.metrics_listen:
        yield ""
        return
    from edge_runtime.metrics import EdgeCollector, registry

    collector = EdgeCollector(stats, router, client=client, spool=spool, drain=drain)
    async with metrics_endpoint(config.metrics_listen, registry(collector)) as address:
        yield address


@contextlib.contextmanager
def _identity(config: EdgeConfig) -> Iterator[str]:
    """This edge's id, made once; and the state folder for this process alone.

    Raises:
        StoreError: the folder can't be written, or another daemon uses it.
    """
    folder: Path = config.state_path
    with exclusive(folder / ".lock", taken=f"another kcm edge uses {folder}", fix="give each daemon its own --state"):
        yield config.edge_id or _own_id(folder / "edge_id")


def _own_id(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        if kept := path.read_text().strip():
            return kept
    edge_id = f"edge-{new_sample_id().rpartition('-')[2]}"
    try:
        write_synced(path, edge_id.encode())
    except OSError as error:
        raise StoreError(f"{path} can't be written: {error.strerror}", fix="check the disk and the folder's owner") from error
    return edge_id
