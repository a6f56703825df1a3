"""Kolmogorov–Arnold layers with B-spline edges, built so that they export exactly.

An edge is φ(x) = Σ_i c_i B_i(u) + w z over z = clip(x̂, −1, 1), u = (z + 1)/h ∈ [0, G], where x̂ is the input, standardised and
divided by 3. Clamp and linear base make every output finite off the grid and let the spline absorb the base.
Sources: Liu et al., KAN (arXiv 2404.19756); uniform-grid B-splines in closed form as truncated powers (de Boor 1978).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Float64 = NDArray[np.float64]


def basis(u: Tensor, grid: int, degree: int) -> Tensor:
    """B-spline basis [..., G + k] at u [...] ∈ [0, G], degree 1 or 3; sums to one."""
    centres = torch.arange(grid + degree, dtype=u.dtype, device=u.device) - degree + (degree + 1) / 2
    distance = (u.unsqueeze(-1) - centres).abs()
    if degree == 1:
        return torch.relu(1 - distance)
    # Form L of the cubic: two clipped cubes, no recursion and no lookup.
    return (torch.relu(2 - distance) ** 3 - 4 * torch.relu(1 - distance) ** 3) / 6


class KanLayer(nn.Module):
    """x [B, in] → [B, out], a sum of one curve per edge. BatchNorm (no affine) keeps inputs on the grid.

    Raises:
        ValueError: a degree other than 1 and 3, or a grid of one interval, which has no exact form for export.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, inputs: int, outputs: int, *, grid: int = 5, degree: int = 3) -> None:
        super().__init__()
        if degree not in (1, 3):
            raise ValueError(f"spline degree {degree}; 1 and 3 are supported")
        if grid < 2:
            raise ValueError(f"a grid of {grid} interval(s); at least 2 are needed")
        self.grid, self.degree = grid, degree
        self.norm = nn.BatchNorm1d(inputs, affine=False)
        self.spline = nn.Parameter(torch.randn(outputs, inputs, grid + degree) * 0.1 / inputs**0.5)
        self.base = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        z = (self.norm(x) / 3).clamp(-1.0, 1.0)
        b = basis((z + 1) * (self.grid / 2), self.grid, self.degree)
        return torch.einsum("bik,oik->bo", b, self.spline) + nn.functional.linear(z, self.base, self.bias)

    def scale_and_shift(self) -> tuple[Float64, Float64]:
        """(a [in], b [in]) with u = a x + b before the clamp: the running statistics, folded."""
        mean, var = self.norm.running_mean, self.norm.running_var
        assert mean is not None and var is not None
        z_scale = 1.0 / (3.0 * np.sqrt(var.double().numpy() + self.norm.eps))
        half = self.grid / 2
        return half * z_scale, half * (1.0 - mean.double().numpy() * z_scale)

    def values(self, u: Float64) -> Float64:
        """Every edge's curve at grid coordinates u [N]: [out, in, N], the linear base included."""
        b = basis(torch.from_numpy(u), self.grid, self.degree).numpy()  # [N, G + k]
        z = u * (2 / self.grid) - 1
        curves: Float64 = self.spline.detach().double().numpy() @ b.T + self.base.detach().double().numpy()[:, :, None] * z
        return curves


class SaturatingForm:
    """Form S (degree 3) or R (degree 1) of a layer: y = W clip(A x + c, 0, 1)^k + d, exact up to rounding.

    Features are truncated powers that saturate at 1, so the input clamp costs nothing. fp32 error about 5e-5 at G = 5; never
    for fp16 (0.25). Attributes: `affine` [in·F, in] and `offset` [in·F] give A and c; `weight` [out, in·F], `bias` [out], `power` k.
    """

    def __init__(self, layer: KanLayer) -> None:
        grid, self.power = layer.grid, layer.degree
        knots = _knots(grid, layer.degree)
        a, b = layer.scale_and_shift()
        inputs = len(a)
        # Right knots: (u − t)/(G − t). Left knots: (t − u)/t.
        slope = np.array([1 / (grid - t) if right else -1 / t for t, right in knots])
        shift = np.array([-t / (grid - t) if right else 1.0 for t, right in knots])
        self.affine = np.zeros((inputs * len(knots), inputs))
        for i in range(inputs):
            self.affine[i * len(knots) : (i + 1) * len(knots), i] = slope * a[i]
        self.offset = (slope[None] * b[:, None] + shift[None]).reshape(-1)
        # One least-squares solve in fp64 expresses every curve in these features and a constant.
        u = np.linspace(0, grid, 40 * (grid + layer.degree) + 1)
        features = np.clip(slope[:, None] * u + shift[:, None], 0, 1) ** self.power
        curves = layer.values(u)  # [out, in, N]
        design = np.concatenate([features, np.ones((1, len(u)))]).T
        solved = np.linalg.lstsq(design, curves.reshape(-1, len(u)).T, rcond=None)[0].T.reshape(*curves.shape[:2], -1)
        self.weight = solved[:, :, :-1].reshape(len(solved), -1)
        self.bias = layer.bias.detach().double().numpy() + solved[:, :, -1].sum(1)

    def __call__(self, x: Float64) -> Float64:
        """[B, in] → [B, out] in fp64: what the exported graph computes."""
        y: Float64 = np.clip(x @ self.affine.T + self.offset, 0, 1) ** self.power @ self.weight.T + self.bias
        return y


def _knots(grid: int, degree: int) -> list[tuple[int, bool]]:
    """(knot, right?) of the G + k − 1 features that, with a constant, span the splines of this degree."""
    if degree == 1:
        return [(t, True) for t in range(grid)]
    # One inner knot appears on both sides: its two cubes differ by the third polynomial that the span needs.
    middle = (grid + 1) // 2
    return [(t, True) for t in range(middle + 1)] + [(t, False) for t in range(grid, middle - 1, -1)]
