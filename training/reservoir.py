"""A bounded, even sample of a stream of teacher rows, with caps per class and per edge.

Each row has a number drawn from its id, and of two rows the one with the smaller number stays: bottom-k sampling, a reservoir that
comes to the same rows whatever order and pieces they arrive in (with both caps at once nearly so).
Source: Cohen and Kaplan, Summarizing data using bottom-k sketches (2007).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from kcm.sample import Payload
from kcm.task import DistillSpec

Float32 = NDArray[np.float32]
Index = NDArray[np.int64]
Mask = NDArray[np.bool_]

_SLACK = 4096  # rows that may wait for the next pruning: each costs a sort


@dataclass(frozen=True)
class Rows:
    """N teacher rows: payloads, logits [N, C], p_escalate [N], a number for the edge [N], and a priority [N]: the smaller stays.

    The priority is the draw in [0, 1) for an explored row, and 1 more for any other.
    """

    payloads: Sequence[Payload]
    logits: Float32
    p_escalate: Float32
    edges: Index
    priority: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.payloads)

    def take(self, index: Index) -> Rows:
        arrays = (getattr(self, field.name)[index] for field in fields(self) if field.name != "payloads")
        return Rows([self.payloads[i] for i in index], *arrays)

    @staticmethod
    def join(parts: list[Rows]) -> Rows:
        arrays = (np.concatenate([getattr(p, field.name) for p in parts]) for field in fields(Rows) if field.name != "payloads")
        return Rows([text for part in parts for text in part.payloads], *arrays)

    @staticmethod
    def none(classes: int) -> Rows:
        return Rows([], np.zeros((0, classes), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros(0, np.float64))


class Reservoir:
    """Takes rows in pieces; holds max_rows of them and a piece more. They come out in the order in which they went in."""

    def __init__(self, spec: DistillSpec, classes: int) -> None:
        self._spec, self._parts = spec, [Rows.none(classes)]
        self.highest = 2.0  # a row of this priority or a higher one will not stay

    def add(self, rows: Rows) -> None:
        self._parts.append(rows)
        if sum(map(len, self._parts)) >= self._spec.max_rows + _SLACK:
            self.rows()

    def rows(self) -> Rows:
        """What stays of all rows so far."""
        together = Rows.join(self._parts)
        self._parts.clear()
        kept = together.take(survivors(together.priority, together.logits.argmax(1), together.edges, self._spec))
        self._parts.append(kept)
        if len(kept) == self._spec.max_rows:
            self.highest = float(kept.priority.max())
        return kept


def survivors(priority: NDArray[np.float64], classes: Index, edges: Index, spec: DistillSpec) -> Index:
    """Which rows [N] the caps leave, in order: at most per_class of a class, of those per_edge of an edge, of those max_rows in all.

    Explored rows (priority < 1) fall under max_rows alone.
    """
    index = np.arange(len(priority))
    for group, cap in ((classes, spec.per_class), (edges, spec.per_edge)):
        if cap:
            index = index[_rank(group[index], priority[index]) < cap]
    if len(index) > spec.max_rows:
        index = np.sort(index[np.argsort(priority[index], kind="stable")[: spec.max_rows]])
    return index


def _rank(group: Index, priority: NDArray[np.float64]) -> Index:
    """Each row's place [N] by priority among the rows of its group that aren't explored; an explored row's is 0."""
    order = np.lexsort((priority, priority >= 1, group))
    ordered, counted = group[order], priority[order] >= 1
    before: Index = np.cumsum(counted) - counted  # rows that count, in this group and the ones before it
    first = np.r_[True, ordered[1:] != ordered[:-1]] if len(order) else np.zeros(0, bool)
    start = np.maximum.accumulate(np.where(first, before, 0))
    rank = np.empty(len(order), np.int64)
    rank[order] = before - start
    return rank
