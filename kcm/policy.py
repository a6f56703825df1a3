"""The routing policy as pure functions: who answers, what the large model sees of the hint, who is explored, and which ε gives what.

Source: arXiv 2510.20278: C_x > ε: the sample is simple and the small model answers; else the large model does. Here ε stands on
the routing score, which is C_x unless calibration chose another head.
"""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np
from numpy.typing import NDArray

from kcm.calibration import HintGate
from kcm.sample import Hint, Route

DEFAULT_EPSILON = 0.98  # the paper's


def stays_local(score: float, epsilon: float, route: Route = Route.AUTO) -> bool:
    """True where the small model answers. A routing score of NaN escalates."""
    return score > epsilon if route is Route.AUTO else route is Route.LOCAL


def gate_hint(hint: Hint | None, gate: HintGate, sample_id: str) -> tuple[Hint | None, float]:
    """What the large model may see of a hint, and the probability with which this sample's is shown.

    The draw hangs on the sample's id alone: a retry, another process and an analysis come to the same.
    """
    if hint is None or not hint.label_ids or gate.arm == "none" or hint.confidence < gate.lowest:
        return None, 0.0
    shown = 1.0 - gate.no_hint
    if draw(sample_id, "hint") >= shown:
        return None, shown
    if gate.arm == "assertion":
        hint = msgspec.structs.replace(hint, label_ids=hint.label_ids[:1], probabilities=hint.probabilities[:1])
    return hint, shown


def explores(sample_id: str, share: float) -> bool:
    """True for a share of all samples, chosen by a hash of the id: those that stay local are sent up as well, to measure and to learn."""
    return draw(sample_id, "explore") < share


def draw(of: str | bytes, purpose: str) -> float:
    """A number in [0, 1), the same for one id (or payload) and purpose everywhere, and independent between purposes."""
    data = of.encode() if isinstance(of, str) else of
    digest = hashlib.blake2b(purpose.encode() + b"\x00" + data, digest_size=6).digest()  # 48 bits: exact in a float
    return int.from_bytes(digest, "big") / 2**48


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
