"""What a KAN costs in ONNX Runtime beside an MLP of as many parameters and an empty session, and how exact each form is.

    python -m benchmarks.kan_export [--repeats 15] [--json]

Shapes: the judge's (10 inputs, 6 outcomes; one layer, and hidden width 8), and the notes' 64-32-2. Everything is interleaved in one
run on one thread; medians over repeats with the middle half's range, and ratios per repeat, so that a busy machine moves both sides.
run: session.run. bound: the same through bound inputs and outputs. Bars: batch 1 ≤ 1.6× the MLP, batch 256 ≤ 3.2×, two layers ≤ 10
nodes, errors of the largest output ≤ 1e-4 (S), 1e-5 (L, R) and, in fp16, 6e-3 (L).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from benchmarks.hot_path import described
from export.kan import append_form, append_kan
from export.nodes import Nodes
from kcm.task import JudgeSpec
from training.judge import mlp_width
from training.kan import KanLayer
from training.kan_forms import LocalForm, Precision, RampForm, SaturatingForm

SHAPES = {"judge 10-6": (10, 0, 6), "judge 10-8-6": (10, 8, 6), "64-32-2": (64, 32, 2)}
TYPES: dict[str, tuple[int, Any]] = {"fp32": (TensorProto.FLOAT, np.float32), "fp16": (TensorProto.FLOAT16, np.float16)}
BARS = {1: 1.6, 256: 3.2}


def layers_of(inputs: int, hidden: int, outputs: int, *, grid: int = 5, degree: int = 3, seed: int = 0) -> list[KanLayer]:
    """KAN layers with rough curves: coefficients of standard deviation 1."""
    torch.manual_seed(seed)
    sizes = [inputs, hidden, outputs] if hidden else [inputs, outputs]
    layers = [KanLayer(a, b, grid=grid, degree=degree).eval() for a, b in pairwise(sizes)]
    for layer in layers:
        torch.nn.init.normal_(layer.spline)
    return layers


def model(nodes: Nodes, inputs: int, outputs: int, precision: Precision = "fp32") -> onnx.ModelProto:
    """The nodes, whose last output becomes "y" [B, outputs], as a model of "x" [B, inputs]."""
    nodes.nodes[-1].output[0] = "y"
    infos = [helper.make_tensor_value_info(name, TYPES[precision][0], ["B", width]) for name, width in (("x", inputs), ("y", outputs))]
    graph = helper.make_graph(nodes.nodes, "kan", infos[:1], infos[1:], nodes.initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def kan(layers: list[KanLayer]) -> onnx.ModelProto:
    nodes, y = Nodes(), "x"
    for layer in layers:
        y = append_kan(nodes, layer, y)
    return model(nodes, layers[0].base.shape[1], layers[-1].base.shape[0])


def mlp(inputs: int, hidden: int, outputs: int) -> onnx.ModelProto:
    """Two dense layers with as many parameters as the KAN; its normalisation is folded into the first, as the KAN's is."""
    wide, rng = mlp_width(JudgeSpec(hidden=hidden), inputs, outputs), np.random.default_rng(0)
    nodes = Nodes()
    y = nodes("Gemm", "x", rng.normal(size=(inputs, wide)).astype(np.float32), np.zeros(wide, np.float32))
    nodes("Gemm", nodes("Relu", y), rng.normal(size=(wide, outputs)).astype(np.float32), np.zeros(outputs, np.float32))
    return model(nodes, inputs, outputs)


def empty(inputs: int) -> onnx.ModelProto:
    nodes = Nodes()
    nodes("Identity", "x")
    return model(nodes, inputs, inputs)


def session(made: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def calls_of(made: onnx.ModelProto, x: np.ndarray) -> tuple[Callable[[], object], Callable[[], object]]:  # type: ignore[type-arg]
    """session.run, and the same with bound input and output."""
    running = session(made)
    binding = running.io_binding()
    held = ort.OrtValue.ortvalue_from_numpy(x)
    binding.bind_ortvalue_input("x", held)
    out = ort.OrtValue.ortvalue_from_numpy(running.run(None, {"x": x})[0])
    binding.bind_ortvalue_output("y", out)
    feed = {"x": x}
    return (lambda: running.run(None, feed)), (lambda: running.run_with_iobinding(binding))  # RunOptions would cost 25 µs


def speed(repeats: int) -> dict[str, Any]:
    """Per shape: µs of each graph at batch 1 and 256, and the KAN's ratio to the MLP."""
    results: dict[str, Any] = {}
    for name, (inputs, hidden, outputs) in SHAPES.items():
        graphs = {"empty": empty(inputs), "mlp": mlp(inputs, hidden, outputs), "kan": kan(layers_of(inputs, hidden, outputs))}
        result: dict[str, Any] = {"nodes": {key: len(made.graph.node) for key, made in graphs.items()}, "us": {}, "ratio": {}}
        for batch in BARS:
            x = np.random.default_rng(0).normal(size=(batch, inputs)).astype(np.float32)
            calls = {}
            for key, made in graphs.items():
                calls[f"{key} run"], calls[f"{key} bound"] = calls_of(made, x)
            taken = interleaved(calls, repeats, 400 if batch == 1 else 60)
            for key, values in taken.items():
                result["us"][f"{key} B{batch}"] = described(values)
            for way in ("run", "bound"):
                result["ratio"][f"{way} B{batch}"] = described(taken[f"kan {way}"] / taken[f"mlp {way}"])
        results[name] = result
    return results


def interleaved(calls: dict[str, Callable[[], object]], repeats: int, count: int) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    """µs per call by name [repeats]: every repeat measures each in turn."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(count):
                call()
            if repeat:  # the first one warms up
                taken[name].append((time.perf_counter() - began) / count * 1e6)
    return {name: np.array(values) for name, values in taken.items()}


def errors(seeds: int = 8) -> list[dict[str, Any]]:
    """Largest error of a 10-6 layer with rough curves in each form, of the largest output, against torch in fp64 on the same inputs."""
    cases: list[tuple[type[LocalForm] | type[SaturatingForm] | type[RampForm], Precision, int, tuple[int, ...], float]] = [
        (SaturatingForm, "fp32", 3, (2, 5, 8), 1e-4),
        (RampForm, "fp32", 3, (5, 16, 64), 1e-5),
        (RampForm, "fp32", 1, (5, 16, 64), 1e-5),
        (LocalForm, "fp32", 3, (5, 16, 64), 1e-5),
        (LocalForm, "fp16", 3, (2, 5, 8, 16), 6e-3),
        (LocalForm, "fp16", 1, (2, 5, 8, 16), 6e-3),
    ]
    found = []
    for form, precision, degree, grids, bar in cases:
        for grid in grids:
            off = [_error(form, precision, degree, grid, seed) for seed in range(seeds)]
            row = {"form": form.__name__[0], "precision": precision, "degree": degree, "grid": grid, "bar": bar}
            found.append({**row, "largest": max(off), "median": float(np.median(off))})
    return found


def _error(form: type[LocalForm] | type[SaturatingForm] | type[RampForm], precision: Precision, degree: int, grid: int, seed: int) -> float:
    (layer,) = layers_of(10, 0, 6, grid=grid, degree=degree, seed=seed)
    x = np.random.default_rng(seed).normal(0, 1.5, (512, 10)).astype(TYPES[precision][1])
    exact = layer.double()(torch.from_numpy(x.astype(np.float64))).detach().numpy()
    nodes = Nodes()
    append_form(nodes, form(layer.float()), "x", precision)
    got = session(model(nodes, 10, 6, precision)).run(None, {"x": x})[0]
    return float(np.abs(got.astype(np.float64) - exact).max() / np.abs(exact).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = f"{platform.machine()}, ONNX Runtime {ort.__version__}, torch {torch.__version__}"
    result = {"schema": 1, "date": time.strftime("%Y-%m-%d"), "machine": machine, "speed": speed(arguments.repeats), "errors": errors()}
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{machine}, {result['date']}, {arguments.repeats} repeats")
    for name, shape in result["speed"].items():  # type: ignore[attr-defined]
        print(f"\n{name}: nodes " + ", ".join(f"{key} {count}" for key, count in shape["nodes"].items()))
        for key, value in shape["us"].items():
            print(f"  {key:16} {value['median']:8.1f} µs  [{value['low']:.1f}, {value['high']:.1f}]")
        for key, value in shape["ratio"].items():
            bar = BARS[int(key.rpartition("B")[2])]
            print(f"  kan / mlp {key:10} {value['median']:5.2f}×  [{value['low']:.2f}, {value['high']:.2f}]  bar {bar}×")
    print("\nform  precision  k   G   largest  median   bar")
    for e in result["errors"]:  # type: ignore[attr-defined]
        print(f"{e['form']:4}  {e['precision']:9}  {e['degree']}  {e['grid']:3}  {e['largest']:.1e}  {e['median']:.1e}  {e['bar']:.0e}")


if __name__ == "__main__":
    main()
