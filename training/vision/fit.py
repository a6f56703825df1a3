"""Fitting an image net: SGD with Nesterov momentum and a one-cycle schedule on soft targets, with random crops and flips.

One thread, and of the CPU's formats the fastest: channels last, and bfloat16 products where the CPU has them. Seconds of CPU time an
epoch of 10,847 images of 32 px, one thread of an EPYC with AVX512-BF16: see _BFLOAT16.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kcm.errors import DataError
from kcm.task import NetSpec
from training.vision.balance import Float32, Mask, balanced, class_counts, log_prior, reversed_counts, reversed_probabilities
from training.vision.checkpoint import Checkpoint
from training.vision.nets import Bbn

Progress = Callable[[str], None]
Pixels = NDArray[np.uint8]

_MOMENTUM, _DECAY = 0.9, 5e-4  # decay of convolutions and linear layers; He et al. 2016 has 1e-4, for 64,000 steps
_WARM, _FIRST, _LAST = 0.2, 0.1, 1e-3  # share of the steps that the rate rises; its first and last value, of the largest
_PAD = 8  # a crop may lie S / 8 off the middle: 4 of 32 pixels
_CLAMP = 1e-6  # of a target's probability under the reverse KL, which is infinite at zero
_SAY = 15.0  # seconds between two words on progress
# ResNet-8 4.2 s (fp32 6.7, and 10.4 channels first), ResNet-20 10.3 (15.8; 22.5).
_BFLOAT16 = ("avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Lesson:
    """N images [N, S, S, 3] with soft targets [N, C], weights [N], and which rows carry a true label or count by the reverse KL [N]."""

    images: Pixels
    targets: Float32
    weights: Float32
    labelled: Mask
    reverse: Mask

    def __post_init__(self) -> None:
        if not len(self.images):
            raise DataError("no images to fit on")


@dataclass(frozen=True)
class Pixel:
    """Normalisation: mean and std of pixels 0..255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] → float32 [B, 3, S, S], channels last in memory, as it comes."""
        x = (images.to(torch.float32) - torch.tensor(self.mean)) / torch.tensor(self.std)
        return x.permute(0, 3, 1, 2)


def fit_net(
    net: nn.Module,
    lesson: Lesson,
    spec: NetSpec,
    pixel: Pixel,
    *,
    seed: int = 0,
    progress: Progress = lambda _: None,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Fit `net` in place; its biases end up adjusted where the spec says "adjust". The same seed gives the same net on one machine.

    Args:
        checkpoint: where a long fit is kept every few epochs, and goes on from.

    Raises:
        DataError: the loss is no finite number, or all weights are 0.
    """
    kept = np.flatnonzero(lesson.weights > 0)
    if not len(kept):
        raise DataError("every image to fit on has weight 0", fix="label_weight or teacher_weight above 0 under [distill]")
    shift, weights, after = balanced(spec.balance, lesson.targets[kept], lesson.weights[kept], lesson.labelled[kept])
    data = _Data(lesson, kept, shift, weights / weights.mean(), spec, two=isinstance(net, Bbn))
    net.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimiser = _optimiser(net)
    steps = data.steps * spec.epochs
    first = checkpoint.resume(net, optimiser) if checkpoint else 0
    if first:
        progress(f"going on at epoch {first + 1} of {spec.epochs}")
    said = began = time.monotonic()
    for epoch in range(first, spec.epochs):
        total, generator = 0.0, torch.Generator().manual_seed(seed * 100_003 + epoch)
        for place, batch in enumerate(data.batches(generator)):
            for group in optimiser.param_groups:
                group["lr"] = spec.learning_rate * one_cycle((epoch * data.steps + place) / max(1, steps - 1))
            optimiser.zero_grad()
            alpha = 1 - (epoch / spec.epochs) ** 2
            loss = _loss(net, batch, pixel, alpha, generator)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            total += float(loss.detach())
        if not math.isfinite(total):
            fix = f"lower learning_rate ({spec.learning_rate:g}) under the model's .net"
            raise DataError(f"the loss is {total} in epoch {epoch + 1} of {spec.epochs}: the fit diverged", fix=fix)
        now = time.monotonic()
        if now - said > _SAY:
            left = (now - began) / (epoch + 1 - first) * (spec.epochs - epoch - 1)
            progress(f"epoch {epoch + 1} of {spec.epochs}: loss {total / data.steps:.3f}, {left:.0f} s left")
            said = now
        if checkpoint:
            checkpoint.keep(net, optimiser, epoch + 1)
    net.eval()
    if after.any():
        with torch.no_grad():
            for head in net.heads:  # type: ignore[union-attr]
                head.bias -= torch.from_numpy(after)


def one_cycle(progress: float) -> float:
    """The learning rate, of its largest value: up by a cosine, then down (Smith and Topin 2018). `progress`: 0..1 of the fit."""
    if progress < _WARM:
        return _FIRST + (1 - _FIRST) * (1 - math.cos(math.pi * progress / _WARM)) / 2
    return _LAST + (1 - _LAST) * (1 + math.cos(math.pi * (progress - _WARM) / (1 - _WARM))) / 2


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 [B, S, S, 3] → the same, each shifted by up to S / 8 with mirrored borders, and half of them flipped. One gather."""
    count, size = images.shape[:2]
    most = size // _PAD
    places = torch.arange(size)

    def shifted() -> Tensor:
        at = (places + torch.randint(-most, most + 1, (count, 1), generator=generator)).abs()
        return torch.where(at > size - 1, 2 * (size - 1) - at, at)

    rows, columns = shifted(), shifted()
    flip = torch.rand((count, 1), generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    flat = rows[:, :, None] * size + columns[:, None, :] + torch.arange(count)[:, None, None] * size * size
    return images.reshape(-1, 3)[flat]


@dataclass(frozen=True)
class _Batch:
    """Rows of a lesson as tensors; `second` is the reversed sampler's, for two branches."""

    images: Tensor
    targets: Tensor
    shift: Tensor
    weights: Tensor
    reverse: Tensor
    second: _Batch | None = None


class _Data:
    """A lesson's rows in random batches of equal size; a short last batch is left out, and another one in the next epoch."""

    def __init__(self, lesson: Lesson, kept: NDArray[np.int64], shift: Float32, weights: Float32, spec: NetSpec, *, two: bool) -> None:
        self._images, self._kept = torch.from_numpy(lesson.images), torch.from_numpy(kept)
        targets = lesson.targets[kept]
        self._arrays = tuple(torch.from_numpy(a) for a in (targets, shift, weights.astype(np.float32), lesson.reverse[kept]))
        self._size = min(spec.batch, len(kept))
        self.steps = len(kept) // self._size
        self._reversed: Tensor | None = None
        if two:
            counts = class_counts(targets, weights)
            self._reversed = torch.from_numpy(reversed_probabilities(targets, weights, counts))
            turned = log_prior(reversed_counts(counts)) if spec.balance == "softmax" else np.zeros(targets.shape[1], np.float32)
            self._turned = torch.from_numpy(turned)

    def batches(self, generator: torch.Generator) -> Iterator[_Batch]:
        order = torch.randperm(len(self._kept), generator=generator)
        for start in range(0, self.steps * self._size, self._size):
            second = None
            if self._reversed is not None:
                drawn = torch.multinomial(self._reversed, self._size, replacement=True, generator=generator)
                # Drawn by weight, so each counts as one.
                images, targets, _, weights, reverse = self._rows(drawn)
                second = _Batch(images, targets, self._turned.expand_as(targets), torch.ones_like(weights), reverse)
            yield _Batch(*self._rows(order[start : start + self._size]), second)

    def _rows(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        targets, shift, weights, reverse = (array[index] for array in self._arrays)
        return self._images[self._kept[index]], targets, shift, weights, reverse


def _loss(net: nn.Module, batch: _Batch, pixel: Pixel, alpha: float, generator: torch.Generator) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=_has_bfloat16()):
        images = pixel.normalised(augmented(batch.images, generator))
        if batch.second is None:
            logits = net(images)
        else:
            logits = net.mixed(images, pixel.normalised(augmented(batch.second.images, generator)), alpha)  # type: ignore[operator]
    loss = _divergence(logits.float(), batch)
    return loss if batch.second is None else alpha * loss + (1 - alpha) * _divergence(logits.float(), batch.second)


def _divergence(logits: Tensor, batch: _Batch) -> Tensor:
    """Mean of w · CE(target, q) over the batch, q = softmax(logits + shift), or of w · KL(q ‖ target) where a row is turned."""
    log_q = torch.log_softmax(logits + batch.shift, 1)
    losses = -(batch.targets * log_q).sum(1)
    if batch.reverse.any():
        gap = log_q - batch.targets.clamp(min=_CLAMP).log()
        losses = torch.where(batch.reverse, (log_q.exp() * gap).sum(1), losses)
    return (batch.weights * losses).mean()


def _optimiser(net: nn.Module) -> torch.optim.SGD:
    decayed = [p for p in net.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in net.parameters() if p.requires_grad and p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": _DECAY}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.SGD([group for group in groups if group["params"]], lr=0.0, momentum=_MOMENTUM, nesterov=True)


def _has_bfloat16() -> bool:
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(found.get(name) for name in _BFLOAT16)
