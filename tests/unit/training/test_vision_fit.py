"""Fitting: crops and schedule, loss against its formula, what a fit learns and ignores, and going on from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from vision_kit import LABELS, MEAN, STD, tinted

from kcm.errors import DataError
from kcm.task import NetSpec
from training.fit import one_hot
from training.vision import fit as fitting
from training.vision.checkpoint import Checkpoint, job_id
from training.vision.fit import Lesson, Pixel, augmented, fit_net, one_cycle
from training.vision.kind import build_net, new_net
from training.vision.nets import Bbn

SPEC = NetSpec(depth=8, width=4, epochs=6, batch=16, learning_rate=0.1, balance="none")
PIXEL = Pixel(MEAN, STD)


def lesson(rows: int = 96, seed: int = 0) -> Lesson:
    images, labels = tinted(rows, seed=seed)
    ones = np.ones(rows, np.float32)
    return Lesson(images, one_hot(labels, len(LABELS)), ones, ones > 0, ones < 0)


def fitted(data: Lesson, spec: NetSpec = SPEC, seed: int = 0, **more: object) -> nn.Module:
    net = new_net("resnet", spec, len(LABELS), seed)
    fit_net(net, data, spec, PIXEL, seed=seed, **more)  # type: ignore[arg-type]
    return net


def accuracy(net: nn.Module, data: Lesson) -> float:
    with torch.inference_mode():
        logits = net(PIXEL.normalised(torch.from_numpy(data.images))).numpy()
    return float((logits.argmax(1) == data.targets.argmax(1)).mean())


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_a_crop_is_the_image_moved_by_an_eighth_at_most_mirrored_at_the_border_and_flipped_half_the_time() -> None:
    size = 16
    rows, columns = np.mgrid[0:size, 0:size]
    image = np.stack([rows, columns, rows * 0 + 7], 2).astype(np.uint8)
    out = augmented(torch.from_numpy(np.stack([image] * 400)), torch.Generator().manual_seed(0)).numpy()
    assert out.shape == (400, size, size, 3) and out.dtype == np.uint8 and (out[..., 2] == 7).all()
    flips, moves = 0, set()
    for one in out:
        assert (one[:, :, 0] == one[:, :1, 0]).all() and (one[:, :, 1] == one[:1, :, 1]).all()
        down, right = one[:, 0, 0].astype(int), one[0, :, 1].astype(int)
        if right[size // 2] < right[size // 2 - 1]:
            flips, right = flips + 1, right[::-1]
        for line in (down, right):
            move = int(line[size // 2]) - size // 2
            moves.add(move)
            at = np.abs(np.arange(size) + move)
            np.testing.assert_array_equal(line, np.where(at > size - 1, 2 * (size - 1) - at, at))
    assert moves == {-2, -1, 0, 1, 2}
    assert 160 < flips < 240


def test_the_rate_rises_then_falls() -> None:
    rates = [one_cycle(step / 100) for step in range(101)]
    assert int(np.argmax(rates)) == 20 and max(rates) == pytest.approx(1)
    assert rates[0] == pytest.approx(0.1) and rates[-1] == pytest.approx(1e-3)
    assert (np.diff(rates[20:]) < 0).all() and (np.diff(rates[:21]) > 0).all()


def test_the_loss_is_cross_entropy_or_the_reverse_divergence_by_row() -> None:
    rng = np.random.default_rng(0)
    logits, shift = rng.normal(size=(2, 4)), rng.normal(size=(2, 4))
    targets = np.array([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
    q = np.exp(logits + shift) / np.exp(logits + shift).sum(1, keepdims=True)
    expected = (2.0 * -(targets[0] * np.log(q[0])).sum() + 0.5 * (q[1] * np.log(q[1] / targets[1])).sum()) / 2
    tensors = [torch.from_numpy(a) for a in (targets, shift, np.array([2.0, 0.5]), np.array([False, True]))]
    batch = fitting._Batch(torch.zeros(0), *tensors)
    assert float(fitting._divergence(torch.from_numpy(logits), batch)) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["resnet", "bbn"])
def test_a_net_learns_scenes_that_it_has_not_seen(kind: str) -> None:
    net = new_net(kind, SPEC, len(LABELS), 0)  # type: ignore[arg-type]
    before = accuracy(net.eval(), lesson(90, seed=1))
    fit_net(net, lesson(), SPEC, PIXEL)
    assert not net.training
    assert accuracy(net, lesson(90, seed=1)) > max(0.75, before + 0.2)


def test_rows_without_weight_teach_nothing() -> None:
    good, wrong = lesson(48), lesson(48, seed=2)
    lies = Lesson(
        np.concatenate([good.images, wrong.images]),
        np.concatenate([good.targets, np.roll(wrong.targets, 1, 1)]),
        np.repeat([1.0, 0.0], 48).astype(np.float32),
        np.ones(96, bool),
        np.zeros(96, bool),
    )
    assert same(fitted(good), fitted(lies))


def test_the_seed_decides_all() -> None:
    data = lesson(48)
    assert same(fitted(data), fitted(data))
    other = new_net("resnet", SPEC, len(LABELS), 0)  # the same first weights, other batches and crops
    fit_net(other, data, SPEC, PIXEL, seed=1)
    assert not same(fitted(data), other)


def test_a_fit_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fitted(lesson(32), NetSpec(depth=8, width=4, epochs=1, batch=16))
    assert torch.equal(torch.rand(3), expected)


def test_a_loss_that_is_no_number_is_an_error_that_names_the_rate() -> None:
    with pytest.raises(DataError, match="the fit diverged") as refused:
        fitted(lesson(48), NetSpec(depth=8, width=4, epochs=8, batch=16, learning_rate=1e9, balance="none"))
    assert "learning_rate (1e+09)" in refused.value.fix


def test_nothing_to_learn_from_is_an_error() -> None:
    data = lesson(4)
    with pytest.raises(DataError, match="no images"):
        Lesson(data.images[:0], data.targets[:0], data.weights[:0], data.labelled[:0], data.reverse[:0])
    with pytest.raises(DataError, match="weight 0"):
        fitted(Lesson(data.images, data.targets, 0 * data.weights, data.labelled, data.reverse))


def test_adjusted_biases_favour_the_rare_class() -> None:
    images, labels = tinted(96)
    kept = np.flatnonzero((labels != 2) | (np.arange(96) < 12))
    ones = np.ones(len(kept), np.float32)
    rare = Lesson(images[kept], one_hot(labels[kept], 3), ones, ones > 0, ones < 0)
    plain, adjusted = fitted(rare), fitted(rare, NetSpec(depth=8, width=4, epochs=6, batch=16, balance="adjust"))
    assert isinstance(plain.head, nn.Linear) and isinstance(adjusted.head, nn.Linear)
    gained = (adjusted.head.bias - plain.head.bias).detach().numpy()
    np.testing.assert_allclose(gained, -np.log(np.array([32, 32, 4]) / 68), atol=1e-5)


def test_a_cut_fit_goes_on_to_the_very_net_that_it_would_have_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.vision import checkpoint

    monkeypatch.setattr(checkpoint, "_EVERY", 0.0)
    data, job = lesson(48), job_id(b"this fit")
    whole = fitted(data)
    kept = Checkpoint(tmp_path / "deep" / "fit.safetensors", job)
    epochs: list[int] = []

    class Cut(Checkpoint):
        def keep(self, net: nn.Module, optimiser: torch.optim.Optimizer, done: int) -> None:
            super().keep(net, optimiser, done)
            epochs.append(done)
            if done == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(data, checkpoint=Cut(kept.file, job))
    assert epochs == [1, 2, 3, 4]
    again = new_net("resnet", SPEC, len(LABELS), 1)  # other first weights: all must come from the file
    fit_net(again, data, SPEC, PIXEL, checkpoint=kept)
    assert same(again, whole)
    kept.remove()
    assert not kept.file.exists()


def test_another_fits_checkpoint_is_not_gone_on_from(tmp_path: Path) -> None:
    net = build_net("resnet", SPEC, 3)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    first = Checkpoint(tmp_path / "a", job_id(b"one", b"two"), _saved=-1e9)
    first.keep(net, optimiser, 3)
    assert first.resume(net, optimiser) == 3
    assert Checkpoint(tmp_path / "a", job_id(b"onet", b"wo")).resume(net, optimiser) == 0
    (tmp_path / "a").write_bytes(b"damaged")
    assert first.resume(net, optimiser) == 0


def test_two_branches_turn_from_the_data_as_it_is_to_the_reversed_sampler() -> None:
    """α = 1 − (t / T)², BBN's schedule (Zhou et al. 2020)."""
    seen: list[float] = []

    class Watched(Bbn):
        def mixed(self, conventional: torch.Tensor, balanced: torch.Tensor, alpha: float) -> torch.Tensor:
            seen.append(alpha)
            return super().mixed(conventional, balanced, alpha)

    fit_net(Watched(8, 4, len(LABELS)), lesson(16), NetSpec(depth=8, width=4, epochs=3, batch=16), PIXEL)
    assert seen == pytest.approx([1, 1 - 1 / 9, 1 - 4 / 9])


def test_the_reversed_samplers_rows_are_balanced_by_its_own_prior() -> None:
    counts = np.array([12, 3, 1])
    data, targets = lesson(16), one_hot(np.repeat(np.arange(3), counts), 3)
    whole = Lesson(data.images, targets, data.weights, data.labelled, data.reverse)
    rows = fitting._Data(whole, np.arange(16), np.zeros((16, 3), np.float32), data.weights, NetSpec(batch=16), two=True)
    (batch,) = rows.batches(torch.Generator().manual_seed(0))
    assert batch.second is not None
    expected = np.log((1 / counts) / (1 / counts).sum())
    np.testing.assert_allclose(batch.second.shift.numpy(), np.tile(expected, (16, 1)), rtol=1e-5)
