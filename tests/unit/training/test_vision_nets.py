"""Nets: their shape against the papers, the two branches, and EfficientNet-Lite0 against the code that its weights come with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kcm.assets import cache_dir
from kcm.errors import ConfigError
from training.vision.lite import EfficientNetLite, load_lite
from training.vision.nets import Bbn, ResNet

LITE = cache_dir() / "models" / "efficientnet-lite0"


def images(count: int = 4, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("depth", "parameters"), [(20, 0.27e6), (32, 0.46e6), (44, 0.66e6)])
def test_a_resnet_has_the_depth_and_the_size_of_the_paper(depth: int, parameters: float) -> None:
    net = ResNet(depth, 16, 10)  # He et al. 2016, table 6, without the 1×1 shortcuts
    own = {name: p for name, p in net.named_parameters() if "shortcut" not in name}
    layers = [p for p in own.values() if p.ndim > 1]
    assert len(layers) == depth
    assert sum(p.numel() for p in own.values()) == pytest.approx(parameters, rel=0.02)
    with torch.inference_mode():
        features = net.trunk(images())
    assert features.shape == (4, 64, 8, 8)


@pytest.mark.parametrize(("depth", "nearest"), [(9, 8), (18, 20), (34, 32), (50, 50)])
def test_a_depth_that_is_none_is_refused_with_the_nearest(depth: int, nearest: int) -> None:
    if depth == nearest:
        ResNet(depth, 4, 3)
        return
    with pytest.raises(ConfigError, match="6n") as refused:
        ResNet(depth, 4, 3)
    assert refused.value.fix == f"depth = {nearest}"


def test_two_branches_share_all_but_the_last_block_and_weigh_one_half_each() -> None:
    torch.manual_seed(0)
    net, plain = Bbn(20, 8, 5).eval(), ResNet(20, 8, 5)
    for module in net.modules():  # blocks begin as their shortcuts: make the branches differ
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    assert len(net.trunk) == len(plain.trunk) - 1
    last = sum(p.numel() for p in plain.trunk[-1].parameters()) + sum(p.numel() for p in plain.head.parameters())
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in plain.parameters()) + last
    x, other = images(), images().flip(0)
    with torch.inference_mode():
        first, second = net.mixed(x, other, 1.0), net.mixed(other, x, 0.0)
        assert not torch.allclose(first, second, atol=1e-3)
        torch.testing.assert_close(net(x), (first + second) / 2)
        torch.testing.assert_close(net.mixed(x, x, 0.25), first * 0.25 + second * 0.75)
        assert torch.equal(net.mixed(x, x, 1.0), first)  # α = 1 reads the first branch's images alone


@pytest.mark.parametrize("size", [8, 32, 97, 128])
def test_lite_takes_any_size(size: int) -> None:
    with torch.inference_mode():
        assert EfficientNetLite(7).eval()(images(2, size)).shape == (2, 7)


@pytest.mark.data
@pytest.mark.skipif(not LITE.is_dir(), reason="kcm fetch efficientnet-lite0")
@pytest.mark.parametrize(
    ("size", "first", "total"),
    [
        (224, [0.932419, 0.0, 2.479325, 0.0], 151.099380),
        (128, [0.018207, 0.0, 1.884520, 0.0], 101.558632),
        (97, [0.135482, 0.0, 1.601555, 0.0], 261.971558),  # odd: "SAME" padding is uneven elsewhere
    ],
)
def test_lite_has_the_features_of_the_package_that_carries_its_weights(size: int, first: list[float], total: float) -> None:
    """The figures: efficientnet-lite-pytorch 0.1.0, extract_features, pooled, on the same pixels."""
    pixels = torch.from_numpy(np.random.default_rng(size).integers(0, 256, (1, size, size, 3), dtype=np.uint8))
    with torch.inference_mode():
        features = load_lite(LITE, 10).features((pixels.float().permute(0, 3, 1, 2) - 127) / 128)[0]
    np.testing.assert_allclose(features[:4].numpy(), first, atol=1e-3)
    assert float(features.sum()) == pytest.approx(total, rel=1e-4)


def test_weights_that_are_not_lites_are_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import save_file

    with pytest.raises(ConfigError, match="0 safetensors"):
        load_lite(tmp_path, 3)
    save_file({"_fc.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="isn't EfficientNet-Lite0"):
        load_lite(tmp_path, 3)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="isn't EfficientNet-Lite0"):
        load_lite(tmp_path, 3)
