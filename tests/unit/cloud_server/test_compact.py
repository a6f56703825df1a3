from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from typing import Any

import apsw
import cloud_kit
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cloud_kit import put, row
from hypothesis import given, settings
from hypothesis import strategies as st

import cloud_server.compact
from cloud_server.compact import compact, read_stats
from cloud_server.store import TeacherStore
from kcm.errors import StoreError
from kcm.sample import HintArm
from kcm.teacher import COLUMNS


def table(root: Path) -> Any:
    return pa.concat_tables([pq.read_table(part) for part in sorted((root / "parquet").glob("*.parquet"))])


def test_rows_arrive_with_every_column(tmp_path: Path) -> None:
    small = np.array([1.5, -2.0, 0.25, 9.0], np.float32)
    sent = row("s1", text="profit \u00fc\U0001f600", small_logits=small, purpose=3, p_escalate=0.25, confidence=0.75)
    put(tmp_path, sent)
    done = compact(tmp_path)
    assert (done.written, done.parts, done.repeated, done.unfilled) == (1, 1, 0, 0)
    found = table(tmp_path)
    assert found.schema.names == list(COLUMNS)
    assert [str(field.type).replace("list<element: ", "list<").replace("list<item: ", "list<") for field in found.schema] == list(
        COLUMNS.values()
    )
    (got,) = found.to_pylist()
    assert got["received_ms"] > 1_600_000_000_000
    assert got["image"] is None and got["text"] == sent.payload
    for name in (
        "edge_id",
        "sample_id",
        "purpose",
        "p_escalate",
        "task_id",
        "label_space",
        "bundle_id",
        "confidence",
        "teacher_id",
        "prompt_id",
    ):
        assert got[name] == getattr(sent, name), name
    np.testing.assert_array_equal(np.array(got["small_logits"], np.float32), small)
    np.testing.assert_allclose(np.array(got["answer_logits"], np.float32), sent.answer_logits, rtol=1e-3)
    assert got["teacher_logits"] == got["answer_logits"] and got["hint_arm"] == HintArm.NONE


def test_the_format_is_zstd(tmp_path: Path) -> None:
    put(tmp_path, row("s1"))
    compact(tmp_path)
    (part,) = (tmp_path / "parquet").glob("*.parquet")
    assert pq.read_metadata(part).row_group(0).column(0).compression == "ZSTD"


def test_a_second_run_writes_nothing_and_a_resend_still_finds_its_answer(tmp_path: Path) -> None:
    put(tmp_path, row("s1"), row("s2"))
    compact(tmp_path)
    assert compact(tmp_path).written == 0
    store = TeacherStore(tmp_path, "0")
    np.testing.assert_array_equal(store.lookup("edge-1", ["s1"]).result()["s1"].answer_logits, row("s1").answer_logits)
    store.commit([row("s1"), row("s3")]).result()
    store.close()
    assert compact(tmp_path).written == 1
    assert sorted(cloud_kit.stored_keys(tmp_path)) == [("edge-1", "s1"), ("edge-1", "s2"), ("edge-1", "s3")]


def test_of_two_replicas_the_first_commit_wins(tmp_path: Path) -> None:
    put(tmp_path, row("s1", text="first"), replica="b")
    with apsw.Connection(str(tmp_path / "inbox-b.db")) as db:
        db.execute("UPDATE rows SET received_ms = received_ms - 1000")
    put(tmp_path, row("s1", text="second"), row("s2"), replica="a")
    done = compact(tmp_path)
    assert (done.written, done.repeated) == (2, 1)
    assert {r["sample_id"]: r["text"] for r in table(tmp_path).to_pylist()} == {"s1": "first", "s2": "profit rose"}


def test_a_row_that_came_to_another_replica_after_compaction_is_a_repeat(tmp_path: Path) -> None:
    put(tmp_path, row("s1"), replica="a")
    compact(tmp_path)
    put(tmp_path, row("s1"), replica="b")
    done = compact(tmp_path)
    assert (done.written, done.repeated) == (0, 1)
    assert read_stats(tmp_path).inboxes[1].waiting == 0


def test_rows_without_teacher_logits_wait_unless_forced(tmp_path: Path) -> None:
    put(tmp_path, row("s1", hint_arm=HintArm.CANDIDATES), row("s2"))
    done = compact(tmp_path)
    assert (done.written, done.unfilled) == (1, 1)
    store = TeacherStore(tmp_path, "0")
    store.fill([(waiting.seq, np.full(4, 2.0, np.float32)) for waiting in store.unfilled("rule", 9).result()]).result()
    store.close()
    put(tmp_path, row("s3", hint_arm=HintArm.ASSERTION))
    assert compact(tmp_path, force=True).written == 2
    found = {r["sample_id"]: r for r in table(tmp_path).to_pylist()}
    assert found["s1"]["teacher_logits"] == [2.0] * 4 != found["s1"]["answer_logits"]
    assert found["s3"]["teacher_logits"] is None and found["s3"]["answer_logits"] is not None


@pytest.mark.slow
def test_groups_hold_8192_rows_where_there_are_as_many_and_memory_stays(tmp_path: Path) -> None:
    store = TeacherStore(tmp_path, "0")
    for start in range(0, 20_000, 2000):
        store.commit([row(f"s{i}", text="word " * 60) for i in range(start, start + 2000)]).result()
    store.close()
    tracemalloc.start()
    compact(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    (part,) = (tmp_path / "parquet").glob("*.parquet")
    metadata = pq.read_metadata(part)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [8192, 8192, 3616]
    assert len(set(cloud_kit.stored_keys(tmp_path))) == 20_000
    assert peak < 25 * 2**20


def test_a_large_run_is_cut_into_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_server.compact, "_PART", 20)
    monkeypatch.setattr(cloud_server.compact, "_GROUP", 10)
    put(tmp_path, *(row(f"s{i}") for i in range(45)))
    assert compact(tmp_path, dry_run=True).parts == 3
    assert compact(tmp_path).parts == 3
    assert len(set(cloud_kit.stored_keys(tmp_path))) == len(cloud_kit.stored_keys(tmp_path)) == 45


def test_logits_beyond_float16_stay_finite(tmp_path: Path) -> None:
    put(tmp_path, row("s1", answer_logits=np.array([1e6, -1e6, 0, 1], np.float32)))
    compact(tmp_path)
    assert table(tmp_path).to_pylist()[0]["answer_logits"] == [65504.0, -65504.0, 0.0, 1.0]


def test_old_rows_are_purged_after_the_retention(tmp_path: Path) -> None:
    put(tmp_path, row("s1"), row("s2", hint_arm=HintArm.CANDIDATES))
    assert compact(tmp_path).purged == 0
    with apsw.Connection(str(tmp_path / "inbox-0.db")) as db:
        assert db.execute("SELECT text FROM rows WHERE sample_id = 's1'").fetchall() == [(None,)], (
            "a compacted payload has no business here"
        )
        db.execute("UPDATE rows SET compacted_ms = compacted_ms - 8 * 86400000 WHERE compacted_ms IS NOT NULL")
    assert compact(tmp_path).purged == 1
    stats = read_stats(tmp_path)
    assert stats.inboxes[0].waiting == 1 and stats.inboxes[0].compacted == 0 and stats.compacted == 1
    put(tmp_path, row("s1"))  # a resend after the retention is scored and committed anew …
    compact(tmp_path)
    assert cloud_kit.stored_keys(tmp_path) == [("edge-1", "s1")]  # … and still stored once


def test_dry_run_changes_nothing(tmp_path: Path) -> None:
    put(tmp_path, row("s1"))
    assert compact(tmp_path, dry_run=True).written == 1
    assert read_stats(tmp_path).compacted == 0 and read_stats(tmp_path).inboxes[0].waiting == 1


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    put(tmp_path, row("s1"))
    (tmp_path / "parquet").mkdir()
    (tmp_path / "parquet" / ".part-x.tmp").write_bytes(b"half a part")
    compact(tmp_path)
    assert sorted(path.suffix for path in (tmp_path / "parquet").iterdir()) == [".parquet"]


def test_a_damaged_part_stops_the_run_before_it_writes(tmp_path: Path) -> None:
    put(tmp_path, row("s1"))
    compact(tmp_path)
    (part,) = (tmp_path / "parquet").glob("*.parquet")
    os.truncate(part, 100)
    put(tmp_path, row("s2"))
    with pytest.raises(StoreError, match="can't be read"):
        compact(tmp_path)
    assert read_inbox_waiting(tmp_path) == 1


def read_inbox_waiting(root: Path) -> int:
    with apsw.Connection(str(root / "inbox-0.db")) as db:
        return int(db.execute("SELECT count(*) FROM rows WHERE compacted_ms IS NULL").fetchall()[0][0])  # type: ignore[arg-type]


def test_one_compaction_at_a_time(tmp_path: Path) -> None:
    put(tmp_path, row("s1"))
    with cloud_server.compact._locked(tmp_path), pytest.raises(StoreError, match="another compaction"):
        compact(tmp_path)
    assert compact(tmp_path).written == 1


def test_no_store_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no teacher store"):
        compact(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="no teacher store"):
        read_stats(tmp_path / "nowhere")


@given(
    steps=st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(0, 5), st.booleans(), st.sampled_from(["commit", "commit", "compact", "force"])),
        max_size=25,
    )
)
@settings(max_examples=20, deadline=None)
def test_any_order_of_commits_and_compactions_stores_each_sample_once(tmp_path_factory: pytest.TempPathFactory, steps: list[Any]) -> None:
    root = tmp_path_factory.mktemp("any")
    stores = {name: TeacherStore(root, name) for name in "ab"}
    committed = set()
    for replica, sample, hinted, action in steps:
        if action == "commit":
            arm = HintArm.CANDIDATES if hinted else HintArm.NONE
            stores[replica].commit([row(f"s{sample}", hint_arm=arm)]).result()
            committed.add(("edge-1", f"s{sample}"))
        else:
            compact(root, force=action == "force")
    compact(root, force=True)
    for store in stores.values():
        store.close()
    assert sorted(cloud_kit.stored_keys(root)) == sorted(committed)
