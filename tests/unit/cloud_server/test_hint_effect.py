"""The hint's live effect: known stores give known figures, and the intervals cover what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from cloud_kit import put, row, tell

from cloud_server.compact import compact
from cloud_server.estimates import Arm, Estimate, paired_difference, share, weighted_difference
from cloud_server.hint_effect import HintEffect, hint_effects
from cloud_server.store import Row, TeacherStore
from kcm.errors import StoreError
from kcm.sample import Float32, HintArm, Purpose
from kcm.teacher import ADDED

TRUTH = 1


def says(label: int) -> Float32:
    scores = np.zeros(4, np.float32)
    scores[label] = 5.0
    return scores


def answered(name: str, *, shown: bool, small: int | None, answer: int, p_hint: float = 0.5, **changes: Any) -> Row:
    arm = changes.pop("arm", HintArm.CANDIDATES) if shown else HintArm.NONE
    logits = None if small is None else says(small)
    return row(name, hint_arm=arm, small_logits=logits, answer_logits=says(answer), p_hint=p_hint, **changes)


def write(root: Path, rows: list[Row], plain: dict[str, int], truths: dict[str, int]) -> list[HintEffect]:
    """Commit, fill (sample id → the answer without the hint), tell, compact, estimate."""
    store = TeacherStore(root, "0")
    store.commit(rows).result()
    names = {sent.payload: sent.sample_id for sent in rows}
    for teacher in {sent.teacher_id for sent in rows}:
        waiting = store.unfilled(teacher, 10_000).result()
        store.fill([(w.seq, says(plain[names[w.payload]])) for w in waiting if names[w.payload] in plain]).result()
    store.tell("edge-1", rows[0].label_space, truths).result()
    store.close()
    compact(root, force=True)
    return hint_effects(root)


def pairs_store(root: Path) -> list[HintEffect]:
    """100 hinted rows, the small model right on 60. The hint spoils 1 of those and mends 20 of the others; 8 change, wrong to wrong."""
    rows, plain = [], {}
    for i in range(100):
        small = TRUTH if i < 60 else 2
        answer, without = TRUTH, TRUTH
        if i == 0:
            answer = 3
        elif 60 <= i < 80:
            without = 2
        elif 80 <= i < 88:
            answer, without = 2, 0
        rows.append(answered(f"s{i}", shown=True, small=small, answer=answer, p_hint=1.0, text=f"text {i}"))
        plain[f"s{i}"] = without
    return write(root, rows, plain, {f"s{i}": TRUTH for i in range(100)})


def test_pairs_are_counted_and_split_by_the_small_model(tmp_path: Path) -> None:
    (found,) = pairs_store(tmp_path)
    (pairs,) = found.pairs
    assert (found.rows, found.labelled, pairs.arm, pairs.samples) == (100, 100, "candidates", 100)
    assert (pairs.changed.share, pairs.to_small.share) == (0.29, 0.08)
    assert (pairs.agree_with.share, pairs.agree_without.share) == (0.67, 0.80)
    assert (pairs.effect.samples, pairs.effect.difference) == (100, 0.19)
    assert (pairs.small_right.samples, pairs.small_right.difference) == (60, pytest.approx(-1 / 60))
    assert (pairs.small_wrong.samples, pairs.small_wrong.difference) == (40, 0.5)
    assert found.gate == "keep" and found.verdict.startswith("the hint helps (candidates): +19.0 points [") and found.more_labels == 0
    assert found.randomised.shown == found.randomised.withheld == 0, "p_hint 1: chance had no say"


def test_a_hint_that_hurts_is_said_so(tmp_path: Path) -> None:
    rows = [
        answered(f"s{i}", shown=True, small=2, answer=2 if i < 12 else TRUTH, text=f"text {i}", arm=HintArm.ASSERTION) for i in range(60)
    ]
    (found,) = write(tmp_path, rows, {f"s{i}": TRUTH for i in range(60)}, {f"s{i}": TRUTH for i in range(60)})
    assert found.gate == "none" and "hurts (assertion): -20.0 points" in found.verdict and 'set the gate to "none"' in found.verdict
    assert found.pairs[0].arm == "assertion" and found.pairs[0].to_small.share == 0.2


def test_without_truths_it_says_what_changes_and_how_many_truths_it_needs(tmp_path: Path) -> None:
    rows = [answered(f"s{i}", shown=True, small=2, answer=2 if i < 20 else 0, text=f"text {i}") for i in range(400)]
    (found,) = write(tmp_path, rows, {f"s{i}": 0 for i in range(400)}, {})
    assert found.gate == "unknown" and found.pairs[0].changed.share == found.pairs[0].to_small.share == 0.05
    # No more than the changed answers can differ in being right: z²·(the share's upper limit)/0.01²
    assert found.more_labels == pytest.approx(1.96**2 * found.pairs[0].changed.high / 0.0001, rel=0.01) and 1900 < found.more_labels < 3500
    assert found.verdict == f"can't tell yet (candidates): no truth is known; {found.more_labels} more labelled samples for ±1 point"


def test_a_hint_that_changes_nothing_needs_no_truths(tmp_path: Path) -> None:
    rows = [answered(f"s{i}", shown=True, small=0, answer=0, text=f"text {i}") for i in range(500)]
    (found,) = write(tmp_path, rows, {f"s{i}": 0 for i in range(500)}, {})
    assert found.gate == "keep" and "changes at most 0.8 % of the answers" in found.verdict


def test_rows_whose_chance_was_another_weigh_another_amount(tmp_path: Path) -> None:
    """Two bundles: the easy traffic of one has p_hint 0.9, the hard traffic of the other 0.5. A plain mean would mix them up."""
    rows, truths = [], {}

    def more(number: int, shown: bool, p_hint: float, right: int) -> None:
        for i in range(number):
            name = f"s{len(rows)}"
            rows.append(answered(name, shown=shown, small=None, answer=TRUTH if i < right else 0, p_hint=p_hint, text=name))
            truths[name] = TRUTH

    more(90, True, 0.9, 90)
    more(10, False, 0.9, 10)
    more(50, True, 0.5, 20)
    more(50, False, 0.5, 20)
    (found,) = write(tmp_path, rows, {}, truths)
    assert (found.randomised.shown, found.randomised.withheld, found.randomised.effect.samples) == (140, 60, 200)
    assert found.randomised.effect.difference == pytest.approx(0.0, abs=1e-6), "unweighted: 110/140 − 30/60 = +29 points"
    assert found.randomised.small_right.samples == found.randomised.small_wrong.samples == 0, "no small logits: in neither split"
    assert found.pairs == () and found.gate == "unknown" and "(randomised)" in found.verdict and found.more_labels > 1000


def test_only_escalated_rows_count_and_teachers_stay_apart(tmp_path: Path) -> None:
    rows = [
        answered("live", shown=True, small=0, answer=0, text="a"),
        answered("backfill", shown=False, small=0, answer=0, text="b", purpose=int(Purpose.BACKFILL)),
        answered("explore", shown=True, small=0, answer=0, text="c", purpose=int(Purpose.EXPLORE)),
        answered("shadow", shown=True, small=0, answer=0, text="d", purpose=int(Purpose.SHADOW)),
        answered("always", shown=False, small=0, answer=0, text="e", p_hint=0.0),
        answered("other prompt", shown=True, small=0, answer=0, text="f", prompt_id="new"),
    ]
    found = write(tmp_path, rows, {"live": 0, "explore": 1, "shadow": 1, "other prompt": 2}, {"live": 0, "explore": 0, "backfill": 0})
    by_prompt = {effect.prompt_id: effect for effect in found}
    assert set(by_prompt) == {"prompt", "new"}
    ours = by_prompt["prompt"]
    assert (ours.rows, ours.labelled, ours.randomised.shown, ours.randomised.withheld) == (3, 2, 1, 1)
    assert (ours.pairs[0].samples, ours.pairs[0].changed.share) == (1, 0.0) and by_prompt["new"].pairs[0].changed.share == 1.0


def test_the_teacher_that_answered_last_comes_first(tmp_path: Path) -> None:
    for teacher in ("z old", "a new"):
        put(tmp_path, row(teacher, teacher_id=teacher))
        time.sleep(0.003)
    compact(tmp_path)
    assert [effect.teacher_id for effect in hint_effects(tmp_path)] == ["a new", "z old"]


def test_a_teacher_that_reads_no_hints_is_said_so(tmp_path: Path) -> None:
    (found,) = write(tmp_path, [answered(f"s{i}", shown=False, small=0, answer=0, p_hint=0.98) for i in range(5)], {}, {"s0": 0})
    assert found.gate == "unknown" and "no answer of this teacher carried a hint" in found.verdict


def test_parts_of_the_first_release_and_empty_stores(tmp_path: Path) -> None:
    put(tmp_path, row("s1"))
    with pytest.raises(StoreError, match="no compacted rows"):
        hint_effects(tmp_path)
    compact(tmp_path)
    (part,) = (tmp_path / "parquet").glob("*.parquet")
    pq.write_table(pq.read_table(part).drop_columns(list(ADDED)), part)
    (found,) = hint_effects(tmp_path)
    assert (found.rows, found.labelled, found.randomised.withheld) == (1, 0, 0)


def test_logits_of_several_lengths_are_damage(tmp_path: Path) -> None:
    put(tmp_path, row("s1"), row("s2", answer_logits=np.zeros(3, np.float32)))
    compact(tmp_path)
    with pytest.raises(StoreError, match=r"logits are of 2 lengths: \[3, 4\]"):
        hint_effects(tmp_path)


def test_the_verb(tmp_path: Path) -> None:
    pairs_store(tmp_path)
    command = [sys.executable, "-c", "from kcm.app.cli import main; main()", "store", "hints", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    for line in (
        "rule under prompt prompt: 100 escalated rows, 100 with a truth",
        "  the hint helps (candidates): +19.0 points [",
        "  candidates, answered with it and without: changed 29.0% [",
        "    agrees with the small model: 67.0% with the hint, 80.0% without",
        "      small model wrong: +50.0 points [",
        "  by chance shown 0 times, withheld 0 times",
    ):
        assert line in shown, shown
    (effect,) = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60).stdout)["effects"]
    assert msgspec.convert(effect, HintEffect).gate == "keep"


def test_an_arm_without_truths_needs_as_many_as_its_share_is_small() -> None:
    nothing = weighted_difference(drawn(np.random.default_rng(0), 50, 0.98, 0.9), Arm(), 980, 20)
    assert nothing.samples == 0 and nothing.needed(0.01) == pytest.approx(1.96**2 * 0.25 * (1 / 0.98 + 1 / 0.02) / 0.0001, rel=0.01)


def test_nothing_known_is_the_widest_interval() -> None:
    for nothing in (paired_difference(0, 0, 0), weighted_difference(Arm(), Arm())):
        assert nothing == Estimate(samples=0, difference=0.0, low=-1.0, high=1.0, variance=1.0)
    assert (share(0, 0).low, share(0, 0).high) == (0.0, 1.0)


def test_needed_samples_make_the_interval_that_was_asked_for() -> None:
    """Draw as many as it says, and look."""
    rng = np.random.default_rng(0)
    first = paired_difference(200, 12, 6)
    n = first.needed(0.01)
    mended = rng.binomial(n, 13 / 202)
    assert paired_difference(n, int(mended), int(rng.binomial(n, 7 / 202))).half_width == pytest.approx(0.01, rel=0.1)
    arms = [drawn(rng, 600, 0.9, 0.8), drawn(rng, 400, 0.1, 0.7)]
    n = weighted_difference(*arms).needed(0.02)
    again = weighted_difference(drawn(rng, round(n * 0.6), 0.9, 0.8), drawn(rng, round(n * 0.4), 0.1, 0.7))
    assert again.half_width == pytest.approx(0.02, rel=0.1)


def drawn(rng: Any, number: int, p_arm: float, accuracy: float) -> Arm:
    arm = Arm()
    arm.add(rng.random(number) < accuracy, np.full(number, 1 / p_arm))
    return arm


CASES = [  # (samples, P(shown) of the easy and the hard half, accuracies with, accuracies without)
    (1000, (0.98, 0.98), (0.95, 0.70), (0.94, 0.68)),
    (300, (0.9, 0.9), (0.99, 0.95), (0.99, 0.95)),
    (2000, (0.98, 0.5), (0.98, 0.6), (0.97, 0.5)),
    (400, (0.9, 0.5), (1.0, 0.9), (1.0, 0.8)),
    (5000, (0.98, 0.9), (0.9, 0.6), (0.9, 0.65)),
]


def experiment(
    rng: Any, number: int, shown_p: tuple[float, float], with_hint: tuple[float, float], without: tuple[float, float]
) -> Estimate:
    hard = (rng.random(number) < 0.5).astype(int)
    p = np.array(shown_p)[hard]
    shown = rng.random(number) < p
    right = rng.random(number) < np.where(shown, np.array(with_hint)[hard], np.array(without)[hard])
    arms = Arm(), Arm()
    arms[0].add(right[shown], 1 / p[shown])
    arms[1].add(right[~shown], 1 / (1 - p[~shown]))
    return weighted_difference(*arms)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_randomised_interval_covers_the_truth(case: Any) -> None:
    """95 % promised; 2,000 draws have a standard error of 0.5 points. Wider than promised is no failure, but 99.9 % would say nothing."""
    number, shown_p, with_hint, without = case
    truth = (sum(with_hint) - sum(without)) / 2
    rng = np.random.default_rng(1)
    found = [experiment(rng, number, shown_p, with_hint, without) for _ in range(2000)]
    covered = float(np.mean([estimate.low <= truth <= estimate.high for estimate in found]))
    assert 0.935 <= covered <= 0.995, covered
    assert np.mean([estimate.difference for estimate in found]) == pytest.approx(truth, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "mended", "spoilt"), [(60, 0.05, 0.05), (200, 0.03, 0.01), (1000, 0.02, 0.02), (100, 0.0, 0.1), (40, 0.3, 0.1)]
)
def test_the_paired_interval_covers_the_truth(number: int, mended: float, spoilt: float) -> None:
    rng = np.random.default_rng(2)
    counts = rng.multinomial(number, [mended, spoilt, 1 - mended - spoilt], size=4000)
    found = [paired_difference(number, int(up), int(down)) for up, down, _ in counts]
    covered = float(np.mean([estimate.low <= mended - spoilt <= estimate.high for estimate in found]))
    assert 0.94 <= covered <= 0.999, covered


def test_the_paired_interval_is_an_order_sharper(tmp_path: Path) -> None:
    """The same 2,000 samples, 2 % withheld: the reason why rows are scored again."""
    chance = weighted_difference(drawn(np.random.default_rng(3), 1960, 0.98, 0.9), drawn(np.random.default_rng(4), 40, 0.02, 0.89))
    paired = paired_difference(1960, 40, 20)
    assert paired.half_width * 10 < chance.half_width
    tell(tmp_path, {"s": 1})  # a store of truths alone has no rows to compare
    with pytest.raises(StoreError):
        hint_effects(tmp_path)
