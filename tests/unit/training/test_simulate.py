"""The closed loop in memory: what is asked, what is learnt, and the JSON that comes out. The teacher here is the truth."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tiny_kit import TOPICS, sentences

from kcm.errors import ConfigError, DataError
from kcm.task import METHODS, Task, load_task
from training.data import Split, load_split
from training.evaluate import RATES
from training.rounds import RESERVED, Loop, Stream
from training.simulate import SeedResult, Setting, compare_methods, simulate_seed, summarise
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
    large = teacher(test.payloads)
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
    assert set(teacher.asked) <= set(setting.train.payloads), "round 0 asks about nothing but what is labelled"
    teacher.asked.clear()
    for number, chunk in enumerate(drawn.chunks):
        before = len(teacher.asked)
        loop.advance(chunk, drawn.reserve, SHARE)
        asked = set(teacher.asked[before:])
        assert 0 < len(asked) <= SHARE * len(chunk), number
        assert asked <= {setting.stream.payloads[i] for i in chunk}
    assert not set(teacher.asked) & {setting.stream.payloads[i] for i in drawn.reserve}
    assert len(loop.escalated) == len(set(loop.escalated.tolist())) == len(teacher.asked)
    assert all(re.search(r" n\d+$", text) for text in teacher.asked) and len(TOPICS) == 6


def test_labels_of_the_stream_are_never_read(task: Task, setting: Setting) -> None:
    wrong = Split("stream", setting.stream.payloads, np.zeros(len(setting.stream), np.int64))
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


def loop_of(setting: Setting, seed: int = 0, **spec: object) -> Loop:
    task = msgspec.structs.replace(setting.task, distill=msgspec.structs.replace(setting.task.distill, **spec))  # type: ignore[arg-type]
    return Loop(task, setting.kind, setting.train, setting.stream, setting.teacher, seed=seed)


def test_a_random_selection_spends_the_same_budget_without_looking_at_the_judge(setting: Setting) -> None:
    chunk, reserve = np.arange(200), np.arange(300, 400)
    by_judge, at_random, other = loop_of(setting), loop_of(setting, method="kd"), loop_of(setting, seed=1, method="kd")
    for loop in (by_judge, at_random, other):
        loop.advance(chunk, reserve, SHARE)
    assert len(at_random.escalated) == int(SHARE * 200) >= len(by_judge.escalated)
    assert len(set(at_random.escalated.tolist())) == len(at_random.escalated)
    assert set(at_random.escalated.tolist()) != set(other.escalated.tolist())
    first = loop_of(setting)
    confidence = first.fitted.judge.confidence(first.predict(chunk))
    assert confidence[by_judge.escalated].mean() < confidence.mean() - 0.1
    assert abs(confidence[at_random.escalated].mean() - confidence.mean()) < 0.1


def test_exploration_asks_about_what_the_judge_is_sure_of(setting: Setting) -> None:
    chunk, reserve = np.arange(300), np.arange(300, 400)
    start = loop_of(setting)
    confidence = start.fitted.judge.confidence(start.predict(chunk))
    surest = set(np.argsort(-confidence)[:60].tolist())
    asked = {}
    for share in (0.0, 0.3):
        loop = loop_of(setting, explore=share)
        loop.advance(chunk, reserve, 0.6)
        asked[share] = set(loop.escalated.tolist())
    assert not asked[0.0] & surest
    assert 8 <= len(asked[0.3] & surest) <= 30


def test_caps_bound_what_a_round_learns_from_but_not_what_is_asked(setting: Setting) -> None:
    chunk, reserve = np.arange(300), np.arange(300, 400)
    plain, capped = loop_of(setting, explore=0.0), loop_of(setting, explore=0.0, per_class=5, per_edge=1)
    for loop in (plain, capped):
        loop.advance(chunk, reserve, SHARE)
    assert plain.escalated.tolist() == capped.escalated.tolist()
    learnt = len(capped.fitted.out_of_fold) - len(setting.train)
    assert learnt == 5 * len(setting.task.labels) < len(plain.fitted.out_of_fold) - len(setting.train)
    few = loop_of(setting, max_rows=7)
    few.advance(chunk, reserve, SHARE)
    assert len(few.fitted.out_of_fold) - len(setting.train) == 7


def test_replay_and_importance_reach_the_loop(setting: Setting) -> None:
    chunk, reserve = np.arange(200), np.arange(300, 400)
    logits = {}
    for name, spec in {
        "": {},
        "replay": {"replay": 0.1},
        "importance": {"importance": True},
        "temperature": {"temperature": 4.0},
        "d": {"teacher": "hard"},
    }.items():
        loop = loop_of(setting, explore=0.2, **spec)
        loop.advance(chunk, reserve, 0.6)
        logits[name] = loop.predict(reserve).logits
    assert all(not np.allclose(logits[""], logits[name], atol=1e-3) for name in logits if name)


@pytest.fixture(scope="module")
def by_method(setting: Setting) -> dict[str, list[SeedResult]]:
    plain = replace(setting, floor=False)
    return {name: [simulate_seed(plain, seed, lambda _: None, name) for seed in (0, 1)] for name in METHODS}


def test_kcm_by_name_is_what_the_default_does(by_method: dict[str, list[SeedResult]], summary: dict[str, object]) -> None:
    rows = [result.rows for result in by_method["kcm"]]
    whole = [seed["rounds"] for seed in summary["seeds"]]  # type: ignore[attr-defined]
    assert rows == [[{key: value for key, value in row.items() if key != "floor"} for row in seed] for seed in whole]


def test_methods_start_alike_and_part_as_they_should(by_method: dict[str, list[SeedResult]]) -> None:
    for seed in (0, 1):
        start = {name: results[seed].rows[0] for name, results in by_method.items()}
        assert len({row["small_accuracy"] for row in start.values()}) == 1
        assert start["kcm"]["curve"] == start["kd"]["curve"] == start["d"]["curve"]
        # MCM's judge is KCM's twin, and the other way round.
        for rate, point in start["mcm"]["curve"].items():
            assert point["accuracy"] == pytest.approx(start["kcm"]["curve"][rate]["mlp_accuracy"])
            assert point["kan_accuracy"] == pytest.approx(start["kcm"]["curve"][rate]["accuracy"])
        ends = {name: results[seed].rows[-1] for name, results in by_method.items()}
        assert ends["d"]["escalated_of_stream"] == ends["kd"]["escalated_of_stream"] >= ends["kcm"]["escalated_of_stream"]
        assert all(row["small_accuracy"] > start["d"]["small_accuracy"] for row in ends.values())


def test_methods_are_compared_pairwise_on_the_same_samples(by_method: dict[str, list[SeedResult]]) -> None:
    paired = compare_methods(by_method)
    assert set(paired) == {"kcm_minus_d", "kcm_minus_kd", "kcm_minus_mcm"}
    for name in ("d", "kd", "mcm"):
        for rate, figures in paired[f"kcm_minus_{name}"].items():
            ends = [[r.rows[-1]["curve"][rate]["accuracy"] for r in by_method[m]] for m in ("kcm", name)]
            assert figures["mean"] == pytest.approx(np.mean(ends[0]) - np.mean(ends[1]), abs=1e-9)
            assert figures["low"] <= figures["mean"] <= figures["high"]
        small = [np.mean([r.rows[-1]["small_accuracy"] for r in by_method[m]]) for m in ("kcm", name)]
        assert paired[f"kcm_minus_{name}"]["0.0"]["mean"] == pytest.approx(small[0] - small[1], abs=1e-9)
    assert list(compare_methods({name: by_method[name] for name in ("kd", "d")})) == ["d_minus_kd"]


def test_an_unknown_method_is_an_error(setting: Setting) -> None:
    with pytest.raises(ConfigError, match="'gkd' is unknown"):
        simulate_seed(setting, 0, lambda _: None, "gkd")


def test_groups_of_classes_average_to_the_whole(summary: dict[str, object], setting: Setting) -> None:
    thirds = np.array_split(np.arange(6), 3)  # as frequent as each other: in the order of the labels
    share = [np.isin(setting.test.y, third).mean() for third in thirds]
    for row in (row for seed in summary["seeds"] for row in seed["rounds"]):  # type: ignore[attr-defined]
        for name, whole in (("small", row["small_accuracy"]), ("kcm", row["curve"]["0.3"]["accuracy"]), ("large", row["large_accuracy"])):
            groups = row["groups"][name]
            assert list(groups) == ["many", "medium", "few"]
            assert np.dot(share, list(groups.values())) == pytest.approx(whole)


def test_what_is_kept_of_round_0_is_reported(summary: dict[str, object], setting: Setting) -> None:
    for seed, rows in enumerate(s["rounds"] for s in summary["seeds"]):  # type: ignore[attr-defined]
        fitted = loop_of(setting, seed=seed).fitted
        assert rows[0]["round_0_accuracy"] == pytest.approx((fitted.out_of_fold.logits.argmax(1) == setting.train.y).mean())
        assert rows[-1]["round_0_accuracy"] >= rows[0]["round_0_accuracy"]


@pytest.mark.parametrize("method", ["d", "kcm"])
def test_a_budget_of_nothing_asks_nothing(setting: Setting, method: str) -> None:
    task = msgspec.structs.replace(setting.task, distill=msgspec.structs.replace(setting.task.distill, method=method))  # type: ignore[arg-type]

    def never(texts: list[str]) -> np.ndarray:
        assert texts == setting.train.payloads, "only the labels are asked about, to gauge the teacher"
        return setting.teacher(texts)

    loop = Loop(task, setting.kind, setting.train, setting.stream, never, seed=0)
    loop.advance(np.arange(100), np.arange(300, 400), 0.0)
    assert len(loop.escalated) == 0 and len(loop.fitted.out_of_fold) == len(setting.train)
