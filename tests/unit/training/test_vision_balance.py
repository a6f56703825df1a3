"""Long tails: the formulas of the papers, and that a balanced fit finds the balanced world's border where a plain one doesn't."""

from __future__ import annotations

import numpy as np
import pytest

from training.fit import one_hot
from training.linear import fit_softmax
from training.vision.balance import (
    balanced,
    class_counts,
    effective_weights,
    log_prior,
    reversed_counts,
    reversed_probabilities,
)


def ones(count: int) -> np.ndarray:
    return np.ones(count, np.float32)


def test_counts_are_of_soft_targets_and_weights_and_an_absent_class_counts_as_one() -> None:
    targets = np.array([[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0]], np.float32)
    np.testing.assert_allclose(class_counts(targets, ones(3)), [1.5, 1.5, 1])
    np.testing.assert_allclose(class_counts(targets, ones(3) * 7), [1.5, 1.5, 1])  # weights say what rows are worth to each other
    np.testing.assert_allclose(class_counts(targets, np.array([3, 1, 0], np.float32)), [1.75, 1, 1])


def test_the_effective_number_is_the_papers() -> None:
    counts = np.array([500, 50, 5], np.float32)
    weights = effective_weights(counts)
    expected = (1 - 0.9999) / (1 - 0.9999 ** counts.astype(float))  # Cui et al. 2019, eq. 3
    np.testing.assert_allclose(weights / weights[0], expected / expected[0], rtol=1e-5)
    assert weights @ counts == pytest.approx(555, rel=1e-5)


def test_a_reversed_sampler_draws_classes_by_their_inverse_frequency() -> None:
    labels = np.repeat([0, 1, 2], [600, 60, 6])
    targets = one_hot(labels, 3)
    counts = class_counts(targets, ones(666))
    p = reversed_probabilities(targets, ones(666), counts)
    drawn = np.bincount(labels, weights=p)
    np.testing.assert_allclose(drawn / drawn[2], [0.01, 0.1, 1], rtol=1e-5)  # BBN, eq. 4
    np.testing.assert_allclose(reversed_counts(counts) / reversed_counts(counts).sum(), drawn, rtol=1e-4)


@pytest.mark.parametrize("balance", ["none", "softmax", "adjust", "weights"])
def test_a_balanced_fit_finds_the_border_of_the_balanced_world(balance: str) -> None:
    """Two Gaussians one apart from the middle: the border lies at 0 in a balanced world, at ln(99)/2 = 2.3 where 99 in 100 are of one."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [39_600, 400])
    x = (rng.normal(0, 1, len(labels)) + np.where(labels == 0, -1, 1)).astype(np.float32)
    targets = one_hot(labels, 2)
    shift, weights, after = balanced(balance, targets, ones(len(labels)), np.ones(len(labels), bool))  # type: ignore[arg-type]
    _, w = fit_softmax(None, np.stack([x, ones(len(x))], 1), targets, weights, l2=1e-6, shift=shift)
    w[1] -= after
    border = (w[1, 0] - w[1, 1]) / (w[0, 1] - w[0, 0])
    if balance == "none":
        assert border == pytest.approx(np.log(99) / 2, abs=0.15)
    elif balance == "weights":  # at β = 0.9999 the frequent class counts as some 9,800 samples, not as 39,600
        assert 0.4 < border < 0.8
    else:
        assert border == pytest.approx(0, abs=0.15)


def test_only_labelled_rows_are_balanced() -> None:
    targets = np.array([[1, 0], [1, 0], [1, 0], [0, 1], [0.2, 0.8]], np.float32)
    labelled = np.array([True, True, True, True, False])
    shift, weights, after = balanced("softmax", targets, ones(5), labelled)
    np.testing.assert_allclose(shift[:4], np.tile(log_prior(np.array([3, 1], np.float32)), (4, 1)))
    assert not shift[4].any() and not after.any()
    _, weights, _ = balanced("weights", targets, ones(5), labelled)
    assert weights[3] > weights[0] and weights[4] == 1
    shift, _, _ = balanced("softmax", targets, ones(5), np.zeros(5, bool))  # none: all of them
    assert (np.diff(shift, axis=0) == 0).all() and shift[0, 0] > shift[0, 1]
