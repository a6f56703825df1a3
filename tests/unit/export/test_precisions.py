"""fp16 and int8 of every kind of small model: as near as they claim, really narrow, and looked up as such by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_kit import LABELS, split
from test_graph import JUDGES, PREPROCESSOR, routed

from edge_runtime.engines.compile import BuildSpec, build_plan
from export.graph import fuse_judge, fuse_ngrams, judge_precision
from export.nodes import Nodes
from export.quantise import int8_rows, narrow_tables
from export.session import Session
from kcm.bundle import Precision
from kcm.preprocess import longest_of
from training.ngrams import NgramModel
from training.select import Router

TEXTS = [*split(90, seed=5).payloads, "", "zyx wvu", "profit " * 30]
# Of logits, relative to the largest; of C_x: what random judges, far steeper than fitted ones, make of it.
BARS: dict[Precision, tuple[float, float]] = {"fp16": (2e-3, 2e-2), "int8": (2e-2, 1e-1)}
NARROW: tuple[Precision, ...] = ("fp16", "int8")


def optimised(model: bytes, folder: Path) -> onnx.ModelProto:
    """What ONNX Runtime runs in the end."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimised.onnx"), 3
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx")


def bytes_of(model: onnx.ModelProto, *kinds: int) -> int:
    return sum(len(numpy_helper.to_array(t).tobytes()) for t in model.graph.initializer if t.data_type in kinds)


def wide_model(seed: int = 0, rows: int = 600, classes: int = 40, size: int = 32) -> NgramModel:
    """A model whose tables are large enough to count, with rows of very different length."""
    rng = np.random.default_rng(seed)
    buckets = PREPROCESSOR.buckets
    lengths = rng.lognormal(0, 1.5, (rows + 1, 1)).astype(np.float32)
    table = (rng.normal(size=(rows + 1, classes)).astype(np.float32) * lengths).astype(np.float32)
    vectors = (rng.normal(size=(rows + 1, size)) * rng.lognormal(0, 1.5, (rows + 1, 1))).astype(np.float32)
    idf = np.zeros((rows + 1, 3), np.float32)
    idf[np.arange(1, rows + 1), rng.integers(0, 3, rows)] = rng.uniform(1, 9, rows)
    table[0] = vectors[0] = 0
    return NgramModel(
        {
            "row": rng.integers(0, rows + 1, 3 * buckets).astype(np.int32),
            "idf": idf,
            "share": np.array([0.5, 0.4, 0.7], np.float32),
            "table": table,
            "vector_row": rng.integers(0, rows + 1, buckets).astype(np.int32),
            "vectors": vectors,
            "centre": rng.normal(size=size).astype(np.float32) * 0.1,
            "dense": rng.normal(size=(size, classes)).astype(np.float32),
        }
    )


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("precision", NARROW)
def test_ngrams_answer_nearly_as_in_fp32(judge: str, vectors: bool, precision: Precision) -> None:
    small, router = routed(judge, vectors)
    plain, narrow = (Session(fuse_ngrams(small, router, 3, p).SerializeToString()).answer(PREPROCESSOR, TEXTS) for p in ("fp32", precision))
    logits, confidence = BARS[precision]
    assert np.abs(narrow["logits"] - plain["logits"]).max() <= logits * np.abs(plain["logits"]).max()
    assert np.abs(narrow["confidence"] - plain["confidence"]).max() <= confidence
    assert (narrow["top_ids"][:, 0] == plain["top_ids"][:, 0]).mean() > 0.97
    assert {name: value.dtype for name, value in narrow.items()} == {name: value.dtype for name, value in plain.items()}


@pytest.mark.parametrize("precision", NARROW)
def test_ngrams_of_long_and_short_rows_keep_their_digits(precision: Precision) -> None:
    """A scale for the whole table would leave the short rows none."""
    small = wide_model()
    plain, narrow = (
        Session(fuse_ngrams(small, routed_wide(), 3, p).SerializeToString()).answer(PREPROCESSOR, TEXTS)["logits"]
        for p in ("fp32", precision)
    )
    assert np.abs(narrow - plain).max() <= BARS[precision][0] / 2 * np.abs(plain).max()
    assert not np.array_equal(narrow, plain)


def routed_wide() -> Router:
    from kcm.task import JudgeSpec
    from training.judge import Judge

    return Router(Judge(JudgeSpec(), 40).eval())


def test_the_graphs_are_as_narrow_as_they_say() -> None:
    small = wide_model()
    models = {p: fuse_ngrams(small, routed_wide(), 3, p) for p in ("fp32", *NARROW)}  # type: ignore[arg-type]
    tables = sum(t.numel() for t in (small.table, small.vectors))
    assert bytes_of(models["fp32"], TensorProto.FLOAT) > 4 * tables
    narrow = tables + small.idf.numel() + small.dense.numel()
    assert 2 * narrow <= bytes_of(models["fp16"], TensorProto.FLOAT16) < 2.2 * narrow  # the rest: a zero row or two, and the judge
    assert tables < bytes_of(models["int8"], TensorProto.INT8) < 1.1 * tables
    for precision in NARROW:
        assert bytes_of(models[precision], TensorProto.FLOAT) < 0.8 * tables, precision
    dense = {p: [t.data_type for t in model.graph.initializer if tuple(t.dims) == small.dense.shape] for p, model in models.items()}
    assert dense == {"fp32": [TensorProto.FLOAT], "fp16": [TensorProto.FLOAT16], "int8": [TensorProto.FLOAT]}
    sizes = [len(models[p].SerializeToString()) for p in ("fp32", "fp16", "int8")]
    assert sizes[2] < sizes[1] < sizes[0]


def test_the_judge_is_fp16_in_fp16_alone() -> None:
    """Form L: form S would be off by a quarter of the range."""
    small, router = routed("kan", vectors=True)
    weights = {p: _gemm_types(fuse_ngrams(small, router, 3, p)) for p in ("fp32", "fp16", "int8")}
    assert weights["fp32"] == weights["int8"] == {TensorProto.FLOAT} and weights["fp16"] == {TensorProto.FLOAT16}
    assert [judge_precision(p) for p in ("fp32", "fp16", "int8")] == ["fp32", "fp16", "fp32"]


def _gemm_types(model: onnx.ModelProto) -> set[int]:
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    return {kinds[node.input[1]] for node in model.graph.node if node.op_type == "Gemm"}


@pytest.mark.parametrize("kind", ["ngrams", "table"])
def test_onnx_runtime_looks_rows_up_as_int8(kind: str, tmp_path: Path) -> None:
    """Else it would dequantise the whole table in every run: a thousand times the work."""
    if kind == "ngrams":
        model = fuse_ngrams(wide_model(), routed_wide(), 3, "int8")
    else:
        model = lookup(np.random.default_rng(0).normal(size=(700, 64)).astype(np.float32))
        narrow_tables(model)
    tables = {t.name for t in model.graph.initializer if t.data_type == TensorProto.INT8 and np.prod(t.dims) > 1000}
    assert tables
    run = optimised(model.SerializeToString(), tmp_path)
    readers = [(node.op_type, name) for node in run.graph.node for name in node.input if name in tables]
    assert {name for _, name in readers} == tables and {kind for kind, _ in readers} == {"Gather"}


def lookup(table: np.ndarray) -> onnx.ModelProto:  # type: ignore[type-arg]
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["rows"])],
        "lookup",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["B", "L"])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["B", "L", table.shape[1]])],
        [numpy_helper.from_array(table, "table")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_an_int8_row_is_within_half_a_step_of_its_own_scale() -> None:
    rng = np.random.default_rng(0)
    table = (rng.normal(size=(700, 64)) * 10.0 ** rng.integers(-4, 4, (700, 1))).astype(np.float32)
    table[3] = 0
    model = lookup(table)
    narrow_tables(model)
    onnx.checker.check_model(model, full_check=True)
    rows = Session(model.SerializeToString()).run({"ids": np.arange(700)[None]})["rows"][0]
    step = np.abs(table).max(1, keepdims=True) / 127
    assert (np.abs(rows - table) <= 0.5001 * step).all() and not rows[3].any()
    assert np.abs(rows).max(1) == pytest.approx(np.abs(table).max(1))  # the largest value of a row is exact


def test_small_tables_and_such_that_something_else_reads_stay() -> None:
    small = lookup(np.ones((10, 4), np.float32))
    narrow_tables(small)
    assert [t.data_type for t in small.graph.initializer] == [TensorProto.FLOAT]
    tied = lookup(np.ones((700, 64), np.float32))
    tied.graph.node.append(helper.make_node("ReduceSum", ["table"], ["total"], keepdims=0))
    narrow_tables(tied)
    assert [t.data_type for t in tied.graph.initializer] == [TensorProto.FLOAT]


def test_the_judge_alone_gives_what_it_gives_in_the_fused_graph() -> None:
    small, router = routed("kan", vectors=True)
    for precision in ("fp32", "fp16"):
        fused = Session(fuse_ngrams(small, router, 3, precision).SerializeToString()).answer(PREPROCESSOR, TEXTS)
        alone = Session(fuse_judge(router, 3, len(LABELS), precision).SerializeToString())
        p = predictions(small)
        given = {"small_logits": fused["logits"], "length": p.length[:, None], "unknown": p.unknown[:, None]}
        assert alone.run(given)["score"] == pytest.approx(fused["score"], abs=1e-5)


def predictions(small: NgramModel) -> Any:
    from test_graph import predict

    return predict(small, TEXTS)


def test_int8_rows_need_the_axis_in_between() -> None:
    """The form that both TensorRT and ONNX Runtime take: see int8_rows."""
    nodes = Nodes()
    int8_rows(nodes, np.ones((4, 4), np.float32), "ids", np.array([1]))
    assert [node.op_type for node in nodes.nodes] == [
        "DequantizeLinear",
        "Gather",
        "QuantizeLinear",
        "Unsqueeze",
        "DequantizeLinear",
        "Gather",
    ]


@pytest.mark.parametrize("precision", NARROW)
def test_tensorrt_rtx_builds_ngrams(precision: Precision) -> None:
    """Encoders and users' graphs: tests/integration/test_rtx_builds.py."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX isn't installed: pip install 'kcm[tensorrt-rtx]'", exc_type=ImportError)
    spec = BuildSpec(flavour="tensorrt-rtx", inputs=longest_of(PREPROCESSOR), max_batch=32, targets=("sm86",))
    model = fuse_ngrams(wide_model(), routed_wide(), 3, precision).SerializeToString()
    assert build_plan(trt, model, spec).report.size > 1e4
