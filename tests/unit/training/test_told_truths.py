"""Truths out of a real, compacted teacher store: who counts, how much, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cloud_kit import LABELS, put, row, tell

from cloud_server.compact import compact
from kcm.errors import StoreError
from kcm.sample import Purpose
from kcm.task import Task
from training.truths import read_truths

TASK = Task(id="toy", labels=LABELS)
A = np.array([1, 2, 3, 4], np.float32)


def store(root: Path, *rows: object, **labels: int) -> Path:
    put(root, *rows)  # type: ignore[arg-type]
    tell(root, labels)
    compact(root)
    return root


def test_told_samples_come_with_label_logits_and_weight(tmp_path: Path) -> None:
    explored = row("2", text="two", answer_logits=A, purpose=int(Purpose.EXPLORE), p_escalate=0.02)
    found = read_truths(
        store(tmp_path, row("1", text="one", answer_logits=A), explored, row("3", text="untold"), **{"1": 2, "2": 0}), TASK, bool
    )
    assert dict(zip(found.payloads, found.labels.tolist(), strict=True)) == {"one": 2, "two": 0}
    assert dict(zip(found.payloads, found.weights.tolist(), strict=True)) == {"one": 1.0, "two": pytest.approx(50)}
    assert np.array_equal(found.large, [A, A]) and found.teacher_id == "rule"
    # Two samples of weights 1 and 50 are hardly more than one.
    assert found.effective_n == pytest.approx(51**2 / (1 + 2500), rel=1e-3)


def test_what_was_fitted_on_or_comes_twice_is_left_out(tmp_path: Path) -> None:
    root = store(tmp_path, row("1", text="seen"), row("2", text="new"), row("3", text="new"), **{"1": 1, "2": 1, "3": 1})
    assert read_truths(root, TASK, lambda text: text != "seen").payloads == ["new"]


def test_nothing_told_and_several_teachers_are_refused(tmp_path: Path) -> None:
    root = store(tmp_path / "a", row("1", text="one"))
    with pytest.raises(StoreError, match="holds no truth"):
        read_truths(root, TASK, bool)
    with pytest.raises(StoreError, match="nowhere is no folder"):
        read_truths(tmp_path / "nowhere", TASK, bool)
    put(tmp_path / "inbox", row("1", text="one"))
    with pytest.raises(StoreError, match="nothing in it is compacted"):
        read_truths(tmp_path / "inbox", TASK, bool)
    two = store(tmp_path / "b", row("1", text="one"), row("2", text="two", teacher_id="another"), **{"1": 1, "2": 1})
    with pytest.raises(StoreError, match="rows of 2 teachers"):
        read_truths(two, TASK, bool)
    assert read_truths(two, TASK, bool, "another").payloads == ["two"]
    with pytest.raises(StoreError, match=r"that third answered, but about those of another \(1 row\), rule \(1 row\)") as error:
        read_truths(two, TASK, bool, "third")
    assert "--large FOLDER of that teacher" in error.value.fix
    with pytest.raises(StoreError, match="no truth that is new") as error:
        read_truths(two, TASK, lambda _: False, "rule")
    assert "Feedback" in error.value.fix


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    root = store(tmp_path, row("1", text="one"), **{"1": 1})
    (part,) = (root / "parquet").glob("*.parquet")
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(StoreError, match=f"{part.name} can't be read"):
        read_truths(root, TASK, bool)
