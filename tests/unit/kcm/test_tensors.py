"""Tensors in place of texts: the same inputs, and clear words for what the graph can't read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcm.preprocess import NgramPreprocessor, batch_of
from kcm.sample import Tensors, edge_payload_from_proto, payload_from_proto
from kcm.task import PreprocessSpec
from protos.kcm.v1 import sample_pb2

PREPROCESSOR = NgramPreprocessor(PreprocessSpec(buckets=64, max_words=5))


def row_of(text: str) -> dict[str, Any]:
    return {name: array[0] for name, array in PREPROCESSOR.batch([text]).items()}


def over_the_wire(row: dict[str, Any]) -> Tensors:
    message = sample_pb2.Payload(tensors=sample_pb2.Tensors(inputs={name: array.tobytes() for name, array in row.items()}))
    payload = edge_payload_from_proto(sample_pb2.Payload.FromString(message.SerializeToString()))
    assert isinstance(payload, Tensors)
    return payload


@given(st.lists(st.tuples(st.text(max_size=30), st.sampled_from(["text", "arrays", "bytes"])), min_size=1, max_size=6))
def test_any_mixture_gives_what_the_texts_give(parts: list[tuple[str, str]]) -> None:
    ways = {"text": lambda t: t, "arrays": lambda t: Tensors(row_of(t)), "bytes": lambda t: over_the_wire(row_of(t))}
    want = PREPROCESSOR.batch([text for text, _ in parts])
    got = batch_of([ways[way](text) for text, way in parts], PREPROCESSOR)
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and np.array_equal(got[name], array)


def ids(*values: int) -> Any:
    return np.array(values, np.int32)


def weights(*values: float) -> Any:
    return np.array(values, np.float32)


WHOLE = {"ids": ids(1), "weights": weights(1), "words": ids(1, 2), "word_weights": weights(1, 1)}


def test_the_two_pairs_have_a_length_each() -> None:
    assert batch_of([Tensors(WHOLE)], PREPROCESSOR)["words"].tolist() == [[1, 2]]


@pytest.mark.filterwarnings("error")
def test_large_weights_are_numbers_still() -> None:
    """Their square is none."""
    large = weights(3e38, -3e38)
    assert np.array_equal(batch_of([Tensors({**WHOLE, "word_weights": large})], PREPROCESSOR)["word_weights"], large[None])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "tensors none given, the graph reads ids, weights, words, word_weights"),
        ({"ids": ids(1)}, "tensors ids given, the graph reads"),
        ({**WHOLE, "x": ids(1)}, "tensors ids, weights, word_weights, words, x given"),
        ({**WHOLE, "weights": weights(1, 2)}, "tensor 'weights' has another length than 'ids'"),
        ({**WHOLE, "words": ids(1)}, "tensor 'word_weights' has another length than 'words'"),
        ({**WHOLE, "ids": ids(), "weights": weights()}, "tensor 'ids' has 0 values, 1 to 100"),
        ({**WHOLE, "words": ids(), "word_weights": weights()}, "tensor 'words' has 0 values, 1 to 5"),
        ({**WHOLE, "ids": ids(*range(101)), "weights": weights(*range(101))}, "'ids' has 101 values, 1 to 100 are taken"),
        ({**WHOLE, "words": ids(*range(6)), "word_weights": weights(*range(6))}, "'words' has 6 values, 1 to 5 are taken"),
        ({**WHOLE, "ids": ids(-1)}, r"tensor 'ids' has a value outside 0\.\.191"),
        ({**WHOLE, "ids": ids(192)}, r"tensor 'ids' has a value outside 0\.\.191"),
        ({**WHOLE, "words": ids(1, 64)}, r"tensor 'words' has a value outside 0\.\.63"),
        ({**WHOLE, "ids": np.array([1])}, r"tensor 'ids' is int64 \[1\], the graph reads one row of int32"),
        ({**WHOLE, "ids": ids(1)[None]}, r"is int32 \[1, 1\], the graph reads one row"),
        ({**WHOLE, "ids": [1]}, "is list, the graph reads one row"),
        ({**WHOLE, "weights": weights(float("nan"))}, "tensor 'weights' has a value that is no finite number"),
        ({**WHOLE, "weights": weights(float("inf"))}, "tensor 'weights' has a value that is no finite number"),
        ({**WHOLE, "word_weights": weights(1, float("nan"))}, "tensor 'word_weights' has a value that is no finite number"),
        ({**WHOLE, "ids": b"12345"}, "has 5 bytes, no whole number of int32"),
    ],
)
def test_what_the_graph_can_not_read_is_named(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_of([Tensors(inputs)], PREPROCESSOR)


def test_a_large_model_is_never_given_tensors() -> None:
    with pytest.raises(ValueError, match="tensors are for the device alone"):
        payload_from_proto(sample_pb2.Payload(tensors=sample_pb2.Tensors(inputs={"ids": b"1234"})))
