"""Figures of a routing score: accuracy against calls, APGR, CPT, selective risk, calibration. Scores are [N], higher stays local.

Where accuracy is read at an exact share of calls, samples of one score go up together in parts: the expectation over all orders of
a tie. Sources: APGR and CPT, RouteLLM (Ong et al., arXiv 2406.18665); AURC, Geifman et al. 2019 (arXiv 1805.08206); ECE, Guo et
al. 2017 (arXiv 1706.04599).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.evaluate import wilson

Float = NDArray[np.floating]
Bool = NDArray[np.bool_]

_ECE_BINS = 15
_RELIABILITY_BINS = 10


def share_escalated(score: Float, rates: Float) -> Float:
    """[N] scores, [G] call shares → [G, N]: which part of each sample goes up, the lowest scores first."""
    ordered = np.sort(score)
    below, upto = np.searchsorted(ordered, score, "left"), np.searchsorted(ordered, score, "right")
    share: Float = np.clip((np.asarray(rates)[:, None] * len(score) - below) / (upto - below), 0, 1)
    return share


def right_at(score: Float, small_right: Bool, large_right: Bool, rates: Float) -> Float:
    """[G, N]: the expected correctness of each sample at each exact call share."""
    up = share_escalated(score, rates)
    right: Float = up * large_right + (1 - up) * small_right
    return right


def full_curve(score: Float, small_right: Bool, large_right: Bool) -> Float:
    """Accuracy [N + 1] with 0..N calls, ties in expectation."""
    values, place = np.unique(score, return_inverse=True)
    gain = large_right.astype(float) - small_right
    mean_gain = np.bincount(place, gain, len(values)) / np.bincount(place, minlength=len(values))
    steps = np.repeat(mean_gain, np.bincount(place, minlength=len(values)))
    curve: Float = (small_right.sum() + np.concatenate([[0.0], np.cumsum(steps)])) / len(score)
    return curve


def apgr(rates: Float, accuracy: Float, weak: float, strong: float) -> float | None:
    """(AUC − weak) / (strong − weak) of a curve by trapezoids; None where the large model isn't better: there is no gap to recover."""
    if strong <= weak:
        return None
    area = float(((accuracy[1:] + accuracy[:-1]) / 2 * np.diff(rates)).sum())
    return (area - weak) / (strong - weak)


def quantile_curve(score: Float, small_right: Bool, large_right: Bool) -> tuple[Float, Float]:
    """RouteLLM's points: call shares [P] and accuracies [P] at the edges of ten quantile bins of its "win rate", here −score."""
    win = -np.asarray(score, np.float64)
    edges = np.unique(np.quantile(win, np.linspace(0, 1, 11)))
    # At the last edge it asks for "beyond": nobody. The ends stand for themselves, should all scores be one.
    up = np.stack([np.zeros(len(win), bool), *(win >= edge for edge in edges[-2::-1]), np.ones(len(win), bool)])
    return up.mean(1), np.where(up, large_right, small_right).mean(1)


def calls_for(curve: Float, weak: float, strong: float, part: float) -> float | None:
    """CPT: the smallest share of calls at which `part` of the gap is recovered, between two calls by interpolation."""
    if strong <= weak:
        return None
    wanted = weak + part * (strong - weak)
    first = int(np.argmax(curve >= wanted - 1e-12))
    if first == 0:
        return 0.0
    inside = (wanted - curve[first - 1]) / (curve[first] - curve[first - 1])
    return float((first - 1 + inside) / (len(curve) - 1))


def risk_coverage(score: Float, right: Bool) -> Float:
    """The small model's error [N] among its k most confident answers, k = 1..N, ties in expectation."""
    values, place = np.unique(-np.asarray(score, np.float64), return_inverse=True)
    sizes = np.bincount(place, minlength=len(values))
    errors = np.cumsum(np.repeat(np.bincount(place, ~right, len(values)) / sizes, sizes))
    risk: Float = errors / np.arange(1, len(score) + 1)
    return risk


def ece(probability: Float, right: Bool) -> float:
    """Expected calibration error over 15 bins of equal width."""
    bins = np.clip(np.ceil(np.asarray(probability, np.float64) * _ECE_BINS).astype(int) - 1, 0, _ECE_BINS - 1)
    gap = np.bincount(bins, right.astype(float) - probability, _ECE_BINS)
    return float(np.abs(gap).sum() / len(right))


def brier(probability: Float, right: Bool) -> float:
    return float(np.square(np.asarray(probability, np.float64) - right).mean())


def reliability(probability: Float, right: Bool, copies: int = 1) -> list[dict[str, Any]]:
    """Ten bins of equally many samples: mean claim, share right with its Wilson interval.

    Args:
        copies: runs that are pooled here; the same test samples several times are no more evidence.
    """
    rows = []
    for bin_ in np.array_split(np.argsort(probability, kind="stable"), _RELIABILITY_BINS):
        if len(bin_):
            share, trials = float(right[bin_].mean()), max(1, len(bin_) // copies)
            low, high = wilson(round(share * trials), trials)
            rows.append({"claimed": float(probability[bin_].mean()), "right": share, "low": low, "high": high, "samples": trials})
    return rows
