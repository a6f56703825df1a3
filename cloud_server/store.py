"""The teacher store's inbox: one SQLite file per replica, committed before the reply goes out.

UNIQUE (edge_id, sample_id), the first commit wins. A resend gets the answer that was stored, bit for bit, for as long as
the row is kept (compact.py clears its payload and, after a retention, the row).

Truths stand in a table of their own, since one may come before its row, or to another replica; the last about a sample holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import apsw
import msgspec
import numpy as np

from kcm.database import Database
from kcm.errors import ConfigError, StoreError
from kcm.lock import exclusive
from kcm.sample import Float32, HintArm, Payload

# Scores are float32 here, so that a resend carries the first reply's bytes; Parquet keeps float16.
SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    edge_id TEXT NOT NULL, sample_id TEXT NOT NULL, received_ms INTEGER NOT NULL,
    purpose INTEGER NOT NULL, p_escalate REAL NOT NULL, p_hint REAL,
    task_id TEXT NOT NULL, label_space TEXT NOT NULL, bundle_id TEXT NOT NULL,
    text TEXT, image BLOB, payload_hash BLOB NOT NULL, confidence REAL NOT NULL,
    small_logits BLOB, answer_logits BLOB NOT NULL, teacher_logits BLOB,
    hint_arm INTEGER NOT NULL, teacher_id TEXT NOT NULL, prompt_id TEXT NOT NULL,
    compacted_ms INTEGER,
    UNIQUE (edge_id, sample_id)
);
CREATE INDEX IF NOT EXISTS unfilled ON rows (seq) WHERE teacher_logits IS NULL AND compacted_ms IS NULL;
CREATE INDEX IF NOT EXISTS waiting ON rows (seq) WHERE compacted_ms IS NULL;
CREATE INDEX IF NOT EXISTS compacted ON rows (compacted_ms) WHERE compacted_ms IS NOT NULL;
CREATE TABLE IF NOT EXISTS labels (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    edge_id TEXT NOT NULL, sample_id TEXT NOT NULL, label_space TEXT NOT NULL,
    label_id INTEGER NOT NULL, received_ms INTEGER NOT NULL,
    compacted_ms INTEGER,
    UNIQUE (edge_id, sample_id, label_space)
);
CREATE INDEX IF NOT EXISTS merged ON labels (compacted_ms) WHERE compacted_ms IS NOT NULL;
"""
# Columns of `rows` that inboxes of an older kcm lack.
_ADDED = {"p_hint": "REAL"}
_REPLICA = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One answered sample, before it is committed. Logits are float32 [C] over the task's labels."""

    edge_id: str
    sample_id: str
    purpose: int
    p_escalate: float
    p_hint: float
    task_id: str
    label_space: str
    bundle_id: str
    payload: Payload
    confidence: float
    small_logits: Float32 | None
    answer_logits: Float32
    hint_arm: HintArm
    teacher_id: str
    prompt_id: str


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """What the store knows of a sample that was answered before."""

    payload_hash: bytes
    label_space: str
    teacher_id: str
    prompt_id: str
    hint_arm: HintArm
    answer_logits: Float32


class Unfilled(msgspec.Struct, frozen=True, kw_only=True):
    """A row that was answered under a hint and still lacks the teacher's own logits. `answer`: the label id that it was given."""

    seq: int
    payload: Payload
    answer: int


def inbox_path(root: Path, replica: str) -> Path:
    """Raises ConfigError where `replica` can't be part of a file name."""
    if not _REPLICA.fullmatch(replica):
        raise ConfigError(f"replica {replica!r} is no name", fix="use letters, digits, '.', '_' and '-', at most 64")
    return root / f"inbox-{replica}.db"


def open_inbox(path: Path, *, max_bytes: int | None = None) -> Database:
    """The inbox's file, made where it isn't there, and brought to this kcm's columns where an older one made it.

    Raises:
        StoreError: it can't be opened, or is damaged.
    """
    try:
        if path.exists():
            _migrate(path)
    except apsw.Error as error:
        raise StoreError(f"{path} can't be opened: {error}", fix="check the disk, its free space and the folder's owner") from error
    return Database(path, SCHEMA, max_bytes=max_bytes)


def hash_payload(payload: Payload) -> bytes:
    """16 bytes: tells a resend from another sample under a used id."""
    kind, data = (b"t", payload.encode("utf-8", "surrogatepass")) if isinstance(payload, str) else (b"i", payload)
    return hashlib.blake2b(kind + data, digest_size=16).digest()


class TeacherStore:
    """The inbox of one replica. Futures resolve after the commit, or with StoreError: then answer with stored=false."""

    def __init__(self, root: Path, replica: str, *, max_bytes: int | None = None) -> None:
        """Raises ConfigError for a bad replica name, StoreError where the file can't be opened or another process serves this replica."""
        path = inbox_path(root, replica)
        lock = exclusive(
            path.with_suffix(".lock"),
            taken=f"another kcm cloud is replica {replica!r} of {root}",
            fix="--replica NAME   gives each process its own inbox",
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock)
            self._database = open_inbox(path, max_bytes=max_bytes)
            stack.callback(self._database.close)
            self._held = stack.pop_all()

    def lookup(self, edge_id: str, sample_ids: Sequence[str]) -> Future[dict[str, Stored]]:
        """What is stored of these samples of one edge, by sample id."""
        wanted = tuple(sample_ids)
        return self._database.submit(lambda db: {i: found for i in wanted if (found := _find(db, edge_id, i)) is not None})

    def commit(self, rows: Sequence[Row]) -> Future[list[Stored | None]]:
        """Store all rows in one transaction. For each, the row that was there before and stays, or None where it is new."""
        wanted = tuple(rows)
        return self._database.submit(lambda db: [_insert(db, row) for row in wanted])

    def tell(self, edge_id: str, label_space: str, labels: Mapping[str, int]) -> Future[None]:
        """Keep the truth about samples of one edge: sample id → label id. What was told before about a sample is gone."""
        now = time.time_ns() // 1_000_000
        values = [(edge_id, sample_id, label_space, label_id, now) for sample_id, label_id in labels.items()]

        def write(db: apsw.Connection) -> None:
            # REPLACE gives a new seq: a compaction that read the old truth marks only that one.
            db.executemany(
                "INSERT OR REPLACE INTO labels (edge_id, sample_id, label_space, label_id, received_ms) VALUES (?, ?, ?, ?, ?)", values
            )

        return self._database.submit(write)

    def unfilled(self, teacher_id: str, limit: int, after: int = 0) -> Future[list[Unfilled]]:
        """The oldest rows past seq `after` that this teacher answered under a hint and that lack its logits without one."""

        def read(db: apsw.Connection) -> list[Unfilled]:
            found = db.execute(
                "SELECT seq, coalesce(text, image), answer_logits FROM rows WHERE teacher_logits IS NULL AND compacted_ms IS NULL"
                " AND coalesce(text, image) IS NOT NULL AND teacher_id = ? AND seq > ? ORDER BY seq LIMIT ?",
                (teacher_id, after, limit),
            )
            return [Unfilled(seq=seq, payload=payload, answer=_best(answer)) for seq, payload, answer in found]

        return self._database.submit(read)

    def fill(self, logits: Sequence[tuple[int, Float32]]) -> Future[None]:
        """Set teacher_logits of rows by seq; a row that was compacted meanwhile stays as it is."""
        values = [(_blob(row), seq) for seq, row in logits]

        def write(db: apsw.Connection) -> None:
            db.executemany("UPDATE rows SET teacher_logits = ? WHERE seq = ? AND teacher_logits IS NULL AND compacted_ms IS NULL", values)

        return self._database.submit(write)

    def close(self) -> None:
        """Commit what is queued, close, and let another process have this replica. Idempotent."""
        self._held.close()


def _find(db: apsw.Connection, edge_id: str, sample_id: str) -> Stored | None:
    found = db.execute(
        "SELECT payload_hash, label_space, teacher_id, prompt_id, hint_arm, answer_logits FROM rows WHERE edge_id = ? AND sample_id = ?",
        (edge_id, sample_id),
    ).fetchone()
    if found is None:
        return None
    payload_hash, label_space, teacher_id, prompt_id, arm, answer = found
    return Stored(
        payload_hash=payload_hash,
        label_space=label_space,
        teacher_id=teacher_id,
        prompt_id=prompt_id,
        hint_arm=HintArm(arm),
        answer_logits=np.frombuffer(answer, "<f4").astype(np.float32),
    )


def _insert(db: apsw.Connection, row: Row) -> Stored | None:
    answer = _blob(row.answer_logits)
    db.execute(
        "INSERT INTO rows (edge_id, sample_id, received_ms, purpose, p_escalate, p_hint, task_id, label_space, bundle_id, text, image,"
        " payload_hash, confidence, small_logits, answer_logits, teacher_logits, hint_arm, teacher_id, prompt_id)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (
            row.edge_id,
            row.sample_id,
            time.time_ns() // 1_000_000,
            row.purpose,
            row.p_escalate,
            row.p_hint,
            row.task_id,
            row.label_space,
            row.bundle_id,
            row.payload if isinstance(row.payload, str) else None,
            row.payload if isinstance(row.payload, bytes) else None,
            hash_payload(row.payload),
            row.confidence,
            None if row.small_logits is None else _blob(row.small_logits),
            answer,
            answer if row.hint_arm is HintArm.NONE else None,
            int(row.hint_arm),
            row.teacher_id,
            row.prompt_id,
        ),
    )
    return None if db.changes() else _find(db, row.edge_id, row.sample_id)


def _best(answer: bytes) -> int:
    return int(np.frombuffer(answer, "<f4").argmax())


def _blob(values: Float32) -> bytes:
    return values.astype("<f4", copy=False).tobytes()


def _migrate(path: Path) -> None:
    with contextlib.closing(apsw.Connection(str(path))) as db:
        db.set_busy_timeout(10_000)
        if not _missing(db):
            return
        db.execute("BEGIN IMMEDIATE")  # a server and a compaction may both have found it old
        for name in _missing(db):
            db.execute(f"ALTER TABLE rows ADD COLUMN {name} {_ADDED[name]}")
        db.execute("COMMIT")


def _missing(db: apsw.Connection) -> list[str]:
    """What this kcm would add to `rows`; nothing where the table isn't there yet."""
    columns: list[Any] = db.execute("SELECT name FROM pragma_table_info('rows')").fetchall()
    return [name for name in _ADDED if columns and (name,) not in columns]
