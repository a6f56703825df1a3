"""A durable SQLite file with group commit: the edge's spool and the cloud's inbox stand on it.

WAL with synchronous=FULL: a commit that returned survives kill -9 and a power cut. One thread owns the connection and
commits all work that waits in one transaction, so that the fsync (about 4 ms) is shared. apsw brings its own current
SQLite; the standard library's may carry the WAL-reset bug.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar, cast

import apsw

from kcm.errors import StoreError

T = TypeVar("T")
Work = Callable[[apsw.Connection], object]
_MAX_GROUP = 256


class Database:
    """Runs `Work` in order on the file's own thread, each inside a savepoint of one shared transaction."""

    def __init__(self, path: Path, schema: str, *, max_bytes: int | None = None) -> None:
        """Open or create the file and run `schema` (idempotent DDL).

        Args:
            max_bytes: the file never grows past this: a full database says so before the disk is full, and can still delete.

        Raises:
            StoreError: the folder can't be written, or the file is no database or is damaged.
        """
        self._path, self._schema, self._max_bytes = path, schema, max_bytes
        self._queue: queue.SimpleQueue[tuple[Work, Future[object]] | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = self._open()
        except (apsw.Error, OSError) as error:
            raise StoreError(f"{path} can't be opened: {error}", fix="check the disk, its free space and the folder's owner") from error
        self._thread = threading.Thread(target=self._run, name=f"db:{path.name}", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[apsw.Connection], T]) -> Future[T]:
        """Queue `work`; the future resolves after the commit that holds it, with StoreError where that failed."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # a waiter that goes away can't cancel it: the commit happens, and its thread lives on
        with self._lock:
            if self._closed:
                future.set_exception(StoreError(f"{self._path} is closed"))
                return future
            self._queue.put((work, cast("Future[object]", future)))
        return future

    def close(self) -> None:
        """Finish what is queued, then close. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _open(self) -> apsw.Connection:
        connection = apsw.Connection(str(self._path))
        connection.set_busy_timeout(10_000)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        if self._max_bytes is not None:
            page = cast("int", connection.execute("PRAGMA page_size").fetchall()[0][0])
            connection.execute(f"PRAGMA max_page_count={max(64, self._max_bytes // page)}")
        connection.execute(self._schema).fetchall()  # apsw stops at the first row, which a PRAGMA gives
        return connection

    def _run(self) -> None:
        while True:
            group = self._take()
            if group:
                self._commit([item for item in group if item is not None])
            if group and group[-1] is None:
                self._connection.close()
                return

    def _take(self) -> list[tuple[Work, Future[object]] | None]:
        """The next item, and whatever else already waits behind it."""
        group = [self._queue.get()]
        while group[-1] is not None and len(group) < _MAX_GROUP:
            try:
                group.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return group

    def _commit(self, group: list[tuple[Work, Future[object]]]) -> None:
        results: list[tuple[Future[object], object, Exception | None]] = []
        try:
            # IMMEDIATE: a group that reads first and then writes would fail at once where another process wrote in between.
            self._connection.execute("BEGIN IMMEDIATE")
            for work, future in group:
                try:
                    with self._connection:  # a savepoint: one failing work doesn't take the group along
                        results.append((future, work(self._connection), None))
                except apsw.IOError:
                    raise
                except Exception as error:
                    results.append((future, None, error))
            self._connection.execute("COMMIT")
        except apsw.Error as error:
            failure = StoreError(f"{self._path}: commit failed: {error}")
            failure.__cause__ = error  # an owner may tell damage from a full disk
            for _, future in group:
                future.set_exception(failure)
            self._reopen()
            return
        for future, value, failed in results:
            if failed is None:
                future.set_result(value)
            else:
                if isinstance(failed, apsw.Error):
                    wrapped = StoreError(f"{self._path}: {failed}")
                    wrapped.__cause__ = failed
                    failed = wrapped
                future.set_exception(failed)

    def _reopen(self) -> None:
        """After a failed fsync the page cache can't be trusted: read the file anew, never retry on it."""
        try:
            self._connection.close(True)
            self._connection = self._open()
        except apsw.Error:
            pass  # the next commit fails and tries again
