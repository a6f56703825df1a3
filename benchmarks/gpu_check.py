"""On a machine with a GPU: do its engines decide as ONNX Runtime's CPU does, and how fast are they?

    python -m benchmarks.gpu_check --bundle BUNDLE [--engine tensorrt] [--precision fp32] [--repeats 20] [--json]

For every engine that can run here, TensorRT with CUDA graphs and without: what preparing it takes (TensorRT builds its plan),
loading, the golden check, parity on random batches and lengths up to the bundle's largest (of images: on random pixels), device and
host memory, and latency at batch 1, 8 and 32, all engines interleaved, CUDA and CPU of ONNX Runtime among them. For every other engine
the reason.
Exit code 0: all that could run agree; 6: one decides otherwise; 10: none can run here, or one that should failed.

Device memory is the whole device's (cudaMemGetInfo): leave it to this process.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.engines.chain import BACKENDS, named
from edge_runtime.engines.onnx import OrtBackend
from edge_runtime.engines.protocol import Backend, Engine, Outputs
from edge_runtime.engines.tensorrt import TensorRTBackend
from edge_runtime.golden import check_golden, golden_payloads
from kcm.bundle import Bundle, Precision, golden_name, load_bundle
from kcm.errors import BundleError, EngineError, KcmError, VerifyError
from kcm.images import ImagePreprocessor
from kcm.preprocess import Inputs, Preprocessor, as_text, load_preprocessor, longest_of
from kcm.sample import Payload

CPU = "onnx-cpu"
BATCHES = (1, 8, 32)
CALLS = 50  # of one engine before the next one's turn
WARM = 20
RANDOM_BATCHES = 40
# A decision may differ where the routing score is this near to ε: fp32 sums in another order; fp16 has three digits.
NEAR = {"fp32": 1e-3, "fp16": 1e-2, "int8": 1e-2}


@dataclass
class Report:
    """`engines`: name → what was measured; `skipped` and `failed`: name → reason."""

    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def exit_code(self) -> int:
        devices = [name for name in self.engines if name != CPU]
        if self.failed or not devices:
            return EngineError.exit_code
        return 0 if all(self.engines[name]["parity"]["ok"] for name in devices) else VerifyError.exit_code


def check(bundle: Bundle, precision: Precision, backends: Mapping[str, Backend], repeats: int, seed: int = 0) -> Report:
    """Run the whole path of each backend that can run here, against ONNX Runtime on the CPU.

    Args:
        backends: by what the report calls them.

    Raises:
        BundleError: the bundle has no such precision, or its CPU engine doesn't reproduce its golden outputs.
        MissingExtraError: no ONNX Runtime.
    """
    reasons = {name: backend.probe() for name, backend in backends.items()}
    report = Report(skipped={name: reason for name, reason in reasons.items() if reason})
    left = {name: backend for name, backend in backends.items() if not reasons[name]}
    if not left:
        return report
    preprocessor = load_preprocessor(bundle.task.preprocess, bundle.files)
    payloads, largest = list(golden_payloads(bundle.files["golden.npz"])), bundle.manifest.graph.max_batch
    random = random_batches(preprocessor, payloads, largest, seed)
    loaded: dict[str, Engine] = {}
    expected: list[Outputs] = []
    for name, backend in {CPU: OrtBackend(CPU), **left}.items():
        try:
            engine, took = prepared(backend, bundle, precision)
            check_golden(engine, preprocessor, bundle.files[golden_name(precision)], precision)
            got = [copied(engine.infer(inputs)) for inputs in random]
        except (EngineError, BundleError) as error:
            if name == CPU:
                raise
            report.failed[name] = str(error)
            continue
        expected = expected or got
        if name != CPU:
            took["parity"] = parity(got, expected, bundle.calibration[precision].epsilon, NEAR[precision])
        report.engines[name], loaded[name] = took, engine
    batches = {size: preprocessor.batch((payloads * size)[:size]) for size in BATCHES if size <= largest}
    for name, by_batch in latencies(loaded, batches, repeats).items():
        report.engines[name]["us"] = by_batch
    for engine in loaded.values():
        engine.close()
    return report


def chosen(names: Sequence[str]) -> dict[str, Backend]:
    """The backends by name; TensorRT's once more with CUDA graphs."""
    found: dict[str, Backend] = {}
    for backend in named(names):
        found[backend.name] = backend
        if isinstance(backend, TensorRTBackend):
            found[f"{backend.name} with graphs"] = TensorRTBackend(backend.name, cuda_graphs=True)
    return found


def prepared(backend: Backend, bundle: Bundle, precision: Precision) -> tuple[Engine, dict[str, Any]]:
    """The engine, and what it took to get it: seconds, memory of host and device."""
    model, graph = bundle.model(precision), bundle.manifest.graph
    free, resident = device_free(), host_mb()
    took: dict[str, Any] = {"built_before": backend.ready(model, graph), "provider": ""}
    began = time.perf_counter()
    if not took["built_before"]:
        backend.prepare(model, graph)
    took["prepare_s"] = time.perf_counter() - began
    began = time.perf_counter()
    engine = backend.load(model, graph, len(bundle.task.labels))
    took["load_s"] = time.perf_counter() - began
    took["provider"] = engine.provider
    took["host_mb"] = host_mb() - resident
    took["device_mb"] = None if free is None else (free - (device_free() or 0)) / 1e6
    return engine, took


def random_batches(preprocessor: Preprocessor, payloads: Sequence[Payload], max_batch: int, seed: int) -> list[Inputs]:
    """Batches of 1..max_batch samples: texts of 0..longest words of the golden texts, the extremes of both first; or random pixels."""
    random = np.random.default_rng(seed)
    if isinstance(preprocessor, ImagePreprocessor):
        return [pixels(preprocessor, rows, random) for rows in (1, max_batch, *random.integers(1, max_batch + 1, RANDOM_BATCHES).tolist())]
    words = sorted({word for text in payloads for word in as_text(text).split()}) or ["a"]
    longest = max(longest_of(preprocessor).values())

    def text(length: int) -> str:
        return " ".join(random.choice(words, length))

    shapes = [(1, 0), (1, longest), (max_batch, 0), (max_batch, longest)]
    shapes += [(int(random.integers(1, max_batch + 1)), int(longest ** random.random())) for _ in range(RANDOM_BATCHES)]
    # One row as long as the shape says; the others are padded to it.
    lengths = [[most, *random.integers(0, most + 1, rows - 1)] for rows, most in shapes]
    return [preprocessor.batch([text(int(length)) for length in rows]) for rows in lengths]


def pixels(preprocessor: ImagePreprocessor, rows: int, random: np.random.Generator) -> Inputs:
    """Images of one grey each, from black to white, under more or less noise."""
    shape = (rows, *(preprocessor.inputs["image"].shape or ()))
    grey, noise = random.uniform(0, 255, (rows, 1, 1, 3)), random.uniform(0, 80, (rows, 1, 1, 1))
    return {"image": np.clip(grey + noise * random.normal(size=shape), 0, 255).astype(np.uint8)}


def copied(outputs: Outputs) -> Outputs:
    """The engine may keep its buffers: its outputs are the caller's until the next call only."""
    return Outputs._make(np.copy(value) for value in outputs)


def parity(got: Sequence[Outputs], expected: Sequence[Outputs], epsilon: float, near: float) -> dict[str, Any]:
    """Where an engine's outputs differ from the CPU's: answers, decisions, and the largest errors."""
    ours, theirs = (Outputs._make(np.concatenate(values) for values in zip(*side, strict=True)) for side in (got, expected))
    scale = max(1.0, float(np.abs(theirs.logits).max()))
    first = theirs.logits.max(1)
    # A tie may fall either way.
    answers = ~(np.take_along_axis(theirs.logits, ours.top_ids[:, :1], 1)[:, 0] >= first - 2 * near * scale)
    moved = (ours.score > epsilon) != (theirs.score > epsilon)
    away = moved & ~(np.abs(theirs.score - epsilon) < near)
    found = {
        "samples": len(first),
        "answers": int(answers.sum()),
        "decisions": int(moved.sum()),
        "decisions_away_from_epsilon": int(away.sum()),
        "logits_error": float(np.abs(ours.logits - theirs.logits).max()) / scale,
        "score_error": float(np.abs(ours.score - theirs.score).max()),
    }
    finite = all(np.isfinite(value).all() for value in (ours.logits, ours.score, ours.confidence))
    return {**found, "ok": finite and not found["answers"] and not found["decisions_away_from_epsilon"]}


def latencies(engines: dict[str, Engine], batches: dict[int, Inputs], repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Microseconds per call of `infer`, host to host: engine → batch → p50 and p99. The engines take turns, CALLS calls each."""
    taken: dict[tuple[str, int], list[float]] = {(name, size): [] for name in engines for size in batches}
    for size, inputs in batches.items():
        for engine in engines.values():
            for _ in range(WARM):
                engine.infer(inputs)
        for _ in range(repeats):
            for name, engine in engines.items():
                taken[name, size] += [seconds(lambda: engine.infer(inputs)) * 1e6 for _ in range(CALLS)]  # noqa: B023
    by_engine: dict[str, dict[str, dict[str, float]]] = {name: {} for name in engines}
    for (name, size), values in taken.items():
        p50, p99 = np.percentile(values, [50, 99])
        by_engine[name][str(size)] = {"p50": float(p50), "p99": float(p99), "calls": len(values)}
    return by_engine


def seconds(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def device_free() -> int | None:
    """Free bytes of the device; None without one."""
    from edge_runtime.engines.cuda import why_no_device

    if why_no_device():
        return None
    from cuda.bindings import runtime

    error, free, _ = runtime.cudaMemGetInfo()
    return None if int(error) else int(free)


def host_mb() -> float:
    """Resident memory of this process, in MB (Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return float("nan")
    import resource

    return pages * resource.getpagesize() / 1e6


def printed(report: Report, title: str) -> str:
    lines = [title]
    for name, found in report.engines.items():
        us, memory = found["us"], "" if found["device_mb"] is None else f", device {found['device_mb']:.0f} MB"
        built = "was built before" if found["built_before"] else f"built in {found['prepare_s']:.1f} s"
        lines.append(f"{name} ({found['provider']}): {built}, loaded in {found['load_s']:.2f} s, host {found['host_mb']:.0f} MB{memory}")
        if same := found.get("parity"):
            lines.append(
                f"    {'agrees' if same['ok'] else 'DIFFERS'} on {same['samples']} samples: {same['answers']} other answers,"
                f" {same['decisions']} other decisions ({same['decisions_away_from_epsilon']} away from ε),"
                f" logits within {same['logits_error']:.1e}, score within {same['score_error']:.1e}"
            )
        lines.append("    " + "   ".join(f"batch {size}: p50 {us[size]['p50']:.0f} µs, p99 {us[size]['p99']:.0f} µs" for size in us))
    lines += [f"{name}: skipped: {reason}" for name, reason in report.skipped.items()]
    lines += [f"{name}: FAILED: {reason}" for name, reason in report.failed.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--engine", action="append", choices=[name for name in BACKENDS if name != CPU], help="default: all")
    parser.add_argument("--precision", default="fp32", choices=list(NEAR))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    try:
        bundle = load_bundle(asked.bundle)
        report = check(bundle, asked.precision, chosen(asked.engine or [name for name in BACKENDS if name != CPU]), asked.repeats)
    except KcmError as error:
        print(json.dumps({"error": error.message, "fix": error.fix}) if asked.json else f"error: {error}", file=sys.stderr)
        return error.exit_code
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    code, date = report.exit_code(), time.strftime("%Y-%m-%d")
    if asked.json:
        head = {"schema": 1, "date": date, "machine": machine, "bundle": bundle.manifest.bundle_id, "precision": asked.precision}
        print(json.dumps({**head, **vars(report), "exit_code": code}))
    else:
        print(printed(report, f"{machine}, {date}, bundle {bundle.manifest.bundle_id[:12]}, {asked.precision}"))
    return code


if __name__ == "__main__":
    sys.exit(main())
