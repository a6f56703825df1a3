"""EfficientNet-Lite0: mobile inverted bottlenecks with ReLU6 and without squeeze-and-excitation, for real image sizes.

Source: Tan and Le 2019; the "lite" form is Google's of 2020. The package that carries the ImageNet weights isn't kept up and prints as
it runs, so the net is written here and loads them.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from kcm.errors import ConfigError, require

FEATURES = 1280  # of the pooled last layer
# (repeats, kernel, stride, expansion, outputs) of each stage
_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
_STEM = 32
_EPSILON = 1e-3  # of BatchNorm, as the weights were trained; their momentum of 0.01 is too slow for the few steps of a fine-tune


class Bottleneck(nn.Module):
    """1×1 expansion, depthwise k×k, 1×1 projection, and a shortcut where shapes allow: [B, inputs, S, S] → [B, outputs, S / stride, …]."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _layer(inputs, wide, 1, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _layer(wide, wide, kernel, stride, groups=wide)
        self.project = nn.Sequential(nn.Conv2d(wide, outputs, 1, bias=False), _norm(outputs))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return y + x if self.shortcut else y


class EfficientNetLite(nn.Module):
    """images [B, 3, S, S] → logits [B, C]. The weights expect pixels as (x − 127) / 128."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        inputs = _STEM
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for place in range(repeats):
                blocks.append(Bottleneck(inputs, outputs, kernel, stride if place == 0 else 1, expansion))
                inputs = outputs
        self.backbone = nn.Sequential(_layer(3, _STEM, 3, 2), *blocks, _layer(inputs, FEATURES, 1, 1))
        self.head = nn.Linear(FEATURES, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def heads(self) -> list[nn.Linear]:
        return [self.head]

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] → [B, 1280]."""
        pooled: Tensor = self.backbone(images).mean((2, 3))
        return pooled

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def load_lite(folder: Path, classes: int) -> EfficientNetLite:
    """The net with ImageNet weights, its head new and zero.

    Raises:
        ConfigError: `folder` holds no safetensors file of EfficientNet-Lite0.
    """
    safetensors = require("safetensors", "train")
    torch_files = require("safetensors.torch", "train")
    files = sorted(folder.glob("*.safetensors"))
    fix = "kcm fetch efficientnet-lite0"
    if len(files) != 1:
        raise ConfigError(f"{folder} holds {len(files)} safetensors files; one is read", fix=fix)
    net = EfficientNetLite(classes)
    try:
        found = torch_files.load_file(files[0])
        own = {_own_name(name): tensor for name, tensor in found.items() if not name.startswith("_fc.")}
        own |= {f"head.{name}": tensor for name, tensor in net.head.state_dict().items()}
        net.load_state_dict(
            {
                name: own.get(name, tensor) if name.endswith("num_batches_tracked") else own[name]
                for name, tensor in net.state_dict().items()
            }
        )
    except (OSError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{files[0]} isn't EfficientNet-Lite0: {error}", fix=fix) from error
    return net.eval()


_LAYERS = {  # a block's layers in the package that carries the weights → ours; place 0 is the convolution, 1 its BatchNorm
    "_expand_conv": "expand.0",
    "_bn0": "expand.1",
    "_depthwise_conv": "depthwise.0",
    "_bn1": "depthwise.1",
    "_project_conv": "project.0",
    "_bn2": "project.1",
}


def _own_name(name: str) -> str:
    """The carrying package's name of a weight → ours."""
    layer, rest = name.split(".", 1)
    last = sum(repeats for repeats, *_ in _STAGES) + 1
    ends = {"_conv_stem": "0.0", "_bn0": "0.1", "_conv_head": f"{last}.0", "_bn1": f"{last}.1"}
    if layer != "_blocks":
        return f"backbone.{ends.get(layer, layer)}.{rest}"
    place, inner, rest = rest.split(".", 2)
    return f"backbone.{int(place) + 1}.{_LAYERS.get(inner, inner)}.{rest}"


class SameConv(nn.Conv2d):
    """TensorFlow's "SAME" padding: with stride 2 one pixel more at the far sides. The weights were trained so."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        sides: list[int] = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            sides += [total // 2, total - total // 2]
        return nn.functional.conv2d(nn.functional.pad(x, sides), self.weight, None, self.stride, 0, 1, self.groups)


def _layer(inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> nn.Sequential:
    convolution = (
        SameConv(inputs, outputs, kernel, stride, groups=groups, bias=False)
        if stride > 1
        else nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    )
    return nn.Sequential(convolution, _norm(outputs), nn.ReLU6())


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_EPSILON)
