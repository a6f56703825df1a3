"""How a routed system scores: accuracy against cloud calls, intervals, paired differences."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcm.policy import epsilon_for_rate

Float = NDArray[np.floating]
Bool = NDArray[np.bool_]

RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0)  # targets of every curve
_Z95 = 1.959964


@dataclass(frozen=True)
class Routed:
    """Accuracy and share of cloud calls of one ε on one split; `right` [N] says per sample whether the answer was right."""

    accuracy: float
    cloud_rate: float
    right: Bool


def route(confidence: Float, small_right: Bool, large_right: Bool, epsilon: float) -> Routed:
    """Answer N samples by the policy: local where confidence > ε. All arrays are [N]."""
    local = confidence > epsilon
    right = np.where(local, small_right, large_right)
    return Routed(float(right.mean()), float(1 - local.mean()), right)


def curve(calibration: Float, confidence: Float, small_right: Bool, large_right: Bool) -> dict[float, Routed]:
    """One point per target of RATES: ε from the `calibration` confidences [M], the score on the N test samples."""
    return {rate: route(confidence, small_right, large_right, epsilon_for_rate(calibration, rate)) for rate in RATES}


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share (Wilson 1927). No trials: (0, 1)."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + _Z95**2 / (2 * trials)
    spread = _Z95 * np.sqrt(share * (1 - share) / trials + _Z95**2 / (4 * trials**2))
    scale = 1 + _Z95**2 / trials
    return float((centre - spread) / scale), float((centre + spread) / scale)


def paired_interval(differences: NDArray[np.floating], *, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): 95 % percentile bootstrap of paired differences.

    Args:
        differences: [N] over samples, or [S, N] with a row per seed: then seeds and samples are both resampled.
    """
    values = np.atleast_2d(np.asarray(differences, dtype=np.float64))
    seeds, samples = values.shape
    # The seeds share their samples: draw samples by counts for all rows at once, then average over drawn rows.
    counts, state = resampled(samples, resamples, seed)
    rng = np.random.default_rng()
    rng.bit_generator.state = state
    by_seed = counts @ values.T / samples  # [resamples, S]
    drawn = rng.integers(seeds, size=(resamples, seeds))
    means = np.take_along_axis(by_seed, drawn, 1).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


@lru_cache(1)  # many differences are taken on one split, and drawing costs more than all the rest
def resampled(samples: int, resamples: int, seed: int) -> tuple[NDArray[np.int64], Any]:
    """How often each resample takes each sample [R, N], and the generator's state behind the draw."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(samples, np.full(samples, 1 / samples), size=resamples)
    counts.flags.writeable = False
    return counts, rng.bit_generator.state


def auroc(score: Float, positive: Bool) -> float:
    """Area under the ROC curve of `score` [N] for `positive` [N]; ties count half. NaN where one class is empty."""
    from scipy.stats import rankdata

    n = int(positive.sum())
    if n in (0, positive.size):
        return float("nan")
    ranks = rankdata(score)
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (positive.size - n)))
