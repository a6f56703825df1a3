"""Shares and differences of shares with 95 % intervals that hold for few samples and for shares near 0 and 1, too."""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

_Z = 1.959964


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """A share of `samples`, with Wilson's interval (1927). 0 samples: nothing is known, 0..1."""

    samples: int
    share: float
    low: float
    high: float


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A difference of accuracies, in −1..1. 0 samples: nothing is known. `variance`: of one sample's contribution."""

    samples: int
    difference: float
    low: float
    high: float
    variance: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def in_points(self) -> str:
        return f"{100 * self.difference:+.1f} points [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"

    def needed(self, half_width: float, most: float = math.inf) -> int:
        """How many samples make an interval of ± half_width; `most` bounds the variance where something else is known of it."""
        return math.ceil(_Z**2 * min(self.variance, most) / half_width**2)


_NOTHING = Estimate(samples=0, difference=0.0, low=-1.0, high=1.0, variance=1.0)


class Arm:
    """One arm of an experiment: sums over its samples' weights w and outcomes y ∈ {0, 1}."""

    def __init__(self) -> None:
        self.samples, self.weight, self.squares, self.right, self.right_squares = 0, 0.0, 0.0, 0.0, 0.0

    def add(self, right: NDArray[np.bool_], weight: NDArray[np.float64]) -> None:
        self.samples += right.size
        self.weight += float(weight.sum())
        self.squares += float((weight**2).sum())
        self.right += float(weight[right].sum())
        self.right_squares += float((weight[right] ** 2).sum())

    def __add__(self, other: Arm) -> Arm:
        total = Arm()
        for name in vars(total):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def accuracy(self) -> Share:
        """Hájek's mean Σwy/Σw, with Wilson's interval on the effective number of samples.

        That number is mean·(1 − mean)/variance with the linearised variance Σw²(y − mean)²/(Σw)² (Korn & Graubard 1998), at most
        Kish's (Σw)²/Σw², which stands alone where the mean is 0 or 1.
        """
        if not self.samples:
            return share(0, 0)
        mean = min(1.0, self.right / self.weight)
        effective = self.weight**2 / self.squares
        variance = ((1 - 2 * mean) * self.right_squares + mean**2 * self.squares) / self.weight**2
        if 0.0 < mean < 1.0 and variance > 0.0:
            effective = min(effective, mean * (1 - mean) / variance)
        low, high = _wilson(mean, effective)
        return Share(samples=self.samples, share=mean, low=low, high=high)


def share(count: int, samples: int) -> Share:
    low, high = _wilson(count / samples, samples) if samples else (0.0, 1.0)
    return Share(samples=samples, share=count / samples if samples else 0.0, low=low, high=high)


def weighted_difference(with_hint: Arm, without: Arm, shown: int = 1, withheld: int = 1) -> Estimate:
    """Accuracy of one arm minus the other's: Newcombe's square-and-add interval (1998, method 10) of the two Wilson intervals.

    Args:
        shown, withheld: how chance divided all samples, those without a truth, too: says what one more will be worth where no
            truth of one arm is known.
    """
    one, two = with_hint.accuracy(), without.accuracy()
    samples = one.samples + two.samples
    if not (one.samples and two.samples):
        total, least = shown + withheld, 0.25  # of a right-or-wrong outcome
        return msgspec.structs.replace(_NOTHING, variance=least * (total / max(1, shown) + total / max(1, withheld)))
    difference = one.share - two.share
    low = difference - math.hypot(one.share - one.low, two.high - two.share)
    high = difference + math.hypot(one.high - one.share, two.share - two.low)
    # What one more sample of the same mix of arms contributes: the interval's square shrinks with their number.
    variance = samples * ((high - low) / 2 / _Z) ** 2
    return Estimate(samples=samples, difference=difference, low=low, high=high, variance=variance)


def paired_difference(samples: int, mended: int, spoilt: int) -> Estimate:
    """(mended − spoilt)/samples, with the adjusted Wald interval of Bonett & Price (2012): one of each and no other is added."""
    if not samples:
        return _NOTHING
    up, down = (mended + 1) / (samples + 2), (spoilt + 1) / (samples + 2)
    variance = up + down - (up - down) ** 2
    spread = _Z * math.sqrt(variance / (samples + 2))
    low, high = max(-1.0, up - down - spread), min(1.0, up - down + spread)
    return Estimate(samples=samples, difference=(mended - spoilt) / samples, low=low, high=high, variance=variance)


def _wilson(mean: float, samples: float) -> tuple[float, float]:
    centre = (mean + _Z**2 / (2 * samples)) / (1 + _Z**2 / samples)
    spread = _Z / (1 + _Z**2 / samples) * math.sqrt(mean * (1 - mean) / samples + (_Z / (2 * samples)) ** 2)
    return min(mean, max(0.0, centre - spread)), max(mean, min(1.0, centre + spread))
