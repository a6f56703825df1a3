"""Recall at k: the share of queries whose item is among the first k of the gallery."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kcm.policy import epsilon_for_rate

Float32 = NDArray[np.float32]
Index = NDArray[np.int64]

AT = (1, 5, 10)


def rank_of_truth(logits: Float32, labels: Index) -> Index:
    """Place [N] of the true item of each query [N] in its list [N, G], from 0. Equal scores count against it, but for R@1's own arg-max."""
    own = logits[np.arange(len(labels)), labels][:, None]
    before = (logits >= own).sum(1) - 1
    places: Index = np.where(logits.argmax(1) == labels, 0, np.maximum(before, 1))
    return places


def recall(scores: Mapping[str, tuple[Float32, Float32]], small: Index, large: Index, rate: float) -> dict[str, dict[str, float]]:
    """R@1, 5 and 10 by system: "small", "large", and each score's routed answer, where a query takes the whole list of whoever answers.

    Args:
        scores: by name, of M fresh queries, from which ε for the rate of cloud calls is read off, and of the N test queries.
        small, large: the place [N] of the true item in each model's list.
    """
    found = {"small": small, "large": large}
    for name, (fresh, own) in scores.items():
        found[name] = np.where(own > epsilon_for_rate(fresh, rate), small, large)
    return {name: {str(k): float((places < k).mean()) for k in AT} for name, places in found.items()}
