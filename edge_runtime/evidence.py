"""Tests of "as in calibration": each gives no false alarm with at least the stated probability, whatever is looked at how often.

A test closes a window of samples, looks once, and begins anew; eight windows make a long one, which sees smaller shifts. Every look
has the level LEVEL, and no traffic makes more than LOOKS of them per 100,000 samples, so that all tests together raise a false alarm
over 100,000 unchanged samples with probability ≤ LEVEL · LOOKS = 1 %. The bounds hold for finite samples on both sides: the
calibration split's size counts as much as the window's. They take samples as independent: traffic that comes in bursts of one kind
looks like drift, and for the length of a window it is.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

LOOKS = 2700  # per 100,000 samples at most: where all of them are explored and their truth comes back
LEVEL = 0.01 / LOOKS
_LONG = 8  # short windows
_BETS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7)  # shares of the largest bet that can't lose everything


class Shift(NamedTuple):
    """A window that can't be like calibration: the share seen, the one expected, over so many samples."""

    live: float
    expected: float
    samples: int
    at: float = math.nan  # of scores: the share is of those at most here


class Scores:
    """The routing score against calibration's quantiles: two-sample Kolmogorov–Smirnov at those points.

    Source: Smirnov's bound 2·exp(−2·D²·nm/(n+m)) on the largest distance D of two empirical distributions; Wei and Dudley, "Two-sample
    Dvoretzky–Kiefer–Wolfowitz inequalities" (2012), on how it holds for finite n, m. Looking at some points only makes D smaller.
    """

    def __init__(self, quantiles: Sequence[float], samples: int, window: int, level: float = LEVEL) -> None:
        """
        Args:
            quantiles: of the score at i/(Q + 1), ascending; equal ones where many samples share a score.
            samples: that they were taken from.
        """
        self._samples, self._window, self._level = samples, window, level
        self._cuts = sorted(set(quantiles))
        steps = len(quantiles) + 1
        # A score that many samples share stands for a range of levels: below it lies at most the first, up to it at least the last.
        self._first = [(bisect_left(quantiles, cut) + 1) / steps for cut in self._cuts]
        self._last = [bisect_right(quantiles, cut) / steps for cut in self._cuts]
        self._counts = [0] * (2 * len(self._cuts) + 1)  # below the first cut, at it, between it and the second, ...
        self._long = self._counts.copy()
        self._seen = self._windows = 0

    def add(self, score: float) -> Shift | None:
        """Count one score. NaN, which escalates, is below every other."""
        if score != score:
            score = -math.inf
        self._counts[bisect_left(self._cuts, score) + bisect_right(self._cuts, score)] += 1
        self._seen += 1
        if self._seen < self._window:
            return None
        self._long = [a + b for a, b in zip(self._long, self._counts, strict=True)]
        shift = self._look(self._counts, self._window)
        self._windows += 1
        if self._windows == _LONG:
            shift = shift or self._look(self._long, _LONG * self._window)
            self._long, self._windows = [0] * len(self._counts), 0
        self._counts, self._seen = [0] * len(self._counts), 0
        return shift

    def _look(self, counts: Sequence[int], number: int) -> Shift | None:
        widest, found = self.distance(number), None
        below = 0
        for place, cut in enumerate(self._cuts):
            below += counts[2 * place]
            upto = below + counts[2 * place + 1]
            for live, expected, distance in (
                (below / number, self._first[place], below / number - self._first[place]),
                (upto / number, self._last[place], self._last[place] - upto / number),
            ):
                if distance > widest:
                    widest, found = distance, Shift(live, expected, number, cut)
            below = upto
        return found

    def distance(self, number: int) -> float:
        """What a window of `number` samples must differ by, somewhere."""
        return math.sqrt(math.log(2 / self._level) / 2 * (1 / self._samples + 1 / number)) + 1 / self._samples


class Share:
    """A share of samples against calibration's: two-sample likelihood ratio with a Chernoff bound, exact for all sizes.

    With k of n and K of N hits and the pooled share q, n·kl(k/n, q) + N·kl(K/N, q) is at most what the true share gives, whose two terms
    exceed x with probability ≤ exp(−x) each, so that their sum does with ≤ (1 + x)·exp(−x).
    """

    def __init__(self, expected: float | None, samples: int, window: int, *, rises: bool, level: float = LEVEL) -> None:
        """
        Args:
            expected: the share in calibration; None: it isn't known, and nothing is tested.
            samples: that it was measured on.
            rises: a larger share is a shift too, else only a smaller one.
        """
        self._expected, self._samples, self._window, self._rises = expected, samples, window, rises
        self._bound = chernoff_pair(level / 2 if rises else level)
        self._hits = self._seen = self._hits_before = self._seen_before = 0
        self._long_hits = self._windows = 0

    def add(self, hit: bool) -> Shift | None:
        self._hits += hit
        self._seen += 1
        if self._seen < self._window:
            return None
        shift = self._look(self._hits, self._window)
        self._long_hits += self._hits
        self._windows += 1
        if self._windows == _LONG:
            shift = shift or self._look(self._long_hits, _LONG * self._window)
            self._long_hits = self._windows = 0
        self._hits_before, self._seen_before = self._hits, self._seen
        self._hits = self._seen = 0
        return shift

    @property
    def live(self) -> float | None:
        """The share over this window and the one before; None before the first sample."""
        number = self._seen + self._seen_before
        return (self._hits + self._hits_before) / number if number else None

    def _look(self, hits: int, number: int) -> Shift | None:
        if self._expected is None or not self._samples:
            return None
        live = hits / number
        if live == self._expected or (live > self._expected and not self._rises):
            return None
        pooled = (hits + self._expected * self._samples) / (number + self._samples)
        ratio = number * _kl(live, pooled) + self._samples * _kl(self._expected, pooled)
        return Shift(live, self._expected, number) if ratio > self._bound else None


class Losses:
    """Values −1, 0, 1 whose mean must not exceed a bound: a bet on "it does", whose wealth passes 1/LEVEL with probability ≤ LEVEL.

    Valid at every moment, not only at a window's end (Ville's inequality; Waudby-Smith and Ramdas, "Estimating means of bounded random
    variables by betting", 2023). Bets of several sizes share the stake. A new bet each window, so that a good past is no credit.
    """

    def __init__(self, window: int, level: float = LEVEL) -> None:
        self._windows, self._need = (window, _LONG * window), 1 / level
        self._wealth = [[1.0] * len(_BETS) for _ in self._windows]
        self._seen = [0] * len(self._windows)

    def add(self, value: int, bound: float) -> bool:
        """True: the mean is above `bound`."""
        surprise = (value - bound) / (1 + max(0.0, bound))
        lost = False
        for place, window in enumerate(self._windows):
            wealth = self._wealth[place]
            for bet, share in enumerate(_BETS):
                wealth[bet] *= 1 + share * surprise
            lost = lost or sum(wealth) / len(_BETS) >= self._need
            self._seen[place] += 1
            if self._seen[place] == window:
                self._wealth[place], self._seen[place] = [1.0] * len(_BETS), 0
        return lost


def chernoff_pair(level: float) -> float:
    """x with (1 + x)·exp(−x) = level."""
    low, high = 0.0, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 + middle) * math.exp(-middle) > level else (low, middle)
    return high


def _kl(p: float, q: float) -> float:
    """Between two coins, in nats; q is strictly between 0 and 1 unless it equals p."""
    heads = p * math.log(p / q) if p > 0 else 0.0
    tails = (1 - p) * math.log((1 - p) / (1 - q)) if p < 1 else 0.0
    return heads + tails
