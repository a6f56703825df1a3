"""Text → the small model's inputs: the one implementation that training, edge and cloud share.

"ngrams" hashes words, word pairs and character n-grams of each word into buckets; "tokenizer" runs a tokenizer.json.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kcm.errors import BundleError, require
from kcm.task import PreprocessSpec

Inputs = dict[str, NDArray[Any]]

_WORD = re.compile(r"\w+|[^\w\s]")
_CACHED_WORDS = 200_000  # about 100 MB at worst; a device sees far fewer


class Preprocessor(Protocol):
    """Payloads → the graph's inputs by name, each padded to the longest of the batch."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def batch(self, payloads: Sequence[str | bytes]) -> Inputs:
        """Raises ValueError for a payload of another modality."""
        ...


def load_preprocessor(spec: PreprocessSpec, files: Mapping[str, bytes]) -> Preprocessor:
    """The preprocessor of a task; `files` holds tokenizer.json where one is used.

    Raises:
        BundleError: tokenizer.json is missing or can't be read.
    """
    if spec.kind == "ngrams":
        return NgramPreprocessor(spec)
    if "tokenizer.json" not in files:
        raise BundleError("the task's preprocessing needs tokenizer.json, which isn't there")
    return TokenizerPreprocessor(spec, files["tokenizer.json"])


class NgramPreprocessor:
    """Hashed n-grams: ids int32 [B, L] and weights float32 [B, L], padded with id 0 and weight 0.

    Bucket 0 is kept for the padding. Per-word ids are cached, so a warm sentence costs a dictionary look-up per word.
    """

    names = ("ids", "weights")

    def __init__(self, spec: PreprocessSpec) -> None:
        self._spec = spec
        self._words: dict[str, tuple[int, NDArray[np.int32]]] = {}
        self._mask = spec.buckets - 1
        if spec.buckets & self._mask:
            raise BundleError(f"[preprocess] buckets {spec.buckets} is not a power of two")

    def batch(self, payloads: Sequence[str | bytes]) -> Inputs:
        rows = [self.encode(as_text(payload)) for payload in payloads]
        if len(rows) == 1:
            ids, weights = rows[0]
            return {"ids": ids[None], "weights": weights[None]}
        longest = max((len(ids) for ids, _ in rows), default=1)
        ids_out = np.zeros((len(rows), longest), np.int32)
        weights_out = np.zeros((len(rows), longest), np.float32)
        for row, (ids, weights) in enumerate(rows):
            ids_out[row, : len(ids)] = ids
            weights_out[row, : len(ids)] = weights
        return {"ids": ids_out, "weights": weights_out}

    def encode(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Bucket ids [L] and weights [L] of one text, L >= 1: 1 + ln(count) per distinct word and word pair."""
        raise NotImplementedError


class TokenizerPreprocessor:
    """A tokenizer.json: input_ids and attention_mask int64 [B, L], truncated to max_tokens."""

    names = ("input_ids", "attention_mask")

    def __init__(self, spec: PreprocessSpec, tokenizer_json: bytes) -> None:
        tokenizers = require("tokenizers", "edge")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"tokenizer.json can't be read: {error}") from error
        self._tokenizer.enable_truncation(spec.max_tokens)
        self._tokenizer.enable_padding()

    def batch(self, payloads: Sequence[str | bytes]) -> Inputs:
        encoded = self._tokenizer.encode_batch([as_text(p) for p in payloads])
        return {
            "input_ids": np.array([e.ids for e in encoded], dtype=np.int64),
            "attention_mask": np.array([e.attention_mask for e in encoded], dtype=np.int64),
        }


def as_text(payload: str | bytes) -> str:
    """Raises ValueError where the payload isn't text."""
    if not isinstance(payload, str):
        raise ValueError("this task reads text, the payload is an image")
    return payload
