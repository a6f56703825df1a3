"""CUDA by cuda.bindings: is there a device, and the memory, streams and graphs of an engine that runs on it.

Always device 0: CUDA_VISIBLE_DEVICES says which one that is. Every call's error code is looked at: what fails raises an
EngineError with the call, the error's name and its number; what fails while something is given back is logged, since it
mustn't hide the failure that led there.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kcm.errors import EngineError

log = logging.getLogger("kcm.edge.cuda")

_FIXES = {
    2: "free device memory, or export with a smaller max_batch",
    35: "install or update the NVIDIA driver; nvidia-smi shows its version",
    100: "nvidia-smi shows the devices; CUDA_VISIBLE_DEVICES must not hide them",
}


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """What one GPU is."""

    name: str
    capability: tuple[int, int]  # compute capability, major and minor
    memory: int  # bytes

    @property
    def target(self) -> str:
        """ "sm86" for compute capability 8.6."""
        return f"sm{self.capability[0]}{self.capability[1]}"


def why_no_device() -> str:
    """Why no CUDA device can be used; empty where one can. TensorRT must not be touched before: without a driver its runtime crashes."""
    if not _has_driver():
        return f"no CUDA device: the NVIDIA driver's libcuda.so.1 is not there (CUDA's error 35); fix: {_FIXES[35]}"
    try:
        from cuda.bindings import runtime
    except ModuleNotFoundError:
        return "cuda.bindings is not installed; fix: pip install 'kcm[tensorrt]'"
    error, count = runtime.cudaGetDeviceCount()
    if int(error):
        fix = _FIXES.get(int(error), "nvidia-smi shows what is wrong")
        return f"no CUDA device: {error.name} (error {int(error)}); fix: {fix}"
    return "" if count else f"no CUDA device; fix: {_FIXES[100]}"


def _has_driver() -> bool:
    """Asked first: importing cuda.bindings takes 16 MB, which a device without a GPU would keep for nothing."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def device() -> Device:
    """The GPU that is used. Makes no CUDA context.

    Raises:
        EngineError: CUDA says no.
    """
    runtime = _runtime()
    found = _checked(runtime.cudaGetDeviceProperties, 0)
    name = found.name.partition(b"\0")[0].decode(errors="replace")
    return Device(name=name, capability=(found.major, found.minor), memory=found.totalGlobalMem)


class Stream:
    """A queue of work on the device. Non-blocking: it doesn't wait for the default stream, on which TensorRT would synchronise."""

    def __init__(self) -> None:
        self._runtime = _runtime()
        self._stream: Any = _checked(self._runtime.cudaStreamCreateWithFlags, self._runtime.cudaStreamNonBlocking)
        self.handle = int(self._stream)

    def synchronize(self) -> None:
        """Wait until all that was queued is done. What failed on the device is raised here."""
        _checked(self._runtime.cudaStreamSynchronize, self._stream)

    def capture(self, queue: Callable[[], None]) -> Graph:
        """What `queue` queues, recorded instead of run.

        Raises:
            EngineError: it can't be captured. The stream can be used as before.
        """
        runtime = self._runtime
        # thread-local: other threads (the next engine that loads) may go on allocating.
        _checked(runtime.cudaStreamBeginCapture, self._stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            queue()
        except BaseException:
            error, graph = runtime.cudaStreamEndCapture(self._stream)  # a stream that captures can do nothing else
            if not int(error) and int(graph):
                _freed(runtime.cudaGraphDestroy, graph)
            raise
        graph = _checked(runtime.cudaStreamEndCapture, self._stream)
        try:
            return Graph(runtime, _checked(runtime.cudaGraphInstantiate, graph, 0))
        finally:
            _freed(runtime.cudaGraphDestroy, graph)

    def launch(self, graph: Graph) -> None:
        """Queue all that the graph recorded, in one call."""
        _checked(self._runtime.cudaGraphLaunch, graph.executable, self._stream)

    def settle(self) -> None:
        """Wait before what the queue uses is given back; a failure was raised before, or is logged here."""
        _freed(self._runtime.cudaStreamSynchronize, self._stream)

    def close(self) -> None:
        if self.handle:
            self.handle = 0
            _freed(self._runtime.cudaStreamDestroy, self._stream)


class Graph:
    """Recorded work with its addresses and shapes fixed."""

    def __init__(self, runtime: Any, executable: Any) -> None:
        self._runtime, self.executable = runtime, executable

    def close(self) -> None:
        if self.executable is not None:
            executable, self.executable = self.executable, None
            _freed(self._runtime.cudaGraphExecDestroy, executable)


class Mirror:
    """A tensor's memory twice: `host` is page-locked, so that copies from and to `device` run beside the CPU."""

    def __init__(self, size: int) -> None:
        """
        Args:
            size: bytes.

        Raises:
            EngineError: no memory; nothing stays allocated.
        """
        self._runtime = _runtime()
        self.size, self.device, self._address = size, 0, 0
        try:
            self.device = int(_checked(self._runtime.cudaMalloc, size))
            self._address = int(_checked(self._runtime.cudaMallocHost, size))
        except BaseException:
            self.close()
            raise
        self.host: NDArray[np.uint8] = np.frombuffer(memoryview((ctypes.c_uint8 * size).from_address(self._address)), np.uint8)

    def upload(self, stream: Stream, size: int) -> None:
        """Queue a copy of the first `size` bytes, host to device."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        _checked(self._runtime.cudaMemcpyAsync, self.device, self._address, size, kind, stream.handle)

    def download(self, stream: Stream, size: int) -> None:
        """Queue a copy of the first `size` bytes, device to host."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        _checked(self._runtime.cudaMemcpyAsync, self._address, self.device, size, kind, stream.handle)

    def close(self) -> None:
        """Give both back. A view of `host` that outlives this points nowhere."""
        self.host = np.empty(0, np.uint8)
        if self.device:
            _freed(self._runtime.cudaFree, self.device)
        if self._address:
            _freed(self._runtime.cudaFreeHost, self._address)
        self.device = self._address = 0


def _runtime() -> Any:
    from cuda.bindings import runtime

    return runtime


def _checked(function: Callable[..., Any], *arguments: object) -> Any:
    """The call's result, its error code looked at and taken off."""
    error, *results = function(*arguments)
    if int(error):
        fix = _FIXES.get(int(error), "")
        raise EngineError(f"CUDA: {function.__name__} failed with {error.name} (error {int(error)})", fix=fix)
    return results[0] if results else None


def _freed(function: Callable[..., Any], argument: object) -> None:
    error = function(argument)[0]
    if int(error):
        log.error("CUDA: %s failed with %s (error %d)", function.__name__, error.name, int(error))
