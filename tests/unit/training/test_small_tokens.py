from __future__ import annotations

import json

import numpy as np
import pytest
from small_kit import UNKNOWN, tokenizer_json

from kcm.preprocess import TokenizerPreprocessor
from kcm.task import PreprocessSpec
from training.tokens import like_length, token_counts, unknown_id, vocabulary_size


def stored(**model: object) -> bytes:
    return json.dumps({"model": model, "added_tokens": [{"id": 7, "content": "<unk>"}]}).encode()


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (tokenizer_json(), UNKNOWN),
        (stored(type="Unigram", unk_id=2, vocab=[["<s>", 0.0], ["</s>", 0.0], ["?", 0.0]]), 2),
        (stored(type="WordPiece", unk_token="<unk>", vocab={"a": 0}), 7),
        (stored(type="BPE", unk_token=None, vocab={"a": 0}), None),
        (stored(type="BPE", unk_token="nowhere", vocab={"a": 0}), None),
    ],
    ids=["word-level", "unigram", "added", "byte-level", "named-but-absent"],
)
def test_the_unknown_token_is_found_in_every_kind_of_tokenizer(tokenizer: bytes, expected: int | None) -> None:
    assert unknown_id(tokenizer) == expected


def test_padding_counts_neither_as_length_nor_as_unknown() -> None:
    inputs = {"input_ids": np.array([[0, 5, 0, 0], [5, 6, 0, 7]]), "attention_mask": np.array([[1, 1, 0, 0], [1, 1, 1, 1]])}
    length, unknown = token_counts(inputs, 0)
    assert length.tolist() == [2, 4] and unknown.tolist() == [0.5, 0.25]
    assert token_counts(inputs, None)[1].tolist() == [0, 0]


def test_an_empty_text_still_gives_the_graph_one_token() -> None:
    preprocessor = TokenizerPreprocessor(PreprocessSpec(kind="tokenizer"), tokenizer_json())
    for payloads in ([""], ["", ""]):
        inputs = preprocessor.batch(payloads)
        assert all(array.shape == (len(payloads), 1) and array.dtype == np.int64 and not array.any() for array in inputs.values())


def test_batches_are_of_like_length_and_hold_every_row_once() -> None:
    texts = ["a" * n for n in (900, 3, 0, 5000, 40, 3000, 1)] + ["b"] * 200
    batches = list(like_length(texts, longest=2000))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(texts)))
    widths = [[min(max(len(texts[row]), 1), 2000) for row in rows] for rows in batches]
    assert all(len(w) == 1 or len(w) * max(w) <= 4096 for w in widths) and max(map(len, batches)) == 64
    assert max(widths[0]) <= min(widths[-1])
    assert list(like_length([], longest=10)) == []


def test_vocabulary_reaches_to_the_largest_id() -> None:
    vocabulary = json.loads(tokenizer_json())
    vocabulary["model"]["vocab"]["far"] = 99
    assert vocabulary_size(json.dumps(vocabulary).encode()) == 100
