"""Each export form is the layer: L, S and R within their bars, in the precision that they are chosen for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kan import layer_of, on_the_grid

from training.kan import KanLayer
from training.kan_forms import BAR_S, LocalForm, RampForm, SaturatingForm, choose_form

sizes = st.tuples(st.integers(1, 5), st.integers(1, 4))
Form = type[LocalForm] | type[SaturatingForm] | type[RampForm]


def off(form: LocalForm | SaturatingForm | RampForm, layer: KanLayer, x: torch.Tensor, dtype: type[np.floating]) -> float:
    """The largest error, relative to the largest output, of the form in `dtype` against the layer in fp64, on the same inputs."""
    given = x.numpy().astype(dtype)
    exact = layer.double()(torch.from_numpy(given.astype(np.float64))).detach().numpy()
    layer.float()
    return float(np.abs(form(given).astype(np.float64) - exact).max() / max(1.0, np.abs(exact).max()))


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(2, 16), st.sampled_from([1, 3]), st.integers(0, 999), st.sampled_from([LocalForm, SaturatingForm, RampForm]))
def test_in_exact_arithmetic_every_form_is_the_layer(size: tuple[int, int], grid: int, degree: int, seed: int, form: Form) -> None:
    if form is SaturatingForm:
        grid, degree = 2 + grid % 7, 3
    layer = layer_of(*size, grid, degree, seed)
    x = on_the_grid(layer, 64, seed, spread=4)
    x[0], x[1] = 1e6, -1e6
    assert off(form(layer), layer, x, np.float64) < 1e-8


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(2, 32), st.sampled_from([1, 3]), st.integers(0, 999))
def test_the_chosen_form_is_within_its_bar_in_fp32(size: tuple[int, int], grid: int, degree: int, seed: int) -> None:
    layer = layer_of(*size, grid, degree, seed)
    form = choose_form(layer)
    assert off(form, layer, on_the_grid(layer, 128, seed), np.float32) <= (BAR_S if isinstance(form, SaturatingForm) else 1e-5)
    assert off(LocalForm(layer), layer, on_the_grid(layer, 128, seed), np.float32) <= 1e-5


@settings(deadline=None, max_examples=40)
@given(sizes, st.integers(2, 8), st.sampled_from([1, 3]), st.integers(0, 999))
def test_the_form_for_fp16_stands_every_step_in_fp16(size: tuple[int, int], grid: int, degree: int, seed: int) -> None:
    layer = layer_of(*size, grid, degree, seed)
    form = choose_form(layer, "fp16")
    assert isinstance(form, LocalForm)
    assert off(form, layer, on_the_grid(layer, 128, seed), np.float16) <= 6e-3


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 16), st.sampled_from([1, 3]), st.sampled_from([1e4, 1e30, 3e38]))
def test_forms_are_finite_and_flat_beyond_the_grid(grid: int, degree: int, size: float) -> None:
    layer = layer_of(2, 3, grid, degree, 0)
    x = np.array([[size, -size], [-size, size], [size, 0.0]], np.float32)
    with np.errstate(over="ignore"):  # an infinite product is what the clip is for
        for form in (choose_form(layer), choose_form(layer, "fp16")):
            assert np.array_equal(form(x), form(np.clip(x, -1e4, 1e4)))
        assert np.isfinite(choose_form(layer, "fp16")(x.astype(np.float16))).all()


def test_conditions() -> None:
    def smooth(grid: int, degree: int) -> KanLayer:
        """As fitting leaves it: neighbouring coefficients are alike."""
        layer = layer_of(4, 3, grid, degree, 0)
        with torch.no_grad():
            layer.spline.copy_(torch.linspace(-1, 1, grid + degree).square())
        return layer

    assert [type(choose_form(smooth(grid, 3))) for grid in (2, 5, 8, 9, 64)] == [SaturatingForm] * 3 + [RampForm] * 2
    assert isinstance(choose_form(smooth(5, 1)), RampForm)
    for degree in (1, 3):
        assert isinstance(choose_form(smooth(5, degree), "fp16"), LocalForm)
    for grid, degree in ((9, 3), (5, 1)):
        with pytest.raises(ValueError, match="form S"):
            SaturatingForm(smooth(grid, degree))


def test_where_rough_curves_cost_form_s_its_digits_form_r_takes_over() -> None:
    """A bar that the notes promise for G ≤ 8 and that coefficients may break: it is tried, not trusted."""
    chosen = []
    for seed in range(12):
        layer = layer_of(1, 1, 8, 3, seed)
        x = on_the_grid(layer, 512, seed)
        chosen.append(type(choose_form(layer)))
        if off(SaturatingForm(layer), layer, x, np.float32) > BAR_S:
            assert chosen[-1] is RampForm
    assert RampForm in chosen and SaturatingForm in chosen


def test_form_s_in_fp16_is_as_bad_as_its_condition_says() -> None:
    layer = layer_of(3, 2, 5, 3, 1)
    assert off(SaturatingForm(layer), layer, on_the_grid(layer, 256, 0), np.float16) > 0.02
