"""Progress on stderr: a live line on a terminal, one line a step elsewhere; and what is left when Ctrl-C ends a verb."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Steps:
    """Call it with what is being done. Nothing is written where `quiet`."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet, self._started = quiet, time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def __call__(self, text: str) -> None:
        if not self._quiet:
            sys.stderr.write(f"[{self.seconds:6.1f} s] {text}\n")
            sys.stderr.flush()


@contextmanager
def left_behind(what: str) -> Iterator[None]:
    """Ctrl-C inside carries word of what is left to `main`, which prints it; the innermost block's word counts."""
    try:
        yield
    except KeyboardInterrupt as cut:
        if not cut.args:
            cut.args = (what,)
        raise
