"""Learning from a long tail so that the logits are those of a world where every class is as frequent.

"softmax"  the balanced softmax: while fitting, the log of the class prior is added to the logits (Ren et al. 2020, eq. 3)
"adjust"   fitted as usual; afterwards the log of the prior is taken off the logits (Menon et al. 2021, eq. 9, τ = 1)
"weights"  each class weighs (1 − β) / (1 − βⁿ), the inverse of its effective number of samples (Cui et al. 2019, eq. 3)
"none"

"softmax" and "weights" balance the labelled rows alone, by their own prior: what a large model says of a sample is no draw of a label
from the long tail, and its logits are balanced already where it was fitted so. "adjust" takes off the prior of all targets.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kcm.task import Balance

Float32 = NDArray[np.float32]
Mask = NDArray[np.bool_]

_BETA = 0.9999  # best of Cui et al. on long-tailed CIFAR at imbalance 100


def class_counts(targets: Float32, weights: Float32) -> Float32:
    """How many samples of each class soft targets [N, C] with weights [N] stand for, in samples of mean weight: [C].

    A class without any counts as one sample: its prior's log is finite, and the others still push its logit down.
    """
    total = max(float(weights.sum()), 1e-12)
    counts = (weights @ targets) * (np.count_nonzero(weights) / total)
    floored: Float32 = np.maximum(counts, 1.0).astype(np.float32)
    return floored


def log_prior(counts: Float32) -> Float32:
    """[C] samples a class → log of its share."""
    logs: Float32 = np.log(counts / counts.sum()).astype(np.float32)
    return logs


def effective_weights(counts: Float32) -> Float32:
    """[C] samples a class → its weight; the weight of all samples together stays what it was."""
    weights = (1 - _BETA) / -np.expm1(counts.astype(np.float64) * np.log(_BETA))
    scaled: Float32 = (weights * (counts.sum() / (weights @ counts))).astype(np.float32)
    return scaled


def reversed_counts(counts: Float32) -> Float32:
    """What a sampler that draws class c in proportion to 1 / n_c sees [C] (BBN, Zhou et al. 2020, eq. 4)."""
    inverse: Float32 = (counts.sum() / (counts * (1 / counts).sum())).astype(np.float32)
    return inverse


def reversed_probabilities(targets: Float32, weights: Float32, counts: Float32) -> NDArray[np.float64]:
    """With which probability that sampler draws each row of soft targets [N, C]: a class by 1 / n_c, then a row of it; [N]."""
    p = (targets @ (1 / counts.astype(np.float64) ** 2)) * weights
    shares: NDArray[np.float64] = p / p.sum()
    return shares


def balanced(balance: Balance, targets: Float32, weights: Float32, labelled: Mask) -> tuple[Float32, Float32, Float32]:
    """What a balance asks of a fit: (shift [N, C] added to the logits while fitting, weights [N], what comes off the logits after [C]).

    Args:
        targets: [N, C] soft targets. weights: [N]. labelled: rows [N] whose target is a true label; where there is none, all count.
    """
    rows, classes = targets.shape
    own = labelled if labelled.any() else np.ones(rows, bool)
    counts = class_counts(targets[own], weights[own])
    shift, after = np.zeros((rows, classes), np.float32), np.zeros(classes, np.float32)
    if balance == "softmax":
        shift[own] = log_prior(counts)
    elif balance == "adjust":
        after = log_prior(class_counts(targets, weights))
    elif balance == "weights":
        weights = np.where(own, weights * (targets @ effective_weights(counts)), weights).astype(np.float32)
    return shift, weights, after
