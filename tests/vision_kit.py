"""What tests of image tasks share: a tiny task of coloured scenes, its data as PNG files, and runs that are really trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_kit import png, scene
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.bundle import export_bundle
from kcm.sample import Payload
from kcm.task import Task, parse_task
from training.data import Split
from training.fixed_images import FixedImages
from training.program import train_run
from training.run import Run
from training.vision import load_vision

torch.set_num_threads(1)  # on busy cores two are many times slower

LABELS = ("red", "green", "blue")
SIZE = 32
SMALL = {"kind": "resnet", "net": {"depth": 8, "width": 4, "epochs": 6, "batch": 16}}
MEAN, STD = (125.0, 123.0, 114.0), (63.0, 62.0, 67.0)


def image_task(root: Path, small: dict[str, Any] | None = None, *, size: int = SIZE, **tables: Any) -> Task:
    """The task; `tables` are further ones of task.toml, or keys of theirs instead of ours."""
    values: dict[str, Any] = {
        "task": {"id": "tints", "modality": "image", "labels": list(LABELS)},
        "preprocess": {"kind": "image", "size": size, "mean": list(MEAN), "std": list(STD)},
        "small": small or SMALL,
        "judge": {"epsilon": 0.9, "folds": 2},
        "large": {"kind": "resnet"},
    }
    for name, table in tables.items():
        values[name] = {**values.get(name, {}), **table}
    return parse_task(values, "task.toml", root=str(root))


def tinted(rows: int = 96, *, size: int = SIZE, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """[N, S, S, 3] and labels: scenes with more of the label's colour, which noise hides in one of four."""
    random = np.random.default_rng(seed)
    labels = np.arange(rows) % len(LABELS)
    images = np.stack([scene(size, size, seed=1000 * seed + row) for row in range(rows)]).astype(np.float32)
    strength = np.where(random.random(rows) < 0.25, 8, 60)
    for row, label in enumerate(labels):
        images[row, :, :, label] += strength[row]
    images += random.normal(0, 12, images.shape)
    return np.clip(images, 0, 255).astype(np.uint8), labels.astype(np.int64)


def image_graph(layout: str = "channels-first", *, size: int | str = SIZE, classes: int = len(LABELS), **more: Any) -> bytes:
    """A user's classifier: a 3 × 3 convolution with random weights, the mean of each colour beside it, and a matrix.

    `more`: batch, element (of its input), opset, logits (its name), scale (of the matrix).
    """
    element = more.get("element", TensorProto.UINT8 if layout == "pixels" else TensorProto.FLOAT)
    random = np.random.default_rng(0)
    arrays = {
        "filters": random.normal(0, 0.1, (8, 3, 3, 3)),
        "matrix": np.concatenate([random.normal(0, 0.1, (8, classes)), more.get("scale", 3.0) * np.eye(3, classes)]),
    }
    node = helper.make_node
    nodes = [node("Cast", ["picture"], ["wide"], to=TensorProto.FLOAT)]
    nodes.append(
        node(
            "Identity" if layout == "channels-first" else "Transpose",
            ["wide"],
            ["x"],
            **({} if layout == "channels-first" else {"perm": [0, 3, 1, 2]}),
        )
    )
    nodes += [
        node("Conv", ["x", "filters"], ["conv"], pads=[1, 1, 1, 1]),
        node("Relu", ["conv"], ["relu"]),
        node("Concat", ["relu", "x"], ["both"], axis=1),
        node("ReduceMean", ["both", "sides"], ["pooled"], keepdims=0),
        node("MatMul", ["pooled", "matrix"], [more.get("logits", "logits")]),
    ]
    sides = [3, size, size] if layout == "channels-first" else [size, size, 3]
    graph = helper.make_graph(
        nodes,
        "theirs",
        [helper.make_tensor_value_info("picture", element, [more.get("batch", "N"), *sides])],
        [helper.make_tensor_value_info(more.get("logits", "logits"), TensorProto.FLOAT, [more.get("batch", "N"), classes])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in arrays.items()]
        + [numpy_helper.from_array(np.array([2, 3]), "sides")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", more.get("opset", 18))], ir_version=8)
    return bytes(model.SerializeToString())


def image_split(rows: int = 96, *, size: int = SIZE, seed: int = 0) -> Split:
    images, labels = tinted(rows, size=size, seed=seed)
    payloads: list[Payload] = [png(image) for image in images]
    return Split("train", payloads, labels)


def image_run(task: Task, rows: int = 96) -> Run:
    """Really trained, with its judge, on `rows` scenes of the task's size."""
    return train_run(task, load_vision(task), image_split(rows, size=task.preprocess.size), None, seed=0, progress=lambda _: None)


def fixed_bundle(folder: Path) -> Path:
    """A bundle of a user's graph, made in a second: for tests that need images and no net of ours."""
    (folder / "model.onnx").write_bytes(image_graph())
    task, data = image_task(folder, {"kind": "onnx", "path": "model.onnx"}), image_split(60)
    run = train_run(task, FixedImages(task), data, None, seed=0, progress=lambda _: None)
    export_bundle(run, folder / "bundle", golden_payloads=data.payloads[:12])
    return folder / "bundle"
