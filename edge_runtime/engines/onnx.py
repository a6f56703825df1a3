"""ONNX Runtime: on the CPU, with CUDA, or through its TensorRT provider."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines.protocol import OUTPUTS, Outputs
from kcm.errors import BundleError, EngineError, MissingExtraError, require

if TYPE_CHECKING:
    from kcm.bundle import GraphSpec
    from kcm.preprocess import Inputs

# Names a folder that can't exist, so that tensors outside the model's bytes never load: from bytes alone,
# ONNX Runtime looks for them in the working directory.
_NO_FOLDER = "/dev/null/external-data-is-refused"
# Bytes of a batch's first input that the CPU takes at once. Without an arena a conv net's buffers for more come from the system in each
# run, and their page faults cost as much as the arithmetic: EfficientNet-Lite0 at 224 px, 32 images, 376 ms at once and 169 one by one.
_PIECE = 2**19
_CPU = "CPUExecutionProvider"


class OrtBackend:
    """ONNX Runtime with one execution provider. Needs nothing built before: it can serve at once."""

    def __init__(self, name: str, provider: str = _CPU, options: dict[str, str] | None = None) -> None:
        """
        Args:
            options: the provider's own.
        """
        self.name, self._provider, self._options = name, provider, options or {}

    def probe(self) -> str:
        try:
            available = require("onnxruntime", "cpu").get_available_providers()
        except MissingExtraError as error:
            return str(error).replace("\n  fix", "; fix")
        if self._provider not in available:
            return f"this onnxruntime has no {self._provider}: pip install 'kcm[gpu]' instead of 'kcm[cpu]', never both"
        if self._provider != _CPU:
            from edge_runtime.engines.cuda import why_no_device

            return why_no_device()
        return ""

    def ready(self, model: bytes, graph: GraphSpec) -> bool:
        return True

    def prepare(self, model: bytes, graph: GraphSpec) -> None:
        """Nothing to do."""

    def cancel(self) -> None:
        """Nothing to end."""

    def load(self, model: bytes, graph: GraphSpec, classes: int) -> OrtEngine:
        providers: list[Any] = [(self._provider, self._options)]
        engine = OrtEngine(model, graph, classes, providers if self._provider == _CPU else [*providers, _CPU])
        if engine.provider != self._provider:
            # ONNX Runtime falls back without an error.
            raise EngineError(f"{self.name}: asked ONNX Runtime for {self._provider}, it runs {engine.provider}")
        return engine


class OrtEngine:
    """A session with one thread, called inline: an executor costs ten times a tiny model's own run."""

    def __init__(self, model: bytes, graph: GraphSpec, classes: int, providers: list[Any] | None = None) -> None:
        """Build the session from verified bytes.

        Args:
            graph: the signature that the manifest promises.
            classes: C.

        Raises:
            BundleError: not a model, tensors outside of it, or another signature.
            MissingExtraError: no ONNX Runtime.
        """
        ort = require("onnxruntime", "cpu")
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 4  # failures arrive as exceptions
        options.enable_cpu_mem_arena = False  # an arena keeps the largest batch's memory for ever
        # A pattern takes what a whole run needs in one piece, which the system hands out and takes back each time: page faults that
        # cost as much as the run.
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", _NO_FOLDER)
        try:
            self._session: Any = ort.InferenceSession(model, options, providers=providers or [_CPU])
        except Exception as error:  # the runtime has a dozen exception types without a common base
            raise BundleError(f"the model can't be loaded: {error}") from error
        # The session keeps the bytes for falling back to another provider, which must not happen: a second copy of every weight.
        self._session.disable_fallback()
        if hasattr(self._session, "_model_bytes"):
            self._session._model_bytes = None
        self.provider: str = self._session.get_providers()[0]
        self._check_signature(graph, classes)
        self._one: _One | None = _One(self._session, graph, classes) if self.provider == _CPU else None

    def infer(self, inputs: Inputs) -> Outputs:
        if self._one is not None:
            first = next(iter(inputs.values()))
            if len(first) == 1:
                return self._one.run(inputs)
            if first.nbytes > _PIECE:
                step = max(1, _PIECE * len(first) // first.nbytes)
                pieces = ({name: array[row : row + step] for name, array in inputs.items()} for row in range(0, len(first), step))
                return Outputs(*map(np.concatenate, zip(*(self._session.run(OUTPUTS, piece) for piece in pieces), strict=True)))
        try:
            return Outputs(*self._session.run(OUTPUTS, inputs))
        except Exception as error:  # the runtime has a dozen exception types without a common base
            if self.provider == _CPU:
                raise
            raise EngineError(f"{self.provider} failed: {error}") from error

    def close(self) -> None:
        self._one = self._session = None

    def _check_signature(self, graph: GraphSpec, classes: int) -> None:
        inputs = {node.name: node.shape for node in self._session.get_inputs()}
        if set(inputs) != set(graph.inputs):
            raise BundleError(f"the model reads {', '.join(inputs)}; its manifest says {', '.join(graph.inputs)}")
        for name, shape in inputs.items():
            if any(isinstance(size, int) and size != graph.inputs[name] for size in shape[1:2]):
                raise BundleError(f"the model's {name!r} has shape {shape}; its manifest says {graph.inputs[name]}")
        outputs = {node.name: node.shape for node in self._session.get_outputs()}
        if missing := [name for name in OUTPUTS if name not in outputs]:
            raise BundleError(f"the model has no output {missing[0]!r}, only {', '.join(outputs)}")
        for name, width in (("logits", classes), ("top_ids", graph.candidates), ("top_probs", graph.candidates)):
            shape = outputs[name]
            if len(shape) != 2 or (isinstance(shape[1], int) and shape[1] != width):
                raise BundleError(f"output {name!r} has shape {shape}, expected [batch, {width}]")


class _One:
    """Batch 1 with bound outputs: nothing is allocated for them, and nothing of the inputs is copied."""

    def __init__(self, session: Any, graph: GraphSpec, classes: int) -> None:
        self._session, self._binding = session, session.io_binding()
        width = graph.candidates
        self._outputs = Outputs(
            np.empty((1, classes), np.float32),
            np.empty((1, width), np.int64),
            np.empty((1, width), np.float32),
            np.empty(1, np.float32),
            np.empty(1, np.float32),
        )
        arrays: tuple[NDArray[Any], ...] = self._outputs
        for name, array in zip(OUTPUTS, arrays, strict=True):
            self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def run(self, inputs: Inputs) -> Outputs:
        for name, array in inputs.items():
            self._binding.bind_cpu_input(name, array)
        self._session.run_with_iobinding(self._binding)  # options of its own would cost 25 µs
        return self._outputs
