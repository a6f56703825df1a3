"""The promise: its test is exact at the boundary, its sequence stops at the first doubt, and what data can't support is refused."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kcm.errors import DataError
from training.guarantee import check_support, counts, p_value, promise, samples_needed, sequence, shown, upper_bound

N = 400


@pytest.mark.parametrize(("gains", "n", "drop"), [(0.0, 300, 0.02), (0.01, 300, 0.02), (0.2, 300, 0.02), (0.05, 1000, 0.01)])
def test_at_the_boundary_the_hypothesis_is_rejected_no_more_often_than_promised(gains: float, n: int, drop: float) -> None:
    draws = np.random.default_rng(1).multinomial(n, [gains + drop, gains, 1 - 2 * gains - drop], size=4000)
    rejected = np.mean([p_value(int(lost), int(won), n, drop) <= 0.05 for lost, won, _ in draws])
    assert rejected <= 0.05 + 3 * (0.05 * 0.95 / 4000) ** 0.5
    assert gains == 0 or rejected > 0.03, "a test that never rejects would promise nothing"


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 600), st.data(), st.floats(0.005, 0.3))
def test_more_losses_never_speak_for_the_promise(n: int, data: st.DataObject, drop: float) -> None:
    losses = data.draw(st.integers(0, n - 1))
    gains = data.draw(st.integers(0, n - losses - 1))
    p, more = p_value(losses, gains, n, drop), p_value(losses + 1, gains, n, drop)
    assert 0 <= p <= 1 and more >= p - 1e-9


@pytest.mark.parametrize(("drop", "confidence"), [(0.02, 0.95), (0.01, 0.9), (0.05, 0.9999)])
def test_how_many_samples_a_promise_takes(drop: float, confidence: float) -> None:
    need = samples_needed(drop, confidence)
    delta = 1 - confidence
    assert p_value(0, 0, need, drop, delta) <= delta < p_value(0, 0, need - 1, drop, delta)
    # The binomial bound of a sample without one loss, nearly.
    assert np.log(1 - confidence) / np.log(1 - drop) <= need < 1.4 * np.log(1 - confidence) / np.log(1 - drop)


def test_how_many_samples_a_small_drop_takes_is_known_at_once() -> None:
    """One step after the other it took minutes."""
    begun = time.process_time()
    assert 18_000 < samples_needed(0.0005, 0.9999) < 40_000
    assert time.process_time() - begun < 5


def test_support_is_checked_without_outcomes() -> None:
    check_support(602, 0.005, 0.95)
    with pytest.raises(DataError, match=r"601 labelled .* 0.5 points with 95% confidence: .* it takes 602"):
        check_support(601, 0.005, 0.95)
    with pytest.raises(DataError, match=r"with 99.99% confidence"):
        check_support(601, 0.005, 0.9999)


@pytest.mark.parametrize(("p", "text"), [(0.0341, "p = 0.034"), (1.0, "p = 1.000"), (0.001, "p = 0.001"), (3.21e-5, "p = 3.2e-05")])
def test_a_small_p_value_keeps_its_digits(p: float, text: str) -> None:
    assert shown(p) == text


def test_the_upper_bound_is_where_the_test_turns() -> None:
    upper = upper_bound(5, 3, 800, 0.05)
    assert 0.0025 < upper < 0.02
    assert p_value(5, 3, 800, upper) <= 0.05 < p_value(5, 3, 800, upper - 2e-5)


def _outcomes(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A well-ranked small model beside a large one that is right on 95 %."""
    rng = np.random.default_rng(seed)
    score = rng.random(n)
    return score, rng.random(n) < 0.3 + 0.7 * score, rng.random(n) < 0.95


def test_a_promise_keeps_what_the_data_support_and_says_how_it_got_there() -> None:
    score, small, large = _outcomes(4000)
    made = promise(score, small, large, sequence(_outcomes(3000, 1)[0]), max_drop=0.02, confidence=0.95)
    losses, gains = counts(score, small, large, made.epsilon)
    assert (losses - gains) / 4000 <= made.guarantee.upper <= 0.02 + 1e-5
    assert 0.3 < (score <= made.epsilon).mean() < 0.9
    assert [t[3] <= 0.05 for t in made.tested] == [True] * (len(made.tested) - 1) + [False]
    assert made.epsilon == made.tested[-2][0] and made.guarantee.effective_n == 4000
    looser = promise(score, small, large, sequence(_outcomes(3000, 1)[0]), max_drop=0.05, confidence=0.95)
    assert looser.epsilon < made.epsilon


def test_a_small_model_as_good_as_the_large_one_needs_no_calls() -> None:
    score = np.linspace(0, 1, 1000)
    right = np.ones(1000, bool)
    assert promise(score, right, right, sequence(score), max_drop=0.01, confidence=0.95).epsilon == -1.0


def test_too_few_samples_are_refused_with_the_number_that_it_takes() -> None:
    score, small, large = _outcomes(100)
    with pytest.raises(DataError, match=r"100 labelled samples can't promise a drop of at most 0.5 points .* it takes 602"):
        promise(score, small, large, sequence(score), max_drop=0.005, confidence=0.95)


def test_a_small_model_that_always_loses_is_refused() -> None:
    score, large = np.random.default_rng(0).random(N), np.ones(N, bool)
    with pytest.raises(DataError, match="no ε can be promised"):
        promise(score, ~large, large, sequence(score), max_drop=0.01, confidence=0.95)
    small = large.copy()
    small[score.argmax()] = False
    with pytest.raises(DataError, match=r"\(p = 1\.2e-04\)"):  # above δ, and not 0.000
        promise(score, small, large, [1.0, 0.0], max_drop=0.035, confidence=0.9999)


@pytest.mark.parametrize("bad", [{"max_drop": 0.0}, {"max_drop": 1.0}, {"confidence": 1.0}, {"confidence": 0.2}])
def test_promises_without_meaning_are_refused(bad: dict[str, float]) -> None:
    score, small, large = _outcomes(N)
    with pytest.raises(ValueError, match="must lie"):
        promise(score, small, large, sequence(score), **{"max_drop": 0.01, "confidence": 0.95, **bad})


def test_the_sequence_goes_from_all_calls_to_none() -> None:
    thresholds = sequence(np.random.default_rng(0).random(500))
    assert thresholds[0] == 1.0 and thresholds[-1] == -1.0 and thresholds == sorted(thresholds, reverse=True)
    assert sequence(np.full(50, 0.5)) == [1.0, 0.5, -1.0]
    with pytest.raises(DataError, match="no scores"):
        sequence(np.zeros(0))
