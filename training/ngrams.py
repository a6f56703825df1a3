"""The small text model: hashed n-grams and static word vectors → one linear layer.

    ids → row of each bucket → idf × weight, each group (words, pairs, character n-grams) to unit length → Σ rows of `table`
    ids → word vector of each word → mean, unit length, centred, unit length                            → `dense`
    logits = both

All plain Gather, Mul, ReduceSum and MatMul. The word vectors come from the large model's encoder: each word alone through it,
then PCA; they give words that the few labels never showed a place beside words that they did. Without vectors the model is
a linear model on TF-IDF features. Fitting is one convex problem on soft targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse as sparse
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kcm.preprocess import GRAMS, GROUPS, PAIRS, WORDS, Inputs, NgramPreprocessor
from training.linear import fit_softmax

Float32 = NDArray[np.float32]

# Squared length that each block has of a text's unit-length features; then rarest n-gram kept, by documents.
_SHARE = {WORDS: 1.0, PAIRS: 0.5, GRAMS: 1.0}
_VECTOR_SHARE = 2.0
# The mean of many words' vectors says little: on documents (20 Newsgroups) the full share cost three points once the large
# model had answered 2,000 texts, so they get less. Chosen by looking at CLINC150, R52 and 20 Newsgroups.
_LONG_TEXT, _LONG_VECTOR_SHARE = 40, 0.25
_MIN_DOCUMENTS = {WORDS: 1, PAIRS: 2, GRAMS: 2}
_SIF = 3e-3  # smooth inverse frequency of a word in the mean of vectors (Arora et al. 2017)
TINY = 1e-6


@dataclass(frozen=True)
class WordVectors:
    """Static vectors [V, D] of words, by bucket id [V] of the preprocessor; an id appears once."""

    ids: NDArray[np.int64]
    vectors: Float32


def distil_words(words: Sequence[str], embed: Callable[[list[str]], Float32], preprocessor: NgramPreprocessor, size: int) -> WordVectors:
    """Run each word alone through an encoder and keep the `size` strongest directions.

    Source: static embeddings from a sentence transformer, as in model2vec (Tulkens and van Dongen 2024).
    """
    by_id = {preprocessor.word_bucket(word): word for word in words}  # of two words in one bucket, the later one stays
    raw = embed(list(by_id.values()))
    centred = raw - raw.mean(0)
    basis = np.linalg.svd(centred, full_matrices=False)[2][:size]
    return WordVectors(np.fromiter(by_id, np.int64, len(by_id)), (centred @ basis.T).astype(np.float32))


class NgramModel(nn.Module):
    """ids [B, L], weights [B, L] (`joined`) → logits [B, C], length [B] (distinct words), unknown [B] (share of them in no table)."""

    row: Tensor  # int32 [3 · buckets] → row of idf and table; 0: unseen
    idf: Tensor  # [R + 1, 3], in the column of the row's group
    share: Tensor  # [3]
    table: Tensor  # [R + 1, C]; row 0 is zero
    vector_row: Tensor  # int32 [buckets] → row of vectors; 0: none
    vectors: Tensor  # [V + 1, D], SIF weight folded in; row 0 is zero
    centre: Tensor  # [D]
    dense: Tensor  # [D, C]

    def __init__(self, arrays: dict[str, NDArray[np.generic]]) -> None:
        super().__init__()
        for name in self.__annotations__:
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(arrays[name])))

    @property
    def buckets(self) -> int:
        return len(self.row) // GROUPS

    def forward(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.row[ids]
        scaled = self.idf[rows] * weights.unsqueeze(-1)  # [B, L, 3]
        norm = (scaled * scaled).sum(1).sqrt() + TINY
        coefficient = (scaled * (self.share / norm).unsqueeze(1)).sum(2)  # [B, L]
        logits = torch.bmm(coefficient.unsqueeze(1), self.table[rows]).squeeze(1)
        word = (ids < self.buckets) & (weights > 0)
        vector_rows = self.vector_row[torch.where(word, ids, 0)] * word
        mean = _unit(torch.bmm(weights.unsqueeze(1), self.vectors[vector_rows]).squeeze(1))
        logits = logits + _unit(mean - self.centre) @ self.dense
        length = word.sum(1).to(logits.dtype)
        unknown = (word & (rows == 0) & (vector_rows == 0)).sum(1).to(logits.dtype)
        return logits, length, unknown / length.clamp(min=1)


def _unit(x: Tensor) -> Tensor:
    return x / ((x * x).sum(1, keepdim=True).sqrt() + TINY)


def joined(inputs: Inputs) -> tuple[NDArray[np.int32], Float32]:
    """The device's inputs [B, W] and [B, L] as ids and weights [B, W + L], words first; what pads the words stays between."""
    ids, weights, words, word_weights = (inputs[name] for name in NgramPreprocessor.names)
    return np.concatenate([words, ids], 1), np.concatenate([word_weights, weights], 1)


def encode(texts: Sequence[str], preprocessor: NgramPreprocessor) -> sparse.csr_matrix:
    """Texts → [N, 3 · buckets] sparse weights: the same ids and weights that the device feeds the graph."""
    rows = [preprocessor.encode(text) for text in texts]
    indptr = np.concatenate([[0], np.cumsum([len(row.words) + len(row.ids) for row in rows])])
    ids = np.concatenate([part for row in rows for part in (row.words, row.ids)]) if rows else np.zeros(0, np.int32)
    weights = np.concatenate([part for row in rows for part in (row.word_weights, row.weights)]) if rows else np.zeros(0, np.float32)
    buckets = preprocessor.buckets
    return sparse.csr_matrix((weights, ids, indptr), (len(rows), GROUPS * buckets))


def fit_ngrams(
    x: sparse.csr_matrix,
    targets: Float32,
    sample_weights: Float32,
    vectors: WordVectors | None,
    reverse: NDArray[np.bool_] | None = None,
) -> NgramModel:
    """Fit the model on encoded texts [N, 3 · buckets] and soft targets [N, C]; `reverse` as in fit_softmax.

    The vocabulary is what these texts hold; all else stays row 0.
    """
    buckets = x.shape[1] // GROUPS
    documents = np.bincount(x.indices, minlength=x.shape[1])
    group = np.arange(x.shape[1]) // buckets
    kept = np.flatnonzero(documents >= np.array([_MIN_DOCUMENTS[g] for g in range(GROUPS)])[group])
    words = np.diff(x[:, :buckets].indptr).mean()
    vector_share = (_VECTOR_SHARE if words <= _LONG_TEXT else _LONG_VECTOR_SHARE) if vectors else 0.0
    total = sum(_SHARE.values()) + vector_share
    share = np.sqrt(np.array([_SHARE[g] for g in range(GROUPS)]) / total).astype(np.float32)
    idf = np.zeros((len(kept) + 1, GROUPS), np.float32)
    idf[np.arange(1, len(kept) + 1), group[kept]] = np.log((1 + x.shape[0]) / (1 + documents[kept])) + 1
    row = np.zeros(x.shape[1], np.int32)
    row[kept] = np.arange(1, len(kept) + 1)

    means = mean_vectors(x, vectors) if vectors else None
    arrays: dict[str, NDArray[np.generic]] = {"row": row, "idf": idf, "share": share}
    arrays |= means.arrays if means else _vector_arrays(x, None, buckets)
    features = _sparse_features(x, kept, idf[1:].sum(1), group[kept], share)
    dense = means.dense * np.float32(np.sqrt(vector_share / total)) if means else None
    weight, dense_weight = fit_softmax(features, dense, targets, sample_weights, reverse=reverse)
    arrays["table"] = np.concatenate([np.zeros((1, targets.shape[1]), np.float32), weight])
    arrays["dense"] = dense_weight * np.float32(np.sqrt(vector_share / total))
    return NgramModel(arrays)


class MeanVectors(NamedTuple):
    """What `dense` of an NgramModel multiplies for N texts [N, D], and the model's arrays that make it."""

    dense: Float32
    arrays: dict[str, NDArray[np.generic]]


def mean_vectors(x: sparse.csr_matrix, vectors: WordVectors, sif: float = _SIF) -> MeanVectors:
    """Of encoded texts [N, 3 · buckets]: the mean of each one's word vectors, unit length, centred, unit length.

    `sif` is the frequency at which a word counts half.
    """
    buckets = x.shape[1] // GROUPS
    arrays = _vector_arrays(x, vectors, buckets, sif)
    bag = x[:, :buckets] @ arrays["vectors"][arrays["vector_row"]]
    mean = bag / (np.linalg.norm(bag, axis=1, keepdims=True) + TINY)
    arrays["centre"] = mean.mean(0).astype(np.float32)
    mean = mean - arrays["centre"]
    return MeanVectors(mean / (np.linalg.norm(mean, axis=1, keepdims=True) + TINY), arrays)


def _vector_arrays(x: sparse.csr_matrix, vectors: WordVectors | None, buckets: int, sif: float = _SIF) -> dict[str, NDArray[np.generic]]:
    """vector_row, vectors with the SIF weight folded in, and a centre still to be set."""
    vector_row = np.zeros(buckets, np.int32)
    if vectors is None:
        return {"vector_row": vector_row, "vectors": np.zeros((1, 1), np.float32), "centre": np.zeros(1, np.float32)}
    words = x[:, :buckets]
    frequency = np.bincount(words.indices, weights=words.data, minlength=buckets)
    frequency = frequency / max(frequency.sum(), 1)
    scaled = vectors.vectors * (sif / (sif + frequency[vectors.ids]))[:, None].astype(np.float32)
    vector_row[vectors.ids] = np.arange(1, len(vectors.ids) + 1)
    zero = np.zeros((1, scaled.shape[1]), np.float32)
    return {"vector_row": vector_row, "vectors": np.concatenate([zero, scaled]), "centre": np.zeros(scaled.shape[1], np.float32)}


def _sparse_features(
    x: sparse.csr_matrix, kept: NDArray[np.int64], idf: Float32, group: NDArray[np.int64], share: Float32
) -> sparse.csr_matrix:
    """[N, R]: idf × weight, each group of a row scaled to its share: what `forward` computes."""
    features = x[:, kept].astype(np.float32)
    features.data *= idf[features.indices]
    rows = np.repeat(np.arange(features.shape[0]), np.diff(features.indptr))
    cell = rows * GROUPS + group[features.indices]
    norm = np.sqrt(np.bincount(cell, weights=features.data.astype(np.float64) ** 2, minlength=features.shape[0] * GROUPS)) + TINY
    features.data = (features.data * share[group[features.indices]] / norm[cell]).astype(np.float32)
    return features
