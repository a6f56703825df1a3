"""Reading the teacher store's Parquet parts: what the cloud committed, exactly once after compaction."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcm.errors import StoreError, require
from kcm.task import Task
from training.reserve import reserved

Float32 = NDArray[np.float32]


def read_lessons(store: Path, task: Task, teacher_id: str = "", held_back: Collection[str] = ()) -> tuple[list[str], Float32, str]:
    """(texts [N], teacher logits [N, C] scored without a hint, the teacher's id) of this task's label space.

    Left out: what is reserved for calibration (training/reserve.py) where the task has a stream to read it from.

    Args:
        teacher_id: read only this teacher's rows; "" where the store holds one teacher.
        held_back: texts that are never learnt from, those of the test and calibration files.

    Raises:
        StoreError: nothing compacted, damaged, no row of this task, a row over other classes, or rows of several teachers.
    """
    texts: list[str] = []
    logits: list[Float32] = []
    teachers: set[str] = set()
    others: set[str] = set()
    for row in _rows(store):
        if (row["task_id"], row["label_space"]) != (task.id, task.label_space):
            others.add(f"task {row['task_id']} with labels {row['label_space']}")
            continue
        if row["teacher_logits"] is None or teacher_id not in ("", row["teacher_id"]):
            continue
        if row["text"] in held_back or (task.data.stream and reserved(row["text"])):
            continue
        if len(row["teacher_logits"]) != len(task.labels):
            raise StoreError(f"{store}: a row has {len(row['teacher_logits'])} logits, the task {len(task.labels)} labels")
        texts.append(row["text"])
        logits.append(np.array(row["teacher_logits"], np.float32))
        teachers.add(row["teacher_id"])
    if not texts:
        holds = f"; it holds {', '.join(sorted(others))}" if others else ""
        fix = "give the store of this task" if others else f"kcm store compact {store}"
        raise StoreError(f"{store} holds nothing to learn from for task {task.id} with labels {task.label_space}{holds}", fix=fix)
    if len(teachers) > 1:
        raise StoreError(f"{store} holds rows of {len(teachers)} teachers: {', '.join(sorted(teachers))}", fix="choose one with --teacher")
    return texts, np.stack(logits), teachers.pop()


def _rows(store: Path) -> Iterator[dict[str, Any]]:
    """Every row of every part, in batches, so that only what is learnt from stays in memory."""
    parquet, pyarrow = require("pyarrow.parquet", "train"), require("pyarrow", "train")
    wanted = ["text", "label_space", "task_id", "teacher_logits", "teacher_id"]
    for part in sorted((store / "parquet").glob("*.parquet")):
        try:
            with parquet.ParquetFile(part, page_checksum_verification=True) as file:
                if missing := sorted(set(wanted) - set(file.schema_arrow.names)):
                    raise StoreError(f"{part} can't be read: it has no column {missing[0]!r}")
                for batch in file.iter_batches(4096, columns=wanted):
                    yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise StoreError(f"{part} can't be read: {error}", fix=f"kcm store compact {store}, or restore the file") from error
