"""What applications tell of the truth, on its way into the rows: before, with and after them, to any replica, from any older store."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from pathlib import Path

import apsw
import cloud_kit
import msgspec
import pyarrow.parquet as pq
import pytest
from cloud_kit import put, row, stored_labels, tell
from hypothesis import given, settings
from hypothesis import strategies as st

import cloud_server.compact
import cloud_server.truths
from cloud_server.compact import compact, read_stats
from cloud_server.parts import SCHEMA, PartWriter, read_columns
from cloud_server.store import TeacherStore, inbox_path
from kcm.errors import StoreError
from kcm.sample import HintArm
from kcm.teacher import ADDED, COLUMNS

# As the first release wrote it.
OLD_INBOX = """
CREATE TABLE rows (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    edge_id TEXT NOT NULL, sample_id TEXT NOT NULL, received_ms INTEGER NOT NULL,
    purpose INTEGER NOT NULL, p_escalate REAL NOT NULL,
    task_id TEXT NOT NULL, label_space TEXT NOT NULL, bundle_id TEXT NOT NULL,
    text TEXT, image BLOB, payload_hash BLOB NOT NULL, confidence REAL NOT NULL,
    small_logits BLOB, answer_logits BLOB NOT NULL, teacher_logits BLOB,
    hint_arm INTEGER NOT NULL, teacher_id TEXT NOT NULL, prompt_id TEXT NOT NULL,
    compacted_ms INTEGER,
    UNIQUE (edge_id, sample_id)
);
CREATE INDEX unfilled ON rows (seq) WHERE teacher_logits IS NULL AND compacted_ms IS NULL;
"""


def old_inbox(root: Path, *samples: str) -> None:
    """An inbox of the first release that holds these samples."""
    new = root / "new"
    put(new, *(row(sample) for sample in samples))
    with apsw.Connection(str(inbox_path(root, "0"))) as db:
        db.execute(OLD_INBOX)
        names = ", ".join(name for (name,) in db.execute("SELECT name FROM pragma_table_info('rows')"))
        db.execute(f"ATTACH '{inbox_path(new, '0')}' AS new")
        db.execute(f"INSERT INTO rows ({names}) SELECT {names} FROM new.rows")


def parts(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "parquet").glob("*.parquet")}


def test_a_truth_before_with_and_after_its_row_stands_in_the_row(tmp_path: Path) -> None:
    tell(tmp_path, {"before": 1, "never sent": 2})
    assert compact(tmp_path).unmatched == 2
    put(tmp_path, row("before"), row("with"), row("after"), row("untold"))
    tell(tmp_path, {"with": 0})
    done = compact(tmp_path)
    assert (done.written, done.labelled, done.rewritten, done.unmatched) == (4, 2, 0, 1)
    tell(tmp_path, {"after": 3})
    done = compact(tmp_path)
    assert (done.written, done.labelled, done.rewritten, done.unmatched) == (0, 1, 1, 1)
    assert stored_labels(tmp_path) == {"before": 1, "with": 0, "after": 3, "untold": None}
    assert read_stats(tmp_path).labelled == 3 and read_stats(tmp_path).inboxes[0].labels == 1


def test_a_truth_may_come_to_another_replica(tmp_path: Path) -> None:
    put(tmp_path, row("s1"), row("s2"), replica="a")
    tell(tmp_path, {"s1": 2}, replica="b")
    compact(tmp_path)
    tell(tmp_path, {"s2": 1}, replica="c")
    compact(tmp_path)
    assert stored_labels(tmp_path) == {"s1": 2, "s2": 1}


@pytest.mark.parametrize("between", [False, True])
def test_the_last_truth_holds_whoever_heard_it(tmp_path: Path, between: bool) -> None:
    """Also where the earlier ones are in a part already, and whichever replica is read first."""
    put(tmp_path, row("s1"), row("s2"), row("s3"))
    for replica, labels in (("b", {"s1": 1, "s2": 0}), ("a", {"s1": 2, "s3": 3}), ("b", {"s2": 3, "s3": 0}), ("b", {"s2": 1})):
        time.sleep(0.003)
        tell(tmp_path, labels, replica=replica)
        if between:
            compact(tmp_path)
    compact(tmp_path)
    assert stored_labels(tmp_path) == {"s1": 2, "s2": 1, "s3": 0}


def test_an_older_truth_that_waited_elsewhere_does_not_come_back(tmp_path: Path) -> None:
    put(tmp_path, row("s1"))
    tell(tmp_path, {"s1": 1}, replica="b")
    time.sleep(0.003)
    tell(tmp_path, {"s1": 2}, replica="a")
    away = inbox_path(tmp_path, "b")
    away.rename(tmp_path / "away")  # its volume was not mounted
    compact(tmp_path)
    (tmp_path / "away").rename(away)
    done = compact(tmp_path)
    assert (done.labelled, done.unmatched) == (0, 0) and stored_labels(tmp_path) == {"s1": 2}


def test_one_id_of_two_edges_is_two_samples(tmp_path: Path) -> None:
    put(tmp_path, row("s1"), row("s1", edge_id="edge-2"))
    tell(tmp_path, {"s1": 3}, edge_id="edge-2")
    compact(tmp_path)
    table = pq.read_table(tmp_path / "parquet").to_pylist()
    assert {r["edge_id"]: r["label"] for r in table} == {"edge-1": None, "edge-2": 3}


@pytest.mark.parametrize("late", [False, True])
def test_a_truth_is_of_its_label_space(tmp_path: Path, late: bool) -> None:
    """The same id means another label there. Nothing that is told in it hides what is told in the row's own."""
    put(tmp_path, row("s1"), row("s2"), row("s3"))
    if late:
        compact(tmp_path)
    tell(tmp_path, {"s1": 2, "s2": 2}, label_space="other labels")
    tell(tmp_path, {"s2": 1, "s3": 1})
    tell(tmp_path, {"s3": 2}, label_space="other labels")
    done = compact(tmp_path)
    assert (done.labelled, done.unmatched) == (2, 3) and stored_labels(tmp_path) == {"s1": None, "s2": 1, "s3": 1}


def test_a_late_truth_touches_its_part_alone_and_there_its_label_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_server.compact, "_GROUP", 4)
    put(tmp_path, *(row(f"a{i}", hint_arm=HintArm.CANDIDATES if i % 2 else HintArm.NONE, p_hint=0.98) for i in range(10)))
    compact(tmp_path, force=True)
    put(tmp_path, row("b"))
    compact(tmp_path)
    before, table = parts(tmp_path), pq.read_table(next(iter(sorted((tmp_path / "parquet").iterdir()))))
    tell(tmp_path, {"a3": 1, "a8": 0})
    assert compact(tmp_path).rewritten == 1
    after = parts(tmp_path)
    assert sorted(after) == sorted(before)
    changed = [name for name in before if before[name] != after[name]]
    assert changed == [sorted(before)[0]]
    again = pq.read_table(tmp_path / "parquet" / changed[0])
    assert again.drop_columns(["label"]).equals(table.drop_columns(["label"]))
    assert again["label"].to_pylist() == [None, None, None, 1, None, None, None, None, 0, None]
    tell(tmp_path, {"a3": 1})
    assert compact(tmp_path).rewritten == 0 and parts(tmp_path) == after, "what a part holds already is not written again"
    assert read_stats(tmp_path).inboxes[0].labels == 0


@pytest.mark.slow
def test_rewriting_keeps_the_row_groups_and_the_memory(tmp_path: Path) -> None:
    store = TeacherStore(tmp_path, "0")
    for start in range(0, 20_000, 2000):
        store.commit([row(f"s{i}", text="word " * 60) for i in range(start, start + 2000)]).result()
    compact(tmp_path)
    store.tell("edge-1", cloud_kit.SPACE, {f"s{i}": i % 4 for i in range(0, 20_000, 10)}).result()
    store.close()
    tracemalloc.start()
    assert compact(tmp_path).labelled == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    (part,) = (tmp_path / "parquet").glob("*.parquet")
    metadata = pq.read_metadata(part)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [8192, 8192, 3616]
    assert {key: label for key, label in stored_labels(tmp_path).items() if label is not None} == {
        f"s{i}": i % 4 for i in range(0, 20_000, 10)
    }
    assert peak < 30 * 2**20


@pytest.mark.parametrize("late", [False, True])
def test_what_is_told_while_compaction_writes_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    put(tmp_path, row("s1"))
    if late:
        compact(tmp_path)
    store = TeacherStore(tmp_path, "0")
    store.tell("edge-1", cloud_kit.SPACE, {"s1": 1}).result()
    plain = PartWriter.publish

    def publish(writer: PartWriter) -> None:
        plain(writer)
        store.tell("edge-1", cloud_kit.SPACE, {"s1": 2}).result()

    monkeypatch.setattr(PartWriter, "publish", publish)
    compact(tmp_path)
    assert stored_labels(tmp_path) == {"s1": 1}
    monkeypatch.setattr(PartWriter, "publish", plain)
    compact(tmp_path)
    store.close()
    assert stored_labels(tmp_path) == {"s1": 2}


def test_a_truth_waits_for_the_teachers_logits_with_its_row(tmp_path: Path) -> None:
    put(tmp_path, row("s1", hint_arm=HintArm.CANDIDATES))
    tell(tmp_path, {"s1": 1})
    assert compact(tmp_path).unmatched == 1
    age_labels(tmp_path, days=40)
    assert compact(tmp_path).dropped == 0, "its row is here, and only waits"
    assert compact(tmp_path, force=True).labelled == 1
    assert stored_labels(tmp_path) == {"s1": 1}


def age_labels(root: Path, days: float) -> None:
    with apsw.Connection(str(root / "inbox-0.db")) as db:
        db.execute("UPDATE labels SET received_ms = received_ms - ?1, compacted_ms = compacted_ms - ?1", (round(days * 86_400_000),))


def test_a_truth_without_a_row_is_dropped_after_a_month_and_counted(tmp_path: Path) -> None:
    tell(tmp_path, {"stayed local": 1})
    age_labels(tmp_path, days=29)
    assert compact(tmp_path).dropped == 0
    age_labels(tmp_path, days=2)
    done = compact(tmp_path)
    assert (done.dropped, done.unmatched) == (1, 0)
    assert read_stats(tmp_path).inboxes[0].labels == 0


def test_merged_truths_leave_the_inbox_after_the_retention(tmp_path: Path) -> None:
    put(tmp_path, row("s1"))
    tell(tmp_path, {"s1": 1})
    compact(tmp_path)
    age_labels(tmp_path, days=8)
    compact(tmp_path)
    with apsw.Connection(str(tmp_path / "inbox-0.db")) as db:
        assert db.execute("SELECT count(*) FROM labels").fetchall() == [(0,)]
    assert stored_labels(tmp_path) == {"s1": 1}


def test_dry_run_says_what_it_would_do_and_does_nothing(tmp_path: Path) -> None:
    put(tmp_path, row("s1"))
    compact(tmp_path)
    put(tmp_path, row("s2"))
    tell(tmp_path, {"s1": 1, "s2": 2, "s3": 3})
    before = parts(tmp_path)
    said = compact(tmp_path, dry_run=True)
    assert (said.written, said.labelled, said.rewritten, said.unmatched) == (1, 2, 1, 1)
    assert parts(tmp_path) == before and read_stats(tmp_path).inboxes[0].labels == 3
    assert msgspec.structs.replace(compact(tmp_path), parts=1) == said


def test_an_inbox_of_the_first_release_is_brought_up_to_date(tmp_path: Path) -> None:
    old_inbox(tmp_path, "s1", "s2")
    assert read_stats(tmp_path).inboxes[0].waiting == 2
    assert compact(tmp_path, dry_run=True).written == 2
    with contextlib.closing(TeacherStore(tmp_path, "0")) as store:
        assert list(store.lookup("edge-1", ["s1"]).result()) == ["s1"]
        assert store.commit([row("s1"), row("s3", p_hint=0.75)]).result()[0] is not None
        store.tell("edge-1", cloud_kit.SPACE, {"s2": 3}).result()
    compact(tmp_path)
    found = {r["sample_id"]: (r["p_hint"], r["label"]) for r in pq.read_table(tmp_path / "parquet").to_pylist()}
    assert found == {"s1": (None, None), "s2": (None, 3), "s3": (0.75, None)}


def test_compaction_alone_brings_an_old_inbox_up_to_date(tmp_path: Path) -> None:
    """A first release's server may still serve beside it."""
    old_inbox(tmp_path, "s1")
    others = (
        "received_ms, purpose, p_escalate, task_id, label_space, bundle_id, payload_hash, confidence, answer_logits, hint_arm, teacher_id"
    )
    with contextlib.closing(apsw.Connection(str(inbox_path(tmp_path, "0")))) as serving:
        assert compact(tmp_path).written == 1
        names = f"(edge_id, sample_id, prompt_id, {others})"
        serving.execute(f"INSERT INTO rows {names} SELECT edge_id, 's2', prompt_id, {others} FROM rows")
    assert compact(tmp_path, force=True).written == 1


def test_a_file_that_is_no_inbox_is_said_so(tmp_path: Path) -> None:
    inbox_path(tmp_path, "0").write_bytes(b"no database " * 400)
    with pytest.raises(StoreError, match="can't be opened"):
        TeacherStore(tmp_path, "0")


def old_part(root: Path) -> Path:
    """Takes the columns of today out of the store's only part."""
    (part,) = (root / "parquet").glob("*.parquet")
    table = pq.read_table(part)
    pq.write_table(table.drop_columns(list(ADDED)), part)
    return part


def test_a_part_of_the_first_release_is_read_as_null_and_takes_truths(tmp_path: Path) -> None:
    put(tmp_path, row("s1"), row("s2"))
    compact(tmp_path)
    part = old_part(tmp_path)
    (table,) = read_columns(part, ("sample_id", "p_hint", "label"))
    assert table.to_pylist() == [{"sample_id": name, "p_hint": None, "label": None} for name in ("s1", "s2")]
    put(tmp_path, row("s1"), row("s3"), replica="b")
    assert compact(tmp_path).repeated == 1
    tell(tmp_path, {"s2": 2})
    compact(tmp_path)
    assert pq.read_schema(part).names == list(COLUMNS) == SCHEMA.names
    assert stored_labels(tmp_path) == {"s1": None, "s2": 2, "s3": None}


def test_a_part_that_lacks_any_other_column_is_damaged(tmp_path: Path) -> None:
    put(tmp_path, row("s1"))
    compact(tmp_path)
    (part,) = (tmp_path / "parquet").glob("*.parquet")
    pq.write_table(pq.read_table(part).drop_columns(["text"]), part)
    tell(tmp_path, {"s1": 1})
    with pytest.raises(StoreError, match="no column 'text'"):
        compact(tmp_path)
    assert read_stats(tmp_path).inboxes[0].labels == 1


def test_a_damaged_byte_stops_the_rewriting_and_the_truth_stays(tmp_path: Path) -> None:
    put(tmp_path, row("s1", text="needle " * 2))
    compact(tmp_path)
    (part,) = (tmp_path / "parquet").glob("*.parquet")
    pq.write_table(pq.read_table(part), part, compression="none", use_dictionary=False, write_page_checksum=True)
    damaged = part.read_bytes().replace(b"needle needle", b"needle noodle")
    part.write_bytes(damaged)
    tell(tmp_path, {"s1": 1})
    with pytest.raises(StoreError, match="can't be read"):
        compact(tmp_path)
    assert part.read_bytes() == damaged and read_stats(tmp_path).inboxes[0].labels == 1


Step = tuple[str, str, int, int]


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["commit", "commit hinted", "tell", "tell", "compact", "force"]),
            st.sampled_from("ab"),
            st.integers(0, 3),
            st.integers(0, 3),
        ),
        max_size=20,
    )
)
@settings(max_examples=25, deadline=None)
def test_any_order_of_rows_truths_and_compactions_ends_with_the_last_truth_in_each_row(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step]
) -> None:
    root = tmp_path_factory.mktemp("any")
    stores = {name: TeacherStore(root, name) for name in "ab"}
    samples, truths = set(), dict[str, int]()
    for action, replica, number, label in steps:
        name = f"s{number}"
        if action.startswith("commit"):
            arm = HintArm.CANDIDATES if action == "commit hinted" else HintArm.NONE
            stores[replica].commit([row(name, hint_arm=arm)]).result()
            samples.add(name)
        elif action == "tell":
            time.sleep(0.002)  # two replicas' truths of one millisecond have no order
            stores[replica].tell("edge-1", cloud_kit.SPACE, {name: label}).result()
            truths[name] = label
        else:
            compact(root, force=action == "force")
    compact(root, force=True)
    for store in stores.values():
        store.close()
    assert stored_labels(root) == {name: truths.get(name) for name in samples}
    assert len(cloud_kit.stored_keys(root)) == len(samples)
