"""The tests behind the drift alarm keep their level for every size of reference and window, and see what is really there."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_runtime.drift import _ESCALATED, _EXPLORED, _SAMPLES
from edge_runtime.evidence import LEVEL, LOOKS, Losses, Scores, Share, chernoff_pair

Draw = Callable[[np.random.Generator, int], NDArray[np.float64]]
LEVELS = np.arange(1, 20) / 20


def few_values(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """Scores that many samples share, as a judge gives that saturates: half of all at 1, some at 0.5."""
    return np.clip(np.round(rng.beta(5, 1, n) * 1.3, 1), 0.5, 1.0)


def smooth(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    return rng.beta(5, 1, n)


def alarms(draw: Draw, live: Draw, *, samples: int, window: int, level: float, looks: int) -> int:
    """How many windows of `live` are told from a reference of `draw`, each with a reference of its own."""
    rng = np.random.default_rng(1)
    found = 0
    for _ in range(looks):
        scores = Scores(np.quantile(draw(rng, samples), LEVELS).tolist(), samples, window, level)
        found += any(scores.add(score) for score in live(rng, window).tolist())
    return found


@pytest.mark.parametrize("draw", [smooth, few_values])
@pytest.mark.parametrize(("samples", "window"), [(40, 400), (200, 200), (2000, 100)])
def test_like_traffic_is_told_apart_as_rarely_as_promised(draw: Draw, samples: int, window: int) -> None:
    looks, level = 600, 0.05
    assert alarms(draw, draw, samples=samples, window=window, level=level, looks=looks) <= level * looks


@pytest.mark.parametrize("draw", [smooth, few_values])
@pytest.mark.parametrize("pick", [np.min, np.max])
def test_other_traffic_is_told_apart_in_either_direction(draw: Draw, pick: Callable[..., NDArray[np.float64]]) -> None:
    def moved(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
        return pick([draw(rng, n) for _ in range(3)], axis=0)

    assert alarms(draw, moved, samples=10_000, window=500, level=1e-6, looks=20) == 20


def test_a_smaller_shift_is_seen_by_the_long_window_and_is_described() -> None:
    rng = np.random.default_rng(0)
    scores = Scores(np.quantile(smooth(rng, 10_000), LEVELS).tolist(), 10_000, 500)
    shifts = [(i, shift) for i, score in enumerate(rng.beta(4.2, 1, 4000).tolist()) if (shift := scores.add(score))]
    ((place, shift),) = shifts
    assert place == 3999 and shift.samples == 4000
    assert shift.live - shift.expected > 0.05 and 0.7 < shift.at < 0.95


def test_scores_that_are_no_number_count_as_the_lowest() -> None:
    scores = Scores([0.1 * i for i in range(1, 10)], 1000, 100)
    shift = [scores.add(math.nan) for _ in range(100)][-1]
    assert shift is not None and (shift.live, shift.at) == (1.0, 0.1)


@pytest.mark.parametrize(("share", "samples", "window"), [(0.02, 300, 500), (0.3, 50, 400), (0.97, 200, 100)])
@pytest.mark.parametrize("rises", [True, False])
def test_a_like_share_is_told_apart_as_rarely_as_promised(share: float, samples: int, window: int, rises: bool) -> None:
    rng = np.random.default_rng(2)
    looks, level, found = 3000, 0.05, 0
    for _ in range(looks):
        test = Share(rng.binomial(samples, share) / samples, samples, window, rises=rises, level=level)
        test._hits, test._seen = rng.binomial(window, share), window - 1
        found += test.add(False) is not None
    assert found <= level * looks


@pytest.mark.parametrize(("live", "both", "falls"), [(0.4, True, False), (0.1, True, True)])
def test_another_share_is_seen_and_a_rise_only_where_it_counts(live: float, both: bool, falls: bool) -> None:
    for rises, expected in ((True, both), (False, falls)):
        test = Share(0.25, 1000, 500, rises=rises)
        shifts = [shift for i in range(1000) if (shift := test.add(i % 10 < 10 * live))]
        assert bool(shifts) is expected
        if shifts:
            assert (shifts[0].live, shifts[0].expected, shifts[0].samples) == (live, 0.25, 500)


def test_a_share_without_a_reference_is_estimated_over_the_last_windows_and_never_tested() -> None:
    test = Share(None, 0, 100, rises=True)
    assert test.live is None
    assert not any(test.add(True) for _ in range(950))
    assert test.live == 1.0
    assert not any(test.add(False) for _ in range(100))
    assert test.live == pytest.approx(50 / 150), "the window before was half and half, this one has 50 misses so far"


def test_the_bound_on_two_coins_is_solved() -> None:
    for level in (0.5, 1e-2, LEVEL):
        x = chernoff_pair(level)
        assert (1 + x) * math.exp(-x) == pytest.approx(level)


@pytest.mark.parametrize("both_wrong", [0.0, 0.1])
def test_losses_at_the_bound_are_told_as_rarely_as_promised_though_looked_at_all_the_time(both_wrong: float) -> None:
    rng = np.random.default_rng(3)
    runs, level, bound = 400, 0.05, 0.04
    odds = [both_wrong, 1 - bound - 2 * both_wrong, both_wrong + bound]  # mean: the bound
    found = 0
    for _ in range(runs):
        losses = Losses(50, level)  # the long window: 400
        losses._windows = (400, 400)
        found += any(losses.add(value, bound) for value in rng.choice([-1, 0, 1], 400, p=odds).tolist())
    assert found <= level * runs


def test_losses_above_the_bound_are_seen_and_a_good_past_is_no_credit() -> None:
    rng = np.random.default_rng(4)
    losses = Losses(100)
    assert not any(losses.add(0, 0.05) for _ in range(8000))
    values = rng.choice([-1, 0, 1], 800, p=[0.02, 0.71, 0.27]).tolist()
    places = [i for i, value in enumerate(values) if losses.add(value, 0.05)]
    assert places and places[0] < 400


def test_the_level_and_the_looks_make_one_percent() -> None:
    looks = {window: 100_000 / window * 9 / 8 for window in (_SAMPLES, _ESCALATED, _EXPLORED)}  # short windows and long ones
    # Scores and escalations of all samples; and all of them escalated, or all explored and labelled, which makes losses as well.
    assert 2 * looks[_SAMPLES] + max(looks[_ESCALATED], 2 * looks[_EXPLORED]) <= LOOKS
    assert pytest.approx(0.01) == LEVEL * LOOKS
