"""EfficientNet-Lite with its ImageNet weights frozen: each image goes through it once, and only a linear head is ever fitted."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kcm.assets import cache_dir, model_path
from kcm.images import ImagePreprocessor
from kcm.sample import Payload
from kcm.task import NetSpec, PreprocessSpec, Task
from training.image_files import pixels_of
from training.judge import Predictions
from training.linear import fit_softmax
from training.small import Examples
from training.vision.balance import balanced
from training.vision.kind import Progress, Served, VisionModel, vision_model
from training.vision.lite import FEATURES, EfficientNetLite, load_lite

Float32 = NDArray[np.float32]
Index = NDArray[np.int64]

_L2 = 0.1  # of the head on standardised features; chosen on CIFAR-100-LT
_TINY = 1e-6
_BATCH = 64
_FILES = 40  # of cached features; the oldest go
_FEWEST = 200  # images that are worth a file


class Backbone:
    """The frozen net and how it reads an image: payloads → features [N, 1280], kept on disk per set of payloads."""

    def __init__(self, spec: NetSpec, preprocess: PreprocessSpec, root: str, progress: Progress = lambda _: None) -> None:
        """Raises ConfigError where the weights aren't there."""
        folder = model_path(spec.weights, root)
        self.net, self._preprocess, self._progress = load_lite(folder, 1), preprocess, progress
        self.preprocessor = ImagePreprocessor(preprocess)
        self._identity = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))).digest()

    def features(self, payloads: Sequence[Payload]) -> Float32:
        """Raises DataError where an image can't be decoded."""
        if len(payloads) < _FEWEST:
            return self._made(payloads)
        file = cache_dir() / "image-features" / f"{self._key(payloads)}.npy"
        with contextlib.suppress(OSError, ValueError):
            kept: Float32 = np.load(file, allow_pickle=False).astype(np.float32)
            file.touch()
            return kept
        features = self._made(payloads)
        with contextlib.suppress(OSError):  # a cache that can't be written costs time, no more
            _keep(file, features.astype(np.float16))
        return features

    def _made(self, payloads: Sequence[Payload]) -> Float32:
        out = np.zeros((len(payloads), FEATURES), np.float32)
        module = _Features(self.net, self._preprocess.mean, self._preprocess.std)
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for start in range(0, len(payloads), _BATCH):
            if start % (16 * _BATCH) == 0 and len(payloads) > 16 * _BATCH:
                self._progress(f"image features: {start} of {len(payloads)}")
            images = pixels_of(payloads[start : start + _BATCH], self.preprocessor)
            with torch.inference_mode():
                out[start : start + _BATCH] = module(torch.from_numpy(images)).numpy()
        return out.astype(np.float16).astype(np.float32)  # as the cache keeps them: the same whether made or read

    def _key(self, payloads: Sequence[Payload]) -> str:
        p = self._preprocess
        digest = hashlib.sha256(repr((p.size, p.resize, p.mean, p.std)).encode() + self._identity)
        for payload in payloads:
            data = payload.encode() if isinstance(payload, str) else payload
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()[:32]


class FrozenVision:
    """The kind of small model (training/small.py) on a frozen backbone. Features are what it gives [N, 1280]."""

    def __init__(self, task: Task, progress: Progress = lambda _: None) -> None:
        """Raises ConfigError where the weights aren't there."""
        self._task, self._backbone = task, Backbone(task.small.net, task.preprocess, task.root, progress)
        self.preprocessor = self._backbone.preprocessor

    def featurise(self, payloads: Sequence[Payload]) -> Float32:
        """Raises DataError where an image can't be decoded."""
        return self._backbone.features(payloads)

    def take(self, features: Float32, index: Index) -> Float32:
        return features[index]

    def join(self, first: Float32, second: Float32) -> Float32:
        return np.concatenate([first, second])

    def fit(self, examples: Examples) -> VisionModel:
        net = with_head(self._backbone.net, *fit_head(examples, self._task.small.net))
        return vision_model("efficientnet-lite", net, len(self._task.labels), self._task.preprocess)

    def predict(self, model: VisionModel, features: Float32) -> Predictions:
        head = model.net.heads[0]
        logits = features @ head.weight.detach().numpy().T + head.bias.detach().numpy()
        return Predictions(logits, *np.zeros((2, len(features)), np.float32))


def fit_head(examples: Examples, spec: NetSpec) -> tuple[Float32, Float32]:
    """Weight [C, 1280] and bias [C], balanced as the spec says. Features are standardised while fitting, which the two then contain."""
    x = examples.features
    mean, scale = x.mean(0), (x.std(0) + _TINY) * np.float32(np.sqrt(x.shape[1]))  # a sample then has a length of about one
    shift, weights, after = balanced(spec.balance, examples.targets, examples.weights, examples.labelled)
    dense = np.concatenate([(x - mean) / scale, np.ones((len(x), 1), np.float32)], 1)  # the last column's row of W is the bias
    _, solved = fit_softmax(None, dense, examples.targets, weights, reverse=examples.reverse, l2=_L2, shift=shift)
    weight = (solved[:-1] / scale[:, None]).astype(np.float32)
    bias: Float32 = (solved[-1] - mean @ weight - after).astype(np.float32)
    return weight.T.copy(), bias


def with_head(net: EfficientNetLite, weight: Float32, bias: Float32) -> EfficientNetLite:
    """The net with a head of weight [C, 1280] and bias [C]."""
    headed = deepcopy(net)
    headed.head = torch.nn.Linear(FEATURES, len(bias))
    headed.head.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    return headed.eval()


class _Features(Served):
    """image uint8 [B, S, S, 3] → features [B, 1280]."""

    def forward(self, image: Tensor) -> Tensor:
        x = image.to(torch.float32).permute(0, 3, 1, 2)
        features: Tensor = self.net.features((x - self.mean) / self.std)  # type: ignore[operator]
        return features


def _keep(file: Path, features: NDArray[np.float16]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    building = file.with_name(f".{os.getpid()}-{file.name}")
    np.save(building, features, allow_pickle=False)
    building.replace(file)
    kept = sorted(file.parent.glob("*.npy"), key=lambda path: path.stat().st_mtime)
    for old in kept[:-_FILES]:
        old.unlink(missing_ok=True)
