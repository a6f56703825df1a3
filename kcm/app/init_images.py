"""The image task that `kcm init` writes: its template, and the size that fits the user's images."""

from __future__ import annotations

from collections.abc import Iterable

from kcm.sample import Payload
from kcm.task import PreprocessSpec

SIZES = (32, 64, 96, 128, 224)
_CONVOLUTIONAL = 64  # pixels up to which a CIFAR ResNet sees all of an image; beyond, its cost grows and what it sees does not
_LARGE = 128  # pixels from which on EfficientNet-Lite's ImageNet weights are worth something
# While the user's images are looked at: what a message can hold, and a camera's 64 megapixels.
WIDE = PreprocessSpec(kind="image", max_bytes=2**23, max_pixels=2**26)

TEMPLATE = """\
# {title}
# Every key is optional but [task] and data.train; kcm/task.py documents them all.

[task]
id = {id}
modality = "image"
# The order is the label ids' order: edge and cloud compare a hash of it. Append, never reorder, once devices run.
labels = {labels}

[data]
# A folder with one folder per label; CSV, JSONL or Parquet whose image column holds paths relative to that file; or an .npz with
# images uint8 [N, H, W, 3] and labels (FILE.npz#dev where it holds x_train and x_dev). Paths are relative to this file.
# train: the edge's own labels. large_train: the large model's, disjoint from the stream.
# stream: unlabelled images as they reach the devices. calibration: labels kept back to choose the threshold.
# selection: labels to choose head and hint gate by, else a third of calibration. gold: what a distillation round must pass.
# test: read by reports only.
{data}
image_column = {image_column}
label_column = {label_column}

[preprocess]
kind = "image"         # JPEG and PNG
size = {size: <16}# pixels a side; the shorter side of your images has {median}. Larger costs time, smaller costs detail
resize = "crop"        # the middle square; "squash" keeps the edges and bends the shapes
max_bytes = {max_bytes: <11}# of one file, 8 MiB at most: on the devices, a larger one is refused
max_pixels = {max_pixels}

[small]
{small}
[judge]
kind = "kan"           # or "mlp", of equal parameters
epsilon = 0.98         # until `kcm calibrate` chooses one on your data
folds = 2              # the small model is fitted once more for each: the judge learns from images that it wasn't fitted on

[large]
kind = "efficientnet-lite"  # ImageNet weights: `kcm fetch efficientnet-lite0`. "resnet" and "bbn" (long tails) begin from nothing
size = {large_size: <16}# pixels a side; 0: as the small model

[large.net]
frozen = true          # a head on the weights as they are: minutes on a CPU. false fits all of them: better, and a matter of a GPU
balance = "softmax"    # for a long tail; "none" where the classes are as frequent on the devices as in your labels

[cost]                 # money per call, any unit
cloud_call = 1.0
local_call = 0.0
"""
RESNET = """\
kind = "resnet"        # or "efficientnet-lite", or "onnx" with path = "MODEL.onnx"

[small.net]
depth = 8              # 6n + 2: 14 or 20 are better and slower
width = 16             # channels of the first stage
epochs = 30
balance = "softmax"    # for a long tail; "none" where the classes are as frequent on the devices as in your labels
"""
EFFICIENTNET = """\
kind = "efficientnet-lite"  # or "resnet", for images of at most 64 pixels, or "onnx" with path = "MODEL.onnx"

[small.net]
frozen = true          # a head on the ImageNet weights (`kcm fetch efficientnet-lite0`); false fits all of them, and wants a GPU
balance = "softmax"    # for a long tail; "none" where the classes are as frequent on the devices as in your labels
"""


def sizes(payloads: Iterable[Payload]) -> dict[str, object]:
    """What of the template hangs on how large the images are: the smallest of SIZES that loses nothing of the median one, and limits."""
    from statistics import median_low

    from kcm.images import read_header
    from kcm.preprocess import as_image

    headers = [read_header(as_image(payload), WIDE) for payload in payloads]
    median = median_low([min(header.width, header.height) for header in headers])
    size = next((size for size in SIZES if size >= median), SIZES[-1])
    small = RESNET if size <= _CONVOLUTIONAL else EFFICIENTNET
    usual = PreprocessSpec(kind="image")
    return {
        "size": size,
        "median": f"{median} in the median",
        "small": small,
        "large_size": max(size, _LARGE),
        "max_bytes": max(usual.max_bytes, *(header.length for header in headers)),
        "max_pixels": max(usual.max_pixels, *(header.width * header.height for header in headers)),
    }
