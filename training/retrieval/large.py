"""The large model of a retrieval task: frozen encoders of images and of texts, and one linear map between their spaces, fitted on pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.retrieval.align import hubs, solve, unit
from training.retrieval.gallery import Gallery

Float32 = NDArray[np.float32]

_L2 = 0.3  # on features whose squares add up to one; flat from 0.1 to 1 on the emoji pairs


@dataclass(frozen=True)
class GalleryHead:
    """logits = features [F] @ weight [F, G] + bias [G]."""

    weight: Float32
    bias: Float32

    def logits(self, features: Float32) -> Float32:
        """[N, F] → [N, G]: similarities, before any temperature."""
        return features @ self.weight + self.bias


def fit_gallery_head(queries: Float32, content: Float32, gallery: Gallery, gallery_content: Float32) -> GalleryHead:
    """Map queries to the space of the content by pairs, then score all items of the gallery.

    Args:
        queries: [N, F], the side of each pair that is a query at run time, encoded. content: [N, D], its other side.
        gallery_content: [R, D], the gallery's rows, encoded as `content` is.
    """
    middle, spread = content.mean(0), content.std(0) + np.float32(1e-6)
    items = gallery.pooled((gallery_content - middle) / spread)
    centre, scale = queries.mean(0), (queries.std(0) + np.float32(1e-6)) * np.float32(np.sqrt(queries.shape[1]))
    x = (queries - centre) / scale
    weight = solve(x, unit((content - middle) / spread), np.ones(len(x), np.float32), _L2) @ items.T
    bias = -hubs(x @ weight)
    plain: Float32 = (weight / scale[:, None]).astype(np.float32)
    return GalleryHead(plain, (bias - centre @ plain).astype(np.float32))
