"""Fills teacher_logits of rows that were answered under a hint: the same payloads again, without it, when nobody waits."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence

from cloud_server.batcher import Batcher, Closed, ModelFailed, Overloaded, Unreadable, Urgency
from cloud_server.metrics import CloudMetrics
from cloud_server.store import TeacherStore, Unfilled
from kcm.errors import StoreError

_log = logging.getLogger(__name__)


async def fill_when_idle(
    store: TeacherStore, batcher: Batcher, teacher_id: str, *, batch: int, metrics: CloudMetrics | None = None, pause_s: float = 1.0
) -> None:
    """Runs until cancelled. A batch at a time, so that a live call waits for one batch at most.

    A batch that the model fails on, or can't read, is tried row by row; the row that it fails on alone is passed over until the next
    start.
    """
    limit, after = batch, 0
    while True:
        rows: list[Unfilled] = []
        try:
            if batcher.idle:
                rows = await asyncio.wrap_future(store.unfilled(teacher_id, limit, after))
                await fill(store, batcher, rows, metrics)
                limit = batch
        except (ModelFailed, Unreadable):
            if len(rows) == 1:
                after = rows[0].seq
                _log.error("a row's teacher logits can't be computed; it is passed over", extra={"seq": after})
            limit = 1
        except Closed:
            return
        except (StoreError, Overloaded) as error:
            _log.warning("teacher logits could not be filled", extra={"cause": type(error).__name__})
            rows = []
        if not rows:
            await asyncio.sleep(pause_s)


async def fill(store: TeacherStore, batcher: Batcher, rows: Sequence[Unfilled], metrics: CloudMetrics | None = None) -> None:
    """Score `rows` without a hint, store the result, and count the answers that the hint had changed.

    Raises:
        StoreError, ModelFailed, Unreadable, Overloaded, Closed: as the store and the batcher do.
    """
    if rows:
        scores = await batcher.submit([row.payload for row in rows], [None] * len(rows), deadline=math.inf, urgency=Urgency.FILL)
        await asyncio.wrap_future(store.fill([(row.seq, scores[place]) for place, row in enumerate(rows)]))
        if metrics is not None:
            changed = sum(int(scores[place].argmax()) != row.answer for place, row in enumerate(rows))
            metrics.on_pairs(len(rows), changed)
