"""The KAN layer: a spline basis that sums to one, finite everywhere, and an export form that is the same function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kcm.errors import ConfigError
from kcm.task import parse_task
from training.kan import KanLayer, SaturatingForm, basis

grids = st.integers(2, 8)
degrees = st.sampled_from([1, 3])


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


@given(grids, degrees, st.floats(0, 1))
def test_the_basis_is_a_partition_of_unity(grid: int, degree: int, place: float) -> None:
    b = basis(torch.tensor(place * grid, dtype=torch.float64), grid, degree)
    assert b.shape == (grid + degree,)
    assert float(b.sum()) == pytest.approx(1.0, abs=1e-9)
    assert float(b.min()) >= -1e-12
    assert int((b > 1e-12).sum()) <= degree + 1


@given(grids)
def test_the_cubic_basis_is_smooth_and_the_linear_one_continuous(grid: int) -> None:
    u = torch.linspace(0, grid, 400 * grid + 1, dtype=torch.float64)
    step = 1 / 400
    assert float(basis(u, grid, 1).diff(dim=0).abs().max()) <= step * 1.001
    second = basis(u, grid, 3).diff(n=2, dim=0) / step**2
    assert float(second.diff(dim=0).abs().max()) < 8 * step  # third derivatives are bounded: no jump in the second


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), grids, degrees, st.integers(0, 999))
def test_form_s_is_the_layer(inputs: int, outputs: int, grid: int, degree: int, seed: int) -> None:
    layer = layer_of(inputs, outputs, grid, degree, seed)
    x = np.random.default_rng(seed).normal(0, 8, (64, inputs))
    x[0], x[1] = 1e6, -1e6
    torch_y = layer.double()(torch.from_numpy(x)).detach().numpy()
    form = SaturatingForm(layer.float())
    assert np.abs(form(x) - torch_y).max() <= 1e-5 * max(1.0, np.abs(torch_y).max())


@given(grids, degrees, st.sampled_from([1e4, 1e30, 3e38]))
def test_outputs_are_finite_however_large_the_input_and_flat_beyond_the_grid(grid: int, degree: int, size: float) -> None:
    layer = layer_of(2, 3, grid, degree, 0)
    x = torch.tensor([[size, -size], [-size, size], [size, 0.0]])
    y = layer(x)
    assert torch.isfinite(y).all()
    assert torch.equal(y, layer(x.clamp(-1e4, 1e4)))
    assert np.isfinite(SaturatingForm(layer)(x.double().numpy())).all()


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
    assert shown == pytest.approx(layer(torch.from_numpy(x).float()).detach().double().numpy(), abs=1e-4)


@pytest.mark.parametrize("degree", [0, 2, 4])
def test_another_degree_is_refused(degree: int) -> None:
    with pytest.raises(ValueError, match="1 and 3"):
        KanLayer(2, 2, degree=degree)


def test_a_grid_without_an_exact_form_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        KanLayer(2, 2, grid=1)
    values = {"task": {"id": "t", "labels": ["a", "b"]}, "judge": {"grid": 1}}
    with pytest.raises(ConfigError, match="grid"):
        parse_task(values, "task.toml")
