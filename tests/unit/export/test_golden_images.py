"""Golden inputs of an image task: the pixels that the graph reads, so that no decoder on a device can differ on them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from image_kit import LABELS, colour_graph, jpeg, plain, scene

from edge_runtime.engines.onnx import OrtEngine
from edge_runtime.golden import check_golden, golden_payloads
from export.bundle import GOLDEN, golden
from export.session import Session
from kcm.bundle import GraphSpec
from kcm.errors import BundleError
from kcm.images import ImagePreprocessor
from kcm.preprocess import longest_of
from kcm.sample import Payload
from kcm.task import PreprocessSpec


def written(arrays: dict[str, object]) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


@pytest.mark.parametrize(("size", "rows", "kept"), [(32, 9, 9), (32, 80, GOLDEN), (224, 40, 20), (400, 12, 8)])
def test_photos_become_the_graphs_own_pixels_and_pass_the_edges_check(size: int, rows: int, kept: int) -> None:
    preprocessor, model = ImagePreprocessor(PreprocessSpec(kind="image", size=size)), colour_graph(size)
    photos: list[Payload] = [jpeg(plain(i, 300)) if i < 4 else jpeg(scene(240, 320, seed=i)) for i in range(rows)]
    arrays = golden(Session(model), preprocessor, photos)
    assert "text" not in arrays and len(arrays["logits"]) == len(arrays["offsets"]) - 1 == kept
    stored = written(arrays)
    pixels = preprocessor.batch(golden_payloads(stored))["image"]
    assert np.array_equal(pixels, preprocessor.batch(photos[:kept])["image"])
    assert arrays["input_sums"].tolist() == pixels.reshape(kept, -1).sum(1, dtype=np.int64).tolist()
    engine = OrtEngine(model, GraphSpec(inputs=longest_of(preprocessor), candidates=3), len(LABELS))
    check_golden(engine, preprocessor, stored)
    arrays["logits"][1] += 0.1
    with pytest.raises(BundleError, match="golden input 1: logits differ"):
        check_golden(engine, preprocessor, written(arrays))
