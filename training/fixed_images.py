"""A small model that is the user's own ONNX image classifier. As training/fixed.py, of images: never trained here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kcm.errors import ConfigError
from kcm.preprocess import load_preprocessor
from kcm.sample import Payload
from kcm.task import Task
from training.fixed import ALIKE, Fixed, FixedGraph, Float32, alike, check_logits, graph_path, open_session, refuse_external
from training.judge import Predictions

Layout = Literal["pixels", "channels-first", "channels-last"]

_FLOATS = ("float32", "float16")
_TYPES = {"tensor(uint8)": "uint8", "tensor(float)": "float32", "tensor(float16)": "float16"}
_BATCH = 32


class FixedImages(Fixed):
    """The kind of small model of the user's image classifier with one input: uint8 pixels [N, S, S, 3], or floats [N, 3, S, S] or
    [N, S, S, 3], which get (x − mean) / std of [preprocess]. Training and export feed it alike.
    """

    def __init__(self, task: Task) -> None:
        """Read the graph, check it against the task, and run it once.

        Raises:
            ConfigError: the graph is missing, keeps tensors outside its file, reads anything but one batch of images of the task's
                size, has no such output, another number of classes, or a fixed batch.
        """
        self.preprocessor = load_preprocessor(task.preprocess, {})
        self._path, self._spec = graph_path(task), task.preprocess
        model = self._path.read_bytes()
        refuse_external(model, self._path)
        self.graph = FixedGraph(model, task.small.logits, len(task.labels), b"", 0)
        self._session: Any = open_session(model, self._path)
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(repr(node.name) for node in inputs) or "none"
            raise ConfigError(f"{self._path} has the inputs {names}; an image classifier reads one", fix="export it with the image alone")
        kind = _TYPES.get(inputs[0].type, inputs[0].type)
        self._name, self._dtype = inputs[0].name, kind
        self._layout = layout_of(kind, inputs[0].shape, task.preprocess.size, str(self._path))
        check_logits(self._session, task.small.logits, self._path)
        self._try_images(task.labels)

    def featurise(self, payloads: Sequence[Payload]) -> Predictions:
        """Raises ValueError for a payload that is no image that can be read."""
        out = Predictions(np.zeros((len(payloads), self.graph.classes), np.float32), *np.zeros((2, len(payloads)), np.float32))
        for start in range(0, len(payloads), _BATCH):
            images = self.preprocessor.batch(payloads[start : start + _BATCH])["image"]
            out.logits[start : start + _BATCH] = self._answer(images)
        return out

    def _answer(self, images: NDArray[np.uint8]) -> Float32:
        """[B, S, S, 3] → [B, C]."""
        x: NDArray[Any] = images
        if self._layout != "pixels":
            mean, std = np.array(self._spec.mean, np.float32), np.array(self._spec.std, np.float32)
            x = ((images.astype(np.float32) - mean) / std).astype(self._dtype)
        if self._layout == "channels-first":
            x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        logits: Float32 = self._session.run([self.graph.logits], {self._name: x})[0].astype(np.float32)
        return logits

    def _try_images(self, labels: tuple[str, ...]) -> None:
        """Grey, noise and black, together and alone: shape, finite values, and a batch that changes nothing."""
        size = self._spec.size
        noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
        images = np.stack([np.full_like(noise, 128), noise, np.zeros_like(noise)])
        try:
            alone = [self._answer(images[row : row + 1]) for row in range(len(images))]
            together = self._answer(images)
        except Exception as error:  # the runtime has a dozen exception types without a common base
            raise ConfigError(
                f"{self._path} can't run on {size} × {size} pixels, alone and by three: {error}",
                fix="export it with a dynamic batch (dynamic_axes), and set size under [preprocess]",
            ) from error
        names = ["a grey image", "noise", "a black image"]
        apart = alike(alone, together, f"{self._path}: output {self.graph.logits!r}", labels, names)
        if not apart <= ALIKE:
            raise ConfigError(
                f"{self._path}: an image's logits change by {apart:.2g} beside others",
                fix="export it in eval mode; dynamic int8, whose scales span a batch, can't pass",
            )


def layout_of(kind: str, shape: Sequence[object], size: int, where: str) -> Layout:
    """How a graph's input holds its images.

    Args:
        kind: NumPy's name of its elements.
        shape: a number where an axis is fixed, anything else where it is free.
        size: pixels a side that [preprocess] makes.

    Raises:
        ConfigError: it isn't uint8 [N, S, S, 3], or float [N, 3, S, S] or [N, S, S, 3].
    """
    said = f"{where}: its input is {kind} [{', '.join(str(axis) for axis in shape)}]"
    takes = "images are given as uint8 [N, S, S, 3], or as float32 or float16 [N, 3, S, S] or [N, S, S, 3]"
    if kind not in ("uint8", *_FLOATS) or len(shape) != 4:
        raise ConfigError(f"{said}; {takes}", fix="export it with one of these inputs")
    if isinstance(shape[0], int):
        raise ConfigError(f"{said}: its batch is fixed", fix='export it with a dynamic batch: dynamic_axes={"input": {0: "N"}}')
    sides: dict[Layout, Sequence[object]] = {"channels-first": shape[2:], "channels-last": shape[1:3]}
    colours = {"channels-first": shape[1], "channels-last": shape[3]}
    fits = [
        layout for layout, found in sides.items() if colours[layout] == 3 and all(side == size for side in found if isinstance(side, int))
    ]
    if not fits and 3 in shape:
        raise ConfigError(f"{said}; [preprocess] makes {size} × {size} pixels", fix="set size under [preprocess] to the graph's")
    if len(fits) != 1:
        raise ConfigError(f"{said}, which doesn't say where the three colours are; {takes}", fix="export it with that axis fixed to 3")
    if kind != "uint8":
        return fits[0]
    if fits[0] == "channels-first":
        raise ConfigError(f"{said}; {takes}", fix="let the graph transpose its pixels itself, after the cast")
    return "pixels"
