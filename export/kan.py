"""A KAN layer as ONNX nodes, in the form that training.kan_forms chooses for it."""

from __future__ import annotations

import numpy as np

from export.nodes import Nodes
from training.kan import KanLayer
from training.kan_forms import LocalForm, Precision, RampForm, SaturatingForm, choose_form

DTYPES = {"fp32": np.float32, "fp16": np.float16}


def append_kan(nodes: Nodes, layer: KanLayer, x: str, precision: Precision = "fp32") -> str:
    """From x [B, in], the name of a value in this precision, to the name of the layer's output [B, out]."""
    form = choose_form(layer, precision)
    dtype = DTYPES[precision]
    if isinstance(form, LocalForm):
        features = _local(nodes, form, x, dtype)
    elif isinstance(form, SaturatingForm):
        features = _saturating(nodes, form, x, dtype)
    else:
        features = _ramps(nodes, form, x, dtype)
    return str(nodes("Gemm", features, form.weight.T.astype(dtype), form.bias.astype(dtype)))


def _local(nodes: Nodes, form: LocalForm, x: str, dtype: type[np.floating]) -> str:
    z = nodes("Mul", nodes("Sub", x, form.mean.astype(dtype)), form.scale.astype(dtype))
    z = nodes("Clip", z, dtype(-form.reach), dtype(form.reach))
    distance = nodes("Abs", nodes("Gemm", z, form.expand.T.astype(dtype), form.offset.astype(dtype)))
    near = nodes("Relu", nodes("Sub", dtype(1), distance))
    if form.degree == 1:
        return str(near)
    far = nodes("Relu", nodes("Sub", dtype(2), distance))
    return str(nodes("Sub", _cube(nodes, far), nodes("Mul", _cube(nodes, near), dtype(4))))


def _saturating(nodes: Nodes, form: SaturatingForm, x: str, dtype: type[np.floating]) -> str:
    """ONNX Runtime fuses the clip into the product."""
    y = nodes("Gemm", x, form.affine.T.astype(dtype), form.offset.astype(dtype))
    return _cube(nodes, nodes("Clip", y, dtype(0), dtype(1)))


def _ramps(nodes: Nodes, form: RampForm, x: str, dtype: type[np.floating]) -> str:
    r = nodes("Gemm", x, form.affine.T.astype(dtype), form.offset.astype(dtype))
    r = nodes("Clip", r, dtype(0), dtype(1))
    if form.degree == 1:
        return str(r)
    square = nodes("Mul", r, r)
    return str(nodes("Concat", r, square, nodes("Mul", square, r), axis=1))


def _cube(nodes: Nodes, x: str) -> str:
    return str(nodes("Mul", nodes("Mul", x, x), x))
