"""Truths that applications told (Feedback), out of the teacher store: labelled samples of the traffic itself.

What escalated is there whole, of what stayed local only what was explored by chance: each counts 1/p_escalate (Horvitz & Thompson
1952), so that together they look like the traffic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcm.errors import StoreError, require
from kcm.sample import Payload
from kcm.task import Task
from training.teacher_rows import counted, parts_of

Float32 = NDArray[np.float32]

_COLUMNS = ("task_id", "label_space", "teacher_id", "p_escalate", "text", "image", "teacher_logits", "label")


@dataclass(frozen=True)
class Truths:
    """Texts [N], their labels [N], the large model's logits [N, C] without a hint, and weights 1/p_escalate [N]."""

    payloads: Sequence[Payload]
    labels: NDArray[np.int64]
    large: Float32
    weights: Float32
    teacher_id: str

    @property
    def effective_n(self) -> float:
        """Of how many equal samples the weighted ones are worth (Kish 1965)."""
        return float(self.weights.sum() ** 2 / np.square(self.weights).sum())


def read_truths(store: Path, task: Task, fresh: Callable[[Payload], bool], teacher_id: str = "") -> Truths:
    """Rows of this task whose truth is known and whose large model's logits are filled.

    Args:
        fresh: says of a text that nothing was fitted on it.
        teacher_id: take only this teacher's rows; "" where the store holds one teacher.

    Raises:
        StoreError: no store, no such row, a damaged part, or rows of several teachers.
    """
    pyarrow = require("pyarrow", "train")
    told: list[dict[str, Any]] = []
    for part in parts_of(store):
        try:
            told += [row for row in _labelled(part) if (row["task_id"], row["label_space"]) == (task.id, task.label_space)]
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise StoreError(f"{part} can't be read: {error}", fix=f"kcm store compact {store}, or restore the file") from error
    rows = [row for row in told if teacher_id in ("", row["teacher_id"]) and fresh(row["payload"])]
    rows = list({row["payload"]: row for row in rows}.values())  # a sample that comes twice is no second witness
    teachers = sorted({row["teacher_id"] for row in rows})
    if not rows:
        raise _nothing(store, task, Counter(row["teacher_id"] for row in told), teacher_id)
    if len(teachers) > 1:
        raise StoreError(
            f"{store} holds rows of {len(teachers)} teachers: {', '.join(teachers)}", fix="give --large FOLDER: its rows are taken"
        )
    return Truths(
        payloads=[row["payload"] for row in rows],
        labels=np.array([row["label"] for row in rows], np.int64),
        large=np.array([row["teacher_logits"] for row in rows], np.float32),
        weights=np.array([1 / max(row["p_escalate"], 1e-3) for row in rows], np.float32),
        teacher_id=teachers[0],
    )


def _nothing(store: Path, task: Task, told: Counter[str], teacher_id: str) -> StoreError:
    """Why there is no truth to read, from what was told about answers of which teacher."""
    more = f"tell the edge with Feedback(sample_id, label), then kcm store compact {store}"
    if not told:
        return StoreError(f"{store} holds no truth about samples of task {task.id} with labels {task.label_space}", fix=more)
    if teacher_id and teacher_id not in told:
        said = f"{store} holds no truth about samples that {teacher_id} answered, but about those of {counted(told)}"
        return StoreError(said, fix="--large FOLDER of that teacher; or no --store")
    said = f"{store} holds no truth that is new: the runs were fitted on the texts of {counted(told)}, or may be"
    return StoreError(said, fix=more)


def _labelled(part: Path) -> list[dict[str, Any]]:
    """The rows of a part that carry truth, payload and logits; none in parts of an older kcm, which have no such column."""
    import pyarrow.compute as pc
    from pyarrow import parquet

    found: list[dict[str, Any]] = []
    with parquet.ParquetFile(part, page_checksum_verification=True, pre_buffer=False) as file:
        if "label" not in file.schema_arrow.names:
            return found
        for batch in file.iter_batches(1024, columns=list(_COLUMNS), use_threads=False):
            there = pc.or_(batch["text"].is_valid(), batch["image"].is_valid())
            whole = pc.and_(pc.and_(batch["label"].is_valid(), batch["teacher_logits"].is_valid()), there)
            found += [{**row, "payload": row["image"] if row["text"] is None else row["text"]} for row in batch.filter(whole).to_pylist()]
    return found
