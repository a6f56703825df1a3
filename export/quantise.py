"""A small model's graph in int8: weights per channel and activations per tensor as Q/DQ pairs, tables as int8 rows with a scale each.

All symmetric, which TensorRT wants: zero points are 0.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.nodes import Nodes
from export.session import Session

Feed = dict[str, NDArray[Any]]

PRODUCTS = ("Conv", "Gemm", "MatMul")
_TABLE = 2**14  # elements from which a table is worth it
_BURDEN = 0.85  # of the outliers that the weights bear; 0.5, the source's, is worse on MiniLM than none
_ONE = np.array(1, np.float32)
_ZERO = np.array(0, np.int8)


def quantised(model: onnx.ModelProto, feeds: Sequence[Feed]) -> onnx.ModelProto:
    """The graph with int8 products and tables; inputs and outputs keep their types. A graph that has Q/DQ already stays as it is.

    Args:
        model: is changed.
        feeds: inputs of the graph, by name, of a few hundred texts like the traffic's: each activation's range is what they make of it.
    """
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        return model
    smooth(model, feeds)
    made = quantise_products(model, feeds)
    narrow_tables(made)
    return made


def quantise_products(model: onnx.ModelProto, feeds: Sequence[Feed]) -> onnx.ModelProto:
    """Products between Q/DQ pairs, by onnxruntime.quantization, which comes with the onnxruntime wheel.

    Their results stay fp32: quantised as well (and without `smooth`), MiniLM answered one R52 text in eight otherwise than in fp32, without
    them one in forty. Weights have 8 bits (smoothed: one in seventy; with 7 bits one in forty): x86 without VNNI saturates where two large
    weights meet two large activations, which the edge's golden check would show there. (session.x64quantprecision is meant to prevent
    it, and fails to load the n-gram graphs.)
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(feeds)

        def get_next(self) -> Feed | None:
            return next(self._left, None)

    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(PRODUCTS),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "QuantizeBias": False,  # an int32 bias behind a DequantizeLinear is refused by TensorRT
                "OpTypesToExcludeOutputQuantization": list(PRODUCTS),
            },
        )
        return onnx.load_model_from_string(path.read_bytes())


def smooth(model: onnx.ModelProto, feeds: Sequence[Feed]) -> None:
    """Move outliers of activations into the weights behind them: x W = (x / s) (s W), a factor for each input channel.

    In transformers a few channels are twenty times as large as the rest, and one scale for all of them leaves the rest no digits.
    Source: SmoothQuant (Xiao et al., arXiv 2211.10438), with more of the burden on the weights, which have a scale per channel.
    """
    graph = model.graph
    weights = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}
    reads = Counter(name for node in graph.node for name in node.input)
    products: dict[str, list[onnx.NodeProto]] = {}  # by what they read
    for node in graph.node:
        if node.op_type in ("Gemm", "MatMul") and node.input[1] in weights and reads[node.input[1]] == 1 and not _flag(node, "transA"):
            products.setdefault(node.input[0], []).append(node)
    largest = _largest(model, list(products), feeds)
    added = Nodes("smooth/")
    nodes: list[onnx.NodeProto] = []
    scaled: dict[str, str] = {}
    for node in graph.node:
        x = node.input[0] if node.input else ""
        if any(node is product for product in products.get(x, ())):
            if x not in scaled:
                by_weight = [np.abs(_rows_of(product, weights)).max(1) for product in products[x]]
                scale = _factors(largest[x], np.max(by_weight, 0))
                for product in products[x]:
                    rows = _rows_of(product, weights) * scale[:, None]
                    tensor = weights[product.input[1]]
                    tensor.CopyFrom(
                        numpy_helper.from_array(np.ascontiguousarray(rows.T if _flag(product, "transB") else rows), tensor.name)
                    )
                scaled[x] = added("Mul", x, (1 / scale).astype(np.float32))
                nodes.append(added.nodes[-1])
            node.input[0] = scaled[x]
        nodes.append(node)
    kept = list(nodes)
    graph.ClearField("node")
    graph.node.extend(kept)
    graph.initializer.extend(added.initializers)


def _factors(activation: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """s [D] from the largest activation and weight of each channel [D]; 1 where one of them is nothing but zero."""
    used = (activation > 0) & (weight > 0)
    factors = np.where(used, activation, 1.0) ** _BURDEN / np.where(used, weight, 1.0) ** (1 - _BURDEN)
    return np.where(used, factors, 1.0).astype(np.float32)


def _rows_of(product: onnx.NodeProto, weights: dict[str, onnx.TensorProto]) -> NDArray[np.float32]:
    """The weight of a product, [in, out]."""
    weight: NDArray[np.float32] = numpy_helper.to_array(weights[product.input[1]])
    return weight.T if _flag(product, "transB") else weight


def _flag(node: onnx.NodeProto, name: str) -> int:
    return next((a.i for a in node.attribute if a.name == name), 0)


def _largest(model: onnx.ModelProto, names: list[str], feeds: Sequence[Feed]) -> dict[str, NDArray[np.float32]]:
    """The largest |value| of each channel [D] (the last axis) of these activations, over the feeds."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    known = {value.name for value in watched.graph.output}
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name not in known)
    session = Session(bytes(watched.SerializeToString()))
    found: dict[str, NDArray[np.float32]] = {}
    for feed in feeds:
        for name, value in session.run(feed).items():
            if name in names:
                seen = np.abs(value.reshape(-1, value.shape[-1])).max(0)
                found[name] = np.maximum(found.get(name, 0), seen)
    return found


def narrow_tables(model: onnx.ModelProto) -> None:
    """Every large table whose rows are looked up, as int8 rows with a scale each."""
    graph = model.graph
    tables = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2 and np.prod(t.dims) >= _TABLE}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    nodes: list[onnx.NodeProto] = []
    added = Nodes("int8/")
    narrowed = set()
    for node in graph.node:
        name = node.input[0] if node.input else ""
        if node.op_type != "Gather" or _flag(node, "axis") != 0 or name not in tables or any(r.op_type != "Gather" for r in readers[name]):
            nodes.append(node)
            continue
        narrowed.add(name)
        whole = len(added.nodes)
        rows, scale = int8_rows(added, numpy_helper.to_array(tables[name]), node.input[1], np.array([0]))
        wide = added("Unsqueeze", added("Unsqueeze", scale, np.array([-1])), np.array([0]))
        added("Squeeze", added("Mul", rows, wide), np.array([0]), out=node.output[0])
        nodes += added.nodes[whole:]
    initializers = [t for t in graph.initializer if t.name not in narrowed] + added.initializers
    graph.ClearField("node")
    graph.ClearField("initializer")
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)


def int8_rows(nodes: Nodes, table: NDArray[np.floating], ids: str, axes: NDArray[np.int64]) -> tuple[str, str]:
    """Look up rows `ids` of a table [R, D] kept as int8: (whole numbers as fp32 [..., D] with `axes` unsqueezed, their scale [...]).

    One graph must please two readers. TensorRT takes an int8 constant only before a DequantizeLinear; ONNX Runtime looks up int8 rows
    only where it finds DequantizeLinear, Gather, QuantizeLinear with equal scalars, which it then drops. The axis between
    QuantizeLinear and DequantizeLinear keeps ONNX Runtime from turning that pair into uint8 first, after which they are equal no more and
    the whole table would be dequantised in each run.
    """
    largest = np.abs(table).max(1)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    whole = np.clip(np.rint(table / scale[:, None]), -127, 127).astype(np.int8)
    rows = nodes("Gather", nodes("DequantizeLinear", whole, _ONE, _ZERO), ids)
    narrow = nodes("Unsqueeze", nodes("QuantizeLinear", rows, _ONE, _ZERO), axes)
    return nodes("DequantizeLinear", narrow, _ONE, _ZERO), nodes("Gather", scale, ids)


@contextmanager
def _quiet() -> Iterator[None]:
    """The library advises on the root logger to run its own preprocessing first, which changes nothing for graphs like these."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
