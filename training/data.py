"""Reading a user's files: CSV, JSONL or Parquet of text and label, with errors that name file and line. Images: training/image_files.py."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kcm.errors import DataError, require
from kcm.sample import Payload
from kcm.task import Task

_MAX_FIELD = 2**24  # a document, not a mistake in quoting


@dataclass(frozen=True)
class Split:
    """Samples [N] and label ids [N]; labels is None where the file has none (a stream)."""

    name: str
    payloads: Sequence[Payload]
    labels: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.payloads)

    @property
    def y(self) -> NDArray[np.int64]:
        """The labels of a split that must have them."""
        assert self.labels is not None, f"split {self.name} has no labels"
        return self.labels

    def take(self, index: NDArray[np.int64] | Sequence[int]) -> Split:
        picked = np.asarray(index, dtype=np.int64)
        return Split(self.name, taken(self.payloads, picked), None if self.labels is None else self.labels[picked])


def taken(payloads: Sequence[Payload], index: NDArray[np.int64] | Sequence[int]) -> Sequence[Payload]:
    """The samples at `index`. Files that are read on access stay so."""
    take: Callable[[object], Sequence[Payload]] | None = getattr(payloads, "take", None)
    return [payloads[i] for i in index] if take is None else take(index)


def identity(payload: Payload) -> Payload:
    """What two samples share if, and only if, they are the same: the text, or an image's hash, so that no image is kept for it."""
    return payload if isinstance(payload, str) else hashlib.blake2b(payload, digest_size=16).digest()


def load_split(task: Task, name: str) -> Split:
    """One of the task's files: train, large_train, stream, calibration or test. Only a stream may lack labels.

    Raises:
        DataError: not given, missing, empty, a bad row, an unknown label, or one class only (train, large_train).
    """
    relative: str = getattr(task.data, name)
    if not relative:
        raise DataError(f"task {task.id} names no {name} file", fix=f'add {name} = "FILE.csv" under [data] in task.toml')
    path, optional = task.path(relative), name == "stream"
    payloads: Sequence[Payload]
    if task.modality == "image":
        from training.image_files import read_images

        payloads, labels, where = read_images(path, task.data, task.preprocess, labels_optional=optional)
    else:
        payloads, labels, lines = read_rows(path, task.data.text_column, task.data.label_column, labels_optional=optional)

        def where(row: int) -> str:
            return f"{path}:{lines[row]}"

    if optional and not (labels and set(labels) <= set(task.labels)):
        return Split(name, payloads, None)
    ids = label_ids(labels, task, where)
    if name in ("train", "large_train") and len(np.unique(ids)) < 2:
        raise DataError(f"{path}: every row has label {labels[0]!r}; nothing can be learnt from one class")
    return Split(name, payloads, ids)


def encode_labels(labels: Sequence[str], lines: Sequence[int], task: Task, path: Path) -> NDArray[np.int64]:
    """Label names → ids. Raises DataError at the first name that the task doesn't have."""
    return label_ids(labels, task, lambda row: f"{path}:{lines[row]}")


def label_ids(labels: Sequence[str], task: Task, where: Callable[[int], str]) -> NDArray[np.int64]:
    """As encode_labels; `where` names a row for the message."""
    index = {label: i for i, label in enumerate(task.labels)}
    for row, label in enumerate(labels):
        if label not in index:
            raise DataError(f"{where(row)}: unknown label {label!r}", fix="add it to labels in task.toml, or mend the row")
    return np.array([index[label] for label in labels], dtype=np.int64)


def read_rows(path: Path, text_column: str, label_column: str, *, labels_optional: bool) -> tuple[list[str], list[str], list[int]]:
    """(texts, labels, line numbers) of a file; labels is empty where the file has no label column and needn't.

    Raises:
        DataError: missing, unreadable, an unknown ending, a missing column, no rows, or a bad row with its line.
    """
    texts: list[str] = []
    labels: list[str] = []
    lines: list[int] = []
    labelled: bool | None = None
    for line, row in rows_of(path):
        if labelled is None:
            labelled = row.get(label_column) is not None
            if not labelled and not labels_optional:
                raise DataError(f"{path}:{line}: no column {label_column!r}, only {', '.join(map(repr, row))}")
        text = row.get(text_column)
        if not isinstance(text, str) or not text.strip():
            seen = "is empty" if text_column in row else f"is missing; columns are {', '.join(map(repr, row))}"
            raise DataError(f"{path}:{line}: {text_column!r} {seen}")
        if not is_unicode(text):
            raise DataError(f"{path}:{line}: {text_column!r} holds half a surrogate pair, which is no Unicode text")
        texts.append(text)
        lines.append(line)
        if labelled:
            labels.append(label_in(row, label_column, f"{path}:{line}"))
    if not texts:
        raise DataError(f"{path} has no rows")
    return texts, labels, lines


def rows_of(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, row by column) of a table.

    Raises:
        DataError: missing, unreadable, or of an unknown ending.
    """
    if not path.is_file():
        raise DataError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
    reader = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}", fix="use .csv, .jsonl or .parquet")
    return reader(path)


def label_in(row: Mapping[str, Any], column: str, where: str) -> str:
    """The label of a row. Raises DataError where it is none."""
    label = row.get(column)
    if not isinstance(label, str | int) or isinstance(label, bool) or not str(label).strip() or not is_unicode(str(label)):
        raise DataError(f"{where}: {column!r} is empty or no name")
    return str(label)


def is_unicode(text: str) -> bool:
    """False where JSON's \\u escapes left a lone surrogate: such a string can't be written anywhere again."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def column_names(path: Path) -> list[str]:
    """The columns of a file's first row; none where it can't be read."""
    reader = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}.get(path.suffix.lower())
    if reader is None or not path.is_file():
        return []
    try:
        return list(next(reader(path), (0, {}))[1])
    except DataError:
        return []


def label_names(path: Path, text_column: str, label_column: str) -> list[str]:
    """The distinct labels of a file, sorted: what `kcm init` writes into task.toml."""
    _, labels, _ = read_rows(path, text_column, label_column, labels_optional=False)
    return sorted(Counter(labels))


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    csv.field_size_limit(_MAX_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{path}:{reader.line_num}: the row has more or fewer fields than the header ({reader.fieldnames})")
                yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 after line {reader.line_num}: {error.reason}") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{path}:{number}: no JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: expected an object, found {type(row).__name__}")
            yield number, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    pyarrow = require("pyarrow", "train")
    parquet = require("pyarrow.parquet", "train")
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(4096):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: no readable Parquet file: {error}") from error
