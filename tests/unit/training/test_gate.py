"""A candidate that may be worse is told from one that isn't, and what a round forgot is counted: on real rounds of the tiny task."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from tiny_kit import SIZES, sentences

from kcm.policy import epsilon_for_rate
from kcm.task import Task, load_task
from training.calibrate import for_rate
from training.data import Split, load_split
from training.gate import compare, forgetting, gate
from training.judge import fit_judge
from training.program import distil_run, train_run
from training.run import Run
from training.small import Ngrams

Distil = Callable[..., Run]


@pytest.fixture(scope="module")
def task(tiny_task: Path) -> Task:
    return load_task(tiny_task)


@pytest.fixture(scope="module")
def gold(task: Task) -> Split:
    rows = sentences(600, seed=50)
    return Split("gold", [text for text, _ in rows], np.array([task.labels.index(label) for _, label in rows]))


@pytest.fixture(scope="module")
def first(task: Task) -> Run:
    run = train_run(task, Ngrams(task, None), load_split(task, "train"), None, seed=0, progress=lambda _: None)
    return replace(run, threshold=for_rate(run.judge.confidence(run.out_of_fold), 0.3))


@pytest.fixture(scope="module")
def distil(task: Task, first: Run) -> Distil:
    """A round on answers to the stream, each label turned `turn` places on: 0 is the truth."""
    rows = sentences(SIZES["stream"], seed=2)

    def made(turn: int = 0, previous: Run = first, texts: int = 400, seed: int = 0, method: str = "", **spec: object) -> Run:
        distilled = msgspec.structs.replace(previous.task.distill, **spec)  # type: ignore[arg-type]
        info = msgspec.structs.replace(previous.info, task=msgspec.structs.replace(previous.task, distill=distilled))
        answers = [(task.labels.index(label) + turn) % 6 for _, label in rows[:texts]]
        run = distil_run(
            replace(previous, info=info),
            Ngrams(task, None),
            load_split(task, "train"),
            load_split(task, "test"),
            [text for text, _ in rows[:texts]],
            6 * np.eye(6, dtype=np.float32)[answers],
            parent="",
            teacher_id="t",
            gauge=None,
            seed=seed,
            progress=lambda _: None,
            method=method,
        )
        return replace(run, threshold=for_rate(run.judge.confidence(run.out_of_fold), 0.3))

    return made


def test_a_comparison_is_paired() -> None:
    before = np.arange(1000) % 2 == 0
    after = before.copy()
    after[1:100:2] = True  # 50 more, none less
    figures = compare(before, after)
    assert (figures["samples"], figures["before"], figures["after"]) == (1000, 0.5, 0.55)
    assert figures["difference"] == pytest.approx(0.05)
    assert 0.035 < figures["interval"][0] < 0.05 < figures["interval"][1] < 0.066, "an unpaired one would be three times as wide"


def test_classes_that_fell_are_named_worst_first() -> None:
    labels = np.repeat([0, 1, 2, 3], 10)
    before = np.ones(40, bool)
    after = before.copy()
    after[[10, 11, 12, 30]] = False
    found = forgetting(before, after, labels, ("a", "b", "c", "d", "never seen"))
    assert list(found["classes"].items()) == [("b", pytest.approx(-0.3)), ("d", pytest.approx(-0.1))]
    assert found["difference"] == pytest.approx(-0.1)


def test_a_better_round_passes_on_gold(first: Run, distil: Distil, task: Task, gold: Split) -> None:
    kind, new = Ngrams(task, None), distil()
    verdict = gate(first, new, kind, gold)
    assert verdict["passed"] and not verdict["weak"] and verdict["failed"] == []
    assert set(verdict["figures"]) == {"gold", "round 0"} and verdict["tolerance"] == 0.01
    figures = verdict["figures"]["gold"]
    answers = [kind.predict(run.small, kind.featurise(gold.payloads)).logits.argmax(1) for run in (first, new)]
    assert [figures["before"], figures["after"]] == [pytest.approx((a == gold.y).mean()) for a in answers]
    assert figures["difference"] > 0.05 and figures["interval"][0] > 0


def test_a_round_of_wrong_answers_fails_every_figure(first: Run, distil: Distil, task: Task, gold: Split) -> None:
    large = 6 * np.eye(6, dtype=np.float32)[gold.y]
    verdict = gate(first, distil(turn=1), Ngrams(task, None), gold, large)
    assert not verdict["passed"] and verdict["failed"] == ["gold", "same calls", "round 0"]
    assert verdict["figures"]["gold"]["interval"][1] < 0
    without = gate(first, distil(turn=1), Ngrams(task, None), None)
    assert not without["passed"] and without["weak"] and without["failed"] == ["round 0"]


def test_the_systems_are_compared_at_one_call_rate(first: Run, distil: Distil, task: Task, gold: Split) -> None:
    new, kind = distil(), Ngrams(task, None)
    large = 6 * np.eye(6, dtype=np.float32)[gold.y]
    rate_made = replace(first, threshold=msgspec.structs.replace(first.threshold, method="fixed", target=0.9, cloud_rate=0.3))
    crooked = copy.deepcopy(new.judge)
    with torch.no_grad():
        for parameter in crooked.parameters():
            parameter.mul_(-20)
    for old, candidate in ((first, new), (rate_made, new), (first, replace(new, judge=crooked))):
        figures = gate(old, candidate, kind, gold, large)["figures"]["same calls"]
        assert figures["cloud_rate"] == 0.3
        # The large model is always right here: a system's mistakes are local ones, of 70 %.
        for run, accuracy in ((old, figures["before"]), (candidate, figures["after"])):
            p = kind.predict(run.small, kind.featurise(gold.payloads))
            local = run.score(p) > epsilon_for_rate(run.score(p), 0.3)
            assert accuracy == pytest.approx(1 - (p.logits.argmax(1) != gold.y)[local].sum() / 600, abs=1e-9)
            assert local.mean() == pytest.approx(0.7, abs=0.02)
    none = gate(first, new, kind, gold, np.roll(large, 1, axis=1))["figures"]["same calls"]
    assert none["after"] < 0.72, "what goes up is answered by the large model, wrongly here"


def test_too_little_gold_shows_nothing_and_the_tolerance_is_the_tasks(first: Run, distil: Distil, task: Task, gold: Split) -> None:
    new, kind = distil(texts=60), Ngrams(task, None)
    before, after = (kind.predict(run.small, kind.featurise(gold.payloads)).logits.argmax(1) == gold.y for run in (first, new))
    chosen = [np.flatnonzero(before & ~after)[:1], np.flatnonzero(after & ~before)[:2], np.flatnonzero(before & after)[:37]]
    few = gold.take(np.concatenate(chosen))
    verdict = gate(first, new, kind, few)
    assert verdict["failed"] == ["gold"] and verdict["figures"]["gold"]["difference"] == pytest.approx(1 / 40)
    wide = distil(texts=60, gate_tolerance=0.1)
    assert gate(first, wide, kind, few)["passed"]


def test_forgetting_stands_in_the_runs_metrics(first: Run, distil: Distil, task: Task) -> None:
    new = distil()
    train = load_split(task, "train")
    found = new.metrics["forgetting"]
    assert found["samples"] == 72
    assert found["before"] == pytest.approx((first.out_of_fold.logits.argmax(1) == train.y).mean())
    assert (
        found["after"] == pytest.approx((new.out_of_fold.logits[:72].argmax(1) == train.y).mean()) == new.metrics["out_of_fold"]["accuracy"]
    )
    assert found["test"]["after"] == new.metrics["test"]["accuracy"] and found["test"]["samples"] == SIZES["test"]
    msgspec.json.decode(msgspec.json.encode(new.metrics))


def test_without_replay_wrong_answers_are_all_that_is_left(distil: Distil) -> None:
    """Replay is what keeps the labels: a quarter of it keeps less."""
    drops = {share: distil(turn=1, texts=60, replay=share).metrics["forgetting"]["difference"] for share in (1.0, 0.0)}
    assert drops[0.0] < drops[1.0] - 0.2


def test_a_run_without_all_of_its_labels_can_be_distilled_again(distil: Distil, task: Task) -> None:
    """Labels stay first in every run, so that the next round's predictions are theirs."""
    once = distil(replay=0.3, texts=150)
    twice = distil(previous=once, replay=0.3)
    train = load_split(task, "train")
    assert once.payloads[:72] == twice.payloads[:72] == train.payloads
    assert 0 < (once.weights[:72] > 0).sum() == (twice.weights[:72] > 0).sum() < 36
    assert ((once.weights[:72] > 0) != (twice.weights[:72] > 0)).any(), "each round draws anew"
    assert twice.metrics["forgetting"]["before"] == once.metrics["forgetting"]["after"]


def test_mcm_distils_from_a_run_of_kcm_with_an_mlp_judge(first: Run, distil: Distil) -> None:
    runs = {name: distil(method=name, judge_epsilon=0.6) for name in ("kcm", "mcm", "kd", "d")}
    assert [run.judge.spec.kind for run in runs.values()] == ["kan", "mlp", "kan", "kan"]
    assert [run.metrics["method"] for run in runs.values()] == list(runs)
    mlp = fit_judge(msgspec.structs.replace(first.task.judge, kind="mlp"), first.out_of_fold, first.targets, first.info.seed)
    for name, judge in (("kcm", first.judge), ("mcm", mlp)):
        sure = judge.confidence(first.out_of_fold) > 0.6
        assert (runs[name].weights[:72] > 1).tolist() == sure.tolist() and 0 < sure.sum() < 72
    assert runs["kd"].weights[:72].tolist() == [1.0] * 72
    assert set(np.unique(runs["d"].targets)) == {0.0, 1.0}


def test_a_method_given_for_one_round_stays_with_the_run(distil: Distil) -> None:
    once = distil(method="mcm", texts=100)
    assert once.task.distill.method == "mcm" and once.task.judge.kind == "mlp"
    again = distil(previous=once, texts=150, method="")
    assert again.judge.spec.kind == "mlp"
