"""Images for tests, drawn here: small scenes that survive JPEG, in every form that a file may have; a tiny real bundle of colours."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tomli_w
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import kcm.bundle
import kcm.images
from edge_runtime.engines.onnx import OrtEngine
from kcm.bundle import GraphSpec
from kcm.calibration import Calibration, HintGate
from kcm.preprocess import check_sums, load_preprocessor, longest_of
from kcm.task import LargeSpec, PreprocessSpec, SmallSpec, Task

Pixels = NDArray[np.uint8]


def scene(height: int, width: int, seed: int = 0) -> Pixels:
    """[H, W, 3]: a colour gradient with a few squares; smooth enough that scaling and JPEG change little."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.stack([255 * rows / height, 255 * columns / width, 255 * (rows + columns) / (height + width)], 2)
    for _ in range(3):
        top, left = rng.integers(0, height), rng.integers(0, width)
        image[top : top + height // 3, left : left + width // 3] = rng.integers(0, 256, 3)
    return image.astype(np.uint8)


def saved(image: Pixels | Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, kind, **options)
    return out.getvalue()


def jpeg(image: Pixels | Image.Image, **options: Any) -> bytes:
    return saved(image, "JPEG", **{"quality": 95, "subsampling": 0, **options})


def png(image: Pixels | Image.Image, **options: Any) -> bytes:
    return saved(image, "PNG", **options)


LABELS = ("alpha", "beta", "gamma", "delta")  # as tests/edge_cloud.py knows them
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))  # a plain picture of it is easy; grey is hard


def plain(label: int, size: int = 32) -> Pixels:
    return np.full((size, size, 3), COLOURS[label], np.uint8)


def noise(size: int, seed: int = 0) -> Pixels:
    """Grey on average, so that the small model can't tell; as many bytes as pixels, whatever the format."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def colour_graph(size: int) -> bytes:
    """image uint8 [B, S, S, 3] → the fused graph's outputs: the mean colour speaks for its label, C_x is the best probability."""
    weights = np.array(COLOURS, np.float32).T / 255 - 0.5  # [3, C]
    bias = -np.array([np.sum((np.array(colour) / 255 - 0.5) ** 2) for colour in COLOURS], np.float32)
    constants = [
        numpy_helper.from_array(12 * weights, "weights"),
        numpy_helper.from_array(6 * bias, "bias"),
        numpy_helper.from_array(np.float32(255), "most"),
        numpy_helper.from_array(np.float32(0.5), "middle"),
        numpy_helper.from_array(np.array([3], np.int64), "k"),
        numpy_helper.from_array(np.array([0], np.int64), "zero"),
        numpy_helper.from_array(np.array([1], np.int64), "one"),
    ]
    nodes = [
        helper.make_node("Cast", ["image"], ["levels"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["levels", "most"], ["shares"]),
        helper.make_node("Sub", ["shares", "middle"], ["centred"]),
        helper.make_node("ReduceMean", ["centred"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["products"]),
        helper.make_node("Add", ["products", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("TopK", ["probabilities", "k"], ["top_probs", "top_ids"]),
        helper.make_node("Gather", ["top_probs", "zero"], ["best"], axis=1),
        helper.make_node("Squeeze", ["best", "one"], ["confidence"]),
        helper.make_node("Identity", ["confidence"], ["score"]),
    ]
    inputs = [helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", size, size, 3])]
    shapes = {"logits": ["B", len(LABELS)], "top_ids": ["B", 3], "top_probs": ["B", 3], "confidence": ["B"], "score": ["B"]}
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64 if name == "top_ids" else TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    ]
    made = helper.make_graph(nodes, "fused", inputs, outputs, constants)
    return bytes(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString())


def make_image_bundle(folder: Path, *, size: int = 32, golden: dict[str, Any] | None = None, **preprocess: Any) -> Path:
    """A bundle that loads and reads images; `golden` are arrays of golden.npz instead of ours."""
    (folder / "models").mkdir(parents=True)
    task = Task(
        id="colours",
        labels=LABELS,
        modality="image",
        preprocess=PreprocessSpec(kind="image", size=size, **preprocess),
        small=SmallSpec(kind="onnx"),
        large=LargeSpec(kind="resnet"),
    )
    preprocessor = load_preprocessor(task.preprocess, {})
    graph = GraphSpec(inputs=longest_of(preprocessor), candidates=3, max_batch=32)
    model = colour_graph(size)
    (folder / "models" / "fp32.onnx").write_bytes(model)
    (folder / "task.toml").write_text(tomli_w.dumps(task.shipped()))
    (folder / "calibration.json").write_bytes(
        msgspec.json.encode({"fp32": Calibration(epsilon=0.9, calibration_id="colours", method="fixed", hint=HintGate(arm="candidates"))})
    )
    payloads = [kcm.images.png(image) for image in (*(plain(label, size) for label in range(4)), noise(size), scene(size, size))]
    inputs = preprocessor.batch(payloads)
    outputs = OrtEngine(model, graph, len(LABELS)).infer(inputs)
    arrays = {
        "image": np.frombuffer(b"".join(payloads), np.uint8),
        "offsets": np.cumsum([0, *map(len, payloads)]),
        "logits": outputs.logits,
        "confidence": outputs.confidence,
        "score": outputs.score,
        "top_ids": outputs.top_ids,
        "input_sums": check_sums(inputs),
    }
    changed = {**arrays, **(golden or {})}
    np.savez(folder / "golden.npz", **{name: array for name, array in changed.items() if array is not None})
    kcm.bundle.write_manifest(folder, task=task, graph=graph, version="0")
    return folder
