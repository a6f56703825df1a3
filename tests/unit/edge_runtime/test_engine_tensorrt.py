"""TensorRT's execution path, driven on a device and a library that are faked: what it computes is ONNX Runtime's, so it is real.

What only a GPU can show (speed, TensorRT's own numbers) is not here; benchmarks/gpu_check.py is for that.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import importlib.util
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="needs cuda-bindings: pip install 'kcm[tensorrt-rtx]'")

import edge_kit
from onnx import TensorProto, helper, load_from_string
from tensorrt_kit import Gpu, fake_gpu
from vision_kit import fixed_bundle, tinted

import edge_runtime.engines.execute as execute
from edge_runtime import EdgeRuntime
from edge_runtime.engines.build import BuildLimits, build_apart
from edge_runtime.engines.compile import BuildSpec
from edge_runtime.engines.onnx import OrtEngine
from edge_runtime.engines.protocol import Outputs
from edge_runtime.engines.tensorrt import TensorRTBackend
from kcm.bundle import GraphSpec, load_bundle
from kcm.errors import BundleError, EngineError
from kcm.preprocess import Inputs
from kcm.sample import Sample

CLASSES = len(edge_kit.LABELS)
GRAPH = GraphSpec(inputs={"input_ids": 16, "attention_mask": 16}, candidates=edge_kit.CANDIDATES, max_batch=8)
MODEL = edge_kit.graph(edge_kit.table_of(CLASSES, 0))
VERSIONS = {"10.3.0": "tensorrt", "10.13.3.9": "tensorrt", "11.4.0.106": "tensorrt", "1.7.1.116": "tensorrt-rtx"}


@pytest.fixture(params=VERSIONS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gpu]:
    """One for every version that we serve."""
    with fake_gpu(monkeypatch, tmp_path, version=request.param, rtx=VERSIONS[request.param] == "tensorrt-rtx") as found:
        yield found


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gpu]:
    """Just TensorRT 10.3."""
    with fake_gpu(monkeypatch, tmp_path) as found:
        yield found


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gpu]:
    """The library's fake for running; what is built is built by the real one."""
    with fake_gpu(monkeypatch, tmp_path, version="1.7.1.116", rtx=True) as found:
        yield found


def backend_of(gpu: Gpu, **more: Any) -> TensorRTBackend:
    name: Literal["tensorrt", "tensorrt-rtx"] = "tensorrt" if gpu.trt.__name__ == "tensorrt" else "tensorrt-rtx"
    return TensorRTBackend(name, cache=gpu.cache, **more)


def engine_of(gpu: Gpu, model: bytes = MODEL, graph: GraphSpec = GRAPH, classes: int = CLASSES, **more: Any) -> Any:
    backend = backend_of(gpu, **more)
    gpu.put(backend._key(model, graph), model)
    return backend.load(model, graph, classes)


def inputs_of(batch: int, length: int, seed: int = 0) -> Inputs:
    ids = np.random.default_rng(seed).integers(0, 12, (batch, length))
    return {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}


def same(got: Outputs, inputs: Inputs) -> None:
    want = OrtEngine(MODEL, GRAPH, CLASSES).infer(inputs)
    for name, mine, theirs in zip(Outputs._fields, got, want, strict=True):
        assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs), name


def test_outputs_are_the_graphs_for_every_shape_in_any_order(gpu: Gpu) -> None:
    engine = engine_of(gpu)
    assert engine.provider == f"{backend_of(gpu).name} {gpu.trt.__version__}"
    for seed, shape in enumerate([(1, 1), (8, 16), (1, 1), (3, 5), (3, 5), (8, 1), (1, 16), (8, 16)]):
        inputs = inputs_of(*shape, seed)
        same(engine.infer(inputs), inputs)
    engine.close()
    assert gpu.live() == {}


def test_inputs_that_lie_in_other_order_or_strides_are_read_right(one: Gpu) -> None:
    engine, inputs = engine_of(one), inputs_of(4, 6)
    turned = {name: np.asfortranarray(inputs[name]) for name in reversed(inputs)}
    same(engine.infer(turned), inputs)


def test_outputs_outlive_the_next_call_and_the_engine(gpu: Gpu) -> None:
    engine, inputs = engine_of(gpu), inputs_of(4, 6)
    kept = engine.infer(inputs)
    engine.infer(inputs_of(4, 6, seed=1))
    engine.close()
    same(kept, inputs)


def test_memory_is_what_the_largest_shape_needs_and_not_more(gpu: Gpu) -> None:
    engine = engine_of(gpu)
    places = 8 * 16
    want = sorted([places * 8, places * 8, 8 * CLASSES * 4, 8 * 3 * 8, 8 * 3 * 4, 8 * 4, 8 * 4])
    assert {side: sorted(sizes) for side, sizes in gpu.cuda.allocated().items()} == {"device": want, "host": want}
    before = gpu.cuda.calls.copy()
    for shape in [(1, 1), (8, 16), (2, 3)]:
        engine.infer(inputs_of(*shape))
    assert all(gpu.cuda.calls[name] == before[name] for name in ("cudaMalloc", "cudaMallocHost", "cudaStreamCreateWithFlags"))


def test_only_the_bytes_of_a_shape_are_copied(one: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, sizes = engine_of(one), []
    copy = one.cuda.cudaMemcpyAsync
    monkeypatch.setattr(one.cuda, "cudaMemcpyAsync", lambda *a: (sizes.append(a[2]), copy(*a))[1])
    engine.infer(inputs_of(2, 3))
    assert sizes == [2 * 3 * 8] * 2 + [2 * CLASSES * 4, 2 * 3 * 8, 2 * 3 * 4, 2 * 4, 2 * 4]


def test_a_closed_engine_says_so_and_closing_twice_is_nothing(gpu: Gpu) -> None:
    engine = engine_of(gpu)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.infer(inputs_of(1, 1))
    assert gpu.cuda.calls["cudaStreamDestroy"] == 1


def test_an_engine_that_is_dropped_gives_everything_back(gpu: Gpu) -> None:
    engine = engine_of(gpu, cuda_graphs=True)
    for _ in range(3):
        engine.infer(inputs_of(2, 3))
    assert gpu.live()["context"] >= 1
    del engine
    gc.collect()
    assert gpu.live() == {}


LOAD_FAILURES = [
    *(("cudaMalloc", n) for n in range(1, 8)),
    *(("cudaMallocHost", n) for n in range(1, 8)),
    ("cudaStreamCreateWithFlags", 1),
    ("cudaGetDeviceProperties", 1),
    ("deserialize_cuda_engine", 1),
    ("create_execution_context", 1),
    ("set_input_shape", 1),
    ("infer_shapes", 1),
    ("set_tensor_address", 1),
]


@pytest.mark.parametrize(("call", "nth"), LOAD_FAILURES)
def test_a_load_that_fails_says_why_and_leaves_nothing(gpu: Gpu, call: str, nth: int) -> None:
    backend = backend_of(gpu)
    gpu.put(backend._key(MODEL, GRAPH), MODEL)
    if call.startswith("cuda"):
        gpu.cuda.calls.clear()
        gpu.cuda.fail[call] = (2, nth)
    else:
        gpu.fail[call] = 1
    with pytest.raises(EngineError) as caught:
        backend.load(MODEL, GRAPH, CLASSES)
    said = {
        "deserialize_cuda_engine": "can't load the plan: Serialized engine has wrong magic tag",
        "create_execution_context": "made no execution context: out of device memory",
        "set_input_shape": "refuses shape (8, 16) of 'input_ids': shape (8, 16) of input_ids does not satisfy the profile",
        "infer_shapes": "can't tell the outputs' shapes: ids is open",
        "set_tensor_address": "refuses the address of 'input_ids': no such tensor: input_ids",
    }
    assert said.get(call, f"CUDA: {call} failed with cudaErrorMemoryAllocation (error 2)") in caught.value.message
    assert gpu.live() == {}, "while the error is looked at"
    backend.load(MODEL, GRAPH, CLASSES).close()


RUN_FAILURES = [
    *(("cudaMemcpyAsync", n) for n in range(1, 8)),
    ("cudaStreamSynchronize", 1),
    *((c, 1) for c in ("execute_async_v3", "set_input_shape", "infer_shapes")),
]


@pytest.mark.parametrize(("call", "nth"), RUN_FAILURES)
def test_a_call_that_fails_says_why_and_the_next_is_right(gpu: Gpu, call: str, nth: int) -> None:
    engine = engine_of(gpu)
    same(engine.infer(inputs_of(2, 3)), inputs_of(2, 3))
    if call.startswith("cuda"):
        gpu.cuda.calls.clear()
        gpu.cuda.fail[call] = (719, nth)
    else:
        gpu.fail[call] = 1
    said = {"execute_async_v3": "didn't run the batch: no address for", "set_input_shape": "refuses shape", "infer_shapes": "is open"}
    with pytest.raises(EngineError) as caught:
        engine.infer(inputs_of(4, 5, seed=1))
    assert said.get(call, f"CUDA: {call} failed with cudaErrorLaunchFailure (error 719)") in caught.value.message
    assert not any(gpu.cuda._streams.values()), "nothing may run on with memory that the next call fills"
    for seed, shape in ((2, (2, 3)), (3, (4, 5))):
        same(engine.infer(inputs_of(*shape, seed)), inputs_of(*shape, seed))
    engine.close()
    assert gpu.live() == {}


def _with(**changes: Any) -> Inputs:
    return {**inputs_of(2, 3), **changes}


WRONG: dict[str, tuple[Inputs, str]] = {
    "one is missing": ({"input_ids": inputs_of(2, 3)["input_ids"]}, "input 'attention_mask' is missing"),
    "another type": (_with(input_ids=np.zeros((2, 3), np.int32)), "input 'input_ids' is int32, expected int64"),
    "another length": (_with(attention_mask=np.ones((2, 4), np.int64)), r"input 'attention_mask' has shape \(2, 4\), expected \(2, 3\)"),
    "another batch": (_with(attention_mask=np.ones((1, 3), np.int64)), r"input 'attention_mask' has shape \(1, 3\), expected \(2, 3\)"),
    "another rank": (_with(input_ids=np.ones(2, np.int64)), r"input 'input_ids' has shape \(2,\), expected \(2, 0\)"),
    "no rank": (_with(input_ids=np.int64(2)), "input 'input_ids' has shape"),
    "too many": (inputs_of(9, 3), r"input 'input_ids' has shape \(9, 3\), it was built up to \(8, 16\)"),
    "too long": (inputs_of(2, 17), r"input 'input_ids' has shape \(2, 17\), it was built up to \(8, 16\)"),
    "none": (inputs_of(0, 3), r"input 'input_ids' has shape \(0, 3\)"),
    "nothing in it": (inputs_of(2, 0), r"input 'input_ids' has shape \(2, 0\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_named_and_the_next_call_is_right(one: Gpu, case: str) -> None:
    given, says = WRONG[case]
    engine = engine_of(one)
    for turn in range(2):
        with pytest.raises(EngineError, match=says):
            engine.infer(given)
        same(engine.infer(inputs_of(2, 3, turn)), inputs_of(2, 3, turn))


def test_each_pair_of_inputs_has_a_length_of_its_own(one: Gpu) -> None:
    """Words are few beside n-grams; memory is what each one's longest row needs."""
    model = edge_kit.graph(np.random.default_rng(0).normal(0, 1, (90, CLASSES)).astype(np.float32), ngrams=True)
    graph = GraphSpec(inputs={"ids": 16, "weights": 16, "words": 4, "word_weights": 4}, candidates=edge_kit.CANDIDATES, max_batch=8)
    engine, cpu = engine_of(one, model, graph), OrtEngine(model, graph, CLASSES)
    assert sorted(one.cuda.allocated()["device"])[-4:] == [8 * CLASSES * 4, 8 * 3 * 8, 8 * 16 * 4, 8 * 16 * 4]

    def given(batch: int, ids: int, words: int) -> Inputs:
        random = np.random.default_rng(batch)
        pairs = {("ids", "weights"): ids, ("words", "word_weights"): words}
        found: Inputs = {}
        for (places, weights), length in pairs.items():
            found[places] = random.integers(0, 90, (batch, length)).astype(np.int32)
            found[weights] = random.random((batch, length)).astype(np.float32)
        return found

    for shape in ((8, 16, 4), (2, 5, 3), (1, 1, 1), (3, 2, 4)):
        inputs = given(*shape)
        assert all(np.allclose(mine, its, atol=1e-5) for mine, its in zip(engine.infer(inputs), cpu.infer(inputs), strict=True))
    for wrong, says in (
        ({**given(2, 5, 3), "word_weights": np.ones((2, 5), np.float32)}, r"'word_weights' has shape \(2, 5\), expected \(2, 3\)"),
        (given(2, 5, 5), r"'words' has shape \(2, 5\), it was built up to \(8, 4\)"),
        ({**given(2, 5, 3), "words": np.ones((1, 3), np.int32)}, r"'words' has shape \(1, 3\), expected \(2, 3\)"),
    ):
        with pytest.raises(EngineError, match=says):
            engine.infer(wrong)


def test_a_shape_that_comes_again_becomes_a_graph(one: Gpu) -> None:
    engine = engine_of(one, cuda_graphs=True)
    for turn in range(5):
        for shape in ((2, 3), (8, 16)):
            before = one.cuda.calls.copy()
            same(engine.infer(inputs_of(*shape, turn)), inputs_of(*shape, turn))
            launched = one.cuda.calls["cudaGraphLaunch"] - before["cudaGraphLaunch"]
            assert launched == (turn >= 2), (turn, shape)
            if launched:
                assert one.cuda.calls["cudaMemcpyAsync"] == before["cudaMemcpyAsync"]
    assert one.live()["executable"] == 2 and one.live()["context"] == 3 and "graph" not in one.live()
    engine.close()
    assert one.live() == {}


def test_graphs_are_few_and_those_used_longest_ago_go(one: Gpu) -> None:
    engine = engine_of(one, cuda_graphs=True)
    for length in range(1, 13):
        for turn in range(3):
            same(engine.infer(inputs_of(1, length, turn)), inputs_of(1, length, turn))
        engine.infer(inputs_of(1, 2))  # never the one that was used longest ago
    assert one.live()["executable"] == execute._GRAPHS_KEPT
    assert one.live()["context"] == execute._GRAPHS_KEPT + 1
    assert one.cuda.calls["cudaGraphInstantiate"] == 12, "2 was never captured anew"
    launches = one.cuda.calls["cudaGraphLaunch"]
    for length in (12, 2, 1):
        engine.infer(inputs_of(1, length))
    assert one.cuda.calls["cudaGraphLaunch"] == launches + 2, "12 and 2 are kept, 1 is not"


@pytest.mark.parametrize(
    "call", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "create_execution_context", "execute_async_v3"]
)
def test_where_capturing_fails_it_goes_on_without(one: Gpu, call: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of(one, cuda_graphs=True)
    engine.infer(inputs_of(2, 3))
    if call == "execute_async_v3":
        engine._lane.reshape(((2, 3), (2, 3)))
        ran = engine._lane.run
        engine._lane.run = lambda stream: (ran(stream), one.fail.__setitem__(call, 1))  # the next one: on the graph's own context
    elif call.startswith("cuda"):
        one.cuda.fail[call] = (900, 1)
    else:
        one.fail[call] = 1
    with caplog.at_level(logging.WARNING):
        for turn in range(3):
            same(engine.infer(inputs_of(2, 3, turn)), inputs_of(2, 3, turn))
            if call == "execute_async_v3":
                one.fail.clear()
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["tensorrt 10.3.0 goes on without CUDA graphs"]
    assert one.cuda.calls["cudaGraphLaunch"] == 0 and one.live()["context"] == 1
    engine.close()
    assert one.live() == {}


def test_a_launch_that_fails_says_so(one: Gpu) -> None:
    engine = engine_of(one, cuda_graphs=True)
    for _ in range(2):
        engine.infer(inputs_of(2, 3))
    one.cuda.fail["cudaGraphLaunch"] = (719, 1)
    with pytest.raises(EngineError, match=r"cudaGraphLaunch failed with cudaErrorLaunchFailure \(error 719\)"):
        engine.infer(inputs_of(2, 3))
    same(engine.infer(inputs_of(2, 3, 1)), inputs_of(2, 3, 1))


def test_rtx_captures_by_itself(rtx: Gpu) -> None:
    engine = engine_of(rtx, cuda_graphs=True)
    for turn in range(4):
        same(engine.infer(inputs_of(2, 3, turn)), inputs_of(2, 3, turn))
    assert engine._lane._context._config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
    assert rtx.cuda.calls["cudaStreamBeginCapture"] == 0
    plain = engine_of(rtx)
    assert plain._lane._context._config is None


def changed(change: Any) -> bytes:
    model = load_from_string(MODEL)
    change(model.graph)
    return bytes(model.SerializeToString())


def _boolean(graph: Any) -> None:
    graph.node[0].output[0] = "narrow"
    graph.node.insert(1, helper.make_node("Cast", ["narrow"], ["rows"], to=TensorProto.FLOAT))
    graph.input[1].type.tensor_type.elem_type = TensorProto.BOOL


def _half(graph: Any) -> None:
    graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    graph.node[4].output[0] = "wide"
    graph.node.insert(5, helper.make_node("Cast", ["wide"], ["logits"], to=TensorProto.FLOAT16))
    graph.node[6].input[0] = "wide"


SIGNATURES: dict[str, tuple[bytes, GraphSpec, int, str]] = {
    "classes": (MODEL, GRAPH, 5, r"output 'logits' has shape \[-1, 4\], expected \[batch, 5\]"),
    "candidates": (
        MODEL,
        msgspec.structs.replace(GRAPH, candidates=2),
        CLASSES,
        r"output 'top_ids' has shape \[-1, 3\], expected \[batch, 2\]",
    ),
    "inputs": (
        MODEL,
        msgspec.structs.replace(GRAPH, inputs={"ids": 16}),
        CLASSES,
        "the engine reads input_ids, attention_mask; its manifest says ids",
    ),
    "output": (changed(lambda graph: graph.output.pop()), GRAPH, CLASSES, "the engine has no output 'score', only logits"),
    "output's type": (changed(_half), GRAPH, CLASSES, "output 'logits' is float16, expected float32"),
    "input's type": (changed(_boolean), GRAPH, CLASSES, "the engine's 'attention_mask' is BOOL, which isn't supported"),
}


@pytest.mark.parametrize("case", SIGNATURES)
def test_a_plan_of_another_signature_is_refused(gpu: Gpu, case: str) -> None:
    model, graph, classes, says = SIGNATURES[case]
    with pytest.raises(BundleError, match=says):
        engine_of(gpu, model, graph, classes)
    gc.collect()
    assert gpu.live() == {}


def test_a_tensor_on_the_host_and_a_plan_that_is_too_small_are_refused(one: Gpu) -> None:
    backend = backend_of(one)
    key = backend._key(MODEL, GRAPH)
    one.put(key, MODEL, on_host=("score",))
    with pytest.raises(BundleError, match="the engine's 'score' is FLOAT, which isn't supported"):
        backend.load(MODEL, GRAPH, CLASSES)
    from tensorrt_kit import fake_plan

    one.cache.write(key, fake_plan(MODEL, max_batch=4, inputs=GRAPH.inputs), 1.0)
    with pytest.raises(EngineError, match=r"takes 'input_ids' up to \(4, 16\), the manifest says \(8, 16\)"):
        backend.load(MODEL, GRAPH, CLASSES)


def test_a_shape_that_depends_on_the_data_is_refused(one: Gpu) -> None:
    def open_(graph: Any) -> None:
        graph.output[3].type.tensor_type.shape.dim[0].dim_param = "N"

    with pytest.raises(EngineError, match="can't tell the shape of output 'confidence': it depends on the data"):
        engine_of(one, changed(open_))


def test_the_runtime_answers_by_it_as_by_the_cpu(gpu: Gpu, tmp_path: Path) -> None:
    """A whole bundle, golden outputs and a request of more than max_batch samples included."""
    folder = edge_kit.make_bundle(tmp_path / "bundle", ngrams=True)
    cpu, backend = EdgeRuntime.load(folder), backend_of(gpu)
    model, graph = (folder / "models" / "fp32.onnx").read_bytes(), cpu.manifest.graph
    gpu.put(backend._key(model, graph), model)
    assert backend.probe() == "" and backend.ready(model, graph)
    fast = EdgeRuntime.load(folder, backend=backend)
    samples = [Sample(payload=f"{text} {n}", sample_id=f"{text}{n}") for n in range(30) for text in (*edge_kit.EASY, *edge_kit.HARD)]
    assert len(samples) > 3 * graph.max_batch
    got, want = fast.infer(samples), cpu.infer(samples)
    assert [(a.label, a.source, a.candidates) for a in got] == [(a.label, a.source, a.candidates) for a in want]
    assert fast.provider == f"{backend.name} {gpu.trt.__version__}"


def test_probe_says_why_not(one: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_of(one)
    assert backend.probe() == ""
    one.cuda.capability = (7, 0)
    assert (
        backend.probe() == "Fake RTX has compute capability 7.0, older than the 7.5 that tensorrt runs on; fix: use onnx-cuda, or onnx-cpu"
    )
    one.cuda.capability = (8, 7)
    assert backend.probe() == ""
    one.cuda.fail["cudaGetDeviceProperties"] = (2, 1)
    assert backend.probe().startswith("CUDA: cudaGetDeviceProperties failed with cudaErrorMemoryAllocation (error 2); fix: ")
    one.cuda.devices = 0
    assert backend.probe().startswith("no CUDA device; fix: ")
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backend.probe() == "tensorrt is not installed; fix: pip install 'kcm[tensorrt]'"
    assert one.live() == {}


def test_probe_knows_which_gpus_rtx_has_no_target_for(rtx: Gpu) -> None:
    backend = backend_of(rtx)
    assert backend.probe() == ""
    rtx.cuda.capability = (8, 7)  # Orin
    assert backend.probe() == (
        "Fake RTX has compute capability 8.7, which tensorrt-rtx 1.7.1.116 has no target for; fix: use tensorrt, or onnx-cuda"
    )


def test_probe_names_what_a_broken_installation_lacks(one: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.syspath_prepend(str(tmp_path))
    said = TensorRTBackend("tensorrt", cache=one.cache).probe()
    assert said.startswith("tensorrt is installed and can't be imported: libnvinfer.so.10: cannot open shared object file; fix: ")


def test_without_a_driver_nothing_of_tensorrt_is_touched() -> None:
    """In a process of its own: probing must not even import the library."""
    from edge_runtime.engines import cuda

    if cuda._has_driver():
        pytest.skip("this machine has a driver")
    pytest.importorskip("tensorrt_rtx")
    code = """
import sys
from edge_runtime.engines.tensorrt import TensorRTBackend
from kcm.bundle import GraphSpec
from kcm.errors import EngineError
backend = TensorRTBackend("tensorrt-rtx")
graph = GraphSpec(inputs={"ids": 1}, candidates=1)
said = [backend.probe(), str(backend.ready(b"", graph))]
for do in (lambda: backend.prepare(b"", graph), lambda: backend.load(b"", graph, 2)):
    try:
        do()
    except EngineError as error:
        said.append(error.message)
print("|".join(said))
print([name for name in sys.modules if name.startswith(("tensorrt", "cuda"))])
"""
    said, loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    probe, ready, prepare, load = said.split("|")
    assert "error 35" in probe and probe == prepare == load and ready == "False" and loaded == "[]"


def test_without_a_plan_it_isnt_ready_and_says_what_is_missing(gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    backend = backend_of(gpu)
    with caplog.at_level(logging.INFO):
        assert not backend.ready(MODEL, GRAPH)
    assert caplog.records[-1].getMessage() == f"{backend.name} has to be built: no {backend.name} engine of this model is cached"
    with pytest.raises(EngineError, match=f"no {backend.name} engine of this model is cached"):
        backend.load(MODEL, GRAPH, CLASSES)


def test_a_plan_is_of_one_gpu_version_and_profile(one: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    backend = backend_of(one)
    one.put(backend._key(MODEL, GRAPH), MODEL)
    assert backend.ready(MODEL, GRAPH) and not backend.ready(MODEL + b" ", GRAPH)
    wants = {
        "version 10.3.0, wanted 10.4.0": lambda: setattr(one.trt, "__version__", "10.4.0"),
        "target sm86 Fake RTX, wanted sm87 Fake RTX": lambda: setattr(one.cuda, "capability", (8, 7)),
    }
    for says, change in wants.items():
        change()
        assert not backend.ready(MODEL, GRAPH)
        assert says in caplog.records[-1].getMessage()
    one.cache.folder.chmod(0o777)
    assert not backend.ready(MODEL, GRAPH)
    assert "can be written by others" in caplog.records[-1].getMessage()
    one.cuda.fail["cudaGetDeviceProperties"] = (2, 1)
    assert not backend.ready(MODEL, GRAPH), "an error of the device is no crash of the loader"


REAL = importlib.metadata.version("tensorrt_rtx_cu13") if importlib.util.find_spec("tensorrt_rtx") else ""
needs_rtx = pytest.mark.skipif(not REAL, reason="pip install 'kcm[tensorrt-rtx]'")


@needs_rtx
def test_prepare_builds_by_the_real_builder_for_this_gpu(rtx: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx.trt.__version__ = REAL
    backend, asked = backend_of(rtx, workspace_mb=300), []
    monkeypatch.setattr(
        "edge_runtime.engines.tensorrt.build_apart", lambda model, spec, *a, **k: (asked.append(spec), build_apart(model, spec, *a, **k))[1]
    )
    assert not backend.ready(MODEL, GRAPH)
    backend.prepare(MODEL, GRAPH)
    assert backend.ready(MODEL, GRAPH)
    want = BuildSpec(flavour="tensorrt-rtx", inputs=GRAPH.inputs, max_batch=8, targets=("sm86",), workspace_mb=300)
    assert asked == [want]
    key = backend._key(MODEL, GRAPH)
    assert (key.target, key.model) == ("sm86", hashlib.sha256(MODEL).hexdigest())
    assert len(rtx.cache.read(key)) > 100_000
    with pytest.raises(EngineError, match="can't load the plan: Serialized engine has wrong magic tag"):
        backend.load(MODEL, GRAPH, CLASSES)  # the fake's word for a real plan


@needs_rtx
def test_prepare_refuses_another_version_than_this_process_has(rtx: Gpu) -> None:
    rtx.trt.__version__ = "1.0.0"
    backend = backend_of(rtx)
    with pytest.raises(EngineError, match=f"the builder's tensorrt-rtx is {REAL}, this process has 1.0.0") as caught:
        backend.prepare(MODEL, GRAPH)
    assert caught.value.fix == "restart the edge" and not backend.ready(MODEL, GRAPH)


@needs_rtx
def test_prepare_says_what_the_builder_said(rtx: Gpu) -> None:
    with pytest.raises(EngineError, match=r"can't parse the model: .*Failed to parse the ONNX model"):
        backend_of(rtx).prepare(MODEL[:-100], GRAPH)
    with pytest.raises(EngineError, match=r"took longer than 0\.05 s"):
        backend_of(rtx, limits=BuildLimits(seconds=0.05)).prepare(MODEL, GRAPH)


@needs_rtx
def test_a_build_that_failed_is_not_begun_at_every_start(rtx: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx.trt.__version__ = REAL
    tries: list[str] = []

    def counted(*arguments: Any, **more: Any) -> Any:
        tries.append("")
        return build_apart(*arguments, **more)

    monkeypatch.setattr("edge_runtime.engines.tensorrt.build_apart", counted)
    said = r"can't parse the model: .*Failed to parse the ONNX model"
    broken = MODEL[:-100]
    with pytest.raises(EngineError, match=said):
        backend_of(rtx).prepare(broken, GRAPH)
    for _ in range(3):  # starts
        with pytest.raises(EngineError, match=rf"building it failed on .* and isn't tried again: .*{said}") as caught:
            backend_of(rtx).prepare(broken, GRAPH)
    assert len(tries) == 1
    file = rtx.cache.failure_file(backend_of(rtx)._key(broken, GRAPH))
    assert caught.value.fix == f"rm {file}   lets it try again"
    backend_of(rtx).prepare(MODEL, GRAPH)  # another model is another matter
    with pytest.raises(EngineError, match=f"tensorrt-rtx {said}"):
        backend_of(rtx, again=True).prepare(broken, GRAPH)
    assert len(tries) == 3
    file.unlink()
    with pytest.raises(EngineError, match=f"^tensorrt-rtx {said}"):
        backend_of(rtx).prepare(broken, GRAPH)
    assert len(tries) == 4


@needs_rtx
def test_a_failure_in_a_cache_that_cannot_be_written_is_still_the_builders(rtx: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise EngineError("the disk is full")

    monkeypatch.setattr(rtx.cache, "note_failure", full)
    with pytest.raises(EngineError, match="can't parse the model"):
        backend_of(rtx).prepare(MODEL[:-100], GRAPH)


@needs_rtx
def test_a_build_can_be_cancelled_and_begun_again(rtx: Gpu) -> None:
    rtx.trt.__version__ = REAL
    backend, caught = backend_of(rtx), []

    def run() -> None:
        try:
            backend.prepare(MODEL, GRAPH)
        except EngineError as error:
            caught.append(error.message)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.15)
    backend.cancel()
    thread.join(5)
    assert not thread.is_alive() and "the engine's builder was cancelled" in caught[0]
    backend.prepare(MODEL, GRAPH)
    assert backend.ready(MODEL, GRAPH)


def test_pixels_of_a_fixed_shape_are_answered_for_every_batch(gpu: Gpu, tmp_path: Path) -> None:
    bundle = load_bundle(fixed_bundle(tmp_path))
    model, graph = bundle.model("fp32"), bundle.manifest.graph
    engine = engine_of(gpu, model, graph, 3, cuda_graphs=True)
    assert min(gpu.cuda.allocated()["device"]) > 0 and 32 * 32 * 32 * 3 in gpu.cuda.allocated()["device"], "uint8: a byte a colour"
    plain = OrtEngine(model, graph, 3)
    for seed, rows in enumerate((1, 32, 5, 5, 5, 1)):
        images = tinted(rows, seed=seed)[0]
        for mine, theirs in zip(engine.infer({"image": images}), plain.infer({"image": images}), strict=True):
            assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
    for wrong, said in (
        (np.zeros((1, 32, 32, 3), np.float32), "is float32, expected uint8"),
        (np.zeros((1, 32, 24, 3), np.uint8), r"has shape \(1, 32, 24, 3\), expected \(1, 32, 32, 3\)"),
        (np.zeros((1, 3, 32, 32), np.uint8), r"expected \(1, 32, 32, 3\)"),
        (np.zeros((33, 32, 32, 3), np.uint8), "built up to"),
        (np.zeros((0, 32, 32, 3), np.uint8), "has shape"),
    ):
        with pytest.raises(EngineError, match=said):
            engine.infer({"image": wrong})
    images = tinted(2)[0]
    turned = np.asfortranarray(images)
    assert np.array_equal(engine.infer({"image": turned}).logits, plain.infer({"image": images}).logits)
    engine.close()
    with pytest.raises(BundleError, match=r"'image' has shape \[-1, 32, 32, 3\]; its manifest says 48"):
        engine_of(gpu, model, GraphSpec(inputs={"image": 48}, candidates=3), 3)
