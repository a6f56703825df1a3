"""Reading the teacher store's Parquet parts: what the cloud committed, exactly once after compaction."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kcm.errors import StoreError, require
from kcm.task import Task

Float32 = NDArray[np.float32]


def read_lessons(store: Path, task: Task, teacher_id: str = "") -> tuple[list[str], Float32, str]:
    """(texts [N], teacher logits [N, C] scored without a hint, the teacher's id) of this task's label space.

    Args:
        teacher_id: read only this teacher's rows; "" where the store holds one teacher.

    Raises:
        StoreError: nothing compacted, damaged, no row of this task, a row over other classes, or rows of several teachers.
    """
    texts: list[str] = []
    logits: list[Float32] = []
    teachers: set[str] = set()
    for text, row, teacher in _rows(store, task, teacher_id):
        texts.append(text)
        logits.append(row)
        teachers.add(teacher)
    if not texts:
        raise StoreError(f"{store} holds no teacher logits for task {task.id} with these labels", fix=f"kcm store compact {store}")
    if len(teachers) > 1:
        raise StoreError(f"{store} holds rows of {len(teachers)} teachers: {', '.join(sorted(teachers))}", fix="choose one with --teacher")
    return texts, np.stack(logits), teachers.pop()


def _rows(store: Path, task: Task, teacher_id: str) -> Iterator[tuple[str, Float32, str]]:
    """In batches, so that only what is learnt from stays in memory."""
    parquet, pyarrow = require("pyarrow.parquet", "train"), require("pyarrow", "train")
    wanted = ["text", "label_space", "task_id", "teacher_logits", "teacher_id"]
    for part in sorted((store / "parquet").glob("*.parquet")):
        try:
            with parquet.ParquetFile(part, page_checksum_verification=True) as file:
                if missing := sorted(set(wanted) - set(file.schema_arrow.names)):
                    raise StoreError(f"{part} can't be read: it has no column {missing[0]!r}")
                for batch in file.iter_batches(4096, columns=wanted):
                    for row in batch.to_pylist():
                        ours = row["label_space"] == task.label_space and row["task_id"] == task.id
                        if ours and row["teacher_logits"] is not None and teacher_id in ("", row["teacher_id"]):
                            if len(row["teacher_logits"]) != len(task.labels):
                                raise StoreError(
                                    f"{part}: a row has {len(row['teacher_logits'])} logits, the task {len(task.labels)} labels"
                                )
                            yield row["text"], np.array(row["teacher_logits"], np.float32), row["teacher_id"]
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise StoreError(f"{part} can't be read: {error}", fix=f"kcm store compact {store}, or restore the file") from error
