"""What a person sees while documents stream: a live line on a terminal, a line a quarter elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from kcm.app.demo.traffic import Pass, Watch
from kcm.sample import Source


@contextmanager
def watching(title: str, truth: NDArray[np.int64]) -> Iterator[Watch]:
    """A `watch` for `stream`: share answered locally, by the cloud and degraded, and the accuracy so far."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description:22}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
        with Progress(*columns, console=console) as bar:
            job = bar.add_task(title, total=len(truth), state="")
            yield lambda done: bar.update(job, completed=len(done), state=_state(done, truth))
        return
    quarters = iter((1, 2, 3, 4))
    next_at = next(quarters)

    def line(done: Pass) -> None:
        nonlocal next_at
        if len(done) * 4 >= next_at * done.total:
            console.print(f"  {title}: {len(done)}/{done.total}  {_state(done, truth)}", highlight=False)
            next_at = next(quarters, 5)

    yield line


def _state(done: Pass, truth: NDArray[np.int64]) -> str:
    n = len(done)
    degraded = done.count(Source.DEGRADED)
    text = f"local {done.count(Source.LOCAL) / n:4.0%}  cloud {done.count(Source.CLOUD) / n:4.0%}  accuracy {done.right(truth).mean():5.1%}"
    return text + (f"  degraded {degraded}" if degraded else "")
