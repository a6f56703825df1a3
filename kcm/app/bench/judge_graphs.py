"""The judge's reference graph, 64-32-2, beside an MLP of as many parameters and an export in efficient-kan's style."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn

from export.kan import append_kan
from export.nodes import Nodes
from kcm.app.bench.clocks import in_turn
from kcm.task import JudgeSpec
from training.judge import mlp_width
from training.kan import KanLayer
from training.kan_forms import Precision

SIZES = (64, 32, 2)  # pinned: figures of all times and machines are of this graph
BATCHES = {1: 2000, 256: 100}  # → calls a repeat
GRID, DEGREE = 5, 3
TYPES: dict[Precision, tuple[int, Any]] = {"fp32": (TensorProto.FLOAT, np.float32), "fp16": (TensorProto.FLOAT16, np.float16)}
_OPSET = 18


class JudgeGraphs:
    """The three graphs, loaded. `nodes` counts those of each as exported."""

    def __init__(self) -> None:
        inputs, hidden, outputs = SIZES
        made = {"kan": kan(layers_of(SIZES)), "mlp": mlp(inputs, hidden, outputs), "effkan": exported(spline_network(SIZES), inputs)}
        self.nodes = {name: len(model.graph.node) for name, model in made.items()}
        self._calls = {
            batch: {
                f"{name}_b{batch}": _call(session(model), batch, inputs) for name, model in made.items() if batch == 1 or name != "effkan"
            }
            for batch in BATCHES
        }

    def measure(self) -> dict[str, float]:
        """CPU µs per session.run."""
        taken: dict[str, float] = {}
        for batch, calls in self._calls.items():
            taken |= in_turn(calls, BATCHES[batch])
        return taken


def layers_of(sizes: tuple[int, ...], *, grid: int = GRID, degree: int = DEGREE, seed: int = 0) -> list[KanLayer]:
    """KAN layers with rough curves: coefficients of standard deviation 1."""
    torch.manual_seed(seed)
    layers = [KanLayer(a, b, grid=grid, degree=degree).eval() for a, b in pairwise(sizes)]
    for layer in layers:
        nn.init.normal_(layer.spline)
    return layers


def kan(layers: list[KanLayer]) -> onnx.ModelProto:
    nodes, y = Nodes(), "x"
    for layer in layers:
        y = append_kan(nodes, layer, y)
    return model_of(nodes, layers[0].base.shape[1], layers[-1].base.shape[0])


def mlp(inputs: int, hidden: int, outputs: int) -> onnx.ModelProto:
    """Two dense layers with as many parameters as the KAN; its normalisation is folded into the first, as the KAN's is."""
    wide, rng = mlp_width(JudgeSpec(hidden=hidden), inputs, outputs), np.random.default_rng(0)
    nodes = Nodes()
    y = nodes("Gemm", "x", rng.normal(size=(inputs, wide)).astype(np.float32), np.zeros(wide, np.float32))
    nodes("Gemm", nodes("Relu", y), rng.normal(size=(wide, outputs)).astype(np.float32), np.zeros(outputs, np.float32))
    return model_of(nodes, inputs, outputs)


def model_of(nodes: Nodes, inputs: int, outputs: int, precision: Precision = "fp32") -> onnx.ModelProto:
    """The nodes, whose last output becomes "y" [B, outputs], as a model of "x" [B, inputs]."""
    nodes.nodes[-1].output[0] = "y"
    infos = [helper.make_tensor_value_info(name, TYPES[precision][0], ["B", width]) for name, width in (("x", inputs), ("y", outputs))]
    graph = helper.make_graph(nodes.nodes, "kan", infos[:1], infos[1:], nodes.initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=10)


class SplineLinear(nn.Module):
    """A KAN layer as popular implementations compute it: SiLU base beside B-spline bases by the Cox–de Boor recursion, each a Linear.

    The style is efficient-kan's (github.com/Blealtan/efficient-kan), the code is ours.
    """

    knots: Tensor  # [in, G + 2k + 1]

    def __init__(self, inputs: int, outputs: int, grid: int = GRID, degree: int = DEGREE) -> None:
        super().__init__()
        self.degree = degree
        knots = torch.arange(-degree, grid + degree + 1, dtype=torch.float32) * (2 / grid) - 1
        self.register_buffer("knots", knots.repeat(inputs, 1))
        self.base = nn.Linear(inputs, outputs, bias=False)
        self.spline = nn.Linear(inputs * (grid + degree), outputs, bias=False)

    def bases(self, x: Tensor) -> Tensor:
        """[B, in] → [B, in, G + k]."""
        x, t = x.unsqueeze(-1), self.knots
        b = ((x >= t[:, :-1]) & (x < t[:, 1:])).to(x.dtype)
        for k in range(1, self.degree + 1):
            rising = (x - t[:, : -k - 1]) / (t[:, k:-1] - t[:, : -k - 1])
            falling = (t[:, k + 1 :] - x) / (t[:, k + 1 :] - t[:, 1:-k])
            b = rising * b[..., :-1] + falling * b[..., 1:]
        return b

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(nn.functional.silu(x)) + self.spline(self.bases(x).flatten(1))
        return y


def spline_network(sizes: tuple[int, ...]) -> nn.Sequential:
    """SplineLinear layers."""
    torch.manual_seed(0)
    return nn.Sequential(*(SplineLinear(a, b) for a, b in pairwise(sizes))).eval()


def exported(network: nn.Module, inputs: int) -> onnx.ModelProto:
    """The graph from "x" [B, inputs] to "y" by torch's own exporter."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torchvision and its own deprecations
            program: Any = torch.onnx.export(
                network,
                (torch.zeros(3, inputs),),
                input_names=["x"],
                output_names=["y"],
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                opset_version=_OPSET,
                dynamo=True,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    model: onnx.ModelProto = program.model_proto
    return model


def session(model: onnx.ModelProto) -> Any:
    """An ONNX Runtime session of one thread."""
    return session_of(model.SerializeToString())


def session_of(model: bytes) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _call(running: Any, batch: int, inputs: int) -> Callable[[], object]:
    x: NDArray[np.float32] = np.random.default_rng(0).normal(size=(batch, inputs)).astype(np.float32)
    feed = {"x": x}
    return lambda: running.run(None, feed)
