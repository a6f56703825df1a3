"""A round's examples: which terms count for which row, and what the soft targets are."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_kit import LABELS, split, task_of

from kcm.errors import ConfigError
from kcm.task import METHODS, DistillSpec, JudgeSpec, Task, parse_task, with_method
from training.distil import (
    from_sparse,
    gauged,
    importance,
    judge_distribution,
    label_lesson,
    replayed,
    round_examples,
    teacher_lesson,
    top_k,
)
from training.fit import cross_fit, one_hot, softmax
from training.judge import Judge, Predictions, fit_judge
from training.program import labelled_examples
from training.small import Ngrams

LOGITS = np.array([[9, 0, 0], [1, 0, 0], [0, 0, 0]], np.float32)  # sure, unsure, no idea


def predictions(rows: int, classes: int, seed: int = 0, scale: float = 2.0) -> Predictions:
    rng = np.random.default_rng(seed)
    return Predictions(rng.normal(0, scale, (rows, classes)).astype(np.float32), np.ones(rows, np.float32), np.zeros(rows, np.float32))


def test_only_rows_of_a_sure_teacher_pass() -> None:
    lesson = teacher_lesson(LOGITS, DistillSpec(teacher_epsilon=0.5, teacher_weight=0.7))
    assert lesson.weights == pytest.approx([0.7, 0.7, 0.0])
    assert teacher_lesson(LOGITS, DistillSpec(teacher_epsilon=0.98)).weights.tolist() == [1, 0, 0]
    assert lesson.passed == pytest.approx(2 / 3)
    assert teacher_lesson(LOGITS, DistillSpec(teacher_epsilon=1.0)).passed == 0


def test_the_threshold_reads_the_teacher_as_it_is_and_the_target_at_the_temperature() -> None:
    hot = teacher_lesson(LOGITS, DistillSpec(teacher_epsilon=0.98, temperature=5.0))
    assert hot.weights.tolist() == [1, 0, 0]
    assert hot.targets == pytest.approx(softmax(LOGITS / 5), abs=1e-6)


@pytest.fixture
def judged() -> tuple[Judge, Predictions, np.ndarray]:
    seen = predictions(200, 8)
    labels = one_hot(seen.logits.argmax(1), 8)
    return fit_judge(JudgeSpec(), seen, labels), seen, labels


def test_without_the_judges_term_labels_stay_labels(judged: tuple[Judge, Predictions, np.ndarray]) -> None:
    judge, seen, labels = judged
    lesson = label_lesson(labels, seen, judge, DistillSpec(judge_weight=0.0, judge_epsilon=0.0))
    assert np.array_equal(lesson.targets, labels)
    assert lesson.weights.tolist() == [1.0] * 200


def test_the_judges_term_counts_only_where_it_is_sure(judged: tuple[Judge, Predictions, np.ndarray]) -> None:
    judge, seen, labels = judged
    epsilon = float(np.median(judge.confidence(seen)))
    lesson = label_lesson(labels, seen, judge, DistillSpec(judge_weight=0.5, judge_epsilon=epsilon, label_weight=2.0))
    sure = judge.confidence(seen) > epsilon
    assert lesson.weights == pytest.approx(np.where(sure, 2.5, 2.0))
    wanted = (2.0 * labels + 0.5 * judge_distribution(judge, seen)) / 2.5
    assert lesson.targets[sure] == pytest.approx(wanted[sure], abs=1e-6)
    assert np.array_equal(lesson.targets[~sure], labels[~sure])
    assert 0.4 < lesson.passed < 0.6


def test_all_terms_off_leave_no_weight_and_no_nan(judged: tuple[Judge, Predictions, np.ndarray]) -> None:
    judge, seen, labels = judged
    lesson = label_lesson(labels, seen, judge, DistillSpec(label_weight=0.0, judge_weight=0.0))
    assert not lesson.weights.any() and np.isfinite(lesson.targets).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 9), st.integers(1, 8), st.sampled_from([0.1, 3.0, 200.0]), st.integers(0, 99))
def test_the_judges_distribution_sums_to_one_and_keeps_the_small_models_order(classes: int, ranks: int, scale: float, seed: int) -> None:
    judge = Judge(JudgeSpec(ranks=ranks), classes)
    given = predictions(12, classes, seed, scale)
    distribution = judge_distribution(judge, given)
    assert distribution.sum(1) == pytest.approx(np.ones(12), abs=1e-5)
    assert distribution.min() >= 0
    # An unfitted judge is the small model's softmax itself.
    assert distribution == pytest.approx(softmax(given.logits), abs=2e-3)


def test_the_best_rank_gets_c_x(judged: tuple[Judge, Predictions, np.ndarray]) -> None:
    judge, seen, _ = judged
    distribution = judge_distribution(judge, seen)
    at_best = distribution[np.arange(200), seen.logits.argmax(1)]
    assert at_best == pytest.approx(judge.confidence(seen), abs=1e-4)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_round_joins_labels_and_the_rows_that_pass(direction: str) -> None:
    data, more = split(60), split(20, seed=5)
    task = task_of(".", {"vectors": ""}, {"buckets": 1024})  # type: ignore[arg-type]
    kind = Ngrams(task, None)
    labelled = labelled_examples(task, kind, data)
    own = cross_fit(task, kind, labelled)
    judge = fit_judge(task.judge, own, labelled.targets)
    logits = np.zeros((20, len(LABELS)), np.float32)
    logits[::2, 1] = 9  # every second row is sure
    spec = msgspec.structs.replace(task.distill, teacher_epsilon=0.9, direction=direction)  # type: ignore[arg-type]
    examples, passed, used = round_examples(kind, labelled, own, judge, kind.featurise(more.payloads), logits, spec)
    assert passed == 0.5 and used.tolist() == list(range(0, 20, 2))
    assert len(examples) == 70 and examples.features.shape[0] == 70
    assert examples.labelled.tolist() == [True] * 60 + [False] * 10
    assert examples.reverse.tolist() == [False] * 60 + [direction == "reverse"] * 10
    assert (examples.features[60:] != kind.featurise([more.payloads[i] for i in used])).nnz == 0
    assert examples.targets[60:].argmax(1).tolist() == [1] * 10
    assert np.isfinite(kind.predict(kind.fit(examples), examples.features).logits).all()


def test_a_teacher_is_gauged_by_labels_before_it_teaches() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    strength = np.where(np.arange(400) < 200, 4.0, 0.5).astype(np.float32)  # sure of the first half
    right = np.where(np.arange(400) < 200, rng.random(400) < 0.9, rng.random(400) < 0.3)
    answers = np.where(right, labels, (labels + 1) % 4)
    logits = strength[:, None] * one_hot(answers, 4)
    auto = DistillSpec()

    assert gauged(auto, logits, labels, small_accuracy=0.5).teacher_epsilon == 0.0  # better than the small model all over
    halfway = gauged(auto, logits, labels, small_accuracy=0.8).teacher_epsilon
    assert isinstance(halfway, float)
    taught = softmax(logits).max(1) > halfway
    assert right[taught].mean() >= 0.8
    assert 200 <= taught.sum() < 400
    assert gauged(auto, logits, labels, small_accuracy=0.99).teacher_epsilon == 1.0  # never as good: it teaches nothing
    assert gauged(DistillSpec(teacher_epsilon=0.7), logits, labels, 0.99).teacher_epsilon == 0.7


def test_luck_of_a_few_and_equally_sure_answers_set_no_threshold() -> None:
    few = np.stack([np.linspace(6, 1, 20), np.zeros(20)], 1).astype(np.float32)
    assert gauged(DistillSpec(), few, np.where(np.arange(20) < 3, 0, 1), 0.9).teacher_epsilon == 1.0
    tied = np.zeros((30, 2), np.float32)
    tied[:, 0] = np.repeat([4.0, 2.0], 15)
    labels = np.r_[np.zeros(20, int), np.ones(10, int)]  # right 15 of 15, then 5 of 15
    epsilon = gauged(DistillSpec(), tied, labels, 0.8).teacher_epsilon
    assert teacher_lesson(tied, DistillSpec(teacher_epsilon=epsilon)).passed == 0.5


def test_the_papers_rows_are_presets_and_a_switch_set_by_hand_wins() -> None:
    switches = {name: DistillSpec(method=name) for name in METHODS}
    assert {name: (s.hard, s.judge_term, s.at_random) for name, s in switches.items()} == {
        "d": (True, 0.0, True),
        "kd": (False, 0.0, True),
        "mcm": (False, 0.1, False),
        "kcm": (False, 0.1, False),
    }
    assert all(s.teacher_weight == 1 for s in switches.values())
    assert not DistillSpec(method="d", teacher="soft").hard and DistillSpec(method="kcm", teacher="hard").hard
    assert DistillSpec(method="kd", judge_weight=0.3).judge_term == 0.3 and DistillSpec(judge_weight=0.0).judge_term == 0
    assert not DistillSpec(method="d", selection="judge").at_random and DistillSpec(selection="random").at_random


def test_a_method_names_the_judges_kind() -> None:
    task = Task(id="t", labels=("a", "b"))
    assert [with_method(task, name).judge.kind for name in METHODS] == ["kan", "kan", "mlp", "kan"]
    byhand = Task(id="t", labels=("a", "b"), judge=JudgeSpec(kind="mlp"))
    assert [with_method(byhand, name).judge.kind for name in METHODS] == ["mlp", "mlp", "mlp", "kan"]
    assert with_method(task, "mcm").distill == DistillSpec(method="mcm")
    with pytest.raises(ConfigError, match="'mkd' is unknown") as error:
        with_method(task, "mkd")
    assert error.value.fix == "choose from d, kd, mcm, kcm"
    head = {"task": {"id": "t", "labels": ["a", "b"]}}
    assert parse_task({**head, "distill": {"method": "mcm"}}, "task.toml").judge.kind == "mlp"
    assert parse_task({**head, "judge": {"kind": "mlp"}}, "task.toml").judge.kind == "mlp", "the default method leaves it alone"
    again = parse_task(parse_task({**head, "distill": {"method": "d", "per_class": 3}}, "task.toml").shipped(), "task.toml")
    assert again.distill == DistillSpec(method="d", per_class=3)
    with pytest.raises(ConfigError, match="reverse direction"):
        parse_task({**head, "distill": {"top_k": 3, "direction": "reverse"}}, "task.toml")


def test_hard_answers_are_one_hot_whatever_the_temperature() -> None:
    lesson = teacher_lesson(LOGITS, DistillSpec(method="d", teacher_epsilon=0.5, temperature=9.0))
    assert lesson.targets.tolist() == one_hot(np.array([0, 0, 0]), 3).tolist()
    assert lesson.weights.tolist() == [1, 1, 0]
    soft = teacher_lesson(LOGITS, DistillSpec(method="kd", teacher_epsilon=0.5, temperature=9.0))
    assert soft.targets == pytest.approx(softmax(LOGITS / 9), abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_one_configuration_of_the_same_round(method: str, judged: tuple[Judge, Predictions, np.ndarray]) -> None:
    data, more = split(60), split(20, seed=5)
    task = with_method(task_of(".", {"vectors": ""}, {"buckets": 1024}), method)  # type: ignore[arg-type]
    kind = Ngrams(task, None)
    labelled = labelled_examples(task, kind, data)
    own = cross_fit(task, kind, labelled)
    judge = fit_judge(task.judge, own, labelled.targets)
    logits = np.random.default_rng(0).normal(0, 2, (20, len(LABELS))).astype(np.float32)
    epsilon = float(np.median(judge.confidence(own)))
    spec = msgspec.structs.replace(task.distill, direction="reverse", teacher_epsilon=0.0, judge_epsilon=epsilon)
    examples, _, _ = round_examples(kind, labelled, own, judge, kind.featurise(more.payloads), logits, spec)
    taught = examples.targets[60:]
    assert examples.weights[60:].tolist() == [1.0] * 20
    with_judge = examples.weights[:60] > 1
    if method in ("d", "kd"):
        assert not with_judge.any() and np.array_equal(examples.targets[:60], labelled.targets)
    else:
        assert 20 < with_judge.sum() < 40 and examples.weights[:60].max() == pytest.approx(1.1)
    assert np.array_equal(taught, one_hot(logits.argmax(1), 3)) == (method == "d")
    assert examples.reverse[60:].all() == (method != "d"), "cross-entropy on hard answers has one direction"


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 12), st.integers(0, 14), st.sampled_from([0.1, 1.0, 6.0]), st.integers(0, 99))
def test_a_truncated_teacher_keeps_its_best_and_spreads_the_rest(classes: int, k: int, scale: float, seed: int) -> None:
    p = softmax(np.random.default_rng(seed).normal(0, scale, (7, classes)).astype(np.float32))
    cut = top_k(p, k)
    assert cut.sum(1) == pytest.approx(np.ones(7), abs=1e-5) and cut.min() >= 0
    if k in (0, classes - 1) or k >= classes:
        assert cut == pytest.approx(p, abs=1e-6)  # all but one: the rest is that one
        return
    order = np.argsort(-p, axis=1, kind="stable")
    assert np.array_equal(np.take_along_axis(cut, order[:, :k], 1), np.take_along_axis(p, order[:, :k], 1))
    others = np.take_along_axis(cut, order[:, k:], 1)
    assert np.ptp(others, axis=1) == pytest.approx(np.zeros(7), abs=1e-9)
    assert np.array_equal(cut, from_sparse(order[:, :k], np.take_along_axis(p, order[:, :k], 1), classes))


def test_the_top_of_all_classes_is_the_full_teacher_in_a_round() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (30, 6)).astype(np.float32)
    full = teacher_lesson(logits, DistillSpec(temperature=2.0))
    same = teacher_lesson(logits, DistillSpec(temperature=2.0, top_k=6))
    assert np.array_equal(full.targets, same.targets)
    two = teacher_lesson(logits, DistillSpec(temperature=2.0, top_k=2))
    assert np.array_equal(two.targets.argmax(1), full.targets.argmax(1)) and not np.allclose(two.targets, full.targets, atol=1e-2)
    assert np.array_equal(two.weights, full.weights), "ε_l reads the teacher as it is"


def test_a_share_of_the_labels_is_replayed_evenly_over_the_classes() -> None:
    classes = np.repeat(np.arange(5), 20)
    for share, wanted in ((0.0, 0), (0.3, 6), (0.5, 10), (1.0, 20)):
        again = replayed(classes, share, seed=1)
        assert set(np.unique(again)) <= {0.0, 1.0}
        assert np.bincount(classes, weights=again).tolist() == [wanted] * 5, share
    assert not np.array_equal(replayed(classes, 0.5, (0, 1)), replayed(classes, 0.5, (0, 2))), "each round draws anew"
    assert replayed(np.arange(7), 0.5, 0).sum() == 3


def test_what_is_not_replayed_stays_with_no_weight(judged: tuple[Judge, Predictions, np.ndarray]) -> None:
    """The next round and the judge read out-of-fold predictions of every label."""
    task = task_of(".", {"vectors": ""}, {"buckets": 1024})  # type: ignore[arg-type]
    kind, data, more = Ngrams(task, None), split(60), split(20, seed=5)
    labelled = labelled_examples(task, kind, data)
    own = cross_fit(task, kind, labelled)
    judge = fit_judge(task.judge, own, labelled.targets)
    spec = msgspec.structs.replace(task.distill, replay=0.25, teacher_epsilon=0.0)
    logits = 5 * one_hot(more.y, len(LABELS))
    examples, _, _ = round_examples(kind, labelled, own, judge, kind.featurise(more.payloads), logits, spec)
    assert len(examples) == 80 and (examples.weights[:60] > 0).sum() == 15
    # Fitted as if the others weren't there: their labels can be anything.
    other = examples.targets.copy()
    other[:60][examples.weights[:60] == 0] = np.eye(len(LABELS), dtype=np.float32)[0]
    assert not np.array_equal(other, examples.targets)
    first, second = (kind.fit(replace(examples, targets=targets)) for targets in (examples.targets, other))
    assert np.array_equal(kind.predict(first, labelled.features).logits, kind.predict(second, labelled.features).logits)


def test_importance_makes_the_sent_samples_look_like_the_traffic() -> None:
    """Half of the traffic is hard and always sent, half is easy and sent with probability 0.2."""
    rng = np.random.default_rng(0)
    value = np.r_[np.zeros(4000), np.ones(4000)]
    p = np.r_[np.ones(4000), np.full(4000, 0.2)].astype(np.float32)
    sent = rng.random(8000) < p
    weights = importance(p[sent])
    assert weights.mean() == pytest.approx(1)
    assert value[sent].mean() < 0.2 < 0.47 < np.average(value[sent], weights=weights) < 0.53
    rare = importance(np.array([1, 1, 1, 0.001], np.float32))
    assert rare[3] / rare[0] == pytest.approx(10), "clipped: one row mustn't outvote the others"
    assert importance(np.array([0, 1], np.float32)).tolist() == [1, 1], "0 is a probability that nobody told"


def test_importance_is_off_unless_asked_for_and_keeps_the_terms_weight() -> None:
    p = np.array([1.0, 0.2, 0.2], np.float32)
    off = teacher_lesson(LOGITS, DistillSpec(teacher_epsilon=0.5), p)
    assert off.weights.tolist() == [1, 1, 0]
    on = teacher_lesson(LOGITS, DistillSpec(teacher_epsilon=0.5, importance=True, teacher_weight=2.0), p)
    assert on.weights == pytest.approx([2 / 3, 10 / 3, 0])
