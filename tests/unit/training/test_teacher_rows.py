"""What distillation reads of the teacher store: real inboxes, compacted into real Parquet parts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cloud_kit import LABELS, SPACE, put, row

from cloud_server.compact import compact
from cloud_server.parts import PartWriter
from cloud_server.store import Row
from kcm.errors import StoreError
from kcm.sample import HintArm, Purpose
from kcm.task import DistillSpec, Task, label_space
from kcm.teacher import COLUMNS
from training.data import identity
from training.teacher_rows import read_lessons

TASK = Task(id="toy", labels=LABELS)
A, B = np.array([1, 2, 3, 4], np.float32), np.array([-8, 0.5, 0, 60000], np.float32)


def stored(root: Path, *rows: object) -> Path:
    put(root, *rows)  # type: ignore[arg-type]
    compact(root)
    return root


def test_texts_and_logits_come_back(tmp_path: Path) -> None:
    store = stored(tmp_path, row("1", text="one\nline «two»", answer_logits=A), row("2", text="two", answer_logits=B))
    lessons = read_lessons(store, TASK)
    assert (lessons.payloads, lessons.teacher_id, lessons.stored) == (["one\nline «two»", "two"], "rule", 2)
    assert np.array_equal(lessons.logits, np.stack([A, B]).astype(np.float16).astype(np.float32))
    assert lessons.logits.dtype == np.float32
    assert lessons.p_escalate.tolist() == [1, 1]


def test_several_parts_and_replicas_are_one_store_and_a_sample_counts_once(tmp_path: Path) -> None:
    stored(tmp_path, row("1", text="a", answer_logits=A))
    put(tmp_path, row("1", text="a", answer_logits=A), row("2", text="b", answer_logits=B), replica="1")
    compact(tmp_path)
    assert len(list((tmp_path / "parquet").glob("*.parquet"))) == 2
    assert sorted(read_lessons(tmp_path, TASK).payloads) == ["a", "b"]


def test_other_tasks_and_other_labels_are_passed_over(tmp_path: Path) -> None:
    store = stored(tmp_path, row("1", text="ours"), row("2", task_id="other"), row("3", label_space="another"))
    assert read_lessons(store, TASK).payloads == ["ours"]
    for other in (Task(id="third", labels=LABELS), Task(id="toy", labels=LABELS[::-1])):
        with pytest.raises(StoreError, match="nothing to learn from"):
            read_lessons(store, other)
    assert other.label_space != SPACE


def test_hinted_answers_are_never_distilled(tmp_path: Path) -> None:
    """They would teach the student what it said itself."""
    put(tmp_path, row("1", text="plain"), row("2", text="hinted", hint_arm=HintArm.CANDIDATES))
    compact(tmp_path, force=True)
    assert read_lessons(tmp_path, TASK).payloads == ["plain"]


def test_two_teachers_must_be_chosen_from(tmp_path: Path) -> None:
    store = stored(tmp_path, row("1", text="a", teacher_id="old"), row("2", text="b", teacher_id="new"))
    with pytest.raises(StoreError, match="2 teachers: new, old") as error:
        read_lessons(store, TASK)
    assert "--teacher" in error.value.fix
    chosen = read_lessons(store, TASK, "new")
    assert (chosen.payloads, chosen.teacher_id, chosen.stored) == (["b"], "new", 1)
    stored(tmp_path, row("3", text="c", teacher_id="new"))
    with pytest.raises(StoreError, match=r"no row of teacher 'none', but of new \(2 rows\), old \(1 row\)") as error:
        read_lessons(store, TASK, "none")
    assert error.value.fix == "--teacher new"


def test_what_a_store_holds_instead_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere is no folder") as error:
        read_lessons(tmp_path / "nowhere", TASK)
    assert "kcm cloud --store" in error.value.fix
    store = stored(tmp_path / "held", row("1", text="a"), row("2", text="b"))
    with pytest.raises(StoreError, match=r"the rows of rule \(2 rows\) are all texts of test") as error:
        read_lessons(store, TASK, held_back={"a", "b"})
    assert "kcm store compact" in error.value.fix
    put(tmp_path / "hinted", row("1", text="hinted", hint_arm=HintArm.CANDIDATES))
    compact(tmp_path / "hinted", force=True)
    with pytest.raises(StoreError, match=r"its 1 row\(s\) have no logits without a hint yet"):
        read_lessons(tmp_path / "hinted", TASK)


def test_images_that_are_held_back_are_never_learnt_from(tmp_path: Path) -> None:
    store = stored(tmp_path, row("1", text=b"an image of the test"), row("2", text=b"another"))
    assert read_lessons(store, TASK, held_back={identity(b"an image of the test")}).payloads == [b"another"]


def test_nothing_compacted_says_what_to_run(tmp_path: Path) -> None:
    put(tmp_path, row("1"))
    with pytest.raises(StoreError, match="nothing to learn from") as error:
        read_lessons(tmp_path, TASK)
    assert error.value.fix == f"kcm store compact {tmp_path}"


@pytest.mark.parametrize("damage", ["cut", "text", "columns", "types"])
def test_a_damaged_part_is_named(tmp_path: Path, damage: str) -> None:
    store = stored(tmp_path, *(row(str(i), text=f"text {i}") for i in range(50)))
    part = next((store / "parquet").glob("*.parquet"))
    whole = part.read_bytes()
    if damage == "columns":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": ["x"]}), part)
    elif damage == "types":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pq.read_table(part)
        place = table.schema.get_field_index("teacher_id")
        pq.write_table(table.set_column(place, "teacher_id", table["teacher_id"].cast(pa.binary())), part)
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
            after = read_lessons(store, TASK)
        except StoreError:
            refused += 1
        else:
            assert (after.payloads, after.teacher_id) == (before.payloads, before.teacher_id), place
            assert np.array_equal(after.logits, before.logits), place
    assert refused > 20


def test_a_row_that_lacks_some_logits_is_an_error_not_a_crash(tmp_path: Path) -> None:
    store = stored(tmp_path, row("1", text="a"), msgspec.structs.replace(row("2", text="b"), answer_logits=A[:3]))
    with pytest.raises(StoreError, match="3 logits"):
        read_lessons(store, TASK)


def capped(**caps: object) -> Task:
    return msgspec.structs.replace(TASK, distill=DistillSpec(**caps))  # type: ignore[arg-type]


def answers(label: int) -> np.ndarray:
    return np.where(np.arange(len(LABELS)) == label, 5, 0).astype(np.float32)


def mixed(count: int = 200) -> list[Row]:
    """Of five edges the first sends half of all rows; of four answers the first is given to half; every tenth row is explored, as its
    purpose or its probability says."""
    rows = []
    for i in range(count):
        explored = i % 10 == 0
        rows.append(
            row(
                f"s{i}",
                edge_id=f"edge-{0 if i % 2 else i % 10 // 2}",
                text=f"text {i}",
                answer_logits=answers(0 if i % 4 < 2 else 1 + i % 3),
                purpose=int(Purpose.EXPLORE if explored and i % 20 else Purpose.LIVE),
                p_escalate=1.0 if i % 20 else 0.25,
            )
        )
    return rows


def test_caps_hold_per_answer_per_edge_and_in_all_and_spare_what_was_explored(tmp_path: Path) -> None:
    rows = mixed()
    store = stored(tmp_path, *rows)
    by_text = {r.payload: r for r in rows}
    explored = {f"text {i}" for i in range(0, 200, 10)}
    assert len(read_lessons(store, TASK).payloads) == 200
    for caps in ({"per_class": 7}, {"per_edge": 9}, {"per_class": 30, "per_edge": 11}):
        lessons = read_lessons(store, capped(**caps))
        assert explored <= set(lessons.payloads), "explored rows fall under no such cap"
        rest = [by_text[text] for text in lessons.payloads if text not in explored]
        classes, edges = Counter(int(r.answer_logits.argmax()) for r in rest), Counter(r.edge_id for r in rest)
        assert max(classes.values()) <= caps.get("per_class", 200) and max(edges.values()) <= caps.get("per_edge", 200)
        assert max(classes.values()) == caps.get("per_class") or max(edges.values()) == caps.get("per_edge")
        assert lessons.stored == 200
    fewest = read_lessons(store, capped(max_rows=15))
    assert len(fewest.payloads) == 15 and set(fewest.payloads) <= explored, "before any other"
    some = read_lessons(store, capped(max_rows=50))
    assert len(some.payloads) == 50 and explored <= set(some.payloads)


def test_what_each_row_was_sent_for_comes_along(tmp_path: Path) -> None:
    lessons = read_lessons(stored(tmp_path, *mixed(40)), TASK)
    assert dict(zip(lessons.payloads, lessons.p_escalate.tolist(), strict=True)) == {
        f"text {i}": 1.0 if i % 20 else 0.25 for i in range(40)
    }


def test_a_cap_leaves_the_same_rows_however_the_store_is_divided_and_others_for_another_seed(tmp_path: Path) -> None:
    rows, task = mixed(), capped(max_rows=60, per_class=40)
    one = stored(tmp_path / "one", *rows)
    for start in range(0, 200, 40):
        put(tmp_path / "many", *rows[start : start + 40])
        compact(tmp_path / "many")
    assert len(list((tmp_path / "many" / "parquet").glob("*.parquet"))) == 5
    first, other = read_lessons(one, task), read_lessons(tmp_path / "many", task)
    assert first.payloads == other.payloads and np.array_equal(first.logits, other.logits)
    assert first.logits.argmax(1).tolist() == [int({r.payload: r for r in rows}[t].answer_logits.argmax()) for t in first.payloads]
    again = read_lessons(one, task, seed=1)
    assert again.payloads != first.payloads and len(again.payloads) == len(first.payloads)


# Reads a store in a fresh process, and prints by how much that raised the most memory it ever held, in KiB. Not ru_maxrss: a child
# starts with its parent's.
PEAK = """
import sys
from pathlib import Path
import pyarrow.parquet
from kcm.task import DistillSpec, Task
from training.teacher_rows import read_lessons
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
task = Task(id="toy", labels=tuple(f"label {i}" for i in range(20)), distill=DistillSpec(max_rows=2000, per_class=int(sys.argv[2])))
before = peak()
lessons = read_lessons(Path(sys.argv[1]), task)
print(len(lessons.payloads), lessons.stored, peak() - before)
"""


def synthetic(root: Path, count: int) -> Path:
    """`count` rows in parts of 100,000 and row groups of 8,192, as compaction writes them."""
    group, rng = 8192, np.random.default_rng(0)
    labels = tuple(f"label {i}" for i in range(20))
    for first in range(0, count, 100_000):
        with PartWriter(root / "parquet") as part:
            last = min(count, first + 100_000)
            for start in range(first, last, group):
                size = min(group, last - start)
                logits = rng.normal(0, 2, (size, 20)).astype("<f4")
                known = {
                    "edge_id": [f"edge-{i % 50}" for i in range(size)],
                    "sample_id": [f"s{start + i}" for i in range(size)],
                    "received_ms": range(start, start + size),
                    "purpose": [1] * size,
                    "p_escalate": [1.0] * size,
                    "task_id": ["toy"] * size,
                    "label_space": [label_space(labels)] * size,
                    "bundle_id": ["b"] * size,
                    "text": [f"{start + i} " + rng.bytes(150).hex() for i in range(size)],
                    "confidence": [0.5] * size,
                    "answer_logits": [values.tobytes() for values in logits],
                    "teacher_logits": [values.tobytes() for values in logits],
                    "hint_arm": [0] * size,
                    "teacher_id": ["rule"] * size,
                    "prompt_id": ["prompt"] * size,
                }
                columns = [known.get(name, [None] * size) for name in COLUMNS]
                part.write(list(zip(*columns, strict=True)))
            part.publish()
    return root


@pytest.mark.slow
def test_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    """Ten times the rows, 70 MB more, and the same peak but for a little: 2,000 rows stay of either.

    Arrow allocates from the system here, since its default pool keeps freed pages for a while (to a bound, too).
    """
    stores = {size: synthetic(tmp_path / str(size), size) for size in (20_000, 200_000)}
    for per_class in (0, 90):
        peaks = {}
        for size, store in stores.items():
            done = subprocess.run(
                [sys.executable, "-c", PEAK, str(store), str(per_class)],
                capture_output=True,
                text=True,
                check=True,
                cwd=Path(__file__).parents[3],
                env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"},
            )
            kept, seen, peaks[size] = map(int, done.stdout.split())
            assert (kept, seen) == (20 * per_class or 2000, size)
        growth = peaks[200_000] - peaks[20_000]
        print(f"per_class {per_class}: peak over the imports {peaks} KiB, growth {growth} KiB")
        assert growth < 8 * 1024
