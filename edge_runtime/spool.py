"""Samples that wait for the cloud, durable: what was acknowledged DEGRADED survives kill -9 and a power cut.

A row holds the PredictSample as it will be sent. One sample_id is one row. Full: the sample with the highest confidence
(it teaches least) makes room, and is counted; a row that the cloud refused for good goes before any other, then the explored ones,
whose answers nobody missed. They are sent last, too. The truths that wait lie in the same file, see truths.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import apsw
import msgspec

from edge_runtime import truths
from edge_runtime.truths import Truths
from kcm.database import Database
from kcm.errors import StoreError
from protos.kcm.v1 import cloud_pb2

log = logging.getLogger("kcm.edge.spool")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS spool (
  seq INTEGER PRIMARY KEY,
  sample_id TEXT NOT NULL UNIQUE,
  dead INTEGER NOT NULL,        -- 1: refused by the cloud for good; kept to be looked at, never sent
  confidence REAL NOT NULL,     -- C_x; of an explored sample 1 + C_x
  attempts INTEGER NOT NULL,    -- refusals of this very sample; _LATER more of an explored one
  created_ms INTEGER NOT NULL,  -- UTC
  task_id TEXT NOT NULL,
  label_space TEXT NOT NULL,
  bundle_id TEXT NOT NULL,
  reason TEXT NOT NULL,
  body BLOB NOT NULL            -- kcm.v1.PredictSample
);
CREATE INDEX IF NOT EXISTS spool_drain ON spool (dead, attempts, created_ms);
CREATE INDEX IF NOT EXISTS spool_evict ON spool (dead, confidence);
"""
_PAGE = 4096
_ROW_OVERHEAD = 512  # columns, index entries
_TAKE_BYTES = 4 * 2**20
_RESERVE_PAGES = 8  # so that deleting always has room
_LATER = 1_000_000
_TRUTHS = 1 / 16  # of the file
R = TypeVar("R")


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """One sample that waits, with the task it belongs to."""

    sample: cloud_pb2.PredictSample
    task_id: str
    label_space: str
    reason: str = ""
    dead: bool = False


class _Change(NamedTuple):
    """What one commit did to the counts."""

    waiting: int = 0
    dead: int = 0
    evicted: int = 0
    used: int = -1  # bytes; -1: unknown
    lost: tuple[str, ...] = ()  # sample_ids that were not taken in


class Spool:
    """The file. Counts are of this process's life, but `waiting` and `dead`, which are of the file."""

    def __init__(self, path: Path, *, max_bytes: int) -> None:
        """Raises StoreError where the file can't be opened or is damaged."""
        self._max_pages = max(64, max_bytes // _PAGE)
        self._sample_pages = self._max_pages - _RESERVE_PAGES - int(_TRUTHS * self._max_pages)
        # A small write-ahead log, so that file and log together stay near the cap.
        checkpoint = max(16, min(1000, self._max_pages // 8))
        pragmas = f"PRAGMA wal_autocheckpoint={checkpoint}; PRAGMA journal_size_limit={checkpoint * _PAGE};"
        self._db = Database(path, pragmas + _SCHEMA + truths.SCHEMA, max_bytes=max_bytes)
        self.waiting = self.dead = self.evicted = self.used = 0
        try:
            self._apply(self._db.submit(_count)).result()
            self.truths = Truths(self._db, max_bytes=int(_TRUTHS * max_bytes), max_pages=self._max_pages - _RESERVE_PAGES)
        except StoreError:
            self._db.close()
            raise

    @classmethod
    def open(cls, path: Path, *, max_bytes: int) -> Spool:
        """As the constructor, but a damaged file is set aside for a person to look at: it must not keep the daemon from serving.

        Raises:
            StoreError: it can't be opened for another reason (rights, a full disk).
        """
        try:
            return cls(path, max_bytes=max_bytes)
        except StoreError as error:
            if not isinstance(error.__cause__, (apsw.NotADBError, apsw.CorruptError)):
                raise
            aside = path.with_name(f"{path.name}.damaged-{time.time_ns() // 1_000_000}")
            log.error("%s; it is kept as %s, and an empty spool begins", error.message, aside)
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
            return cls(path, max_bytes=max_bytes)

    async def put(self, rows: Sequence[Waiting]) -> tuple[str, ...]:
        """Take in `rows`; returns after the commit. A sample_id that is there already is not touched.

        Returns:
            The sample_ids that did not fit: each of lower value than all that is kept.

        Raises:
            StoreError: the commit failed; nothing was taken in.
        """
        change = await self._done(self._apply(self._db.submit(lambda connection: self._insert(connection, rows))))
        return change.lost

    async def take(self, limit: int, *, skip: Collection[tuple[str, str]] = ()) -> list[Waiting]:
        """Up to `limit` samples of one task in 4 MiB, at least one; fewest refusals first, then oldest; explored ones after all others.

        They stay until `settle`.

        Args:
            skip: (task_id, label_space) that must wait.
        """
        return await self._done(self._db.submit(lambda connection: _take(connection, limit, skip)))

    async def settle(self, *, stored: Sequence[str] = (), again: Sequence[str] = (), dead: Sequence[str] = (), reason: str = "") -> None:
        """Drop what the cloud has stored, count a refusal of `again`, never send `dead` any more; one commit.

        Raises:
            StoreError: the commit failed. What was stored is sent once more: the cloud knows the ids.
        """
        await self._done(self._apply(self._db.submit(lambda connection: self._settle(connection, stored, again, dead, reason))))

    def close(self) -> None:
        self._db.close()

    async def _done(self, future: Future[R]) -> R:
        # shield: a caller that goes away must not cancel a commit under way
        return await asyncio.shield(asyncio.wrap_future(future))

    def _apply(self, future: Future[_Change]) -> Future[_Change]:
        """Count `future`'s change once it is committed, whoever still waits for it. Runs on the file's own thread."""

        def done(finished: Future[_Change]) -> None:
            if finished.exception() is None:
                change = finished.result()
                self.waiting += change.waiting
                self.dead += change.dead
                self.evicted += change.evicted
                if change.used >= 0:
                    self.used = change.used

        future.add_done_callback(done)
        return future

    def _insert(self, connection: apsw.Connection, rows: Sequence[Waiting]) -> _Change:
        waiting = dead = evicted = 0
        lost: list[str] = []
        for row in rows:
            sample = row.sample
            if connection.execute("SELECT 1 FROM spool WHERE sample_id = ?", (sample.sample_id,)).fetchone():
                continue
            body = sample.SerializeToString()
            need = len(body) + _ROW_OVERHEAD
            explored = sample.purpose == cloud_pb2.EXPLORE
            confidence = sample.confidence + explored
            room = _make_room(connection, need, row.dead, confidence, self._sample_pages)
            evicted += room.waiting + room.dead
            waiting -= room.waiting
            dead -= room.dead
            if not room.enough:
                evicted += 1
                lost.append(sample.sample_id)
                continue
            attempts = int(row.dead) + _LATER * explored
            values = (room.slot, sample.sample_id, int(row.dead), confidence, attempts, time.time_ns() // 1_000_000)
            connection.execute(
                "INSERT INTO spool VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*values, row.task_id, row.label_space, sample.bundle_id, row.reason, body),
            )
            waiting += not row.dead
            dead += row.dead
        return _Change(waiting=waiting, dead=dead, evicted=evicted, used=_used_pages(connection) * _PAGE, lost=tuple(lost))

    def _settle(
        self, connection: apsw.Connection, stored: Sequence[str], again: Sequence[str], dead: Sequence[str], reason: str
    ) -> _Change:
        gone = died = 0
        for sample_id in stored:
            gone += _changed(connection, "DELETE FROM spool WHERE sample_id = ? AND dead = 0", (sample_id,))
        for sample_id in again:
            _changed(connection, "UPDATE spool SET attempts = attempts + 1, reason = ? WHERE sample_id = ?", (reason, sample_id))
        for sample_id in dead:
            died += _changed(connection, "UPDATE spool SET dead = 1, reason = ? WHERE sample_id = ? AND dead = 0", (reason, sample_id))
        return _Change(waiting=-gone - died, dead=died, used=_used_pages(connection) * _PAGE)


class _Room(NamedTuple):
    enough: bool
    waiting: int  # rows evicted, by state
    dead: int
    slot: int | None  # an evicted row's place: the new row fills the hole in its page


def _make_room(connection: apsw.Connection, need: int, dead: bool, confidence: float, pages: int) -> _Room:
    """Evict from the lowest value up until `need` bytes fit into `pages`, but nothing of higher value than the new row."""
    waiting_gone = dead_gone = 0
    slot: int | None = None
    while _used_pages(connection) + -(-need // _PAGE) > pages:
        victim = connection.execute("SELECT seq, dead, confidence FROM spool ORDER BY dead DESC, confidence DESC LIMIT 1").fetchone()
        if victim is None or (victim[1], victim[2]) <= (int(dead), confidence):
            return _Room(False, waiting_gone, dead_gone, None)
        slot = cast("int", victim[0])
        connection.execute("DELETE FROM spool WHERE seq = ?", (slot,))
        waiting_gone += not victim[1]
        dead_gone += victim[1]
        # Small rows share pages: the one that was freed has room for the new row, though no page came free.
        if need <= _PAGE // 2 and _used_pages(connection) <= pages + _RESERVE_PAGES // 2:
            break
    return _Room(True, waiting_gone, dead_gone, slot)


def _used_pages(connection: apsw.Connection) -> int:
    pages, free = (cast("int", connection.execute(f"PRAGMA {name}").fetchall()[0][0]) for name in ("page_count", "freelist_count"))
    return pages - free


def _take(connection: apsw.Connection, limit: int, skip: Collection[tuple[str, str]]) -> list[Waiting]:
    rows: list[Waiting] = []
    size = 0
    skipped = " AND NOT (task_id = ? AND label_space = ?)" * len(skip)
    query = f"SELECT task_id, label_space, reason, body FROM spool WHERE dead = 0{skipped} ORDER BY attempts, created_ms, seq LIMIT ?"  # noqa: S608
    for task_id, label_space, reason, body in connection.execute(query, (*(name for pair in skip for name in pair), limit)):
        size += len(body)
        if rows and ((task_id, label_space) != (rows[0].task_id, rows[0].label_space) or size > _TAKE_BYTES):
            break
        sample = cloud_pb2.PredictSample.FromString(body)
        rows.append(Waiting(sample=sample, task_id=str(task_id), label_space=str(label_space), reason=str(reason)))
    return rows


def _changed(connection: apsw.Connection, statement: str, values: tuple[str, ...]) -> int:
    connection.execute(statement, values)
    return connection.changes()


def _count(connection: apsw.Connection) -> _Change:
    counts = {state: cast("int", rows) for state, rows in connection.execute("SELECT dead, count(*) FROM spool GROUP BY dead")}
    return _Change(waiting=counts.get(0, 0), dead=counts.get(1, 0), used=_used_pages(connection) * _PAGE)
