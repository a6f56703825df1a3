"""Group commit: what was acknowledged is on the disk; one failing work doesn't take others along; a full file isn't an end."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import apsw
import pytest

from kcm.database import Database
from kcm.errors import StoreError

SCHEMA = "CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, v BLOB)"


def count(database: Database) -> int:
    return database.submit(lambda c: c.execute("SELECT count(*) FROM t").fetchall()[0][0]).result(10)  # type: ignore[return-value]


def insert(database: Database, key: int, value: bytes = b""):  # type: ignore[no-untyped-def]
    return database.submit(lambda c: c.execute("INSERT INTO t VALUES (?, ?)", (key, value)).fetchall())


def test_one_failing_work_leaves_its_neighbours_committed(tmp_path: Path) -> None:
    database = Database(tmp_path / "a.db", SCHEMA)
    futures = [insert(database, key) for key in (1, 2, 2, 3)]
    assert [isinstance(f.exception(10), StoreError) for f in futures] == [False, False, True, False]
    assert count(database) == 3
    database.close()
    database.close()
    assert isinstance(insert(database, 9).exception(1), StoreError)


def test_a_full_database_says_so_and_can_still_delete(tmp_path: Path) -> None:
    database = Database(tmp_path / "a.db", SCHEMA, max_bytes=2**20)
    failed = None
    for key in range(64):
        failed = insert(database, key, bytes(2**16)).exception(10)
        if failed:
            break
    assert isinstance(failed, StoreError)
    assert "full" in str(failed)
    held = count(database)
    assert held > 4
    database.submit(lambda c: c.execute("DELETE FROM t WHERE id = 0").fetchall()).result(10)
    insert(database, 100, bytes(2**15)).result(10)
    assert count(database) == held
    database.close()


def test_a_file_that_is_no_database_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreError, match="can't be opened"):
        Database(tmp_path / "a.db", SCHEMA)


@pytest.mark.fault
def test_acknowledged_rows_survive_kill_9(tmp_path: Path) -> None:
    """The child prints a key only after its future resolved; it is killed while it writes."""
    child = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        from kcm.database import Database
        database = Database(Path(sys.argv[1]), {SCHEMA!r})
        pending = []
        for key in range(10**6):
            write = lambda c, key=key: c.execute("INSERT INTO t VALUES (?, ?)", (key, b"x" * 100)).fetchall()
            pending.append((key, database.submit(write)))
            if len(pending) == 64:
                for done, future in pending:
                    future.result()
                    print(done, flush=True)
                pending = []
        """
    )
    for trial in range(5):
        path = tmp_path / f"{trial}.db"
        process = subprocess.Popen([sys.executable, "-c", child, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(200 + 37 * trial)]
        os.kill(process.pid, signal.SIGKILL)
        lines += process.stdout.read().splitlines()
        process.stdout.close()
        process.wait()
        acknowledged = {int(line) for line in lines if line.strip().isdigit()}
        assert len(acknowledged) >= 200
        held = {row[0] for row in apsw.Connection(str(path)).execute("SELECT id FROM t")}
        # The last line may have been cut in mid-number by the kill; a number that was printed whole must be held.
        assert acknowledged - held <= {int(lines[-1])}
