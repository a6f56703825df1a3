"""Parquet parts of the teacher store: kcm.teacher.COLUMNS, zstd, logits as float16 lists. A part is there whole or not at all."""

from __future__ import annotations

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
from kcm.teacher import COLUMNS, KEY

FIELDS = tuple(COLUMNS)
_TYPES: dict[str, Any] = {
    "string": pa.string(),
    "binary": pa.binary(),
    "int8": pa.int8(),
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

    def __init__(self, folder: Path) -> None:
        """Raises OSError where the folder can't be written."""
        folder.mkdir(parents=True, exist_ok=True)
        name = new_sample_id()  # sorts by time
        self._final, self._temporary = folder / f"part-{name}.parquet", folder / f".part-{name}.tmp"
        self._file = self._temporary.open("wb")
        self._writer: Any = pq.ParquetWriter(self._file, SCHEMA, compression="zstd", write_page_checksum=True)
        self._published = False
        self.rows = 0

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        """One row group of rows in the order of FIELDS; logits are float32 bytes or None."""
        columns = list(zip(*rows, strict=True))
        arrays = [
            _float16_lists(values) if name in _LOGITS else pa.array(values, _TYPES[kind])
            for (name, kind), values in zip(COLUMNS.items(), columns, strict=True)
        ]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), row_group_size=len(rows))
        self.rows += len(rows)

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
            self._file.close()
            self._temporary.unlink(missing_ok=True)


def part_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed writer left."""
    for path in folder.glob(".part-*.tmp"):
        path.unlink(missing_ok=True)


def read_keys(folder: Path) -> Iterator[list[tuple[str, str]]]:
    """(edge_id, sample_id) of every row of every part, in pieces.

    Raises:
        StoreError: a part can't be read.
    """
    for path in part_files(folder):
        try:
            with pq.ParquetFile(path) as part:
                for batch in part.iter_batches(batch_size=_KEY_ROWS, columns=list(KEY)):
                    yield list(zip(batch[KEY[0]].to_pylist(), batch[KEY[1]].to_pylist(), strict=True))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} can't be read: {error}", fix="restore it from a backup, or move it out of the store") from error


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
