"""Multinomial logistic regression on soft targets, over sparse and dense features at once."""

from __future__ import annotations

import warnings

import numpy as np
import scipy.sparse as sparse
import torch
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

_L2 = 1e-2  # of the whole problem, not per sample: more samples need less of it
_TOLERANCE = 1e-5  # relative decrease at which a step counts as the last one
_ITERATIONS = 60
_FLOOR = 1e-6  # of a target's probability under the reverse KL, which is infinite at zero


def fit_softmax(
    sparse_x: sparse.csr_matrix | None,
    dense_x: Float32 | None,
    targets: Float32,
    sample_weights: Float32,
    *,
    reverse: NDArray[np.bool_] | None = None,
    l2: float = _L2,
    shift: Float32 | None = None,
) -> tuple[Float32, Float32]:
    """min_W Σ_i w_i CE(targets_i, q_i) + l2/2 |W|² with q_i = softmax(x_i W), by L-BFGS in float32.

    No bias, since features have unit length.

    Args:
        sparse_x: [N, R] or None. dense_x: [N, D] or None. targets: [N, C], rows sum to one. sample_weights: [N].
        reverse: rows [N] that count by KL(q_i ‖ targets_i) instead, the direction of arXiv 2510.20278; no longer convex.
        shift: [N, C], added to the logits while fitting, as a balanced softmax does.

    Returns:
        The rows of W for the sparse features [R, C] and for the dense ones [D, C]; [1, C] zeros where a block is None.
    """
    classes = targets.shape[1]
    blocks = [_block(x) for x in (sparse_x, dense_x) if x is not None]
    sizes = [forward.shape[1] for forward, _ in blocks]
    total = float(sample_weights.sum())
    w = torch.from_numpy(sample_weights / total).unsqueeze(1)
    t = torch.from_numpy(targets)
    log_t = t.clamp(min=_FLOOR).log()
    turned = torch.from_numpy(np.zeros(len(targets), bool) if reverse is None else reverse).unsqueeze(1)
    any_turned = bool(turned.any())
    base = torch.zeros(len(t), classes) if shift is None else torch.from_numpy(shift)
    weight = torch.zeros(sum(sizes), classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight],
        max_iter=_ITERATIONS,
        history_size=8,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-9,
        tolerance_change=_TOLERANCE / 100,
    )

    def closure() -> torch.Tensor:
        # By hand: autograd through a sparse product would build the dense gradient twice.
        with torch.no_grad():
            parts = torch.split(weight, sizes)
            logits = sum((x @ part for (x, _), part in zip(blocks, parts, strict=True)), base)
            log_p = torch.log_softmax(logits, 1)
            q = log_p.exp()
            losses, residual = -(t * log_p), q - t
            if any_turned:
                gap = log_p - log_t
                losses = torch.where(turned, q * gap, losses)
                residual = torch.where(turned, q * (gap - (q * gap).sum(1, keepdim=True)), residual)
            residual *= w
            loss = (w * losses).sum() + (l2 / total / 2) * weight.square().sum()
            weight.grad = torch.cat([xt @ residual for _, xt in blocks]).add_(weight, alpha=l2 / total)
            return loss

    solver.step(closure)  # type: ignore[no-untyped-call]
    solved = [part.numpy() for part in torch.split(weight.detach(), sizes)]
    nothing = np.zeros((1, classes), np.float32)
    first = solved.pop(0) if sparse_x is not None else nothing
    return first, (solved.pop(0) if dense_x is not None else nothing)


def _block(x: sparse.csr_matrix | Float32) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, its transpose), as torch multiplies them fastest."""
    if isinstance(x, np.ndarray):
        dense = torch.from_numpy(np.ascontiguousarray(x, np.float32))
        return dense, dense.T
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
        return _csr(x), _csr(x.T.tocsr())


def _csr(x: sparse.csr_matrix) -> torch.Tensor:
    return torch.sparse_csr_tensor(
        torch.from_numpy(x.indptr.astype(np.int64)),
        torch.from_numpy(x.indices.astype(np.int64)),
        torch.from_numpy(x.data.astype(np.float32)),
        x.shape,
    )
