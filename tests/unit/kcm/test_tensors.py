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


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "tensors none given, the graph reads ids, weights"),
        ({"ids": ids(1)}, "tensors ids given, the graph reads"),
        ({"ids": ids(1), "weights": weights(1), "x": ids(1)}, "tensors ids, weights, x given"),
        ({"ids": ids(1), "weights": weights(1, 2)}, "tensor 'weights' has another length than 'ids'"),
        ({"ids": ids(), "weights": weights()}, "tensor 'ids' has 0 values, 1 to 100"),
        ({"ids": ids(*range(101)), "weights": weights(*range(101))}, "has 101 values, 1 to 100 are taken"),
        ({"ids": ids(-1), "weights": weights(1)}, r"tensor 'ids' has a value outside 0\.\.191"),
        ({"ids": ids(192), "weights": weights(1)}, r"tensor 'ids' has a value outside 0\.\.191"),
        ({"ids": np.array([1]), "weights": weights(1)}, r"tensor 'ids' is int64 \[1\], the graph reads one row of int32"),
        ({"ids": ids(1)[None], "weights": weights(1)}, r"is int32 \[1, 1\], the graph reads one row"),
        ({"ids": [1], "weights": weights(1)}, "is list, the graph reads one row"),
        ({"ids": ids(1), "weights": weights(float("nan"))}, "tensor 'weights' has a value that is no finite number"),
        ({"ids": ids(1), "weights": weights(float("inf"))}, "tensor 'weights' has a value that is no finite number"),
        ({"ids": b"12345", "weights": weights(1)}, "has 5 bytes, no whole number of int32"),
    ],
)
def test_what_the_graph_can_not_read_is_named(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_of([Tensors(inputs)], PREPROCESSOR)


def test_a_large_model_is_never_given_tensors() -> None:
    with pytest.raises(ValueError, match="tensors are for the device alone"):
        payload_from_proto(sample_pb2.Payload(tensors=sample_pb2.Tensors(inputs={"ids": b"1234"})))
