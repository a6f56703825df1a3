"""Values that cross a boundary come back equal, or are refused with a reason."""

import time
import uuid

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kcm.sample import Hint, new_sample_id, payload_from_proto, payload_to_proto, scores_from_proto, scores_to_proto
from protos.kcm.v1 import sample_pb2


@given(hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)))
def test_scores_travel_exactly(values: np.ndarray) -> None:
    message = sample_pb2.Scores.FromString(scores_to_proto(values, "space").SerializeToString())
    assert np.array_equal(scores_from_proto(message, "space", values.size), values)


def test_half_precision_scores_are_read() -> None:
    message = sample_pb2.Scores(label_space="s", dtype=sample_pb2.Scores.FLOAT16, values=np.array([1.5, -2.0], "<f2").tobytes())
    assert scores_from_proto(message, "s", 2).tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label_space": "other"}, "label space"),
        ({"values": b"123"}, "bytes"),
        ({"dtype": 0}, "dtype"),
        ({"ids": [1]}, "sparse"),
        ({"values": np.array([np.nan, 1, 2], "<f4").tobytes()}, "finite"),
    ],
)
def test_foreign_or_damaged_scores_are_refused(change: dict[str, object], said: str) -> None:
    message = scores_to_proto(np.zeros(3, np.float32), "space")
    for field, value in change.items():
        if field == "ids":
            message.ids.extend(value)  # type: ignore[arg-type]
        else:
            setattr(message, field, value)
    with pytest.raises(ValueError, match=said):
        scores_from_proto(message, "space", 3)


@given(st.text() | st.binary())
def test_payloads_travel(payload: str | bytes) -> None:
    assert payload_from_proto(sample_pb2.Payload.FromString(payload_to_proto(payload).SerializeToString())) == payload


def test_an_empty_payload_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        payload_from_proto(sample_pb2.Payload())


@pytest.mark.parametrize(
    ("ids", "probabilities", "confidence", "said"),
    [
        ([0, 1], [0.5], 0.5, "2 labels but 1"),
        ([7], [0.5], 0.5, "names label 7"),
        ([0], [1.5], 0.5, "outside"),
        ([0], [0.5], 2.0, "outside"),
    ],
)
def test_a_hint_must_fit_the_task(ids: list[int], probabilities: list[float], confidence: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Hint.from_proto(sample_pb2.Hint(label_ids=ids, probabilities=probabilities, confidence=confidence), 5)


def test_sample_ids_are_uuid7_and_sort_by_time() -> None:
    first = new_sample_id()
    time.sleep(0.003)
    ids = [first, *(new_sample_id() for _ in range(1000))]
    assert len(set(ids)) == len(ids)
    assert all(uuid.UUID(i).version == 7 and uuid.UUID(i).variant == uuid.RFC_4122 for i in ids)
    assert first < min(ids[1:])
