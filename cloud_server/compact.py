"""Inboxes → STORE/parquet/*.parquet, each (edge_id, sample_id) exactly once; of several commits the first wins.

What makes it exact, whenever it is killed: a part appears whole (temporary file, fsync, rename, fsync of the folder) before
its rows are marked in the inbox, and a row whose key stands in a part is never written again. So a kill in between costs
nothing but the marking, which the next run makes up for. Truths likewise (truths.py). One run at a time holds a lock on the store.

Memory is bounded by one row group: keys are resolved in a SQLite scratch file, rows are read group by group.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import msgspec
import pyarrow.parquet as pq

from cloud_server import truths
from cloud_server.parts import FIELDS, PartWriter, part_files, read_keys, remove_unfinished
from cloud_server.store import open_inbox
from kcm.database import Database
from kcm.errors import StoreError
from kcm.lock import exclusive

_CHUNK = 1024  # rows per transaction on an inbox that a server may be writing
_GROUP = 8192  # rows per Parquet row group, where there are as many
_PART = 64 * _GROUP
_GROUP_BYTES = 64 * 2**20  # of payloads, beyond which a row group ends: 8192 photos would be gigabytes
_PART_BYTES = 2**30

# The truth stands in a table of its own: a row has none until its label is looked up.
_SELECT = f"SELECT {', '.join('NULL' if name == 'label' else name for name in FIELDS)} FROM rows WHERE seq = ?"  # noqa: S608 (our own names)
_LABEL = FIELDS.index("label")
_PAYLOADS = tuple(FIELDS.index(name) for name in ("text", "image"))
_LABEL_KEY = tuple(FIELDS.index(name) for name in ("edge_id", "sample_id", "label_space"))
_INDEX = """
CREATE TABLE waiting (
    inbox INTEGER, seq INTEGER, edge_id TEXT, sample_id TEXT, label_space TEXT, received_ms INTEGER, filled INTEGER,
    state TEXT DEFAULT '',
    PRIMARY KEY (inbox, seq)
) WITHOUT ROWID;
CREATE INDEX by_key ON waiting (edge_id, sample_id);
CREATE INDEX by_state ON waiting (state, inbox, seq);
"""
# Of each key the earliest commit is the row; it is written once its teacher logits are there, and the others are repeats of it.
_CHOOSE = """
UPDATE waiting SET state = 'write' WHERE state = '' AND (filled OR ?) AND NOT EXISTS (
    SELECT 1 FROM waiting AS o WHERE o.edge_id = waiting.edge_id AND o.sample_id = waiting.sample_id
    AND (o.received_ms, o.inbox) < (waiting.received_ms, waiting.inbox));
"""
_REPEATS = """
UPDATE waiting SET state = 'repeat' WHERE state = '' AND EXISTS (
    SELECT 1 FROM waiting AS o WHERE o.edge_id = waiting.edge_id AND o.sample_id = waiting.sample_id AND o.state = 'write');
"""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What one run did, in rows; the last four lines in truths."""

    written: int
    parts: int
    repeated: int  # marked without being written: their key is in a part already
    unfilled: int  # left in the inboxes for want of teacher logits
    purged: int  # deleted from the inboxes, past the retention
    labelled: int  # written with their row, or into a part that held the row already
    rewritten: int  # parts written again for them
    unmatched: int  # left in the inboxes: their row hasn't come
    dropped: int  # deleted from the inboxes: their row hasn't come in a month


class InboxStats(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    waiting: int
    unfilled: int
    compacted: int
    labels: int  # truths that no part holds yet


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of a store. Waiting ones of several inboxes may be the same sample."""

    compacted: int
    labelled: int  # of those
    parts: int
    bytes: int
    inboxes: tuple[InboxStats, ...]


def compact(root: Path, *, force: bool = False, retain_days: float = 7.0, dry_run: bool = False) -> Report:
    """Move what waits in all inboxes of `root` into Parquet parts, and purge rows compacted more than `retain_days` ago.

    Args:
        force: write rows whose teacher_logits are null, too.

    Raises:
        StoreError: no store, another compaction runs, a file is damaged, or the disk is full.
    """
    inboxes = _inboxes(root)
    with _locked(root), _scratch_index() as index:
        parts = root / "parquet"
        try:
            if not dry_run:
                remove_unfinished(parts)
            return _compact(index, inboxes, parts, force=force, retain_days=retain_days, dry_run=dry_run)
        except (apsw.Error, OSError) as error:
            raise StoreError(f"{root} can't be compacted: {error}", fix="check the disk and its free space, then run it again") from error


def read_stats(root: Path) -> Stats:
    """Count the rows of a store.

    Raises:
        StoreError: no store, or a damaged file.
    """
    found = []
    for path in _inboxes(root):
        try:
            with contextlib.closing(_reader(path)) as db:
                waiting, unfilled, compacted = db.execute(
                    "SELECT count(*) FILTER (WHERE compacted_ms IS NULL),"
                    " count(*) FILTER (WHERE compacted_ms IS NULL AND teacher_logits IS NULL),"
                    " count(*) FILTER (WHERE compacted_ms IS NOT NULL) FROM rows"
                ).fetchall()[0]
                labels = truths.count_waiting(db)
        except apsw.Error as error:
            raise StoreError(f"{path} can't be read: {error}") from error
        counts = {"waiting": waiting, "unfilled": unfilled, "compacted": compacted, "labels": labels}
        found.append(msgspec.convert({"name": path.stem, **counts}, InboxStats))
    parts = part_files(root / "parquet")
    try:
        rows = sum(pq.read_metadata(part).num_rows for part in parts)
    except (OSError, ValueError) as error:
        raise StoreError(f"a part of {root} can't be read: {error}") from error
    labelled = sum(truths.count_labelled(part) for part in parts)
    size = sum(part.stat().st_size for part in parts)
    return Stats(compacted=rows, labelled=labelled, parts=len(parts), bytes=size, inboxes=tuple(found))


def _compact(index: apsw.Connection, inboxes: Sequence[Path], parts: Path, *, force: bool, retain_days: float, dry_run: bool) -> Report:
    with contextlib.ExitStack() as stack:
        databases = []
        for path in () if dry_run else inboxes:
            databases.append(open_inbox(path))  # first of all: it brings an older kcm's inbox up to date
            stack.callback(databases[-1].close)
        _fill_index(index, inboxes, parts)
        index.execute(_CHOOSE, (force,))
        index.execute(_REPEATS)
        states: list[Any] = index.execute("SELECT state, count(*) FROM waiting GROUP BY state").fetchall()
        count: dict[str, int] = dict(states)
        told = truths.plan(index)
        made, dropped, purged = -(-count.get("write", 0) // _PART), 0, 0
        if not dry_run:
            made = _write_parts(index, inboxes, databases, parts)
            for chunk in _pages(index, "repeat", _CHUNK):
                _mark(databases, chunk)
            truths.rewrite_parts(index, databases, part_files(parts))
            dropped = truths.drop_unmatched(index, databases)
            cutoff = time.time_ns() // 1_000_000 - round(retain_days * 86_400_000)
            purged = sum(_purge(database, cutoff) for database in databases)
        return Report(
            written=count.get("write", 0),
            parts=made,
            repeated=count.get("repeat", 0),
            unfilled=count.get("", 0),
            purged=purged,
            labelled=told.labelled,
            rewritten=told.parts,
            unmatched=told.unmatched - dropped,
            dropped=dropped,
        )


def _fill_index(index: apsw.Connection, inboxes: Sequence[Path], parts: Path) -> None:
    """All rows and truths that wait; rows whose key stands in a part become repeats."""
    for number, path in enumerate(inboxes):
        with contextlib.closing(_reader(path)) as db, index:
            index.executemany(
                "INSERT INTO waiting (inbox, seq, edge_id, sample_id, label_space, received_ms, filled) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    (number, *row)
                    for row in db.execute(
                        "SELECT seq, edge_id, sample_id, label_space, received_ms, teacher_logits IS NOT NULL"
                        " FROM rows WHERE compacted_ms IS NULL"
                    )
                ),
            )
            truths.load(index, number, db)
    truths.keep_last(index)
    if not index.execute("SELECT EXISTS (SELECT 1 FROM waiting) OR EXISTS (SELECT 1 FROM truths WHERE state = '')").fetchall()[0][0]:
        return
    for path in part_files(parts):
        for rows in read_keys(path):
            with index:
                index.executemany("UPDATE waiting SET state = 'repeat' WHERE edge_id = ? AND sample_id = ?", (row[:2] for row in rows))
                truths.match(index, path.name, rows)


def _write_parts(index: apsw.Connection, inboxes: Sequence[Path], databases: Sequence[Database], parts: Path) -> int:
    """Write every chosen row; mark a part's rows once it is there. Returns the number of parts."""
    made = 0
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(contextlib.closing(_reader(path))) for path in inboxes]
        writer: PartWriter | None = None
        pending = _Pending([], [])
        for rows, group in _groups(index, readers):
            writer = writer or stack.enter_context(PartWriter(parts))
            writer.write(rows)
            pending.rows.extend(group.rows)
            pending.truths.extend(group.truths)
            if writer.rows >= _PART or writer.bytes >= _PART_BYTES:
                _finish(writer, pending, databases)
                writer, pending, made = None, _Pending([], []), made + 1
        if writer is not None:
            _finish(writer, pending, databases)
            made += 1
    return made


class _Pending(NamedTuple):
    """What a part under way, or a row group of it, holds: (inbox, seq) of its rows, and of the truths in them."""

    rows: list[tuple[int, int]]
    truths: list[tuple[int, int]]


def _groups(index: apsw.Connection, readers: Sequence[apsw.Connection]) -> Iterator[tuple[list[list[Any]], _Pending]]:
    """Every chosen row's values, a row group at a time, with what they are."""
    rows, group, size = list[list[Any]](), _Pending([], []), 0
    for inbox, seq in (key for page in _pages(index, "write", _GROUP) for key in page):
        rows.append(_read_row(index, readers[inbox], seq, group.truths))
        group.rows.append((inbox, seq))
        size += sum(len(rows[-1][place] or "") for place in _PAYLOADS)
        if len(rows) >= _GROUP or size >= _GROUP_BYTES:
            yield rows, group
            rows, group, size = [], _Pending([], []), 0
    if rows:
        yield rows, group


def _finish(writer: PartWriter, pending: _Pending, databases: Sequence[Database]) -> None:
    writer.publish()  # before the marks: marked and not published would be lost
    for start in range(0, len(pending.rows), _CHUNK):
        _mark(databases, pending.rows[start : start + _CHUNK])
    truths.mark(databases, pending.truths)


def _pages(index: apsw.Connection, state: str, size: int) -> Iterator[list[tuple[int, int]]]:
    """(inbox, seq) of all rows in this state, `size` at a time."""
    last: tuple[Any, Any] = (-1, -1)
    while page := index.execute(
        "SELECT inbox, seq FROM waiting WHERE state = ? AND (inbox, seq) > (?, ?) ORDER BY inbox, seq LIMIT ?", (state, *last, size)
    ).fetchall():
        rows: list[Any] = list(page)
        yield rows
        last = rows[-1]


def _read_row(index: apsw.Connection, reader: apsw.Connection, seq: int, used: list[tuple[int, int]]) -> list[Any]:
    """One row's values in the order of parts.FIELDS, with its truth, whose (inbox, seq) goes to `used`."""
    row: list[Any] = list(reader.execute(_SELECT, (seq,)).fetchall()[0])
    edge_id, sample_id, label_space = (row[place] for place in _LABEL_KEY)
    if truth := truths.find(index, edge_id, sample_id, label_space):
        row[_LABEL] = truth.label_id
        used.append((truth.inbox, truth.seq))
    return row


def _mark(databases: Sequence[Database], rows: Sequence[tuple[int, int]]) -> None:
    """Compacted: the payload goes, the answer stays for resends."""
    now = time.time_ns() // 1_000_000
    for number, database in enumerate(databases):
        values = [(now, seq) for inbox, seq in rows if inbox == number]
        if not values:
            continue

        def write(db: apsw.Connection, values: list[tuple[int, int]] = values) -> None:
            db.executemany(
                "UPDATE rows SET compacted_ms = ?, text = NULL, image = NULL, small_logits = NULL, teacher_logits = NULL WHERE seq = ?",
                values,
            )

        database.submit(write).result()


def _purge(database: Database, cutoff_ms: int) -> int:
    def delete(db: apsw.Connection) -> int:
        db.execute(
            "DELETE FROM rows WHERE seq IN (SELECT seq FROM rows WHERE compacted_ms IS NOT NULL AND compacted_ms < ? LIMIT ?)",
            (cutoff_ms, _CHUNK),
        )
        return db.changes()

    total = 0
    while gone := database.submit(delete).result():
        total += gone
    database.submit(lambda db: db.execute("DELETE FROM labels WHERE compacted_ms < ?", (cutoff_ms,)).fetchall()).result()
    return total


def _inboxes(root: Path) -> list[Path]:
    found = sorted(root.glob("inbox-*.db"))
    # Parts without an inbox are a store too: rows that were carried here from another machine.
    if not found and not part_files(root / "parquet"):
        why = "it holds no inbox and no Parquet part" if root.is_dir() else "the folder does not exist"
        raise StoreError(f"{root} is no teacher store: {why}", fix="give the folder that `kcm cloud --store` writes")
    return found


def _locked(root: Path) -> contextlib.AbstractContextManager[None]:
    return exclusive(root / "compact.lock", taken=f"another compaction of {root} runs", fix="wait for it to end, then run this again")


def _reader(path: Path) -> apsw.Connection:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)  # not READONLY: WAL keeps its index in a file
    connection.set_busy_timeout(10_000)
    return connection


@contextlib.contextmanager
def _scratch_index() -> Iterator[apsw.Connection]:
    """A temporary database on disk, which SQLite itself removes."""
    with contextlib.closing(apsw.Connection("")) as index:
        index.execute(_INDEX + truths.INDEX)
        yield index
