"""Which bundle serves: loads the first, watches for the next, swaps between requests. A bad one changes nothing."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from edge_runtime.bundles import BundleStore
from edge_runtime.config import EdgeConfig
from edge_runtime.loader import Loader, trim
from edge_runtime.router import Router
from edge_runtime.runtime import EdgeRuntime
from edge_runtime.stats import Stats
from kcm.errors import BundleError, KcmError, StoreError

log = logging.getLogger("kcm.edge.updater")

_POLL_S = 0.5


class Updater:
    """Follows a bundle store's state.json, or one fixed folder (looked at anew on SIGHUP)."""

    def __init__(self, config: EdgeConfig, stats: Stats) -> None:
        self._config, self._stats = config, stats
        self.loader = Loader(config.engine, config.precision)
        self._store = BundleStore(Path(config.store)) if config.store else None
        self._refused = ""  # why this daemon didn't take the newest bundle
        self._seen = (0, 0)
        self._hup = asyncio.Event()
        self._improving: asyncio.Task[None] | None = None

    @property
    def last_refusal(self) -> str:
        """Why the newest bundle was not taken; empty if it was. What an install refused counts too."""
        if self._refused or self._store is None:
            return self._refused
        try:
            return self._store.state().last_refusal
        except StoreError as error:
            return error.message

    def first(self) -> EdgeRuntime:
        """The runtime to start with. Where the store's current bundle is damaged: the previous one.

        Raises:
            BundleError: none can be served.
        """
        if self._store is None:
            return self.loader.load(Path(self._config.bundle))
        self._seen = self._store.version()
        current = self._store.current()
        try:
            return self.loader.load(current)
        except BundleError as error:
            previous = self._store.state().previous
            if not previous:
                raise
            self._refuse(current, error)
            return self.loader.load(self._store.folder(previous))

    def look_again(self) -> None:
        """SIGHUP."""
        self._hup.set()

    async def run(self, router: Router) -> None:
        """Until cancelled."""
        try:
            await self._watch(router)
        finally:
            self._stop_improving()

    async def _watch(self, router: Router) -> None:
        self._improve_soon(router)
        while True:
            try:
                await asyncio.wait_for(self._hup.wait(), _POLL_S)
            except asyncio.TimeoutError:
                if self._store is None or self._store.version() == self._seen:
                    continue
            asked = self._hup.is_set()
            self._hup.clear()
            await self._look(router, asked)

    async def _look(self, router: Router, asked: bool) -> None:
        path = Path(self._config.bundle)
        try:
            if self._store is not None:
                self._seen = self._store.version()
                path = self._store.current()
                if path.name == router.runtime.bundle_id and not asked:
                    self._refused = ""
                    return
            # In a thread: requests go on while the new engine loads and proves itself.
            runtime = await asyncio.to_thread(self.loader.load, path)
        except KcmError as error:
            self._refuse(path, error)
            return
        old = router.runtime.bundle_id
        router.swap(runtime)
        self._refused = ""
        self._stats.swaps += 1
        log.info("bundle %s serves, %s did before", runtime.bundle_id, old)
        self._improve_soon(router)

    def _improve_soon(self, router: Router) -> None:
        """Build what would run this bundle faster, in the background; a later bundle's takes its place."""
        self._stop_improving()
        if self.loader.better(router.runtime):
            self._improving = asyncio.create_task(self._improve(router))

    def _stop_improving(self) -> None:
        if self._improving is not None:
            self._improving.cancel()
            self.loader.cancel()
            self._improving = None

    async def _improve(self, router: Router) -> None:
        before = router.runtime
        path = self._store.folder(before.bundle_id) if self._store is not None else Path(self._config.bundle)
        after = await asyncio.to_thread(self.loader.improve, before, path)
        # What serves may have been swapped while the engine was built.
        if after is None or router.runtime is not before:
            return
        router.swap(after)
        log.info("engine %s serves bundle %s, %s did before", after.provider, after.bundle_id, before.provider)
        del before
        trim()

    def _refuse(self, path: Path, error: KcmError) -> None:
        self._refused = f"{path.name}: {error.message}"
        self._stats.refusals += 1
        log.error("bundle refused, the old one serves on: %s", self._refused)
