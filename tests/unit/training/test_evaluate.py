"""What is reported: rates, intervals, curves, ε."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import roc_auc_score

from kcm.errors import DataError
from training.calibrate import fixed, for_accuracy, for_rate
from training.evaluate import RATES, auroc, curve, paired_interval, route, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # The first three: Newcombe 1998, Statistics in Medicine 17, table I, Wilson without continuity correction.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718), (20, 20, 0.8389, 1.0)],
)
def test_wilson_gives_published_intervals(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(0, 500), st.integers(0, 500))
def test_wilson_holds_the_share_and_stays_within_0_and_1(one: int, other: int) -> None:
    low, high = wilson(min(one, other), max(one, other))
    assert -1e-9 <= low <= high <= 1 + 1e-9
    if max(one, other):
        assert low - 1e-9 <= min(one, other) / max(one, other) <= high + 1e-9
    else:
        assert (low, high) == (0.0, 1.0)


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(0, 9), st.booleans())
def test_auroc_is_scikit_learns(rows: int, seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 4, rows).astype(float) if ties else rng.random(rows)
    positive = rng.random(rows) < 0.4
    if positive.all() or not positive.any():
        assert np.isnan(auroc(score, positive))
    else:
        assert auroc(score, positive) == pytest.approx(roc_auc_score(positive, score), abs=1e-9)


def test_the_paired_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth, held = 0.04, 0
    for trial in range(200):
        low, high = paired_interval(rng.choice([-1.0, 0.0, 1.0], 250, p=[0.08, 0.8, 0.12]), resamples=400, seed=trial)[1:]
        held += low <= truth <= high
    assert 0.90 <= held / 200 <= 0.99


def test_seeds_that_disagree_widen_the_interval() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.1, (5, 400))
    agreeing = paired_interval(noise)
    disagreeing = paired_interval(noise + np.array([[-0.2], [-0.1], [0], [0.1], [0.2]]))
    assert disagreeing[2] - disagreeing[1] > 3 * (agreeing[2] - agreeing[1])
    assert disagreeing[0] == pytest.approx(noise.mean(), abs=1e-9)
    assert paired_interval(np.full(30, 0.25)) == pytest.approx((0.25, 0.25, 0.25))


def test_a_route_answers_each_sample_by_the_side_that_the_policy_names() -> None:
    confidence = np.array([0.9, 0.5, 0.2, 0.98])
    small, large = np.array([True, True, False, False]), np.array([False, False, True, True])
    routed = route(confidence, small, large, 0.5)
    assert routed.right.tolist() == [True, False, True, False]
    assert (routed.accuracy, routed.cloud_rate) == (0.5, 0.5)


def test_a_curve_takes_its_thresholds_from_calibration_and_its_score_from_the_test() -> None:
    rng = np.random.default_rng(2)
    calibration, confidence = rng.random(2000), rng.random(3000)
    small, large = rng.random(3000) < confidence, np.ones(3000, bool)
    points = curve(calibration, confidence, small, large)
    assert tuple(points) == RATES
    assert points[0.0].cloud_rate == 0 and points[0.0].accuracy == pytest.approx(small.mean())
    assert points[1.0].cloud_rate == 1 and points[1.0].accuracy == 1
    for rate in RATES:
        assert points[rate].cloud_rate == pytest.approx(rate, abs=0.04)
    shifted = curve(calibration + 1, confidence, small, large)
    assert shifted[0.1].cloud_rate == 1.0, "the test's own confidences must not choose ε"


unit = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(0, 1, width=32, allow_subnormal=False), unique=True)


@given(unit, st.floats(0, 1, allow_subnormal=False))
def test_a_threshold_says_what_it_costs(confidence: np.ndarray, rate: float) -> None:
    threshold = for_rate(confidence, rate)
    assert (threshold.method, threshold.target, threshold.samples) == ("cloud-rate", rate, confidence.size)
    assert threshold.cloud_rate == pytest.approx(float((confidence <= threshold.epsilon).mean()))
    assert threshold.cloud_rate == pytest.approx(rate, abs=0.5 / confidence.size + 1e-9)
    assert threshold.cloud_rate_interval is not None
    low, high = threshold.cloud_rate_interval
    assert low - 1e-9 <= threshold.cloud_rate <= high + 1e-9
    by_hand = fixed(confidence, threshold.epsilon)
    assert (by_hand.method, by_hand.cloud_rate) == ("fixed", threshold.cloud_rate)


def test_an_accuracy_is_reached_with_the_fewest_calls_or_refused() -> None:
    confidence = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    small, large = np.array([False, False, True, True]), np.array([True, True, True, False])
    threshold = for_accuracy(confidence, small, large, 1.0)
    assert 0.2 < threshold.epsilon < 0.3
    assert (threshold.accuracy, threshold.cloud_rate, threshold.method) == (1.0, 0.5, "accuracy")
    with pytest.raises(DataError, match="out of reach on 4") as error:
        for_accuracy(confidence, small, np.zeros(4, bool), 0.9)
    assert "lower the target" in error.value.fix
