"""Looking into a KAN judge: which edges matter, what they do to which input, and what is lost without the others.

Everything is measured on data, the judge's inputs for N samples: a curve where no sample lies says nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kcm.errors import ConfigError
from training.judge import FEATURES, Judge, Predictions, features, prior
from training.kan import Float64, KanLayer

Trend = Literal["rising", "falling", "mixed", "flat"]

_UNITS = {
    "entropy": "nats",
    "margin": "nats",
    "ln(1 + length)": "ln(1 + words)",
    "unknown words": "share of words",
    "largest logit": "logit",
}
_TOLERANCE = 0.01  # of a curve's range: smaller movements against its trend don't count


@dataclass(frozen=True)
class Edge:
    """One curve of a judge, as the data sees it. φ is centred: its mean over the data, `mean`, belongs to the bias.

    layer, input, output: its place. share: of its layer's attribution, 0..1. low, high: what it adds to the output at least and at
    most. trend: of the curve over the data's range. bend: the part of φ's spread over the data that no straight line of the (clamped) input
    explains, 0..1. x [P], y [P]: the curve over the data's range, x in the input's own unit. data [N]: the inputs.
    """

    layer: int
    input: int
    output: int
    share: float
    low: float
    high: float
    mean: float
    trend: Trend
    bend: float
    x: Float64
    y: Float64
    data: Float64


@dataclass(frozen=True)
class Effect:
    """What one input does to C_x: the change [P] when it is set to x [P] in every sample, as mean and middle half over samples.

    What the logits themselves say (the prior) stays: this is what the judge adds on account of that input.
    """

    input: int
    x: Float64
    mean: Float64
    low: Float64
    high: Float64
    data: Float64

    @property
    def spread(self) -> float:
        """Standard deviation of the mean change over the data: how far the input moves C_x."""
        return float(np.interp(self.data, self.x, self.mean).std())


def kan_layers(judge: Judge) -> list[KanLayer]:
    """The judge's layers.

    Raises:
        ConfigError: the judge is an MLP.
    """
    if judge.spec.kind != "kan":
        raise ConfigError(
            "this run's judge is an MLP, whose edges have no curves to show",
            fix='set kind = "kan" under [judge] in task.toml and run kcm train again',
        )
    layers = [layer for layer in judge.layers if isinstance(layer, KanLayer)]
    assert len(layers) == len(judge.layers)
    return layers


def node_names(judge: Judge) -> list[list[str]]:
    """Names of the inputs, of hidden nodes where there are any, and of the outputs."""
    inputs = [f"ln p, rank {rank + 1}" for rank in range(judge.ranks)] + list(FEATURES)
    outputs = [f"rank {rank + 1}" for rank in range(judge.ranks)] + ["none"]
    hidden = [[f"h{i + 1}" for i in range(layer.bias.numel())] for layer in kan_layers(judge)[:-1]]
    return [inputs, *hidden, outputs]


def unit(name: str) -> str:
    """The unit of an input, "" where it has none."""
    return "nats" if name.startswith("ln p") else _UNITS.get(name, "")


def node_values(layers: Sequence[KanLayer], x: Tensor) -> list[Tensor]:
    """What enters each layer [N, in], from the inputs x [N, in] of the first."""
    entering = [x]
    with torch.inference_mode():
        for layer in layers[:-1]:
            entering.append(layer(entering[-1]))
    return entering


def attribution(layers: Sequence[KanLayer], x: Tensor) -> list[Float64]:
    """Each edge's share of its layer [out, in], from the data x [N, in]; a layer's shares sum to 1, or are all 0.

    An output's score is how much its edges move it: the sum of their standard deviations over the data. From the last layer to the
    first, a node's score is divided among its edges by their standard deviations, and an edge's part goes to the node before it.
    This is the attribution of KAN 2.0 (arXiv 2408.10205), but for the divisor: there it is the deviation of the node itself, and a
    node whose edges cancel gets a score without bound; with their sum none is lost or made on the way.
    """
    with torch.inference_mode():
        moved = [layer.edges(v).double().std(0, correction=0).numpy() for layer, v in zip(layers, node_values(layers, x), strict=True)]
    shares: list[Float64] = []
    score = moved[-1].sum(1)
    for deviation in reversed(moved):
        sums = deviation.sum(1, keepdims=True)
        parts = np.divide(deviation, sums, out=np.zeros_like(deviation), where=sums > 0) * score[:, None]
        shares.append(parts / parts.sum() if parts.sum() > 0 else parts)
        score = parts.sum(0)
    return shares[::-1]


def look(judge: Judge, predictions: Predictions, points: int = 101) -> list[Edge]:
    """Every edge of a KAN judge on the data, by layer share, the largest first.

    Raises:
        ConfigError: the judge is an MLP.
    """
    layers = kan_layers(judge)
    x = features(*predictions.tensors(), judge.ranks)
    edges = []
    for place, (layer, entering, shares) in enumerate(zip(layers, node_values(layers, x), attribution(layers, x), strict=True)):
        data = entering.double().numpy()
        a, b = layer.scale_and_shift()
        with torch.inference_mode():
            said = layer.edges(entering).double().numpy()  # [N, out, in]
        z = np.clip(data * a + b, 0, layer.grid)
        for i in range(data.shape[1]):
            across = np.linspace(data[:, i].min(), data[:, i].max(), points)
            curves = layer.values(np.clip(across * a[i] + b[i], 0, layer.grid))[:, i]  # [out, P]
            for o, curve in enumerate(curves):
                phi = said[:, o, i]
                mean = float(phi.mean())
                edges.append(
                    Edge(
                        layer=place,
                        input=i,
                        output=o,
                        share=float(shares[o, i]),
                        low=float(phi.min()) - mean,
                        high=float(phi.max()) - mean,
                        mean=mean,
                        trend=trend(curve),
                        bend=bend(z[:, i], phi),
                        x=across,
                        y=curve - mean,
                        data=data[:, i],
                    )
                )
    return sorted(edges, key=lambda e: -e.share)


def trend(curve: Float64) -> Trend:
    """Which way a curve [P] goes as its input grows, "mixed" where it turns: movements below a hundredth of its range don't count."""
    span = float(np.ptp(curve))
    if span < 1e-6:
        return "flat"
    # How far it ever falls below what it has reached, or rises above it.
    fall = float((np.maximum.accumulate(curve) - curve).max())
    rise = float((curve - np.minimum.accumulate(curve)).max())
    return "rising" if fall <= _TOLERANCE * span else "falling" if rise <= _TOLERANCE * span else "mixed"


def bend(z: Float64, phi: Float64) -> float:
    """√(1 − R²) of the best straight line through (z, φ) [N]: 0 is a line, 1 a curve that no line tells anything about."""
    dz, dphi = z - z.mean(), phi - phi.mean()
    total = float(dphi @ dphi)
    if total < 1e-12 * len(phi):
        return 0.0
    across = float(dz @ dz)
    left = total - (float(dz @ dphi) ** 2 / across if across > 0 else 0.0)
    return float(np.sqrt(max(0.0, left) / total))


def prune(judge: Judge, predictions: Predictions, threshold: float) -> tuple[Judge, int]:
    """The judge without the edges whose share of their layer lies below the threshold, and how many edges are left.

    A pruned edge is zero, and its mean over the data goes into the bias. Nothing is fitted again. Hidden nodes that nothing reads any
    more have no share, so that the edges into them go, too.

    Raises:
        ConfigError: the judge is an MLP.
    """
    pruned = copy.deepcopy(judge)
    layers = kan_layers(pruned)
    x = features(*predictions.tensors(), judge.ranks)
    left = 0
    with torch.no_grad():
        for layer, share in zip(layers, attribution(layers, x), strict=True):
            cut = torch.from_numpy(share < threshold)
            # Means of this layer's edges on what the pruned layers before it now say.
            layer.bias.add_((layer.edges(x).mean(0) * cut).sum(1))
            layer.spline[cut], layer.base[cut] = 0.0, 0.0
            left += int((~cut).sum())
            x = layer(x)
    return pruned, left


def effects(judge: Judge, predictions: Predictions, points: int = 33) -> list[Effect]:
    """What each input does to C_x (Friedman's partial dependence, 2001), the most moving first.

    Raises:
        ConfigError: the judge is an MLP.
    """
    kan_layers(judge)
    logits, length, unknown = predictions.tensors()
    found = []
    with torch.inference_mode():
        x = features(logits, length, unknown, judge.ranks)
        base = prior(logits, judge.temperature, judge.ranks)
        now = torch.softmax(base + judge.layers(x), 1)[:, 0].double().numpy()
        for i in range(x.shape[1]):
            across = torch.linspace(float(x[:, i].min()), float(x[:, i].max()), points)
            c = np.empty((points, len(x)))
            for p, value in enumerate(across):
                moved = x.clone()
                moved[:, i] = value
                c[p] = torch.softmax(base + judge.layers(moved), 1)[:, 0].double().numpy() - now
            low, high = np.percentile(c, [25, 75], axis=1)
            found.append(Effect(i, across.double().numpy(), c.mean(1), low, high, x[:, i].double().numpy()))
    return sorted(found, key=lambda e: -e.spread)
