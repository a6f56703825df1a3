"""The judge as ONNX nodes behind any small model's logits: candidates and C_x."""

from __future__ import annotations

import numpy as np
from torch import nn

from export.nodes import Nodes
from training.judge import LOWEST, REST, Judge
from training.kan import KanLayer, SaturatingForm


def append_judge(nodes: Nodes, judge: Judge, logits: str, length: str, unknown: str, candidates: int) -> None:
    """From logits [B, C], length [B, 1] and unknown [B, 1], names of values, to the outputs top_ids, top_probs and confidence.

    Mirrors training.judge.features and Judge.forward; `kcm verify` holds them to each other.
    """
    log_p = nodes("LogSoftmax", logits, axis=1)
    width = max(judge.ranks, candidates, 2)
    ranked, ids = nodes("TopK", log_p, np.array([width]), axis=1, outputs=2)
    _first(nodes, ids, width, candidates, "top_ids")
    nodes("Exp", _first(nodes, ranked, width, candidates), out="top_probs")

    ranks = judge.ranks
    scaled = nodes("LogSoftmax", nodes("Div", logits, float(judge.temperature)), axis=1)
    top_scaled, _ = nodes("TopK", scaled, np.array([ranks]), axis=1, outputs=2)
    held = nodes("ReduceSum", nodes("Exp", top_scaled), np.array([1]), keepdims=1)
    rest = nodes("Log", nodes("Clip", nodes("Sub", 1.0, held), REST))
    prior = nodes("Concat", nodes("Clip", top_scaled, LOWEST), rest, axis=1)

    top = nodes("Clip", ranked, LOWEST)
    floored = nodes("Clip", log_p, LOWEST)
    entropy = nodes("Neg", nodes("ReduceSum", nodes("Mul", nodes("Exp", log_p), floored), np.array([1]), keepdims=1))
    margin = nodes("Sub", _first(nodes, top, width, 1), nodes("Slice", top, np.array([1]), np.array([2]), np.array([1])))
    log_length = nodes("Log", nodes("Add", length, 1.0))
    largest = nodes("ReduceMax", logits, np.array([1]), keepdims=1)
    x = nodes("Concat", _first(nodes, top, width, ranks), entropy, margin, log_length, unknown, largest, axis=1)
    for layer in judge.layers:
        x = _layer(nodes, layer, x)
    confidence = _first(nodes, nodes("Softmax", nodes("Add", prior, x), axis=1), ranks + 1, 1)
    nodes("Squeeze", confidence, np.array([1]), out="confidence")
    nodes("Identity", "confidence", out="score")


def _first(nodes: Nodes, value: str, width: int, count: int, out: str = "") -> str:
    """Columns 0..count of a [B, width] value."""
    if width == count:
        name: str = nodes("Identity", value, out=out) if out else value
        return name
    zero, end, axis = (np.array([i]) for i in (0, count, 1))
    name = nodes("Slice", value, zero, end, axis, out=out)
    return name


def _layer(nodes: Nodes, layer: nn.Module, x: str) -> str:
    """One layer of a KAN in form S or R (five nodes, whose clip ONNX Runtime fuses into the Gemm), or of an MLP."""
    y: str
    if isinstance(layer, KanLayer):
        form = SaturatingForm(layer)
        y = nodes("Gemm", x, form.affine.T.astype(np.float32), form.offset.astype(np.float32))
        y = nodes("Clip", y, 0.0, 1.0)
        if form.power == 3:
            y = nodes("Mul", nodes("Mul", y, y), y)
        return str(nodes("Gemm", y, form.weight.T.astype(np.float32), form.bias.astype(np.float32)))
    if isinstance(layer, nn.BatchNorm1d):
        assert layer.running_mean is not None and layer.running_var is not None
        scale = (1 / (layer.running_var + layer.eps).sqrt()).numpy()
        y = nodes("Mul", nodes("Sub", x, layer.running_mean.numpy()), scale)
    elif isinstance(layer, nn.Linear):
        y = nodes("Gemm", x, layer.weight.detach().numpy().T, layer.bias.detach().numpy())
    else:
        assert isinstance(layer, nn.ReLU)
        y = nodes("Relu", x)
    return y
