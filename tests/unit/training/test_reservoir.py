"""Which rows the caps leave: whatever the pieces, evenly, and explored ones before others."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kcm.task import DistillSpec
from training.reservoir import Reservoir, Rows, survivors

CLASSES = 4


def rows(count: int, seed: int = 0) -> Rows:
    """Classes and edges unevenly frequent; one row in eight is explored."""
    rng = np.random.default_rng(seed)
    logits = np.eye(CLASSES, dtype=np.float32)[rng.choice(CLASSES, count, p=[0.6, 0.2, 0.15, 0.05])]
    explored = rng.random(count) < 1 / 8
    edges = rng.choice(3, count, p=[0.7, 0.2, 0.1])
    return Rows(
        [f"text {i}" for i in range(count)], logits, np.where(explored, 0.02, 1).astype(np.float32), edges, rng.random(count) + ~explored
    )


def taken(all_rows: Rows, spec: DistillSpec, cuts: list[int]) -> Rows:
    reservoir = Reservoir(spec, CLASSES)
    for piece in np.split(np.arange(len(all_rows)), sorted(cuts)):
        inside = piece[all_rows.priority[piece] < reservoir.highest]
        reservoir.add(all_rows.take(inside))
    return reservoir.rows()


def test_without_a_cap_everything_stays_in_order() -> None:
    everything = rows(300)
    kept = taken(everything, DistillSpec(), [10, 150])
    assert kept.payloads == everything.payloads
    assert np.array_equal(kept.logits, everything.logits) and np.array_equal(kept.p_escalate, everything.p_escalate)


@settings(deadline=None, max_examples=50)
@given(
    count=st.integers(0, 400),
    cuts=st.lists(st.integers(0, 400), max_size=6),
    most=st.integers(1, 120),
    per_class=st.integers(0, 40),
    per_edge=st.integers(0, 60),
    seed=st.integers(0, 9),
)
def test_caps_hold_in_pieces_as_at_once(count: int, cuts: list[int], most: int, per_class: int, per_edge: int, seed: int) -> None:
    import training.reservoir

    everything, spec = rows(count, seed), DistillSpec(max_rows=most, per_class=per_class, per_edge=per_edge)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.reservoir, "_SLACK", 7)  # prune often
        kept = taken(everything, spec, [cut for cut in cuts if cut < count])
    others = kept.take(np.flatnonzero(kept.priority >= 1))
    assert len(kept) <= most
    if per_class:
        assert max(Counter(others.logits.argmax(1).tolist()).values(), default=0) <= per_class
    if per_edge:
        assert max(Counter(others.edges.tolist()).values(), default=0) <= per_edge
    assert kept.payloads == sorted(kept.payloads, key=lambda text: int(text.split()[1]))
    at_once = everything.take(survivors(everything.priority, everything.logits.argmax(1), everything.edges, spec))
    if not (per_class and per_edge):
        assert kept.payloads == at_once.payloads
    explored = int((everything.priority < 1).sum())
    assert int((kept.priority < 1).sum()) == min(most, explored)


def test_a_cap_takes_what_it_can_get() -> None:
    everything = rows(2000)
    at_once = survivors(everything.priority, everything.logits.argmax(1), everything.edges, DistillSpec(per_class=30))
    count = Counter(everything.logits[at_once][everything.priority[at_once] >= 1].argmax(1).tolist())
    assert set(count.values()) == {30}


def test_every_row_has_the_same_chance() -> None:
    """Early ones no more than late ones, which pieces or a first-come rule would give away."""
    held = np.zeros(60)
    draws = 1500
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        plain = Rows(
            [str(i) for i in range(60)],
            np.ones((60, CLASSES), np.float32),
            np.ones(60, np.float32),
            np.zeros(60, np.int64),
            1 + rng.random(60),
        )
        held[[int(text) for text in taken(plain, DistillSpec(max_rows=20), [20, 40]).payloads]] += 1
    share, error = held / draws, np.sqrt(1 / 3 * 2 / 3 / draws)
    assert np.abs(share - 1 / 3).max() < 4.5 * error
    assert abs(share[:20].mean() - share[40:].mean()) < 4.5 * error * np.sqrt(2 / 20)
