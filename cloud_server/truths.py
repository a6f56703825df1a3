"""The truths' way into the rows: what compaction does with the inboxes' `labels`.

The last truth about a sample becomes its row's `label`. One that comes with its row or before it is written with the row.
For one that comes later, the part that holds the row is written again and takes the old one's place in one rename. Only then
is the truth marked in its inbox: killed in between, the next run finds the part with that label already, and marks it.
So a reader needs no join. It costs one part's rewriting per run and part that has news, a row group in memory at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import pyarrow as pa

from cloud_server.parts import FIELDS, SCHEMA, PartWriter, read_columns
from kcm.database import Database

_CHUNK = 1024  # truths per transaction on an inbox that a server may be writing
_UNMATCHED_MS = 30 * 86_400_000  # an edge's spool may send a row late; most truths without one are of samples that stayed local

# state: '' has news; 'row' its row is written in this run; 'part' its part must be written again; 'there' its part holds it
# already; 'old' a later truth holds; 'merged' was marked by an earlier run, and stands here to outdo older ones.
INDEX = """
CREATE TABLE truths (
    inbox INTEGER, seq INTEGER, edge_id TEXT, sample_id TEXT, label_space TEXT, label_id INTEGER, received_ms INTEGER,
    state TEXT, part TEXT,
    PRIMARY KEY (inbox, seq)
) WITHOUT ROWID;
CREATE INDEX truths_key ON truths (edge_id, sample_id, label_space);
CREATE INDEX truths_part ON truths (state, part);
"""


class Truth(NamedTuple):
    inbox: int
    seq: int
    label_id: int


class Plan(NamedTuple):
    """What a run will do: truths that go into a row, parts to write again, truths whose row hasn't come."""

    labelled: int
    parts: int
    unmatched: int


def load(index: apsw.Connection, inbox: int, db: apsw.Connection) -> None:
    """All truths of one inbox; an older kcm's has none."""
    if _has_table(db):
        index.executemany(
            "INSERT INTO truths (inbox, seq, edge_id, sample_id, label_space, label_id, received_ms, state)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                (inbox, *row)
                for row in db.execute(
                    "SELECT seq, edge_id, sample_id, label_space, label_id, received_ms, iif(compacted_ms IS NULL, '', 'merged')"
                    " FROM labels"
                )
            ),
        )


def keep_last(index: apsw.Connection) -> None:
    """Of what several inboxes say about a sample, the last holds."""
    index.execute(
        "UPDATE truths SET state = 'old' WHERE state = '' AND EXISTS (SELECT 1 FROM truths AS o WHERE o.edge_id = truths.edge_id"
        " AND o.sample_id = truths.sample_id AND o.label_space = truths.label_space"
        " AND (o.received_ms, o.inbox) > (truths.received_ms, truths.inbox))"
    )


def match(index: apsw.Connection, part: str, rows: Iterable[tuple[str, str, str, int | None]]) -> None:
    """Find the truths about rows of a part: (edge_id, sample_id, label_space, label)."""
    index.executemany(
        "UPDATE truths SET part = ?, state = iif(label_id IS ?, 'there', 'part')"
        " WHERE edge_id = ? AND sample_id = ? AND label_space = ? AND state = ''",
        ((part, label, edge_id, sample_id, label_space) for edge_id, sample_id, label_space, label in rows),
    )


def plan(index: apsw.Connection) -> Plan:
    """Settle which truths go with rows that this run writes."""
    index.execute(
        "UPDATE truths SET state = 'row' WHERE state = '' AND EXISTS (SELECT 1 FROM waiting WHERE waiting.edge_id = truths.edge_id"
        " AND waiting.sample_id = truths.sample_id AND waiting.label_space = truths.label_space AND waiting.state = 'write')"
    )
    counts: Any = index.execute(
        "SELECT count(*) FILTER (WHERE state IN ('row', 'part')), count(DISTINCT part) FILTER (WHERE state = 'part'),"
        " count(*) FILTER (WHERE state = '') FROM truths"
    ).fetchall()[0]
    return Plan(*counts)


def find(index: apsw.Connection, edge_id: str, sample_id: str, label_space: str) -> Truth | None:
    """The truth to write into this row."""
    found: Any = index.execute(
        "SELECT inbox, seq, label_id FROM truths WHERE edge_id = ? AND sample_id = ? AND label_space = ? AND state IN ('row', 'part')",
        (edge_id, sample_id, label_space),
    ).fetchall()
    return Truth(*found[0]) if found else None


def rewrite_parts(index: apsw.Connection, databases: Sequence[Database], parts: Sequence[Path]) -> None:
    """Write parts with news again, and mark their truths; then those that need no writing.

    Raises:
        StoreError: a part can't be read. OSError: the folder can't be written.
    """
    for path in parts:
        news: Any = index.execute("SELECT inbox, seq FROM truths WHERE state = 'part' AND part = ?", (path.name,)).fetchall()
        if news:
            _rewrite(index, path)  # before the marks: marked and not published would be lost
            mark(databases, news)
    done: Any = index.execute("SELECT inbox, seq FROM truths WHERE state IN ('there', 'old')")
    mark(databases, done)


def mark(databases: Sequence[Database], told: Iterable[tuple[int, int]]) -> None:
    """Merged: (inbox, seq) of truths. One that was told anew meanwhile has another seq, and stays."""
    _each(databases, told, "UPDATE labels SET compacted_ms = ? WHERE seq = ?", time.time_ns() // 1_000_000)


def drop_unmatched(index: apsw.Connection, databases: Sequence[Database]) -> int:
    """Delete truths whose row hasn't come for a month, in any inbox. Returns their number."""
    oldest = time.time_ns() // 1_000_000 - _UNMATCHED_MS
    found: Any = index.execute(
        "SELECT inbox, seq FROM truths WHERE state = '' AND received_ms < ? AND NOT EXISTS (SELECT 1 FROM waiting"
        " WHERE waiting.edge_id = truths.edge_id AND waiting.sample_id = truths.sample_id)",
        (oldest,),
    ).fetchall()
    _each(databases, found, "DELETE FROM labels WHERE seq = ?")
    return len(found)


def count_waiting(db: apsw.Connection) -> int:
    """Truths of an inbox that no part holds yet."""
    if not _has_table(db):
        return 0
    count: Any = db.execute("SELECT count(*) FROM labels WHERE compacted_ms IS NULL").fetchall()[0][0]
    return int(count)


def count_labelled(part: Path) -> int:
    """Rows of a part that have a truth. Raises StoreError where it can't be read."""
    return sum(table.num_rows - table["label"].null_count for table in read_columns(part, ("label",), rows=65_536))


def _rewrite(index: apsw.Connection, path: Path) -> None:
    """The same rows in the same order, with the labels of today."""
    place = FIELDS.index("label")
    with PartWriter(path.parent, replaces=path) as writer:
        for table in read_columns(path, FIELDS):
            keys = zip(*(table[name].to_pylist() for name in ("edge_id", "sample_id", "label_space")), strict=True)
            labels = [
                truth.label_id if (truth := find(index, *key)) else before
                for key, before in zip(keys, table["label"].to_pylist(), strict=True)
            ]
            writer.write_table(table.set_column(place, SCHEMA.field(place), pa.array(labels, SCHEMA.field(place).type)))
        writer.publish()


def _each(databases: Sequence[Database], told: Iterable[tuple[int, int]], sql: str, *first: int) -> None:
    """Run `sql` with (*first, seq) in each truth's inbox."""
    rest = iter(told)
    while chunk := list(islice(rest, _CHUNK)):
        for number, database in enumerate(databases):
            if values := [(*first, seq) for inbox, seq in chunk if inbox == number]:
                database.submit(partial(_run_many, sql, values)).result()


def _run_many(sql: str, values: Sequence[tuple[int, ...]], db: apsw.Connection) -> None:
    db.executemany(sql, values)


def _has_table(db: apsw.Connection) -> bool:
    return bool(db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'labels'").fetchall())
