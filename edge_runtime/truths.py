"""Truths that wait for the cloud, durable, in a table of the spool's file: what Feedback acknowledged survives kill -9 and a power cut.

One sample_id is one row, the last truth about it. Full: the oldest make room, and are counted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import NamedTuple, TypeVar, cast

import apsw
import msgspec

from kcm.database import Database
from kcm.errors import StoreError

SCHEMA = """
CREATE TABLE IF NOT EXISTS truths (
  seq INTEGER PRIMARY KEY,
  sample_id TEXT NOT NULL UNIQUE,
  label_id INTEGER NOT NULL,
  task_id TEXT NOT NULL,
  label_space TEXT NOT NULL,
  created_ms INTEGER NOT NULL  -- UTC
);
"""
_ROW_BYTES = 256  # with its index entry, of a usual id
_FEWEST = 1024
R = TypeVar("R")


class Truth(msgspec.Struct, frozen=True, kw_only=True):
    """A label that an application knows to be right."""

    sample_id: str
    label_id: int
    task_id: str
    label_space: str


class _Change(NamedTuple):
    waiting: int = 0
    dropped: int = 0


class Truths:
    """The table. `waiting` is of the file; `dropped`, of this process's life: lost since the table or the file was full."""

    def __init__(self, database: Database, *, max_bytes: int, max_pages: int) -> None:
        """
        Args:
            max_bytes: about what the table may take.
            max_pages: of the whole file; the oldest truths go before it says that it is full.

        Raises:
            StoreError: the table can't be read.
        """
        self._db = database
        self.most = max(_FEWEST, max_bytes // _ROW_BYTES)
        self._max_pages = max_pages
        self.waiting = self.dropped = 0
        self._apply(database.submit(_count)).result()

    async def put(self, rows: Sequence[Truth]) -> int:
        """Take in `rows`; returns after the commit.

        Returns:
            How many older truths had to make room.

        Raises:
            StoreError: nothing was taken in: the commit failed, or there are more rows than the table holds.
        """
        if len(rows) > self.most:
            raise StoreError(f"{len(rows)} truths at once, at most {self.most} are kept")
        return (await self._done(self._apply(self._db.submit(lambda connection: self._insert(connection, rows))))).dropped

    async def take(self, limit: int, *, skip: Collection[tuple[str, str]] = ()) -> list[Truth]:
        """Up to `limit` truths of one task, oldest first. They stay until `settle`.

        Args:
            skip: (task_id, label_space) that must wait.
        """
        return await self._done(self._db.submit(lambda connection: _take(connection, limit, skip)))

    async def settle(self, rows: Sequence[Truth]) -> None:
        """Drop what the cloud has, or will never take; one commit. A truth that was corrected meanwhile stays.

        Raises:
            StoreError: the commit failed. They are sent once more, which changes nothing in the cloud.
        """
        await self._done(self._apply(self._db.submit(lambda connection: _settle(connection, rows))))

    async def _done(self, future: Future[R]) -> R:
        # shield: a caller that goes away must not cancel a commit under way
        return await asyncio.shield(asyncio.wrap_future(future))

    def _apply(self, future: Future[_Change]) -> Future[_Change]:
        """Count `future`'s change once it is committed. Runs on the file's own thread."""

        def done(finished: Future[_Change]) -> None:
            if finished.exception() is None:
                self.waiting += finished.result().waiting
                self.dropped += finished.result().dropped

        future.add_done_callback(done)
        return future

    def _insert(self, connection: apsw.Connection, rows: Sequence[Truth]) -> _Change:
        before = _number(connection)
        dropped = 0
        now_ms = time.time_ns() // 1_000_000
        for row in rows:
            while _used_pages(connection) >= self._max_pages and _drop_oldest(connection, 1):
                dropped += 1
            connection.execute(
                "INSERT OR REPLACE INTO truths (sample_id, label_id, task_id, label_space, created_ms) VALUES (?, ?, ?, ?, ?)",
                (row.sample_id, row.label_id, row.task_id, row.label_space, now_ms),
            )
        if (over := _number(connection) - self.most) > 0:
            dropped += _drop_oldest(connection, over)
        return _Change(waiting=_number(connection) - before, dropped=dropped)


def _number(connection: apsw.Connection) -> int:
    return cast("int", connection.execute("SELECT count(*) FROM truths").fetchall()[0][0])


def _count(connection: apsw.Connection) -> _Change:
    return _Change(waiting=_number(connection))


def _drop_oldest(connection: apsw.Connection, number: int) -> int:
    connection.execute("DELETE FROM truths WHERE seq IN (SELECT seq FROM truths ORDER BY seq LIMIT ?)", (number,))
    return connection.changes()


def _take(connection: apsw.Connection, limit: int, skip: Collection[tuple[str, str]]) -> list[Truth]:
    skipped = " AND NOT (task_id = ? AND label_space = ?)" * len(skip)
    query = f"SELECT sample_id, label_id, task_id, label_space FROM truths WHERE 1{skipped} ORDER BY seq LIMIT ?"  # noqa: S608
    rows: list[Truth] = []
    for sample_id, label_id, task_id, label_space in connection.execute(query, (*(name for pair in skip for name in pair), limit)):
        if rows and (task_id, label_space) != (rows[0].task_id, rows[0].label_space):
            break
        rows.append(Truth(sample_id=str(sample_id), label_id=cast("int", label_id), task_id=str(task_id), label_space=str(label_space)))
    return rows


def _settle(connection: apsw.Connection, rows: Sequence[Truth]) -> _Change:
    gone = 0
    for row in rows:
        connection.execute(
            "DELETE FROM truths WHERE sample_id = ? AND label_id = ? AND label_space = ?", (row.sample_id, row.label_id, row.label_space)
        )
        gone += connection.changes()
    return _Change(waiting=-gone)


def _used_pages(connection: apsw.Connection) -> int:
    pages, free = (cast("int", connection.execute(f"PRAGMA {name}").fetchall()[0][0]) for name in ("page_count", "freelist_count"))
    return pages - free
