"""ε with a promise: at most so much accuracy is lost against always asking the large model, with so much confidence.

Learn then test (Angelopoulos et al., arXiv 2110.01052) by fixed-sequence testing: thresholds from the safe end (everything
escalates) to the risky one, each tested at level δ, until one can't be rejected. The loss of a sample is 1 where the small model
answers wrongly what the large one knows, −1 the other way round, else 0. That its mean is above the promised drop is tested as in
paired non-inferiority trials: outcomes ordered by Tango's score statistic (1998), their probability summed exactly, worst over the
shares of gains that the data leave possible (Hsueh, Liu & Chen 2001; Berger & Boos 1994). No normal approximation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kcm.calibration import Guarantee
from kcm.errors import DataError

Float = NDArray[np.floating]
Bool = NDArray[np.bool_]

METHOD = "learn-then-test, fixed sequence, exact paired non-inferiority test"
STEPS = 100  # thresholds of the sequence
_NUISANCE = 0.02  # part of δ that the confidence region of the share of gains costs
_REGION = 41  # points of that region


@dataclass(frozen=True)
class Promise:
    """ε, the guarantee, and per tested threshold (ε, cloud rate, drop, p-value), the safe end first."""

    epsilon: float
    guarantee: Guarantee
    tested: list[tuple[float, float, float, float]]


def sequence(scores: Float) -> list[float]:
    """Thresholds from 1.0 (all escalate) down to −1.0 (none do), at equal steps of call rate on `scores` [M].

    The scores must not be the calibration split's: a sequence that looks at the samples it is tested on isn't fixed.

    Raises:
        DataError: no scores.
    """
    if scores.size == 0:
        raise DataError("no scores to lay the thresholds on")
    inner = np.quantile(np.asarray(scores, np.float64), np.arange(STEPS - 1, 0, -1) / STEPS)
    return [1.0, *dict.fromkeys(inner.tolist()), -1.0]


def promise(score: Float, small_right: Bool, large_right: Bool, thresholds: list[float], *, max_drop: float, confidence: float) -> Promise:
    """The ε with the fewest cloud calls that the data support.

    Arrays are [N]: independent labelled samples (no text twice) that nothing was fitted or chosen on.

    Args:
        thresholds: of `sequence`, from other samples.
        max_drop: in accuracy, 0.005 is half a point.

    Raises:
        ValueError: max_drop outside 0..1 or confidence outside 0.5..1.
        DataError: not even the safest threshold below "everything escalates" can be promised; the message says how many samples it takes.
    """
    if not (0.0 < max_drop < 1.0 and 0.5 <= confidence < 1.0):
        raise ValueError(f"max_drop {max_drop} must lie in 0..1, confidence {confidence} in 0.5..1")
    n, delta = len(score), 1 - confidence
    check_support(n, max_drop, confidence)
    chosen = 1.0
    tested: list[tuple[float, float, float, float]] = []
    for epsilon in thresholds:
        losses, gains = counts(score, small_right, large_right, epsilon)
        p = p_value(losses, gains, n, max_drop, delta)
        tested.append((epsilon, float((score <= epsilon).mean()), (losses - gains) / n, p))
        if p > delta:
            break
        chosen = epsilon
    if chosen == 1.0:
        _, rate, drop, p = tested[-1]
        raise DataError(
            f"no ε can be promised: with {1 - rate:.0%} of samples kept the drop is {100 * drop:.2f} points on {n} samples ({shown(p)})",
            fix="train or distil the small model further, keep back more labels, or promise less",
        )
    upper = upper_bound(*counts(score, small_right, large_right, chosen), n, delta)
    return Promise(chosen, Guarantee(max_drop=max_drop, confidence=confidence, upper=upper, effective_n=float(n), method=METHOD), tested)


def check_support(n: int, max_drop: float, confidence: float) -> None:
    """Whether n labelled samples can support the promise at all: cheap, before any model is asked.

    Raises:
        DataError: they can't; the message says how many it takes.
    """
    need = samples_needed(max_drop, confidence)
    if n < need:
        raise DataError(
            f"{n} labelled samples can't promise a drop of at most {100 * max_drop:g} points with {100 * confidence:g}% confidence: "
            f"without a single loss it takes {need}",
            fix="keep back more labels, or promise less: a larger drop or a lower confidence",
        )


def samples_needed(max_drop: float, confidence: float) -> int:
    """The fewest samples that can support the promise at all: those of a sample without one loss."""
    delta = 1 - confidence

    def enough(n: int) -> bool:
        return p_value(0, 0, n, max_drop, delta) <= delta

    few = 0
    many = max(1, int(np.log(delta) / np.log1p(-max_drop)))  # what the binomial bound takes: near, and too few
    while not enough(many):
        few, many = many, many + many // 8 + 1
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many


def shown(p: float) -> str:
    """A p-value for people: "p = 0.034", "p = 3.2e-05"."""
    return f"p = {p:.3f}" if p >= 0.001 else f"p = {p:.1e}"


def counts(score: Float, small_right: Bool, large_right: Bool, epsilon: float) -> tuple[int, int]:
    """(losses, gains) among the samples that stay local at ε."""
    local = score > epsilon
    return int((local & large_right & ~small_right).sum()), int((local & small_right & ~large_right).sum())


@lru_cache(4096)
def p_value(losses: int, gains: int, n: int, max_drop: float, delta: float = 0.05) -> float:
    """Of "the mean loss is above max_drop", from counts among n samples; made to be compared with delta."""
    from scipy.stats import beta, binom

    # The share of gains lies in here but for `missed` of all data (Clopper–Pearson).
    missed = _NUISANCE * delta
    low = float(beta.ppf(missed / 2, gains, n - gains + 1)) if gains else 0.0
    high = float(beta.ppf(1 - missed / 2, gains + 1, n - gains)) if gains < n else 1.0
    limit = (1 - max_drop) / 2
    shares = np.linspace(min(low, limit), min(high, limit), _REGION)[:, None]
    # As extreme or more: for each number of gains up to a most number of losses.
    g = np.arange(n + 1)
    most = _most_losses(_score(np.array([losses]), np.array([gains]), n, max_drop)[0], g, n, max_drop)
    tail = binom.pmf(g, n, shares) * binom.cdf(most, n - g, (shares + max_drop) / (1 - shares))
    return min(1.0, float(tail.sum(1).max()) + missed)


def _score(losses: NDArray[np.int64], gains: NDArray[np.int64], n: int, drop: float) -> NDArray[np.float64]:
    """Tango's statistic: (losses − gains − n·drop) over its standard error at the likeliest share of gains under the hypothesis."""
    a, b, c = 2 * n, (2 * n - losses + gains) * drop - losses - gains, -gains * drop * (1 - drop)
    share = (np.sqrt(b * b - 4.0 * a * c) - b) / (2 * a)
    score: NDArray[np.float64] = (losses - gains - n * drop) / np.sqrt(n * (2 * share + drop * (1 - drop)))
    return score


def _most_losses(score: float, gains: NDArray[np.int64], n: int, drop: float) -> NDArray[np.int64]:
    """For each number of gains the most losses whose statistic is at most `score`, −1 where none is; the statistic grows with losses."""
    low, high = np.full(len(gains), -1), n - gains
    while (low < high).any():
        middle = (low + high + 1) // 2
        fits = _score(middle, gains, n, drop) <= score + 1e-12
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low


def upper_bound(losses: int, gains: int, n: int, delta: float) -> float:
    """The smallest drop that the test rejects at level δ, to 1e-5: an upper confidence bound of the mean loss."""
    low, high = (losses - gains) / n, 1.0
    low = max(low, 1e-6)
    if p_value(losses, gains, n, low, delta) <= delta:
        return low
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(losses, gains, n, middle, delta) <= delta else (middle, high)
    return high
