"""One linear map from the space of queries to the space of a gallery's items, in closed form.

    W = argmin Σ w ‖x W − y‖² + λ ‖W‖²         x: a query's features, y: the embedding of the item that belongs to it
    logits = x W (s E)ᵀ                        E: the gallery's embeddings

Source: ridge regression between embedding spaces (Lazaridou et al. 2015; with a ranking loss, Frome et al. 2013). Where the target is a
distribution over the gallery, a label or a teacher's similarities, y is the embedding that it expects, Σ p E: the squared-error form
of learning a teacher's similarity distribution. A symmetric contrastive loss by gradient steps was no better on the emoji pairs, and
took a hundred times as long.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from training.fit import item_folds, softmax
from training.judge import fit_temperature

Float32 = NDArray[np.float32]

_NEAREST = 10  # queries that an item's hubness is read off
_HALF = np.float32(0.5)
_FOLDS = 5
_FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_RAISED = np.float32(50.0)  # similarities are small numbers; a temperature is looked for within e^±4


def unit(x: Float32) -> Float32:
    """[N, D] with rows of length 1; an empty row stays."""
    rows: Float32 = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(1e-6))
    return rows


def standardised(features: Float32) -> Float32:
    """[N, F] with mean 0 and variance 1 a column, then rows of length 1."""
    return unit((features - features.mean(0)) / (features.std(0) + np.float32(1e-6)))


def solve(x: Float32, y: Float32, weights: Float32, l2: float) -> Float32:
    """Ridge regression [F, D] of y [N, D] on x [N, F] with a weight for each row [N]; by the smaller of both systems."""
    from scipy.linalg import solve as system

    root = np.sqrt(weights)[:, None].astype(np.float64)
    a, b = x * root, y * root
    if len(a) <= a.shape[1]:
        kernel = a @ a.T
        kernel[np.diag_indices_from(kernel)] += l2
        return np.asarray(a.T @ system(kernel, b, assume_a="pos"), np.float32)
    kernel = a.T @ a
    kernel[np.diag_indices_from(kernel)] += l2
    return np.asarray(system(kernel, a.T @ b, assume_a="pos"), np.float32)


def align(x: Float32, targets: Float32, weights: Float32, items: Float32, l2: float) -> tuple[Float32, Float32]:
    """(map [F, D], gallery [D, G]) of queries [N, F] with soft targets [N, G] and weights [N]: logits = x @ map @ gallery.

    Items that a label showed lie nearer to every query than items that none did, as training classes do in zero-shot learning; the gallery
    has them shorter, by one factor (after Chao et al. 2016, who take a constant off). Factor and scale are fitted (NLL) on predictions out
    of fold, folds of whole items, since a query at run time is of an item that no label showed.

    Raises:
        DataError: all targets are one item's.
    """
    y, best = targets @ items, targets.argmax(1)
    folds = item_folds(best, max(2, min(_FOLDS, len(np.unique(best)))), 0)
    seen, shown = np.zeros_like(targets), np.zeros_like(targets)
    for fold in range(folds.max() + 1):
        inside, outside = folds != fold, folds == fold
        seen[outside] = x[outside] @ solve(x[inside], y[inside], weights[inside], l2) @ items.T
        shown[outside] = targets[inside].max(0)
    _, factor, temperature = min(_calibrated(_RAISED * seen * (1 - (1 - factor) * shown), targets, factor) for factor in _FACTORS)
    shorter = 1 - (1 - np.float32(factor)) * targets.max(0)
    return solve(x, y, weights, l2), (_RAISED / np.float32(temperature)) * (items * shorter[:, None]).T


def _calibrated(logits: Float32, targets: Float32, factor: float) -> tuple[float, float, float]:
    """(mean NLL at the best temperature, factor, that temperature)."""
    temperature = fit_temperature(logits, targets)
    return float(-(targets * np.log(np.maximum(softmax(logits, temperature), 1e-12))).sum(1).mean()), factor, temperature


def hubs(similarities: Float32) -> Float32:
    """What to take off each item's similarities [G], from those of known queries of other items [N, G].

    Hubs are items near to everything (Radovanović et al. 2010). From each item goes half the mean of its largest similarities, which is
    a constant of the item: the item's side of CSLS (Conneau et al. 2018).
    """
    half: Float32 = _HALF * np.sort(similarities, axis=0)[-_NEAREST:].mean(0)
    return half
