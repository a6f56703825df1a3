"""`kcm init DIR --pairs FOLDER`: both retrieval tasks of a user's images with captions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pair_kit import picture, write_pairs

from kcm.app.pairs import read_pairs
from kcm.errors import DataError
from kcm.task import load_task
from training.data import load_split

Kcm = Callable[..., tuple[int, str, str]]


def test_both_directions(tmp_path: Path, kcm: Kcm) -> None:
    own = write_pairs(tmp_path / "own")
    code, said, err = kcm("init", tmp_path / "shop", "--pairs", own)
    assert code == 0, err
    assert "45 items to find of 90" in said and f"kcm simulate --task {tmp_path / 'shop' / 'i2t'}" in said
    assert sorted(path.name for path in (tmp_path / "shop").iterdir()) == ["i2t", "t2i"]
    images, texts = (load_task(tmp_path / "shop" / direction) for direction in ("i2t", "t2i"))
    assert (images.id, texts.id) == ("shop-i2t", "shop-t2i")
    assert isinstance(load_split(images, "train").payloads[0], bytes) and isinstance(load_split(texts, "train").payloads[0], str)
    code, _, err = kcm("init", tmp_path / "shop", "--pairs", own)
    assert code != 0 and "--force replaces it" in err
    code, _, err = kcm("init", tmp_path / "shop", "--pairs", own, "--force")
    assert code == 0, err


def test_neither_or_both_is_refused(tmp_path: Path, kcm: Kcm) -> None:
    code, _, err = kcm("init", tmp_path / "task")
    assert code != 0 and "one of --train and --pairs" in err
    code, _, err = kcm("init", tmp_path / "task", "--pairs", tmp_path, "--train", tmp_path / "x.csv")
    assert code != 0 and "one of --train and --pairs" in err


def test_text_files_beside_the_images(tmp_path: Path) -> None:
    for name, lines in {"a": "a red disc\n\ndisc in red\n", "sub/b": "a red disc\ndisc  in red", "c": "blue bar"}.items():
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        picture("red", "disc").save(path)
        path.with_suffix(".txt").write_text(lines)
    items = {item.label: item for item in read_pairs(tmp_path)}
    assert set(items) == {"a", "c"}
    assert items["a"].texts == ("a red disc", "disc in red")
    assert [path.name for path in items["a"].images] == ["a.png", "b.png"]  # pictures of one item


def test_what_is_wrong_is_named(tmp_path: Path, kcm: Kcm) -> None:
    with pytest.raises(DataError, match="is no folder"):
        read_pairs(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no image"):
        read_pairs(tmp_path)
    picture("red", "disc").save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png has no caption: a\.txt"):
        read_pairs(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"a\.txt is empty"):
        read_pairs(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_pairs(tmp_path)
    (tmp_path / "captions.csv").write_text("image,text\nb.png,nothing\n")
    with pytest.raises(DataError, match=r"captions\.csv:2: .*b\.png does not exist"):
        read_pairs(tmp_path)
    for outside in (tmp_path / "a.png", "../a.png"):
        (tmp_path / "captions.csv").write_text(f"image,text\n{outside},a red disc\n")
        with pytest.raises(DataError, match=r"captions\.csv:2: .*a\.png lies outside"):
            read_pairs(tmp_path)
    (tmp_path / "captions.csv").write_text("image,text\na.png,a red disc\n")
    code, _, err = kcm("init", tmp_path / "task", "--pairs", tmp_path)
    assert code != 0 and "too few for a retrieval task" in err and not (tmp_path / "task" / "i2t").exists()


def test_an_image_that_is_none_leaves_nothing(tmp_path: Path, kcm: Kcm) -> None:
    own = write_pairs(tmp_path / "own")
    broken = sorted(own.glob("*.png"))[7]
    for content, said in ((broken.read_bytes()[:60], "is cut short"), (b"GIF89a", "GIF")):
        broken.write_bytes(content)
        code, _, err = kcm("init", tmp_path / "shop", "--pairs", own)
        assert code != 0 and str(broken) in err and said in err and "fix: " in err
        assert not (tmp_path / "shop" / "i2t").exists()
