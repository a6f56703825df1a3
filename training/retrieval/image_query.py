"""The small model of image → text retrieval: a linear map from pixels to the space of the captions' embeddings.

The captions are encoded when the model is fitted, by an encoder that no device runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kcm.errors import ConfigError
from kcm.images import ImagePreprocessor, Pixels
from kcm.preprocess import as_text
from kcm.task import Task
from training.judge import Predictions
from training.retrieval.align import align, standardised
from training.retrieval.gallery import load_gallery
from training.retrieval.net import GalleryNet, net_of
from training.small import Examples
from training.vision.kind import OfPixels, VisionModel, vision_model

Float32 = NDArray[np.float32]
Index = NDArray[np.int64]

_L2 = 0.1  # on pixels whose squares add up to about one
_WEIGHTS = "small.safetensors"


class DualImages(OfPixels):
    """The kind of small model (training/small.py) that finds captions for images. Features are pixels."""

    by_item = True  # cross-fitting keeps the queries of one item together

    def __init__(self, task: Task, embed: Callable[[Sequence[str]], Float32]) -> None:
        """`embed` encodes the gallery's captions, [R] → [R, D], at the first fit."""
        self._task, self._embed = task, embed
        self.preprocessor = ImagePreprocessor(task.preprocess)

    @cached_property
    def items(self) -> Float32:
        """The gallery's embeddings [G, D]."""
        gallery = load_gallery(self._task)
        return gallery.pooled(standardised(self._embed([as_text(payload) for payload in gallery.payloads])))

    def fit(self, examples: Examples) -> VisionModel:
        """Raises ConfigError or DataError where the gallery or its encoder can't be had."""
        spec, flat = self._task.preprocess, self._flat(examples.features)
        centre, length = flat.mean(0), np.float32(np.sqrt(flat.shape[1]))
        weight, gallery = align((flat - centre) / length, examples.targets, examples.weights, self.items, _L2)
        arrays = (centre, weight / length, gallery)
        net = GalleryNet(*(torch.from_numpy(np.ascontiguousarray(array, np.float32)) for array in arrays))
        return vision_model("dual", net, len(self._task.labels), spec)

    def predict(self, model: VisionModel, features: Pixels) -> Predictions:
        return Predictions(model.logits(features), *np.zeros((2, len(features)), np.float32))

    def _flat(self, images: Pixels) -> Float32:
        """[N, S, S, 3] → [N, 3 · S · S], normalised, channels first as the net has them."""
        spec = self._task.preprocess
        mean, std = (np.array(values, dtype=np.float32) for values in (spec.mean, spec.std))
        x: Float32 = (images.astype(np.float32) - mean) / std
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2)).reshape(len(x), -1)


def load_dual_images(folder: Path, task: Task) -> VisionModel:
    """A saved model. Raises ConfigError where the weights are gone or are of another task."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        net = net_of(load_file(folder / _WEIGHTS), task.preprocess.size, len(task.labels))
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder / _WEIGHTS} can't be read as the task's dual model: {error}", fix="kcm train   makes a run") from error
    return vision_model("dual", net, len(task.labels), task.preprocess)
