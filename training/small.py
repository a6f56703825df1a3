"""What a small model must offer to be trained, cross-fitted and saved; and the n-gram one. The others: training/encoder.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sparse
import torch
from numpy.typing import NDArray

from kcm.preprocess import NgramPreprocessor, as_text
from kcm.sample import Payload
from kcm.task import Task
from training.judge import Predictions
from training.ngrams import NgramModel, WordVectors, encode, fit_ngrams

Float32 = NDArray[np.float32]
Index = NDArray[np.int64]
Mask = NDArray[np.bool_]

_CELLS = 2_000_000  # ids × classes that one prediction batch may gather: about 8 MB a table


@dataclass(frozen=True)
class Examples:
    """N training samples as features, with soft targets [N, C], weights [N], and which carry a true label [N].

    `reverse` [N] marks rows whose loss is KL(F_s ‖ target), the seed's direction.
    """

    features: Any
    targets: Float32
    weights: Float32
    labelled: Mask
    reverse: Mask

    def __len__(self) -> int:
        return len(self.targets)


class Small(Protocol):
    """A kind of small model. Features are opaque: made once per sample, then sliced and joined for folds and rounds."""

    def featurise(self, payloads: Sequence[Payload]) -> Any: ...

    def take(self, features: Any, index: Index) -> Any: ...

    def join(self, first: Any, second: Any) -> Any: ...

    def fit(self, examples: Examples) -> Any: ...

    def predict(self, model: Any, features: Any) -> Predictions: ...


def subset(kind: Small, examples: Examples, index: Index) -> Examples:
    return Examples(
        kind.take(examples.features, index),
        examples.targets[index],
        examples.weights[index],
        examples.labelled[index],
        examples.reverse[index],
    )


def seeded(kind: Small, seed: int) -> Small:
    """The kind with whatever it draws drawn by `seed`; most are fitted in closed form or solve a convex problem, and draw nothing."""
    again: Callable[[int], Small] | None = getattr(kind, "seeded", None)
    return kind if again is None else again(seed)


class Ngrams:
    """Hashed n-grams and static word vectors into a linear layer (training/ngrams.py)."""

    def __init__(self, task: Task, vectors: Callable[[], WordVectors] | None) -> None:
        """`vectors` is asked once, at the first fit."""
        self.preprocessor = NgramPreprocessor(task.preprocess)
        self._make_vectors = vectors

    @cached_property
    def _vectors(self) -> WordVectors | None:
        return self._make_vectors() if self._make_vectors else None

    def featurise(self, payloads: Sequence[Payload]) -> sparse.csr_matrix:
        return encode([as_text(payload) for payload in payloads], self.preprocessor)

    def take(self, features: sparse.csr_matrix, index: Index) -> sparse.csr_matrix:
        return features[index]

    def join(self, first: sparse.csr_matrix, second: sparse.csr_matrix) -> sparse.csr_matrix:
        return sparse.vstack([first, second], format="csr")

    def fit(self, examples: Examples) -> NgramModel:
        return fit_ngrams(examples.features, examples.targets, examples.weights, self._vectors, examples.reverse)

    def predict(self, model: NgramModel, features: sparse.csr_matrix) -> Predictions:
        """In batches of like length, so that padding and memory stay small."""
        sizes = np.diff(features.indptr)
        order = np.argsort(sizes, kind="stable")
        width = max(1, model.table.shape[1] + model.vectors.shape[1])
        out = [np.zeros((len(sizes), model.table.shape[1]), np.float32), np.zeros(len(sizes), np.float32), np.zeros(len(sizes), np.float32)]
        start = 0
        while start < len(order):
            end = start + 1
            while end < len(order) and (end + 1 - start) * int(sizes[order[end]]) * width <= _CELLS:
                end += 1
            rows = order[start:end]
            with torch.inference_mode():
                parts = model(*_padded(features, rows))
            for array, part in zip(out, parts, strict=True):
                array[rows] = part.numpy()
            start = end
        return Predictions(*out)


def _padded(features: sparse.csr_matrix, rows: Index) -> tuple[torch.Tensor, torch.Tensor]:
    """The device's inputs for these rows: ids int32 [B, L], weights float32 [B, L]."""
    longest = max(1, int(np.diff(features.indptr)[rows].max()))
    ids = np.zeros((len(rows), longest), np.int32)
    weights = np.zeros((len(rows), longest), np.float32)
    for place, row in enumerate(rows):
        begin, end = features.indptr[row], features.indptr[row + 1]
        ids[place, : end - begin] = features.indices[begin:end]
        weights[place, : end - begin] = features.data[begin:end]
    return torch.from_numpy(ids), torch.from_numpy(weights)
