"""What a bench's samples are: a sentence and its words in other orders; drawn pictures where the bundle reads images."""

from __future__ import annotations

import io
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kcm.bundle import Bundle
    from kcm.sample import Payload

SENTENCE = "the bank said it would raise its lending rate by half a point to nine per cent from next monday"  # 20 words
PHOTO = (640, 480)  # pixels of a photograph, as JPEG


def payloads(bundle: Bundle, count: int) -> list[Payload]:
    """Unlike samples: sentences of 20 words, or PNG files of the size that the graph reads, which takes decoding and no scaling."""
    if bundle.task.modality == "text":
        words, draw = SENTENCE.split(), random.Random(0)
        return [SENTENCE, *(" ".join(draw.sample(words, len(words))) for _ in range(count - 1))]
    from kcm.images import png

    size = bundle.task.preprocess.size
    return [png(picture(size, size, seed)) for seed in range(count)]


def photo() -> bytes:
    """A JPEG file of PHOTO pixels, which takes scaling too."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(picture(*PHOTO, seed=0)).save(out, "JPEG", quality=90)
    return out.getvalue()


def picture(width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """[H, W, 3]: soft shapes with grain, so that files are as long as a photograph's."""
    import numpy as np

    draw = np.random.default_rng(seed)
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    image: NDArray[Any] = np.zeros((height, width, 3))
    for _ in range(6):
        y, x = draw.random(2)
        image += np.exp(-((rows - y) ** 2 + (columns - x) ** 2)[..., None] / draw.uniform(0.01, 0.1)) * draw.uniform(0, 160, 3)
    return np.clip(image + draw.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
