"""SIGKILL of a compaction at every write, fsync, rename and transaction: nothing lost, nothing twice, run again and it is done.

"Nothing" is rows and truths: those that come with their row, and those whose part must be written again.

Run as a script, this file is the killed process's parent: it forks before pyarrow or SQLite start threads.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROWS = 60
RANDOM_KILLS = int(os.environ.get("KCM_FAULT_TRIALS", "8"))


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def fill(root: Path) -> None:
    """Rows over two inboxes; every fifth is in both, every seventh waits for teacher logits, the first third is in two parts.

    Every second one has a truth, a third of those a later one in the other inbox.
    """
    import time

    from cloud_kit import put, row, tell

    import cloud_server.compact as compaction
    from kcm.sample import HintArm

    compaction._GROUP, compaction._PART = 5, 10
    for first, last in ((0, ROWS // 3), (ROWS // 3, ROWS)):
        for replica, start in (("a", 0), ("b", 1)):
            wanted = [i for i in range(first, last) if i % 2 == start or i % 5 == 0]
            put(root, *(row(f"s{i}", hint_arm=HintArm.CANDIDATES if i % 7 == 0 else HintArm.NONE) for i in wanted), replica=replica)
        if first == 0:
            compaction.compact(root, force=True)
    tell(root, {f"s{i}": i % 3 for i in range(0, ROWS, 2)}, replica="a")
    time.sleep(0.005)
    tell(root, {f"s{i}": 3 for i in range(0, ROWS, 6)}, replica="b")


def expected_labels() -> dict[str, int | None]:
    return {f"s{i}": None if i % 2 else 3 if i % 6 == 0 else i % 3 for i in range(ROWS)}


def compact_and_die(root: Path, at: int, mutant: str) -> None:
    """Compact; SIGKILL before the `at`-th step that reaches the disk."""
    import pathlib

    import cloud_server.compact as compaction
    import cloud_server.parts as parts
    from kcm.database import Database

    steps = 0

    def killing(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    os.fsync, pathlib.Path.rename, Database.submit = killing(os.fsync), killing(pathlib.Path.rename), killing(Database.submit)
    parts.PartWriter.write = killing(parts.PartWriter.write)  # type: ignore[method-assign]
    compaction._GROUP, compaction._PART, compaction._CHUNK = 8, 24, 3
    mutate(compaction, mutant)
    compaction.compact(root, force=True)


def mutate(compaction: Any, mutant: str) -> None:
    if mutant == "mark first":  # marks the rows, then publishes the part

        def finish(writer: Any, pending: Any, databases: Any) -> None:
            for group in pending:
                compaction._mark(databases, group)
            writer.publish()

        compaction._finish = finish
    elif mutant == "mark truths first":  # marks the truths, then writes their parts again
        rewrite = compaction.truths.rewrite_parts

        def early(index: Any, databases: Any, parts: Any) -> None:
            compaction.truths.mark(databases, index.execute("SELECT inbox, seq FROM truths WHERE state = 'part'").fetchall())
            rewrite(index, databases, parts)

        compaction.truths.rewrite_parts = early
    elif mutant == "new name":  # writes a part again beside the old one, which it then deletes
        plain, unlink = compaction.truths.PartWriter, Path.unlink

        class Beside(plain):  # type: ignore[misc, valid-type]
            def __init__(self, folder: Path, replaces: Path) -> None:
                super().__init__(folder)
                self._old = replaces

            def publish(self) -> None:
                super().publish()
                os.fsync(os.open(self._final.parent, os.O_RDONLY))  # a step that a kill may come before
                unlink(self._old)

        compaction.truths.PartWriter = Beside
    elif mutant == "blind":  # doesn't look at what the parts hold already
        compaction.read_keys = lambda path: iter(())


def finish(root: Path, mutant: str, result: Path) -> None:
    import cloud_kit

    import cloud_server.compact as compaction

    mutate(compaction, mutant)
    compaction.compact(root, force=True)
    waiting = sum(inbox.waiting for inbox in compaction.read_stats(root).inboxes)
    left = [path.name for path in (root / "parquet").iterdir() if path.suffix != ".parquet"]
    keys = [key[1] for key in cloud_kit.stored_keys(root)]
    untold = sum(inbox.labels for inbox in compaction.read_stats(root).inboxes)
    result.write_text(
        json.dumps({"keys": keys, "waiting": waiting, "left": left, "labels": cloud_kit.stored_labels(root), "untold": untold})
    )


def main(folder: Path, mutant: str, random_kills: int) -> None:
    import cloud_kit  # noqa: F401 (imported before the forks, so that a child is at work at once)

    import cloud_server.compact  # noqa: F401

    rng, kills, under_way, lost, twice, wrong = random.Random(0), 0, 0, 0, 0, 0
    expected = expected_labels()
    fork(lambda: fill(folder / "filled"))
    shutil.copytree(folder / "filled", folder / "whole")
    before = {path.name for path in (folder / "filled" / "parquet").iterdir()}
    started = time.monotonic()
    fork(lambda: compact_and_die(folder / "whole", 0, mutant))
    whole_s = time.monotonic() - started
    at = 0
    while True:
        at += 1
        root, result = folder / f"store-{at}", folder / f"result-{at}.json"
        shutil.copytree(folder / "filled", root)
        if random_kills:
            child = os.fork()
            if child == 0:
                compact_and_die(root, 0, mutant)
                os._exit(0)
            time.sleep(rng.uniform(0.1, 1.0) * whole_s)
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        else:
            status = fork(lambda root=root, at=at: compact_and_die(root, at, mutant))
        killed = os.WIFSIGNALED(status)
        under_way += killed and {path.name for path in (root / "parquet").iterdir()} != before
        assert killed or os.WEXITSTATUS(status) == 0
        assert fork(lambda root=root, result=result: finish(root, mutant, result)) == 0
        got = json.loads(result.read_text())
        kills += killed
        lost += len(set(expected) - set(got["keys"]))
        wrong += sum(got["labels"].get(name) != label for name, label in expected.items())
        twice += len(got["keys"]) - len(set(got["keys"]))
        assert (got["waiting"], got["untold"], got["left"]) == (0, 0, []) or mutant
        if at == random_kills or (not random_kills and not killed):
            break
    print(json.dumps({"kills": kills, "under_way": under_way, "lost": lost, "twice": twice, "wrong": wrong}))


def run(folder: Path, mutant: str = "", random_kills: int = 0) -> dict[str, int]:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__, str(folder), mutant, str(random_kills)],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, int] = json.loads(done.stdout)
    return result


@pytest.mark.slow
@pytest.mark.fault
def test_a_compaction_killed_at_any_step_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result["kills"] >= 40, "too few steps were hit to mean anything"
    assert (result["lost"], result["twice"], result["wrong"]) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.fault
def test_a_compaction_killed_at_any_moment_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    result = run(tmp_path, random_kills=RANDOM_KILLS)
    assert result["under_way"] >= RANDOM_KILLS // 4, "too few kills hit the work to mean anything"
    assert (result["lost"], result["twice"], result["wrong"]) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize(
    ("mutant", "harm"), [("mark first", "lost"), ("blind", "twice"), ("mark truths first", "wrong"), ("new name", "twice")]
)
def test_the_kills_catch_a_compaction_in_the_wrong_order(tmp_path: Path, mutant: str, harm: str) -> None:
    assert run(tmp_path, mutant)[harm] > 0, "the mutant did no harm: the kills are blind"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
