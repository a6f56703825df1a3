"""TensorRT's execution path without a GPU, so that our code for it can be driven; CUDA's runtime is cuda_kit.py's.

What is faked is what needs hardware. A "plan" is an ONNX model that ONNX Runtime runs when the stream is waited for, so that outputs are
real. What TensorRT leaves undefined fails: a context that changes under a captured graph, a capture before the first run of a shape.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import json
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort
import pytest
from cuda_kit import FakeCuda

from edge_runtime.engines.plans import PlanCache, PlanKey

_MAGIC = b"fake plan\n"
_KINDS = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int32)": "INT32", "tensor(int64)": "INT64", "tensor(uint8)": "UINT8"}
_KINDS |= {"tensor(bool)": "BOOL"}
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8}


class _Here:
    """What a test has put in place; the classes below look here, since TensorRT's own take no such argument."""

    cuda = FakeCuda()
    fail: ClassVar[Counter[str]] = Counter()  # call → how many times it is still to fail
    live: ClassVar[Counter[str]] = Counter()  # contexts and engines that exist

    @classmethod
    def fails(cls, name: str) -> bool:
        cls.fail[name] -= 1
        return cls.fail[name] >= 0


class _Kind:
    """A value of an enumeration."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


class DataType:
    FLOAT, HALF, INT32, INT64, UINT8, BOOL = map(_Kind, ("FLOAT", "HALF", "INT32", "INT64", "UINT8", "BOOL"))


class TensorIOMode:
    INPUT, OUTPUT = _Kind("INPUT"), _Kind("OUTPUT")


class TensorLocation:
    DEVICE, HOST = _Kind("DEVICE"), _Kind("HOST")


class CudaGraphStrategy:
    DISABLED, WHOLE_GRAPH_CAPTURE = _Kind("DISABLED"), _Kind("WHOLE_GRAPH_CAPTURE")


class ComputeCapability:
    SM80, SM86, SM89, SM120 = map(_Kind, ("SM80", "SM86", "SM89", "SM120"))
    __members__: ClassVar[dict[str, _Kind]] = {"SM80": SM80, "SM86": SM86, "SM89": SM89, "SM120": SM120}


class ILogger:
    class Severity:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = map(_Kind, ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"))

    def __init__(self) -> None:
        self._made = True

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        assert logger._made
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        if not serialized_engine.startswith(_MAGIC) or _Here.fails("deserialize_cuda_engine"):
            self._logger.log(ILogger.Severity.INFO, "Loaded engine size: 0 MiB")
            self._logger.log(ILogger.Severity.ERROR, "Serialized engine has wrong magic tag")
            return None
        return ICudaEngine(self, serialized_engine.removeprefix(_MAGIC))


class ICudaEngine:
    def __init__(self, runtime: Runtime, plan: bytes) -> None:
        head, _, model = plan.partition(b"\n")
        self._runtime, self._head = runtime, json.loads(head)
        self._session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        self._inputs = {node.name: node for node in self._session.get_inputs()}
        self._outputs = {node.name: node for node in self._session.get_outputs()}
        self._names = [*self._inputs, *self._outputs]
        self._live = _Here.live  # that of its test, whenever it goes
        self._live["engine"] += 1

    def __del__(self) -> None:
        self._live["engine"] -= 1

    @property
    def num_io_tensors(self) -> int:
        return len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return TensorLocation.HOST if name in self._head["on_host"] else TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> Any:
        node = self._inputs.get(name) or self._outputs[name]
        return getattr(DataType, _KINDS[node.type])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        node = self._inputs.get(name) or self._outputs[name]
        return tuple(size if isinstance(size, int) else -1 for size in node.shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert profile_index == 0
        free = self.get_tensor_shape(name)
        at = (self._head["max_batch"], self._head["inputs"].get(name, 0))
        least = tuple(1 if size == -1 else size for size in free)
        most = tuple(at[min(axis, 1)] if size == -1 else size for axis, size in enumerate(free))
        return [least, most, most]

    def create_execution_context(self, runtime_config: IRuntimeConfig | None = None) -> IExecutionContext | None:
        if _Here.fails("create_execution_context"):
            self._runtime._logger.log(ILogger.Severity.ERROR, "out of device memory")
            return None
        return IExecutionContext(self, runtime_config)

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()


class IRuntimeConfig:
    def __init__(self) -> None:
        self._strategy = CudaGraphStrategy.DISABLED

    @property
    def cuda_graph_strategy(self) -> Any:
        return self._strategy

    @cuda_graph_strategy.setter
    def cuda_graph_strategy(self, strategy: Any) -> None:
        self._strategy = strategy


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig | None) -> None:
        self._engine, self._config = engine, config
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._changes = 0
        self._put_off = True  # work that the first run after a change of shape does, and that no capture can hold
        self._live = _Here.live  # that of its test, whenever it goes
        self._live["context"] += 1

    def __del__(self) -> None:
        self._live["context"] -= 1

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine.get_tensor_profile_shape(name, 0)
        fits = len(shape) == len(least) and all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True))
        if not fits or _Here.fails("set_input_shape"):
            self._said(f"shape {shape} of {name} does not satisfy the profile")
            return False
        self._shapes[name] = shape
        self._changes, self._put_off = self._changes + 1, True
        return True

    def infer_shapes(self) -> list[str]:
        if _Here.fails("infer_shapes"):
            return ["ids"]
        return [name for name in self._engine._inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        known = {
            symbol: size
            for given, shape in self._shapes.items()
            for symbol, size in zip(self._engine._inputs[given].shape, shape, strict=True)
        }
        return tuple(size if isinstance(size, int) else known.get(size, -1) for size in self._engine._outputs[name].shape)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._names or _Here.fails("set_tensor_address"):
            self._said(f"no such tensor: {name}")
            return False
        self._addresses[name] = memory
        self._changes += 1
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda = _Here.cuda
        wants = [name for name in self._engine._names if name not in self._addresses]
        if wants or _Here.fails("execute_async_v3"):
            self._said(f"no address for {wants}")
            return False
        if cuda.is_capturing(stream_handle) and self._put_off:
            self._said("cudaErrorStreamCaptureUnsupported: the shapes have changed")
            return False
        self._put_off = False
        shapes, addresses, changes = dict(self._shapes), dict(self._addresses), self._changes
        outputs = {name: self.get_tensor_shape(name) for name in self._engine._outputs}

        def work() -> None:
            assert self._changes == changes, "undefined: the context has changed since this was queued or captured"
            given = {name: _array(cuda, self._engine, name, addresses[name], shapes[name]).copy() for name in self._engine._inputs}
            results = self._engine._session.run(list(outputs), given)
            for (name, shape), result in zip(outputs.items(), results, strict=True):
                _array(cuda, self._engine, name, addresses[name], shape)[...] = result

        cuda.enqueue(stream_handle, work)
        return True

    def _said(self, text: str) -> None:
        self._engine._runtime._logger.log(ILogger.Severity.ERROR, text)


def _array(cuda: FakeCuda, engine: ICudaEngine, name: str, address: int, shape: tuple[int, ...]) -> Any:
    dtype = np.dtype(_NUMPY[engine.get_tensor_dtype(name).name])
    return cuda.at("device", address, int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)


# By the API's name, for whoever compares them with it.
FAKES: dict[str, type] = {
    fake.__name__: fake
    for fake in (
        Runtime,
        ICudaEngine,
        IRuntimeConfig,
        IExecutionContext,
        ILogger,
        DataType,
        TensorIOMode,
        TensorLocation,
        CudaGraphStrategy,
    )
}


def fake_plan(model: bytes, *, max_batch: int, inputs: dict[str, int], on_host: tuple[str, ...] = ()) -> bytes:
    head = {"max_batch": max_batch, "inputs": inputs, "on_host": on_host}
    return _MAGIC + json.dumps(head).encode() + b"\n" + model


def fake_trt(version: str, *, rtx: bool = False) -> Any:
    """The module, as a version of it would be: TensorRT-RTX's own names are there only in its own."""
    name = "tensorrt_rtx" if rtx else "tensorrt"
    module: Any = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__version__ = version
    for fake in FAKES.values():
        if rtx or fake not in (IRuntimeConfig, CudaGraphStrategy):
            setattr(module, fake.__name__, fake)
    if rtx:
        module.ComputeCapability = ComputeCapability
    return module


class Gpu:
    """The device and the library that are in place, and what is to go wrong with them."""

    def __init__(self, cuda: FakeCuda, trt: Any, cache: PlanCache) -> None:
        self.cuda, self.trt, self.cache, self.fail = cuda, trt, cache, _Here.fail

    def live(self) -> dict[str, int]:
        return {**self.cuda.live(), **{kind: count for kind, count in _Here.live.items() if count}}

    def put(self, key: PlanKey, model: bytes, **more: Any) -> None:
        """A plan, as if it had been built."""
        self.cache.write(key, fake_plan(model, max_batch=key.max_batch, inputs=key.inputs, **more), 1.0)


@contextlib.contextmanager
def fake_gpu(
    patch: pytest.MonkeyPatch, folder: Path, *, version: str = "10.3.0", rtx: bool = False, capability: tuple[int, int] = (8, 6)
) -> Iterator[Gpu]:
    """Put one in place, and take nothing for granted of what an earlier test left."""
    cuda, trt = FakeCuda(capability), fake_trt(version, rtx=rtx)
    _Here.cuda, _Here.fail, _Here.live = cuda, Counter(), Counter()
    patch.setattr("cuda.bindings.runtime", cuda)
    patch.setattr("edge_runtime.engines.cuda._has_driver", lambda: True)
    patch.setitem(sys.modules, trt.__name__, trt)
    yield Gpu(cuda, trt, PlanCache(folder / "engines"))
