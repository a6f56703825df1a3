"""The fused graph: small model and judge in one ONNX model, one launch for logits, candidates and C_x.

Written node by node rather than traced, so that it holds only operators that ONNX Runtime fuses and TensorRT parses.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from export.judge import append_judge
from export.nodes import Nodes
from export.quantise import int8_rows
from kcm.bundle import Precision
from training.kan_forms import Precision as JudgePrecision
from training.ngrams import TINY, NgramModel
from training.select import Router

OPSET = 18
IR_VERSION = 10


def fuse_ngrams(small: NgramModel, router: Router, candidates: int, precision: Precision = "fp32") -> onnx.ModelProto:
    """ids int32, weights float32 [B, L]; words int32, word_weights float32 [B, W] → logits, top_ids, top_probs, confidence, score.

    Mirrors NgramModel.forward, but looks up vectors of words alone: nothing else has any, or is counted. The precision is of the
    tables, which are nearly all there is: a text looks up a few rows, and their norms and sums stay fp32, which costs nothing beside
    the look-up. int8 is of weights alone, a scale for each row: there is no product worth quantising. The judge is fp16 where the
    tables are, else fp32.
    """
    nodes = Nodes()
    rows = nodes("Gather", small.row.numpy(), nodes("Concat", "words", "ids", axis=1))
    weights = nodes("Concat", "word_weights", "weights", axis=1)
    scaled = nodes("Mul", _rows(nodes, small.idf.numpy(), rows, precision), nodes("Unsqueeze", weights, np.array([2])))  # [B, W + L, 3]
    share = nodes("Div", small.share.numpy(), _norm(nodes, scaled))
    coefficient = nodes("ReduceSum", nodes("Mul", scaled, share), np.array([2]), keepdims=0)  # [B, W + L]
    logits = _weighted_rows(nodes, coefficient, small.table.numpy(), rows, precision)

    word = nodes("Gather", _word_rows(small), "words")
    if len(small.vectors) > 1:
        vectors = np.concatenate([small.vectors.numpy(), np.zeros((1, small.vectors.shape[1]), np.float32)])
        mean = _unit(nodes, _weighted_rows(nodes, "word_weights", vectors, word, precision))
        dense = _product(nodes, _unit(nodes, nodes("Sub", mean, small.centre.numpy())), small.dense.numpy(), precision)
        logits = nodes("Add", logits, dense)
    logits = nodes("Identity", logits, out="logits")
    counted = nodes("Sign", "word_weights")  # 0 where the row is padded
    length = nodes("ReduceSum", counted, np.array([1]), keepdims=1)
    unseen = nodes("Gather", (np.arange(len(small.vectors) + 1) == 0).astype(np.float32), word)
    missing = nodes("ReduceSum", nodes("Mul", counted, unseen), np.array([1]), keepdims=1)
    unknown = nodes("Div", missing, nodes("Max", length, 1.0))

    append_judge(nodes, router, logits, length, unknown, candidates, judge_precision(precision))
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT32, ["B", "L"]),
        helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["B", "L"]),
        helper.make_tensor_value_info("words", TensorProto.INT32, ["B", "W"]),
        helper.make_tensor_value_info("word_weights", TensorProto.FLOAT, ["B", "W"]),
    ]
    return assemble(nodes, inputs, small.table.shape[1], candidates)


def assemble(nodes: Nodes, inputs: list[onnx.ValueInfoProto], classes: int, candidates: int) -> onnx.ModelProto:
    """A checked model of `nodes` with the bundle's five outputs."""
    graph = helper.make_graph(nodes.nodes, "kcm", inputs, bundle_outputs(classes, candidates), nodes.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="kcm")
    onnx.checker.check_model(model, full_check=True)
    return model


def bundle_outputs(classes: int, candidates: int) -> list[onnx.ValueInfoProto]:
    """The five outputs of every fused graph, in order."""
    return [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", classes]),
        helper.make_tensor_value_info("top_ids", TensorProto.INT64, ["B", candidates]),
        helper.make_tensor_value_info("top_probs", TensorProto.FLOAT, ["B", candidates]),
        helper.make_tensor_value_info("confidence", TensorProto.FLOAT, ["B"]),
        helper.make_tensor_value_info("score", TensorProto.FLOAT, ["B"]),
    ]


def fuse_judge(router: Router, candidates: int, classes: int, precision: Precision) -> onnx.ModelProto:
    """The judge alone: small_logits [B, C], length and unknown [B, 1], all fp32 → the five outputs of a fused graph."""
    nodes = Nodes()
    logits = nodes("Identity", "small_logits", out="logits")
    append_judge(nodes, router, logits, "length", "unknown", candidates, judge_precision(precision))
    widths = {"small_logits": classes, "length": 1, "unknown": 1}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", width]) for name, width in widths.items()]
    return assemble(nodes, inputs, classes, candidates)


def judge_precision(precision: Precision) -> JudgePrecision:
    """An int8 bundle's judge is fp32: it is small, and ε stands on it."""
    return "fp16" if precision == "fp16" else "fp32"


def _rows(nodes: Nodes, table: NDArray[np.float32], rows: str, precision: Precision) -> str:
    """Rows of a table [R, D] as fp32; narrow ones are kept as fp16."""
    if precision == "fp32":
        return str(nodes("Gather", table, rows))
    return str(nodes("Cast", nodes("Gather", table.astype(np.float16), rows), to=TensorProto.FLOAT))


def _weighted_rows(nodes: Nodes, weights: str, table: NDArray[np.float32], rows: str, precision: Precision) -> str:
    """Σ_l weights [B, L] · table[rows [B, L]] → [B, D], as one batched product."""
    if precision == "int8":
        values, scale = int8_rows(nodes, table, rows, np.array([1]))  # [B, 1, L, D], [B, L]
        product = nodes("MatMul", nodes("Unsqueeze", nodes("Mul", weights, scale), np.array([1, 2])), values)
        return str(nodes("Squeeze", product, np.array([1, 2])))
    product = nodes("MatMul", nodes("Unsqueeze", weights, np.array([1])), _rows(nodes, table, rows, precision))
    return str(nodes("Squeeze", product, np.array([1])))


def _product(nodes: Nodes, x: str, weight: NDArray[np.float32], precision: Precision) -> str:
    """x [B, D] @ weight [D, C] → fp32 [B, C]; |x| ≤ 1, so that fp16 can't overflow."""
    if precision != "fp16":
        return str(nodes("MatMul", x, weight))
    narrow = nodes("MatMul", nodes("Cast", x, to=TensorProto.FLOAT16), weight.astype(np.float16))
    return str(nodes("Cast", narrow, to=TensorProto.FLOAT))


def _word_rows(small: NgramModel) -> NDArray[np.int32]:
    """What is known of each word [buckets]: 0 nothing, 1..V that word vector, V + 1 a word that only the n-gram table knows."""
    vector, listed = small.vector_row.numpy(), small.row.numpy()[: small.buckets] > 0
    return np.where((vector == 0) & listed, len(small.vectors), vector).astype(np.int32)


def _norm(nodes: Nodes, x: str) -> str:
    """Of x over axis 1, which stays."""
    return str(nodes("Add", nodes("ReduceL2", x, np.array([1]), keepdims=1), TINY))


def _unit(nodes: Nodes, x: str) -> str:
    return str(nodes("Div", x, _norm(nodes, x)))
