"""Our CUDA code and its fake against the installed cuda.bindings, and what really happens on a machine without a driver."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cuda_kit import FakeCuda

from edge_runtime.engines import cuda
from edge_runtime.engines.cuda import why_no_device

CUDA = ast.parse(Path(cuda.__file__).read_text(encoding="utf-8"))


def documented_answers(function: Any) -> int:
    """How many values a function of cuda.bindings returns, the error among them."""
    part = function.__doc__.split("Returns\n-------\n")[1].split("\n\n")[0]
    return sum(bool(line) and not line.startswith(" ") for line in part.split("\n"))


def cuda_calls() -> Iterator[tuple[str, int, bool]]:
    """Each call of CUDA in cuda.py: (function, arguments, is an answer beside the error used?)."""
    discarded = {id(node.value) for node in ast.walk(CUDA) if isinstance(node, ast.Expr)}
    for node in ast.walk(CUDA):
        if isinstance(node, ast.Call):
            called, arguments = ast.unparse(node.func), node.args
            if called in ("_checked", "_freed"):
                yield ast.unparse(arguments[0]).rpartition(".")[2], len(arguments) - 1, called == "_checked" and id(node) not in discarded
            elif called.rpartition(".")[0] in ("runtime", "self._runtime"):
                yield called.rpartition(".")[2], len(arguments), True


def test_cuda_is_called_as_its_bindings_want() -> None:
    from cuda.bindings import runtime

    calls = list(cuda_calls())
    assert len({name for name, _, _ in calls}) >= 14
    for name, arguments, answers in calls:
        function = getattr(runtime, name)
        assert len(inspect.signature(function).parameters) == arguments, name
        assert documented_answers(function) == (2 if answers else 1), name
    for node in ast.walk(CUDA):
        if isinstance(node, ast.Attribute) and (path := ast.unparse(node)).startswith(("runtime.", "self._runtime.")):
            found: Any = runtime
            for part in path.partition("runtime.")[2].split("."):
                found = getattr(found, part)


def test_the_fake_cuda_is_no_more_than_the_real_one() -> None:
    from cuda.bindings import runtime

    used = {name for name, _, _ in cuda_calls()}
    offered = {name for name, value in vars(FakeCuda).items() if name.startswith("cuda") and inspect.isfunction(value)}
    assert used <= offered
    device = FakeCuda()
    for name in offered:
        real, fake = getattr(runtime, name), getattr(device, name)
        assert len(inspect.signature(real).parameters) == len(inspect.signature(fake).parameters), name
        device.fail[name] = (2, 1)
        answer = fake(*[0] * len(inspect.signature(fake).parameters))
        assert len(answer) == documented_answers(real) and int(answer[0]) == 2, name


PROGRAM = """
import sys
from pathlib import Path
import tensorrt_rtx as trt
from edge_runtime.engines.chain import BACKENDS
from edge_runtime.engines.compile import BuildSpec, build_plan
from edge_runtime.engines.execute import TensorRTEngine
from edge_runtime.engines.tensorrt import TensorRTBackend
from kcm.bundle import load_bundle
from kcm.errors import EngineError

bundle = load_bundle(Path(sys.argv[1]))
model, graph, classes = bundle.model("fp32"), bundle.manifest.graph, len(bundle.task.labels)

def said(call):
    try:
        return f"no error: {call()}"
    except EngineError as error:
        return str(error)

for name, make in BACKENDS.items():
    print(name, "|", make().probe().replace("\\n", " "))
rtx = TensorRTBackend("tensorrt-rtx")
print("ready |", rtx.ready(model, graph))
print("prepare |", said(lambda: rtx.prepare(model, graph)).replace("\\n", " "))
print("load |", said(lambda: rtx.load(model, graph, classes)).replace("\\n", " "))
spec = BuildSpec(flavour="tensorrt-rtx", inputs=graph.inputs, max_batch=8, targets=("sm86",))
plan = build_plan(trt, model, spec).plan
for name, given in (("plan", plan), ("half", plan[:1000]), ("empty", b"")):
    for graphs in (False, True):
        words = said(lambda: TensorRTEngine(trt, given, graph, classes, provider="rtx", cuda_graphs=graphs))
        print(name, "|", words.replace("\\n", " "))
print("alive | yes")
"""


@pytest.mark.skipif(not why_no_device(), reason="this machine has a GPU")
def test_without_a_driver_all_is_said_and_nothing_crashes(bundle_dir: Path) -> None:
    """Error 35 is CUDA's and TensorRT-RTX's own; a plan that was really built is refused by the real runtime."""
    pytest.importorskip("tensorrt_rtx")
    command = [sys.executable, "-c", PROGRAM, str(bundle_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split(" | ", 1) for line in done.stdout.splitlines()]
    said = {name: [text for n, text in lines if n == name] for name, _ in lines}
    assert said["onnx-cpu"] == [""] and said["ready"] == ["False"] and said["alive"] == ["yes"]
    for name in ("tensorrt-rtx", "prepare", "load"):
        assert "no CUDA device" in said[name][0] and "error 35" in said[name][0], said[name]
    assert all(said[name][0] for name in ("tensorrt", "onnx-cuda", "onnx-tensorrt"))
    assert len(said["plan"]) == 2 and all("can't load the plan" in text and "cudaError 35" in text for text in said["plan"])
    assert all("can't load the plan" in text for text in (*said["half"], *said["empty"]))
