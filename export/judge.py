"""The judge as ONNX nodes behind any small model's logits: candidates and C_x."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto
from torch import nn

from export.kan import DTYPES, append_kan
from export.nodes import Nodes
from training.heads import EDGE, OutcomeHead
from training.judge import LOWEST, REST
from training.kan import KanLayer
from training.kan_forms import Precision
from training.select import Router


def append_judge(
    nodes: Nodes, router: Router, logits: str, length: str | None, unknown: str | None, candidates: int, precision: Precision = "fp32"
) -> None:
    """From logits [B, C], length [B, 1] and unknown [B, 1], names of values, to the outputs top_ids, top_probs, confidence and score.

    Without length and unknown (images) both are 0.

    Mirrors training.judge.features, Judge.forward and Router.score; `kcm verify` holds them to each other.

    Args:
        precision: of the layers; probabilities and logarithms around them are always fp32.
    """
    judge = router.judge
    log_p = nodes("LogSoftmax", logits, axis=1)
    width = max(judge.ranks, candidates, 2)
    ranked, ids = nodes("TopK", log_p, np.array([width]), axis=1, outputs=2)
    nodes("Identity", _first(nodes, ids, width, candidates), out="top_ids")
    nodes("Exp", _first(nodes, ranked, width, candidates), out="top_probs")

    ranks = judge.ranks
    scaled = nodes("LogSoftmax", nodes("Div", logits, float(judge.temperature)), axis=1)
    top_scaled, _ = nodes("TopK", scaled, np.array([ranks]), axis=1, outputs=2)
    held = nodes("ReduceSum", nodes("Exp", top_scaled), np.array([1]), keepdims=1)
    rest = nodes("Log", nodes("Clip", nodes("Sub", 1.0, held), REST))
    prior = nodes("Concat", nodes("Clip", top_scaled, LOWEST), rest, axis=1)

    x = _features(nodes, logits, log_p, _first(nodes, ranked, width, max(2, ranks)), ranks, length, unknown)
    added = _layers(nodes, judge.layers, x, precision)
    p_ranks = nodes("Softmax", nodes("Add", prior, added), axis=1)
    nodes("Gather", p_ranks, np.array(0), axis=1, out="confidence")
    if router.choice.head == "confidence":
        nodes("Identity", "confidence", out="score")
    elif router.choice.head == "max-softmax":
        nodes("Exp", nodes("Gather", top_scaled, np.array(0), axis=1), out="score")
    else:
        assert router.outcome is not None
        _outcome(nodes, router.outcome, x, _first(nodes, top_scaled, ranks, 1), ids, precision)


def _features(nodes: Nodes, logits: str, log_p: str, ranked: str, ranks: int, length: str | None, unknown: str | None) -> str:
    """training.judge.features [B, ranks + 5] from log-probabilities [B, C] and the highest max(2, ranks) of them.

    What is linear in its parts is one product with a matrix of 0, 1 and −1: a node costs more than its arithmetic.
    """
    floored = nodes("Clip", log_p, LOWEST)
    negative_entropy = nodes("ReduceSum", nodes("Mul", nodes("Exp", log_p), floored), np.array([1]), keepdims=1)
    largest = nodes("ReduceMax", logits, np.array([1]), keepdims=1)
    sums = [] if length is None or unknown is None else [nodes("Log", nodes("Add", length, 1.0)), unknown]
    parts = nodes("Concat", nodes("Clip", ranked, LOWEST), negative_entropy, largest, *sums, axis=1)
    width = max(2, ranks)
    to_features = np.zeros((width + 2 + len(sums), ranks + 5), np.float32)
    to_features[range(ranks), range(ranks)] = 1
    to_features[width, ranks] = -1  # entropy
    to_features[[0, 1], ranks + 1] = 1, -1  # margin
    to_features[width + 1, ranks + 4] = 1  # the largest logit
    to_features[range(width + 2, width + 2 + len(sums)), range(ranks + 2, ranks + 2 + len(sums))] = 1  # without sums: 0
    x: str = nodes("MatMul", parts, to_features)
    return x


def _outcome(nodes: Nodes, head: OutcomeHead, x: str, log_p: str, ids: str, precision: Precision) -> None:
    """The score of a head of correctness or benefit from features [B, F], the log of tempered max-softmax [B, 1] and ranked ids [B, k].

    Mirrors OutcomeHead.forward and OutcomeHead.score.
    """
    p = nodes("Clip", nodes("Exp", log_p), EDGE, 1 - EDGE)
    # The prior's probabilities are linear in p: of (wrong, right), or of (hurt, neutral, benefit).
    if head.kind == "correctness":
        slope, start = [-1.0, 1.0], [1.0, 0.0]
    else:
        benefit, hurt = float(head.rates[0]), float(1 - head.rates[1])
        slope, start = [hurt, benefit - hurt, -benefit], [0.0, 1 - benefit, benefit]
    prior = nodes("Log", nodes("Gemm", p, np.array([slope], np.float32), np.array(start, np.float32)))
    x = _layers(nodes, head.layers, x, precision)
    by_class = nodes("Gather", head.classes.detach().numpy(), nodes("Gather", ids, np.array(0), axis=1))
    out = nodes("Softmax", nodes("Add", nodes("Add", prior, x), by_class), axis=1)
    # The score is a weighted sum of the outcomes' probabilities: of P(right), or of (1 + P(hurt) − P(benefit)) / 2.
    worth = [[0.0], [1.0]] if head.kind == "correctness" else [[1.0], [0.5], [0.0]]
    nodes("Squeeze", nodes("MatMul", out, np.array(worth, np.float32)), np.array([1]), out="score")


def _first(nodes: Nodes, value: str, width: int, count: int) -> str:
    """Columns 0..count of a [B, width] value."""
    if width == count:
        return value
    name: str = nodes("Slice", value, *(np.array([i]) for i in (0, count, 1)))
    return name


def _layers(nodes: Nodes, layers: nn.Sequential, x: str, precision: Precision) -> str:
    """What the layers make of fp32 features x [B, F], as fp32."""
    if precision == "fp16":
        x = nodes("Cast", x, to=TensorProto.FLOAT16)
    for layer in layers:
        x = append_kan(nodes, layer, x, precision) if isinstance(layer, KanLayer) else _dense(nodes, layer, x, precision)
    if precision == "fp16":
        x = nodes("Cast", x, to=TensorProto.FLOAT)
    return x


def _dense(nodes: Nodes, layer: nn.Module, x: str, precision: Precision) -> str:
    """One layer of an MLP."""
    dtype = DTYPES[precision]
    y: str
    if isinstance(layer, nn.BatchNorm1d):
        assert layer.running_mean is not None and layer.running_var is not None
        scale = (1 / (layer.running_var + layer.eps).sqrt()).numpy()
        y = nodes("Mul", nodes("Sub", x, layer.running_mean.numpy().astype(dtype)), scale.astype(dtype))
    elif isinstance(layer, nn.Linear):
        y = nodes("Gemm", x, layer.weight.detach().numpy().T.astype(dtype), layer.bias.detach().numpy().astype(dtype))
    else:
        assert isinstance(layer, nn.ReLU)
        y = nodes("Relu", x)
    return y
