"""What the hint does to the large model's answers, estimated from the teacher store while it serves.

Two ways to the same question, over samples that were escalated and answered (purposes LIVE and BACKFILL):

randomised: the edge withholds a share of its hints by chance. Where the truth is known: accuracy of answers with the hint minus
without, each weighted by 1/P(its arm) (Hájek 1971). Unbiased whatever the models do, but the small arm makes it wide.

paired: a row that was answered under a hint is scored again without it. So each sample is its own control, which is an order
sharper; and how often the hint changes the answer, and whether it changes it to the small model's, needs no truth at all.

Both compare answers over the samples that applications told the truth about. Where they do that more often for wrong answers,
the accuracies are those of such samples, and the randomised estimate leans against the arm that is told about more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cloud_server.estimates import Arm, Estimate, Share, paired_difference, share, weighted_difference
from cloud_server.parts import part_files, read_columns
from kcm.errors import StoreError
from kcm.sample import HintArm, Purpose

Bools = NDArray[np.bool_]
Ids = NDArray[np.int64]

_MARGIN = 0.01  # an effect below one point either way changes no gate
_TEACHER = ("task_id", "label_space", "teacher_id", "prompt_id")
_COLUMNS = (*_TEACHER, "received_ms", "purpose", "p_hint", "hint_arm", "label", "small_logits", "answer_logits", "teacher_logits")
_PURPOSES = (int(Purpose.LIVE), int(Purpose.BACKFILL))
_SPLITS = ("small right", "small wrong", "small unknown")  # unknown: the edge sent no logits


class Pairs(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of one arm that were answered with and without the hint.

    to_small: the share whose answer the hint changed to the small model's. agree_with, agree_without: the shares that agree with
    the small model under the hint and without it. effect: accuracy with minus without, where the truth is known; split by whether
    the small model was right.
    """

    arm: Literal["candidates", "assertion"]
    samples: int
    changed: Share
    to_small: Share
    agree_with: Share
    agree_without: Share
    effect: Estimate
    small_right: Estimate
    small_wrong: Estimate


class Randomised(msgspec.Struct, frozen=True, kw_only=True):
    """Rows on which chance decided about the hint (0 < p_hint < 1), and of those the ones with a truth."""

    shown: int
    withheld: int
    effect: Estimate
    small_right: Estimate
    small_wrong: Estimate


class HintEffect(msgspec.Struct, frozen=True, kw_only=True):
    """One teacher under one prompt. `gate`: what the evidence says the hint gate should be; `verdict` says it in words."""

    teacher_id: str
    prompt_id: str
    task_id: str
    label_space: str
    rows: int
    labelled: int
    randomised: Randomised
    pairs: tuple[Pairs, ...]
    gate: Literal["keep", "none", "unknown"]
    verdict: str
    more_labels: int  # labelled samples that are still needed for an interval of ± 1 point; 0: it is that narrow, or decided


def hint_effects(root: Path) -> list[HintEffect]:
    """The hint's effect on each teacher and prompt of a store's compacted rows, the one that answered last first.

    Raises:
        StoreError: no store, a damaged part, or rows over other classes than their label space has.
    """
    tallies: dict[tuple[str, ...], _Tally] = {}
    parts = part_files(root / "parquet")
    if not parts:
        raise StoreError(f"{root} holds no compacted rows", fix=f"kcm store compact {root}")
    for path in parts:
        for table in read_columns(path, _COLUMNS):
            for key, rows in _by_teacher(table):
                try:
                    tallies.setdefault(key, _Tally()).add(rows)
                except ValueError as error:
                    raise StoreError(f"{path} can't be read: {error}", fix="move the part out of the store") from error
    newest = sorted(tallies.items(), key=lambda item: item[1].newest_ms, reverse=True)
    return [tally.effect(*key) for key, tally in newest]


class _Tally:
    """Counts of one teacher's rows; memory doesn't grow with them."""

    def __init__(self) -> None:
        self.newest_ms = self.rows = self.labelled = self.shown = self.withheld = 0
        self._arms = {split: (Arm(), Arm()) for split in _SPLITS}  # of the experiment, (with, without) the hint
        self._pairs = {arm: _PairTally() for arm in (HintArm.CANDIDATES, HintArm.ASSERTION)}

    def add(self, table: Any) -> None:
        """Rows of this teacher. Raises ValueError where logits are of several lengths."""
        purposes, arm = _numbers(table, "purpose", 0), _numbers(table, "hint_arm", 0)
        label, p_hint = _numbers(table, "label", -1), _floats(table, "p_hint")
        answer, teacher, small = (_best(table[name]) for name in ("answer_logits", "teacher_logits", "small_logits"))
        self.newest_ms = max(self.newest_ms, int(pc.max(table["received_ms"]).as_py()))
        counted = np.isin(purposes, _PURPOSES)
        told = counted & (label >= 0)
        self.rows += int(counted.sum())
        self.labelled += int(told.sum())
        shown = arm != HintArm.NONE
        chance = counted & (p_hint > 0.0) & (p_hint < 1.0)
        self.shown += int((chance & shown).sum())
        self.withheld += int((chance & ~shown).sum())
        splits = _split(small, label)
        for split, (with_hint, without) in self._arms.items():
            rows = chance & told & splits[split]
            with_hint.add(answer[rows & shown] == label[rows & shown], 1.0 / p_hint[rows & shown])
            without.add(answer[rows & ~shown] == label[rows & ~shown], 1.0 / (1.0 - p_hint[rows & ~shown]))
        for kind, pairs in self._pairs.items():
            rows = counted & (arm == kind) & (teacher >= 0)
            pairs.add(answer[rows], teacher[rows], small[rows], label[rows])

    def effect(self, task_id: str, label_space: str, teacher_id: str, prompt_id: str) -> HintEffect:
        right, wrong, unknown = (self._arms[split] for split in _SPLITS)
        randomised = Randomised(
            shown=self.shown,
            withheld=self.withheld,
            effect=weighted_difference(right[0] + wrong[0] + unknown[0], right[1] + wrong[1] + unknown[1], self.shown, self.withheld),
            small_right=weighted_difference(*right),
            small_wrong=weighted_difference(*wrong),
        )
        pairs = tuple(tally.result(kind) for kind, tally in self._pairs.items() if tally.samples)
        gate, verdict, more = _judge(randomised, pairs)
        return HintEffect(
            teacher_id=teacher_id,
            prompt_id=prompt_id,
            task_id=task_id,
            label_space=label_space,
            rows=self.rows,
            labelled=self.labelled,
            randomised=randomised,
            pairs=pairs,
            gate=gate,
            verdict=verdict,
            more_labels=more,
        )


class _PairTally:
    """Counts over pairs of answers, (with, without) the hint."""

    def __init__(self) -> None:
        self.samples = self.changed = self.with_small = self.to_small = self.agree_with = self.agree_without = 0
        # Pairs with a truth, those that the hint mended, those that it spoilt.
        self._outcomes = {split: np.zeros(3, np.int64) for split in _SPLITS}

    def add(self, hinted: Ids, plain: Ids, small: Ids, label: Ids) -> None:
        self.samples += hinted.size
        self.changed += int((hinted != plain).sum())
        known = small >= 0
        self.with_small += int(known.sum())
        self.to_small += int((known & (hinted != plain) & (hinted == small)).sum())
        self.agree_with += int((known & (hinted == small)).sum())
        self.agree_without += int((known & (plain == small)).sum())
        splits = _split(small, label)
        for split, outcomes in self._outcomes.items():
            told = (label >= 0) & splits[split]
            mended, spoilt = told & (hinted == label) & (plain != label), told & (hinted != label) & (plain == label)
            outcomes += [told.sum(), mended.sum(), spoilt.sum()]

    def result(self, kind: HintArm) -> Pairs:
        right, wrong, unknown = (self._outcomes[split] for split in _SPLITS)
        return Pairs(
            arm="assertion" if kind is HintArm.ASSERTION else "candidates",
            samples=self.samples,
            changed=share(self.changed, self.samples),
            to_small=share(self.to_small, self.with_small),
            agree_with=share(self.agree_with, self.with_small),
            agree_without=share(self.agree_without, self.with_small),
            effect=paired_difference(*(right + wrong + unknown).tolist()),
            small_right=paired_difference(*right.tolist()),
            small_wrong=paired_difference(*wrong.tolist()),
        )


def _judge(randomised: Randomised, pairs: tuple[Pairs, ...]) -> tuple[Literal["keep", "none", "unknown"], str, int]:
    """(gate, verdict, labelled samples that are still needed) by the sharper of the estimates."""
    if not pairs and not randomised.shown:
        return "unknown", "no answer of this teacher carried a hint: it reads none, or the gate withholds all", 0
    best = max(pairs, key=lambda found: (found.effect.samples, found.samples), default=None)
    if best is None or best.effect.half_width > randomised.effect.half_width:
        effect, arm, changed = randomised.effect, "randomised", math.inf
    else:
        # A hint that changes few answers can't change accuracy by more: that alone says how many truths are enough.
        effect, arm, changed = best.effect, best.arm, best.changed.high
    points = f"{effect.in_points()} on {effect.samples} labelled samples"
    if effect.samples and effect.low > 0.0:
        return "keep", f"the hint helps ({arm}): {points}; keep the gate", 0
    if effect.samples and effect.high < 0.0:
        return "none", f'the hint hurts ({arm}): {points}; set the gate to "none"', 0
    if changed <= _MARGIN:
        return "keep", f"the hint changes at most {100 * changed:.1f} % of the answers ({arm}): the gate may be either", 0
    if effect.samples and effect.half_width <= _MARGIN:
        return "keep", f"the hint makes no difference beyond a point ({arm}): {points}; the gate may be either", 0
    needed = max(1, effect.needed(_MARGIN, changed) - effect.samples)
    measured = points if effect.samples else "no truth is known"
    return "unknown", f"can't tell yet ({arm}): {measured}; {needed} more labelled samples for ±1 point", needed


def _split(small: Ids, label: Ids) -> dict[str, Bools]:
    known = small >= 0
    return dict(zip(_SPLITS, (known & (small == label), known & (small != label), ~known), strict=True))


def _by_teacher(table: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    keys = table.select(_TEACHER).group_by(_TEACHER).aggregate([]).to_pylist()
    for key in keys:
        mask = None
        for name, value in key.items():
            same = pc.equal(table[name], value)
            mask = same if mask is None else pc.and_(mask, same)
        yield tuple(key[name] for name in _TEACHER), table.filter(mask)


def _numbers(table: Any, name: str, missing: int) -> Ids:
    values: Ids = pc.fill_null(table[name].cast(pa.int64()), missing).to_numpy()
    return values


def _floats(table: Any, name: str) -> NDArray[np.float64]:
    values: NDArray[np.float64] = pc.fill_null(table[name].cast(pa.float64()), 0.0).to_numpy()
    return values


def _best(column: Any) -> Ids:
    """int64 [N]: the label with the highest score; −1 where there are none. Raises ValueError where rows are of several lengths."""
    best = np.full(len(column), -1, np.int64)
    there = pc.is_valid(column).to_numpy()
    lengths = pc.unique(pc.list_value_length(column.drop_null())).to_pylist()
    if len(lengths) > 1 or lengths == [0]:
        raise ValueError(f"its logits are of {len(lengths)} lengths: {sorted(lengths)}")
    if lengths:
        best[there] = pc.list_flatten(column).to_numpy().reshape(-1, lengths[0]).argmax(1)
    return best
