"""Our TensorRT and CUDA code against the real APIs: every attribute, argument and type that it uses, on every version.

The source is read (what it names must exist), and run on fakes that check each access against the real bindings first. The bindings
are NVIDIA's own, imported over a stub of the libraries (tensorrt_bindings.py); cuda.bindings and TensorRT-RTX are installed.
"""

from __future__ import annotations

import ast
import builtins
import collections
import functools
import hashlib
import importlib
import inspect
import io
import logging
import pathlib
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, ValueInfoProto, helper
from tensorrt_bindings import FLAVOURS, Api, NoBindingsError, load_api
from tensorrt_kit import FAKES, Gpu, fake_gpu, fake_trt
from tensorrt_watch import Watch

import edge_runtime.engines
from edge_runtime.engines.compile import BuildSpec, build_plan
from edge_runtime.engines.tensorrt import TensorRTBackend
from export.graph import bundle_outputs
from export.nodes import Nodes
from kcm.bundle import GraphSpec
from kcm.errors import BundleError, EngineError

ENGINES = Path(edge_runtime.engines.__file__).parent
SOURCES = [ENGINES / name for name in ("compile.py", "execute.py", "tensorrt.py")]
TREES = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
RTX_ONLY = "ComputeCapability"  # hasattr of it stands for TensorRT-RTX


@pytest.fixture(params=FLAVOURS)
def flavour(request: pytest.FixtureRequest) -> str:
    api_of(request.param)
    return str(request.param)


def api_of(flavour: str) -> Api:
    try:
        return load_api(flavour)
    except NoBindingsError as error:
        pytest.skip(str(error))


def library_paths(tree: ast.AST) -> Iterator[tuple[ast.Attribute, str]]:
    """Every trt.A.B of a file, whole, also behind a local name: "ILogger.Severity.WARNING"."""
    aliases = {"trt": "", "self._trt": ""}
    for node in ast.walk(tree):
        named = isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
        if named and (path := _path(node.value, aliases)) is not None:
            aliases[node.targets[0].id] = path
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner and (path := _path(node, aliases)):
            yield node, path


def _path(node: ast.expr, aliases: dict[str, str]) -> str | None:
    written = ast.unparse(node)
    for name, path in aliases.items():
        if written == name:
            return path
        if written.startswith(f"{name}.") and isinstance(node, ast.Attribute):
            rest = written.removeprefix(f"{name}.")
            return f"{path}.{rest}" if path else rest
    return None


def guarded(tree: ast.AST) -> set[int]:
    """The nodes that only TensorRT-RTX reaches: behind hasattr(trt, "ComputeCapability")."""
    reached: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for place, statement in enumerate(node.body):
                # if ... or not hasattr(...): return
                if isinstance(statement, ast.If) and f"not hasattr(trt, '{RTX_ONLY}')" in ast.unparse(statement.test):
                    assert isinstance(statement.body[-1], (ast.Return, ast.Raise)), ast.unparse(statement)
                    reached |= {id(n) for later in node.body[place + 1 :] for n in ast.walk(later)}
        elif isinstance(node, ast.If) and ast.unparse(node.test) in (
            f"hasattr(trt, '{RTX_ONLY}')",
            "cuda_graphs and (not self._own_graphs)",
        ):
            reached |= {id(n) for later in node.body for n in ast.walk(later)}
    return reached


def test_what_is_named_of_the_library_exists(flavour: str) -> None:
    """Modules' functions, classes, enumerations' members."""
    seen, api = 0, api_of(flavour)
    for name, tree in TREES.items():
        behind = guarded(tree)
        for node, path in library_paths(tree):
            asked = path.partition(".__")[0]  # __members__ and __init__ are Python's
            if id(node) in behind and flavour != "rtx":
                continue
            seen += 1
            assert api.has(asked), f"{name}:{node.lineno}: TensorRT {api.version} has no {asked}"
    assert seen >= 20, "the library goes by another name now: this test sees nothing"


def members_of(flavour: str) -> set[str]:
    found = api_of(flavour)
    names = {member for members in found.classes.values() for member in members}
    return {n for n in names | {c.rpartition(".")[2] for c in found.classes} | set(found.functions) if not n.startswith("__")}


def test_what_only_rtx_has_stands_behind_its_guard() -> None:
    only = members_of("rtx") - set().union(*(members_of(flavour) for flavour in FLAVOURS if flavour != "rtx"))
    assert {"ComputeCapability", "num_compute_capabilities", "set_compute_capability", "cuda_graph_strategy"} <= only
    found = set()
    for name, tree in TREES.items():
        behind = guarded(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in only:
                found.add(node.attr)
                assert id(node) in behind, f"{name}:{node.lineno}: only TensorRT-RTX has {node.attr}"
    assert {"ComputeCapability", "set_compute_capability"} <= found


@functools.cache
def driven(flavour: str) -> Watch:
    """The build and the run, on this version's API. The builder is TensorRT-RTX's real one, the device a fake."""
    found = api_of(flavour)
    watch = Watch(found, SOURCES)
    rtx = flavour == "rtx"
    built_all(watch, watch.module(pytest.importorskip("tensorrt_rtx"), held=True), rtx=rtx)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        with fake_gpu(patch, Path(folder), version=found.version, rtx=rtx) as gpu:
            patch.setitem(sys.modules, gpu.trt.__name__, watch.module(gpu.trt))
            watch.install(patch, FAKES)
            for cuda_graphs in (False, True):
                run_all(TensorRTBackend("tensorrt-rtx" if rtx else "tensorrt", cuda_graphs=cuda_graphs, cache=gpu.cache), gpu)
    return watch


def built_all(watch: Watch, trt: Any, *, rtx: bool) -> None:
    """A plan, and what the parser and the builder refuse."""
    targets = ("sm86", "sm120") if rtx else ()
    spec = BuildSpec(flavour="tensorrt-rtx" if rtx else "tensorrt", inputs={"x": 16}, max_batch=8, targets=targets)
    assert build_plan(trt, tiny_model(), spec).report.version == watch.api.version
    assert build_plan(trt, tiny_image_model(), msgspec.structs.replace(spec, inputs={"image": 8})).report.size > 1e4
    for model, said in (
        (tiny_model("NoSuchOperator"), "can't parse"),
        (b"no model", "can't parse"),
        (tiny_model(columns=5), "can't build"),
    ):
        with pytest.raises(EngineError, match=said):
            build_plan(trt, model, spec)


def tiny_model(kind: str = "Relu", columns: int = 1) -> bytes:
    """x float [B, L] → the five outputs of a fused graph; `columns` other than 1 fit no other length."""
    nodes = Nodes()
    y = nodes("Add", nodes(kind, "x"), np.zeros((1, columns), np.float32))
    logits = nodes("Concat", *[nodes("ReduceSum", y, np.array([1]), keepdims=1)] * 3, axis=1)
    return with_outputs(nodes, logits, helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "L"]))


def tiny_image_model() -> bytes:
    """image uint8 [B, 8, 8, 3] → the mean of each colour as logits, and the other outputs of a fused graph."""
    nodes = Nodes()
    logits = nodes("ReduceMean", nodes("Cast", "image", to=TensorProto.FLOAT), np.array([1, 2]), keepdims=0)
    return with_outputs(nodes, logits, helper.make_tensor_value_info("image", TensorProto.UINT8, ["B", 8, 8, 3]))


def with_outputs(nodes: Nodes, logits: str, given: ValueInfoProto) -> bytes:
    nodes("Identity", logits, out="logits")
    top, ids = nodes("TopK", logits, np.array([2]), axis=1, outputs=2)
    nodes("Identity", top, out="top_probs"), nodes("Identity", ids, out="top_ids")
    nodes("Identity", nodes("ReduceMax", logits, np.array([1]), keepdims=0), out="confidence")
    nodes("Identity", "confidence", out="score")
    graph = helper.make_graph(nodes.nodes, "tiny", [given], bundle_outputs(3, 2), nodes.initializers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return bytes(made.SerializeToString())


GRAPH = GraphSpec(inputs={"x": 16}, candidates=2, max_batch=8)
IMAGE_GRAPH = GraphSpec(inputs={"image": 8}, candidates=2, max_batch=8)


def run_all(backend: TensorRTBackend, gpu: Gpu) -> None:
    """probe, ready, load; shapes that change and shapes that come again (a graph is captured); close."""
    model = tiny_model()
    assert backend.probe() == ""
    gpu.put(backend._key(model, GRAPH), model)
    assert backend.ready(model, GRAPH)
    engine = backend.load(model, GRAPH, 3)
    for batch, length in ((1, 1), (8, 16), (2, 5), (2, 5), (2, 5), (1, 1)):
        x = np.random.default_rng(batch).normal(size=(batch, length)).astype(np.float32)
        outputs = engine.infer({"x": x})
        np.testing.assert_allclose(outputs.logits, np.maximum(x, 0).sum(1, keepdims=True).repeat(3, 1), rtol=1e-5)
    engine.close()
    images = tiny_image_model()
    gpu.put(backend._key(images, IMAGE_GRAPH), images)
    engine = backend.load(images, IMAGE_GRAPH, 3)
    for batch in (1, 8, 2):
        x = np.random.default_rng(batch).integers(0, 256, (batch, 8, 8, 3), np.uint8)
        np.testing.assert_allclose(engine.infer({"image": x}).logits, x.astype(np.float32).mean((1, 2)), rtol=1e-4)
    engine.close()
    for name in ("execute_async_v3", "set_input_shape", "set_tensor_address", "infer_shapes", "create_execution_context"):
        gpu.fail[name] = 1
        with pytest.raises(EngineError):
            backend.load(model, GRAPH, 3).infer({"x": np.zeros((2, 2), np.float32)})
        gpu.fail[name] = 0
    gpu.put(backend._key(model, GRAPH), model, on_host=("x",))
    with pytest.raises(BundleError, match="isn't supported"):
        backend.load(model, GRAPH, 3)


def test_our_code_asks_for_nothing_that_the_version_lacks(flavour: str) -> None:
    """Attributes, assignments, arguments and their types, in the build and in the run."""
    watch = driven(flavour)
    assert watch.wrong == [] and watch.uncalled == set()
    assert {name for name, _, _ in watch.seen} == {"compile.py", "execute.py", "tensorrt.py"}


def test_every_use_of_the_library_was_run() -> None:
    """No attribute of the library in a line that the run above doesn't reach, and none whose spelling nobody knows."""
    seen = {access for flavour in FLAVOURS for access in driven(flavour).seen}
    library = set().union(*map(members_of, FLAVOURS))
    ours = known_names()
    unknown, unseen, count = [], [], 0
    for name, tree in TREES.items():
        of_module = {id(n) for node, _ in library_paths(tree) for n in ast.walk(node)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
                continue
            ran = any((name, line, node.attr) in seen for line in range(node.lineno, (node.end_lineno or node.lineno) + 1))
            if node.attr not in library | ours:
                unknown.append(f"{name}:{node.lineno}: nothing has {node.attr!r}")
            elif node.attr not in ours and id(node) not in of_module:
                count += 1
                if not ran:
                    unseen.append(f"{name}:{node.lineno}: {node.attr!r} was never asked for")
    assert unknown == [] and unseen == []
    assert count >= 30


def known_names() -> set[str]:
    """What Python, NumPy, the modules that are imported, and our own classes have. A class of Python's that is missing here: add it."""
    names = {n for kind in vars(builtins).values() if isinstance(kind, type) for n in dir(kind)}
    kinds = (
        np.ndarray,
        np.dtype,
        pathlib.Path,
        collections.deque,
        collections.OrderedDict,
        threading.Event,
        io.TextIOWrapper,
        logging.Logger,
        type(hashlib.sha256()),
    )
    names |= {n for owner in (np, *kinds) for n in dir(owner)}
    for path in ENGINES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {n for alias in node.names for n in (*dir(importlib.import_module(alias.name)), *alias.name.split("."))}
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign):
                names.add(node.target.attr if isinstance(node.target, ast.Attribute) else ast.unparse(node.target))
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
                names.add(node.attr)
    return names | set(GraphSpec.__struct_fields__) | {"message"}


def test_fakes_are_no_more_than_the_real_classes(flavour: str) -> None:
    """Every method, argument, property and value of a fake is the real class's; else a test on fakes proves nothing."""
    api, rtx = api_of(flavour), flavour == "rtx"
    for name, fake in vars(fake_trt(api.version, rtx=rtx)).items():
        if isinstance(fake, type):
            for member, value in vars(fake).items():
                later = (name, member) in NEWER and not rtx
                if not member.startswith("_") and not later:
                    assert member in api.classes[name], f"{name} has no {member}"
                    check_member(api, name, member, value)


# Only TensorRT-RTX's way leads there; the fake engine is one for all.
NEWER = {("ICudaEngine", "create_runtime_config"), ("ICudaEngine", "create_execution_context")}


def check_member(api: Api, name: str, member: str, value: Any) -> None:
    known = api.classes[name][member]
    if isinstance(value, property):
        assert known.kind == "property", f"{name}.{member} is no property"
        assert value.fset is None or known.writable, f"{name}.{member} can't be set"
    elif inspect.isfunction(value):
        assert known.kind == "method", f"{name}.{member} is no method"
        parameters = list(inspect.signature(value).parameters.values())[1:]
        for taken in ([p for p in parameters if p.default is p.empty], parameters):
            refusals = [s.refusal((), {p.name: None for p in taken}) for s in known.signatures]
            assert "" in refusals, f"{name}.{member}({', '.join(p.name for p in taken)}): {refusals}"
    elif isinstance(value, type):
        nested = api.classes[f"{name}.{member}"]
        assert {n for n in vars(value) if not n.startswith("_")} <= set(nested), f"{name}.{member}"
    else:
        assert known.kind == "value", f"{name}.{member} is a {known.kind}"
