"""Reading a user's images: a folder per label, a table of paths, or an .npz of pixels, with errors that name file and row.

Every image's header is looked at when its file is named; its bytes are read when it is used, its pixels are decoded by the preprocessor.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from kcm.errors import DataError
from kcm.images import ImagePreprocessor, Pixels, TooLarge, png, read_header
from kcm.sample import Payload
from kcm.task import DataSpec, PreprocessSpec
from training.data import is_unicode, label_in, rows_of

_NPZ = re.compile(r"(?P<file>.*\.npz)(#(?P<part>\w+))?", re.IGNORECASE)
_IMAGES, _LABELS, _NAMES = ("images", "x"), ("labels", "y"), ("label_names", "class_names", "names", "classes")
_LEFT_BY_SYSTEMS = {"thumbs.db", "desktop.ini", "__macosx"}  # and whatever begins with a dot
_CHUNK = 256  # images that are decoded at once


class Files(Sequence[Payload]):
    """Image files, read on access: of a hundred thousand photos only the paths are in memory."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Payload: ...
    @overload
    def __getitem__(self, index: slice) -> Files: ...
    def __getitem__(self, index: int | slice) -> Payload | Files:
        """Raises DataError where a file can't be read any more."""
        if isinstance(index, slice):
            return Files(self.paths[index])
        path = self.paths[index]
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path} can't be read any more: {error.strerror}") from error

    def take(self, index: Sequence[int] | NDArray[np.int64]) -> Files:
        return Files([self.paths[i] for i in index])


class Images(NamedTuple):
    """What a file or folder holds. `labels` is empty where it holds none; `where` names a row for an error's message."""

    payloads: Sequence[Payload]
    labels: list[str]
    where: Callable[[int], str]


def is_image_data(path: Path) -> bool:
    """True for a folder or an .npz: what no text task reads."""
    return path.is_dir() or _NPZ.fullmatch(str(path)) is not None


def read_images(path: Path, data: DataSpec, spec: PreprocessSpec, *, labels_optional: bool) -> Images:
    """The images of a folder, a table or an .npz.

    A folder has a folder for each label, with its images at any depth; without labels they may lie anywhere in it. A table (CSV, JSONL,
    Parquet) has paths relative to itself; Parquet may hold the images' bytes instead. An .npz has `images` uint8 [N, H, W, 3] or
    [N, H, W], `labels` [N] of names or of numbers, and `label_names` [C] for these; `x`, `y` and `classes` are read as well. Where one
    .npz holds several parts (x_train, x_dev), FILE.npz#dev says which.

    Raises:
        DataError: missing or empty; an image that is unreadable or too large, named twice, without a label; arrays of another type.
    """
    found = _NPZ.fullmatch(str(path))
    source = Path(found["file"]) if found else path
    if not source.exists():
        raise DataError(f"{source} does not exist")
    if source.is_dir():
        return _folder(source, spec, labels_optional)
    return _npz(source, found["part"] or "", spec, labels_optional) if found else _table(path, data, spec, labels_optional)


def pixels_of(payloads: Sequence[Payload], preprocessor: ImagePreprocessor) -> Pixels:
    """uint8 [N, S, S, 3] of images that may be damaged behind their headers.

    Raises:
        DataError: one can't be decoded; the message names its file, where it has one.
    """
    (shape,) = (spec.shape for spec in preprocessor.inputs.values())
    out = np.empty((len(payloads), *(shape or ())), np.uint8)
    for start in range(0, len(payloads), _CHUNK):
        rows = range(start, min(start + _CHUNK, len(payloads)))
        part = [payloads[row] for row in rows]
        try:
            out[start : start + _CHUNK] = preprocessor.batch(part)["image"]
        except ValueError:
            for row, payload in zip(rows, part, strict=True):
                try:
                    preprocessor.batch([payload])
                except ValueError as error:
                    name = payloads.paths[row] if isinstance(payloads, Files) else f"image {row}"
                    raise DataError(f"{name}: {error}", fix="mend it or take it out of the data") from error
            raise
    return out


def _folder(folder: Path, spec: PreprocessSpec, labels_optional: bool) -> Images:
    loose, inside = _listed(folder)
    if (loose or not inside) and not labels_optional:
        what = f"{loose[0]} lies outside a label's folder" if inside else f"{folder} has no label folders"
        raise DataError(what, fix="one folder for each label: DIR/LABEL/FILE.jpg")
    paths, labels = [], []
    for label in inside:
        files = list(_below(folder / label))
        if not files:
            raise DataError(f"{folder / label} holds no image", fix="fill the folder, or remove it")
        if not is_unicode(label):
            raise DataError(f"{folder}: the folder {label!r} has a name that is no Unicode text")
        paths += files
        labels += [label] * len(files)
    paths += loose
    if not paths:
        raise DataError(f"{folder} holds no images")
    for path in paths:
        _check_file(path, path, spec)
    return Images(Files(paths), [] if loose else labels, lambda row: paths[row])


def _listed(folder: Path) -> tuple[list[str], list[str]]:
    """(paths of the files, names of the folders) that lie directly in it."""
    files, folders = [], []
    for entry in sorted(folder.iterdir()):
        if not _is_left_over(entry.name):
            folders.append(entry.name) if entry.is_dir() else files.append(str(entry))
    return files, folders


def _below(folder: Path) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_left_over(name))
        yield from (os.path.join(root, name) for name in sorted(files) if not _is_left_over(name))  # noqa: PTH118  a tenth of Path's time


def _is_left_over(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LEFT_BY_SYSTEMS


def _check_file(path: str, where: str, spec: PreprocessSpec) -> None:
    try:
        with Path(path).open("rb") as file:
            read_header(file, spec)
    except OSError as error:
        raise DataError(f"{where}: {_named(path, where)}can't be read: {error.strerror}") from error
    except ValueError as error:
        raise _refused(f"{where}: {_named(path, where)}", error) from error


def _check_bytes(image: bytes, where: str, spec: PreprocessSpec) -> None:
    try:
        read_header(image, spec)
    except ValueError as error:
        raise _refused(f"{where}: ", error) from error


def _refused(where: str, error: ValueError) -> DataError:
    fix = "make it smaller, or raise max_bytes or max_pixels under [preprocess] in task.toml" if isinstance(error, TooLarge) else ""
    return DataError(f"{where}{error}", fix=fix)


def _named(path: str, where: str) -> str:
    return "" if path == where else f"{path}: "


def _table(path: Path, data: DataSpec, spec: PreprocessSpec, labels_optional: bool) -> Images:
    column, label_column = data.image_column, data.label_column
    files: dict[str, int] = {}
    blobs: list[bytes] = []
    labels: list[str] = []
    lines: list[int] = []
    labelled: bool | None = None
    for line, row in rows_of(path):
        where = f"{path}:{line}"
        if labelled is None:
            labelled = row.get(label_column) is not None
            if not labelled and not labels_optional:
                raise DataError(f"{where}: no column {label_column!r}, only {', '.join(map(repr, row))}")
        image = row.get(column)
        if isinstance(image, dict):  # as Hugging Face's datasets write it
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes) and image:
            _check_bytes(image, where, spec)
            blobs.append(image)
        elif isinstance(image, str) and image.strip():
            file = os.path.normpath(path.parent / image)
            if (first := files.setdefault(file, line)) != line:
                raise DataError(f"{where}: {image!r} is the image of line {first} too", fix="one row for each image")
            _check_file(file, where, spec)
        else:
            seen = "is empty or no path" if column in row else f"is missing; columns are {', '.join(map(repr, row))}"
            raise DataError(f"{where}: {column!r} {seen}")
        if blobs and files:
            raise DataError(f"{where}: {column!r} holds paths in some rows and bytes in others")
        lines.append(line)
        if labelled:
            labels.append(label_in(row, label_column, where))
    if not lines:
        raise DataError(f"{path} has no rows")
    return Images(blobs or Files(list(files)), labels, lambda row: f"{path}:{lines[row]}")


def _npz(path: Path, part: str, spec: PreprocessSpec, labels_optional: bool) -> Images:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array, not an .npz")
        with archive:
            images, labels, names = _arrays(archive, path, part)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{path}: no readable .npz: {error}", fix="numpy.savez(FILE, images=…, labels=…) writes one") from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise DataError(f"{path}: images are {images.dtype} {list(images.shape)}, expected uint8 [N, H, W, 3] or [N, H, W]")
    if not images.size:
        raise DataError(f"{path} holds no images")
    if labels is None and not labels_optional:
        raise DataError(f"{path} holds no labels for these images")
    grey = images if images.ndim == 3 else images[..., 0] if images.shape[3] == 1 else None
    rows = images if grey is None else (np.repeat(row[..., None], 3, axis=2) for row in grey)
    payloads = [png(row) for row in rows]
    for row, payload in enumerate(payloads):
        _check_bytes(payload, f"{path}: row {row}", spec)
    return Images(payloads, _label_list(labels, names, len(payloads), path), lambda row: f"{path}: row {row}")


def _arrays(archive: Any, path: Path, part: str) -> tuple[NDArray[Any], NDArray[Any] | None, NDArray[Any] | None]:
    """(images, labels, names of the labels) of one part."""
    held = set(archive.files)
    parts = sorted({name.partition("_")[2] for name in held if name.partition("_")[0] in _IMAGES and "_" in name})
    if not part and not held & set(_IMAGES) and len(parts) == 1:
        part = parts[0]
    ending = f"_{part}" if part else ""
    images, labels, names = (
        next((name + end for name in known if name + end in held), None)
        for known, end in ((_IMAGES, ending), (_LABELS, ending), (_NAMES, ""))
    )
    if images is None:
        if parts:
            fix = "  or  ".join(f"{path.name}#{name}" for name in parts)
            raise DataError(f"{path} holds no {part or 'whole'} part, only {', '.join(parts)}", fix=f"say which: {fix}")
        raise DataError(f"{path} holds no array 'images', only {', '.join(map(repr, archive.files)) or 'nothing'}")
    return archive[images], *(archive[name] if name else None for name in (labels, names))


def _label_list(labels: NDArray[Any] | None, names: NDArray[Any] | None, rows: int, path: Path) -> list[str]:
    if labels is None:
        return []
    if labels.shape != (rows,) or labels.dtype.kind not in "iuU":
        raise DataError(f"{path}: labels are {labels.dtype} {list(labels.shape)}, expected names or whole numbers [{rows}]")
    found: list[str]
    if labels.dtype.kind == "U":
        found = labels.tolist()
    elif names is None:
        found = list(map(str, labels.tolist()))
    else:
        if names.ndim != 1 or names.dtype.kind != "U":
            raise DataError(f"{path}: the labels' names are {names.dtype} {list(names.shape)}, expected text [classes]")
        for row in np.flatnonzero((labels < 0) | (labels >= len(names))).tolist():
            raise DataError(f"{path}: row {row}: label {labels[row]} has no name, there are {len(names)}")
        found = names[labels].tolist()
    if (empty := next((row for row, name in enumerate(found) if not name.strip()), None)) is not None:
        raise DataError(f"{path}: row {empty}: its label is empty")
    return found
