"""From a bundle on the disk to a runtime with the best engine of this machine, and to a better one once that is built."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from pathlib import Path

from edge_runtime.engines.chain import Skipped, named, usable
from edge_runtime.engines.protocol import Backend, Engine
from edge_runtime.runtime import CPU, EdgeRuntime
from kcm.bundle import Bundle, Precision, load_bundle
from kcm.errors import BundleError, EngineError, KcmError

log = logging.getLogger("kcm.edge.loader")


class Loader:
    """Loads bundles with the first engine of a list that can serve now. What has to be built comes after, by `improve`."""

    def __init__(self, engines: str, precision: Precision) -> None:
        """
        Args:
            engines: their names in order of preference, with commas.

        Raises:
            ConfigError: an unknown engine.
            EngineError: none of them can run on this machine.
        """
        self.precision: Precision = precision
        self.requested = engines
        self.backends, skipped = usable(named([name.strip() for name in engines.split(",")]))
        self.skipped: list[Skipped] = skipped
        for skip in skipped:
            log.info("engine %s is skipped: %s", skip.name, skip.reason)

    def load(self, path: Path) -> EdgeRuntime:
        """A runtime that answers now, of the bundle at `path`.

        Where none of the engines can without being built, the first that can be built is, and this takes its minutes.

        Raises:
            BundleError: damaged, of another signature, or with golden outputs that this device doesn't reproduce.
            EngineError: no engine could be loaded; the message names every reason.
        """
        bundle = load_bundle(path)
        model, graph = bundle.model(self.precision), bundle.manifest.graph
        ready = [backend for backend in self.backends if backend.ready(model, graph)]
        reasons: list[str] = []
        for backend in ready + [backend for backend in self.backends if backend not in ready]:
            try:
                if backend not in ready:
                    log.info("engine %s is built before anything is answered: none of %s runs without", backend.name, self.requested)
                    backend.prepare(model, graph)
                runtime = EdgeRuntime.from_bundle(bundle, self.precision, backend, self._spare(path))
            except EngineError as error:
                log.warning("engine %s is skipped: %s", backend.name, error.message)
                reasons.append(f"{backend.name}: {error.message}")
                continue
            log.info("engine %s: %s runs bundle %s in %s", backend.name, runtime.provider, runtime.bundle_id, self.precision)
            trim()
            return runtime
        raise EngineError("no engine can run the bundle: " + "; ".join(reasons), fix="kcm doctor   shows what this machine has")

    def better(self, runtime: EdgeRuntime) -> list[Backend]:
        """Engines that stand before the runtime's own in the list."""
        names = [backend.name for backend in self.backends]
        return self.backends[: names.index(runtime.engine)] if runtime.engine in names else []

    def improve(self, runtime: EdgeRuntime, path: Path) -> EdgeRuntime | None:
        """The same bundle on the first better engine that can be built and agrees with the golden outputs; None where none does.

        Blocks for as long as building takes; meant for a thread.
        """
        for backend in self.better(runtime):
            try:
                bundle = load_bundle(path)
                if bundle.manifest.bundle_id != runtime.bundle_id:
                    return None
                return self._built(bundle, backend, path)
            except KcmError as error:
                why = "its decisions differ: " if isinstance(error, BundleError) else ""
                said = why + str(error).replace("\n  fix", "; fix")
                log.warning("engine %s is skipped, %s serves on: %s", backend.name, runtime.provider, said)
        return None

    def cancel(self) -> None:
        """End what `improve` builds in another thread."""
        for backend in self.backends:
            backend.cancel()

    def _built(self, bundle: Bundle, backend: Backend, path: Path) -> EdgeRuntime:
        model, graph = bundle.model(self.precision), bundle.manifest.graph
        if not backend.ready(model, graph):
            backend.prepare(model, graph)
        return EdgeRuntime.from_bundle(bundle, self.precision, backend, self._spare(path))

    def _spare(self, path: Path) -> Callable[[], Engine]:
        """ONNX Runtime on the CPU, read anew when it is needed: until then it costs no memory."""

        def make() -> Engine:
            bundle = load_bundle(path)
            return CPU.load(bundle.model(self.precision), bundle.manifest.graph, len(bundle.task.labels))

        return make


def trim() -> None:
    """Give the memory of loading back to the system: glibc keeps about a third of a model's size otherwise."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return
