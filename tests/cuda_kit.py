"""CUDA's runtime without a GPU: memory on two sides that can't see each other; what is queued runs when its stream is waited for.

A call on what isn't allowed (an address that was given back, a stream that captures) fails with CUDA's own error, as on a device.
"""

from __future__ import annotations

import ctypes
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda.bindings import runtime as real


def cuda_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Counts a call, and lets it fail where a test asked for that. The first of the answer is the error, as in cuda.bindings."""

    @functools.wraps(function)
    def call(self: FakeCuda, *arguments: Any) -> tuple[Any, ...]:
        name = function.__name__
        self.calls[name] += 1
        planned = self.fail.get(name)
        # (code, n): from the nth call on, once
        if planned is not None and self.calls[name] >= planned[1]:
            del self.fail[name]
            if name == "cudaStreamEndCapture":
                self._capturing.pop(int(arguments[0]), None)  # that it ends is what a failure has in common with a success
            return (real.cudaError_t(planned[0]), *[None] * (name in _ANSWERS))
        try:
            answer = function(self, *arguments)
        except CudaError as error:
            return (error.code, *[None] * (name in _ANSWERS))
        return (real.cudaError_t.cudaSuccess, *([answer] if name in _ANSWERS else []))

    return call


_ANSWERS = {
    "cudaGetDeviceCount",
    "cudaGetDeviceProperties",
    "cudaMalloc",
    "cudaMallocHost",
    "cudaStreamCreateWithFlags",
    "cudaStreamEndCapture",
    "cudaGraphInstantiate",
}


class CudaError(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.code = getattr(real.cudaError_t, name)


class Handle:
    """An opaque pointer: only int() tells its number."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __int__(self) -> int:
        return self._number


class FakeCuda:
    """cuda.bindings.runtime with one device."""

    cudaError_t = real.cudaError_t
    cudaMemcpyKind = real.cudaMemcpyKind
    cudaStreamCaptureMode = real.cudaStreamCaptureMode
    cudaStreamNonBlocking = real.cudaStreamNonBlocking

    def __init__(self, capability: tuple[int, int] = (8, 6)) -> None:
        self.capability, self.devices = capability, 1
        self.fail: dict[str, tuple[int, int]] = {}  # call → (error, on its nth time)
        self.calls: Counter[str] = Counter()
        self._blocks: dict[int, tuple[str, Any, int]] = {}  # address → side, memory, size
        self._freed: list[Any] = []  # stays mapped: who reads it sees 0xAA, not a crash
        self._next = 0x5000
        self._streams: dict[int, list[Callable[[], None]]] = {}
        self._capturing: dict[int, list[Callable[[], None]]] = {}
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._executables: dict[int, list[Callable[[], None]]] = {}

    def live(self) -> dict[str, int]:
        """What hasn't been given back, by kind."""
        found = Counter(side for side, _, _ in self._blocks.values())
        found |= {"stream": len(self._streams), "graph": len(self._graphs), "executable": len(self._executables)}
        return {kind: count for kind, count in found.items() if count}

    def allocated(self) -> dict[str, list[int]]:
        """Sizes by side."""
        return {side: [size for s, _, size in self._blocks.values() if s == side] for side in ("device", "host")}

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        if stream not in self._streams:
            raise CudaError("cudaErrorInvalidResourceHandle")
        self._capturing.get(stream, self._streams[stream]).append(work)

    def is_capturing(self, stream: int) -> bool:
        return stream in self._capturing

    def at(self, side: str, address: int, size: int) -> Any:
        """The bytes there, if all of them belong to one live block of that side."""
        for start, (kind, memory, total) in self._blocks.items():
            if kind == side and start <= address and address + size <= start + total:
                return np.frombuffer(memory, np.uint8, size, address - start)
        raise CudaError("cudaErrorInvalidValue")

    @cuda_call
    def cudaGetDeviceCount(self) -> int:
        return self.devices

    @cuda_call
    def cudaGetDeviceProperties(self, device: int) -> Any:
        found = real.cudaDeviceProp()
        found.name, found.major, found.minor, found.totalGlobalMem = b"Fake RTX".ljust(256, b"\0"), *self.capability, 8 * 2**30
        return found

    @cuda_call
    def cudaMalloc(self, size: int) -> int:
        return self._allocate("device", size)

    @cuda_call
    def cudaMallocHost(self, size: int) -> int:
        return self._allocate("host", size)

    @cuda_call
    def cudaFree(self, address: int) -> None:
        self._release("device", address)

    @cuda_call
    def cudaFreeHost(self, address: int) -> None:
        self._release("host", address)

    @cuda_call
    def cudaMemcpyAsync(self, to: int, start: int, size: int, kind: Any, stream: Any) -> None:
        up = kind == real.cudaMemcpyKind.cudaMemcpyHostToDevice
        assert up or kind == real.cudaMemcpyKind.cudaMemcpyDeviceToHost
        sides = ("device", "host") if up else ("host", "device")
        self.at(sides[0], to, size), self.at(sides[1], start, size)

        def copy() -> None:
            self.at(sides[0], to, size)[:] = self.at(sides[1], start, size)

        self.enqueue(int(stream), copy)

    @cuda_call
    def cudaStreamCreateWithFlags(self, flags: int) -> Handle:
        assert flags == real.cudaStreamNonBlocking
        handle = self._handle()
        self._streams[int(handle)] = []
        return handle

    @cuda_call
    def cudaStreamDestroy(self, stream: Any) -> None:
        self._streams.pop(int(stream))

    @cuda_call
    def cudaStreamSynchronize(self, stream: Any) -> None:
        if int(stream) in self._capturing:
            raise CudaError("cudaErrorStreamCaptureUnsupported")
        queued, self._streams[int(stream)] = self._streams[int(stream)], []
        for work in queued:
            work()

    @cuda_call
    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        assert mode == real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._capturing[int(stream)] = []

    @cuda_call
    def cudaStreamEndCapture(self, stream: Any) -> Handle:
        handle = self._handle()
        self._graphs[int(handle)] = self._capturing.pop(int(stream))
        return handle

    @cuda_call
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Handle:
        handle = self._handle()
        self._executables[int(handle)] = list(self._graphs[int(graph)])
        return handle

    @cuda_call
    def cudaGraphLaunch(self, executable: Any, stream: Any) -> None:
        for work in self._executables[int(executable)]:
            self.enqueue(int(stream), work)

    @cuda_call
    def cudaGraphExecDestroy(self, executable: Any) -> None:
        del self._executables[int(executable)]

    @cuda_call
    def cudaGraphDestroy(self, graph: Any) -> None:
        del self._graphs[int(graph)]

    def _allocate(self, side: str, size: int) -> int:
        assert size > 0
        memory = ctypes.create_string_buffer(b"\x55" * size, size)
        address = ctypes.addressof(memory)
        self._blocks[address] = (side, memory, size)
        return address

    def _release(self, side: str, address: int) -> None:
        if self._blocks.get(address, ("",))[0] != side:
            raise CudaError("cudaErrorInvalidValue")
        memory = self._blocks.pop(address)[1]
        ctypes.memset(memory, 0xAA, len(memory))
        self._freed.append(memory)

    def _handle(self) -> Handle:
        self._next += 16
        return Handle(self._next)
