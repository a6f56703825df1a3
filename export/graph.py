"""The fused graph: small model and judge in one ONNX model, one launch for logits, candidates and C_x.

Written node by node rather than traced, so that it holds only operators that ONNX Runtime fuses and TensorRT parses.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.judge import append_judge
from export.nodes import Nodes
from training.ngrams import TINY, NgramModel
from training.select import Router

OPSET = 18
IR_VERSION = 10


def fuse_ngrams(small: NgramModel, router: Router, candidates: int) -> onnx.ModelProto:
    """ids int32 [B, L], weights float32 [B, L] → logits, top_ids, top_probs, confidence, score.

    Mirrors NgramModel.forward.
    """
    nodes = Nodes()
    rows = nodes("Gather", small.row.numpy(), "ids")
    scaled = nodes("Mul", nodes("Gather", small.idf.numpy(), rows), nodes("Unsqueeze", "weights", np.array([2])))  # [B, L, 3]
    norm = nodes("Sqrt", nodes("ReduceSum", nodes("Mul", scaled, scaled), np.array([1]), keepdims=1))
    share = nodes("Div", small.share.numpy(), nodes("Add", norm, TINY))
    coefficient = nodes("ReduceSum", nodes("Mul", scaled, share), np.array([2]), keepdims=0)  # [B, L]
    logits = _weighted_rows(nodes, coefficient, nodes("Gather", small.table.numpy(), rows))

    word = nodes("And", nodes("Less", "ids", np.array(small.buckets, np.int32)), nodes("Greater", "weights", 0.0))
    word_float = nodes("Cast", word, to=TensorProto.FLOAT)
    known = nodes("Greater", rows, np.array(0, np.int32))
    if len(small.vectors) > 1:
        word_ids = nodes("Where", word, "ids", np.array(0, np.int32))
        vector_rows = nodes("Mul", nodes("Gather", small.vector_row.numpy(), word_ids), nodes("Cast", word, to=TensorProto.INT32))
        mean = _unit(nodes, _weighted_rows(nodes, "weights", nodes("Gather", small.vectors.numpy(), vector_rows)))
        dense = nodes("MatMul", _unit(nodes, nodes("Sub", mean, small.centre.numpy())), small.dense.numpy())
        logits = nodes("Add", logits, dense)
        known = nodes("Or", known, nodes("Greater", vector_rows, np.array(0, np.int32)))
    logits = nodes("Identity", logits, out="logits")
    length = nodes("ReduceSum", word_float, np.array([1]), keepdims=1)
    missing = nodes("Mul", word_float, nodes("Cast", nodes("Not", known), to=TensorProto.FLOAT))
    unknown = nodes("Div", nodes("ReduceSum", missing, np.array([1]), keepdims=1), nodes("Max", length, 1.0))

    append_judge(nodes, router, logits, length, unknown, candidates)
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT32, ["B", "L"]),
        helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["B", "L"]),
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


def _weighted_rows(nodes: Nodes, weights: str, rows: str) -> str:
    """Σ_l weights [B, L] · rows [B, L, D] → [B, D], as one batched product."""
    product = nodes("MatMul", nodes("Unsqueeze", weights, np.array([1])), rows)
    return str(nodes("Squeeze", product, np.array([1])))


def _unit(nodes: Nodes, x: str) -> str:
    norm = nodes("Sqrt", nodes("ReduceSum", nodes("Mul", x, x), np.array([1]), keepdims=1))
    return str(nodes("Div", x, nodes("Add", norm, TINY)))
