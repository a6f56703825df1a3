"""A user's images: read as they are, or refused with file, row and the way out."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_kit import jpeg, png, scene

from kcm.errors import DataError
from kcm.images import ImagePreprocessor
from kcm.sample import Payload
from kcm.task import DataSpec, PreprocessSpec, Task
from training.calibrate import distinct, divide
from training.data import Split, identity, load_split
from training.image_files import Files, pixels_of, read_images
from training.reserve import reserved

IMAGES = [scene(32, 32, seed=i) for i in range(6)]
LABELS = ["cat", "dog", "cat", "owl", "dog", "cat"]
CIFAR = Path(__file__).parents[4] / "shared" / "data" / "cifar100_lt"  # beside the checkout
SPEC = PreprocessSpec(kind="image")


def task(folder: Path, file: str, labels: tuple[str, ...] = ("cat", "dog", "owl"), **values: object) -> Task:
    files = dict.fromkeys(("train", "stream", "calibration"), file)
    return Task(
        id="t", labels=labels, modality="image", data=DataSpec(**files), preprocess=PreprocessSpec(kind="image", **values), root=str(folder)
    )


def write(folder: Path, kind: str) -> str:
    """The six images in a form; the name of the file."""
    if kind == "folder":
        for row, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
            below = folder / "set" / label / ("more" if row == 5 else "")
            below.mkdir(parents=True, exist_ok=True)
            (below / f"{row}.PNG").write_bytes(png(image))
        (folder / "set" / "cat" / ".DS_Store").write_bytes(b"junk")
        (folder / "set" / "Thumbs.db").write_bytes(b"junk")
        return "set"
    if kind == "npz":
        np.savez(folder / "set.npz", images=np.stack(IMAGES), labels=np.array(LABELS))
        return "set.npz"
    if kind == "bytes":
        pq.write_table(pa.table({"image": list(map(png, IMAGES)), "label": LABELS}), folder / "set.parquet")
        return "set.parquet"
    if kind == "hf":
        images = [{"bytes": png(image), "path": f"{i}.png"} for i, image in enumerate(IMAGES)]
        pq.write_table(pa.table({"image": images, "label": LABELS}), folder / "set.parquet")
        return "set.parquet"
    (folder / "pictures").mkdir(exist_ok=True)
    for row, image in enumerate(IMAGES):
        (folder / "pictures" / f"{row}.png").write_bytes(png(image))
    names = [f"pictures/{row}.png" for row in range(6)]
    if kind == "parquet":
        pq.write_table(pa.table({"image": names, "label": LABELS}), folder / "set.parquet")
    elif kind == "jsonl":
        rows = [json.dumps({"image": name, "label": label}) for name, label in zip(names, LABELS, strict=True)]
        (folder / "set.jsonl").write_text("\n".join(rows))
    else:
        with (folder / "set.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("image", "label"), *zip(names, LABELS, strict=True)])
    return f"set.{kind}"


def failure(folder: Path, file: str, split: str = "train", **values: object) -> DataError:
    with pytest.raises(DataError) as error:
        load_split(task(folder, file, **values), split)
    return error.value


@pytest.mark.parametrize("kind", ["folder", "csv", "jsonl", "parquet", "bytes", "hf", "npz"])
def test_every_form_gives_the_same_samples(tmp_path: Path, kind: str) -> None:
    split = load_split(task(tmp_path, write(tmp_path, kind)), "train")
    pixels = pixels_of(split.payloads, ImagePreprocessor(SPEC))
    found = {(image.tobytes(), int(label)) for image, label in zip(pixels, split.y, strict=True)}
    assert found == {(image.tobytes(), ("cat", "dog", "owl").index(label)) for image, label in zip(IMAGES, LABELS, strict=True)}
    if kind != "folder":
        assert split.y.tolist() == [0, 1, 0, 2, 1, 0]
    kept = split.take([4, 0])
    assert len(kept) == 2 and kept.y.tolist() == split.y[[4, 0]].tolist()
    assert list(kept.payloads) == [split.payloads[4], split.payloads[0]]
    assert isinstance(kept.payloads, Files) == (kind in ("folder", "csv", "jsonl", "parquet"))


def test_files_are_read_on_access(tmp_path: Path) -> None:
    split = load_split(task(tmp_path, write(tmp_path, "csv")), "train")
    (tmp_path / "pictures" / "1.png").write_bytes(png(IMAGES[0]))
    assert split.payloads[1] == split.payloads[0] and list(split.payloads[1:3]) == [png(IMAGES[0]), png(IMAGES[2])]
    (tmp_path / "pictures" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.png can't be read any more: No such file"):
        _ = split.payloads[1]


@pytest.mark.parametrize("kind", ["csv", "npz", "folder"])
def test_a_stream_needs_no_labels(tmp_path: Path, kind: str) -> None:
    if kind == "npz":
        np.savez(tmp_path / "s.npz", images=np.stack(IMAGES))
        name = "s.npz"
    elif kind == "csv":
        write(tmp_path, "csv")
        (tmp_path / "s.csv").write_text("image\n" + "".join(f"pictures/{i}.png\n" for i in range(6)))
        name = "s.csv"
    else:
        write(tmp_path, "csv")
        name = "pictures"
    split = load_split(task(tmp_path, name), "stream")
    assert split.labels is None and len(split) == 6
    assert "label" in failure(tmp_path, name).message


def test_a_streams_folders_that_are_no_labels_are_only_folders(tmp_path: Path) -> None:
    for camera in ("north", "south"):
        (tmp_path / "s" / camera).mkdir(parents=True)
        (tmp_path / "s" / camera / "a.jpg").write_bytes(jpeg(IMAGES[0]))
    assert load_split(task(tmp_path, "s"), "stream").labels is None
    assert "unknown label 'north'" in failure(tmp_path, "s").message


@pytest.mark.parametrize("kind", ["folder", "csv", "bytes", "npz"])
def test_an_unknown_label_is_named_with_its_place(tmp_path: Path, kind: str) -> None:
    error = failure(tmp_path, write(tmp_path, kind), labels=("cat", "dog"))
    place = {"folder": "set/owl/3.PNG", "csv": "set.csv:5", "bytes": "set.parquet:4", "npz": "set.npz: row 3"}[kind]
    assert f"{place}: unknown label 'owl'" in error.message and "task.toml" in error.fix


@pytest.mark.parametrize("damage", ["text", "gif", "empty", "too-large", "too-many-pixels", "cut-header"])
@pytest.mark.parametrize("kind", ["folder", "csv", "bytes"])
def test_an_unreadable_image_is_named_with_its_place(tmp_path: Path, kind: str, damage: str) -> None:
    name = write(tmp_path, kind)
    limits = {"too-large": {"max_bytes": 2000}, "too-many-pixels": {"max_pixels": 1100}}.get(damage, {})
    noise = np.random.default_rng(0).integers(0, 256, (33, 34, 3), np.uint8)
    bad = {"text": b"no image", "gif": b"GIF89a...", "empty": b"", "cut-header": png(IMAGES[0])[:20]}.get(damage, png(noise))
    if kind == "bytes" and damage == "empty":
        return  # an empty value, see below
    if kind == "bytes":
        pq.write_table(pa.table({"image": [png(IMAGES[0]), bad], "label": LABELS[:2]}), tmp_path / name)
    else:
        next(tmp_path.rglob("3.*")).write_bytes(bad)
    reason = {
        "text": "of an unknown format",
        "gif": "is GIF: JPEG and PNG are read",
        "empty": "is empty",
        "too-large": "at most 2000",
        "too-many-pixels": "34 × 33, at most 1100 pixels",
        "cut-header": "cut short",
    }[damage]
    error = failure(tmp_path, name, **limits)
    message = error.message
    assert ("max_pixels under [preprocess]" in error.fix) == ("too" in damage)
    assert reason in message and {"folder": "owl/3.PNG", "csv": "set.csv:5", "bytes": "set.parquet:2"}[kind] in message
    if kind == "csv":
        assert "3.png" in message


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("image,label\n1.png,cat\n\n", "every row has label"),
        ("image,label\n1.png,cat\n9.png,dog", "set.csv:3: {folder}/9.png: can't be read: No such file"),
        ("image,label\n1.png,cat\n,dog", "set.csv:3: 'image' is empty or no path"),
        ("image,label\n1.png,cat\n1.png,dog", "set.csv:3: '1.png' is the image of line 2 too"),
        ("image,label\n1.png,cat\n./x/../1.png,dog", "is the image of line 2 too"),
        ("image,label\n1.png,", "set.csv:2: 'label' is empty or no name"),
        ("image,label\n.,cat", "can't be read: Is a directory"),
        ("photo,label\n1.png,cat", "'image' is missing; columns are 'photo', 'label'"),
        ("image,label\n", "set.csv has no rows"),
        ("image\n1.png", "set.csv:2: no column 'label', only 'image'"),
    ],
    ids=range(10),
)
def test_a_bad_table_is_refused_with_its_line(tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "set.csv").write_text(rows)
    (tmp_path / "1.png").write_bytes(png(IMAGES[0]))
    assert message.format(folder=tmp_path) in failure(tmp_path, "set.csv").message


def test_paths_and_bytes_in_one_column_are_refused(tmp_path: Path) -> None:
    rows = [{"bytes": None, "path": "1.png"}, {"bytes": png(IMAGES[1]), "path": "2.png"}]
    pq.write_table(pa.table({"image": rows, "label": ["cat", "dog"]}), tmp_path / "set.parquet")
    (tmp_path / "1.png").write_bytes(png(IMAGES[0]))
    assert "set.parquet:2: 'image' holds paths in some rows and bytes in others" in failure(tmp_path, "set.parquet").message


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    assert "none has no label folders" in failure(tmp_path, "none").message
    assert "none holds no images" in failure(tmp_path, "none", "stream").message
    name = write(tmp_path, "folder")
    (tmp_path / name / "hen").mkdir()
    assert "set/hen holds no image" in failure(tmp_path, name).message
    (tmp_path / name / "hen").rmdir()
    (tmp_path / name / "lost.png").write_bytes(png(IMAGES[0]))
    error = failure(tmp_path, name)
    assert "lost.png lies outside a label's folder" in error.message and "DIR/LABEL/FILE" in error.fix
    assert load_split(task(tmp_path, name), "stream").labels is None
    (tmp_path / name / "lost.png").unlink()
    (tmp_path / name / "cat" / "notes.txt").write_text("about cats")
    assert "notes.txt: the payload is of an unknown format" in failure(tmp_path, name).message
    assert "does not exist" in failure(tmp_path, "nowhere").message


def test_mixed_sizes_are_fine(tmp_path: Path) -> None:
    for label, shape in (("cat", (20, 30)), ("dog", (300, 200)), ("owl", (32, 32))):
        (tmp_path / "set" / label).mkdir(parents=True)
        (tmp_path / "set" / label / "1").write_bytes(jpeg(scene(*shape)))  # an ending says nothing
    split = load_split(task(tmp_path, "set"), "train")
    assert pixels_of(split.payloads, ImagePreprocessor(SPEC)).shape == (3, 32, 32, 3)


def save(**arrays: object) -> Callable[[Path], None]:
    return lambda folder: np.savez(folder / "set.npz", **arrays)  # type: ignore[arg-type]


STACK = np.stack(IMAGES)


@pytest.mark.parametrize(
    "arrays",
    [
        {"images": STACK, "labels": np.array([0, 1, 0, 2, 1, 0]), "label_names": np.array(["cat", "dog", "owl"])},
        {"images": STACK, "labels": np.array([0, 1, 0, 2, 1, 0], np.uint8), "names": np.array(["cat", "dog", "owl"])},
        {"x": STACK, "y": np.array([0, 1, 0, 2, 1, 0]), "classes": np.array(["cat", "dog", "owl"])},
        {"x_train": STACK, "y_train": np.array([0, 1, 0, 2, 1, 0]), "classes": np.array(["cat", "dog", "owl"])},
    ],
    ids=range(4),
)
def test_an_npz_by_its_usual_names(tmp_path: Path, arrays: dict[str, object]) -> None:
    save(**arrays)(tmp_path)
    split = load_split(task(tmp_path, "set.npz"), "train")
    assert split.y.tolist() == [0, 1, 0, 2, 1, 0]
    assert np.array_equal(pixels_of(split.payloads, ImagePreprocessor(SPEC)), STACK)


def test_an_npz_of_grey_images_and_bare_numbers(tmp_path: Path) -> None:
    grey = STACK[..., 1]
    for images in (grey, grey[..., None]):
        save(images=images, labels=np.array([0, 7, 0, 7, 7, 0]))(tmp_path)
        split = load_split(task(tmp_path, "set.npz", labels=("0", "7")), "train")
        assert split.y.tolist() == [0, 1, 0, 1, 1, 0]
        assert np.array_equal(pixels_of(split.payloads, ImagePreprocessor(SPEC)), np.repeat(grey[..., None], 3, 3))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": STACK.astype(np.float32), "labels": LABELS}, "images are float32 [6, 32, 32, 3], expected uint8"),
        ({"images": STACK.transpose(0, 3, 1, 2), "labels": LABELS}, "images are uint8 [6, 3, 32, 32], expected uint8 [N, H, W, 3]"),
        ({"images": STACK[:0], "labels": LABELS[:0]}, "holds no images"),
        ({"images": STACK}, "holds no labels"),
        ({"images": STACK, "labels": LABELS[:5]}, "labels are <U3 [5], expected names or whole numbers [6]"),
        ({"images": STACK, "labels": np.arange(6) / 2}, "labels are float64"),
        ({"images": STACK, "labels": np.array([*LABELS[:5], " "])}, "row 5: its label is empty"),
        ({"images": STACK, "labels": np.arange(6), "names": np.array(["cat", "dog"])}, "row 2: label 2 has no name, there are 2"),
        ({"images": STACK, "labels": np.arange(6) - 1, "names": np.array(LABELS)}, "row 0: label -1 has no name"),
        ({"images": STACK, "labels": np.arange(6), "names": np.arange(6)}, "the labels' names are int64"),
        ({"pictures": STACK}, "holds no array 'images', only 'pictures'"),
        ({"x_train": STACK, "x_dev": STACK}, "holds no whole part, only dev, train"),
        ({"images": np.array([object()]), "labels": ["a"]}, "no readable .npz: Object arrays cannot be loaded"),
    ],
    ids=range(13),
)
def test_a_bad_npz_is_refused(tmp_path: Path, arrays: dict[str, object], message: str) -> None:
    save(**arrays)(tmp_path)
    assert message in failure(tmp_path, "set.npz").message


def test_what_is_no_npz_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set.npz").write_bytes(b"no zip")
    assert "set.npz: no readable .npz" in failure(tmp_path, "set.npz").message
    with (tmp_path / "set.npz").open("wb") as file:
        np.save(file, STACK)
    assert "a single array" in failure(tmp_path, "set.npz").message


def test_a_part_of_an_npz_is_named_behind_a_hash(tmp_path: Path) -> None:
    save(x_train=STACK, y_train=LABELS, x_dev=STACK[:2], y_dev=LABELS[:2])(tmp_path)
    assert len(load_split(task(tmp_path, "set.npz#dev"), "train")) == 2
    assert len(load_split(task(tmp_path, "set.npz#train"), "train")) == 6
    error = failure(tmp_path, "set.npz#test")
    assert "holds no test part, only dev, train" in error.message and "set.npz#dev" in error.fix


@pytest.mark.data
@pytest.mark.skipif(not CIFAR.is_dir(), reason="the development data aren't here")
def test_the_cifar_files_as_they_are() -> None:
    labels = tuple(sorted(set(read_images(CIFAR / "cifar100_lt_if100_dev.npz#dev", DataSpec(), SPEC, labels_optional=False).labels)))
    assert len(labels) == 100
    dev = load_split(task(CIFAR, "cifar100_lt_if100_dev.npz#dev", labels=labels), "calibration")
    with np.load(CIFAR / "cifar100_lt_if100_dev.npz") as archive:
        pixels, ids, names = archive["x_dev"], archive["y_dev"], archive["classes"]
    assert np.array_equal(pixels_of(dev.payloads, ImagePreprocessor(SPEC)), pixels)
    assert [labels[i] for i in dev.y] == names[ids].tolist()
    stream = load_split(task(CIFAR, "cifar100_stream_unlabelled.npz", labels=labels), "stream")
    assert stream.labels is None and len(stream) == 10_000


def test_an_image_that_is_damaged_behind_its_header_is_named_when_it_is_decoded(tmp_path: Path) -> None:
    name = write(tmp_path, "csv")
    whole = png(scene(64, 64))
    (tmp_path / "pictures" / "4.png").write_bytes(whole[: len(whole) // 2])
    split = load_split(task(tmp_path, name), "train")  # only its header was looked at
    with pytest.raises(DataError, match=r"pictures/4\.png: the image is cut short"):
        pixels_of(split.payloads, ImagePreprocessor(SPEC))
    with pytest.raises(DataError, match="image 1: the image is cut short"):
        pixels_of([png(IMAGES[0]), whole[:-40]], ImagePreprocessor(SPEC))


def test_images_are_told_apart_and_dealt_out_by_their_bytes(tmp_path: Path) -> None:
    payloads: list[Payload] = [png(scene(16, 16, seed=i)) for i in range(300)]
    split = Split("calibration", [*payloads, *payloads[:50]], np.r_[np.arange(300) % 3, np.arange(1, 51) % 3])
    once = distinct(split)
    assert list(once.payloads) == payloads and once.y.tolist() == (np.arange(300) % 3).tolist()
    first, second = divide(once)
    assert len(first) + len(second) == 300 and not set(first.payloads) & set(second.payloads)
    assert 60 < len(first) < 140 and divide(once)[0].payloads == first.payloads
    assert 10 < sum(map(reserved, payloads)) < 55
    assert len({identity(payload) for payload in payloads}) == 300 and all(len(identity(payload)) == 16 for payload in payloads)
    assert identity("a text") == "a text" != identity(b"a text")


def test_distinct_keeps_files_on_the_disk(tmp_path: Path) -> None:
    split = load_split(task(tmp_path, write(tmp_path, "csv")), "calibration")
    assert isinstance(distinct(split).payloads, Files)
    assert isinstance(divide(split)[0].payloads, Files)
