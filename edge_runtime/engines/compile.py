"""The build itself, the same for TensorRT 10.3 to 11 and TensorRT-RTX: parser, one profile, plan.

Precision lives in the ONNX: networks are strongly typed, and TF32 is off, since decisions near ε would differ from the CPU's.
TensorRT-RTX builds ahead of time for named targets without a GPU; TensorRT builds for the GPU that it runs on.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from edge_runtime.engines.protocol import OUTPUTS
from kcm.errors import EngineError, require

Flavour = Literal["tensorrt", "tensorrt-rtx"]
FLAGS = ("strongly-typed", "no-tf32")  # of every build; part of a plan's key

_LARGEST = 2**31 - 1  # of any size: beyond, the library raises what it likes, or wraps around and says nothing
# Without a path, the parser reads tensors outside the model's bytes from the working directory.
_NO_FOLDER = "/dev/null/external-data-is-refused/model.onnx"


class BuildSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to build: for every input, each shape from [1, 1] to [max_batch, its largest length]."""

    flavour: Flavour
    inputs: dict[str, int]
    max_batch: int
    targets: tuple[str, ...] = ()  # TensorRT-RTX: "sm86", "sm89", …; none: portable over Ampere and later
    workspace_mb: int = 1024  # device memory that a layer may use while it runs


class BuildReport(msgspec.Struct, frozen=True, kw_only=True):
    version: str  # the library's
    seconds: float  # of the build, without starting the process
    size: int
    sha256: str
    warnings: tuple[str, ...] = ()


class Built(msgspec.Struct, frozen=True, kw_only=True):
    plan: bytes
    report: BuildReport


def module_of(flavour: Flavour) -> Any:
    """The library's Python module.

    Raises:
        MissingExtraError: not installed.
        EngineError: installed without what it needs.
    """
    try:
        return require("tensorrt", "tensorrt") if flavour == "tensorrt" else require("tensorrt_rtx", "tensorrt-rtx")
    except (ImportError, OSError, RuntimeError) as error:
        fix = f"pip install --force-reinstall 'kcm[{flavour}]'; on a Jetson: apt install python3-libnvinfer"
        raise EngineError(f"{flavour} is installed and can't be imported: {error}", fix=fix) from error


@functools.cache
def logger_of(trt: Any) -> Any:
    """This process's one logger for a library, which keeps the first that it is given. `errors` and `warnings` hold the last ones."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=10)
            self.warnings: deque[str] = deque(maxlen=20)
            self.echo: Callable[[str], object] | None = None  # told each line as it comes

        def log(self, severity: Any, text: str) -> None:
            if severity == trt.ILogger.Severity.VERBOSE:
                return
            if severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(text)
            elif severity != trt.ILogger.Severity.INFO:
                self.errors.append(text)
            if self.echo is not None:
                self.echo(text)

        def take_errors(self) -> str:
            said = " | ".join(dict.fromkeys(self.errors)) or "it gave no reason"
            self.errors.clear()
            return said

    return Logger()


def build_plan(trt: Any, model: bytes, spec: BuildSpec) -> Built:
    """Build in this process. `build_apart` is for whoever has something to lose.

    Raises:
        EngineError: the model can't be parsed, has another signature, or can't be built for these shapes or targets.
    """
    _check_spec(spec)
    log = logger_of(trt)
    log.errors.clear()
    log.warnings.clear()
    began = time.perf_counter()
    # Every one of these stands on those before it without holding them: all stay referenced until the plan is copied.
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model, _NO_FOLDER):
        raise EngineError(f"{spec.flavour} can't parse the model: {_parser_said(parser, log)}")
    _check_signature(trt, network, spec)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_mb * 2**20)
    _set_targets(trt, config, spec)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        profile.set_shape(tensor.name, *_shapes(tensor.name, tuple(tensor.shape), spec))
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"{spec.flavour} refuses the profile: {log.take_errors()}")
    memory = builder.build_serialized_network(network, config)
    if memory is None:
        raise EngineError(f"{spec.flavour} can't build the model: {log.take_errors()}")
    plan = bytes(memory)
    digest, seconds = hashlib.sha256(plan).hexdigest(), round(time.perf_counter() - began, 3)
    warnings = tuple(dict.fromkeys(log.warnings))
    return Built(plan=plan, report=BuildReport(version=trt.__version__, seconds=seconds, size=len(plan), sha256=digest, warnings=warnings))


def output_types(trt: Any) -> dict[str, Any]:
    """What each of the graph's outputs holds."""
    return {name: trt.DataType.INT64 if name == "top_ids" else trt.DataType.FLOAT for name in OUTPUTS}


def _check_spec(spec: BuildSpec) -> None:
    lengths = ((f"the largest length of {name!r}", length) for name, length in spec.inputs.items())
    for field, value in (("max_batch", spec.max_batch), *lengths, ("workspace_mb", spec.workspace_mb)):
        if not 1 <= value <= _LARGEST:
            raise EngineError(f"{field} of an engine is {value}, must be 1 to {_LARGEST}")
    if spec.targets and spec.flavour == "tensorrt":
        raise EngineError("TensorRT builds for the GPU that it runs on, not for named targets", fix="leave them out, or use tensorrt-rtx")


def _set_targets(trt: Any, config: Any, spec: BuildSpec) -> None:
    if not spec.targets or not hasattr(trt, "ComputeCapability"):
        return
    known = {name.lower(): value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    targets = tuple(dict.fromkeys(spec.targets))
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        if target not in known:
            raise EngineError(f"{spec.flavour} {trt.__version__} can't build for {target!r}", fix=f"one of {', '.join(known)}")
        if not config.set_compute_capability(known[target], index):
            raise EngineError(f"{spec.flavour} refuses the target {target}: {logger_of(trt).take_errors()}")


def _check_signature(trt: Any, network: Any, spec: BuildSpec) -> None:
    inputs = [network.get_input(index).name for index in range(network.num_inputs)]
    if set(inputs) != set(spec.inputs):
        raise EngineError(f"the model reads {', '.join(inputs) or 'nothing'}; its manifest says {', '.join(spec.inputs)}")
    outputs = {tensor.name: tensor.dtype for tensor in map(network.get_output, range(network.num_outputs))}
    for name, dtype in output_types(trt).items():
        if name not in outputs:
            raise EngineError(f"the model has no output {name!r}, only {', '.join(outputs)}")
        if outputs[name] != dtype:
            raise EngineError(f"output {name!r} holds {outputs[name].name}, must be {dtype.name}")


def _shapes(name: str, dims: tuple[int, ...], spec: BuildSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Least, usual and largest shape of an input: the first axis is B, every other one that isn't fixed is L."""
    if not dims or dims[0] != -1:
        raise EngineError(f"input {name!r} has shape {list(dims)}: its batch is fixed", fix="export it with a free first axis")

    def at(batch: int, length: int) -> tuple[int, ...]:
        return (batch, *(length if dim == -1 else dim for dim in dims[1:]))

    longest = spec.inputs[name]
    return at(1, 1), at(min(8, spec.max_batch), min(128, longest)), at(spec.max_batch, longest)


def _parser_said(parser: Any, log: Any) -> str:
    said = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        where = f"node {error.node()} {error.node_name()!r} ({error.node_operator()}): " if error.node() >= 0 else ""
        said.append(where + error.desc())
    # The parser's own errors leave out what only its log says, such as which file it wanted to open.
    return " | ".join([*said, *(line for line in log.errors if not any(word in line for word in said))]) or "it gave no reason"
