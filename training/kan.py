"""Kolmogorov–Arnold layers with B-spline edges, built so that they export exactly.

An edge is φ(x) = Σ_i c_i B_i(u) + w z over z = clip(x̂, −1, 1), u = (z + 1)/h ∈ [0, G], where x̂ is the input, standardised and
divided by 3. Clamp and linear base make every output finite off the grid and let the spline absorb the base.
Export forms: training.kan_forms. Attribution, pruning and curves: training.kan_look.
Sources: Liu et al., KAN (arXiv 2404.19756); uniform-grid B-splines in closed form as truncated powers (de Boor 1978).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Float64 = NDArray[np.float64]

# |φ| is smoothed below this, so that a solver that needs gradients can pass through zero; in every share, it keeps the logarithm finite.
_ROUND = 1e-3


def centres(grid: int, degree: int) -> Float64:
    """Where each basis function peaks [G + k], in grid coordinates; Σ_i centres_i B_i(u) = u on the grid."""
    return np.arange(grid + degree, dtype=np.float64) - degree + (degree + 1) / 2


def basis(u: Tensor, grid: int, degree: int) -> Tensor:
    """B-spline basis [..., G + k] at u [...] ∈ [0, G], degree 1 or 3; sums to one."""
    distance = (u.unsqueeze(-1) - torch.from_numpy(centres(grid, degree)).to(u)).abs()
    if degree == 1:
        return torch.relu(1 - distance)
    # Form L of the cubic: two clipped cubes, no recursion and no lookup.
    return (torch.relu(2 - distance) ** 3 - 4 * torch.relu(1 - distance) ** 3) / 6


class KanLayer(nn.Module):
    """x [B, in] → [B, out], a sum of one curve per edge. BatchNorm (no affine) keeps inputs on the grid.

    Raises:
        ValueError: a degree other than 1 and 3, or a grid of one interval, which is no spline.
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

    def _expand(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, in], and the basis at it [B, in, G + k]."""
        z = (self.norm(x) / 3).clamp(-1.0, 1.0)
        return z, basis((z + 1) * (self.grid / 2), self.grid, self.degree)

    def forward(self, x: Tensor) -> Tensor:
        z, b = self._expand(x)
        return torch.einsum("bik,oik->bo", b, self.spline) + nn.functional.linear(z, self.base, self.bias)

    def edges(self, x: Tensor) -> Tensor:
        """What each edge says, φ [B, out, in] of x [B, in]: their sum over inputs and the bias are the output."""
        z, b = self._expand(x)
        return torch.einsum("bik,oik->boi", b, self.spline) + z.unsqueeze(1) * self.base

    def scale_and_shift(self) -> tuple[Float64, Float64]:
        """(a [in], b [in]) with u = a x + b before the clamp: the running statistics, folded."""
        mean, var = self.norm.running_mean, self.norm.running_var
        assert mean is not None and var is not None
        z_scale = 1.0 / (3.0 * np.sqrt(var.double().numpy() + self.norm.eps))
        half = self.grid / 2
        return half * z_scale, half * (1.0 - mean.double().numpy() * z_scale)

    def folded(self) -> Float64:
        """Spline coefficients [out, in, G + k] that hold the linear base, too: w z = Σ_i w (2 centres_i / G − 1) B_i, exactly."""
        line = centres(self.grid, self.degree) * (2 / self.grid) - 1
        folded: Float64 = self.spline.detach().double().numpy() + self.base.detach().double().numpy()[:, :, None] * line
        return folded

    def values(self, u: Float64) -> Float64:
        """Every edge's curve at grid coordinates u [N]: [out, in, N], the linear base included."""
        curves: Float64 = self.folded() @ basis(torch.from_numpy(u), self.grid, self.degree).numpy().T
        return curves

    def refined(self, grid: int) -> KanLayer:
        """The layer on another grid: its curves by least squares, which is exact where `grid` is a multiple of this one's.

        Raises:
            ValueError: a grid of one interval.
        """
        with torch.random.fork_rng(devices=[]):  # the initial draw is overwritten: it shall not move the caller's generator
            layer = KanLayer(self.base.shape[1], self.base.shape[0], grid=grid, degree=self.degree).train(self.training)
        z = torch.linspace(-1, 1, 40 * (max(grid, self.grid) + self.degree) + 1, dtype=torch.float64)
        old, new = (basis((z + 1) * (g / 2), g, self.degree) for g in (self.grid, grid))
        transfer = torch.linalg.lstsq(new, old).solution  # [G' + k, G + k]
        layer.norm.load_state_dict(self.norm.state_dict())
        with torch.no_grad():
            layer.spline.copy_(self.spline.double() @ transfer.T)
            layer.base.copy_(self.base)
            layer.bias.copy_(self.bias)
        return layer


def sparsity(layers: Iterable[nn.Module], x: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ_l |Φ_l|₁, Σ_l S(Φ_l)) of KAN layers on data x [N, in], differentiable: what regularisation weighs.

    |Φ|₁ sums the mean |φ| of a layer's edges, S is the entropy of their shares in it (KAN, eq. 2.17 to 2.19). |φ| is smoothed, and
    a floor in each share keeps value and gradient finite where edges, or all of them, are zero. A layer of another kind ends it:
    an MLP has no edges.
    """
    total, entropy = x.new_zeros(()), x.new_zeros(())
    for layer in layers:
        if not isinstance(layer, KanLayer):
            break
        edges = layer.edges(x)
        size = (torch.hypot(edges, edges.new_tensor(_ROUND)) - _ROUND).mean(0)
        share = (size + _ROUND) / (size + _ROUND).sum()
        total = total + size.sum()
        entropy = entropy - (share * share.log()).sum()
        x = edges.sum(2) + layer.bias
    return total, entropy
