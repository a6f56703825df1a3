"""TensorRT (10.3 of JetPack 6, 10.13, 11) and TensorRT-RTX: one backend that is handed the library.

An engine (execute.py) is a plan out of the cache (plans.py), which `prepare` had built (build.py). What only TensorRT-RTX has stands
behind hasattr(trt, "ComputeCapability"). CUDA is asked before the library is touched: without a driver it crashes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import threading
from typing import TYPE_CHECKING, Any

from edge_runtime.engines import cuda
from edge_runtime.engines.build import BuildFailed, BuildLimits, build_apart
from edge_runtime.engines.compile import FLAGS, BuildSpec, Flavour, module_of
from edge_runtime.engines.execute import TensorRTEngine
from edge_runtime.engines.plans import PlanCache, PlanKey, Sidecar
from kcm.errors import ConfigError, EngineError, KcmError

if TYPE_CHECKING:
    from kcm.bundle import GraphSpec

log = logging.getLogger("kcm.edge.tensorrt")

_OLDEST = (7, 5)  # compute capability that every supported TensorRT still runs on


class TensorRTBackend:
    """`tensorrt` or `tensorrt-rtx`, by name."""

    def __init__(
        self,
        flavour: Flavour,
        *,
        cuda_graphs: bool = False,
        workspace_mb: int = 1024,
        limits: BuildLimits | None = None,
        cache: PlanCache | None = None,
        again: bool = False,
    ) -> None:
        """
        Args:
            cuda_graphs: launch a whole run at once, for shapes that come again.
            workspace_mb: device memory that a layer may use.
            limits: of the process that builds.
            cache: where plans lie; default: the user's cache folder.
            again: also build what failed before.
        """
        self.name: Flavour = flavour
        self._cuda_graphs, self._workspace_mb = cuda_graphs, workspace_mb
        self._limits, self._cache = limits or BuildLimits(), cache or PlanCache()
        self._cancelled, self._again = threading.Event(), again

    def probe(self) -> str:
        # Found, not imported: a machine without a GPU shouldn't carry 200 MB of library to learn that.
        if importlib.util.find_spec("tensorrt" if self.name == "tensorrt" else "tensorrt_rtx") is None:
            return f"{self.name} is not installed; fix: pip install 'kcm[{self.name}]'"
        if why := cuda.why_no_device():
            return why
        try:
            trt, device = module_of(self.name), cuda.device()
        except KcmError as error:
            return str(error).replace("\n  fix", "; fix")
        return _unsupported(trt, self.name, device)

    def ready(self, model: bytes, graph: GraphSpec) -> bool:
        """The plan is there, whole, and of this machine. Where it isn't, the log says why."""
        try:
            why = cuda.why_no_device() or self._cache.why_not(self._key(model, graph))
        except KcmError as error:
            why = error.message
        if why:
            log.info("%s has to be built: %s", self.name, why)
        return not why

    def prepare(self, model: bytes, graph: GraphSpec) -> None:
        if why := cuda.why_no_device():
            raise EngineError(why)
        self._cancelled.clear()
        key = self._key(model, graph)
        if not self._again and (before := self._cache.failed(key)):
            fix = f"rm {self._cache.failure_file(key)}   lets it try again"
            raise EngineError(f"building it failed on {before.created} and isn't tried again: {before.reason}", fix=fix)
        self._built(model, key)

    def build_ahead(self, model: bytes, graph: GraphSpec, target: str) -> Sidecar:
        """Build for a GPU that isn't here ("sm89"), into the cache. TensorRT-RTX alone can: the other one times its kernels on the GPU.

        Raises:
            ConfigError: no such target.
            EngineError: the builder refused; the message holds its own words.
        """
        self.check_target(target)
        return self._built(model, self._key_for(model, graph, target.lower()))

    def check_target(self, target: str) -> None:
        """
        Raises:
            ConfigError: it is no target of the library.
            EngineError: this library builds ahead for none.
        """
        trt = module_of(self.name)
        if not hasattr(trt, "ComputeCapability"):
            raise EngineError(f"{self.name} builds on the GPU that will run it", fix="run kcm edge there, or take tensorrt-rtx")
        known = trt.ComputeCapability.__members__
        if target.upper() not in known:
            names = ", ".join(sorted((name.lower() for name in known if name.startswith("SM")), key=lambda name: int(name[2:])))
            raise ConfigError(f"{self.name} has no target {target!r}", fix=f"one of {names}")

    def _built(self, model: bytes, key: PlanKey) -> Sidecar:
        spec = BuildSpec(
            flavour=self.name,
            inputs=key.inputs,
            max_batch=key.max_batch,
            targets=(key.target,) if self.name == "tensorrt-rtx" else (),
            workspace_mb=key.workspace_mb,
        )
        try:
            built = build_apart(model, spec, self._limits, cancelled=self._cancelled)
        except BuildFailed as error:
            with contextlib.suppress(EngineError):  # a cache that can't be written: the builder's words matter more
                self._cache.note_failure(key, error.message)
            raise
        if built.report.version != key.version:
            raise EngineError(
                f"the builder's {self.name} is {built.report.version}, this process has {key.version}", fix="restart the edge"
            )
        log.info("%s %s built %d bytes in %.1f s", self.name, key.version, built.report.size, built.report.seconds)
        return self._cache.write(key, built.plan, built.report.seconds)

    def cancel(self) -> None:
        """Kill the build that runs in another thread; its `prepare` raises EngineError."""
        self._cancelled.set()

    def load(self, model: bytes, graph: GraphSpec, classes: int) -> TensorRTEngine:
        if why := cuda.why_no_device():
            raise EngineError(why)
        key = self._key(model, graph)
        plan = self._cache.read(key)
        return TensorRTEngine(
            module_of(self.name), plan, graph, classes, provider=f"{self.name} {key.version}", cuda_graphs=self._cuda_graphs
        )

    def _key(self, model: bytes, graph: GraphSpec) -> PlanKey:
        device = cuda.device()
        # TensorRT chooses kernels by timing them on this very GPU.
        return self._key_for(model, graph, device.target if self.name == "tensorrt-rtx" else f"{device.target} {device.name}")

    def _key_for(self, model: bytes, graph: GraphSpec, target: str) -> PlanKey:
        return PlanKey(
            model=hashlib.sha256(model).hexdigest(),
            flavour=self.name,
            version=module_of(self.name).__version__,
            target=target,
            flags=FLAGS,
            inputs=graph.inputs,
            max_batch=graph.max_batch,
            workspace_mb=self._workspace_mb,
        )


def _unsupported(trt: Any, name: str, device: cuda.Device) -> str:
    said = f"{device.name} has compute capability {device.capability[0]}.{device.capability[1]}"
    if hasattr(trt, "ComputeCapability"):
        if device.target.upper() not in trt.ComputeCapability.__members__:
            return f"{said}, which {name} {trt.__version__} has no target for; fix: use tensorrt, or onnx-cuda"
    elif device.capability < _OLDEST:
        return f"{said}, older than the {_OLDEST[0]}.{_OLDEST[1]} that {name} runs on; fix: use onnx-cuda, or onnx-cpu"
    return ""
