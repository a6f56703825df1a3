"""Softmax regression on soft targets: the gradient is right, the optimum is the known one."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sparse
import torch
from sklearn.linear_model import LogisticRegression

import training.linear
from training.fit import one_hot, softmax
from training.linear import fit_softmax


def problem(rows: int = 60, features: int = 12, classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit-length features [N, R], soft targets [N, C], weights [N]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, features)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    targets = softmax(rng.normal(0, 2, (rows, classes)).astype(np.float32))
    return x, targets, rng.uniform(0.2, 2, rows).astype(np.float32)


def objective(
    weight: torch.Tensor, x: np.ndarray, targets: np.ndarray, weights: np.ndarray, reverse: np.ndarray, l2: float
) -> torch.Tensor:
    """What the docstring promises, written for autograd."""
    log_q = torch.log_softmax(torch.from_numpy(x).double() @ weight, 1)
    t = torch.from_numpy(targets).double()
    forward = -(t * log_q).sum(1)
    backward = (log_q.exp() * (log_q - t.clamp(min=1e-6).log())).sum(1)
    each = torch.where(torch.from_numpy(reverse), backward, forward)
    return (torch.from_numpy(weights).double() * each).sum() + l2 / 2 * weight.square().sum()


@pytest.mark.parametrize("reversed_rows", [0, 20, 60])
def test_the_solution_is_a_stationary_point_by_autograd(reversed_rows: int) -> None:
    """A wrong hand-written gradient, of either direction of KL, ends somewhere else."""
    x, targets, weights = problem()
    reverse = np.arange(60) < reversed_rows
    solved, _ = fit_softmax(sparse.csr_matrix(x), None, targets, weights, reverse=reverse, l2=0.5)
    weight = torch.from_numpy(solved).double().requires_grad_()
    objective(weight, x, targets, weights, reverse, 0.5).backward()
    assert weight.grad is not None
    start = torch.zeros_like(weight).requires_grad_()
    objective(start, x, targets, weights, reverse, 0.5).backward()
    assert start.grad is not None
    assert float(weight.grad.norm()) < 2e-3 * float(start.grad.norm())


def test_hard_targets_give_logistic_regression() -> None:
    x, targets, _ = problem(200)
    labels = targets.argmax(1)
    ours, _ = fit_softmax(None, x, one_hot(labels, 4), np.ones(200, np.float32), l2=0.1)[::-1]
    theirs = LogisticRegression(C=10, fit_intercept=False, max_iter=5000, tol=1e-8).fit(x, labels)
    p = softmax(x @ ours)
    assert p == pytest.approx(theirs.predict_proba(x), abs=2e-3)


def test_sparse_and_dense_blocks_are_one_problem() -> None:
    x, targets, weights = problem()
    both = fit_softmax(sparse.csr_matrix(x[:, :7]), np.ascontiguousarray(x[:, 7:]), targets, weights)
    whole = fit_softmax(sparse.csr_matrix(x), None, targets, weights)[0]
    assert softmax(x[:, :7] @ both[0] + x[:, 7:] @ both[1]) == pytest.approx(softmax(x @ whole), abs=5e-3)
    assert whole.shape == (12, 4)
    assert fit_softmax(None, x, targets, weights)[0].shape == (1, 4)


def test_a_rows_weight_is_how_often_it_counts() -> None:
    x, targets, _ = problem(40)
    weights = np.ones(40, np.float32)
    weights[:10], weights[10:15] = 3, 0
    repeated = np.concatenate([np.repeat(np.arange(10), 3), np.arange(15, 40)])
    one = fit_softmax(None, x, targets, weights)[1]
    other = fit_softmax(None, x[repeated], targets[repeated], np.ones(len(repeated), np.float32))[1]
    assert softmax(x @ one) == pytest.approx(softmax(x @ other), abs=5e-3)


def test_a_zero_in_a_target_keeps_the_reverse_direction_finite() -> None:
    x, targets, weights = problem()
    hard = one_hot(targets.argmax(1), 4)
    solved = fit_softmax(None, x, hard, weights, reverse=np.ones(60, bool))[1]
    assert np.isfinite(solved).all()
    assert (softmax(x @ solved).argmax(1) == hard.argmax(1)).mean() > 0.5
    assert training.linear._FLOOR > 0
