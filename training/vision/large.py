"""The large image model: fitted on all but a stratified tenth of its rows, on which temperature and the hint's weight are fitted then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kcm.assets import cache_dir, model_path
from kcm.errors import ConfigError, DataError
from kcm.fusion import fuse
from kcm.images import ImagePreprocessor
from kcm.task import LargeSpec, PreprocessSpec, Task
from training.data import Split
from training.fit import fold_of, one_hot
from training.image_files import pixels_of
from training.large_head import write_large
from training.small import Examples
from training.vision.balance import class_counts, log_prior
from training.vision.checkpoint import Checkpoint, job_id
from training.vision.fit import Lesson, Pixel, fit_net
from training.vision.frozen import Backbone, fit_head, with_head
from training.vision.kind import Kind, Net, VisionModel, new_net, vision_model

Float32 = NDArray[np.float32]
Progress = Callable[[str], None]

GRAPH = "large.onnx"
_PARTS = 10  # one of them is kept back
_FEWEST = 50  # rows that a tenth is taken of
_IMAGENET = ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0))  # mean and std that the weights expect
_HOTTEST, _COLDEST, HEAVIEST = 20.0, 0.05, 3.0  # bounds of temperature and hint weight
_LIGHTEST = 0.01  # a hint weight below it is none


@dataclass(frozen=True)
class FittedLarge:
    """The model, how it reads an image, and what it says [K, C] of the rows [K] of its split that were kept back."""

    model: VisionModel
    preprocess: PreprocessSpec
    kept_back: NDArray[np.int64]
    logits: Float32
    labels: NDArray[np.int64]
    shift: Float32  # [C]: log prior of the kept rows where the logits are those of a balanced world, else 0
    temperature: float


@dataclass(frozen=True)
class KeptBack:
    """What a model that was fitted elsewhere says [K, C] of rows [K] that it hadn't seen, as FittedLarge has it."""

    logits: Float32
    labels: NDArray[np.int64]
    shift: Float32
    temperature: float


def fit_large(task: Task, train: Split, progress: Progress = lambda _: None, *, seed: int = 0) -> FittedLarge:
    """Fit the net of [large]. A fit that was cut goes on from its last checkpoint, which lies in the cache.

    Raises:
        ConfigError: a ResNet's depth isn't 6n + 2, or the weights to start from aren't there.
        DataError: fewer than 50 rows, an image that can't be decoded, or a loss that diverges.
    """
    spec, large = large_preprocess(task), task.large
    if len(train) < _FEWEST:
        raise DataError(f"{len(train)} rows are too few to fit a large model on: a tenth is kept back", fix=f"{_FEWEST} or more")
    folds = fold_of(train.y, _PARTS, seed)
    inside, back = np.flatnonzero(folds > 0), np.flatnonzero(folds == 0)
    if large.kind == "efficientnet-lite" and large.net.frozen:
        model, logits = _frozen(task, spec, train, inside, back, progress)
    else:
        images = pixels_of(train.payloads, ImagePreprocessor(spec))
        net = _net(task, spec, images[inside], train.y[inside], seed, progress)
        model = vision_model(_kind(large), net, len(task.labels), spec)
        logits = model.logits(images[back])
    counts = class_counts(one_hot(train.y[back], len(task.labels)), np.ones(len(back), np.float32))
    shift = log_prior(counts) if large.net.balance != "none" else np.zeros(len(task.labels), np.float32)
    return FittedLarge(model, spec, back, logits, train.y[back], shift, fit_temperature(logits, train.y[back], shift))


def large_preprocess(task: Task) -> PreprocessSpec:
    """How the large model reads an image: as the task says, at its own size; ImageNet weights want their own mean and std."""
    size = task.large.size or task.preprocess.size
    spec = msgspec.structs.replace(task.preprocess, size=size)
    if task.large.kind == "efficientnet-lite" and task.large.net.weights:
        mean, std = _IMAGENET
        spec = msgspec.structs.replace(spec, mean=mean, std=std)
    return spec


def fit_temperature(logits: Float32, labels: NDArray[np.int64], shift: Float32) -> float:
    """T by NLL (Guo et al. 2017) of logits [K, C] on labels [K] that are drawn from the long tail, whose log prior is `shift` [C]."""
    return _least(lambda t: _nll(fuse(logits, np.zeros_like(logits), temperature=t, weight=0.0) + shift, labels), _COLDEST, _HOTTEST)


def fit_hint_weight(fitted: FittedLarge | KeptBack, priors: list[Float32]) -> float:
    """w ≥ 0 by NLL on the kept-back rows, over hints in several forms: log p_hint [K, C] of each; 0 where they add nothing."""

    def loss(weight: float) -> float:
        fused = (fuse(fitted.logits, prior, temperature=fitted.temperature, weight=weight) for prior in priors)
        return float(np.mean([_nll(logits + fitted.shift, fitted.labels) for logits in fused]))

    weight = _least(loss, 0.0, HEAVIEST)
    return weight if weight >= _LIGHTEST and loss(weight) < loss(0.0) else 0.0


def save_large_images(folder: Path, task: Task, fitted: FittedLarge, graph: bytes, hint_weight: float) -> str:
    """Write large.onnx and large.json as cloud_server reads them; returns the large model's id."""
    more: dict[str, Any] = {
        "kind": task.large.kind,
        "model": GRAPH,
        "hint_weight": hint_weight,
        "temperature": fitted.temperature,
        "preprocess": msgspec.to_builtins(fitted.preprocess),
    }
    return write_large(folder, task, more, {GRAPH: graph})


def _kind(large: LargeSpec) -> Kind:
    kind = large.kind
    assert kind == "resnet" or kind == "bbn" or kind == "efficientnet-lite"
    return kind


def _net(task: Task, spec: PreprocessSpec, images: NDArray[np.uint8], labels: NDArray[np.int64], seed: int, progress: Progress) -> Net:
    classes, recipe = len(task.labels), task.large.net
    net = new_net(_kind(task.large), recipe, classes, seed, task.root)
    ones = np.ones(len(labels), np.float32)
    lesson = Lesson(images, one_hot(labels, classes), ones, ones > 0, ones < 0)
    described = msgspec.json.encode([task.large, spec, classes, seed], order="deterministic")
    start = b"".join(tensor.numpy().tobytes() for tensor in net.state_dict().values())
    job = job_id(described, start, images.data, labels.data)
    checkpoint = Checkpoint(cache_dir() / "unfinished" / f"{job[:32]}.safetensors", job)
    fit_net(net, lesson, recipe, Pixel(spec.mean, spec.std), seed=seed, progress=progress, checkpoint=checkpoint)
    checkpoint.remove()
    return net


def _frozen(
    task: Task, spec: PreprocessSpec, train: Split, inside: NDArray[np.int64], back: NDArray[np.int64], progress: Progress
) -> tuple[VisionModel, Float32]:
    """The head on all rows, and what a head that hadn't seen them says of those kept back: fitting twice costs seconds here."""
    backbone = Backbone(task.large.net, spec, task.root, progress)
    features, targets = backbone.features(train.payloads), one_hot(train.y, len(task.labels))

    def fitted(rows: NDArray[np.int64]) -> tuple[Float32, Float32]:
        ones = np.ones(len(rows), np.float32)
        return fit_head(Examples(features[rows], targets[rows], ones, ones > 0, ones < 0), task.large.net)

    weight, bias = fitted(inside)
    logits: Float32 = features[back] @ weight.T + bias
    net = with_head(backbone.net, *fitted(np.arange(len(train))))
    return vision_model("efficientnet-lite", net, len(task.labels), spec), logits


def check_large(task: Task) -> None:
    """Raises ConfigError where [large] names weights that aren't there: before an hour of work, not after it."""
    if task.large.kind == "efficientnet-lite" and task.large.net.weights:
        model_path(task.large.net.weights, task.root)
    if task.large.kind == "onnx" and not task.path(task.large.model).is_file():
        raise ConfigError(f"{task.path(task.large.model)} does not exist", fix="model under [large] names the ONNX file")


def _least(loss: Callable[[float], float], low: float, high: float) -> float:
    from scipy.optimize import minimize_scalar

    return float(minimize_scalar(loss, bounds=(low, high), method="bounded").x)


def _nll(logits: Float32, labels: NDArray[np.int64]) -> float:
    z = logits.astype(np.float64)
    z -= z.max(1, keepdims=True)
    return float((np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels]).mean())
