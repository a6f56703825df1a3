"""CIFAR-100-LT as a task: a user's .npz files divided into what the edge, the cloud, the stream and the tests may see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

from kcm.errors import DataError

LABELLED, STREAM = "cifar100_lt_if100_dev.npz", "cifar100_stream_unlabelled.npz"
_EDGE = 5  # one in five labels of the long-tailed set is the edge's; the large model has all
_SELECTION = 0.2  # of the dev images choose head and gate; the others are the test
_TASK: dict[str, Any] = {
    "task": {"modality": "image"},
    "data": {name: f"{name}.npz" for name in ("train", "large_train", "stream", "selection", "test")},
    "preprocess": {"kind": "image", "size": 32, "mean": [129.3, 124.1, 112.4], "std": [68.2, 65.4, 70.4]},
    # As in benchmarks/cifar100_lt.py, where the settings were chosen on the selection images: the same ones as here.
    "small": {"kind": "resnet", "net": {"depth": 8, "width": 16, "epochs": 45, "batch": 64, "learning_rate": 0.2}},
    "judge": {"folds": 2},  # a fold is a whole fit
    "distill": {"temperature": 0.6},
}
_LARGE: dict[str, dict[str, Any]] = {
    "resnet": {"kind": "resnet", "net": {"depth": 32, "epochs": 20, "learning_rate": 0.2}},
    "bbn": {"kind": "bbn", "net": {"depth": 32, "epochs": 20, "learning_rate": 0.2}},
    "efficientnet-lite": {"kind": "efficientnet-lite", "size": 128, "net": {"frozen": True}},
}


def write_cifar_task(source: Path, folder: Path, *, large: str, epochs: int = 0) -> Path:
    """Write the task with one of three large models; returns its task.toml. What is there already is written anew, byte for byte.

    Args:
        source: holds LABELLED (x_train, y_train: the long-tailed set; x_dev, y_dev: balanced; classes) and STREAM (x: more images,
            without labels), uint8 [N, 32, 32, 3].
        epochs: of small and large model instead of the recipe's; 0 for the recipe's.

    Raises:
        DataError: a file is missing or isn't of that form.
    """
    whole, stream = _arrays(source / LABELLED, ("x_train", "y_train", "x_dev", "y_dev", "classes")), _arrays(source / STREAM, ("x",))
    classes = [str(name) for name in whole["classes"]]
    folder.mkdir(parents=True, exist_ok=True)
    edge, order = _every(whole["y_train"], _EDGE), np.random.default_rng(0).permutation(len(whole["y_dev"]))
    selection, test = map(np.sort, np.split(order, [round(_SELECTION * len(order))]))
    splits = {
        "train": (whole["x_train"][edge], whole["y_train"][edge]),
        "large_train": (whole["x_train"], whole["y_train"]),
        "selection": (whole["x_dev"][selection], whole["y_dev"][selection]),
        "test": (whole["x_dev"][test], whole["y_dev"][test]),
    }
    for name, (images, labels) in splits.items():
        np.savez(folder / f"{name}.npz", images=images, labels=whole["classes"][labels])
    np.savez(folder / "stream.npz", images=stream["x"])
    task: dict[str, Any] = {**_TASK, "task": {**_TASK["task"], "id": f"cifar100-lt-{large}", "labels": classes}, "large": _LARGE[large]}
    if epochs:
        for table in ("small", "large"):
            task[table] = {**task[table], "net": {**task[table]["net"], "epochs": epochs}}
    file = folder / "task.toml"
    file.write_text(tomli_w.dumps(task), encoding="utf-8")
    return file


def _arrays(file: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (OSError, KeyError, ValueError) as error:
        fix = f"a folder with {LABELLED} (x_train, y_train, x_dev, y_dev, classes) and {STREAM} (x)"
        raise DataError(f"{file} can't be read as CIFAR-100-LT: {error}", fix=f"--cifar names {fix}") from error


def _every(labels: NDArray[Any], step: int) -> NDArray[np.int64]:
    """Rows of every class, one in `step` and at least one."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[::step] for label in np.unique(labels)]))
