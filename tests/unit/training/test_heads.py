"""The outcome heads: max-softmax where there is nothing to learn, better where there is; and the choice among heads."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from kcm.errors import ConfigError
from kcm.task import JudgeSpec
from training.evaluate import auroc, route
from training.fit import one_hot, softmax
from training.heads import OutcomeHead
from training.judge import Judge, Predictions, max_softmax
from training.select import FEWEST, Router, Selection, Taught, choose, compare, fit_head, inferred_outcomes, pool

CLASSES = 6


def world(rows: int, seed: int, *, bad_class: bool, large: float = 0.9) -> Selection:
    """A calibrated small model beside a large one that is right on `large` of all; with `bad_class` hardly ever where the answer is 0."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.2, (rows, CLASSES)).astype(np.float32)
    labels = (rng.random((rows, 1)) > softmax(logits).cumsum(1)).sum(1).clip(0, CLASSES - 1)
    answer = logits.argmax(1)
    large_right = rng.random(rows) < np.where(bad_class & (answer < 2), 0.1, large)
    theirs = np.where(large_right, labels, (labels + rng.integers(1, CLASSES, rows)) % CLASSES)
    given = Predictions(logits, rng.integers(1, 30, rows).astype(np.float32), rng.random(rows).astype(np.float32))
    # The large model is surer of itself where it is right, as real ones are.
    sure = rng.normal(np.where(large_right, 4, 1), 1).clip(0.1)[:, None]
    return Selection(given, (sure * one_hot(theirs, CLASSES)).astype(np.float32), labels)


def fitted(selection: Selection, kind: str = "benefit", spec: JudgeSpec | None = None) -> OutcomeHead:
    judge = Judge(spec or JudgeSpec(), CLASSES)
    return fit_head(kind, judge, selection, None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def judge() -> Judge:
    made = Judge(JudgeSpec(), CLASSES)
    made.temperature.fill_(1.0)
    return made


@pytest.mark.parametrize("kind", ["correctness", "benefit"])
@pytest.mark.parametrize("spec", [JudgeSpec(), JudgeSpec(kind="mlp"), JudgeSpec(hidden=3)], ids=["kan", "mlp", "two layers"])
def test_before_any_evidence_a_head_ranks_as_max_softmax(kind: str, spec: JudgeSpec) -> None:
    given = world(300, 0, bad_class=False).predictions
    head = OutcomeHead(spec, kind, CLASSES)  # type: ignore[arg-type]
    score = head.score(given)
    assert spearmanr(score, max_softmax(given.logits)).statistic > 0.999
    assert (score >= 0).all() and (score <= 1).all()


@pytest.mark.parametrize("kind", ["correctness", "benefit"])
def test_with_nothing_to_learn_a_fitted_head_still_ranks_nearly_so(kind: str) -> None:
    seen, fresh = world(800, 0, bad_class=False), world(2000, 1, bad_class=False)
    head = fitted(seen, kind)
    assert spearmanr(head.score(fresh.predictions), max_softmax(fresh.predictions.logits)).statistic > 0.9


def test_benefit_keeps_what_the_large_model_fails_on_too() -> None:
    seen, fresh = world(800, 0, bad_class=True), world(4000, 1, bad_class=True)
    head = fitted(seen)
    gain = fresh.large_right.astype(int) - fresh.small_right
    ours, theirs = head.score(fresh.predictions), max_softmax(fresh.predictions.logits)
    assert auroc(-ours, gain > 0) > auroc(-theirs, gain > 0) + 0.05
    for rate in (0.2, 0.4):
        accuracy = [route(s, fresh.small_right, fresh.large_right, float(np.quantile(s, rate))).accuracy for s in (ours, theirs)]
        assert accuracy[0] > accuracy[1] + 0.01


def test_half_of_the_score_says_that_a_call_gains_nothing() -> None:
    """(1 + P(hurt) − P(benefit)) / 2."""
    seen = world(500, 0, bad_class=True)
    head = fitted(seen)
    with torch.inference_mode():
        hurt, _, benefit = head(*seen.predictions.tensors()).exp().numpy().T
    np.testing.assert_allclose(head.score(seen.predictions), (1 + hurt - benefit) / 2, atol=1e-6)
    # Calibrated on average: the expected gain is the gain that there was.
    gain = (seen.large_right.astype(int) - seen.small_right).mean()
    assert float((benefit - hurt).mean()) == pytest.approx(gain, abs=0.02)


def test_weights_make_a_thinned_sample_look_like_the_whole() -> None:
    """Rows of a class kept at one in ten and weighted by ten: the head comes out as if none had been dropped."""
    whole = world(6000, 0, bad_class=True)
    common = whole.predictions.logits.argmax(1) >= 2
    kept = np.flatnonzero(~common | (np.random.default_rng(0).random(len(whole)) < 0.1))
    thin = whole.take(kept)
    weights = np.where(thin.predictions.logits.argmax(1) >= 2, 10.0, 1.0).astype(np.float32)

    weighted = replace(thin, weights=weights)

    def rates(selection: Selection) -> np.ndarray:
        return fitted(selection).rates.numpy()

    assert np.abs(rates(weighted) - rates(whole)).max() < 0.05 < np.abs(rates(thin) - rates(whole)).max()


@pytest.mark.parametrize("outcome", [True, False])
def test_one_outcome_alone_leaves_everything_finite(outcome: bool) -> None:
    given = world(60, 0, bad_class=False).predictions
    answer = given.logits.argmax(1)
    labels = answer if outcome else (answer + 1) % CLASSES
    for kind in ("correctness", "benefit"):
        assert np.isfinite(fitted(Selection(given, one_hot(labels, CLASSES), labels), kind).score(given)).all()


def test_one_sample_is_too_few() -> None:
    one = world(1, 0, bad_class=False)
    with pytest.raises(ValueError, match="too few"):
        fitted(one)


def test_the_choice_falls_on_benefit_where_it_gains(judge: Judge) -> None:
    router = choose(judge, "auto", world(900, 0, bad_class=True))
    assert router.choice.head == "benefit" and router.outcome is not None
    evidence = router.choice.evidence
    assert set(evidence) == {"confidence", "max-softmax", "correctness", "benefit"}
    low, high = evidence["benefit"].interval
    assert 0 < low < evidence["benefit"].difference < high and router.choice.samples == 900
    assert evidence["max-softmax"].difference == 0 and "beats max-softmax" in router.choice.reason


def test_the_choice_falls_back_to_max_softmax_where_nothing_gains(judge: Judge) -> None:
    """Over draws: a rule that takes whatever came out best would leave it most of the time."""
    chosen = [compare(judge, world(300, seed, bad_class=False)).head for seed in range(6)]
    assert chosen.count("max-softmax") >= 4
    router = choose(judge, "auto", world(300, chosen.index("max-softmax"), bad_class=False))
    given = world(50, 9, bad_class=False).predictions
    np.testing.assert_array_equal(router.score(given), max_softmax(given.logits, float(judge.temperature)))


def test_without_labels_or_with_few_the_confidence_routes(judge: Judge) -> None:
    given = world(50, 9, bad_class=False).predictions
    for selection in (None, world(FEWEST - 1, 0, bad_class=True)):
        router = choose(judge, "auto", selection)
        assert router.choice.head == "confidence" and router.choice.reason
        np.testing.assert_array_equal(router.score(given), judge.confidence(given))


def test_a_head_can_be_set_by_hand_and_a_wrong_one_is_refused(judge: Judge) -> None:
    assert choose(judge, "correctness", world(200, 0, bad_class=False)).choice.head == "correctness"
    assert choose(judge, "max-softmax", None).choice.head == "max-softmax"
    with pytest.raises(ConfigError, match="fitted on labelled samples"):
        choose(judge, "benefit", None)
    with pytest.raises(ConfigError, match="'gain' is unknown"):
        choose(judge, "gain", None)


def test_a_choice_survives_being_written_down(judge: Judge) -> None:
    choice = choose(judge, "auto", world(400, 0, bad_class=True)).choice
    assert msgspec.json.decode(msgspec.json.encode(choice), type=type(choice)) == choice
    assert Router(judge).choice.head == "confidence"


def test_the_pool_listens_to_whom_the_labels_confirm() -> None:
    seen = world(2000, 0, bad_class=False, large=0.9)
    small, large = pool(seen)
    assert large > 0.5 and small > 0.2
    rng = np.random.default_rng(99)
    deaf = replace(seen, large=rng.normal(size=seen.large.shape).astype(np.float32))
    assert pool(deaf)[1] < 0.1 and pool(deaf)[0] == pytest.approx(1, abs=0.15)  # the small model is calibrated as it is


def test_what_is_inferred_agrees_with_what_is_true() -> None:
    fresh = world(4000, 1, bad_class=False, large=0.8)
    inferred = inferred_outcomes("benefit", Taught(fresh.predictions, fresh.large), pool(world(1000, 0, bad_class=False, large=0.8)))
    np.testing.assert_allclose(inferred.sum(1), 1, atol=1e-5)
    truth = fresh.large_right.astype(int) - fresh.small_right
    assert (inferred[:, 2] - inferred[:, 0]).mean() == pytest.approx(truth.mean(), abs=0.06)  # a pool has two numbers to be right by
    assert auroc(inferred[:, 2] - inferred[:, 0], truth > 0) > 0.8
    agree = fresh.predictions.logits.argmax(1) == fresh.large.argmax(1)
    assert (inferred[agree, 1] == 1).all()
    right = inferred_outcomes("correctness", Taught(fresh.predictions, fresh.large), (1.0, 1.0))[:, 1]
    assert auroc(right, fresh.small_right) > 0.8


def test_answers_of_earlier_rounds_help_where_labels_are_few() -> None:
    """120 labels hardly show which answers the large model fails on; 4,000 of its answers beside the small model's do."""
    fresh, answered = world(6000, 7, bad_class=True), world(4000, 8, bad_class=True)
    judge = Judge(JudgeSpec(), CLASSES)
    gain = fresh.large_right.astype(int) - fresh.small_right
    better = []
    for seed in range(4):
        few = world(120, seed, bad_class=True)
        alone = fit_head("benefit", judge, few, None).score(fresh.predictions)
        taught = fit_head("benefit", judge, few, Taught(answered.predictions, answered.large)).score(fresh.predictions)
        better.append(auroc(-taught, gain > 0) - auroc(-alone, gain > 0))
    assert np.mean(better) > 0
