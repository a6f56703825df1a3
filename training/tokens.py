"""What a text's tokens say beside their ids: how many, and how many unknown; and texts in batches of like length."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcm.errors import BundleError, ConfigError, require
from kcm.preprocess import Inputs, TokenizerPreprocessor
from kcm.sample import Payload
from kcm.task import PreprocessSpec

Float32 = NDArray[np.float32]
Index = NDArray[np.int64]

_BATCH, _BATCH_CHARACTERS = 64, 4096  # of one batch, padded; about 1,000 tokens: on one thread more cost more a text (caches)


def load_tokenizer(path: Path, spec: PreprocessSpec) -> tuple[bytes, TokenizerPreprocessor]:
    """The bytes of a tokenizer.json, and the preprocessor that the device will make of them.

    Raises:
        ConfigError: the file is missing or isn't a tokenizer.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist: the tokenizer that the small model was trained with",
            fix='transformers: AutoTokenizer.from_pretrained(...).save_pretrained("FOLDER") writes tokenizer.json',
        )
    data = path.read_bytes()
    try:
        preprocessor = TokenizerPreprocessor(spec, data)
    except BundleError as error:
        raise ConfigError(f"{path} is no tokenizer.json: {error.message}") from error
    return data, preprocessor


def unknown_id(tokenizer_json: bytes) -> int | None:
    """The id that this tokenizer gives to what it doesn't know; None where nothing is unknown to it (byte-level BPE)."""
    stored: Any = json.loads(tokenizer_json)
    model = stored["model"]
    if model.get("unk_id") is not None:  # Unigram
        return int(model["unk_id"])
    token = model.get("unk_token")
    if token is None:
        return None
    added = {entry["content"]: entry["id"] for entry in stored.get("added_tokens") or ()}
    vocabulary = model["vocab"]
    found = added.get(token, vocabulary.get(token) if isinstance(vocabulary, dict) else None)
    return None if found is None else int(found)


def vocabulary_size(tokenizer_json: bytes) -> int:
    """One more than the largest id that this tokenizer can give."""
    tokens = require("tokenizers", "edge").Tokenizer.from_buffer(tokenizer_json).get_vocab(with_added_tokens=True)
    return 1 + max(tokens.values(), default=-1)


def token_counts(inputs: Inputs, unknown: int | None) -> tuple[Float32, Float32]:
    """Length [B] in tokens, special ones too, and the share [B] of them with the id `unknown`; mirrored in export/fixed.py."""
    mask = inputs["attention_mask"] > 0
    length = mask.sum(1).astype(np.float32)
    missing = (mask & (inputs["input_ids"] == unknown)).sum(1).astype(np.float32) if unknown is not None else np.zeros_like(length)
    share: Float32 = missing / np.maximum(length, np.float32(1.0))
    return length, share


def like_length(texts: Sequence[Payload], longest: int) -> Iterator[Index]:
    """Rows of `texts` in batches of like length, shortest first; characters past `longest` count nothing (they get cut)."""
    widths = np.array([min(max(len(text), 1), longest) for text in texts], np.int64)
    order = np.argsort(widths, kind="stable")
    start = 0
    while start < len(order):
        end = start + 1
        while end < min(len(order), start + _BATCH) and (end + 1 - start) * int(widths[order[end]]) <= _BATCH_CHARACTERS:
            end += 1
        yield order[start:end]
        start = end
