"""The KAN layer: a spline basis that sums to one, finite everywhere, refined and regularised without a NaN."""

from __future__ import annotations

from functools import partial

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kcm.errors import ConfigError
from kcm.task import parse_task
from training.judge import normalise_by
from training.kan import KanLayer, basis, centres, sparsity

grids = st.integers(2, 8)
degrees = st.sampled_from([1, 3])
few = partial(settings, deadline=None, max_examples=40)


def layer_of(inputs: int, outputs: int, grid: int, degree: int, seed: int) -> KanLayer:
    """A layer with statistics of its own and coefficients as large as fitting makes them."""
    torch.manual_seed(seed)
    layer = KanLayer(inputs, outputs, grid=grid, degree=degree).eval()
    assert layer.norm.running_mean is not None and layer.norm.running_var is not None
    with torch.no_grad():
        layer.norm.running_mean.normal_(0, 3)
        layer.norm.running_var.uniform_(0.1, 9)
        layer.spline.normal_(0, 2)
        layer.bias.normal_()
    return layer


def on_the_grid(layer: KanLayer, rows: int, seed: int, spread: float = 1.5) -> torch.Tensor:
    """Inputs [rows, in] as the layer's statistics expect them, some beyond the clamp."""
    assert layer.norm.running_mean is not None and layer.norm.running_var is not None
    noise = torch.from_numpy(np.random.default_rng(seed).normal(0, spread, (rows, layer.base.shape[1]))).float()
    return layer.norm.running_mean + layer.norm.running_var.sqrt() * noise


@few()
@given(st.integers(2, 64), degrees, st.floats(0, 1))
def test_the_basis_is_a_partition_of_unity(grid: int, degree: int, place: float) -> None:
    b = basis(torch.tensor(place * grid, dtype=torch.float64), grid, degree)
    assert b.shape == (grid + degree,)
    assert float(b.sum()) == pytest.approx(1.0, abs=1e-9)
    assert float(b.min()) >= -1e-12
    assert int((b > 1e-12).sum()) <= degree + 1


@few(max_examples=8)
@given(grids)
def test_the_cubic_basis_is_smooth_and_the_linear_one_continuous(grid: int) -> None:
    u = torch.linspace(0, grid, 400 * grid + 1, dtype=torch.float64)
    step = 1 / 400
    assert float(basis(u, grid, 1).diff(dim=0).abs().max()) <= step * 1.001
    second = basis(u, grid, 3).diff(n=2, dim=0) / step**2
    assert float(second.diff(dim=0).abs().max()) < 8 * step  # third derivatives are bounded: no jump in the second


@few()
@given(st.integers(2, 64), degrees, st.floats(0, 1))
def test_the_centres_reproduce_a_straight_line(grid: int, degree: int, place: float) -> None:
    """What makes folding the linear base exact."""
    u = torch.tensor(place * grid, dtype=torch.float64)
    assert float(basis(u, grid, degree) @ torch.from_numpy(centres(grid, degree))) == pytest.approx(float(u), abs=1e-9)


@few()
@given(st.integers(2, 16), degrees, st.integers(0, 999))
def test_folding_base_and_norm_is_exact(grid: int, degree: int, seed: int) -> None:
    layer = layer_of(3, 2, grid, degree, seed).double()
    x = on_the_grid(layer.float(), 50, seed).double()
    layer.double()
    a, b = layer.scale_and_shift()
    u = torch.from_numpy(np.clip(x.numpy() * a + b, 0, grid))
    folded = torch.einsum("bik,oik->bo", basis(u, grid, degree), torch.from_numpy(layer.folded())) + layer.bias
    assert torch.allclose(folded, layer(x), atol=1e-9, rtol=0)


@few()
@given(grids, degrees, st.sampled_from([1e4, 1e30, 3e38]))
def test_outputs_are_finite_however_large_the_input_and_flat_beyond_the_grid(grid: int, degree: int, size: float) -> None:
    layer = layer_of(2, 3, grid, degree, 0)
    x = torch.tensor([[size, -size], [-size, size], [size, 0.0]])
    y = layer(x)
    assert torch.isfinite(y).all()
    assert torch.equal(y, layer(x.clamp(-1e4, 1e4)))


@few(max_examples=60)
@given(
    st.lists(st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=2), min_size=2, max_size=6),
    st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=2),
    degrees,
    st.booleans(),
)
def test_any_finite_data_to_normalise_by_and_any_finite_input_give_finite_outputs_and_gradients(
    rows: list[list[float]], asked: list[float], degree: int, constant: bool
) -> None:
    """A constant column, columns of 1e30 whose variance is no float32, and inputs far from all of them."""
    data = torch.tensor(rows, dtype=torch.float32)
    if constant:
        data[:, 0] = data[0, 0]
    layer = KanLayer(2, 2, degree=degree).eval()
    normalise_by(layer, data)
    y = layer(torch.cat([data, torch.tensor([asked], dtype=torch.float32)]))
    assert torch.isfinite(y).all()
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)


def test_every_parameter_and_every_input_within_the_grid_gets_a_gradient() -> None:
    layer = layer_of(2, 2, 5, 3, 1)
    layer.norm.reset_running_stats()  # the grid is then -3..3
    x = torch.linspace(-3, 3, 80).repeat(2, 1).T.contiguous().requires_grad_()
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).all()), name
    assert x.grad is not None and bool((x.grad != 0).all())


def test_curves_add_up_to_the_layer() -> None:
    """`values` is what a plot of the judge shows: the sum of the shown curves must be the answer."""
    layer = layer_of(3, 2, 5, 3, 2)
    x = np.random.default_rng(0).normal(0, 2, (20, 3))
    a, b = layer.scale_and_shift()
    u = np.clip(a * x + b, 0, layer.grid)
    shown = sum(layer.values(u[:, i])[:, i] for i in range(3)).T + layer.bias.detach().double().numpy()
    told = layer(torch.from_numpy(x).float()).detach().double().numpy()
    assert shown == pytest.approx(told, abs=1e-4)
    edges = layer.edges(torch.from_numpy(x).float())
    assert (edges.sum(2) + layer.bias).detach().numpy() == pytest.approx(told, abs=1e-4)


@few(max_examples=30)
@given(st.integers(2, 8), st.integers(1, 4), degrees, st.integers(0, 999))
def test_a_refined_grid_keeps_the_function(grid: int, factor: int, degree: int, seed: int) -> None:
    layer = layer_of(3, 2, grid, degree, seed)
    fine = layer.refined(grid * factor)
    assert (fine.grid, fine.degree, fine.training) == (grid * factor, degree, False)
    x = torch.cat([on_the_grid(layer, 40, seed), torch.tensor([[1e30, -1e30, 0.0]])])
    scale = float(layer(x).detach().abs().max())
    assert torch.allclose(fine(x), layer(x), atol=1e-5 * scale, rtol=0)
    # And from there to a grid that doesn't divide it: finite, if no more exact.
    assert torch.isfinite(fine.refined(max(2, grid * factor - 1))(x)).all()


def test_refining_leaves_the_random_generator_alone_and_copies_nothing_by_reference() -> None:
    layer = layer_of(2, 2, 4, 3, 0)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    fine = layer.refined(8)
    assert torch.equal(torch.rand(3), wanted)
    before = fine.base.detach().clone()
    with torch.no_grad():
        layer.base.zero_()
    assert torch.equal(fine.base, before)


@few(max_examples=30)
@given(st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e6]), degrees, st.lists(st.booleans(), min_size=6, max_size=6))
def test_regularisation_has_no_nan_on_zeroed_edges(scale: float, degree: int, cut: list[bool]) -> None:
    """efficient-kan's entropy is NaN there."""
    torch.manual_seed(0)
    layers = nn.Sequential(KanLayer(3, 2, degree=degree), KanLayer(2, 2, degree=degree)).eval()
    with torch.no_grad():
        for layer in layers:
            layer.spline.mul_(scale)
            layer.base.mul_(scale)
        mask = torch.tensor(cut).reshape(2, 3)
        layers[0].spline[mask], layers[0].base[mask] = 0.0, 0.0
    found = sparsity(layers, torch.randn(20, 3))
    sum(found).backward()
    size, entropy = (value.detach() for value in found)
    assert torch.isfinite(size) and torch.isfinite(entropy) and float(size) >= 0
    assert 0 <= float(entropy) <= np.log(6) + np.log(4) + 1e-4
    for parameter in layers.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()


def test_regularisation_is_the_mean_activation_and_the_entropy_of_the_shares() -> None:
    layer = KanLayer(2, 1).eval()
    with torch.no_grad():
        layer.spline.zero_()
        layer.base.copy_(torch.tensor([[30.0, -90.0]]))
    x = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])  # z = ±1/3: the edges say ±10 and ±30
    size, entropy = (value.detach() for value in sparsity([layer], x))
    assert float(size) == pytest.approx(40, rel=1e-3)
    assert float(entropy) == pytest.approx(-0.25 * np.log(0.25) - 0.75 * np.log(0.75), rel=1e-3)
    assert [float(v) for v in sparsity(nn.Sequential(nn.Linear(2, 2)), x)] == [0, 0]


@pytest.mark.parametrize("degree", [0, 2, 4])
def test_another_degree_is_refused(degree: int) -> None:
    with pytest.raises(ValueError, match="1 and 3"):
        KanLayer(2, 2, degree=degree)


def test_a_grid_of_one_interval_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        KanLayer(2, 2, grid=1)
    with pytest.raises(ValueError, match="at least 2"):
        KanLayer(2, 2).refined(1)


@pytest.mark.parametrize(("key", "value"), [("grid", 1), ("grid", 65), ("l1", -0.1), ("entropy", -1.0), ("degree", 2)])
def test_task_toml_names_the_wrong_setting(key: str, value: float) -> None:
    values = {"task": {"id": "t", "labels": ["a", "b"]}, "judge": {key: value}}
    with pytest.raises(ConfigError, match=key):
        parse_task(values, "task.toml")


def test_task_toml_takes_a_fine_grid_and_the_weights() -> None:
    values = {"task": {"id": "t", "labels": ["a", "b"]}, "judge": {"grid": 64, "l1": 0.01, "entropy": 0.02}}
    spec = parse_task(values, "task.toml").judge
    assert (spec.grid, spec.l1, spec.entropy) == (64, 0.01, 0.02)
    assert msgspec.to_builtins(spec)["l1"] == 0.01
