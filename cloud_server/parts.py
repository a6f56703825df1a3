"""Parquet parts of the teacher store: kcm.teacher.COLUMNS, zstd, logits as float16 lists. A part is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kcm.errors import StoreError
from kcm.sample import new_sample_id
from kcm.teacher import ADDED, COLUMNS, KEY

FIELDS = tuple(COLUMNS)
_TYPES: dict[str, Any] = {
    "string": pa.string(),
    "binary": pa.binary(),
    "int8": pa.int8(),
    "int16": pa.int16(),
    "int64": pa.int64(),
    "float": pa.float32(),
    "list<halffloat>": pa.list_(pa.float16()),
}
SCHEMA: Any = pa.schema([(name, _TYPES[kind]) for name, kind in COLUMNS.items()])
_LOGITS = frozenset(name for name, kind in COLUMNS.items() if kind == "list<halffloat>")
_KEY_ROWS = 65_536  # keys in memory at once
_MOST = float(np.finfo(np.float16).max)


class PartWriter:
    """One part under way, in a hidden temporary file. Leaving the `with` unpublished removes it."""

    def __init__(self, folder: Path, replaces: Path | None = None) -> None:
        """Raises OSError where the folder can't be written.

        Args:
            replaces: a part that this one takes the place and the name of when it is published.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name = new_sample_id()  # sorts by time
        self._final = replaces or folder / f"part-{name}.parquet"
        self._temporary = folder / f".part-{name}.tmp"
        self._file = self._temporary.open("wb")
        self._writer: Any = pq.ParquetWriter(self._file, SCHEMA, compression="zstd", write_page_checksum=True)
        self._published = False
        self.rows = 0

    @property
    def bytes(self) -> int:
        """Written so far."""
        return self._file.tell()

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        """One row group of rows in the order of FIELDS; logits are float32 bytes or None."""
        columns = list(zip(*rows, strict=True))
        arrays = [
            _float16_lists(values) if name in _LOGITS else pa.array(values, _TYPES[kind])
            for (name, kind), values in zip(COLUMNS.items(), columns, strict=True)
        ]
        self.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA))

    def write_table(self, table: Any) -> None:
        """One row group: a table of SCHEMA."""
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self.rows += table.num_rows

    def publish(self) -> None:
        """Make the part durable and visible, in that order."""
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.rename(self._final)
        _sync_folder(self._final.parent)
        self._published = True

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._published:
            with contextlib.suppress(OSError, pa.ArrowException):  # on a full disk; the file goes away in any case
                self._writer.close()
            self._file.close()
            self._temporary.unlink(missing_ok=True)


def part_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed writer left."""
    for path in folder.glob(".part-*.tmp"):
        path.unlink(missing_ok=True)


def read_keys(path: Path) -> Iterator[list[tuple[str, str, str, int | None]]]:
    """(edge_id, sample_id, label_space, label) of every row of a part, in pieces.

    Raises:
        StoreError: the part can't be read.
    """
    for table in read_columns(path, (*KEY, "label_space", "label"), rows=_KEY_ROWS):
        yield list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def read_columns(path: Path, columns: Sequence[str], rows: int = 8192) -> Iterator[Any]:
    """Tables of at most `rows` rows of a part's row groups, with these columns; one that an older kcm didn't write is null.

    A row group is bounded in bytes as well (compact.py): so is what is read at once.

    Raises:
        StoreError: the part can't be read, or lacks a column that every part has.
    """
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as part:
            there = [name for name in columns if name in part.schema_arrow.names]
            if missing := sorted(set(columns) - set(there) - set(ADDED)):
                raise StoreError(f"{path} can't be read: it has no column {missing[0]!r}")
            for group in range(part.num_row_groups):
                for batch in part.iter_batches(batch_size=rows, row_groups=[group], columns=there):
                    filled = [batch[name].cast(schema.field(name).type) if name in there else _nulls(name, len(batch)) for name in columns]
                    yield pa.Table.from_arrays(filled, schema=schema)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StoreError(f"{path} can't be read: {error}", fix="restore it from a backup, or move it out of the store") from error


def _nulls(name: str, length: int) -> Any:
    return pa.nulls(length, SCHEMA.field(name).type)


def _float16_lists(blobs: Sequence[bytes | None]) -> Any:
    """list<halffloat> of float32 bytes. What float16 can't hold becomes its largest value, not infinity."""
    lengths = np.array([0 if blob is None else len(blob) // 4 for blob in blobs], np.int64)
    offsets: NDArray[np.int32] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    flat = np.frombuffer(b"".join(blob for blob in blobs if blob is not None), "<f4")
    values = pa.array(np.clip(flat, -_MOST, _MOST).astype(np.float16))
    missing = pa.array([blob is None for blob in blobs])
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=missing)


def _sync_folder(folder: Path) -> None:
    """A rename is durable once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
