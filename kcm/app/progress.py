"""Progress on stderr: a live line on a terminal, one line a step elsewhere."""

from __future__ import annotations

import sys
import time


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
