"""Exact export forms of a KAN layer, from matrix products, clips and powers alone: no recursion, no lookup, no gather.

form  features per input               weights                  exact within    when
L     G + k local (the B-splines)      the spline's own         1e-5, fp16 6e-3  fp16; else slowest
S     G + k − 1 saturating powers      one least-squares solve  1e-4             fp32, k = 3, G ≤ 8: fastest, and few nodes
R     k G powers of ramps              the spline's Taylor      1e-5             fp32, k = 1, G > 8, or S misses its bar
Bars are relative to the largest output. S is ill-conditioned: its features nearly depend on each other, so fp16 would be off by a
quarter of the range, fp32 by a hundredth at G = 16, and on rough curves by more than its bar from G = 7: choose_form tries it out.
In fp16 a grid finer than 8 under a rough curve is beyond 6e-3 in any form: the input itself has no more digits.
Every form holds the linear base in its weights and the norm in its clip.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from training.kan import Float64, KanLayer, centres

Precision = Literal["fp32", "fp16"]
LARGEST_S = 8  # grid up to which form S can be within its bar in fp32
BAR_S = 1e-4  # of the largest output


def choose_form(layer: KanLayer, precision: Precision = "fp32") -> LocalForm | SaturatingForm | RampForm:
    """The cheapest form of the layer that is exact in this precision."""
    if precision == "fp16":
        return LocalForm(layer)
    if layer.degree == 3 and layer.grid <= LARGEST_S:
        form = SaturatingForm(layer)
        if _error_in_fp32(form, layer) <= BAR_S / 2:  # another runtime may sum in another order: half the bar is its share
            return form
    return RampForm(layer)


def _error_in_fp32(form: SaturatingForm, layer: KanLayer) -> float:
    """What rounding costs the form, relative to the largest output, at 256 places spread over the grid."""
    a, b = layer.scale_and_shift()
    u = np.random.default_rng(0).uniform(0, layer.grid, (256, len(a)))
    x = np.divide(u - b, a, out=np.zeros_like(u), where=a > 0).astype(np.float32)
    exact = form(x.astype(np.float64))
    return float(np.abs(form(x) - exact).max() / max(1.0, np.abs(exact).max()))


class LocalForm:
    """Form L: y = W φ(|E z + c|) + d over z = clip((x − m) s, −G/2, G/2); φ(t) = relu(2 − t)³ − 4 relu(1 − t)³, or relu(1 − t) for k = 1.

    Well-conditioned in any precision: coordinates are centred, so that fp16 has most digits where most data lie, and every feature
    is local, so that its error stays local. Attributes: `mean` m and `scale` s [in], `reach` G/2, `expand` E [in·F, in] of ones,
    `offset` c [in·F], `weight` W [out, in·F], `bias` d [out], `degree` k.
    """

    def __init__(self, layer: KanLayer) -> None:
        mean = layer.norm.running_mean
        assert mean is not None
        self.degree, self.reach = layer.degree, layer.grid / 2
        self.mean, self.scale = mean.double().numpy(), layer.scale_and_shift()[0]
        inputs, features = len(self.mean), layer.grid + layer.degree
        self.expand = np.kron(np.eye(inputs), np.ones((features, 1)))
        self.offset = np.tile(self.reach - centres(layer.grid, layer.degree), inputs)
        self.weight = layer.folded().reshape(-1, inputs * features) / (6 if self.degree == 3 else 1)
        self.bias = layer.bias.detach().double().numpy()

    def __call__(self, x: NDArray[np.floating]) -> NDArray[np.floating]:
        """[B, in] → [B, out], every step in the precision of x: what the exported graph computes."""
        mean, scale, expand, offset, weight, bias = (
            a.astype(x.dtype) for a in (self.mean, self.scale, self.expand, self.offset, self.weight, self.bias)
        )
        z = np.clip((x - mean) * scale, -self.reach, self.reach).astype(x.dtype)
        distance = np.abs(z @ expand.T + offset)
        near = np.maximum(1 - distance, 0)
        if self.degree == 3:
            far = np.maximum(2 - distance, 0)
            near = far * far * far - 4 * (near * near * near)
        y: NDArray[np.floating] = near @ weight.T + bias
        return y


class SaturatingForm:
    """Form S of a cubic layer: y = W clip(A x + c, 0, 1)³ + d.

    Features are truncated powers that saturate at 1, so the input clamp costs nothing. Attributes: `affine` A [in·F, in], `offset`
    c [in·F], `weight` W [out, in·F], `bias` d [out].

    Raises:
        ValueError: the layer isn't cubic, or its grid is too large to be exact in fp32.
    """

    def __init__(self, layer: KanLayer) -> None:
        grid = layer.grid
        if layer.degree != 3 or grid > LARGEST_S:
            raise ValueError(f"form S is for cubic splines with a grid of at most {LARGEST_S}, not degree {layer.degree}, grid {grid}")
        knots = _knots(grid)
        # Right knots: (u − t)/(G − t). Left knots: (t − u)/t.
        slope = np.array([1 / (grid - t) if right else -1 / t for t, right in knots])
        shift = np.array([-t / (grid - t) if right else 1.0 for t, right in knots])
        self.affine, self.offset = _affine(layer, slope, shift)
        # One least-squares solve in fp64 expresses every B-spline in these features and a constant.
        u = np.linspace(0, grid, 40 * (grid + 3) + 1)
        design = np.concatenate([np.clip(slope[:, None] * u + shift[:, None], 0, 1) ** 3, np.ones((1, len(u)))]).T
        curves = layer.values(u)  # [out, in, N]
        solved = np.linalg.lstsq(design, curves.reshape(-1, len(u)).T, rcond=None)[0].T.reshape(*curves.shape[:2], -1)
        self.weight = solved[:, :, :-1].reshape(len(solved), -1)
        self.bias = layer.bias.detach().double().numpy() + solved[:, :, -1].sum(1)

    def __call__(self, x: NDArray[np.floating]) -> NDArray[np.floating]:
        """[B, in] → [B, out], every step in the precision of x: what the exported graph computes."""
        affine, offset, weight, bias = (a.astype(x.dtype) for a in (self.affine, self.offset, self.weight, self.bias))
        r = np.clip(x @ affine.T + offset, 0, 1)
        y: NDArray[np.floating] = r * r * r @ weight.T + bias
        return y


class RampForm:
    """Form R: y = Σ_p W_p r^p + d over ramps r = clip(A x + c, 0, 1), one for each interval of the grid; p = 1..k.

    A curve is its value at the grid's left end and what each interval adds: the Taylor polynomial of its piece, which is the whole of it.
    Attributes: `affine` A [in·G, in], `offset` c [in·G], `weight` [out, k·in·G] with the powers one behind the other, `bias` d [out],
    `degree` k.
    """

    def __init__(self, layer: KanLayer) -> None:
        grid, self.degree = layer.grid, layer.degree
        self.affine, self.offset = _affine(layer, np.ones(grid), -np.arange(grid, dtype=np.float64))
        c = layer.folded()  # [out, in, G + k]
        if self.degree == 1:
            first, powers = c[:, :, 0], [np.diff(c)]
        else:
            # On interval t the cubic B-spline of coefficients c_t..c_t+3 has these derivatives at its left end.
            a, b, d, e = (c[:, :, i : i + grid] for i in range(4))
            first = (a + 4 * b + d)[:, :, 0] / 6
            powers = [(d - a) / 2, (a - 2 * b + d) / 2, (e - 3 * d + 3 * b - a) / 6]
        self.weight = np.concatenate([m.reshape(len(c), -1) for m in powers], 1)
        self.bias = layer.bias.detach().double().numpy() + first.sum(1)

    def __call__(self, x: Float64) -> Float64:
        """[B, in] → [B, out] in fp64: what the exported graph computes."""
        r = np.clip(x @ self.affine.T + self.offset, 0, 1)
        y: Float64 = np.concatenate([r**p for p in range(1, self.degree + 1)], 1) @ self.weight.T + self.bias
        return y


def _affine(layer: KanLayer, slope: Float64, shift: Float64) -> tuple[Float64, Float64]:
    """slope·u + shift of F features for every input, u = a x + b folded in: (A [in·F, in], c [in·F])."""
    a, b = layer.scale_and_shift()
    affine: Float64 = np.kron(np.diag(a), slope[:, None]).astype(np.float64)
    return affine, (slope[None] * b[:, None] + shift[None]).reshape(-1)


def _knots(grid: int) -> list[tuple[int, bool]]:
    """(knot, right?) of the G + 2 features that, with a constant, span the cubic splines."""
    # One inner knot appears on both sides: its two cubes differ by the third polynomial that the span needs.
    middle = (grid + 1) // 2
    return [(t, True) for t in range(middle + 1)] + [(t, False) for t in range(grid, middle - 1, -1)]
