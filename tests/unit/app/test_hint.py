"""The hint's gate for a real run with real (tiny) large models: who is asked, with which hints, and what an encoder learns hints from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import cloud_kit
import msgspec
import numpy as np
import pytest

from cloud_server.models import LargeModel, load_large
from cloud_server.prompt import Prompt
from export.bundle import CANDIDATES, fuse
from export.session import Session
from kcm.app.hint import escalated, gate_for, hints_by_arm, small_hints
from kcm.app.models import LargeInProcess, hint_texts
from kcm.preprocess import load_preprocessor
from kcm.task import Task, load_task
from training.data import Split, load_split
from training.fit import one_hot
from training.judge import Predictions
from training.run import Run
from training.small import Ngrams


@pytest.fixture(scope="module")
def task(tiny_task: Path) -> Task:
    return load_task(tiny_task)


@pytest.fixture(scope="module")
def causal(task: Task, tmp_path_factory: pytest.TempPathFactory) -> LargeModel:
    """A causal model with random weights: it reads hints, and what it answers hangs on them."""
    folder = tmp_path_factory.mktemp("causal")
    spec = msgspec.structs.replace(task.large, kind="causal", model=str(cloud_kit.tiny_llama(folder / "llama")))
    LargeInProcess(msgspec.structs.replace(task, large=spec), folder / "large", None, lambda _: None)
    return load_large(folder / "large")


@pytest.fixture(scope="module")
def deaf(task: Task, tmp_path_factory: pytest.TempPathFactory) -> LargeModel:
    """An encoder whose head was fitted without hints."""
    folder = tmp_path_factory.mktemp("deaf")
    spec = msgspec.structs.replace(task.large, model=str(cloud_kit.tiny_bert(folder / "bert")))
    LargeInProcess(msgspec.structs.replace(task, large=spec), folder / "large", load_split(task, "large_train"), lambda _: None)
    return load_large(folder / "large")


@pytest.fixture
def labelled(tiny_run: Run, task: Task) -> tuple[Split, Predictions]:
    split = load_split(task, "calibration")
    kind = Ngrams(task, None)
    return split, kind.predict(tiny_run.small, kind.featurise(split.payloads))


def test_the_gate_weighs_what_the_large_model_answers_to_escalated_samples(
    tiny_run: Run, causal: LargeModel, labelled: tuple[Split, Predictions]
) -> None:
    split, predictions = labelled
    score = tiny_run.score(predictions)
    epsilon = float(np.quantile(score, 0.9))  # nearly all escalate: more than the fewest that are asked about
    said: list[str] = []
    gate = gate_for(tiny_run, causal, split, predictions, epsilon, said.append)
    rows = np.flatnonzero(score <= epsilon)
    assert gate.samples == len(rows) and len(said) == 3
    texts, y = [split.payloads[i] for i in rows], split.y[rows]
    hints = small_hints(predictions.logits[rows], tiny_run.judge.confidence(predictions.take(rows)))
    alone = [msgspec.structs.replace(h, label_ids=h.label_ids[:1], probabilities=h.probabilities[:1]) for h in hints]
    accuracies = {}
    for arm, shown in (("none", [None] * len(rows)), ("candidates", hints), ("assertion", alone)):
        accuracies[arm] = float((causal.logits(texts, shown).argmax(1) == y).mean())
        assert gate.evidence[arm].accuracy == pytest.approx(accuracies[arm]), arm
    assert len(set(accuracies.values())) > 1, "a model that hints don't move would show nothing"


def test_answers_that_are_known_are_not_asked_for_again(tiny_run: Run, causal: LargeModel, labelled: tuple[Split, Predictions]) -> None:
    split, predictions = labelled
    said: list[str] = []
    known = causal.logits(split.payloads, [None] * len(split))
    gate = gate_for(tiny_run, causal, split, predictions, 1.0, said.append, plain=known)
    assert len(said) == 2 and gate == gate_for(tiny_run, causal, split, predictions, 1.0, lambda _: None)
    perfect = gate_for(tiny_run, causal, split, predictions, 1.0, lambda _: None, plain=one_hot(split.y, len(tiny_run.task.labels)))
    assert perfect.evidence["none"].accuracy == 1.0 and perfect.arm == "none"


def test_a_large_model_that_reads_no_hints_is_not_asked(tiny_run: Run, deaf: LargeModel, labelled: tuple[Split, Predictions]) -> None:
    said: list[str] = []
    gate = gate_for(tiny_run, deaf, *labelled, 1.0, said.append)
    assert gate.arm == "none" and "without hints" in gate.reason and gate.samples == 0 and said == []


def test_samples_and_predictions_must_belong_together(tiny_run: Run, causal: LargeModel, labelled: tuple[Split, Predictions]) -> None:
    split, predictions = labelled
    for rows, seen, plain in ((split, predictions.take(np.arange(5)), None), (split.take([]), predictions.take(np.arange(0)), None)):
        with pytest.raises(ValueError, match="predictions"):
            gate_for(tiny_run, causal, rows, seen, 1.0, lambda _: None, plain=plain)
    with pytest.raises(ValueError, match="3 answers"):
        gate_for(tiny_run, causal, split, predictions, 1.0, lambda _: None, plain=np.zeros((3, 6), np.float32))


def test_who_is_asked_about() -> None:
    score = np.random.default_rng(0).random(1000).astype(np.float32)
    epsilon = float(np.sort(score)[199])  # its own sample escalates too
    np.testing.assert_array_equal(escalated(score, epsilon, most=300, fewest=100), np.flatnonzero(score <= epsilon))
    few = escalated(score, float(np.sort(score)[9]), most=300, fewest=100)
    np.testing.assert_array_equal(few, np.sort(np.argsort(score)[:100]))
    many = escalated(score, 0.9, most=300, fewest=100)
    assert len(many) == len(set(many.tolist())) == 300 and (score[many] <= 0.9).all()
    assert 0.35 < score[many].mean() < 0.55, "a draw of all that escalate, not the lowest of them"
    np.testing.assert_array_equal(many, escalated(score, 0.9, most=300, fewest=100))
    assert len(escalated(score[:20], -1.0)) == 20


def test_hints_are_those_that_the_exported_graph_makes(tiny_run: Run, labelled: tuple[Split, Predictions]) -> None:
    split, predictions = labelled
    hints = small_hints(predictions.logits, tiny_run.judge.confidence(predictions))
    preprocessor = load_preprocessor(tiny_run.task.preprocess, {})
    made = Session(fuse(tiny_run, CANDIDATES)).run(preprocessor.batch(split.payloads))
    np.testing.assert_array_equal([hint.label_ids for hint in hints], made["top_ids"])
    np.testing.assert_allclose([hint.probabilities for hint in hints], made["top_probs"], atol=1e-5)
    np.testing.assert_allclose([hint.confidence for hint in hints], made["confidence"], atol=1e-5)


def test_each_arm_shows_its_part_of_the_hint() -> None:
    arms = hints_by_arm(np.array([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]], np.float32), np.array([0.1, 1.0000001], np.float32))
    assert arms["none"] == [None, None]
    assert [hint and hint.label_ids for hint in arms["candidates"]] == [(1, 2, 0), (0, 2, 1)]
    assert [hint and hint.label_ids for hint in arms["assertion"]] == [(1,), (0,)]
    assert [hint and hint.confidence for hint in arms["assertion"]] == [pytest.approx(0.1), 1.0]


def test_an_encoder_learns_from_hints_of_both_kinds_and_from_none(task: Task) -> None:
    dropping = msgspec.structs.replace(task, large=msgspec.structs.replace(task.large, hint_dropout=0.3))
    train = load_split(task, "large_train")
    pairs = hint_texts(dropping, train, lambda _: None)
    prompt = Prompt(task.prompt, task.labels)
    starts = {"candidates": prompt.hint(cloud_kit.HINT)[:15], "assertion": task.prompt.assertion[:15]}
    seen = Counter("none" if pair is None else next(arm for arm, start in starts.items() if pair.startswith(start)) for pair in pairs)
    assert sum(seen.values()) == len(train) == 252
    assert seen["none"] / 252 == pytest.approx(0.3, abs=0.1)
    for arm in ("candidates", "assertion"):
        assert seen[arm] / 252 == pytest.approx(0.35, abs=0.1)
    own = set(load_split(task, "train").payloads)
    answers = [(text, label, pair) for text, label, pair in zip(train.payloads, train.y, pairs, strict=True) if pair and "answers" in pair]
    wrong = [task.labels[label] not in pair for text, label, pair in answers if text in own]
    assert any(wrong), "hints for the edge's own rows come from models that hadn't seen them, so some are wrong"
