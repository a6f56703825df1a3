"""What the judge's own KANs cost in ONNX Runtime beside an MLP of as many parameters and an empty session, and how exact each form is.

    python -m benchmarks.kan_export [--repeats 15] [--json]

Shapes: the judge's, 10 inputs and 6 outcomes, in one layer and with hidden width 8. The pinned 64-32-2 is `kcm bench edge`'s.
CPU time, interleaved in one run on one thread; medians over repeats with the middle half's range, and ratios per repeat.
run: session.run. bound: the same through bound inputs and outputs. Bars: batch 1 ≤ 1.6× the MLP, batch 256 ≤ 3.2×; errors of the
largest output ≤ 1e-4 (S), 1e-5 (L, R) and, in fp16, 6e-3 (L).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from export.kan import append_form
from export.nodes import Nodes
from kcm.app.bench.clocks import in_turn
from kcm.app.bench.figures import spread
from kcm.app.bench.judge_graphs import TYPES, kan, layers_of, mlp, model_of, session
from training.kan_forms import LocalForm, Precision, RampForm, SaturatingForm

SHAPES = {"judge 10-6": (10, 0, 6), "judge 10-8-6": (10, 8, 6)}
BARS = {1: 1.6, 256: 3.2}


def empty(inputs: int) -> onnx.ModelProto:
    nodes = Nodes()
    nodes("Identity", "x")
    return model_of(nodes, inputs, inputs)


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
        sizes = (inputs, hidden, outputs) if hidden else (inputs, outputs)
        graphs = {"empty": empty(inputs), "mlp": mlp(inputs, hidden, outputs), "kan": kan(layers_of(sizes))}
        result: dict[str, Any] = {"nodes": {key: len(made.graph.node) for key, made in graphs.items()}, "us": {}, "ratio": {}}
        for batch in BARS:
            x = np.random.default_rng(0).normal(size=(batch, inputs)).astype(np.float32)
            calls = {}
            for key, made in graphs.items():
                calls[f"{key} run"], calls[f"{key} bound"] = calls_of(made, x)
            rows = [in_turn(calls, 400 if batch == 1 else 60) for _ in range(repeats + 1)][1:]  # the first one warms up
            for key in calls:
                result["us"][f"{key} B{batch}"] = spread([row[key] for row in rows])
            for way in ("run", "bound"):
                result["ratio"][f"{way} B{batch}"] = spread([row[f"kan {way}"] / row[f"mlp {way}"] for row in rows])
        results[name] = result
    return results


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
    (layer,) = layers_of((10, 6), grid=grid, degree=degree, seed=seed)
    x = np.random.default_rng(seed).normal(0, 1.5, (512, 10)).astype(TYPES[precision][1])
    exact = layer.double()(torch.from_numpy(x.astype(np.float64))).detach().numpy()
    nodes = Nodes()
    append_form(nodes, form(layer.float()), "x", precision)
    got = session(model_of(nodes, 10, 6, precision)).run(None, {"x": x})[0]
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
