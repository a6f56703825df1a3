"""The drift alarm: silent over unchanged traffic, quick over changed traffic, and clear about what moved."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from edge_runtime.drift import REMEMBERED, SIGNALS, Drift
from kcm.calibration import Calibration, Guarantee, Reference

RATE, AGREE_ESCALATED, AGREE_LOCAL = 0.25, 0.6, 0.95
PROMISE = Guarantee(max_drop=0.01, confidence=0.95, upper=0.009, effective_n=900, method="test")


def calibrated(rng: np.random.Generator, samples: int = 1000) -> Calibration:
    """What `kcm calibrate` would have seen in `samples` of the usual traffic: scores from Beta(5, 1), a quarter escalated."""
    scores = rng.beta(5, 1, samples)
    epsilon = float(np.quantile(scores, RATE))
    away = int((scores <= epsilon).sum())
    return Calibration(
        epsilon=epsilon,
        calibration_id="c",
        reference=Reference(
            samples=samples,
            cloud_rate=away / samples,
            quantiles=tuple(np.quantile(scores, np.arange(1, 20) / 20).tolist()),
            agreement_escalated=rng.binomial(away, AGREE_ESCALATED) / away,
            escalated=away,
            agreement_local=rng.binomial(samples - away, AGREE_LOCAL) / (samples - away),
            local=samples - away,
        ),
        guarantee=PROMISE,
    )


def feed(
    drift: Drift,
    rng: np.random.Generator,
    samples: int,
    *,
    shape: float = 5.0,
    escalated: float = AGREE_ESCALATED,
    local: float = AGREE_LOCAL,
    explore: float = 0.01,
    until_alarm: bool = False,
) -> int:
    """Traffic with answers and truths; returns how long it was.

    Where small and large model differ, the large one is right half of the time.
    """
    scores, agree, chosen, right = (rng.beta(shape, 1, samples).tolist(), *rng.random((3, samples)).tolist())
    for i, score in enumerate(scores):
        stays = score > drift._calibration.epsilon
        explored = stays and chosen[i] < explore
        drift.decided(str(i), 0, score, local=stays, explored=explored)
        if not stays or explored:
            same = agree[i] < (local if stays else escalated)
            drift.replied(str(i), 0 if same else 1)
            drift.truth(str(i), 0 if same or right[i] < 0.5 else 1)
        if until_alarm and drift.verdict():
            return i + 1
    return samples


@pytest.mark.slow
def test_unchanged_traffic_raises_no_alarm() -> None:
    # 40 runs can't show 1 %: 300 were run once, and none alarmed. The level of a single look is tested beside its code.
    for run in range(40):
        rng = np.random.default_rng(run)
        drift = Drift(calibrated(rng, samples=(200, 1000, 5000)[run % 3]))
        feed(drift, rng, 100_000)
        assert not drift.verdict(), run


@pytest.mark.parametrize("explore", [0.3, 1.0])
def test_unchanged_traffic_of_which_much_is_explored_raises_none_either(explore: float) -> None:
    for run in range(4):
        rng = np.random.default_rng(run)
        drift = Drift(calibrated(rng, 400))
        feed(drift, rng, 20_000, explore=explore)
        assert not drift.verdict(), run


@pytest.mark.parametrize(
    ("change", "signals", "within"),
    [
        ({"shape": 2.5}, {"score", "escalations"}, 1000),
        ({"shape": 3.2}, {"score", "escalations"}, 2000),
        ({"shape": 12.0}, {"score", "escalations"}, 1000),
        ({"escalated": 0.3}, {"agreement_escalated"}, 2500),
    ],
)
def test_a_shift_is_seen_soon_after_it_begins_whenever_that_is(change: dict[str, float], signals: set[str], within: int) -> None:
    needed = []
    for run in range(12):
        rng = np.random.default_rng(100 + run)
        drift = Drift(calibrated(rng))
        feed(drift, rng, 3000 + 131 * run)
        needed.append(feed(drift, rng, 10_000, until_alarm=True, **change))
        assert {signal for signal in SIGNALS if drift.raised(signal)} <= signals
    assert max(needed) <= within, needed


def test_more_agreement_than_in_calibration_is_no_alarm() -> None:
    rng = np.random.default_rng(0)
    drift = Drift(calibrated(rng))
    feed(drift, rng, 20_000, escalated=1.0, local=1.0)
    assert not drift.verdict()


def test_the_same_traffic_gives_the_same_verdict_at_the_same_sample() -> None:
    def run() -> tuple[int, str]:
        rng = np.random.default_rng(7)
        drift = Drift(calibrated(rng))
        return feed(drift, rng, 5000, shape=2.5, until_alarm=True), drift.verdict()

    assert run() == run()


def test_the_verdict_names_what_moved_how_far_and_what_to_do_and_stays() -> None:
    rng, told = np.random.default_rng(1), []
    drift = Drift(calibrated(rng), told.append)
    assert drift.guaranteed and drift.verdict() == ""
    feed(drift, rng, 5000, shape=2.0)
    verdict = drift.verdict()
    assert "% of the last 500 samples escalate, 25.0% did in calibration" in verdict
    assert "samples score at most" in verdict and "run `kcm calibrate` again" in verdict
    assert not drift.guaranteed and len(told) == 2, "each signal is told once"
    feed(drift, rng, 20_000)
    assert drift.verdict() == verdict
    estimates = drift.estimates()
    assert estimates["escalation_rate"] == pytest.approx(0.25, abs=0.05)
    assert estimates["agreement_escalated"] == pytest.approx(AGREE_ESCALATED, abs=0.15)


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        (("old", "p"), ""),
        (("new", "p"), "the cloud answers with teacher 'new', ε was calibrated with 'old'."),
        (("old", "q"), "the cloud answers with prompt 'q', ε was calibrated with 'p'."),
        (("new", "q"), "teacher 'new', ε was calibrated with 'old' and with prompt 'q', ε was calibrated with 'p'."),
    ],
)
def test_another_teacher_or_prompt_withdraws_the_guarantee(replies: tuple[str, str], expected: str) -> None:
    calibration = Calibration(epsilon=0.5, calibration_id="c", teacher_id="old", prompt_id="p", guarantee=PROMISE)
    drift = Drift(calibration)
    drift.answered_by(*replies)
    assert drift.guaranteed == (expected == "") and expected in drift.verdict()
    drift.answered_by("old", "p")
    assert drift.guaranteed == (expected == ""), "it stays withdrawn"


def test_a_calibration_that_names_no_teacher_and_has_no_reference_says_nothing() -> None:
    drift = Drift(Calibration(epsilon=0.5, calibration_id="c"))
    drift.answered_by("any", "any")
    rng = np.random.default_rng(0)
    feed(drift, rng, 3000, explore=0.5)
    assert (drift.verdict(), drift.guaranteed) == ("", False)
    assert {"escalation_rate", "agreement_escalated", "agreement_local", "accuracy_local", "accuracy_drop"} <= set(drift.estimates())


def test_explored_samples_that_cost_more_than_promised_raise_an_alarm() -> None:
    drift = Drift(Calibration(epsilon=0.5, calibration_id="c", guarantee=PROMISE))
    rng = np.random.default_rng(3)
    for i in range(4000):
        drift.decided(str(i), 0, 0.9, local=i % 4 > 0, explored=i % 4 == 1)
        if i % 4 == 1:
            drift.truth(str(i), label := int(rng.random() < 0.08))  # where it is 1, only the large model is right
            drift.replied(str(i), label)
    assert drift.raised("accuracy") and not drift.guaranteed
    assert "explored samples with a known truth the large model is right on 100.0%" in drift.verdict()
    assert "1.0 were promised" in drift.verdict()
    assert drift.estimates()["accuracy_drop"] == pytest.approx(0.06, abs=0.02), "8 % of the three quarters that stay"


def test_truth_and_reply_meet_in_either_order_and_count_once() -> None:
    drift = Drift(Calibration(epsilon=0.5, calibration_id="c"))
    for name, local in (("a", True), ("b", True), ("c", False)):
        drift.decided(name, 0, 0.9, local=local, explored=local)
    for _ in range(2):
        assert drift.truth("a", 1)
        drift.replied("a", 1)
        drift.replied("b", 1)
        assert drift.truth("b", 0)
        drift.replied("c", 2)
        assert drift.truth("c", 2)
    estimates = drift.estimates()
    assert (estimates["accuracy_local"], estimates["accuracy_escalated"], estimates["agreement_local"]) == (0.5, 1.0, 0.0)
    assert estimates["accuracy_drop"] == 0.0, "one won, one lost"
    assert not drift.truth("unknown", 1)


def test_a_local_sample_that_the_application_sends_up_itself_says_nothing_about_the_others() -> None:
    drift = Drift(Calibration(epsilon=0.5, calibration_id="c"))
    drift.decided("a", 0, 0.9, local=True)
    drift.replied("a", 1)
    assert "agreement_local" not in drift.estimates()


def test_what_was_long_ago_is_forgotten_but_explored_samples_are_kept_longer() -> None:
    drift = Drift(Calibration(epsilon=0.5, calibration_id="c"))
    drift.decided("old", 0, 0.9, local=True)
    drift.decided("explored", 0, 0.9, local=True, explored=True)
    for i in range(5 * REMEMBERED):
        drift.decided(str(i), 0, 0.9, local=True)
    assert len(drift._seen._young) + len(drift._seen._old) <= 2 * REMEMBERED
    assert not drift.truth("old", 0) and drift.truth("explored", 0)
    assert drift.truth(str(4 * REMEMBERED + 1), 0)


def test_a_reply_to_a_forgotten_explored_sample_counts_by_what_the_small_model_said() -> None:
    drift = Drift(Calibration(epsilon=0.5, calibration_id="c"))
    drift.replied("forgotten", 1)
    assert drift.estimates() == {}
    drift.replied("forgotten", 1, small=1)
    assert drift.estimates() == {"agreement_local": 1.0}


def test_a_reference_without_quantiles_or_agreement_still_watches_escalations() -> None:
    reference = Reference(samples=500, cloud_rate=0.2)
    drift = Drift(msgspec.structs.replace(calibrated(np.random.default_rng(0)), reference=reference))
    for i in range(1000):
        drift.decided(str(i), 0, 0.9, local=i % 2 == 0)
    assert drift.raised("escalations") and not drift.raised("score")
