"""`kcm simulate` on images, end to end: CIFAR-100's ten most frequent classes where the data is there, drawn scenes anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from vision_kit import LABELS, tinted

Kcm = Callable[..., tuple[int, str, str]]
DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "cifar100_lt" / "cifar100_lt_if100_dev.npz"
NET = "depth = 8\nwidth = 8\nepochs = 2\nbatch = 16\n"


def write(folder: Path, labels: list[str], parts: dict[str, tuple[NDArray[np.uint8], NDArray[np.int64] | None]]) -> Path:
    for name, (images, ids) in parts.items():
        named = {} if ids is None else {"labels": np.array(labels)[ids]}
        np.savez(folder / f"{name}.npz", images=images, **named)
    files = "".join(f'{name} = "{name}.npz"\n' for name in parts)
    (folder / "task.toml").write_text(
        f'[task]\nid = "cifar"\nmodality = "image"\nlabels = {json.dumps(labels)}\n[data]\n{files}'
        '[preprocess]\nkind = "image"\nmean = [129.3, 124.1, 112.4]\nstd = [68.2, 65.4, 70.4]\n'
        f'[small]\nkind = "resnet"\n[small.net]\n{NET}[judge]\nfolds = 2\n[large]\nkind = "resnet"\n[large.net]\n{NET}'
    )
    return folder


def checked(kcm: Kcm, task: Path, test: int) -> dict[str, object]:
    out = task / "result.json"
    code, said, err = kcm("simulate", "--task", task, "--seeds", 1, "--rounds", 1, "--out", out)
    assert code == 0, err
    assert "images have no TF-IDF floor" in said
    result: dict[str, object] = json.loads(out.read_text())
    assert result["modality"] == "image"
    rounds = result["seeds"][0]["rounds"]  # type: ignore[index]
    assert len(rounds) == 2 and "floor" not in rounds[1]
    assert 0.3 < rounds[1]["escalated_of_stream"] <= 0.5
    assert rounds[1]["curve"]["1.0"]["accuracy"] == pytest.approx(rounds[1]["large_accuracy"])
    return rounds[1]  # type: ignore[no-any-return]


@pytest.mark.slow
def test_scenes(tmp_path: Path, kcm: Kcm) -> None:
    parts = {name: tinted(rows, seed=seed) for name, rows, seed in (("train", 48, 0), ("large_train", 120, 1), ("test", 60, 2))}
    parts["stream"] = (tinted(80, seed=3)[0], None)  # type: ignore[assignment]
    last = checked(kcm, write(tmp_path, list(LABELS), parts), 60)  # type: ignore[arg-type]
    assert last["large_accuracy"] > 0.5  # type: ignore[operator]
    # The same large model, fitted once and given as a folder.
    assert kcm("train-large", "--task", tmp_path, "--out", tmp_path / "large")[0] == 0
    code, said, err = kcm("simulate", "--task", tmp_path, "--seeds", 1, "--rounds", 0, "--large", tmp_path / "large", "--json")
    assert code == 0 and "epoch" not in err.split("large")[-1], err
    assert json.loads(said)["mean"]["large_accuracy"] == pytest.approx(last["large_accuracy"], abs=0.02)
    code, said, _ = kcm("simulate", "--task", tmp_path, "--seeds", 1, "--rounds", 0, "--large", tmp_path / "large", "--methods", "kd,kcm")
    assert code == 0 and "stands on 8 reserved samples" in said and "of small; calls" in said


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not DATA.exists(), reason="needs CIFAR-100-LT beside the checkout")
def test_ten_classes_of_cifar(tmp_path: Path, kcm: Kcm) -> None:
    with np.load(DATA) as held:
        x, y, xd, yd, names = (held[name] for name in ("x_train", "y_train", "x_dev", "y_dev", "classes"))
    classes = np.argsort(-np.bincount(y, minlength=100), kind="stable")[:10]
    place = np.full(100, -1)
    place[classes] = np.arange(10)
    order = np.random.default_rng(0).permutation(np.flatnonzero(place[y] >= 0))
    inside = np.flatnonzero(place[yd] >= 0)[:300]
    parts = {"train": order[:100], "large_train": order[:400], "stream": order[400:800]}
    splits = {name: (x[rows], place[y[rows]] if name != "stream" else None) for name, rows in parts.items()}
    splits["test"] = (xd[inside], place[yd[inside]])
    last = checked(kcm, write(tmp_path, names[classes].tolist(), splits), len(inside))
    assert last["large_accuracy"] > 0.15  # type: ignore[operator]  # a coin with ten sides: 0.1


def test_another_large_model_by_name_is_refused(tmp_path: Path, kcm: Kcm) -> None:
    write(tmp_path, list(LABELS), {"train": tinted(3)})  # type: ignore[dict-item]
    code, _, err = kcm("simulate", "--task", tmp_path, "--large", "minilm")
    assert code == 3 and "--large minilm holds no large model of images" in err and "kcm train-large" in err
