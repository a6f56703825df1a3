"""Encoders and users' graphs in fp16 and int8: as near as they claim, narrow where they say, wide where digits would be lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cloud_kit
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_kit import LABELS, Graph, split, task_of, tokenizer_json
from test_export_encoder import HOSTILE, encoder_kind, fixed_kind, stirred_judge
from test_precisions import BARS, NARROW, TEXTS

from export.encoder import encoder_counts, encoder_graph
from export.fixed import append_to, fixed_counts, fixed_graph
from export.graph import judge_precision
from export.half import half
from export.nodes import Nodes
from export.quantise import quantise_products, quantised, smooth
from export.session import Session
from kcm.bundle import Precision
from training.encoder import Encoder
from training.fit import one_hot
from training.fixed import Fixed
from training.select import Router
from training.small import Examples


def lowered(bare: onnx.ModelProto, precision: Precision, feeds: list[dict[str, Any]]) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(bare)
    return half(model) if precision == "fp16" else quantised(model, feeds) if precision == "int8" else model


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cloud_kit.tiny_bert(tmp_path_factory.mktemp("bert") / "weights")


@pytest.fixture(scope="module")
def encoder(bert: Path) -> tuple[onnx.ModelProto, Any, Any]:
    """(the encoder's graph, its kind, its head)."""
    kind = encoder_kind(bert)
    data = split()
    ones = np.ones(len(data), np.float32)
    head = kind.fit(Examples(kind.featurise(data.payloads), one_hot(data.y, len(LABELS)), ones, ones > 0, ones < 0))
    return encoder_graph(head), kind, head


@pytest.mark.parametrize("precision", NARROW)
def test_an_encoder_answers_nearly_as_in_fp32(encoder: tuple[onnx.ModelProto, Any, Any], precision: Precision) -> None:
    bare, kind, head = encoder
    feeds = [kind.preprocessor.batch([text]) for text in split(60).payloads]
    outputs = {}
    for p in ("fp32", precision):
        model = lowered(bare, p, feeds)  # type: ignore[arg-type]
        data = append_to(model, encoder_counts(head), Router(stirred_judge()), len(LABELS), 3, judge_precision(p))  # type: ignore[arg-type]
        made = onnx.load_model_from_string(data)
        assert not {node.op_type for node in made.graph.node} & HOSTILE and {entry.domain for entry in made.opset_import} <= {
            "",
            "ai.onnx.ml",
        }
        outputs[p] = Session(data).answer(kind.preprocessor, TEXTS)
    plain, narrow = outputs["fp32"], outputs[precision]
    bar = {"fp16": 5e-3, "int8": 8e-2}[precision]
    assert np.abs(narrow["logits"] - plain["logits"]).max() <= bar * np.abs(plain["logits"]).max()
    assert not np.array_equal(narrow["logits"], plain["logits"])


def test_an_int8_encoder_has_no_wide_product_left_and_quantises_no_result(encoder: tuple[onnx.ModelProto, Any, Any]) -> None:
    bare, kind, _ = encoder
    model = lowered(bare, "int8", [kind.preprocessor.batch([text]) for text in split(20).payloads])
    constants = {t.name: t for t in model.graph.initializer}
    made_by = {name: node for node in model.graph.node for name in node.output}
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    assert all(made_by[name].op_type == "DequantizeLinear" for product in products for name in product.input[:2])
    weighted = [p for p in products if made_by[p.input[1]].input[0] in constants]
    assert (len(products), len(weighted)) == (17, 13)  # six in each of two layers, and the head; two of attention in each layer
    for product in weighted:
        narrow, scale = (constants[name] for name in made_by[product.input[1]].input[:2])
        channels = narrow.dims[0 if "transB" in str(product.attribute) else 1]
        assert narrow.data_type == TensorProto.INT8 and list(scale.dims) == [channels]
        assert np.abs(numpy_helper.to_array(narrow)).max() == 127
    zeros = [numpy_helper.to_array(constants[n.input[2]]) for n in model.graph.node if n.op_type.endswith("izeLinear") and len(n.input) > 2]
    assert zeros and not any(zero.any() for zero in zeros)
    results = {p.output[0] for p in weighted}  # those of attention are inputs of the next product
    assert not [n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in results]


def test_smoothing_changes_no_answer_and_takes_the_outliers() -> None:
    """One channel of x is a hundred times as large as the others, as in transformers."""
    rng = np.random.default_rng(0)
    nodes = Nodes()
    loud = np.ones(32, np.float32)
    loud[7] = 100
    x = nodes("Mul", "x", loud)
    first = nodes("MatMul", x, rng.normal(size=(32, 48)).astype(np.float32))
    nodes("Gemm", x, rng.normal(size=(16, 32)).astype(np.float32), transB=1, out="b")
    nodes("Identity", first, out="a")
    graph = helper.make_graph(
        nodes.nodes,
        "loud",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 32])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", size]) for name, size in (("a", 48), ("b", 16))],
        nodes.initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    feeds = [{"x": rng.normal(size=(8, 32)).astype(np.float32)} for _ in range(20)]
    plain = Session(model.SerializeToString())
    smoothed = onnx.ModelProto()
    smoothed.CopyFrom(model)
    smooth(smoothed, feeds)
    onnx.checker.check_model(smoothed, full_check=True)
    after = Session(smoothed.SerializeToString())
    for name in ("a", "b"):
        assert after.run(feeds[0])[name] == pytest.approx(plain.run(feeds[0])[name], rel=1e-4, abs=1e-3)
    assert len(smoothed.graph.node) == len(model.graph.node) + 1  # one factor for both products
    error = {}
    for name, start in (("smoothed", smoothed), ("as it was", model)):
        session = Session(quantise_products(start, feeds).SerializeToString())
        error[name] = np.mean([np.abs(session.run(f)["a"] - plain.run(f)["a"]).mean() for f in feeds])
    assert error["smoothed"] < error["as it was"] / 2


def test_a_graph_with_q_dq_of_its_own_stays_as_it_is(tmp_path: Path) -> None:
    one, zero = np.array(1, np.float32), np.array(0, np.int8)
    nodes = Nodes()
    nodes("DequantizeLinear", nodes("QuantizeLinear", "x", one, zero), one, zero, out="y")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 4]) for name in "xy"]
    model = helper.make_model(helper.make_graph(nodes.nodes, "g", values[:1], values[1:], nodes.initializers), ir_version=9)
    before = model.SerializeToString()
    assert quantised(model, []).SerializeToString() == before


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("precision", NARROW)
def test_a_users_graph_answers_nearly_as_in_fp32(hashed: bool, precision: Precision, tmp_path: Path) -> None:
    kind = users(hashed, tmp_path)
    feeds = [kind.preprocessor.batch([text]) for text in split(40).payloads]
    outputs = {}
    for p in ("fp32", precision):
        model = lowered(fixed_graph(kind.graph), p, feeds)  # type: ignore[arg-type]
        data = append_to(model, fixed_counts(kind.graph), Router(stirred_judge()), len(LABELS), 3, judge_precision(p))  # type: ignore[arg-type]
        outputs[p] = Session(data).answer(kind.preprocessor, TEXTS)
    plain, narrow = outputs["fp32"], outputs[precision]
    assert np.abs(narrow["logits"] - plain["logits"]).max() <= BARS[precision][0] * np.abs(plain["logits"]).max()
    kinds = {v.name: v.type.tensor_type.elem_type for v in onnx.load_model_from_string(data).graph.input}
    assert kinds == ({"ids": 6, "weights": 1, "words": 6, "word_weights": 1} if hashed else {"input_ids": 7, "attention_mask": 7})


def users(hashed: bool, folder: Path) -> Fixed:
    if hashed:
        graph = Graph(first="ids", second="weights", integer=TensorProto.INT32, weight=TensorProto.FLOAT)
        return fixed_kind(folder, graph, {"kind": "ngrams", "buckets": 2**10})
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    (folder / "model.onnx").write_bytes(Graph().model().SerializeToString())
    return Fixed(task_of(folder, {"kind": "onnx", "path": "model.onnx"}, {"kind": "tokenizer", "tokenizer": "tokenizer.json"}))


def test_sums_stay_fp32_in_a_half_graph(tmp_path: Path) -> None:
    """A text's sum may pass 65504, and small terms vanish beside large ones."""
    kind = users(hashed=True, folder=tmp_path)
    model = half(fixed_graph(kind.graph))
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    table = next(node for node in model.graph.node if node.op_type == "Gather").input[0]
    assert kinds[table] == TensorProto.FLOAT16
    casts = {node.output[0]: node for node in model.graph.node if node.op_type == "Cast"}
    for node in model.graph.node:
        if node.op_type == "ReduceSum":
            assert casts[node.input[0]].attribute[0].i == TensorProto.FLOAT
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_minilm_loses_next_to_nothing(tmp_path: Path) -> None:
    """A real encoder, whose activations have outliers, on its own tokenizer: graphs of 90, 45 and 23 MB."""
    torch.set_num_threads(1)
    folder = cloud_kit.real_model("minilm")
    kind = Encoder(task_of(folder, {"kind": "encoder", "path": str(folder)}, {"kind": "tokenizer", "max_tokens": 32}))
    data, fresh = split(120), split(200, seed=9)
    ones = np.ones(len(data), np.float32)
    head = kind.fit(Examples(kind.featurise(data.payloads), one_hot(data.y, len(LABELS)), ones, ones > 0, ones < 0))
    bare, feeds = encoder_graph(head), [kind.preprocessor.batch([text]) for text in data.payloads]
    sizes, answers = {}, {}
    for precision in ("fp32", "fp16", "int8"):
        model = lowered(bare, precision, feeds)  # type: ignore[arg-type]
        sizes[precision] = len(model.SerializeToString())
        answers[precision] = Session(model.SerializeToString()).answer(kind.preprocessor, fresh.payloads)["logits"]
    assert sizes["fp16"] < 0.51 * sizes["fp32"] and sizes["int8"] < 0.27 * sizes["fp32"]
    plain = answers["fp32"]
    for precision, bar in (("fp16", 5e-3), ("int8", 6e-2)):
        assert np.abs(answers[precision] - plain).mean() <= bar / 2 * np.abs(plain).max(), precision
        assert (answers[precision].argmax(1) == plain.argmax(1)).mean() >= 0.97, precision
