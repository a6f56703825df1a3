"""A round's examples: which terms count for which row, and what the soft targets are."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_kit import LABELS, split, task_of

from kcm.task import DistillSpec, JudgeSpec
from training.distil import gauged, judge_distribution, label_lesson, round_examples, teacher_lesson
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
    examples, passed, used = round_examples(kind, labelled, own, judge, kind.featurise(more.texts), logits, spec)
    assert passed == 0.5 and used.tolist() == list(range(0, 20, 2))
    assert len(examples) == 70 and examples.features.shape[0] == 70
    assert examples.labelled.tolist() == [True] * 60 + [False] * 10
    assert examples.reverse.tolist() == [False] * 60 + [direction == "reverse"] * 10
    assert (examples.features[60:] != kind.featurise([more.texts[i] for i in used])).nnz == 0
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
