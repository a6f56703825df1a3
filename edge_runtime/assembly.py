"""The parts of one edge, put together and taken apart: for the daemon, and for an edge inside an application."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.bundles import write_synced
from edge_runtime.cloud_client import CloudClient
from edge_runtime.config import EdgeConfig
from edge_runtime.drain import Drain
from edge_runtime.router import Router
from edge_runtime.spool import Spool
from edge_runtime.stats import Stats
from edge_runtime.updater import Updater
from kcm.errors import StoreError
from kcm.lock import exclusive
from kcm.sample import new_sample_id

log = logging.getLogger("kcm.edge")


@dataclass(frozen=True)
class Parts:
    """All of them belong to one event loop. `work` runs until it is cancelled."""

    edge_id: str
    stats: Stats
    updater: Updater
    client: CloudClient | None
    spool: Spool
    router: Router
    drain: Drain | None

    def start(self) -> set[asyncio.Task[None]]:
        """The background tasks: following the bundle, building engines, sending what waits."""
        work = {asyncio.create_task(self.updater.run(self.router), name="updater")}
        if self.drain is not None:
            work.add(asyncio.create_task(self.drain.run(), name="drain"))
        return work


@contextlib.asynccontextmanager
async def assembled(config: EdgeConfig) -> AsyncIterator[Parts]:
    """The parts, warm: the golden inputs have run. On leaving, what is to be kept is on the disk.

    Raises:
        BundleError, EngineError, StoreError: it can't start.
    """
    stats = Stats()
    async with contextlib.AsyncExitStack() as stack:
        edge_id = stack.enter_context(_identity(config))
        updater = Updater(config, stats)
        runtime = updater.first()
        client = CloudClient(config.cloud, edge_id) if config.cloud.target else None
        if client is not None:
            stack.push_async_callback(client.close)
        # Opened without a cloud too: what waits from before must be seen.
        spool = Spool.open(config.state_path / "spool.db", max_bytes=config.spool.max_mb * 2**20)
        stack.callback(spool.close)
        router = Router(config, runtime, client=client, spool=spool, stats=stats)
        stack.push_async_callback(router.close)
        drain = Drain(config, spool, client, router.learned) if client is not None else None
        yield Parts(edge_id, stats, updater, client, spool, router, drain)


async def ended(work: set[asyncio.Task[None]], stop: asyncio.Task[None]) -> None:
    """Until `stop` is done. A background task that dies ends the edge too: one that neither drains nor swaps must be restarted."""
    done, _ = await asyncio.wait({stop, *work}, return_when=asyncio.FIRST_COMPLETED)
    for task in {stop, *work} - done:
        task.cancel()
    await asyncio.gather(*({stop, *work} - done), return_exceptions=True)
    for task in done & work:
        log.error("the %s ended", task.get_name(), exc_info=task.exception())
        task.result()


@contextlib.contextmanager
def _identity(config: EdgeConfig) -> Iterator[str]:
    """This edge's id, made once; and the state folder for this process alone.

    Raises:
        StoreError: the folder can't be written, or another edge uses it.
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
