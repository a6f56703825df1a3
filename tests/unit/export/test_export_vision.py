"""Image classifiers as graphs: ours as torch answers, the user's as ONNX Runtime does, in each precision, and through a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from test_export_encoder import HOSTILE, stirred_judge
from vision_kit import LABELS, MEAN, SIZE, STD, image_graph, image_run, image_split, image_task, tinted

from edge_runtime import EdgeRuntime
from edge_runtime.engines.onnx import OrtEngine
from export.agreement import agreements, hold
from export.bundle import export_bundle
from export.fixed import append_to
from export.graph import fuse_judge
from export.precisions import Graphs
from export.session import Session
from export.verify import verify
from export.vision import fixed_image_graph, traced_images, vision_graph
from kcm.bundle import GraphSpec, load_bundle
from kcm.errors import BundleError, ConfigError, VerifyError
from kcm.preprocess import load_preprocessor
from kcm.sample import Sample
from training.fixed_images import FixedImages, layout_of
from training.judge import Predictions
from training.program import train_run
from training.run import Run, load_run, save_run
from training.select import Router
from training.vision import load_vision
from training.vision.kind import build_net, vision_model

FILE = {"kind": "onnx", "path": "model.onnx"}


@pytest.fixture(scope="module")
def run() -> Run:
    torch.set_num_threads(1)
    return image_run(image_task(Path()))


def nets(kind: str, size: int = SIZE) -> Any:
    """A net whose BatchNorms have statistics of their own, unlike a fresh one's."""
    task = image_task(Path(), {"kind": kind, "net": {"depth": 8, "width": 4}}, size=size)
    torch.manual_seed(0)
    net = build_net(task.small.kind, task.small.net, len(LABELS))  # type: ignore[arg-type]
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
        elif isinstance(module, torch.nn.Linear):  # may begin at zero
            module.weight.data.normal_(0, 0.5)
    net.train()
    images = torch.from_numpy(tinted(16, size=size)[0]).float().permute(0, 3, 1, 2)
    with torch.no_grad():  # statistics of these images: else a deep net's signal dies out
        net((images - 120) / 60)
    return vision_model(task.small.kind, net, len(LABELS), task.preprocess)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "size"), [("resnet", 32), pytest.param("efficientnet-lite", 40, marks=pytest.mark.slow)])
def test_a_nets_graph_is_plain_and_folded_and_reads_pixels(kind: str, size: int) -> None:
    model = nets(kind, size)
    made = vision_graph(model)
    data = append_to(made, None, Router(stirred_judge()), len(LABELS), 3)
    graph = onnx.load_model_from_string(data).graph
    assert [(v.name, v.type.tensor_type.elem_type) for v in graph.input] == [("image", TensorProto.UINT8)]
    assert [d.dim_value or d.dim_param for d in graph.input[0].type.tensor_type.shape.dim] == ["B", size, size, 3]
    # TensorRT: nothing but Cast may read uint8.
    assert [node.op_type for node in graph.node if "image" in node.input] == ["Cast"]
    kinds = {node.op_type for node in graph.node}
    assert not kinds & (HOSTILE | {"BatchNormalization", "Shape", "Range"})
    for trace in (b"stack_trace", b"pkg.torch", b"site-packages"):
        assert trace not in data
    images = tinted(5, size=size)[0]
    out = Session(data).run({"image": images})["logits"]
    np.testing.assert_allclose(out, model.logits(images), atol=1e-4 * max(1, np.abs(out).max()))
    assert np.ptp(out, axis=0).max() > 1e-3, "the net must tell images apart, else this says nothing"


def test_the_judge_reads_zero_for_length_and_unknown() -> None:
    model, judge = nets("resnet"), stirred_judge()
    images = tinted(8)[0]
    logits = model.logits(images)
    out = Session(append_to(vision_graph(model), None, Router(judge), len(LABELS), 3)).run({"image": images})
    alone = Session(bytes(fuse_judge(Router(judge), 3, len(LABELS), "fp32").SerializeToString()))
    want = alone.run({"small_logits": logits, "length": np.zeros((8, 1), np.float32), "unknown": np.zeros((8, 1), np.float32)})
    for name in ("confidence", "score", "top_probs"):
        np.testing.assert_allclose(out[name], want[name], atol=1e-4)
    np.testing.assert_allclose(out["confidence"], judge.confidence(Predictions(logits, *np.zeros((2, 8), np.float32))), atol=1e-4)
    other = alone.run({"small_logits": logits, "length": np.ones((8, 1), np.float32), "unknown": np.zeros((8, 1), np.float32)})
    assert np.abs(other["confidence"] - want["confidence"]).max() > 1e-3, "this judge must read the length"


@pytest.mark.parametrize(
    ("layout", "element"),
    [
        ("pixels", TensorProto.UINT8),
        ("channels-first", TensorProto.FLOAT),
        ("channels-first", TensorProto.FLOAT16),
        ("channels-last", TensorProto.FLOAT),
    ],
)
def test_a_users_graph_is_fed_alike_in_training_and_on_the_edge(layout: str, element: int, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(image_graph(layout, element=element))
    task = image_task(tmp_path, FILE)
    kind, data = FixedImages(task), image_split(9)
    predictions = kind.predict(kind.graph, kind.featurise(data.payloads))
    assert (predictions.length == 0).all() and (predictions.unknown == 0).all()
    # by hand: what this graph makes of pixels that we normalise
    arrays = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in onnx.load_model_from_string(kind.graph.model).graph.initializer}
    x = torch.from_numpy(tinted(9)[0]).float()
    x = (x if layout == "pixels" else (x - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    both = torch.cat([torch.relu(torch.nn.functional.conv2d(x, arrays["filters"], padding=1)), x], 1)
    want = both.mean((2, 3)) @ arrays["matrix"]
    np.testing.assert_allclose(predictions.logits, want, atol=2e-3 * max(1.0, float(want.abs().max())))
    fused = append_to(fixed_image_graph(kind.graph, task.preprocess), None, Router(stirred_judge()), len(LABELS), 3)
    got = Session(fused).run(load_preprocessor(task.preprocess, {}).batch(data.payloads))["logits"]
    np.testing.assert_allclose(got, predictions.logits, atol=1e-4 * max(1, np.abs(got).max()))
    graph = onnx.load_model_from_string(fused).graph
    assert [node.op_type for node in graph.node if "image" in node.input] == ["Cast"]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (image_graph("channels-first", size=24), r"\[N, 3, 24, 24\]; \[preprocess\] makes 32 × 32 pixels"),
        (image_graph("channels-first", batch=1), "its batch is fixed"),
        (image_graph("channels-first", element=TensorProto.UINT8), r"uint8 \[N, 3, 32, 32\]; images are given as"),
        (image_graph("channels-last", element=TensorProto.DOUBLE), r"tensor\(double\) \[N, 32, 32, 3\]; images are given as"),
        (image_graph("channels-first", classes=4), r"has shape \[1, 4\] for one sample, the task has 3 labels"),
        (image_graph("channels-first", scale=np.nan), "is not finite for a grey image"),
        (image_graph("channels-first", logits="scores"), "has no output 'logits'"),
    ],
)
def test_a_users_graph_that_does_not_fit_is_refused(model: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(model)
    with pytest.raises(ConfigError, match=said):
        FixedImages(image_task(tmp_path, FILE))


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        (["N", 3, 32, 32], "channels-first"),
        (["N", 32, 32, 3], "channels-last"),
        ([None, 3, None, None], "channels-first"),
        (["N", "H", "W", 3], "channels-last"),
        (["N", "C", "H", "W"], ""),
        (["N", 3, "H", 3], ""),
        (["N", 3, 32, 24], ""),
        (["N", 3, 32 * 32], ""),
    ],
)
def test_where_the_colours_lie(shape: list[object], layout: str) -> None:
    if layout:
        assert layout_of("float32", shape, 32, "graph") == layout
    else:
        with pytest.raises(ConfigError, match="graph: its input is float32"):
            layout_of("float32", shape, 32, "graph")


def test_an_old_graph_of_the_users_is_converted(tmp_path: Path) -> None:
    model = onnx.load_model_from_string(image_graph("channels-first"))
    mean = next(node for node in model.graph.node if node.op_type == "ReduceMean")
    mean.input.remove("sides")  # before opset 18 axes are an attribute
    mean.attribute.append(onnx.helper.make_attribute("axes", [2, 3]))
    model.opset_import[0].version = 13
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    task = image_task(tmp_path, FILE)
    kind = FixedImages(task)
    images = tinted(4)[0]
    fused = append_to(fixed_image_graph(kind.graph, task.preprocess), None, Router(stirred_judge()), len(LABELS), 3)
    np.testing.assert_allclose(Session(fused).run({"image": images})["logits"], kind._answer(images), atol=1e-4)


def test_an_edge_refuses_a_graph_of_another_size() -> None:
    data = append_to(vision_graph(nets("resnet")), None, Router(stirred_judge()), len(LABELS), 3)
    OrtEngine(data, GraphSpec(inputs={"image": SIZE}, candidates=3), len(LABELS))
    with pytest.raises(BundleError, match=r"'image' has shape \['B', 32, 32, 3\]; its manifest says 48"):
        OrtEngine(data, GraphSpec(inputs={"image": 48}, candidates=3), len(LABELS))


class _Spy:
    """A session that notes the batches that it is given."""

    def __init__(self, session: Any) -> None:
        self.session, self.seen = session, list[int]()

    def run(self, names: Any, inputs: Any) -> Any:
        self.seen.append(len(inputs["image"]))
        return self.session.run(names, inputs)


def test_a_large_batch_runs_in_pieces_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    data = append_to(vision_graph(nets("resnet")), None, Router(stirred_judge()), len(LABELS), 3)
    engine = OrtEngine(data, GraphSpec(inputs={"image": SIZE}, candidates=3), len(LABELS))
    images = tinted(17)[0]
    together = engine.infer({"image": images})
    for most, sizes in ((5 * images[0].nbytes, [5, 5, 5, 2]), (1, [1] * 17), (17 * images[0].nbytes, [17])):
        monkeypatch.setattr("edge_runtime.engines.onnx._PIECE", most)
        spy = _Spy(engine._session)
        engine._session = spy
        pieces = engine.infer({"image": images})
        engine._session = spy.session
        assert spy.seen == sizes
        for name, mine, theirs in zip(pieces._fields, pieces, together, strict=True):
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, name
            np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_one_image_is_bound_and_answered_as_in_a_batch() -> None:
    data = append_to(vision_graph(nets("resnet")), None, Router(stirred_judge()), len(LABELS), 3)
    engine = OrtEngine(data, GraphSpec(inputs={"image": SIZE}, candidates=3), len(LABELS))
    images = tinted(6)[0]
    together = engine.infer({"image": images})
    for row in range(6):
        alone = engine.infer({"image": images[row : row + 1]})
        np.testing.assert_allclose(alone.logits[0], together.logits[row], atol=1e-4)
        np.testing.assert_allclose(alone.score[0], together.score[row], atol=1e-4)


@pytest.mark.slow
def test_precisions_of_a_trained_net_are_narrow_and_near(run: Run) -> None:
    graphs, data = Graphs(run, 3), image_split(120, seed=7)
    images = load_preprocessor(run.task.preprocess, {}).batch(data.payloads)
    want = run.small.logits(images["image"])
    right = int((want.argmax(1) == data.y).sum())
    assert right > 0.7 * len(data)
    sizes = {}
    for precision, bar in (("fp32", 1e-5), ("fp16", 3e-3), ("int8", 5e-2)):
        model = graphs.fuse(precision)  # type: ignore[arg-type]
        sizes[precision] = len(model)
        out = Session(model).run(images)
        assert np.abs(out["logits"] - want).max() <= bar * max(1, np.abs(want).max()), precision
        assert (out["top_ids"][:, 0] != want.argmax(1)).sum() <= (0 if precision == "fp32" else 2)
    assert sizes["fp16"] < 0.75 * sizes["fp32"]
    narrow = onnx.load_model_from_string(graphs.fuse("int8"))
    arrays = {t.name: numpy_helper.to_array(t) for t in narrow.graph.initializer}
    filters = [t for t in narrow.graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) == 4]
    convolutions = [node for node in narrow.graph.node if node.op_type == "Conv"]
    assert len(filters) == len(convolutions) == 9
    for node in narrow.graph.node:  # a scale for each channel out
        if node.op_type == "DequantizeLinear" and node.input[0] in {t.name for t in filters}:
            assert arrays[node.input[1]].shape == arrays[node.input[0]].shape[:1]


@pytest.mark.slow
def test_a_runs_bundle_answers_as_the_run(run: Run, tmp_path: Path) -> None:
    save_run(tmp_path / "run", run)
    again, data = load_run(tmp_path / "run"), image_split(120, seed=7)
    export_bundle(again, tmp_path / "bundle", golden_payloads=again.payloads, precisions=("fp32", "fp16", "int8"))
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.manifest.graph.inputs == {"image": SIZE} and "tokenizer.json" not in bundle.files
    report = verify(again, load_vision(again.task), bundle, data.payloads)
    assert report.samples == len(data) and report.logits_error < 1e-5
    hold(agreements(bundle, data.payloads, data.y), bundle)
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text()
    assert "fitted on 96 labelled" in card and "text" not in card
    images = load_preprocessor(again.task.preprocess, {}).batch(data.payloads)["image"]
    want = again.small.logits(images).argmax(1)
    edge = EdgeRuntime.load(tmp_path / "bundle")
    answers = edge.infer([Sample(payload=payload) for payload in data.payloads])
    assert [answer.label_id for answer in answers] == want.tolist()
    assert {answer.source.name for answer in answers} == {"LOCAL", "DEGRADED"}, "ε must divide them, else it says nothing"


@pytest.mark.slow
def test_verify_sees_another_runs_weights(run: Run, tmp_path: Path) -> None:
    export_bundle(run, tmp_path / "bundle", golden_payloads=run.payloads[:8])
    for parameter in run.small.net.head.parameters():
        parameter.data.mul_(1.1)
    try:
        with pytest.raises(VerifyError, match="logits differ"):
            verify(run, load_vision(run.task), load_bundle(tmp_path / "bundle"), run.payloads[:32])
    finally:
        for parameter in run.small.net.head.parameters():
            parameter.data.div_(1.1)


def test_a_run_of_the_users_graph_goes_through(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(image_graph("channels-first"))
    task, data = image_task(tmp_path, FILE), image_split(60)
    kind = FixedImages(task)
    save_run(tmp_path / "run", train_run(task, kind, data, None, seed=0, progress=lambda _: None))
    run = load_run(tmp_path / "run")
    assert kind.predict(run.small, kind.featurise(data.payloads)).logits.shape == (60, 3)  # the same graph after loading
    export_bundle(run, tmp_path / "bundle", golden_payloads=data.payloads[:12])
    bundle = load_bundle(tmp_path / "bundle")
    assert verify(run, kind, bundle, data.payloads).labels == 0
    answers = EdgeRuntime.load(tmp_path / "bundle").infer([Sample(payload=payload) for payload in data.payloads])
    assert [a.label_id for a in answers] == kind.featurise(data.payloads).logits.argmax(1).tolist()


def test_a_trace_takes_any_batch() -> None:
    model = nets("resnet")
    session = Session(bytes(traced_images(model.module(), SIZE).SerializeToString()))
    for rows in (1, 2, 7):
        images = tinted(rows)[0]
        np.testing.assert_allclose(session.run({"image": images})["logits"], model.logits(images), atol=1e-4)
