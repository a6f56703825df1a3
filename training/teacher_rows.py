"""Reading the teacher store's Parquet parts: what the cloud committed, exactly once after compaction. Memory stays bounded."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcm.errors import StoreError, require
from kcm.policy import draw
from kcm.sample import Payload, Purpose
from kcm.task import Task
from kcm.teacher import COLUMNS
from training.data import identity
from training.reserve import reserved
from training.reservoir import Reservoir, Rows

Float32 = NDArray[np.float32]

_BATCH = 1024  # rows decoded at a time: a text may be a document
_ABOUT = ("edge_id", "sample_id", "task_id", "label_space", "teacher_id", "purpose", "p_escalate")
_COLUMNS = (*_ABOUT, "text", "image", "teacher_logits")


@dataclass(frozen=True)
class Lessons:
    """Texts [N] with teacher logits [N, C] scored without a hint, and with which probability each was sent [N].

    `stored` rows of this task and teacher were there; some are reserved, held back, or above a cap.
    """

    payloads: Sequence[Payload]
    logits: Float32
    p_escalate: Float32
    teacher_id: str
    stored: int


def read_lessons(store: Path, task: Task, teacher_id: str = "", held_back: Collection[Payload] = (), *, seed: int = 0) -> Lessons:
    """What a round may learn from this store: rows of this task's label space, at most [distill] max_rows, per_class and per_edge.

    Left out: what is reserved for calibration (training/reserve.py) where the task has a stream to read it from.

    Args:
        teacher_id: read only this teacher's rows; "" where the store holds one teacher.
        held_back: identities of samples that are never learnt from, those of the test, calibration and gold files.
        seed: draws which rows stay where a cap leaves some out.

    Raises:
        StoreError: no store, nothing compacted, damaged, no row of this task or teacher, a row over other classes, or rows of several
            teachers.
    """
    require("pyarrow", "train")
    found = _Found(store, task, teacher_id, held_back, seed)
    for part in parts_of(store):
        with _readable(part, store):
            for batch in _batches(part):
                found.add(batch)
    rows = found.reservoir.rows()
    if not rows.payloads:
        holds, fix = found.instead()
        raise StoreError(f"{store} holds nothing to learn from for task {task.id} with labels {task.label_space}; {holds}", fix=fix)
    teachers = sorted(found.teachers)
    if len(teachers) > 1:
        raise StoreError(f"{store} holds rows of {len(teachers)} teachers: {', '.join(teachers)}", fix="choose one with --teacher")
    return Lessons(rows.payloads, rows.logits, rows.p_escalate, teachers[0], found.stored)


def parts_of(store: Path) -> list[Path]:
    """The Parquet parts of a store.

    Raises:
        StoreError: there is no such folder, or nothing in it is compacted.
    """
    if not store.is_dir():
        raise StoreError(f"{store} is no folder: there is no teacher store", fix="give the folder that `kcm cloud --store` writes")
    parts = sorted((store / "parquet").glob("*.parquet"))
    if not parts:
        raise StoreError(f"{store} holds nothing to learn from: nothing in it is compacted", fix=f"kcm store compact {store}")
    return parts


def counted(rows: Mapping[str, int]) -> str:
    """How many rows each teacher answered, in words."""
    return ", ".join(f"{teacher} ({count} row{'s' * (count != 1)})" for teacher, count in sorted(rows.items()))


class _Found:
    """What was read so far: the rows that stay, and what else the store was seen to hold."""

    def __init__(self, store: Path, task: Task, teacher_id: str, held_back: Collection[Payload], seed: int) -> None:
        self._store, self._task, self._teacher_id, self._held_back, self._seed = store, task, teacher_id, held_back, seed
        self.reservoir = Reservoir(task.distill, len(task.labels))
        self.teachers: set[str] = set()
        self.others: set[str] = set()
        self.answered: Counter[str] = Counter()  # rows of this task by teacher, chosen or not
        self.waiting = 0  # rows of this task whose logits aren't filled
        self.stored = 0

    def instead(self) -> tuple[str, str]:
        """Where nothing is left to learn from: what is there, and what to do about it."""
        if self._teacher_id and self.answered and self._teacher_id not in self.answered:
            best = self.answered.most_common(1)[0][0]
            return f"no row of teacher {self._teacher_id!r}, but of {counted(self.answered)}", f"--teacher {best}"
        if self.answered:
            reserved_too = " or reserved for calibration" if self._task.data.stream else ""
            why = f"the rows of {counted(self.answered)} are all texts of test, calibration, selection or gold files{reserved_too}"
            return why, f"let more samples reach the cloud, then kcm store compact {self._store}"
        if self.waiting:
            return (
                f"its {self.waiting} row(s) have no logits without a hint yet",
                f"let the cloud fill them, then kcm store compact {self._store}",
            )
        if self.others:
            return f"it holds {', '.join(sorted(self.others))}", "give the store of this task"
        return "its parts have no row", f"kcm store compact {self._store}"

    def add(self, batch: Any) -> None:
        """Take what is to be learnt from an Arrow batch. Texts and logits are decoded only for rows that may stay."""
        import pyarrow

        about = {name: batch.column(name).to_pylist() for name in _ABOUT}
        index = self._ours(about, batch.column("teacher_logits").is_valid().to_pylist())
        self.stored += len(index)
        priority = np.array([self._priority(about, i) for i in index], np.float64)
        near = np.flatnonzero(priority < self.reservoir.highest)
        index, priority = [index[i] for i in near], priority[near]
        texts, images = (batch.column(name).take(pyarrow.array(index, pyarrow.int64())).to_pylist() for name in ("text", "image"))
        payloads = [image if text is None else text for text, image in zip(texts, images, strict=True)]
        learnable = [i for i, payload in enumerate(payloads) if self._learnable(payload)]
        index = [index[i] for i in learnable]
        self.teachers.update(about["teacher_id"][i] for i in index)
        lists = batch.column("teacher_logits").take(pyarrow.array(index, pyarrow.int64()))
        classes = len(self._task.labels)
        for size in set(lists.value_lengths().to_pylist()) - {classes}:
            raise StoreError(f"{self._store}: a row has {size} logits, the task {classes} labels")
        self.reservoir.add(
            Rows(
                [payloads[i] for i in learnable],
                lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(len(index), classes),
                np.array([about["p_escalate"][i] for i in index], np.float32),
                np.array([_number(about["edge_id"][i]) for i in index], np.int64),
                priority[learnable],
            )
        )

    def _ours(self, about: dict[str, list[Any]], filled: list[bool]) -> list[int]:
        ours = (self._task.id, self._task.label_space)
        pairs = list(zip(about["task_id"], about["label_space"], strict=True))
        self.others.update(f"task {task} with labels {space}" for task, space in set(pairs) - {ours})
        own = [i for i, pair in enumerate(pairs) if pair == ours]
        self.answered.update(about["teacher_id"][i] for i in own if filled[i])
        self.waiting += sum(not filled[i] for i in own)
        wanted = self._teacher_id
        return [i for i in own if filled[i] and wanted in ("", about["teacher_id"][i])]

    def _priority(self, about: dict[str, list[Any]], i: int) -> float:
        explored = about["purpose"][i] == Purpose.EXPLORE or 0 < about["p_escalate"][i] < 1
        return draw(f"{about['edge_id'][i]}\x00{about['sample_id'][i]}", f"lesson {self._seed}") + (0 if explored else 1)

    def _learnable(self, payload: Payload | None) -> bool:
        return payload is not None and identity(payload) not in self._held_back and not (self._task.data.stream and reserved(payload))


def _number(edge_id: str) -> int:
    """An edge as a number, so that thousands of edges need no table."""
    return int.from_bytes(hashlib.blake2b(edge_id.encode(), digest_size=8).digest(), "big", signed=True)


def _batches(part: Path) -> Iterator[Any]:
    """A part's rows a few at a time: not pre-buffered, not mapped and by one thread, so that no row group is held whole."""
    from pyarrow import parquet

    with parquet.ParquetFile(part, page_checksum_verification=True, pre_buffer=False, memory_map=False, buffer_size=2**16) as file:
        if missing := sorted(set(_COLUMNS) - set(file.schema_arrow.names)):
            raise StoreError(f"{part} can't be read: it has no column {missing[0]!r}")
        for name in _COLUMNS:
            kind = str(file.schema_arrow.field(name).type).replace("element: ", "")
            if kind != COLUMNS[name]:  # the footer has no checksum: one flipped bit makes a string bytes
                raise StoreError(f"{part} can't be read: its column {name!r} holds {kind}, not {COLUMNS[name]}")
        yield from file.iter_batches(_BATCH, columns=list(_COLUMNS), use_threads=False)


@contextmanager
def _readable(part: Path, store: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{part} can't be read: {error}", fix=f"kcm store compact {store}, or restore the file") from error
