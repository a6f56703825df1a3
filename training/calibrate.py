"""Choosing ε on the routing score: for a share of cloud calls, for an accuracy, with a promise, or by hand."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from kcm.calibration import Reference, Threshold
from kcm.errors import DataError
from kcm.policy import draw, epsilon_for_accuracy, epsilon_for_rate
from kcm.sample import Payload
from training.data import Split, identity
from training.evaluate import wilson
from training.guarantee import Promise

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]

SELECTION = 1 / 3  # of the calibration file, where the task names no selection file
_QUANTILES = 19  # of the routing score, for the edge to compare its traffic with


def for_rate(score: Float32, rate: float) -> Threshold:
    """ε whose share of cloud calls on `score` [N] is `rate`; no labels needed.

    The scores must come from samples that the small model wasn't fitted on (out of fold, or fresh).
    """
    return _described(score, epsilon_for_rate(score, rate), "cloud-rate", rate)


def for_accuracy(score: Float32, small_right: Bool, large_right: Bool, target: float) -> Threshold:
    """ε with the fewest cloud calls whose accuracy on the calibration split [N] reaches `target`: an estimate, no promise.

    Raises:
        DataError: no ε reaches it.
    """
    epsilon = epsilon_for_accuracy(score, small_right, large_right, target)
    if epsilon is None:
        raise DataError(
            f"accuracy {target:.3f} is out of reach on {score.size} calibration samples: "
            f"the small model has {small_right.mean():.3f}, the large one {large_right.mean():.3f}",
            fix="lower the target",
        )
    return with_accuracy(_described(score, epsilon, "accuracy", target), score, small_right, large_right)


def for_promise(score: Float32, small_right: Bool, large_right: Bool, promise: Promise) -> Threshold:
    """The threshold of a promise (training.guarantee) on the calibration split [N] that it was made on."""
    threshold = _described(score, promise.epsilon, "guarantee", promise.guarantee.max_drop)
    return msgspec.structs.replace(with_accuracy(threshold, score, small_right, large_right), guarantee=promise.guarantee)


def fixed(score: Float32, epsilon: float) -> Threshold:
    """A given ε, with the share of cloud calls that it makes on `score` [N]."""
    return _described(score, epsilon, "fixed", epsilon)


def with_accuracy(threshold: Threshold, score: Float32, small_right: Bool, large_right: Bool) -> Threshold:
    """The threshold with the routed accuracy on labelled samples [N] and its 95 % Wilson interval."""
    right = np.where(score > threshold.epsilon, small_right, large_right)
    return msgspec.structs.replace(threshold, accuracy=float(right.mean()), accuracy_interval=wilson(int(right.sum()), right.size))


def reference(score: Float32, epsilon: float, agree: Bool | None = None, labelled_score: Float32 | None = None) -> Reference:
    """What the edge compares its traffic with: quantiles of `score` [N], and how often small and large model agree on other samples.

    Args:
        agree: [M], with their `labelled_score` [M]; None where the large model wasn't asked.
    """
    levels = np.arange(1, _QUANTILES + 1) / (_QUANTILES + 1)
    found = Reference(
        samples=score.size,
        cloud_rate=float((score <= epsilon).mean()),
        quantiles=tuple(np.quantile(np.asarray(score, np.float64), levels).tolist()),
    )
    if agree is None or labelled_score is None:
        return found
    away = labelled_score <= epsilon
    return msgspec.structs.replace(
        found,
        escalated=int(away.sum()),
        agreement_escalated=float(agree[away].mean()) if away.any() else None,
        local=int((~away).sum()),
        agreement_local=float(agree[~away].mean()) if not away.all() else None,
    )


def distinct(split: Split) -> Split:
    """The split with each sample once, the first of its rows: one that comes twice is no second witness."""
    first: dict[Payload, int] = {}
    for place, payload in enumerate(split.payloads):
        first.setdefault(identity(payload), place)
    return split.take(list(first.values()))


def divide(split: Split) -> tuple[Split, Split]:
    """(selection, calibration) of one labelled file, by a hash of each: the same in every round, none in both."""
    chosen = [draw(payload, "selection") < SELECTION for payload in split.payloads]
    return split.take([i for i, c in enumerate(chosen) if c]), split.take([i for i, c in enumerate(chosen) if not c])


def _described(score: Float32, epsilon: float, method: str, target: float) -> Threshold:
    escalated = int((score <= epsilon).sum())
    return Threshold(
        epsilon=epsilon,
        method=method,
        target=target,
        samples=score.size,
        cloud_rate=escalated / max(1, score.size),
        cloud_rate_interval=wilson(escalated, score.size),
    )
