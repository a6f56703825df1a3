"""`kcm cloud` and `kcm edge` as the processes that a user would start."""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from kcm.errors import UnavailableError

_START_S = 60.0
_STOP_S = 20.0


@contextlib.contextmanager
def running(verb: str, *arguments: str, log: Path) -> Iterator[str]:
    """Run `kcm VERB …` until the block ends; yields the address it is ready on. Its log goes to a file.

    Raises:
        UnavailableError: it ended, or wasn't ready in time; the last line of its log says why.
    """
    command = [sys.executable, "-m", "kcm.app", verb, *arguments, "--json"]
    with started(command, f"kcm {verb}", log) as (_, address):
        yield address


@contextlib.contextmanager
def started(command: Sequence[str], name: str, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The same of any command that says {"ready": ADDRESS} on its first line; yields the process, too.

    Raises:
        UnavailableError: as `running`.
    """
    with log.open("ab") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        try:
            yield process, _ready(process, name, log)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _ready(process: subprocess.Popen[bytes], name: str, log: Path) -> str:
    assert process.stdout is not None
    end = time.monotonic() + _START_S
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while time.monotonic() < end:
            if selector.select(timeout=0.2):
                line = process.stdout.readline()
                if line:
                    return str(json.loads(line)["ready"])
                process.wait()
                last = (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
                raise UnavailableError(f"{name} ended with code {process.returncode}: {last}", fix=f"see {log}")
    raise UnavailableError(f"{name} wasn't ready within {_START_S:.0f} s", fix=f"see {log}")
