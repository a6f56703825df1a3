"""The protocol's figures against values worked out by hand, scikit-learn, and slower ways of saying the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, roc_auc_score

from kcm.policy import epsilon_for_rate
from kcm.task import CostSpec
from training.evaluate import paired_interval, wilson
from training.groups import by_group, frequency_groups, rescued
from training.metrics import (
    apgr,
    brier,
    calls_for,
    ece,
    full_curve,
    quantile_curve,
    reliability,
    right_at,
    risk_coverage,
    share_escalated,
)
from training.protocol import GRID, PAIRED, TARGETS, Score, Trial, at_target, measure, oracle

# Four samples: the first two only the large model knows, the last only the small one.
SCORE = np.array([0.1, 0.2, 0.3, 0.4])
SMALL = np.array([False, False, True, True])
LARGE = np.array([True, True, True, False])
COST = CostSpec(cloud_call=2.0, local_call=0.1)


def outcomes(n: int, seed: int, *, tied: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A score that says something about the small model, who is right."""
    rng = np.random.default_rng(seed)
    score = rng.integers(1, 6, n) / 6 if tied else rng.random(n)
    return score, rng.random(n) < score, rng.random(n) < 0.9


def test_the_curve_apgr_and_cpt_of_four_samples() -> None:
    curve = full_curve(SCORE, SMALL, LARGE)
    assert curve.tolist() == [0.5, 0.75, 1.0, 1.0, 0.75]
    # Trapezoids: (0.5/2 + 0.75 + 1 + 1 + 0.75/2) / 4 = 0.84375, less weak 0.5, over the gap of 0.25.
    assert apgr(np.linspace(0, 1, 5), curve, 0.5, 0.75) == pytest.approx(1.375)
    assert apgr(*quantile_curve(SCORE, SMALL, LARGE), 0.5, 0.75) == pytest.approx(1.375)
    # 50 % of the gap is 0.625: half way between no call and one of four.
    assert [calls_for(curve, 0.5, 0.75, part) for part in (0.0, 0.5, 0.8, 0.95, 1.0)] == pytest.approx([0, 0.125, 0.2, 0.2375, 0.25])


def test_without_a_gap_there_is_nothing_to_recover() -> None:
    curve = full_curve(SCORE, SMALL, LARGE)
    assert apgr(np.linspace(0, 1, 5), curve, 0.75, 0.75) is None
    assert calls_for(curve, 0.8, 0.75, 0.5) is None


@given(st.integers(5, 60), st.integers(0, 10**6), st.booleans())
@settings(deadline=None, max_examples=60)
def test_the_quantile_form_is_routellms(n: int, seed: int, tied: bool) -> None:
    """The loop over thresholds of its benchmark: strong where the win rate reaches an edge of ten bins, beyond it at the last."""
    score, small, large = outcomes(n, seed, tied=tied)
    win = -score
    edges = np.unique(np.quantile(win, np.linspace(0, 1, 11)))
    points = []
    for place, edge in enumerate(edges):
        strong = win >= edge if place < len(edges) - 1 else win > edge
        points.append((strong.mean(), np.where(strong, large, small).mean()))
    x, y = np.array(points[::-1]).T
    rates, accuracy = quantile_curve(score, small, large)
    if len(edges) > 1:
        assert np.trapezoid(accuracy, rates) == pytest.approx(np.trapezoid(y, x), abs=1e-12)


def test_tied_scores_go_up_in_parts() -> None:
    score = np.array([0.1, 0.1, 0.4])
    assert share_escalated(score, np.array([0.0, 1 / 3, 2 / 3, 1.0])).round(12).tolist() == [[0, 0, 0], [0.5, 0.5, 0], [1, 1, 0], [1, 1, 1]]
    small, large = np.array([False, True, True]), np.array([True, False, False])
    # One call among the tied two helps as often as it hurts.
    assert full_curve(score, small, large) == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1 / 3])


@given(st.integers(2, 40), st.integers(0, 10**6), st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_point_at_an_exact_rate_lies_on_the_curve(n: int, seed: int, tied: bool) -> None:
    score, small, large = outcomes(n, seed, tied=tied)
    rates = np.arange(n + 1) / n
    assert right_at(score, small, large, rates).mean(1) == pytest.approx(full_curve(score, small, large), abs=1e-9)
    assert share_escalated(score, rates).sum(1) == pytest.approx(np.arange(n + 1), abs=1e-9)


def test_the_expectation_over_ties_is_what_shuffling_gives() -> None:
    score, small, large = outcomes(30, 4, tied=True)
    rng = np.random.default_rng(0)
    shuffled = np.mean([full_curve(np.argsort(np.lexsort((rng.random(30), score))), small, large) for _ in range(4000)], 0)
    assert full_curve(score, small, large) == pytest.approx(shuffled, abs=0.01)


def test_risk_over_coverage_of_four_answers() -> None:
    right = np.array([True, False, True, True])
    assert risk_coverage(np.array([0.9, 0.8, 0.7, 0.6]), right) == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4])
    assert risk_coverage(np.full(4, 0.5), right) == pytest.approx([0.25] * 4), "a score that says nothing has the error everywhere"


@given(st.integers(20, 400), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_calibration_error_and_brier_are_scikit_learns(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.random(n)
    right = rng.random(n) < p
    assert brier(p, right) == pytest.approx(brier_score_loss(right, p))
    share, claimed = calibration_curve(right, p, n_bins=15)
    sizes = np.histogram(p, 15, (0, 1))[0]
    assert ece(p, right) == pytest.approx((np.abs(share - claimed) * sizes[sizes > 0]).sum() / n, abs=1e-9)


def test_calibration_error_at_the_ends() -> None:
    assert ece(np.array([0.0, 1.0]), np.array([False, True])) == 0
    assert ece(np.array([1.0, 1.0]), np.array([False, True])) == 0.5


def test_reliability_bins_hold_equally_many_and_do_not_count_seeds_twice() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(1000)
    rows = reliability(p, rng.random(1000) < p)
    assert [row["samples"] for row in rows] == [100] * 10
    assert all(row["low"] <= row["right"] <= row["high"] for row in rows)
    assert all(abs(row["claimed"] - row["right"]) < 0.15 for row in rows)
    twice = reliability(np.tile(p, 2), np.tile(p > 0.5, 2), copies=2)
    assert twice[-1]["samples"] == 100 and twice[-1]["low"] == pytest.approx(wilson(100, 100)[0])


def trial(seed: int, n: int = 300, m: int = 500) -> Trial:
    """A run with a good score, a worse one, chance, and the oracle; the large model is better. Calibration like the test."""
    rng = np.random.default_rng(seed)
    p, q = rng.random(n), rng.random(m)
    small, large = rng.random(n) < 0.3 + 0.6 * p, rng.random(n) < 0.92
    noise = lambda values: 0.5 * values + 0.5 * rng.random(len(values))  # noqa: E731
    kept = rng.random(300)
    return Trial(
        small,
        large,
        {
            "kcm": [Score(0.3 + 0.6 * p, 0.3 + 0.6 * q, 0.3 + 0.6 * kept, probability=True)],
            "tempered": [Score(noise(p), noise(q), probability=True)],
            "random": [Score(rng.random(n), rng.random(m)) for _ in range(20)],
            "oracle": [oracle(small, large)],
        },
        labelled=(rng.random(300) < 0.3 + 0.6 * kept, rng.random(300) < 0.92),
    )


def no_nan(value: object) -> None:
    json.dumps(value, allow_nan=False)


def test_one_run_gets_bootstrap_intervals_and_no_spread() -> None:
    one = trial(0)
    result = measure([one], COST)
    no_nan(result)
    ours = result["systems"]["kcm"]
    for key in ("apgr", "apgr_exact", "cpt50", "aurc", "auroc", "ece", "brier"):
        figure = ours[key]
        assert (figure["sd"] is None and figure["low"] <= figure["mean"] <= figure["high"]) or key == "ece", key
    assert ours["auroc"]["mean"] == pytest.approx(roc_auc_score(one.small_right, one.systems["kcm"][0].test))
    # A band is as wide as a share of so many samples is uncertain.
    low, high, mean = (np.array(ours["curve"][key]) for key in ("low", "high", "accuracy"))
    assert len(mean) == len(GRID) and (low <= mean).all() and (mean <= high).all()
    expected = 2 * 1.96 * np.sqrt(mean * (1 - mean) / 300)
    assert (high - low)[[0, 100]] == pytest.approx(expected[[0, 100]], rel=0.12)
    # Chance has a spread over its draws even in one run, and lies on the straight line.
    assert result["systems"]["random"]["apgr"]["sd"] > 0 and result["systems"]["random"]["apgr"]["values"] == 20
    assert result["systems"]["random"]["apgr_exact"]["mean"] == pytest.approx(0.5, abs=0.1)


def test_several_runs_get_mean_and_sd() -> None:
    trials = [trial(seed) for seed in range(3)]
    result = measure(trials, COST)
    no_nan(result)
    each = [measure([t], COST)["systems"]["kcm"] for t in trials]
    for key in ("apgr_exact", "aurc"):
        values = [one[key]["mean"] for one in each]
        figure = result["systems"]["kcm"][key]
        assert (figure["mean"], figure["sd"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
        assert figure["low"] is None and figure["values"] == 3
    curve = result["systems"]["kcm"]["curve"]
    at_30 = [one["curve"]["accuracy"][30] for one in each]
    assert curve["accuracy"][30] == pytest.approx(np.mean(at_30))
    assert curve["high"][30] - curve["low"][30] == pytest.approx(2 * np.std(at_30, ddof=1))


def test_the_threshold_of_a_target_comes_from_calibration_alone() -> None:
    one = trial(1)
    score = one.systems["kcm"][0]
    assert score.calibration is not None
    for rate in TARGETS:
        epsilon = epsilon_for_rate(score.calibration, rate)
        right, up = at_target(one, "kcm", rate)
        assert up.tolist() == (score.test <= epsilon).astype(float).tolist()
        assert right.mean() == pytest.approx(np.where(score.test <= epsilon, one.large_right, one.small_right).mean())
    shifted = Trial(one.small_right, one.large_right, {"kcm": [Score(score.test, score.calibration + 1)]})
    assert at_target(shifted, "kcm", 0.1)[1].all(), "the test's own scores must not choose ε"


def test_targets_say_what_they_realise_cost_and_promised() -> None:
    one = trial(2)
    rows = measure([one], COST)["systems"]["kcm"]["targets"]
    assert [row["target"] for row in rows] == list(TARGETS)
    for row in rows:
        assert row["calls"]["mean"] == pytest.approx(row["target"], abs=0.1)
        assert row["cost_per_1000"] == pytest.approx(1000 * (0.1 + 2.0 * row["calls"]["mean"]))
        assert row["calls"]["low"] <= row["calls"]["mean"] <= row["calls"]["high"]
        assert row["expected_accuracy"] == pytest.approx(row["accuracy"]["mean"], abs=0.08)
    score, labelled = one.systems["kcm"][0], one.labelled
    assert labelled is not None and score.labelled is not None and score.calibration is not None
    up = score.labelled <= epsilon_for_rate(score.calibration, 0.4)
    assert rows[3]["expected_accuracy"] == pytest.approx(np.where(up, labelled[1], labelled[0]).mean())
    assert measure([one], COST)["systems"]["tempered"]["targets"][0]["expected_accuracy"] is None


def test_references_are_the_models_alone() -> None:
    trials = [trial(0), trial(1)]
    trials[1] = Trial(trials[1].small_right, trials[0].large_right, trials[1].systems)
    found = measure(trials, COST)["references"]
    assert found["always-small"]["accuracy"]["mean"] == pytest.approx(np.mean([t.small_right.mean() for t in trials]))
    assert found["always-small"]["cost_per_1000"] == pytest.approx(100)
    large = trials[0].large_right
    assert found["always-large"]["accuracy"]["low"] == pytest.approx(wilson(int(large.sum()), large.size)[0])
    assert (found["always-large"]["calls"], found["always-large"]["cost_per_1000"]) == (1.0, 2000.0)


def test_nothing_beats_the_oracle_and_it_never_pays_for_a_call_that_hurts() -> None:
    one = trial(3)
    result = measure([one], COST)["systems"]
    best = np.array(result["oracle"]["curve"]["accuracy"])
    for name in ("kcm", "tempered", "random"):
        assert (best >= np.array(result[name]["curve"]["accuracy"]) - 1e-12).all()
        assert result["oracle"]["aurc"]["mean"] <= result[name]["aurc"]["mean"]
    assert best[-1] == pytest.approx((one.small_right | one.large_right).mean())
    benefit = (one.large_right & ~one.small_right).mean()
    assert result["oracle"]["targets"][-1]["calls"]["mean"] == pytest.approx(min(0.9, benefit))
    assert result["oracle"]["targets"][0]["accuracy"]["mean"] == pytest.approx(one.small_right.mean() + min(0.1, benefit))
    assert result["oracle"]["auroc"]["mean"] is None and result["oracle"]["targets"][0]["epsilon"] is None


def test_paired_differences_are_ours_minus_theirs_over_seeds_and_samples() -> None:
    trials = [trial(seed) for seed in range(2)]
    found = measure(trials, COST)["paired"]
    assert set(found) == {"tempered", "random", "oracle"} and list(found["tempered"]) == [f"{rate:g}" for rate in PAIRED]
    by_hand = np.array([at_target(t, "kcm", 0.2)[0] - at_target(t, "tempered", 0.2)[0] for t in trials])
    assert list(found["tempered"]["0.2"]["calibrated"].values()) == pytest.approx(paired_interval(by_hand))
    rates = np.array([0.3])
    exact = [
        right_at(t.systems["kcm"][0].test, t.small_right, t.large_right, rates)[0]
        - np.mean([right_at(s.test, t.small_right, t.large_right, rates)[0] for s in t.systems["random"]], 0)
        for t in trials
    ]
    assert list(found["random"]["0.3"]["exact"].values()) == pytest.approx(paired_interval(np.array(exact)))
    assert found["random"]["0.3"]["exact"]["low"] > 0 > found["oracle"]["0.3"]["exact"]["high"]


@pytest.mark.parametrize("right", [True, False])
def test_a_small_model_that_is_always_right_or_wrong_leaves_gaps_not_nan(right: bool) -> None:
    n = 50
    score = np.linspace(0.1, 0.9, n)
    small, large = np.full(n, right), np.arange(n) % 2 == 0
    one = Trial(small, large, {"kcm": [Score(score, score, probability=True)], "oracle": [oracle(small, large)]})
    result = measure([one], COST)
    no_nan(result)
    ours = result["systems"]["kcm"]
    assert ours["auroc"] == {"mean": None, "sd": None, "low": None, "high": None, "values": 0}
    assert (ours["apgr"]["mean"] is None) == right == (ours["cpt50"]["mean"] is None)
    assert ours["aurc"]["mean"] == (0.0 if right else 1.0)


def test_the_long_tail_is_the_rarest_third_of_the_classes() -> None:
    groups = frequency_groups(np.array([5, 100, 7, 0, 60, 7, 1]))  # the first third takes what is left over
    assert {name: np.flatnonzero(member).tolist() for name, member in groups.items()} == {
        "many": [1, 2, 4],
        "medium": [0, 5],
        "few": [3, 6],
    }
    assert np.flatnonzero(frequency_groups(np.ones(6, int))["few"]).tolist() == [4, 5], "of equals the first counts as the more frequent"
    test = np.array([1, 1, 4, 5])
    rows = by_group(groups, test, {"small": np.array([1.0, 0.0, 1.0, 0.5])})
    assert rows["many"] == {"classes": 3, "samples": 3, "accuracy": {"small": pytest.approx(2 / 3)}}
    assert rows["medium"]["accuracy"]["small"] == 0.5
    assert rows["few"] == {"classes": 2, "samples": 0, "accuracy": {"small": None}}


def test_classes_where_the_large_model_helps() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, 2])
    large = np.array([True, True, False, True, False, True, False])
    answers = np.array([[1, 1, 0, 1, 1, 2, 0], [1, 2, 0, 0, 1, 2, 0]])  # of two runs; the last is beyond both models
    escalated = np.array([[True, False, False, False, False, True, True], [True, True, True, False, False, False, True]])
    rows = rescued(answers, labels, large, escalated, ("a", "b", "c"))
    assert [row["label"] for row in rows] == ["a", "b"], "class c gets no help"
    assert rows[0] == {
        "label": "a",
        "test_samples": 3,
        "large_right_small_wrong": 2.0,
        "of_these_escalated": 1.5,
        "small_right_large_wrong": 1.0,
        "small_says": "b",
        "small_says_samples": 1.5,
    }
    assert (rows[1]["large_right_small_wrong"], rows[1]["of_these_escalated"], rows[1]["small_says"]) == (0.5, 0.0, "a")
    assert [row["label"] for row in rescued(answers, labels, large, escalated, ("a", "b", "c"), top=1)] == ["a"]
