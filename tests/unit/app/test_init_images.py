"""`kcm init` of images: a task.toml that fits them, whatever form they have, and that can be read."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from image_kit import jpeg, png, scene

from kcm.app.cli import main
from kcm.app.init import warnings, write_task_toml
from kcm.app.init_images import sizes
from kcm.images import ImagePreprocessor
from kcm.sample import Payload
from kcm.task import Task, load_task
from training.data import Split, load_split
from training.image_files import Files, pixels_of


def init(*arguments: str | Path) -> int:
    sys.argv = ["kcm", "init", *map(str, arguments)]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(autouse=True)
def arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


def folder(root: Path, name: str, shape: tuple[int, int], labels: tuple[str, ...] = ("cat", "dog")) -> Path:
    for place, label in enumerate(labels):
        (root / name / label).mkdir(parents=True)
        for i in range(2):
            (root / name / label / f"{i}.jpg").write_bytes(jpeg(scene(*shape, seed=10 * place + i)))
    return root / name


def test_a_folder_of_small_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = folder(tmp_path, "pictures", (48, 60))
    (tmp_path / "stream").mkdir()
    (tmp_path / "stream" / "0.png").write_bytes(png(scene(48, 60, seed=99)))
    assert init(tmp_path / "t", "--train", train, "--stream", tmp_path / "stream") == 0
    said = capsys.readouterr()
    assert "2 labels; rows: train 4, stream 1" in said.out and not said.err
    task = load_task(tmp_path / "t")
    assert (task.modality, task.labels, task.preprocess.size, task.small.kind) == ("image", ("cat", "dog"), 64, "resnet")
    assert (task.judge.folds, task.large.kind, task.large.size, task.large.net.frozen) == (2, "efficientnet-lite", 128, True)
    assert task.data.train == "../pictures"
    assert pixels_of(load_split(task, "train").payloads, ImagePreprocessor(task.preprocess)).shape == (4, 64, 64, 3)
    text = (tmp_path / "t" / "task.toml").read_text()
    assert "the shorter side of your images has 48 in the median" in text and "# calibration = " in text


def test_a_table_of_paths_is_told_by_its_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path, "pictures", (32, 32))
    rows = "".join(f"pictures/{label}/{i}.jpg,{label}\n" for label in ("cat", "dog") for i in range(2))
    (tmp_path / "train.csv").write_text("image,label\n" + rows)
    assert init(tmp_path / "t", "--train", tmp_path / "train.csv") == 0, capsys.readouterr().err
    assert load_task(tmp_path / "t").modality == "image"
    (tmp_path / "both.csv").write_text("text,image,label\na,x,cat\nb,y,dog\n")
    assert init(tmp_path / "u", "--train", tmp_path / "both.csv") == 0
    assert load_task(tmp_path / "u").modality == "text"


def test_an_npz_and_its_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.stack([scene(28, 28, seed=i) for i in range(6)])
    np.savez(tmp_path / "d.npz", x_train=images, y_train=[0, 1, 0, 1, 0, 1], x_dev=images[:2], y_dev=[0, 1], classes=["hat", "shoe"])
    assert init(tmp_path / "t", "--train", tmp_path / "d.npz#train", "--test", tmp_path / "d.npz#dev") == 0
    said = capsys.readouterr()
    assert "rows: train 6, test 2" in said.out
    assert "warning: 2 image(s) of test are in train too: figures on test will flatter" in said.err
    task = load_task(tmp_path / "t")
    assert task.labels == ("hat", "shoe") and task.preprocess.size == 32 and task.data.test == "../d.npz#dev"


def test_a_table_of_paths_is_asked_for_by_modality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path, "p", (300, 260))
    (tmp_path / "rows.csv").write_text("file,kind\np/cat/0.jpg,cat\np/dog/1.jpg,dog\n")
    assert (
        init(tmp_path / "t", "--train", tmp_path / "rows.csv", "--modality", "image", "--image-column", "file", "--label-column", "kind")
        == 0
    )
    task = load_task(tmp_path / "t")
    assert (task.preprocess.size, task.small.kind, task.small.net.frozen, task.large.size) == (224, "efficientnet-lite", True, 224)
    assert load_split(task, "train").y.tolist() == [0, 1]
    assert init(tmp_path / "u", "--train", tmp_path / "p", "--modality", "text") == 3
    assert init(tmp_path / "u", "--train", tmp_path / "p", "--modality", "sound") == 3
    assert "text or image" in capsys.readouterr().err and not (tmp_path / "u").exists()


def test_large_photos_get_limits_that_take_them(tmp_path: Path) -> None:
    big = np.zeros((4400, 4000, 3), np.uint8)
    (tmp_path / "p" / "cat").mkdir(parents=True)
    (tmp_path / "p" / "dog").mkdir()
    (tmp_path / "p" / "dog" / "0").write_bytes(jpeg(big))
    (tmp_path / "p" / "cat" / "0").write_bytes(jpeg(scene(224, 224)))
    assert init(tmp_path / "t", "--train", tmp_path / "p") == 0
    assert load_task(tmp_path / "t").preprocess.max_pixels == 4400 * 4000


def test_a_bad_image_leaves_no_task_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = folder(tmp_path, "p", (40, 40))
    (train / "dog" / "1.jpg").write_bytes(b"no image")
    assert init(tmp_path / "t", "--train", train) == 4
    assert "dog/1.jpg: the payload is of an unknown format" in capsys.readouterr().err
    assert not (tmp_path / "t" / "task.toml").exists()


def test_what_is_written_but_for_sizes_and_nets_is_the_default(tmp_path: Path) -> None:
    """A value in the template that isn't the default would be a second default."""
    write_task_toml(tmp_path, "t", ["a", "b"], {"train": "x"}, images=sizes([png(scene(32, 32))]))
    task = load_task(tmp_path)
    tables, usual = task.shipped(), Task(id="t", labels=("a", "b")).shipped()
    for names, changed in (
        (("preprocess",), {"kind"}),
        (("small",), {"kind"}),
        (("judge",), {"folds"}),
        (("large",), {"kind", "size", "net"}),
        (("large", "net"), {"frozen"}),
        (("cost",), set()),
    ):
        ours, theirs = tables, usual
        for name in names:
            ours, theirs = ours[name], theirs[name]
        assert {key for key in theirs if ours[key] != theirs[key]} == changed, names


@pytest.mark.parametrize(("side", "size"), [(8, 32), (32, 32), (33, 64), (64, 64), (72, 96), (128, 128), (129, 224), (2000, 224)])
def test_the_smallest_size_that_loses_nothing_of_the_median_image(side: int, size: int) -> None:
    images: list[Payload] = [png(np.zeros(shape, np.uint8)) for shape in ((4, 4, 3), (side, side + 5, 3), (2100, 2100, 3))]
    assert sizes(images)["size"] == size


def test_shared_images_are_found_without_keeping_any(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(png(scene(32, 32, seed=i)))
    reads: list[str] = []

    class Counted(Files):
        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            reads.append(self.paths[index])
            return super().__getitem__(index)

    labels = np.arange(30) % 2
    train = Split("train", Counted([str(tmp_path / f"{i}.png") for i in range(30)]), labels)
    rest = {name: Split(name, Counted([str(tmp_path / f"{i}.png") for i in range(20, 40)]), labels[:20]) for name in ("test", "gold")}
    found = warnings({"train": train, **rest}, ["a", "b"])
    assert found == [
        "10 image(s) of test are in train too: figures on test will flatter",
        "20 image(s) of test are in gold too: figures on test will flatter",
        "10 image(s) of gold are in train too: figures on gold will flatter",
    ]
    assert len(reads) == 70  # each once, whatever the number of pairs
