"""The judge F_j: from what the small model computed to C_x, the probability that its answer is right.

Inputs are fold-invariant (the same meaning whichever fold's model made the logits): log-probabilities by rank, entropy,
margin, length, share of unknown words, largest logit. The head is a softmax over "rank 1 is right", ..., "rank m is right",
"none of them"; C_x is its first entry. Its logits are those of temperature-scaled softmax plus what the KAN adds: with no
evidence for more the judge is max-softmax, the baseline that it must not fall below.
It is fitted on out-of-fold predictions: on the small model's own training split confidence lies.
Source: arXiv 2510.20278 (C_x = the largest entry of softmax(F_j(x))); the ranks and the residual form are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kcm.task import JudgeSpec
from training.kan import KanLayer, sparsity

Float32 = NDArray[np.float32]

LOWEST = -12.0  # floor of a log-probability: below it ranks say nothing, and fp32 can't tell them from zero
REST = 1e-5  # floor of the mass that no rank holds: it is 1 − Σ, which fp32 knows to about 1e-7
FEATURES = ("entropy", "margin", "ln(1 + length)", "unknown words", "largest logit")  # behind the ranks
_L2 = 10.0  # of the whole problem; with the next it keeps the additions small until samples ask for them
SMOOTH = 100.0  # on second differences of a curve's coefficients along the grid
_ITERATIONS = 100


@dataclass(frozen=True)
class Predictions:
    """What the judge reads of N samples: logits [N, C], length [N] in words, unknown [N] share of words in no table."""

    logits: Float32
    length: Float32
    unknown: Float32

    def __len__(self) -> int:
        return len(self.logits)

    def take(self, index: NDArray[np.generic]) -> Predictions:
        return Predictions(self.logits[index], self.length[index], self.unknown[index])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.from_numpy(self.logits), torch.from_numpy(self.length), torch.from_numpy(self.unknown)

    @staticmethod
    def concatenate(parts: list[Predictions]) -> Predictions:
        return Predictions(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("logits", "length", "unknown")))


def features(logits: Tensor, length: Tensor, unknown: Tensor, ranks: int) -> Tensor:
    """[B, C], [B], [B] → [B, ranks + 5]: log-probabilities by rank, entropy, margin, ln(1 + length), unknown, largest logit."""
    log_p = torch.log_softmax(logits, 1)
    top = log_p.topk(max(2, ranks), 1).values.clamp(min=LOWEST)
    entropy = -(log_p.exp() * log_p.clamp(min=LOWEST)).sum(1, keepdim=True)
    margin = top[:, :1] - top[:, 1:2]
    largest = logits.max(1, keepdim=True).values
    return torch.cat([top[:, :ranks], entropy, margin, torch.log1p(length).unsqueeze(1), unknown.unsqueeze(1), largest], 1)


def prior(logits: Tensor, temperature: Tensor, ranks: int) -> Tensor:
    """[B, C] → [B, ranks + 1]: temperature-scaled log-probabilities by rank, and of the rest."""
    top = torch.log_softmax(logits / temperature, 1).topk(ranks, 1).values
    rest = (1 - top.exp().sum(1, keepdim=True)).clamp(min=REST).log()
    return torch.cat([top.clamp(min=LOWEST), rest], 1)


class Judge(nn.Module):
    """logits [B, C], length [B], unknown [B] → log-probabilities [B, ranks + 1] over ranks and "none"."""

    temperature: Tensor

    def __init__(self, spec: JudgeSpec, classes: int) -> None:
        super().__init__()
        self.spec, self.ranks = spec, min(spec.ranks, classes)
        self.register_buffer("temperature", torch.ones(()))
        self.layers = build_layers(spec, self.ranks + len(FEATURES), self.ranks + 1)
        self.eval()  # BatchNorm holds the fitting split's statistics, set once: no batch ever moves them

    def forward(self, logits: Tensor, length: Tensor, unknown: Tensor) -> Tensor:
        added = self.layers(features(logits, length, unknown, self.ranks))
        return torch.log_softmax(prior(logits, self.temperature, self.ranks) + added, 1)

    def confidence(self, predictions: Predictions) -> Float32:
        """C_x [N]."""
        with torch.inference_mode():
            c: Float32 = self(*predictions.tensors())[:, 0].exp().numpy()
        return c


def build_layers(spec: JudgeSpec, inputs: int, outputs: int) -> nn.Sequential:
    """The spec's network [B, inputs] → [B, outputs], its last layer zero: what a head adds to its prior is nothing at first."""
    if spec.kind == "mlp":
        wide = mlp_width(spec, inputs, outputs)
        layers = nn.Sequential(nn.BatchNorm1d(inputs, affine=False), nn.Linear(inputs, wide), nn.ReLU(), nn.Linear(wide, outputs))
    elif spec.hidden:
        layers = nn.Sequential(
            KanLayer(inputs, spec.hidden, grid=spec.grid, degree=spec.degree),
            KanLayer(spec.hidden, outputs, grid=spec.grid, degree=spec.degree),
        )
    else:
        layers = nn.Sequential(KanLayer(inputs, outputs, grid=spec.grid, degree=spec.degree))
    for parameter in layers[-1].parameters():
        nn.init.zeros_(parameter)
    return layers


def mlp_width(spec: JudgeSpec, inputs: int, outputs: int) -> int:
    """The hidden width at which a two-layer MLP has as many parameters as the KAN of this spec (the paper's MCM, made fair)."""
    per_edge = spec.grid + spec.degree + 1
    edges = inputs * spec.hidden + spec.hidden * outputs if spec.hidden else inputs * outputs
    kan = per_edge * edges + spec.hidden + outputs
    return max(1, round((kan - outputs) / (inputs + outputs + 1)))


def rank_targets(logits: Float32, targets: Float32, ranks: int) -> Float32:
    """[N, C] logits and soft targets [N, C] → [N, ranks + 1]: the target's mass at each rank of the logits, then the rest."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :ranks]
    mass = np.take_along_axis(targets, order, 1)
    return np.concatenate([mass, np.clip(1 - mass.sum(1, keepdims=True), 0, 1)], 1).astype(np.float32)


def fit_judge(spec: JudgeSpec, out_of_fold: Predictions, targets: Float32, seed: int = 0) -> Judge:
    """Fit on out-of-fold predictions [N]; the target is each row's most probable class of `targets` [N, C] (label or teacher's answer).

    A one-layer KAN is a convex problem: no seed matters there.

    Raises:
        ValueError: fewer than two samples: nothing to normalise by.
    """
    if len(out_of_fold) < 2:
        raise ValueError(f"{len(out_of_fold)} out-of-fold prediction(s) are too few for a judge")
    torch.manual_seed(seed)
    judge = Judge(spec, out_of_fold.logits.shape[1])
    hard = harden(targets)
    judge.temperature.fill_(fit_temperature(out_of_fold.logits, hard))
    inputs = features(*out_of_fold.tensors(), judge.ranks)
    normalise_by(judge.layers[0], inputs)
    base = prior(torch.from_numpy(out_of_fold.logits), judge.temperature, judge.ranks)
    wanted = torch.from_numpy(rank_targets(out_of_fold.logits, hard, judge.ranks))
    parameters = list(judge.parameters())

    def loss() -> Tensor:
        misfit = -(wanted * torch.log_softmax(base + judge.layers(inputs), 1)).sum()
        total = misfit + _L2 / 2 * sum(p.square().sum() for p in parameters) + SMOOTH / 2 * roughness(judge.layers)
        return total / len(wanted) + sparse(spec, judge.layers, inputs)

    minimise(parameters, loss)
    return judge


def minimise(parameters: list[nn.Parameter], loss: Callable[[], Tensor]) -> None:
    """Set the parameters to where the loss, a mean over samples, is least: L-BFGS with line search, as for any convex head."""
    solver = torch.optim.LBFGS(parameters, max_iter=_ITERATIONS, history_size=10, line_search_fn="strong_wolfe", tolerance_change=1e-7)

    def closure() -> Tensor:
        solver.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(closure)  # type: ignore[no-untyped-call]


def roughness(layers: nn.Sequential) -> Tensor:
    """Σ of squared second differences of every curve's coefficients along the grid; 0 for an MLP."""
    parts = [layer.spline.diff(n=2, dim=-1).square().sum() for layer in layers if isinstance(layer, KanLayer)]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def sparse(spec: JudgeSpec, layers: nn.Sequential, inputs: Tensor) -> Tensor:
    """The spec's l1 and entropy terms on inputs [N, in]; 0 where it asks for neither."""
    if not (spec.l1 or spec.entropy):
        return torch.zeros(())
    size, spread = sparsity(layers, inputs)
    return spec.l1 * size + spec.entropy * spread


def normalise_by(layer: nn.Module, x: Tensor) -> None:
    """Set the first layer's BatchNorm to the statistics of x [N, in]; deeper layers keep mean 0, variance 1."""
    norm = layer.norm if isinstance(layer, KanLayer) else layer
    assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(x.mean(0))
    norm.running_var.copy_(x.var(0, correction=0).clamp(min=1e-6))


def harden(targets: Float32) -> Float32:
    """Soft targets [N, C] → one-hot at the most probable class."""
    hard = np.zeros_like(targets)
    np.put_along_axis(hard, targets.argmax(1)[:, None], 1.0, 1)
    return hard


def fit_temperature(logits: Float32, targets: Float32) -> float:
    """The temperature T that calibrates softmax(logits / T) on soft targets (Guo et al. 2017): the baseline's one parameter."""
    from scipy.optimize import minimize_scalar

    z = torch.from_numpy(logits).double()
    t = torch.from_numpy(targets).double()

    def loss(log_temperature: float) -> float:
        return float(-(t * torch.log_softmax(z / np.exp(log_temperature), 1)).sum(1).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded").x))


def max_softmax(logits: Float32, temperature: float = 1.0) -> Float32:
    """max softmax(logits / T) [N]: the baseline's confidence."""
    z = (logits - logits.max(1, keepdims=True)) / temperature
    confidence: Float32 = (1 / np.exp(z).sum(1)).astype(np.float32)
    return confidence
