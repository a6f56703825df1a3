"""Runs the fused graph. One small protocol, so that a TensorRT engine can stand beside ONNX Runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kcm.errors import BundleError, require

if TYPE_CHECKING:
    from kcm.bundle import GraphSpec
    from kcm.preprocess import Inputs

OUTPUTS = ("logits", "top_ids", "top_probs", "confidence", "score")
# Names a folder that can't exist, so that tensors outside the model's bytes never load: from bytes alone,
# ONNX Runtime looks for them in the working directory.
_NO_FOLDER = "/dev/null/external-data-is-refused"


class Outputs(NamedTuple):
    """What the graph says of a batch of B samples over C labels, with k candidates."""

    logits: NDArray[np.float32]  # [B, C]
    top_ids: NDArray[np.int64]  # [B, k], best first
    top_probs: NDArray[np.float32]  # [B, k]
    confidence: NDArray[np.float32]  # [B]: C_x
    score: NDArray[np.float32]  # [B]: the routing score, above ε stays local; C_x unless calibration chose another head


class Engine(Protocol):
    """A loaded graph. `provider` is what really runs it, as the runtime reports."""

    provider: str

    def run(self, inputs: Inputs) -> Outputs: ...


class OrtEngine:
    """ONNX Runtime on the CPU with one thread, called inline: an executor costs ten times a tiny model's own run."""

    def __init__(self, model: bytes, graph: GraphSpec, classes: int) -> None:
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
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", _NO_FOLDER)
        try:
            self._session: Any = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime has a dozen exception types without a common base
            raise BundleError(f"the model can't be loaded: {error}") from error
        self.provider: str = self._session.get_providers()[0]
        self._check_signature(graph, classes)

    def run(self, inputs: Inputs) -> Outputs:
        return Outputs(*self._session.run(OUTPUTS, inputs))

    def _check_signature(self, graph: GraphSpec, classes: int) -> None:
        inputs = tuple(node.name for node in self._session.get_inputs())
        if set(inputs) != set(graph.inputs):
            raise BundleError(f"the model reads {', '.join(inputs)}; its manifest says {', '.join(graph.inputs)}")
        outputs = {node.name: node.shape for node in self._session.get_outputs()}
        if missing := [name for name in OUTPUTS if name not in outputs]:
            raise BundleError(f"the model has no output {missing[0]!r}, only {', '.join(outputs)}")
        for name, width in (("logits", classes), ("top_ids", graph.candidates), ("top_probs", graph.candidates)):
            shape = outputs[name]
            if len(shape) != 2 or (isinstance(shape[1], int) and shape[1] != width):
                raise BundleError(f"output {name!r} has shape {shape}, expected [batch, {width}]")
