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
from training.fit import fold_of
from training.heads import OutcomeHead, fit_outcome_head
from training.judge import Judge, Predictions, max_softmax

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]

RATES = (0.1, 0.2, 0.3, 0.4)  # cloud calls at which heads are compared
FEWEST = 100  # samples below which nothing is chosen by them
_FOLDS = 5


@dataclass(frozen=True)
class Selection:
    """Labelled samples [N] that neither model was fitted on: the small model's outputs, who was right, and weights (1/p_escalate)."""

    predictions: Predictions
    small_right: Bool
    large_right: Bool
    weights: Float32 | None = None

    def __len__(self) -> int:
        return len(self.predictions)

    def take(self, index: NDArray[np.int64]) -> Selection:
        weights = None if self.weights is None else self.weights[index]
        return Selection(self.predictions.take(index), self.small_right[index], self.large_right[index], weights)


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


def choose(judge: Judge, head: str, selection: Selection | None) -> Router:
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
        choice = HeadChoice(
            reason=f"{len(selection)} selection samples are too few to choose by: it takes {FEWEST}", samples=len(selection)
        )
        return Router(judge, choice)
    choice = compare(judge, selection)
    for name in names:
        if name == head:
            choice = msgspec.structs.replace(choice, head=name, reason="set by hand")
    outcome = None
    if choice.head in ("correctness", "benefit"):
        outcome = _fit(judge, choice.head, selection)
    return Router(judge, choice, outcome)


def compare(judge: Judge, selection: Selection) -> HeadChoice:
    """Every head's routed accuracy on the selection split; fitted heads are scored on the folds that they weren't fitted on."""
    right = {name: _routed(score, selection) for name, score in _scores(judge, selection).items()}
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


def _scores(judge: Judge, selection: Selection) -> dict[HeadName, Float32]:
    scores: dict[HeadName, Float32] = {
        "max-softmax": max_softmax(selection.predictions.logits, float(judge.temperature)),
        "confidence": judge.confidence(selection.predictions),
    }
    outcome = 2 * selection.small_right + selection.large_right
    folds = fold_of(outcome.astype(np.int64), _FOLDS, seed=0)
    for name in ("correctness", "benefit"):
        score = np.zeros(len(selection), np.float32)
        for fold in range(_FOLDS):
            held = np.flatnonzero(folds == fold)
            score[held] = _fit(judge, name, selection.take(np.flatnonzero(folds != fold))).score(selection.predictions.take(held))
        scores[name] = score
    return scores


def _routed(score: Float32, selection: Selection) -> NDArray[np.float64]:
    """Per sample [N] how often the routed answer is right over RATES, weighted so that the mean is the traffic's."""
    rows = [np.where(score > epsilon_for_rate(score, rate), selection.small_right, selection.large_right) for rate in RATES]
    right: NDArray[np.float64] = np.mean(rows, 0)
    return right if selection.weights is None else right * selection.weights / selection.weights.mean()


def _fit(judge: Judge, name: HeadName, selection: Selection) -> OutcomeHead:
    assert name == "correctness" or name == "benefit"
    s = selection
    temperature = float(judge.temperature)
    return fit_outcome_head(judge.spec, name, s.predictions, s.small_right, s.large_right, temperature=temperature, weights=s.weights)


def _unselected(head: str) -> HeadChoice:
    if head == "auto":
        return HeadChoice(reason="no labelled samples to choose by: the judge's confidence routes")
    return HeadChoice(head="max-softmax" if head == "max-softmax" else "confidence", reason="set by hand")
