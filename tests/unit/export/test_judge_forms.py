"""Forms L, S and R as ONNX nodes are the torch layer in ONNX Runtime; an fp16 judge is the fp32 one within fp16's digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from export.judge import append_judge
from export.kan import append_form, append_kan
from export.nodes import Nodes
from export.session import Session
from kcm.calibration import HeadChoice
from kcm.task import JudgeSpec
from training.heads import fit_outcome_head
from training.judge import Judge, Predictions, fit_judge
from training.kan import KanLayer
from training.kan_forms import LocalForm, Precision
from training.select import Router

TYPES: dict[str, tuple[int, Any]] = {"fp32": (TensorProto.FLOAT, np.float32), "fp16": (TensorProto.FLOAT16, np.float16)}
CLASSES = 6


def layer_of(inputs: int, outputs: int, grid: int, degree: int, seed: int) -> KanLayer:
    torch.manual_seed(seed)
    layer = KanLayer(inputs, outputs, grid=grid, degree=degree).eval()
    assert layer.norm.running_mean is not None and layer.norm.running_var is not None
    with torch.no_grad():
        layer.norm.running_mean.normal_(0, 3)
        layer.norm.running_var.uniform_(0.1, 9)
        layer.spline.normal_(0, 2)
        layer.bias.normal_()
    return layer


def inputs_of(layer: KanLayer, precision: str, rows: int, seed: int) -> NDArray[Any]:
    assert layer.norm.running_mean is not None and layer.norm.running_var is not None
    noise = np.random.default_rng(seed).normal(0, 1.5, (rows, layer.base.shape[1]))
    x: NDArray[Any] = (layer.norm.running_mean.numpy() + layer.norm.running_var.sqrt().numpy() * noise).astype(TYPES[precision][1])
    return x


def graph(layers: list[KanLayer], precision: Precision, local: bool = False) -> onnx.ModelProto:
    """The layers in the form that is chosen for them, or in form L."""
    nodes, y = Nodes(), "x"
    for layer in layers:
        y = append_form(nodes, LocalForm(layer), y, precision) if local else append_kan(nodes, layer, y, precision)
    nodes.nodes[-1].output[0] = "y"
    kind = TYPES[precision][0]
    shapes = [("x", layers[0].base.shape[1]), ("y", layers[-1].base.shape[0])]
    x_info, y_info = (helper.make_tensor_value_info(name, kind, ["B", width]) for name, width in shapes)
    made = helper.make_graph(nodes.nodes, "kan", [x_info], [y_info], nodes.initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def off(layer: KanLayer, precision: Precision, seed: int, rows: int = 96, local: bool = False) -> float:
    """Relative to the largest output, against torch in fp64 on the same inputs; rows far outside must not spoil it."""
    x = inputs_of(layer, precision, rows, seed)
    x[0] = 6e4
    exact = layer.double()(torch.from_numpy(x.astype(np.float64))).detach().numpy()
    got = Session(graph([layer.float()], precision, local).SerializeToString()).run({"x": x})["y"]
    assert got.dtype == x.dtype
    return float(np.abs(got.astype(np.float64) - exact).max() / max(1.0, np.abs(exact).max()))


def form_in(model: onnx.ModelProto) -> str:
    kinds = [node.op_type for node in model.graph.node]
    return "L" if "Abs" in kinds else "R" if "Concat" in kinds or kinds == ["Gemm", "Clip", "Gemm"] else "S"


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 24), st.sampled_from([1, 3]), st.integers(0, 999))
def test_in_fp32_the_graph_is_the_layer_within_the_bar_of_its_form(inputs: int, outputs: int, grid: int, degree: int, seed: int) -> None:
    layer = layer_of(inputs, outputs, grid, degree, seed)
    form = form_in(graph([layer], "fp32"))
    assert form == "R" if degree == 1 or grid > 8 else form in "SR"
    assert off(layer, "fp32", seed) <= (1e-4 if form == "S" else 1e-5)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 8), st.sampled_from([1, 3]), st.integers(0, 999))
def test_in_fp16_the_graph_is_form_l_within_its_bar(inputs: int, outputs: int, grid: int, degree: int, seed: int) -> None:
    layer = layer_of(inputs, outputs, grid, degree, seed)
    model = graph([layer], "fp16")
    assert form_in(model) == "L"
    assert {tensor.data_type for tensor in model.graph.initializer} == {TensorProto.FLOAT16}
    assert off(layer, "fp16", seed) <= 6e-3


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 16), st.sampled_from([1, 3]), st.integers(0, 999))
def test_form_l_holds_in_fp32_too(grid: int, degree: int, seed: int) -> None:
    layer = layer_of(3, 2, grid, degree, seed)
    assert form_in(graph([layer], "fp32", local=True)) == "L"
    assert off(layer, "fp32", seed, local=True) <= 1e-5


def test_two_layers_of_form_s_are_eight_nodes() -> None:
    layers = [layer_of(10, 8, 5, 3, 0), layer_of(8, 6, 5, 3, 1)]
    model = graph(layers, "fp32")
    assert len(model.graph.node) == 8
    x = inputs_of(layers[0], "fp32", 64, 0)
    exact = layers[1].double()(layers[0].double()(torch.from_numpy(x.astype(np.float64)))).detach().numpy()
    got = Session(model.SerializeToString()).run({"x": x})["y"]
    assert np.abs(got - exact).max() <= 1e-3 * np.abs(exact).max()  # the second layer's slopes multiply the first one's error


def fitted(spec: JudgeSpec) -> tuple[Router, Predictions]:
    """A judge that has something to say: short texts are answered rightly, long ones at random."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (400, CLASSES)).astype(np.float32)
    length = np.where(rng.random(400) < 0.5, 3, 40).astype(np.float32)
    labels = np.where(length < 10, logits.argmax(1), rng.integers(0, CLASSES, 400))
    given = Predictions(logits, length, rng.random(400).astype(np.float32))
    return Router(fit_judge(spec, given, np.eye(CLASSES, dtype=np.float32)[labels])), given


def routed(router: Router, given: Predictions, precision: Precision) -> dict[str, NDArray[Any]]:
    nodes = Nodes()
    append_judge(nodes, router, "logits", "length", "unknown", 3, precision)
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", w]) for n, w in (("logits", CLASSES), ("length", 1), ("unknown", 1))]
    outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B"]) for name in ("confidence", "score")]
    made = helper.make_graph(nodes.nodes, "judge", infos, outs, nodes.initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    feed = {"logits": given.logits, "length": given.length[:, None], "unknown": given.unknown[:, None]}
    return Session(model.SerializeToString()).run(feed)


@pytest.mark.parametrize(
    "spec",
    [JudgeSpec(), JudgeSpec(grid=16), JudgeSpec(degree=1), JudgeSpec(hidden=4), JudgeSpec(kind="mlp")],
    ids=["S", "R", "R k=1", "two layers", "mlp"],
)
@pytest.mark.parametrize(("precision", "bar"), [("fp32", 2e-4), ("fp16", 1e-2)])
def test_a_whole_judge_in_either_precision(spec: JudgeSpec, precision: Precision, bar: float) -> None:
    router, given = fitted(spec)
    confidence = router.judge.confidence(given)
    untrained = Judge(spec, CLASSES).confidence(given)
    assert np.abs(confidence - untrained).max() > 0.1, "the layers must matter here"
    assert np.abs(routed(router, given, precision)["confidence"] - confidence).max() <= bar


def test_a_head_of_outcomes_in_fp16() -> None:
    router, given = fitted(JudgeSpec())
    rng = np.random.default_rng(1)
    small, large = rng.random(400) < np.where(given.length < 10, 0.9, 0.4), rng.random(400) < 0.8
    outcomes = np.stack([small & ~large, small == large, ~small & large], 1).astype(np.float32)
    rates, weights = (0.6, 0.8), np.ones(400, np.float32)
    temperature = float(router.judge.temperature)
    head = fit_outcome_head(JudgeSpec(), "benefit", given, outcomes, temperature=temperature, rates=rates, weights=weights)
    choice = HeadChoice(head="benefit", reason="set by hand")
    out, full = (routed(Router(router.judge, choice, head), given, precision) for precision in ("fp16", "fp32"))
    score = head.score(given)
    assert score.std() > 0.02
    assert np.abs(full["score"] - score).max() <= 1e-4
    assert np.abs(out["score"] - full["score"]).max() > 5e-6, "the layers must be in fp16"
    assert np.abs(out["score"] - score).max() <= 5e-3
