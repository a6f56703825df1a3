"""What tests of images between edge and cloud share: classifiers by mean colour as real ONNX graphs, their folders, a bundle.

Light: no torch. The labels are cloud_kit's, so that its requests and rows fit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tomli_w
from cloud_kit import LABELS
from image_kit import png
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import kcm.bundle
from edge_runtime.engines.onnx import OrtEngine
from kcm.bundle import GraphSpec
from kcm.calibration import Calibration, HintGate
from kcm.preprocess import check_sums, load_preprocessor, longest_of
from kcm.sample import Float32
from kcm.task import Task, parse_task

SIZE = 16
MEAN, STD = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)
EPSILON = 0.9
CANDIDATES = 3
# One colour per label; grey is hard for the small model.
COLOURS = ((200, 20, 20), (20, 200, 20), (20, 20, 200), (200, 200, 20))
GREY = (124, 112, 98)


def image_task(**preprocess: Any) -> Task:
    return parse_task(_tables(preprocess), "task.toml")


def write_image_task(folder: Path, **preprocess: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.toml").write_text(tomli_w.dumps(_tables(preprocess)))
    return folder / "task.toml"


def _tables(preprocess: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": {"id": "toy", "modality": "image", "labels": list(LABELS)},
        "preprocess": {"kind": "image", "size": SIZE, "mean": list(MEAN), "std": list(STD), **preprocess},
        "small": {"kind": "onnx", "path": "small.onnx"},
        "large": {"kind": "resnet"},
    }


def flat(colour: tuple[int, int, int], size: int = SIZE) -> bytes:
    """A PNG of one colour."""
    return png(np.full((size, size, 3), colour, np.uint8))


def noisy(seed: int, size: int = SIZE) -> bytes:
    """A PNG of noise around a random colour: no two alike."""
    rng = np.random.default_rng(seed)
    return png(np.clip(rng.integers(40, 220, 3) + rng.normal(0, 20, (size, size, 3)), 0, 255).astype(np.uint8))


def weights(classes: int = len(LABELS), scale: float = 2.0) -> Float32:
    """[3, C] on centred mean colours: a label's colour speaks for it."""
    colours = np.array([COLOURS[label % len(COLOURS)] for label in range(classes)], np.float32)
    return ((colours - np.array(GREY)).T / 90 * scale).astype(np.float32)


def colour_graph(
    *,
    classes: int = len(LABELS),
    element: int = TensorProto.UINT8,
    layout: str = "last",
    size: int | str = SIZE,
    channels: int | str = 3,
    name: str = "image",
    output: str = "logits",
    batch: int | str = "B",
    scale: float = 2.0,
    end: str = "",
    external: str = "",
    mixes_rows: bool = False,
    half: str = "",
) -> bytes:
    """A large model: the mean colour, centred, times a matrix.

    Floats are taken as already normalised. end: a node behind the logits. mixes_rows: each row gets the batch's mean, as by a batch
    norm that was exported while training. external: the matrix lies in this other file. half: "left" or "right", all that it looks at.
    """
    sides = [channels, size, size] if layout == "first" else [size, size, channels]
    matrix = numpy_helper.from_array(weights(classes, scale), "matrix")
    if external:
        matrix.ClearField("raw_data")
        matrix.data_location = TensorProto.EXTERNAL
        entry = matrix.external_data.add()
        entry.key, entry.value = "location", external
    floats = element != TensorProto.UINT8
    centre, spread = (np.zeros(3), np.ones(3)) if floats else (np.array(MEAN), np.array(STD))
    constants = [
        matrix,
        numpy_helper.from_array(centre.astype(np.float32), "centre"),
        numpy_helper.from_array(spread.astype(np.float32), "spread"),
        numpy_helper.from_array(np.array([2, 3] if layout == "first" else [1, 2], np.int64), "sides"),
        numpy_helper.from_array(np.array([0], np.int64), "rows"),
        numpy_helper.from_array(np.array([SIZE // 2 if half == "right" else 0], np.int64), "begin"),
        numpy_helper.from_array(np.array([SIZE // 2 if half == "left" else 2**30], np.int64), "end"),
        numpy_helper.from_array(np.array([3 if layout == "first" else 2], np.int64), "width"),
    ]
    last = f"{output}_0" if end else output
    nodes = [
        helper.make_node("Cast", [name], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Slice", ["wide", "begin", "end", "width"], ["seen"]),
        helper.make_node("ReduceMean", ["seen", "sides"], ["colour"], keepdims=0),
        helper.make_node("Sub", ["colour", "centre"], ["apart"]),
        helper.make_node("Div", ["apart", "spread"], ["x_0"]),
    ]
    if mixes_rows:
        nodes += [helper.make_node("ReduceMean", ["x_0", "rows"], ["norm"], keepdims=1), helper.make_node("Sub", ["x_0", "norm"], ["x"])]
    else:
        nodes.append(helper.make_node("Identity", ["x_0"], ["x"]))
    nodes.append(helper.make_node("MatMul", ["x", "matrix"], [last]))
    if end:
        nodes.append(helper.make_node(end, [last], [output]))
    made = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info(name, element, [batch, *sides])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, classes])],
        constants,
    )
    return bytes(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString())


def expected(pixels: NDArray[np.uint8], *, scale: float = 2.0, classes: int = len(LABELS)) -> Float32:
    """The raw logits [B, C] of colour_graph for images [B, S, S, 3], computed here."""
    mean = pixels.astype(np.float64).mean((1, 2))
    return (((mean - np.array(MEAN)) / np.array(STD)) @ weights(classes, scale)).astype(np.float32)


def write_image_large(folder: Path, graph: bytes | None = None, **changes: Any) -> Path:
    """A large model's folder as training writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    large = {
        "schema": 1,
        "kind": "resnet",
        "model": "large.onnx",
        "labels": list(LABELS),
        "task_id": "toy",
        "large_id": "f00d",
        "temperature": 1.5,
        "hint_weight": 0.7,
        "preprocess": {"kind": "image", "size": SIZE, "mean": list(MEAN), "std": list(STD)},
        **changes,
    }
    (folder / "large.json").write_text(json.dumps(large))
    (folder / "large.onnx").write_bytes(colour_graph() if graph is None else graph)
    return folder


def fused_graph() -> bytes:
    """An edge's graph: the mean colour's logits, softmax, top-k, C_x = best probability."""
    large = helper.make_model(helper.make_graph([], "", [], []))
    large.ParseFromString(colour_graph(scale=6.0))
    graph = large.graph
    graph.initializer.append(numpy_helper.from_array(np.array([CANDIDATES], np.int64), "k"))
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "one"))
    graph.node.extend(
        [
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
            helper.make_node("TopK", ["probabilities", "k"], ["top_probs", "top_ids"]),
            helper.make_node("Gather", ["top_probs", "rows"], ["best"], axis=1),
            helper.make_node("Squeeze", ["best", "one"], ["confidence"]),
            helper.make_node("Identity", ["confidence"], ["score"]),
        ]
    )
    graph.output.extend(
        [
            helper.make_tensor_value_info("top_ids", TensorProto.INT64, ["B", CANDIDATES]),
            helper.make_tensor_value_info("top_probs", TensorProto.FLOAT, ["B", CANDIDATES]),
            helper.make_tensor_value_info("confidence", TensorProto.FLOAT, ["B"]),
            helper.make_tensor_value_info("score", TensorProto.FLOAT, ["B"]),
        ]
    )
    return bytes(large.SerializeToString())


def make_image_bundle(folder: Path, *, gate: HintGate | None = None, **preprocess: Any) -> Path:
    """A bundle that loads: the colours are easy, grey is hard."""
    (folder / "models").mkdir(parents=True)
    task = image_task(**preprocess)
    preprocessor = load_preprocessor(task.preprocess, {})
    spec = GraphSpec(inputs=longest_of(preprocessor), candidates=CANDIDATES, max_batch=64)
    model = fused_graph()
    (folder / "models" / "fp32.onnx").write_bytes(model)
    (folder / "task.toml").write_text(tomli_w.dumps(task.shipped()))
    calibration = Calibration(epsilon=EPSILON, calibration_id="cal-0", method="fixed", hint=gate or HintGate(arm="candidates", no_hint=0.0))
    (folder / "calibration.json").write_bytes(msgspec.json.encode({"fp32": calibration}))
    payloads = [*map(flat, COLOURS), flat(GREY), noisy(0)]
    inputs = preprocessor.batch(payloads)
    outputs = OrtEngine(model, spec, len(LABELS)).infer(inputs)
    np.savez(
        folder / "golden.npz",
        image=np.frombuffer(b"".join(payloads), np.uint8),
        offsets=np.cumsum([0, *map(len, payloads)]),
        logits=outputs.logits,
        confidence=outputs.confidence,
        score=outputs.score,
        top_ids=outputs.top_ids,
        input_sums=check_sums(inputs),
    )
    kcm.bundle.write_manifest(folder, task=task, graph=spec, version="0", round_=0)
    return folder
