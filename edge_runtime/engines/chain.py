"""Which engine runs the graph: the first of a list that this machine can run, with the reason for every one before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from edge_runtime.engines.onnx import OrtBackend
from edge_runtime.engines.protocol import Backend
from edge_runtime.engines.tensorrt import TensorRTBackend
from kcm.errors import ConfigError, EngineError

Make = Callable[[], Backend]


def _onnx_cuda() -> Backend:
    # TF32 keeps 10 bits of the fraction: decisions near ε would differ from the CPU's.
    return OrtBackend("onnx-cuda", "CUDAExecutionProvider", {"use_tf32": "0"})


# In the order of "auto": the fastest first, and what always runs last.
BACKENDS: dict[str, Make] = {
    "tensorrt": lambda: TensorRTBackend("tensorrt"),
    "tensorrt-rtx": lambda: TensorRTBackend("tensorrt-rtx"),
    "onnx-cuda": _onnx_cuda,
    "onnx-tensorrt": lambda: OrtBackend("onnx-tensorrt", "TensorrtExecutionProvider"),
    "onnx-cpu": lambda: OrtBackend("onnx-cpu"),
}
AUTO = ("tensorrt", "tensorrt-rtx", "onnx-cuda", "onnx-cpu")


class Skipped(msgspec.Struct, frozen=True):
    """An engine that was asked for and isn't used."""

    name: str
    reason: str


def named(names: Sequence[str]) -> list[Backend]:
    """Backends by name, in order; "auto" stands for AUTO.

    Raises:
        ConfigError: an unknown name.
    """
    chosen: list[str] = []
    for name in names:
        chosen += AUTO if name == "auto" else [name]
    for name in chosen:
        if name not in BACKENDS:
            raise ConfigError(f"engine {name!r} is unknown", fix=f"one of auto, {', '.join(BACKENDS)}")
    return [BACKENDS[name]() for name in dict.fromkeys(chosen)]


def usable(backends: Sequence[Backend]) -> tuple[list[Backend], list[Skipped]]:
    """Those that this machine can run, in order, and why not the others.

    Raises:
        EngineError: none; the message names every reason.
    """
    reasons = {backend.name: backend.probe() for backend in backends}
    skipped = [Skipped(name, reason) for name, reason in reasons.items() if reason]
    left = [backend for backend in backends if not reasons[backend.name]]
    if not left:
        said = "; ".join(f"{skip.name}: {skip.reason}" for skip in skipped)
        raise EngineError(f"no engine can run here: {said}", fix="add onnx-cpu to the list; kcm doctor   shows what this machine has")
    return left, skipped
