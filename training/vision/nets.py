"""Image nets: normalised pixels [B, 3, S, S] → logits [B, C]. Plain Conv, BatchNorm and ReLU, which every engine folds and fuses.

ResNet: for 32 px (He et al. 2016, section 4.2): a 3×3 stem, three stages of n blocks, depth 6n + 2; narrower to wider by a 1×1
    convolution (their option B), since option A's strided slice and padding fuse with nothing.
Bbn: its two-branch form for long tails (Zhou et al. 2020).
The third net, EfficientNet-Lite, is in training/vision/lite.py.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from kcm.errors import ConfigError


class Net(Protocol):
    """What fitting and serving ask of a net; `heads` are its last layers, whose biases shift its logits by as much."""

    @property
    def heads(self) -> list[nn.Linear]: ...

    def __call__(self, images: Tensor) -> Tensor: ...


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut: [B, inputs, S, S] → [B, outputs, S / stride, S / stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*_convolution(inputs, outputs, 3, stride), nn.ReLU())
        self.second = nn.Sequential(*_convolution(outputs, outputs, 3, 1))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_convolution(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


class ResNet(nn.Module):
    """images [B, 3, S, S] → logits [B, C]; three stages of width, 2 · width and 4 · width channels."""

    def __init__(self, depth: int, width: int, classes: int) -> None:
        """Raises ConfigError where depth isn't 6n + 2."""
        super().__init__()
        self.trunk = nn.Sequential(*_stem(width), *_blocks(depth, width))
        self.head = nn.Linear(4 * width, classes)
        _initialise(self)

    @property
    def heads(self) -> list[nn.Linear]:
        return [self.head]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(_pooled(self.trunk(images)))
        return logits


class Bbn(nn.Module):
    """A ResNet whose last block and head exist twice: one branch learns from the data as it is, the other from a reversed sampler.

    Both weigh one half at inference. Source: BBN, Zhou et al. 2020, section 4: the branches share all but the last residual block.
    """

    def __init__(self, depth: int, width: int, classes: int) -> None:
        """Raises ConfigError where depth isn't 6n + 2."""
        super().__init__()
        shared, last = _blocks(depth, width), _blocks(depth, width)[-1]
        self.trunk = nn.Sequential(*_stem(width), *shared[:-1])
        self.branches = nn.ModuleList([shared[-1], last])
        self.classifiers = nn.ModuleList([nn.Linear(4 * width, classes) for _ in range(2)])
        _initialise(self)

    @property
    def heads(self) -> list[nn.Linear]:
        return [head for head in self.classifiers if isinstance(head, nn.Linear)]

    def forward(self, images: Tensor) -> Tensor:
        shared = self.trunk(images)
        return (self._branch(0, shared) + self._branch(1, shared)) / 2

    def mixed(self, conventional: Tensor, balanced: Tensor, alpha: float) -> Tensor:
        """α times the first branch's logits for images drawn as they are, plus 1 − α times the second's for reversed ones: [B, C]."""
        first, second = self.trunk(torch.cat([conventional, balanced])).split(len(conventional))
        return alpha * self._branch(0, first) + (1 - alpha) * self._branch(1, second)

    def _branch(self, which: int, shared: Tensor) -> Tensor:
        logits: Tensor = self.classifiers[which](_pooled(self.branches[which](shared)))
        return logits


def check_depth(depth: int) -> int:
    """n of a depth 6n + 2.

    Raises:
        ConfigError: it is none.
    """
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        nearest = 6 * max(1, round((depth - 2) / 6)) + 2
        raise ConfigError(f"a ResNet of depth {depth} doesn't exist: depth is 6n + 2", fix=f"depth = {nearest}")
    return n


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]


def _stem(width: int) -> list[nn.Module]:
    return [*_convolution(3, width, 3, 1), nn.ReLU()]


def _blocks(depth: int, width: int) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    inputs = width
    for stage in range(3):
        for place in range(check_depth(depth)):
            outputs = width << stage
            blocks.append(Block(inputs, outputs, 2 if stage and not place else 1))
            inputs = outputs
    return blocks


def _pooled(x: Tensor) -> Tensor:
    """[B, D, S, S] → [B, D]. Adaptive pooling would be exported as a dozen nodes that read shapes."""
    return x.mean((2, 3))


def _initialise(net: nn.Module) -> None:
    """Convolutions as He et al. 2015; each block's last BatchNorm scales by 0, so that it begins as its shortcut (Goyal et al. 2017)."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, Block):
            nn.init.zeros_(module.second[1].weight)  # type: ignore[arg-type]
