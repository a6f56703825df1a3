"""Choosing ε: for a share of cloud calls, or for an accuracy on labels that were kept back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kcm.calibration import Threshold
from kcm.errors import DataError
from kcm.policy import epsilon_for_accuracy, epsilon_for_rate
from training.evaluate import wilson

Float32 = NDArray[np.float32]


def for_rate(confidence: Float32, rate: float) -> Threshold:
    """ε whose share of cloud calls on `confidence` [N] is `rate`; no labels needed.

    The confidences must come from samples that the small model wasn't fitted on (out of fold, or fresh).
    """
    return _described(confidence, epsilon_for_rate(confidence, rate), "cloud-rate", rate, None)


def for_accuracy(confidence: Float32, small_right: NDArray[np.bool_], large_right: NDArray[np.bool_], target: float) -> Threshold:
    """ε with the fewest cloud calls whose accuracy on the calibration split [N] reaches `target`: an estimate, no guarantee yet.

    Raises:
        DataError: no ε reaches it.
    """
    epsilon = epsilon_for_accuracy(confidence, small_right, large_right, target)
    if epsilon is None:
        raise DataError(
            f"accuracy {target:.3f} is out of reach on {confidence.size} calibration samples: "
            f"the small model has {small_right.mean():.3f}, the large one {large_right.mean():.3f}",
            fix="lower the target",
        )
    accuracy = float(np.where(confidence > epsilon, small_right, large_right).mean())
    return _described(confidence, epsilon, "accuracy", target, accuracy)


def fixed(confidence: Float32, epsilon: float) -> Threshold:
    """A given ε, with the share of cloud calls that it makes on `confidence` [N]."""
    return _described(confidence, epsilon, "fixed", epsilon, None)


def _described(confidence: Float32, epsilon: float, method: str, target: float, accuracy: float | None) -> Threshold:
    escalated = int((confidence <= epsilon).sum())
    return Threshold(
        epsilon=epsilon,
        method=method,
        target=target,
        samples=confidence.size,
        cloud_rate=escalated / max(1, confidence.size),
        cloud_rate_interval=wilson(escalated, confidence.size),
        accuracy=accuracy,
    )
