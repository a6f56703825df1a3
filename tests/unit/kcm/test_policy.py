"""ε from samples: the realised share is the wished one, as near as ties allow, under the strict rule C_x > ε."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kcm.policy import epsilon_for_accuracy, epsilon_for_rate, stays_local
from kcm.sample import Route

confidences = hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(0, 1, width=32, allow_subnormal=False))
# Few distinct values: ties everywhere.
tied = hnp.arrays(np.float32, st.integers(1, 60), elements=st.sampled_from([np.float32(v) for v in (0.0, 0.25, 0.5, 1.0)]))


@given(confidences | tied, st.floats(0, 1, allow_subnormal=False))
def test_no_threshold_comes_nearer_to_the_rate(confidence: np.ndarray, rate: float) -> None:
    epsilon = epsilon_for_rate(confidence, rate)
    realised = np.mean(confidence <= epsilon)
    possible = [0.0, *(np.mean(confidence <= c) for c in confidence)]
    wished = round(rate * confidence.size) / confidence.size
    assert abs(realised - wished) <= min(abs(p - wished) for p in possible) + 1e-9


def test_rate_0_keeps_all_and_1_sends_all() -> None:
    c = np.array([0.0, 0.5, 1.0])
    assert all(stays_local(x, epsilon_for_rate(c, 0.0)) for x in c)
    assert not any(stays_local(x, epsilon_for_rate(c, 1.0)) for x in c)
    with pytest.raises(ValueError, match="outside"):
        epsilon_for_rate(c, 1.5)
    with pytest.raises(ValueError, match="no confidences"):
        epsilon_for_rate(c[:0], 0.5)


@given(confidences | tied, st.data(), st.floats(0, 1, allow_subnormal=False))
def test_accuracy_target_is_met_with_the_fewest_calls(confidence: np.ndarray, data: st.DataObject, target: float) -> None:
    flags = hnp.arrays(np.bool_, confidence.size)
    small, large = data.draw(flags), data.draw(flags)

    def accuracy(epsilon: float) -> float:
        return float(np.where(confidence > epsilon, small, large).mean())

    epsilon = epsilon_for_accuracy(confidence, small, large, target)
    reached = [e for e in (-1.0, *confidence.tolist()) if accuracy(e) * confidence.size >= target * confidence.size - 1e-9]
    if epsilon is None:
        assert not reached
    else:
        assert accuracy(epsilon) >= target - 1e-9
        assert np.mean(confidence <= epsilon) <= min(np.mean(confidence <= e) for e in reached) + 1e-9


def test_the_route_that_was_asked_for_wins_and_nan_escalates() -> None:
    assert stays_local(0.1, 0.98, Route.LOCAL)
    assert not stays_local(1.0, 0.98, Route.CLOUD)
    assert not stays_local(0.98, 0.98)
    assert not stays_local(float("nan"), 0.0)
