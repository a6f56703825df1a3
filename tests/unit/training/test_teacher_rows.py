"""What distillation reads of the teacher store: real inboxes, compacted into real Parquet parts."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from cloud_kit import LABELS, SPACE, put, row

from cloud_server.compact import compact
from kcm.errors import StoreError
from kcm.sample import HintArm
from kcm.task import Task
from training.teacher_rows import read_lessons

TASK = Task(id="toy", labels=LABELS)
A, B = np.array([1, 2, 3, 4], np.float32), np.array([-8, 0.5, 0, 60000], np.float32)


def stored(root: Path, *rows: object) -> Path:
    put(root, *rows)  # type: ignore[arg-type]
    compact(root)
    return root


def test_texts_and_logits_come_back(tmp_path: Path) -> None:
    store = stored(tmp_path, row("1", text="one\nline «two»", answer_logits=A), row("2", text="two", answer_logits=B))
    texts, logits, teacher = read_lessons(store, TASK)
    assert (texts, teacher) == (["one\nline «two»", "two"], "rule")
    assert np.array_equal(logits, np.stack([A, B]).astype(np.float16).astype(np.float32))
    assert logits.dtype == np.float32


def test_several_parts_and_replicas_are_one_store_and_a_sample_counts_once(tmp_path: Path) -> None:
    stored(tmp_path, row("1", text="a", answer_logits=A))
    put(tmp_path, row("1", text="a", answer_logits=A), row("2", text="b", answer_logits=B), replica="1")
    compact(tmp_path)
    assert len(list((tmp_path / "parquet").glob("*.parquet"))) == 2
    assert sorted(read_lessons(tmp_path, TASK)[0]) == ["a", "b"]


def test_other_tasks_and_other_labels_are_passed_over(tmp_path: Path) -> None:
    store = stored(tmp_path, row("1", text="ours"), row("2", task_id="other"), row("3", label_space="another"))
    assert read_lessons(store, TASK)[0] == ["ours"]
    for other in (Task(id="third", labels=LABELS), Task(id="toy", labels=LABELS[::-1])):
        with pytest.raises(StoreError, match="nothing to learn from"):
            read_lessons(store, other)
    assert other.label_space != SPACE


def test_hinted_answers_are_never_distilled(tmp_path: Path) -> None:
    """They would teach the student what it said itself."""
    put(tmp_path, row("1", text="plain"), row("2", text="hinted", hint_arm=HintArm.CANDIDATES))
    compact(tmp_path, force=True)
    assert read_lessons(tmp_path, TASK)[0] == ["plain"]


def test_two_teachers_must_be_chosen_from(tmp_path: Path) -> None:
    store = stored(tmp_path, row("1", text="a", teacher_id="old"), row("2", text="b", teacher_id="new"))
    with pytest.raises(StoreError, match="2 teachers: new, old") as error:
        read_lessons(store, TASK)
    assert "--teacher" in error.value.fix
    assert read_lessons(store, TASK, "new")[::2] == (["b"], "new")
    with pytest.raises(StoreError, match="nothing to learn from"):
        read_lessons(store, TASK, "none")


def test_nothing_compacted_says_what_to_run(tmp_path: Path) -> None:
    put(tmp_path, row("1"))
    with pytest.raises(StoreError, match="nothing to learn from") as error:
        read_lessons(tmp_path, TASK)
    assert error.value.fix == f"kcm store compact {tmp_path}"


@pytest.mark.parametrize("damage", ["cut", "text", "columns"])
def test_a_damaged_part_is_named(tmp_path: Path, damage: str) -> None:
    store = stored(tmp_path, *(row(str(i), text=f"text {i}") for i in range(50)))
    part = next((store / "parquet").glob("*.parquet"))
    whole = part.read_bytes()
    if damage == "columns":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": ["x"]}), part)
    else:
        middle = len(whole) // 2
        part.write_bytes({"cut": whole[:middle], "text": b"no parquet at all"}[damage])
    with pytest.raises(StoreError, match=r"can't be read") as error:
        read_lessons(store, TASK)
    assert part.name in error.value.message


def test_no_changed_byte_changes_a_lesson(tmp_path: Path) -> None:
    """Silently altered logits would be learnt. Damage in a column that isn't read may go unseen."""
    store = stored(tmp_path, *(row(str(i), text=f"text {i}") for i in range(50)))
    part = next((store / "parquet").glob("*.parquet"))
    whole, before = part.read_bytes(), read_lessons(store, TASK)
    refused = 0
    for place in range(4, len(whole), 23):
        part.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            texts, logits, teacher = read_lessons(store, TASK)
        except StoreError:
            refused += 1
        else:
            assert (texts, teacher) == (before[0], before[2]), place
            assert np.array_equal(logits, before[1]), place
    assert refused > 20


def test_a_row_that_lacks_some_logits_is_an_error_not_a_crash(tmp_path: Path) -> None:
    store = stored(tmp_path, row("1", text="a"), msgspec.structs.replace(row("2", text="b"), answer_logits=A[:3]))
    with pytest.raises(StoreError, match="3 logits"):
        read_lessons(store, TASK)
