"""The hint's gate on simulated pairs: little regret whichever way a hint works, a gain where a finer rule has one, honest evidence."""

import numpy as np
import pytest
from numpy.typing import NDArray

from kcm.calibration import Arm, HintGate
from kcm.policy import gate_hint
from kcm.sample import Hint
from training.hint import ALWAYS, FEWEST, NEVER, Rule, choose_rule, fit_gate

Outcomes = tuple[dict[Arm, NDArray[np.bool_]], NDArray[np.float64]]
_POPULATION = 40_000
# (repairs, spoils) of each arm: how often a hint mends the large model's error where the small model is right, and spoils its right
# answer where that is wrong.
WORLDS = {
    "helpful": ((0.5, 0.05), (0.4, 0.2)),
    "slightly helpful": ((0.2, 0.02), (0.2, 0.1)),
    "harmful": ((0.1, 0.5), (0.1, 0.7)),
    "slightly harmful": ((0.2, 0.12), (0.2, 0.2)),
    "copied": ((0.95, 0.9), (1.0, 1.0)),
    "no effect": ((0.0, 0.0), (0.0, 0.0)),
}


def world(candidates: tuple[float, float], assertion: tuple[float, float], sharp: bool = False) -> Outcomes:
    """A population of escalated samples. `sharp`: the small model is right above C_x = 0.5 and wrong below, nearly."""
    rng = np.random.default_rng(7)
    confidence = rng.beta(2, 3, _POPULATION)
    small = rng.random(_POPULATION) < (np.where(confidence > 0.5, 0.95, 0.05) if sharp else confidence)
    none = rng.random(_POPULATION) < 0.55 + 0.3 * confidence
    arms: dict[Arm, NDArray[np.bool_]] = {"none": none}
    for arm, (repairs, spoils) in zip(("candidates", "assertion"), (candidates, assertion), strict=True):
        chance = rng.random(_POPULATION)
        right = np.where(small, none | (chance < repairs), none & ~(chance < spoils))
        arms[arm] = np.where(rng.random(_POPULATION) < 0.02, ~right, right)  # an answer also changes for no reason
    return arms, confidence


def drawn(outcomes: Outcomes, n: int, seed: int) -> Outcomes:
    rows = np.random.default_rng(seed).choice(_POPULATION, n, replace=False)
    return {arm: right[rows] for arm, right in outcomes[0].items()}, outcomes[1][rows]


def regrets(outcomes: Outcomes, n: int, draws: int) -> NDArray[np.float64]:
    """Of rules fitted on draws of n samples, on the whole population, against the better of never and always."""
    better = max(NEVER.right(*outcomes).mean(), ALWAYS.right(*outcomes).mean())
    return np.array([better - choose_rule(*drawn(outcomes, n, seed)).right(*outcomes).mean() for seed in range(draws)])


@pytest.mark.parametrize("name", WORLDS)
def test_the_gate_is_on_average_never_worse_than_the_better_of_always_and_never_by_half_a_point(name: str) -> None:
    outcomes = world(*WORLDS[name])
    assert abs(ALWAYS.right(*outcomes).mean() - NEVER.right(*outcomes).mean()) > (0.05 if name in ("harmful", "copied") else 0.0)
    assert regrets(outcomes, 300, 100).mean() <= 0.005


def test_where_always_or_never_is_far_worse_the_gate_is_hardly_ever_wrong() -> None:
    for name in ("harmful", "copied"):
        assert np.quantile(regrets(world(*WORLDS[name]), 300, 100), 0.95) <= 0.005, name


def test_a_hint_that_helps_above_a_confidence_is_shown_only_there() -> None:
    outcomes = world((0.9, 0.9), (0.9, 0.9), sharp=True)
    assert regrets(outcomes, 300, 60).mean() < -0.03, "the threshold must beat both always and never"
    gate = fit_gate(*drawn(outcomes, 300, 1))
    assert gate.arm != "none" and 0.45 < gate.lowest < 0.6
    assert "C_x is at least" in gate.reason


def test_an_assertion_is_chosen_where_it_helps_most() -> None:
    outcomes = world((0.1, 0.1), (0.9, 0.02))
    assert regrets(outcomes, 300, 60).mean() < -0.04
    assert fit_gate(*drawn(outcomes, 300, 1)).arm == "assertion"


def test_the_evidence_is_what_each_arm_did() -> None:
    arms, confidence = drawn(world(*WORLDS["helpful"]), 300, 1)
    gate = fit_gate(arms, confidence)
    assert gate.arm == "candidates" and gate.lowest == 0.0 and gate.samples == 300
    assert list(gate.evidence) == ["none", "candidates", "assertion", "gate"]
    for arm, right in arms.items():
        found = gate.evidence[arm]
        difference = right.mean() - arms["none"].mean()
        assert found.accuracy == pytest.approx(right.mean()) and found.difference == pytest.approx(difference)
        assert found.interval[0] <= difference <= found.interval[1]
    assert gate.evidence["none"].interval == (0.0, 0.0)
    assert f"{100 * gate.evidence['candidates'].difference:+.1f} points" in gate.reason and "300 escalated samples" in gate.reason


def test_the_gates_own_evidence_comes_from_samples_that_it_was_not_fitted_on() -> None:
    # Arms that differ by chance alone: the best of many rules looks good on the samples that chose it, and gains nothing elsewhere.
    claimed, inside = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        arms: dict[Arm, NDArray[np.bool_]] = {arm: rng.random(200) < 0.6 for arm in ("none", "candidates", "assertion")}  # type: ignore[misc]
        confidence = rng.random(200)
        gate = fit_gate(arms, confidence)
        claimed.append(gate.evidence["gate"].difference)
        inside.append(Rule(gate.arm, gate.lowest).right(arms, confidence).mean() - arms["none"].mean())
    assert np.mean(inside) > 0.02
    assert abs(np.mean(claimed)) < 0.015


def test_a_hint_without_effect_is_withheld_and_so_is_one_that_harms() -> None:
    same = np.arange(100) % 3 > 0
    gate = fit_gate({"none": same, "candidates": same, "assertion": same}, np.linspace(0, 1, 100))
    assert gate.arm == "none" and "doesn't help" in gate.reason
    harmful = fit_gate(*drawn(world(*WORLDS["harmful"]), 300, 2))
    assert harmful.arm == "none" and harmful.evidence["candidates"].interval[1] < 0


def test_the_rule_is_what_the_edge_does_with_the_gate() -> None:
    arms, confidence = drawn(world(*WORLDS["copied"]), 200, 3)
    for arm in ("none", "candidates", "assertion"):
        gate = HintGate(arm=arm, lowest=0.4, no_hint=0.0)
        shown = [gate_hint(Hint(label_ids=(1, 2), probabilities=(0.5, 0.2), confidence=float(c)), gate, "id")[0] for c in confidence]
        seen = ["none" if hint is None else "assertion" if len(hint.label_ids) == 1 else "candidates" for hint in shown]
        expected = [arms[name][row] for row, name in enumerate(seen)]
        np.testing.assert_array_equal(Rule(arm, 0.4).right(arms, confidence), expected)


def test_without_the_assertion_arm_the_others_are_weighed() -> None:
    arms, confidence = drawn(world(*WORLDS["helpful"]), 300, 1)
    del arms["assertion"]
    assert fit_gate(arms, confidence).arm == "candidates"


def test_few_samples_choose_nothing() -> None:
    arms, confidence = drawn(world(*WORLDS["helpful"]), FEWEST - 1, 1)
    gate = fit_gate(arms, confidence)
    assert gate.arm == "none" and f"takes {FEWEST}" in gate.reason and gate.samples == FEWEST - 1
    assert "too few" not in fit_gate(*drawn(world(*WORLDS["helpful"]), FEWEST, 1)).reason


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"candidates": np.ones(49, bool)}, "shape"),
        ({"none": np.ones((50, 1), bool)}, "shape"),
        ({"shouted": np.ones(50, bool)}, "'shouted' of the hint is unknown"),
    ],
)
def test_outcomes_that_do_not_fit_are_refused(changes: dict[Arm, NDArray[np.bool_]], said: str) -> None:
    arms, confidence = drawn(world(*WORLDS["helpful"]), 50, 1)
    with pytest.raises(ValueError, match=said):
        fit_gate({**arms, **changes}, confidence)


def test_nothing_half_of_it_or_no_probability_is_refused() -> None:
    arms, confidence = drawn(world(*WORLDS["helpful"]), 50, 1)
    with pytest.raises(ValueError, match="no samples"):
        fit_gate({arm: right[:0] for arm, right in arms.items()}, confidence[:0])
    with pytest.raises(ValueError, match="'none' are missing"):
        fit_gate({"candidates": arms["candidates"]}, confidence)
    for bad in (np.nan, 1.5, -0.1):
        with pytest.raises(ValueError, match="no probability"):
            fit_gate(arms, np.where(np.arange(50) == 3, bad, confidence))
