"""The closed loop in memory: what is asked, what is learnt, and the JSON that comes out. The teacher here is the truth."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tiny_kit import TOPICS, sentences

from kcm.errors import DataError
from kcm.task import Task, load_task
from training.data import Split, load_split
from training.evaluate import RATES
from training.rounds import RESERVED, Loop, Stream
from training.simulate import Setting, simulate_seed, summarise
from training.small import Ngrams

ROUNDS, SHARE = 3, 0.4


class Truth:
    """Knows the label of every sentence by its number, and remembers what it was asked."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._labels = {
            text: task.labels.index(label) for seed, size in ((0, 72), (2, 400), (4, 200)) for text, label in sentences(size, seed)
        }
        self.asked: list[str] = []

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.asked += texts
        logits = np.zeros((len(texts), len(self._task.labels)), np.float32)
        logits[np.arange(len(texts)), [self._labels[text] for text in texts]] = 6
        return logits


@pytest.fixture(scope="module")
def task(tiny_task: Path) -> Task:
    return load_task(tiny_task)


@pytest.fixture(scope="module")
def setting(task: Task) -> Setting:
    train, stream, test = (load_split(task, name) for name in ("train", "stream", "test"))
    teacher = Truth(task)
    large = teacher(test.texts)
    large[:10] = np.roll(large[:10], 1, axis=1)  # it isn't always right
    teacher.asked.clear()
    return Setting(
        task=task,
        kind=Ngrams(task, None),
        train=train,
        stream=stream,
        test=test,
        teacher=teacher,
        large_test=large,
        rounds=ROUNDS,
        share=SHARE,
    )


@pytest.fixture(scope="module")
def summary(setting: Setting) -> dict[str, object]:
    return summarise([simulate_seed(setting, seed, lambda _: None) for seed in (0, 1)])


def test_the_json_has_the_keys_that_were_promised(summary: dict[str, object]) -> None:
    whole = json.loads(json.dumps(summary, allow_nan=False))
    assert whole["schema"] == 1
    assert [seed["seed"] for seed in whole["seeds"]] == [0, 1]
    for seed in whole["seeds"]:
        assert [row["round"] for row in seed["rounds"]] == [0, 1, 2, 3]
        for row in seed["rounds"]:
            assert {"small_accuracy", "large_accuracy", "kcm_accuracy", "cloud_rate", "escalated_of_stream", "curve", "floor"} <= set(row)
            assert {float(rate) for rate in row["curve"]} == set(RATES) == {0, 0.1, 0.2, 0.3, 0.4, 0.5, 1}
            for point in row["curve"].values():
                assert {"accuracy", "realised_rate", "max_softmax_accuracy"} <= set(point)
                assert point["cost_per_1000"] == pytest.approx(1000 * point["realised_rate"])  # the default prices
    last = [seed["rounds"][-1]["small_accuracy"] for seed in whole["seeds"]]
    assert whole["mean"]["small_accuracy"] == pytest.approx(np.mean(last))
    assert whole["sd"]["small_accuracy"] == pytest.approx(np.std(last, ddof=1))


def test_the_ends_of_the_curve_are_the_two_models(summary: dict[str, object]) -> None:
    for seed in summary["seeds"]:  # type: ignore[attr-defined]
        for row in seed["rounds"]:
            never, always = row["curve"]["0.0"], row["curve"]["1.0"]
            assert (never["accuracy"], never["realised_rate"]) == (row["small_accuracy"], 0)
            assert (always["accuracy"], always["realised_rate"]) == (row["large_accuracy"], 1)
            assert row["large_accuracy"] == pytest.approx(0.95)


def test_rounds_make_the_small_model_better_within_the_budget(summary: dict[str, object], setting: Setting) -> None:
    for seed in summary["seeds"]:  # type: ignore[attr-defined]
        rows = seed["rounds"]
        assert rows[-1]["small_accuracy"] > rows[0]["small_accuracy"] + 0.03
        shares = [row["escalated_of_stream"] for row in rows]
        assert shares[0] == 0 and shares == sorted(shares)
        assert 0.1 < shares[-1] <= SHARE * (1 - RESERVED) + 1e-9


def test_paired_differences_are_those_of_the_curves(summary: dict[str, object]) -> None:
    paired = summary["paired"]["kcm_minus_max_softmax"]["0.3"]  # type: ignore[index]
    ends = [seed["rounds"][-1]["curve"]["0.3"] for seed in summary["seeds"]]  # type: ignore[attr-defined]
    assert paired["mean"] == pytest.approx(np.mean([e["accuracy"] - e["max_softmax_accuracy"] for e in ends]), abs=1e-9)
    assert paired["low"] <= paired["mean"] <= paired["high"]


def test_only_a_share_of_a_chunk_is_asked_about_and_the_reserve_never(task: Task, setting: Setting) -> None:
    teacher, drawn = Truth(task), Stream.draw(len(setting.stream), ROUNDS, seed=3)
    together = np.concatenate([*drawn.chunks, drawn.reserve])
    assert sorted(together.tolist()) == list(range(len(setting.stream)))
    loop = Loop(task, setting.kind, setting.train, setting.stream, teacher, seed=3)
    assert set(teacher.asked) <= set(setting.train.texts), "round 0 asks about nothing but what is labelled"
    teacher.asked.clear()
    for number, chunk in enumerate(drawn.chunks):
        before = len(teacher.asked)
        loop.advance(chunk, drawn.reserve, SHARE)
        asked = set(teacher.asked[before:])
        assert 0 < len(asked) <= SHARE * len(chunk), number
        assert asked <= {setting.stream.texts[i] for i in chunk}
    assert not set(teacher.asked) & {setting.stream.texts[i] for i in drawn.reserve}
    assert len(loop.escalated) == len(set(loop.escalated.tolist())) == len(teacher.asked)
    assert all(re.search(r" n\d+$", text) for text in teacher.asked) and len(TOPICS) == 6


def test_labels_of_the_stream_are_never_read(task: Task, setting: Setting) -> None:
    wrong = Split("stream", setting.stream.texts, np.zeros(len(setting.stream), np.int64))
    rows = []
    for stream in (setting.stream, wrong):
        loop = Loop(task, setting.kind, setting.train, stream, Truth(task), seed=0)
        loop.advance(np.arange(100), np.arange(300, 400), SHARE)
        rows.append((loop.escalated.tolist(), loop.predict(np.arange(300, 400)).logits))
    assert rows[0][0] == rows[1][0]
    assert np.array_equal(rows[0][1], rows[1][1])


def test_a_seed_is_repeatable_and_another_one_is_another(setting: Setting, summary: dict[str, object]) -> None:
    again = simulate_seed(setting, 0, lambda _: None).rows
    assert again == summary["seeds"][0]["rounds"]  # type: ignore[index]
    assert again != summary["seeds"][1]["rounds"]  # type: ignore[index]


def test_a_stream_too_short_to_keep_any_of_it_back_is_an_error() -> None:
    with pytest.raises(DataError, match="4 rows"):
        Stream.draw(4, 2, 0)
