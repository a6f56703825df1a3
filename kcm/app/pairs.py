"""Two retrieval tasks, image → text and text → image, from items that have pictures and wordings; and reading them from a user's folder."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kcm.errors import DataError

I2T, T2I = "i2t", "t2i"
_PAIRS = 0.5  # of the items: what the large model learns from; they are in no gallery
_SPLITS = {"train": 0.14, "stream": 0.41, "calibration": 0.13, "test": 0.32}  # of the gallery's items
_FEWEST = 80  # items; of fewer the edge would have labels for less than five, and its judge learns from five folds of them
_IMAGES = (".png", ".jpg", ".jpeg")

_TOML = """\
# {title}
# Every key is optional but [task], [gallery] and data.train; kcm/task.py documents them all.

[task]
id = {id}
modality = "{modality}"
# The gallery's items. The order is the label ids' order: edge and cloud compare a hash of it.
labels = {labels}

[data]
# Queries with the item that belongs to each. train: the edge's own. stream: unlabelled, as they reach the devices. calibration: labels kept
# back to choose threshold and head by. test: read by reports only. No item is in two of them.
train = "train.csv"
stream = "stream.csv"
calibration = "calibration.csv"
test = "test.csv"
# The large model's: pairs of image and text, of items that are not in the gallery.
large_train = "pairs.csv"

[gallery]
file = "gallery.csv"   # what is searched: label and {content}; several rows of a label are one item

[preprocess]
{preprocess}

[small]
kind = "dual"          # a linear map from {features} to the gallery's embeddings

[judge]
kind = "kan"           # or "mlp", of equal parameters
epsilon = 0.98         # until `kcm calibrate` chooses one on your data

[large]
kind = "dual"          # frozen encoders and a linear map between them, fitted on the pairs; or "clip", with model = "FOLDER"
model = "minilm"       # encodes texts
size = 128             # pixels a side that the image encoder reads

[large.net]
weights = "efficientnet-lite0"

[cost]                 # money per call, any unit
cloud_call = 1.0
local_call = 0.0
"""
_KINDS = {
    I2T: {
        "modality": "image",
        "content": "text",
        "features": "pixels",
        "preprocess": 'kind = "image"         # JPEG and PNG\nsize = 32              # pixels a side that the small model reads',
    },
    T2I: {"modality": "text", "content": "image", "features": "word vectors", "preprocess": 'kind = "ngrams"'},
}


@dataclass(frozen=True)
class Item:
    """One thing with its pictures, as image files, and its wordings."""

    label: str
    images: tuple[Path, ...]
    texts: tuple[str, ...]


def write_pair_tasks(folders: dict[str, Path], name: str, items: Sequence[Item], title: str) -> None:
    """Write the tasks of both directions, images included, into `folders` by direction.

    Items are split by a hash of their label. Those that the large model learns from are in no gallery, as a retrieval benchmark's training
    pairs are not: a model ranks what it was fitted on before what it wasn't, so that they would stand before every true answer.

    Raises:
        DataError: too few items, or a label twice.
    """
    if len(items) < _FEWEST:
        raise DataError(f"{len(items)} item(s) with image and text are too few for a retrieval task", fix=f"{_FEWEST} or more")
    if len({item.label for item in items}) < len(items):
        raise DataError("two items have one label")
    drawn = sorted(items, key=lambda item: hashlib.sha256(item.label.encode()).digest())
    cut = round(_PAIRS * len(drawn))
    gallery = sorted(drawn[cut:], key=lambda item: item.label)
    splits, start = {}, cut
    for place, (split, share) in enumerate(_SPLITS.items(), 1):
        end = len(drawn) if place == len(_SPLITS) else start + round(share * (len(drawn) - cut))
        splits[split], start = drawn[start:end], end
    for direction, folder in folders.items():
        files = _copied(folder, drawn)
        _table(folder / "pairs.csv", ("image", "text"), ((f, t) for item in drawn[:cut] for f in files[item.label] for t in item.texts))
        sides = {item.label: (files[item.label], item.texts) for item in drawn}
        query, content = (0, 1) if direction == I2T else (1, 0)
        names = ("image", "text")
        for split, chosen in splits.items():
            rows = ((value, item.label) for item in chosen for value in sides[item.label][query])
            _table(folder / f"{split}.csv", (names[query], "label"), rows)
        rows = ((item.label, value) for item in gallery for value in sides[item.label][content])
        _table(folder / "gallery.csv", ("label", names[content]), rows)
        labels = "[\n" + "".join(f"  {_quoted(item.label)},\n" for item in gallery) + "]"
        text = _TOML.format(title=title, id=_quoted(f"{name}-{direction}"), labels=labels, **_KINDS[direction])
        (folder / "task.toml").write_text(text, encoding="utf-8")


def read_pairs(folder: Path) -> list[Item]:
    """Items of a user's folder: captions.csv with image and text, else images with a .txt beside each, a wording a line.

    Images with the same wordings are pictures of one item; its label is the first one's path without its ending.

    Raises:
        DataError: the folder isn't there, a caption names no image, an image has none, or a text isn't UTF-8.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    texts: dict[Path, list[str]] = {}
    table = folder / "captions.csv"
    if table.is_file():
        from training.data import rows_of

        for line, row in rows_of(table):
            image, text = row.get("image"), row.get("text")
            if not image or not text or not str(image).strip() or not str(text).strip():
                raise DataError(f"{table}:{line}: image or text is missing or empty", fix="the columns are image and text")
            path = folder / str(image)
            if Path(str(image)).is_absolute() or ".." in Path(str(image)).parts:
                raise DataError(f"{table}:{line}: {image} lies outside {folder}", fix="image is a path below the folder of captions.csv")
            if not path.is_file():
                raise DataError(f"{table}:{line}: {path} does not exist")
            texts.setdefault(path, []).append(" ".join(str(text).split()))
    else:
        for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in _IMAGES and p.is_file()):
            texts[path] = _lines(path)
    if not texts:
        raise DataError(
            f"{folder} holds no image with a text", fix="captions.csv with the columns image and text, or a .txt beside each image"
        )
    _check_images(texts)
    grouped: dict[tuple[str, ...], list[Path]] = {}
    for path, wordings in texts.items():
        grouped.setdefault(tuple(dict.fromkeys(wordings)), []).append(path)
    return [Item(paths[0].relative_to(folder).with_suffix("").as_posix(), tuple(paths), wordings) for wordings, paths in grouped.items()]


def _check_images(paths: Iterable[Path]) -> None:
    """Decode each: what is copied gets another name, under which the user wouldn't find it. Raises DataError."""
    from kcm.images import ImagePreprocessor
    from kcm.task import PreprocessSpec

    reader = ImagePreprocessor(PreprocessSpec(kind="image"))
    for path in paths:
        try:
            reader.pixels(path.read_bytes())
        except ValueError as error:
            raise DataError(f"{path}: {error}", fix="mend it, convert it to JPEG or PNG, or take it out") from error


def _lines(image: Path) -> list[str]:
    path = image.with_suffix(".txt")
    try:
        found = [" ".join(line.split()) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise DataError(f"{image} has no caption: {path.name}: {error.strerror}", fix="a .txt beside it, or captions.csv") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason}") from error
    if not (kept := [line for line in found if line]):
        raise DataError(f"{path} is empty")
    return kept


def _copied(folder: Path, items: Sequence[Item]) -> dict[str, list[str]]:
    """The items' images in the folder, under numbers: label → paths relative to it."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    out: dict[str, list[str]] = {}
    for number, item in enumerate(items):
        for place, image in enumerate(item.images):
            name = f"images/{number:05d}-{place}{image.suffix.lower()}"
            shutil.copyfile(image, folder / name)
            out.setdefault(item.label, []).append(name)
    return out


def _table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
