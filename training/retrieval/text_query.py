"""The small model of text → image retrieval: a linear map from the mean of a text's word vectors to the space of the gallery's images.

The gallery's images are embedded when it is fitted, and no device runs the net that embeds them; what is left is the `dense` matrix of an
n-gram model without n-grams, which the text graph serves as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

from kcm.images import ImagePreprocessor
from kcm.preprocess import GROUPS
from kcm.sample import Payload
from kcm.task import NetSpec, PreprocessSpec, Task
from training.image_files import pixels_of
from training.ngrams import NgramModel, WordVectors, mean_vectors
from training.retrieval.align import align, standardised
from training.retrieval.gallery import load_gallery
from training.small import Examples, Ngrams

Float32 = NDArray[np.float32]

_L2 = 0.3
_SIF = 3e-2  # of the word vectors: texts are short here, and their frequent words are what can be seen
_PIXELS, _SIDE = 32, 128  # pixels a side that a gallery's image is read at: as it is, and by a net


class DualTexts(Ngrams):
    """The kind of small model that finds images for texts. Features are the device's ids."""

    by_item = True

    def __init__(self, task: Task, vectors: Callable[[], WordVectors]) -> None:
        super().__init__(task, vectors)
        self._task = task

    @cached_property
    def items(self) -> Float32:
        """The gallery's embeddings [G, D]."""
        gallery = load_gallery(self._task)
        return gallery.pooled(standardised(image_vectors(gallery.payloads, self._task.small.net, self._task.root)))

    def fit(self, examples: Examples) -> NgramModel:
        """Raises ConfigError or DataError where the gallery, its encoder or the word vectors can't be had."""
        assert self._vectors is not None
        features = mean_vectors(examples.features, self._vectors, _SIF)
        weight, gallery = align(features.dense, examples.targets, examples.weights, self.items, _L2)
        return NgramModel(
            {
                "row": np.zeros(examples.features.shape[1], np.int32),
                "idf": np.zeros((1, GROUPS), np.float32),
                "share": np.ones(GROUPS, np.float32),
                "table": np.zeros((1, len(self.items)), np.float32),
                **features.arrays,
                "dense": weight @ gallery,
            }
        )


def image_vectors(payloads: Sequence[Payload], net: NetSpec, root: str) -> Float32:
    """[N, F] of images: what a frozen image net makes of them, or their pixels where the spec names no weights.

    Raises:
        ConfigError: the weights aren't there.
        DataError: an image can't be decoded.
    """
    spec = PreprocessSpec(kind="image", size=_SIDE if net.weights else _PIXELS)
    if not net.weights:
        pixels = pixels_of(payloads, ImagePreprocessor(spec))
        return ((pixels.reshape(len(pixels), -1).astype(np.float32) - 127) / 128).astype(np.float32)
    from training.vision.frozen import Backbone

    return Backbone(msgspec.structs.replace(net, frozen=True), spec, root).features(payloads)
