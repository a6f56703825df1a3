"""Image classifiers as small models (training/small.py): pixels in, logits out. Length and unknown are 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kcm.assets import model_path
from kcm.errors import ConfigError
from kcm.images import ImagePreprocessor
from kcm.sample import Payload
from kcm.task import NetSpec, PreprocessSpec, Task
from training.image_files import pixels_of
from training.judge import Predictions
from training.retrieval.net import GalleryNet
from training.small import Examples
from training.vision.fit import Lesson, Pixel, fit_net
from training.vision.lite import EfficientNetLite, load_lite
from training.vision.nets import Bbn, ResNet

Float32 = NDArray[np.float32]
Index = NDArray[np.int64]
Pixels = NDArray[np.uint8]  # [N, S, S, 3]
Kind = Literal["resnet", "bbn", "efficientnet-lite", "dual"]
Net = ResNet | Bbn | EfficientNetLite | GalleryNet
Progress = Callable[[str], None]

_WEIGHTS = "small.safetensors"
_BATCH_PIXELS = 256 * 32 * 32  # of one pass: fits the caches


class Served(nn.Module):
    """image uint8 [B, S, S, 3] → logits float32 [B, C]: cast, transposed, (x − mean) / std, then the net. What is exported."""

    mean: Tensor  # [1, 3, 1, 1], of pixels 0..255
    std: Tensor

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(1, 3, 1, 1))
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        x = image.to(torch.float32).permute(0, 3, 1, 2)
        logits: Tensor = self.net((x - self.mean) / self.std)
        return logits


def new_net(kind: Kind, spec: NetSpec, classes: int, seed: int, root: str = ".") -> Net:
    """The net that a fit begins with, drawn by `seed`; an EfficientNet-Lite has the weights that the spec names, where it names some.

    Raises:
        ConfigError: the weights aren't there; a ResNet's depth isn't 6n + 2.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "efficientnet-lite" and spec.weights:
            return load_lite(model_path(spec.weights, root), classes)
        return build_net(kind, spec, classes)


def build_net(kind: Kind, spec: NetSpec, classes: int) -> Net:
    """The net of a spec, its weights random.

    Raises:
        ConfigError: a ResNet's depth isn't 6n + 2.
    """
    if kind == "efficientnet-lite":
        return EfficientNetLite(classes)
    return (Bbn if kind == "bbn" else ResNet)(spec.depth, spec.width, classes)


@dataclass(frozen=True, eq=False)
class VisionModel:
    """A fitted net and the pixels it reads: `size` a side, `mean` and `std` of 0..255. Its logits are for a balanced world where the
    spec balances: any adjustment for the class prior lies in the heads' biases.
    """

    kind: Kind
    net: Net
    classes: int
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def module(self) -> Served:
        """image uint8 [B, size, size, 3] → logits float32 [B, classes], for tracing and for answering."""
        return Served(self.net, self.mean, self.std)

    def logits(self, images: Pixels) -> Float32:
        """[N, S, S, 3] → [N, C]."""
        served = self.module()
        served.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        step = max(1, _BATCH_PIXELS // self.size**2)
        out = np.zeros((len(images), self.classes), np.float32)
        with torch.inference_mode():
            for start in range(0, len(images), step):
                out[start : start + step] = served(torch.from_numpy(np.ascontiguousarray(images[start : start + step]))).numpy()
        return out

    def save(self, folder: Path) -> None:
        """small.safetensors: weights and BatchNorm statistics; run.json's task says what net they are of."""
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in self.net.state_dict().items()}, folder / _WEIGHTS)

    @staticmethod
    def load(folder: Path, task: Task) -> VisionModel:
        """Raises ConfigError where the weights are gone or are another net's."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        kind = task.small.kind
        assert kind == "resnet" or kind == "efficientnet-lite"
        try:
            net = build_net(kind, task.small.net, len(task.labels))
            net.load_state_dict(load_file(folder / _WEIGHTS))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"{folder / _WEIGHTS} can't be read as the task's {kind}: {error}", fix="kcm train   makes a run") from error
        return vision_model(kind, net, len(task.labels), task.preprocess)


def vision_model(kind: Kind, net: Net, classes: int, spec: PreprocessSpec) -> VisionModel:
    """A net that reads what a preprocessing gives."""
    return VisionModel(kind, net.eval(), classes, spec.size, spec.mean, spec.std)


class OfPixels:
    """The features of a small model that reads pixels: uint8 [N, S, S, 3]."""

    preprocessor: ImagePreprocessor

    def featurise(self, payloads: Sequence[Payload]) -> Pixels:
        """Raises DataError where an image can't be decoded."""
        return pixels_of(payloads, self.preprocessor)

    def take(self, features: Pixels, index: Index) -> Pixels:
        return features[index]

    def join(self, first: Pixels, second: Pixels) -> Pixels:
        return np.concatenate([first, second])


class Vision(OfPixels):
    """The kind of small model whose whole net is fitted. Features are pixels."""

    def __init__(self, task: Task, progress: Progress = lambda _: None, *, seed: int = 0) -> None:
        """`seed` draws the net's first weights, the batches and the crops.

        Raises:
            ConfigError: a ResNet's depth isn't 6n + 2, or the weights to start from aren't there.
        """
        kind = task.small.kind
        assert kind == "resnet" or kind == "efficientnet-lite"
        self._kind: Kind = kind
        self._task, self._spec, self._progress, self._seed = task, task.small.net, progress, seed
        self.preprocessor = ImagePreprocessor(task.preprocess)
        self._start()

    def seeded(self, seed: int) -> Vision:
        return Vision(self._task, self._progress, seed=seed)

    def fit(self, examples: Examples) -> VisionModel:
        """Raises DataError where the loss diverges."""
        net, preprocess = self._start(), self._task.preprocess
        lesson = Lesson(examples.features, examples.targets, examples.weights, examples.labelled, examples.reverse)
        fit_net(net, lesson, self._spec, Pixel(preprocess.mean, preprocess.std), seed=self._seed, progress=self._progress)
        return vision_model(self._kind, net, len(self._task.labels), preprocess)

    def predict(self, model: VisionModel, features: Pixels) -> Predictions:
        return Predictions(model.logits(features), *np.zeros((2, len(features)), np.float32))

    def _start(self) -> Net:
        return new_net(self._kind, self._spec, len(self._task.labels), self._seed, self._task.root)
