"""Heads that turn what the small model computed into the routing score: above ε the small model answers.

confidence   C_x of the judge (the paper's)
max-softmax  of temperature-scaled logits: the baseline, and what routing falls back to
correctness  P(the small model is right), fitted on labelled samples
benefit      who is right, small or large? From labelled samples with both models' answers: hurt (only the small one is right),
             neutral, benefit (only the large one is). The score falls with P(benefit) − P(hurt), what a call gains.
             To the few labelled samples come the many that the large model answered in earlier rounds: training/select.py.

The last two are additive KANs on the judge's features with a bias per predicted class, in residual form: with no evidence for
more they rank as max-softmax does. Benefit needs the truth: measured by agreement with the teacher, the teacher would always be right.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kcm.task import JudgeSpec
from training.judge import FEATURES, SMOOTH, Predictions, build_layers, features, minimise, normalise_by, roughness, sparse

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]
Kind = Literal["correctness", "benefit"]

_L2 = {"kan": 30.0, "mlp": 10.0}  # these three: chosen on CLINC150, R52 and 20 Newsgroups, label draws 0 and 1
_CLASS_L2 = 1.0
EDGE = 1e-4  # probabilities of the prior are kept this far from 0 and 1


class OutcomeHead(nn.Module):
    """logits [B, C], length [B], unknown [B] → log-probabilities [B, 2] of (wrong, right), or [B, 3] of (hurt, neutral, benefit)."""

    temperature: Tensor
    rates: Tensor

    def __init__(self, spec: JudgeSpec, kind: Kind, classes: int) -> None:
        super().__init__()
        self.spec, self.kind, self.ranks = spec, kind, min(spec.ranks, classes)
        outputs = 2 if kind == "correctness" else 3
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("rates", torch.full((2,), 0.5))  # P(large right | small wrong), P(large right | small right)
        self.layers = build_layers(spec, self.ranks + len(FEATURES), outputs)
        self.classes = nn.Parameter(torch.zeros(classes, outputs))  # a bias for each answer of the small model
        self.eval()

    def prior(self, logits: Tensor) -> Tensor:
        """What tempered max-softmax p says [B, outputs], the large model's rates being those beside any right or wrong answer."""
        p = torch.softmax(logits / self.temperature, 1).max(1).values.clamp(EDGE, 1 - EDGE)
        if self.kind == "correctness":
            return torch.stack([1 - p, p], 1).log()
        benefit, hurt = (1 - p) * self.rates[0], p * (1 - self.rates[1])
        return torch.stack([hurt, 1 - hurt - benefit, benefit], 1).log()

    def added(self, logits: Tensor, inputs: Tensor) -> Tensor:
        """What the KAN and the answer's class add to the prior: [B, outputs]."""
        added: Tensor = self.layers(inputs) + self.classes[logits.argmax(1)]
        return added

    def forward(self, logits: Tensor, length: Tensor, unknown: Tensor) -> Tensor:
        inputs = features(logits, length, unknown, self.ranks)
        return torch.log_softmax(self.prior(logits) + self.added(logits, inputs), 1)

    def score(self, predictions: Predictions) -> Float32:
        """[N] in 0..1: P(right), or (1 + P(hurt) − P(benefit)) / 2, which is 0.5 where a call gains nothing."""
        with torch.inference_mode():
            p = self(*predictions.tensors()).exp()
            kept = p[:, 1] if self.kind == "correctness" else (1 + p[:, 0] - p[:, 2]) / 2
            score: Float32 = kept.numpy()
        return score


def fit_outcome_head(
    spec: JudgeSpec,
    kind: Kind,
    predictions: Predictions,
    outcomes: Float32,
    *,
    temperature: float,
    rates: tuple[float, float],
    weights: Float32,
) -> OutcomeHead:
    """Fit on samples that neither model was fitted on; convex for a one-layer KAN.

    Args:
        outcomes: [N, 2] of (wrong, right) or [N, 3] of (hurt, neutral, benefit): one-hot where the truth is known, else probabilities.
        temperature: of the small model's logits, from its out-of-fold predictions.
        rates: P(large right | small wrong), P(large right | small right).
        weights: [N].

    Raises:
        ValueError: fewer than two samples.
    """
    if len(predictions) < 2:
        raise ValueError(f"{len(predictions)} labelled sample(s) are too few for a head")
    torch.manual_seed(0)
    head = OutcomeHead(spec, kind, predictions.logits.shape[1])
    head.temperature.fill_(temperature)
    head.rates.copy_(torch.tensor(rates))
    logits = torch.from_numpy(predictions.logits)
    inputs = features(*predictions.tensors(), head.ranks)
    normalise_by(head.layers[0], inputs)
    base, wanted = head.prior(logits), torch.from_numpy((outcomes * weights[:, None]).astype(np.float32))
    # Biases go free: what every sample shares is no detail to be held back.
    parameters = [p for p in head.layers.parameters() if p.dim() > 1]

    def loss() -> Tensor:
        misfit = -(wanted * torch.log_softmax(base + head.added(logits, inputs), 1)).sum()
        held = _L2[spec.kind] / 2 * sum(p.square().sum() for p in parameters) + _CLASS_L2 / 2 * head.classes.square().sum()
        return (misfit + held + SMOOTH / 2 * roughness(head.layers)) / float(weights.sum()) + sparse(spec, head.layers, inputs)

    minimise([*head.layers.parameters(), head.classes], loss)
    return head


def outcomes(kind: Kind, small_right: Bool, large_right: Bool) -> Float32:
    """One-hot outcomes [N, 2] of (wrong, right), or [N, 3] of (hurt, neutral, benefit)."""
    if kind == "correctness":
        return np.stack([~small_right, small_right], 1).astype(np.float32)
    return np.stack([small_right & ~large_right, small_right == large_right, ~small_right & large_right], 1).astype(np.float32)


def outcome_rates(small_right: Bool, large_right: Bool, weights: NDArray[np.floating]) -> tuple[float, float]:
    """(P(large right | small wrong), P(large right | small right)), weighted."""
    return _rate(weights, large_right & ~small_right, ~small_right), _rate(weights, large_right & small_right, small_right)


def _rate(weights: NDArray[np.floating], hits: Bool, among: Bool) -> float:
    """The weighted share of `hits` in `among`, with one hit and one miss added: never 0 or 1."""
    return float((weights[hits].sum() + 1) / (weights[among].sum() + 2))
