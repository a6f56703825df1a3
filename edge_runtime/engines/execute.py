"""Running a plan: one execution context, one stream, memory for the largest shape. The same for TensorRT 10.3 to 11 and TensorRT-RTX."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines import cuda
from edge_runtime.engines.compile import logger_of, output_types
from edge_runtime.engines.protocol import OUTPUTS, Outputs
from kcm.errors import BundleError, EngineError

if TYPE_CHECKING:
    from kcm.bundle import GraphSpec
    from kcm.preprocess import Inputs

log = logging.getLogger("kcm.edge.tensorrt")

Shape = tuple[int, ...]
_GRAPHS_KEPT = 8


class TensorRTEngine:
    """A deserialized plan with its context, stream and buffers. Outputs are copies: they outlive the next call and the engine."""

    def __init__(self, trt: Any, plan: bytes, graph: GraphSpec, classes: int, *, provider: str, cuda_graphs: bool = False) -> None:
        """
        Args:
            trt: the library's module.
            graph: the signature that the manifest promises.
            classes: C.

        Raises:
            BundleError: the plan has another signature.
            EngineError: it can't be loaded here, or CUDA failed. Nothing stays allocated.
        """
        self.provider = provider
        self._trt, self._log = trt, logger_of(trt)
        self._runtime: Any = None
        self._engine: Any = None
        self._config: Any = None
        self._lane: _Lane | None = None
        self._stream: cuda.Stream | None = None
        self._inputs: list[_Tensor] = []
        self._outputs: list[_Tensor] = []
        self._own_graphs = cuda_graphs and not hasattr(trt, "ComputeCapability")
        self._graphs: OrderedDict[tuple[Shape, ...], _Lane | None] = OrderedDict()  # None: seen once, not captured yet
        try:
            self._log.errors.clear()
            self._runtime = trt.Runtime(self._log)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise EngineError(f"{provider} can't load the plan: {self._log.take_errors()}")
            if cuda_graphs and not self._own_graphs:
                # TensorRT-RTX captures by itself, for every shape.
                self._config = self._engine.create_runtime_config()
                self._config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self._check_signature(graph, classes)
            self._stream = cuda.Stream()
            self._lane = self._largest_lane(graph)
        except BaseException:
            self.close()
            raise

    def infer(self, inputs: Inputs) -> Outputs:
        """
        Raises:
            EngineError: inputs of another name, type or shape, beyond what was built, or a failure of the device.
        """
        if self._lane is None or self._stream is None:
            raise EngineError(f"{self.provider}: the engine is closed")
        try:
            shapes = tuple(inputs[tensor.name].shape for tensor in self._inputs)
        except KeyError as error:
            raise EngineError(f"{self.provider}: input {error.args[0]!r} is missing") from None
        lane = self._graphs.get(shapes) or self._lane
        if lane.shapes != shapes:
            self._check_shapes(shapes)
            lane.reshape(shapes)
        for tensor, view in zip(self._inputs, lane.given, strict=True):
            array = inputs[tensor.name]
            if array.dtype != tensor.dtype:
                raise EngineError(f"{self.provider}: input {tensor.name!r} is {array.dtype}, expected {tensor.dtype}")
            view[...] = array
        lane.run(self._stream)
        outputs = Outputs(*(view.copy() for view in lane.results))
        if self._own_graphs:
            self._remember(shapes, self._stream)
        return outputs

    def close(self) -> None:
        """Give back all that the device holds; a second time does nothing. Whoever drops the engine without it gets the same."""
        if self._stream is not None:
            self._stream.settle()
        for lane in (self._lane, *self._graphs.values()):
            if lane is not None:
                lane.close()
        self._graphs.clear()
        # In this order: each stands on the next, and none of them holds it.
        self._lane = self._config = self._engine = self._runtime = None
        for tensor in (*self._inputs, *self._outputs):
            tensor.close()
        self._inputs, self._outputs = [], []
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __del__(self) -> None:
        if not sys.is_finalizing():
            with contextlib.suppress(AttributeError):  # __init__ was given wrong arguments
                self.close()

    def _check_signature(self, graph: GraphSpec, classes: int) -> None:
        trt, engine, dtypes = self._trt, self._engine, _numpy_types(self._trt)
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE or engine.get_tensor_dtype(name) not in dtypes:
                raise BundleError(f"the engine's {name!r} is {engine.get_tensor_dtype(name)}, which isn't supported")
            tensor = _Tensor(name, dtypes[engine.get_tensor_dtype(name)], tuple(engine.get_tensor_shape(name)))
            (self._inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else self._outputs).append(tensor)
        inputs = [tensor.name for tensor in self._inputs]
        if set(inputs) != set(graph.inputs):
            raise BundleError(f"the engine reads {', '.join(inputs)}; its manifest says {', '.join(graph.inputs)}")
        for tensor in self._inputs:
            if any(size not in (-1, graph.inputs[tensor.name]) for size in tensor.dims[1:2]):
                raise BundleError(
                    f"the engine's {tensor.name!r} has shape {list(tensor.dims)}; its manifest says {graph.inputs[tensor.name]}"
                )
        outputs = {tensor.name: tensor for tensor in self._outputs}
        for name, dtype in output_types(trt).items():
            if name not in outputs:
                raise BundleError(f"the engine has no output {name!r}, only {', '.join(outputs)}")
            if outputs[name].dtype != dtypes[dtype]:
                raise BundleError(f"output {name!r} is {outputs[name].dtype}, expected {dtypes[dtype]}")
        for name, width in (("logits", classes), ("top_ids", graph.candidates), ("top_probs", graph.candidates)):
            if len(outputs[name].dims) != 2 or outputs[name].dims[1] not in (-1, width):
                raise BundleError(f"output {name!r} has shape {list(outputs[name].dims)}, expected [batch, {width}]")

    def _largest_lane(self, graph: GraphSpec) -> _Lane:
        """A lane at the largest shape, and every tensor's memory as that needs it: addresses then stay for good."""
        largest = []
        for tensor in self._inputs:
            tensor.largest = tuple(self._engine.get_tensor_profile_shape(tensor.name, 0)[2])
            tensor.longest = graph.inputs[tensor.name]
            largest.append(tensor.at(graph.max_batch, tensor.longest))
            if any(size > most for size, most in zip(largest[-1], tensor.largest, strict=True)):
                raise EngineError(
                    f"{self.provider}: the plan takes {tensor.name!r} up to {tensor.largest}, the manifest says {largest[-1]}"
                )
            tensor.allocate(tensor.largest)
        lane = self._lane = self._new_lane()
        sizes = lane.set_shapes(tuple(tensor.largest for tensor in self._inputs))
        for tensor in self._outputs:
            tensor.allocate(sizes[tensor.name])
        lane.set_addresses()
        lane.reshape(tuple(largest))
        return lane

    def _new_lane(self) -> _Lane:
        # A context takes its strategy at creation; without one the call has no argument on any version.
        engine = self._engine
        context = engine.create_execution_context() if self._config is None else engine.create_execution_context(self._config)
        del engine  # who keeps the error below must not keep the engine
        if context is None:
            raise EngineError(f"{self.provider} made no execution context: {self._log.take_errors()}")
        return _Lane(context, self._inputs, self._outputs, self.provider, self._log)

    def _check_shapes(self, shapes: tuple[Shape, ...]) -> None:
        """All inputs of one B, those with one largest length of one L, within what was built."""
        batch = shapes[0][0] if shapes[0] else 0
        lengths: dict[int, int] = {}
        for tensor, shape in zip(self._inputs, shapes, strict=True):
            free = [size for size, dim in zip(shape[1:], tensor.dims[1:]) if dim == -1]  # noqa: B905  the next check sees to it
            length = lengths.setdefault(tensor.longest, free[0]) if free else 0
            if shape != tensor.at(batch, length) or 0 in shape:
                raise EngineError(f"{self.provider}: input {tensor.name!r} has shape {shape}, expected {tensor.at(batch, length)}")
            if any(size > most for size, most in zip(shape, tensor.largest, strict=True)):
                raise EngineError(f"{self.provider}: input {tensor.name!r} has shape {shape}, it was built up to {tensor.largest}")

    def _remember(self, shapes: tuple[Shape, ...], stream: cuda.Stream) -> None:
        """Capture a shape when it comes the second time.

        Each graph has a context of its own: TensorRT leaves undefined what a graph does whose context has changed since.
        """
        if shapes not in self._graphs:
            self._graphs[shapes] = None
        elif self._graphs[shapes] is None:
            lane = None
            try:
                lane = self._new_lane()
                lane.set_addresses()
                lane.reshape(shapes)
                lane.run(stream)  # once uncaptured: a context puts off work after a change of shape, which a graph can't hold
                lane.graph = stream.capture(lambda: lane.queue(stream))
            except EngineError as error:  # the answer is there already
                log.warning("%s goes on without CUDA graphs: %s", self.provider, error.message)
                self._own_graphs = False
                if lane is not None:
                    lane.close()
                return
            self._graphs[shapes] = lane
        self._graphs.move_to_end(shapes)
        if len(self._graphs) > _GRAPHS_KEPT:
            _, old = self._graphs.popitem(last=False)
            if old is not None:
                old.close()


class _Tensor:
    """One input or output: name, type, shape with −1 for what is free, and its memory on both sides."""

    def __init__(self, name: str, dtype: np.dtype[Any], dims: Shape) -> None:
        self.name, self.dtype, self.dims = name, dtype, dims
        self.longest = 0  # its largest length, as the manifest says
        self.largest: Shape = ()  # of the plan
        self.memory: cuda.Mirror | None = None

    def at(self, batch: int, length: int) -> Shape:
        return tuple(dim if dim != -1 else length if axis else batch for axis, dim in enumerate(self.dims))

    def bytes_of(self, shape: Shape) -> int:
        return int(np.prod(shape)) * self.dtype.itemsize

    def allocate(self, shape: Shape) -> None:
        self.memory = cuda.Mirror(self.bytes_of(shape))

    @property
    def mirror(self) -> cuda.Mirror:
        assert self.memory is not None
        return self.memory

    def view(self, shape: Shape) -> NDArray[Any]:
        return self.mirror.host[: self.bytes_of(shape)].view(self.dtype).reshape(shape)

    def close(self) -> None:
        if self.memory is not None:
            self.memory.close()
            self.memory = None


class _Lane:
    """An execution context, what is set on it, and the views that belong to its shape: a call allocates nothing but its answer."""

    def __init__(self, context: Any, inputs: list[_Tensor], outputs: list[_Tensor], provider: str, said: Any) -> None:
        self._context, self._inputs, self._outputs, self._provider, self._log = context, inputs, outputs, provider, said
        self.shapes: tuple[Shape, ...] = ()
        self.given: list[NDArray[Any]] = []
        self.results: list[NDArray[Any]] = []  # in the order of OUTPUTS
        self.graph: cuda.Graph | None = None
        self._uploads: list[tuple[cuda.Mirror, int]] = []
        self._downloads: list[tuple[cuda.Mirror, int]] = []

    def set_shapes(self, shapes: tuple[Shape, ...]) -> dict[str, Shape]:
        """Tell the context the inputs' shapes; the outputs' that follow."""
        self.shapes = ()  # nothing holds until all of it is set
        for tensor, shape in zip(self._inputs, shapes, strict=True):
            if not self._context.set_input_shape(tensor.name, shape):
                raise EngineError(f"{self._provider} refuses shape {shape} of {tensor.name!r}: {self._log.take_errors()}")
        if missing := self._context.infer_shapes():
            raise EngineError(f"{self._provider} can't tell the outputs' shapes: {', '.join(missing)} is open")
        found = {tensor.name: tuple(self._context.get_tensor_shape(tensor.name)) for tensor in self._outputs}
        if unknown := [name for name, shape in found.items() if any(size < 0 for size in shape)]:
            raise EngineError(f"{self._provider} can't tell the shape of output {unknown[0]!r}: it depends on the data")
        return found

    def set_addresses(self) -> None:
        for tensor in (*self._inputs, *self._outputs):
            if not self._context.set_tensor_address(tensor.name, tensor.mirror.device):
                raise EngineError(f"{self._provider} refuses the address of {tensor.name!r}: {self._log.take_errors()}")

    def reshape(self, shapes: tuple[Shape, ...]) -> None:
        found = self.set_shapes(shapes)
        outputs = {tensor.name: tensor for tensor in self._outputs}
        self.given = [tensor.view(shape) for tensor, shape in zip(self._inputs, shapes, strict=True)]
        self.results = [outputs[name].view(found[name]) for name in OUTPUTS]
        self._uploads = [(tensor.mirror, tensor.bytes_of(shape)) for tensor, shape in zip(self._inputs, shapes, strict=True)]
        self._downloads = [(outputs[name].mirror, outputs[name].bytes_of(found[name])) for name in OUTPUTS]
        self.shapes = shapes

    def run(self, stream: cuda.Stream) -> None:
        """Run what lies in `given`; `results` hold the outputs afterwards."""
        try:
            if self.graph is not None:
                stream.launch(self.graph)
            else:
                self.queue(stream)
            stream.synchronize()
        except BaseException:
            stream.settle()  # what was queued before the failure still reads and writes this memory
            raise

    def queue(self, stream: cuda.Stream) -> None:
        """Copies up, the run, copies down."""
        for mirror, size in self._uploads:
            mirror.upload(stream, size)
        if not self._context.execute_async_v3(stream.handle):
            raise EngineError(f"{self._provider} didn't run the batch: {self._log.take_errors()}")
        for mirror, size in self._downloads:
            mirror.download(stream, size)

    def close(self) -> None:
        if self.graph is not None:
            self.graph.close()
        self.graph = self._context = None
        self.given, self.results = [], []


def _numpy_types(trt: Any) -> dict[Any, np.dtype[Any]]:
    """Own table: the library's nptype differs between versions, and fails on a type that NumPy lacks."""
    kinds = trt.DataType
    pairs = ((kinds.FLOAT, np.float32), (kinds.HALF, np.float16), (kinds.INT32, np.int32), (kinds.INT64, np.int64), (kinds.UINT8, np.uint8))
    return {kind: np.dtype(scalar) for kind, scalar in pairs}
