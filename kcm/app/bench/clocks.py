"""CPU time rather than wall time: what a busy machine gives to others doesn't count."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from kcm.errors import UnavailableError

_TURNS = 10


def in_turn(calls: Mapping[str, Callable[[], object]], count: int) -> dict[str, float]:
    """CPU µs of this thread per call, by name. They take turns, ten each, `count` calls in all."""
    taken = dict.fromkeys(calls, 0.0)
    each = max(1, count // _TURNS)
    for _ in range(_TURNS):
        for name, call in calls.items():
            began = time.thread_time()
            for _ in range(each):
                call()
            taken[name] += time.thread_time() - began
    return {name: seconds / (each * _TURNS) * 1e6 for name, seconds in taken.items()}


def cpu_seconds(pid: int) -> float:
    """User and system time of another process so far, all threads, to the nanosecond (psutil and /proc count hundredths).

    Raises:
        UnavailableError: this system has no such clock (POSIX clock_getcpuclockid; Linux has).
    """
    clock = ctypes.c_int()
    get = getattr(ctypes.CDLL(None), "clock_getcpuclockid", None)
    if get is None or get(pid, ctypes.byref(clock)):
        raise UnavailableError("this system doesn't tell the CPU time of another process", fix="run kcm bench edge on Linux")
    return time.clock_gettime(clock.value)


def rss_mb(pid: int) -> float:
    """Resident memory in MB (10⁶ bytes)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
