"""A retrieval task's gallery, and the pairs of images and texts that its large model learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcm.errors import DataError
from kcm.sample import Payload
from kcm.task import Task
from training.data import label_ids, rows_of
from training.image_files import Files
from training.retrieval.align import unit

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Gallery:
    """Content [R] and the item [R] that each belongs to, of `size` items; an item may have several wordings or pictures."""

    payloads: Sequence[Payload]
    items: NDArray[np.int64]
    size: int

    def pooled(self, vectors: Float32) -> Float32:
        """Embeddings of the content [R, D] → one of length 1 for each item [G, D]."""
        total = np.zeros((self.size, vectors.shape[1]), np.float32)
        np.add.at(total, self.items, unit(vectors))
        return unit(total)


@dataclass(frozen=True)
class Pairs:
    """N images and the texts that go with them. An image or a text may be in several pairs."""

    images: Sequence[Payload]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)


def load_gallery(task: Task) -> Gallery:
    """The content of the task's items: captions where queries are images, images where they are texts.

    Raises:
        DataError: missing or unreadable, a row without content, an unknown label, or a label without a row.
    """
    spec, path = task.gallery, task.path(task.gallery.file)
    column = spec.text_column if task.modality == "image" else spec.image_column
    (content, labels), lines = _columns(path, (column, spec.label_column))
    items = label_ids(labels, task, lambda row: f"{path}:{lines[row]}")
    bare = np.flatnonzero(np.bincount(items, minlength=len(task.labels)) == 0)
    if len(bare):
        raise DataError(f"{path}: {len(bare)} item(s) have no row, as {task.labels[bare[0]]!r}", fix="a row for each label of task.toml")
    payloads = content if task.modality == "image" else _files(path, content, lines)
    return Gallery(payloads, items, len(task.labels))


def load_pairs(task: Task) -> Pairs:
    """The rows of data.large_train: image and text.

    Raises:
        DataError: not named, missing or unreadable, or a row without an image or a text.
    """
    if not task.data.large_train:
        fix = 'large_train = "pairs.csv" under [data], with the columns image and text'
        raise DataError(f"task {task.id} names no pairs that its large model could learn from", fix=fix)
    path = task.path(task.data.large_train)
    (images, texts), lines = _columns(path, (task.data.image_column, task.data.text_column))
    return Pairs(_files(path, images, lines), texts)


def distinct(payloads: Sequence[Payload]) -> tuple[list[Payload], NDArray[np.int64]]:
    """Each payload once, and where each of the rows [N] finds its own."""
    if isinstance(payloads, Files):
        paths, place = np.unique(np.array(payloads.paths), return_inverse=True)
        return list(Files(paths.tolist())), place
    index: dict[Payload, int] = {}
    where = [index.setdefault(payload, len(index)) for payload in payloads]
    return list(index), np.array(where, np.int64)


def _columns(path: Path, names: Sequence[str]) -> tuple[list[list[str]], list[int]]:
    """The named columns of a table, and the line of each row."""
    columns: list[list[str]] = [[] for _ in names]
    lines = []
    for line, row in rows_of(path):
        for name, column in zip(names, columns, strict=True):
            value: Any = row.get(name)
            if not isinstance(value, str) or not value.strip():
                seen = "is empty or no text" if name in row else f"is missing; columns are {', '.join(map(repr, row))}"
                raise DataError(f"{path}:{line}: {name!r} {seen}")
            column.append(value)
        lines.append(line)
    if not lines:
        raise DataError(f"{path} has no rows")
    return columns, lines


def _files(table: Path, names: Sequence[str], lines: Sequence[int]) -> Files:
    paths = [table.parent / name for name in names]
    for path, line in zip(paths, lines, strict=True):
        if not path.is_file():
            raise DataError(f"{table}:{line}: {path} does not exist")
    return Files(list(map(str, paths)))
