"""The routing policy as pure functions: who answers, and which ε gives which share of cloud calls.

Source: arXiv 2510.20278: C_x > ε: the sample is simple and the small model answers; else the large model does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kcm.sample import Route

DEFAULT_EPSILON = 0.98  # the paper's


def stays_local(confidence: float, epsilon: float, route: Route = Route.AUTO) -> bool:
    """True where the small model answers. A C_x of NaN escalates."""
    return confidence > epsilon if route is Route.AUTO else route is Route.LOCAL


def epsilon_for_rate(confidence: NDArray[np.floating], rate: float) -> float:
    """The ε with which a share `rate` of `confidence` [N] escalates, as near as ties allow.

    Raises:
        ValueError: no confidences, or a rate outside 0..1.
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"cloud rate {rate} is outside 0..1")
    if confidence.size == 0:
        raise ValueError("no confidences to choose a threshold from")
    ordered = np.sort(np.asarray(confidence, dtype=np.float64))
    escalated = round(rate * ordered.size)
    if escalated == 0:
        return -1.0  # below any probability: nothing escalates
    if escalated == ordered.size:
        return 1.0
    # Between two values, so that a graph's rounding in the last digit moves nobody across.
    low, high = ordered[escalated - 1], ordered[escalated]
    if low < high:
        return float((low + high) / 2)
    # A tie straddles the cut: take the side that is nearer to the rate.
    below, upto = np.searchsorted(ordered, low, "left"), np.searchsorted(ordered, low, "right")
    if escalated - below < upto - escalated:
        return -1.0 if below == 0 else float((ordered[below - 1] + low) / 2)
    return float(low) if upto == ordered.size else float((low + ordered[upto]) / 2)


def epsilon_for_accuracy(
    confidence: NDArray[np.floating],
    small_right: NDArray[np.bool_],
    large_right: NDArray[np.bool_],
    target: float,
) -> float | None:
    """The ε with the fewest cloud calls whose accuracy on these samples reaches `target`; None where no ε does.

    An empirical choice on the calibration split, without a guarantee. All arrays are [N].
    """
    order = np.argsort(confidence, kind="stable")
    ordered = np.asarray(confidence, dtype=np.float64)[order]
    # right[k]: samples answered rightly where the k least confident escalate
    right = np.concatenate([[0], np.cumsum(large_right[order])]) + np.concatenate([np.cumsum(small_right[order][::-1])[::-1], [0]])
    for escalated in np.flatnonzero(right >= target * ordered.size - 1e-9):
        if escalated == 0:
            return -1.0
        if escalated == ordered.size:
            return 1.0
        if ordered[escalated - 1] < ordered[escalated]:
            return float((ordered[escalated - 1] + ordered[escalated]) / 2)
    return None
