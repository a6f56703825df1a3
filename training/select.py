"""Which head routes: compared on a selection split by the accuracy of the routed system, with max-softmax to fall back to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from kcm.calibration import HeadChoice, HeadEvidence, HeadName
from kcm.errors import ConfigError
from kcm.policy import epsilon_for_rate
from training.evaluate import paired_interval
from training.fit import fold_of, softmax
from training.heads import Kind, OutcomeHead, fit_outcome_head, outcome_rates, outcomes
from training.judge import Judge, Predictions, max_softmax

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]
Index = NDArray[np.int64]

RATES = (0.1, 0.2, 0.3, 0.4)  # cloud calls at which heads are compared
FEWEST = 100  # samples below which nothing is chosen by them
_FOLDS = 5
_TAUGHT_WEIGHT = 0.2  # of a sample whose outcome is inferred, against one whose label is known


@dataclass(frozen=True)
class Selection:
    """Labelled samples [N] that neither model was fitted on: the small model's outputs, the large one's logits [N, C], labels [N].

    weights [N]: 1/p_escalate of samples that were sent by chance; None where all count alike.
    """

    predictions: Predictions
    large: Float32
    labels: Index
    weights: Float32 | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def small_right(self) -> Bool:
        right: Bool = self.predictions.logits.argmax(1) == self.labels
        return right

    @property
    def large_right(self) -> Bool:
        right: Bool = self.large.argmax(1) == self.labels
        return right

    @property
    def shares(self) -> Float32:
        """Weights [N] of mean one."""
        if self.weights is None:
            return np.ones(len(self), np.float32)
        shares: Float32 = (self.weights / self.weights.mean()).astype(np.float32)
        return shares

    def take(self, index: Index) -> Selection:
        weights = None if self.weights is None else self.weights[index]
        return Selection(self.predictions.take(index), self.large[index], self.labels[index], weights)


@dataclass(frozen=True)
class Taught:
    """Samples [M] that the large model answered and whose truth nobody knows: out-of-fold predictions, and its log-probabilities [M, C]."""

    predictions: Predictions
    large: Float32


@dataclass(frozen=True)
class Router:
    """A chosen head: its score, and the evidence. `outcome` is the fitted head of correctness or benefit."""

    judge: Judge
    choice: HeadChoice = field(default_factory=HeadChoice)
    outcome: OutcomeHead | None = None

    def score(self, predictions: Predictions) -> Float32:
        """The routing score [N]: above ε the small model answers."""
        if self.choice.head == "confidence":
            return self.judge.confidence(predictions)
        if self.choice.head == "max-softmax":
            return max_softmax(predictions.logits, float(self.judge.temperature))
        assert self.outcome is not None
        return self.outcome.score(predictions)


def choose(judge: Judge, head: str, selection: Selection | None, taught: Taught | None = None) -> Router:
    """The router with the named head, or ("auto") with the one that the selection split speaks for.

    auto: the head with the best routed accuracy over RATES, where it beats max-softmax by more than a standard error of the paired
    difference; else max-softmax. Without labelled samples the judge's confidence routes.

    Raises:
        ConfigError: no such head, or one that needs labelled samples and there are none.
    """
    names: tuple[HeadName, ...] = get_args(HeadName)
    if head not in ("auto", *names):
        raise ConfigError(f"head {head!r} is unknown", fix=f"choose auto, {', '.join(names)}")
    if selection is None:
        if head in ("correctness", "benefit"):
            raise ConfigError(
                f"head {head!r} is fitted on labelled samples and the large model's answers to them",
                fix="name a calibration (or selection) file under [data], and give --large FOLDER",
            )
        return Router(judge, _unselected(head))
    if head == "auto" and len(selection) < FEWEST:
        reason = f"{len(selection)} selection samples are too few to choose by: it takes {FEWEST}"
        return Router(judge, HeadChoice(reason=reason, samples=len(selection)))
    choice = compare(judge, selection, taught)
    for name in names:
        if name == head:
            choice = msgspec.structs.replace(choice, head=name, reason="set by hand")
    outcome = None
    if choice.head == "correctness" or choice.head == "benefit":
        outcome = fit_head(choice.head, judge, selection, taught)
    return Router(judge, choice, outcome)


def compare(judge: Judge, selection: Selection, taught: Taught | None = None) -> HeadChoice:
    """Every head's routed accuracy on the selection split; fitted heads are scored on the folds that they weren't fitted on."""
    right = {name: _routed(score, selection) for name, score in _scores(judge, selection, taught).items()}
    base = right["max-softmax"]
    evidence: dict[str, HeadEvidence] = {}
    lead: dict[HeadName, float] = {}
    for name, values in right.items():
        difference = values - base
        mean, low, high = paired_interval(difference)
        evidence[name] = HeadEvidence(accuracy=float(values.mean()), difference=mean, interval=(low, high))
        lead[name] = mean - float(difference.std(ddof=1)) / len(difference) ** 0.5
    rivals: list[HeadName] = [name for name in lead if name != "max-softmax"]
    best: HeadName = max(rivals, key=lambda name: evidence[name].difference)
    points = f"{100 * evidence[best].difference:+.2f} points at 10–40 % calls on {len(selection)} selection samples"
    if lead[best] > 0:
        return HeadChoice(head=best, reason=f"beats max-softmax: {points}", samples=len(selection), evidence=evidence)
    reason = f"no head beats it by more than a standard error; the best, {best}: {points}"
    return HeadChoice(head="max-softmax", reason=reason, samples=len(selection), evidence=evidence)


def fit_head(kind: Kind, judge: Judge, selection: Selection, taught: Taught | None) -> OutcomeHead:
    """Fit on the labelled samples, and on what the large model answered: there the truth is inferred from both models' logits."""
    small, large = selection.small_right, selection.large_right
    predictions, targets, weights = selection.predictions, outcomes(kind, small, large), selection.shares
    if taught is not None and len(taught.predictions):
        inferred = inferred_outcomes(kind, taught, pool(selection))
        predictions = Predictions.concatenate([predictions, taught.predictions])
        targets = np.concatenate([targets, inferred])
        weights = np.concatenate([weights, np.full(len(inferred), _TAUGHT_WEIGHT, np.float32)])
    return fit_outcome_head(
        judge.spec,
        kind,
        predictions,
        targets,
        temperature=float(judge.temperature),
        rates=outcome_rates(small, large, selection.shares),
        weights=weights,
    )


def pool(selection: Selection) -> tuple[float, float]:
    """(a, b) of P(y | x) ∝ exp(a z_small + b z_large), the logarithmic pool of both models, by likelihood on the labelled samples."""
    from scipy.optimize import minimize

    small, large = (z.astype(np.float64) for z in (selection.predictions.logits, selection.large))
    rows, shares = np.arange(len(selection)), selection.shares / len(selection)

    def loss(exponents: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        z = exponents[0] * small + exponents[1] * large
        z -= z.max(1, keepdims=True)
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        p_label = np.maximum(p[rows, selection.labels], 1e-12)
        slopes = [shares @ ((p * z_).sum(1) - z_[rows, selection.labels]) for z_ in (small, large)]
        return float(-shares @ np.log(p_label)), np.array(slopes)

    a, b = minimize(loss, np.ones(2), jac=True, method="L-BFGS-B", bounds=[(0, None)] * 2).x
    return float(a), float(b)


def inferred_outcomes(kind: Kind, taught: Taught, exponents: tuple[float, float]) -> Float32:
    """Outcomes' probabilities [M, 2 or 3] under the pool of both models. Where both agree a call changes nothing."""
    small = taught.predictions.logits
    q = softmax(exponents[0] * small + exponents[1] * taught.large)
    rows, ours, theirs = np.arange(len(q)), small.argmax(1), taught.large.argmax(1)
    if kind == "correctness":
        return np.stack([1 - q[rows, ours], q[rows, ours]], 1)
    differ = ours != theirs
    hurt, benefit = q[rows, ours] * differ, q[rows, theirs] * differ
    return np.stack([hurt, 1 - hurt - benefit, benefit], 1).astype(np.float32)


def _scores(judge: Judge, selection: Selection, taught: Taught | None) -> dict[HeadName, Float32]:
    scores: dict[HeadName, Float32] = {
        "max-softmax": max_softmax(selection.predictions.logits, float(judge.temperature)),
        "confidence": judge.confidence(selection.predictions),
    }
    outcome = 2 * selection.small_right + selection.large_right
    folds = fold_of(outcome.astype(np.int64), _FOLDS, seed=0)
    kinds: tuple[Kind, ...] = ("correctness", "benefit")
    for kind in kinds:
        score = np.zeros(len(selection), np.float32)
        for fold in range(_FOLDS):
            held = np.flatnonzero(folds == fold)
            head = fit_head(kind, judge, selection.take(np.flatnonzero(folds != fold)), taught)
            score[held] = head.score(selection.predictions.take(held))
        scores[kind] = score
    return scores


def _routed(score: Float32, selection: Selection) -> NDArray[np.float64]:
    """Per sample [N] how often the routed answer is right over RATES, weighted so that the mean is the traffic's."""
    rows = [np.where(score > epsilon_for_rate(score, rate), selection.small_right, selection.large_right) for rate in RATES]
    right: NDArray[np.float64] = np.mean(rows, 0) * selection.shares
    return right


def _unselected(head: str) -> HeadChoice:
    if head == "auto":
        return HeadChoice(reason="no labelled samples with the large model's answers (--large) to choose by: the judge's confidence routes")
    return HeadChoice(head="max-softmax" if head == "max-softmax" else "confidence", reason="set by hand")
