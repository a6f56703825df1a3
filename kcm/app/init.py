"""`kcm init`: a commented task.toml from the user's own files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import typer

from kcm.app.folders import writable
from kcm.errors import ConfigError

if TYPE_CHECKING:
    from kcm.task import DataSpec
    from training.data import Split

_TEMPLATE = """\
# {title}
# Every key is optional but [task] and data.train; kcm/task.py documents them all.

[task]
id = {id}
modality = "text"
# The order is the label ids' order: edge and cloud compare a hash of it. Append, never reorder, once devices run.
labels = {labels}

[data]
# CSV, JSONL or Parquet with the columns below; paths are relative to this file.
# train: the edge's own labels. large_train: the large model's, disjoint from the stream.
# stream: unlabelled samples as they reach the devices. calibration: labels kept back to choose the threshold.
# selection: labels to choose head and hint gate by, else a third of calibration. gold: what a distillation round must pass.
# test: read by reports only.
{data}
text_column = {text_column}
label_column = {label_column}

[preprocess]
kind = "ngrams"        # hashed words, word pairs and character n-grams; "tokenizer" goes with an encoder or your own ONNX
max_words = 400        # longer texts are cut

[small]
kind = "ngrams"        # or "encoder" with path = "FOLDER" (Hugging Face), or "onnx" with path = "MODEL.onnx"

[judge]
kind = "kan"           # or "mlp", of equal parameters
epsilon = 0.98         # until `kcm calibrate` chooses one on your data

[large]
kind = "encoder"       # a transformers encoder with a head fitted on large_train; "causal" scores labels with a language model
model = "minilm"       # `kcm fetch minilm`, or a folder
max_tokens = 128
hint_dropout = 0.0     # 0: it never sees a hint. Above: it learns to read them, and this share of its rows goes without (try 0.3)

[prompt]
# What the large model reads beside the text. {{hint}} is one of two sentences, or empty where the hint gate withholds it:
# hint, where the gate shows several candidates; assertion, where it shows the small model's one answer.
hint = {hint}
assertion = {assertion}
# "causal": the template, then each label is scored behind it. "encoder": the hint's sentence is its second segment.
template = {template}
label = {label}
# A chat API: the messages in the system's and the user's name; {{text}} may stand in the user's alone.
chat_system = {chat_system}
chat_user = {chat_user}

[cost]                 # money per call, any unit
cloud_call = 1.0
local_call = 0.0
"""


def init(
    folder: Path = typer.Argument(..., metavar="DIR", help="Folder to make."),
    train: Path | None = typer.Option(
        None, "--train", help="The edge's labelled rows: CSV, JSONL or Parquet; of images also a folder or an .npz."
    ),
    large_train: Path = typer.Option(None, "--large-train", help="The large model's labelled rows; without it, train serves."),
    stream: Path = typer.Option(None, "--stream", help="Unlabelled rows as they reach the devices."),
    calibration: Path = typer.Option(None, "--calibration", help="Labelled rows kept back to choose the threshold."),
    selection: Path = typer.Option(None, "--selection", help="Labelled rows to choose head and hint gate by; else a third of calibration."),
    gold: Path = typer.Option(None, "--gold", help="Labelled rows that a distillation round must pass before it is exported."),
    test: Path = typer.Option(None, "--test", help="Labelled rows that only reports read."),
    text_column: str = typer.Option("text", help="Column that holds the text."),
    image_column: str = typer.Option("image", help="Column that holds an image's path, relative to the file."),
    label_column: str = typer.Option("label", help="Column that holds the label."),
    modality: str = typer.Option("", help="text or image; default: as --train looks."),
    pairs: Path | None = typer.Option(
        None, "--pairs", help="Instead of --train: a folder of images with captions, a .txt beside each or captions.csv of image,text."
    ),
    force: bool = typer.Option(False, "--force", help="Overwrite a task.toml that is there."),
) -> None:
    """Write a commented task.toml that describes your own data; check every row on the way.

    With --pairs two retrieval tasks: DIR/i2t finds captions for images, DIR/t2i images for texts. Their items are split here, and the
    images copied.
    """
    if pairs is not None and train is None:
        init_pairs(folder, pairs, force=force)
        return
    if train is None or pairs is not None:
        raise ConfigError("one of --train and --pairs is needed", fix="kcm init DIR --train FILE   or   kcm init DIR --pairs FOLDER")
    from kcm.task import DataSpec, load_task
    from training.data import load_split

    file = writable(folder) / "task.toml"
    if file.is_dir():
        raise ConfigError(f"{file} is a folder", fix="give another DIR")
    before = file.read_bytes() if file.exists() else None
    if before is not None and not force:
        raise ConfigError(f"{file} exists", fix="--force overwrites it")
    paths = (train, large_train, stream, calibration, selection, gold, test)
    given = dict(zip(_SPLITS, paths, strict=True))
    columns = DataSpec(text_column=text_column, image_column=image_column, label_column=label_column)
    labels, images = _labels([path for path in (train, large_train) if path], columns, _modality(modality, train, columns))
    folder.mkdir(parents=True, exist_ok=True)
    files = {split: os.path.relpath(path.resolve(), folder.resolve()) for split, path in given.items() if path}
    write_task_toml(
        folder,
        task_name(folder),
        labels,
        files,
        text_column=text_column,
        image_column=image_column,
        label_column=label_column,
        images=images,
    )
    try:
        task = load_task(folder)
        splits = {split: load_split(task, split) for split in files}
    except Exception:
        file.unlink() if before is None else file.write_bytes(before)
        raise
    typer.echo(f"{file}: {len(labels)} labels; rows: " + ", ".join(f"{name} {len(split)}" for name, split in splits.items()))
    for warning in warnings(splits, labels):
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"next: kcm simulate --task {folder}" if "stream" in files else f"next: kcm train --task {folder}")


def init_pairs(folder: Path, pairs: Path, *, force: bool) -> None:
    """Both retrieval tasks of a folder of images with captions, built beside their place."""
    import shutil
    import tempfile

    from kcm.app.folders import claim
    from kcm.app.pairs import I2T, T2I, read_pairs, write_pair_tasks
    from kcm.task import load_task
    from training.data import load_split
    from training.retrieval.gallery import load_gallery, load_pairs

    for direction in (I2T, T2I):
        claim(folder / direction, "task.toml", force=force)
    items = read_pairs(pairs)
    writable(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as scratch:
        built = {direction: Path(scratch) / direction for direction in (I2T, T2I)}
        write_pair_tasks(built, task_name(folder), items, f"Pairs of {pairs.name}")
        for direction, made in built.items():
            task = load_task(made)
            splits = {split: load_split(task, split) for split in ("train", "stream", "calibration", "test")}
            load_gallery(task), load_pairs(task)
            shutil.rmtree(folder / direction, ignore_errors=True)
            made.rename(folder / direction)
            rows = ", ".join(f"{name} {len(split)}" for name, split in splits.items())
            typer.echo(f"{folder / direction / 'task.toml'}: {len(task.labels)} items to find of {len(items)}; rows: {rows}")
    typer.echo(f"next: kcm simulate --task {folder / I2T}")


def task_name(folder: Path) -> str:
    """A task's id from the name of its folder."""
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in folder.resolve().name)
    return name if any(map(str.isalnum, name)) else "task"


def _modality(asked: str, train: Path, columns: DataSpec) -> str:
    """As asked, else as --train looks: images in a folder or an .npz, or in a table with their column. Raises ConfigError."""
    from training.data import column_names
    from training.image_files import is_image_data

    if asked not in ("", "text", "image"):
        raise ConfigError(f"modality {asked!r} is unknown", fix="text or image")
    if asked == "text" and is_image_data(train):
        raise ConfigError(f"{train} holds images, and --modality says text", fix="leave --modality out")
    if asked:
        return asked
    if is_image_data(train):
        return "image"
    names = column_names(train)
    return "image" if columns.image_column in names and columns.text_column not in names else "text"


def _labels(paths: Sequence[Path], columns: DataSpec, modality: str) -> tuple[list[str], Mapping[str, object] | None]:
    """(the labels of the files, sorted; of images also what the template says of their sizes). Raises DataError."""
    from training.data import label_names

    if modality == "text":
        return sorted({name for path in paths for name in label_names(path, columns.text_column, columns.label_column)}), None
    from kcm.app.init_images import WIDE, sizes
    from training.image_files import read_images

    read = [read_images(path, columns, WIDE, labels_optional=False) for path in paths]
    return sorted({name for images in read for name in images.labels}), sizes(payload for images in read for payload in images.payloads)


def warnings(splits: Mapping[str, Split], labels: Sequence[str]) -> list[str]:
    """What is allowed and yet seldom meant: a label that the edge never learns, files that share samples."""
    from training.data import identity

    found = []
    learnt = set(splits["train"].y.tolist())
    if unseen := [label for i, label in enumerate(labels) if i not in learnt]:
        shown = ", ".join(map(repr, unseen[:5])) + (", …" if len(unseen) > 5 else "")
        found.append(f"{len(unseen)} label(s) have no row in train, only in large_train: {shown}; a spelling mistake?")
    seen = {name: set(map(identity, split.payloads)) for name, split in splits.items()}  # read once: images may lie on a disk
    pairs = [(kept_back, other) for kept_back in ("test", "gold", "selection", "calibration") for other in _SPLITS]
    for kept_back, other in pairs:
        if _SPLITS.index(kept_back) <= _SPLITS.index(other) or not {kept_back, other} <= set(splits):
            continue
        if shared := seen[kept_back] & seen[other]:
            kind = "image" if isinstance(next(iter(shared)), bytes) else "text"
            found.append(f"{len(shared)} {kind}(s) of {kept_back} are in {other} too: figures on {kept_back} will flatter")
    return found


def write_task_toml(
    folder: Path,
    name: str,
    labels: Sequence[str],
    files: Mapping[str, str],
    *,
    title: str = "A task of your own",
    text_column: str = "text",
    image_column: str = "image",
    label_column: str = "label",
    images: Mapping[str, object] | None = None,
) -> None:
    """Write task.toml: `files` maps split → path relative to `folder`; `images`, of an image task, comes from init_images.sizes."""
    from kcm.app.init_images import TEMPLATE
    from kcm.task import PromptSpec

    ending = ".csv" if images is None else ""
    lines = [f"{split} = {_quoted(files[split])}" if split in files else f'# {split} = "{split}{ending}"' for split in _SPLITS]
    text = (_TEMPLATE if images is None else TEMPLATE).format(
        title=title,
        id=_quoted(name),
        labels="[\n" + "".join(f"  {_quoted(label)},\n" for label in labels) + "]",
        data="\n".join(lines),
        text_column=_quoted(text_column),
        image_column=_quoted(image_column),
        label_column=_quoted(label_column),
        **(images or {name: _quoted(value) for name, value in msgspec.to_builtins(PromptSpec()).items()}),
    )
    (folder / "task.toml").write_text(text, encoding="utf-8")


def _quoted(text: str) -> str:
    """A TOML basic string: as JSON's, but for DEL, which JSON leaves bare."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


_SPLITS = ("train", "large_train", "stream", "calibration", "selection", "gold", "test")
