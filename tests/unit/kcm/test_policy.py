"""ε from samples: the realised share is the wished one, as near as ties allow, under the strict rule C_x > ε."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kcm.calibration import HintGate
from kcm.policy import draw, epsilon_for_accuracy, epsilon_for_rate, explores, gate_hint, stays_local
from kcm.sample import Hint, Route

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


def _hint(confidence: float = 0.6) -> Hint:
    return Hint(label_ids=(2, 0, 1), probabilities=(0.5, 0.3, 0.1), confidence=confidence)


def test_the_gate_withholds_asserts_or_shows_all() -> None:
    hint = _hint()
    always = {"no_hint": 0.0}
    assert gate_hint(hint, HintGate(arm="candidates", **always), "a") == (hint, 1.0)
    assert gate_hint(hint, HintGate(arm="none", **always), "a") == (None, 0.0)
    asserted, shown = gate_hint(hint, HintGate(arm="assertion", **always), "a")
    assert asserted is not None and (asserted.label_ids, asserted.probabilities, shown) == ((2,), (0.5,), 1.0)
    assert gate_hint(hint, HintGate(arm="candidates", lowest=0.7, **always), "a") == (None, 0.0)
    assert gate_hint(hint, HintGate(arm="candidates", lowest=0.6, **always), "a")[0] == hint
    assert gate_hint(None, HintGate(**always), "a") == (None, 0.0)


def test_a_no_hint_arm_is_a_fixed_share_of_ids_and_stable_under_retry() -> None:
    gate = HintGate(arm="candidates", no_hint=0.1)
    ids = [f"s{i}" for i in range(20_000)]
    shown = [gate_hint(_hint(), gate, sample_id) for sample_id in ids]
    assert {p for _, p in shown} == {0.9}
    share = sum(hint is None for hint, _ in shown) / len(ids)
    assert 0.09 < share < 0.11
    assert [gate_hint(_hint(), gate, sample_id) for sample_id in ids[:500]] == shown[:500]


def test_exploration_is_a_share_of_ids_and_has_nothing_to_do_with_the_no_hint_arm() -> None:
    ids = [f"s{i}" for i in range(20_000)]
    explored = {i for i in ids if explores(i, 0.1)}
    assert 0.09 < len(explored) / len(ids) < 0.11
    assert not any(explores(i, 0.0) for i in ids) and all(explores(i, 1.0) for i in ids)
    both = sum(draw(i, "hint") >= 0.9 for i in explored) / len(explored)
    assert 0.07 < both < 0.13
