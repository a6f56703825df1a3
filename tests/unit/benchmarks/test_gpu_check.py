"""What `benchmarks/gpu_check.py` does without a GPU, and that it measures and judges what it says."""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import runtime
from tensorrt_kit import Gpu, fake_gpu
from vision_kit import fixed_bundle

from benchmarks import gpu_check
from edge_runtime.engines.chain import BACKENDS
from edge_runtime.engines.cuda import why_no_device
from edge_runtime.engines.onnx import OrtBackend, OrtEngine
from edge_runtime.engines.protocol import Outputs
from edge_runtime.golden import golden_payloads
from kcm.bundle import load_bundle
from kcm.preprocess import Inputs, load_preprocessor

without_gpu = pytest.mark.skipif(not why_no_device(), reason="this machine has a GPU")


class StandIn(OrtBackend):
    """Another engine on this CPU: what a GPU would be, bar its speed."""

    def probe(self) -> str:
        return ""


class Broken(StandIn):
    """Its candidates come in reverse."""

    def load(self, *arguments: Any) -> OrtEngine:
        engine = super().load(*arguments)
        run = engine.infer
        engine.infer = lambda inputs: run(inputs)._replace(top_ids=run(inputs).top_ids[:, ::-1])  # type: ignore[method-assign]
        return engine


class BrokenWhenLarge(StandIn):
    """Its answers are wrong in batches larger than any that the golden check runs."""

    def load(self, *arguments: Any) -> OrtEngine:
        engine = super().load(*arguments)
        run = engine.infer

        def infer(inputs: Inputs) -> Outputs:
            outputs = run(inputs)
            return outputs._replace(score=1 - outputs.score) if len(outputs.score) > 24 else outputs

        engine.infer = infer  # type: ignore[method-assign]
        return engine


@without_gpu
def test_without_a_gpu_every_engine_says_why_and_nothing_crashes(bundle_dir: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--bundle", str(bundle_dir), "--json"]
    done = subprocess.run(command, cwd=Path(gpu_check.__file__).parents[1], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (10, "")
    said = json.loads(done.stdout)
    assert set(BACKENDS) - {"onnx-cpu"} <= set(said["skipped"]) and all(said["skipped"].values())
    assert (said["engines"], said["failed"], said["exit_code"]) == ({}, {}, 10)


@without_gpu
def test_one_engine_by_name_says_why(bundle_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--bundle", str(bundle_dir), "--engine", "onnx-cuda"]) == 10
    assert "onnx-cuda: skipped: this onnxruntime has no CUDAExecutionProvider" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_bad_bundle_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    assert gpu_check.main(["--bundle", str(tmp_path), *flags]) == 5
    out, err = capsys.readouterr()
    assert out == "" and "manifest.json" in (json.loads(err)["error"] if flags else err)


def test_an_engine_that_agrees_is_measured(bundle_dir: Path) -> None:
    report = gpu_check.check(load_bundle(bundle_dir), "fp32", {"stand-in": StandIn("onnx-cpu")}, repeats=1)
    assert report.exit_code() == 0 and list(report.engines) == ["onnx-cpu", "stand-in"] and not report.failed
    found = report.engines["stand-in"]
    assert found["parity"] == {
        **dict.fromkeys(("answers", "decisions", "decisions_away_from_epsilon", "logits_error", "score_error"), 0),
        "samples": found["parity"]["samples"],
        "ok": True,
    }
    assert found["parity"]["samples"] > 200
    for engine in report.engines.values():
        assert list(engine["us"]) == ["1", "8", "32"] and all(0 < v["p50"] <= v["p99"] and v["calls"] == 50 for v in engine["us"].values())
    text = gpu_check.printed(report, "title")
    assert "stand-in (CPUExecutionProvider): was built before" in text and "agrees on" in text and "batch 32: p50" in text


def test_an_engine_that_answers_otherwise_fails(bundle_dir: Path) -> None:
    report = gpu_check.check(load_bundle(bundle_dir), "fp32", {"broken": Broken("onnx-cpu")}, repeats=1)
    assert report.exit_code() == 10 and "golden input" in report.failed["broken"]
    assert "broken: FAILED: golden input" in gpu_check.printed(report, "")


def test_what_the_golden_check_does_not_see_the_random_batches_do(bundle_dir: Path) -> None:
    report = gpu_check.check(load_bundle(bundle_dir), "fp32", {"broken": BrokenWhenLarge("onnx-cpu")}, repeats=1)
    found = report.engines["broken"]["parity"]
    assert report.exit_code() == 6 and not report.failed and found["decisions_away_from_epsilon"] > 0 and found["answers"] == 0
    assert "DIFFERS on" in gpu_check.printed(report, "")


def with_memory(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake device tells how much memory is free, as the real one would."""
    assert len(runtime.cudaMemGetInfo()) == 3

    def free() -> tuple[Any, int, int]:
        return runtime.cudaError_t.cudaSuccess, 10**9 - sum(gpu.cuda.allocated()["device"]), 10**9

    monkeypatch.setattr(gpu.cuda, "cudaMemGetInfo", free, raising=False)


@pytest.mark.parametrize("rtx", [False, True])
def test_tensorrt_is_measured_with_graphs_and_without(bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rtx: bool) -> None:
    """On a fake GPU, whose plans ONNX Runtime runs."""
    monkeypatch.setenv("KCM_CACHE", str(tmp_path))
    bundle, name = load_bundle(bundle_dir), "tensorrt-rtx" if rtx else "tensorrt"
    with fake_gpu(monkeypatch, tmp_path, rtx=rtx) as gpu:
        with_memory(gpu, monkeypatch)
        backends = gpu_check.chosen([name])
        assert list(backends) == [name, f"{name} with graphs"]
        gpu.put(backends[name]._key(bundle.model("fp32"), bundle.manifest.graph), bundle.model("fp32"))  # type: ignore[attr-defined]
        report = gpu_check.check(bundle, "fp32", backends, repeats=1)
        assert (report.failed, report.skipped, report.exit_code()) == ({}, {}, 0)
        assert list(report.engines) == ["onnx-cpu", *backends]
        assert report.engines[name]["device_mb"] > 0.01 and report.engines["onnx-cpu"]["device_mb"] == 0
        assert report.engines[name]["provider"].startswith(f"{name} ")
        assert gpu.cuda.calls["cudaGraphLaunch"] > 0 or rtx  # TensorRT-RTX launches its own
        gc.collect()
        assert gpu.live() == {}


@pytest.mark.skipif(bool(importlib.util.find_spec("tensorrt")), reason="TensorRT is installed")
def test_a_build_that_fails_is_one_engines_failure(bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCM_CACHE", str(tmp_path))
    with fake_gpu(monkeypatch, tmp_path) as gpu:
        with_memory(gpu, monkeypatch)
        report = gpu_check.check(
            load_bundle(bundle_dir), "fp32", {**gpu_check.chosen(["tensorrt"]), "other": StandIn("onnx-cpu")}, repeats=1
        )
    assert set(report.failed) == {"tensorrt", "tensorrt with graphs"} and report.exit_code() == 10
    assert list(report.engines) == ["onnx-cpu", "other"]


def outputs(scores: list[float], logits: list[list[float]], best: list[int]) -> list[Outputs]:
    ids = np.array(best, np.int64)[:, None]
    score = np.array(scores, np.float32)
    return [Outputs(np.array(logits, np.float32), ids, np.ones(ids.shape, np.float32), score, score)]


EXPECTED = outputs([0.9, 0.5004, 0.1], [[3, 0], [1, 1.0005], [0, 2]], [0, 1, 1])


@pytest.mark.parametrize(
    ("scores", "best", "found"),
    [
        ([0.9, 0.5004, 0.1], [0, 1, 1], (0, 0, 0, True)),
        ([0.9, 0.4996, 0.1], [0, 1, 1], (0, 1, 0, True)),  # near ε: excused
        ([0.9, 0.5004, 0.1], [0, 0, 1], (0, 0, 0, True)),  # a tie
        ([0.4, 0.5004, 0.1], [0, 1, 1], (0, 1, 1, False)),
        ([0.9, 0.5004, 0.1], [1, 1, 1], (1, 0, 0, False)),
        ([0.9, 0.5004, float("nan")], [0, 1, 1], (0, 0, 0, False)),
    ],
)
def test_parity_excuses_ties_and_what_lies_near_epsilon(scores: list[float], best: list[int], found: tuple[int, int, int, bool]) -> None:
    got = outputs(scores, EXPECTED[0].logits.tolist(), best)
    said = gpu_check.parity(got, EXPECTED, epsilon=0.5, near=1e-3)
    assert (said["answers"], said["decisions"], said["decisions_away_from_epsilon"], said["ok"]) == found


def test_the_random_batches_span_what_the_bundle_allows(bundle_dir: Path) -> None:
    bundle = load_bundle(bundle_dir)
    preprocessor, largest = load_preprocessor(bundle.task.preprocess, bundle.files), bundle.manifest.graph.max_batch
    batches = gpu_check.random_batches(preprocessor, list(golden_payloads(bundle.files["golden.npz"])), largest, seed=0)
    shapes = {next(iter(inputs.values())).shape for inputs in batches}
    assert {rows for rows, _ in shapes} >= {1, largest} and len({rows for rows, _ in shapes}) > 10
    assert min(length for _, length in shapes) == 1 and max(length for _, length in shapes) > 100


def test_a_bundle_of_images_is_checked_on_pixels(tmp_path: Path) -> None:
    bundle = load_bundle(fixed_bundle(tmp_path))
    report = gpu_check.check(bundle, "fp32", {"stand-in": StandIn("onnx-cpu")}, repeats=1)
    found = report.engines["stand-in"]
    assert report.exit_code() == 0 and found["parity"]["ok"] and found["parity"]["samples"] > 100
    assert set(found["us"]) == {"1", "8", "32"}
    report = gpu_check.check(bundle, "fp32", {"broken": BrokenWhenLarge("onnx-cpu")}, repeats=1)
    assert report.exit_code() == 6 and not report.failed


def test_random_pixels_reach_both_ends_and_move_the_answer(tmp_path: Path) -> None:
    bundle = load_bundle(fixed_bundle(tmp_path))
    preprocessor = load_preprocessor(bundle.task.preprocess, {})
    batches = gpu_check.random_batches(preprocessor, [], bundle.manifest.graph.max_batch, seed=0)
    images = np.concatenate([batch["image"] for batch in batches])
    assert images.dtype == np.uint8 and images.min() == 0 and images.max() == 255
    assert {1, bundle.manifest.graph.max_batch} <= {len(batch["image"]) for batch in batches}
    outputs = OrtBackend("onnx-cpu").load(bundle.model("fp32"), bundle.manifest.graph, 3).infer({"image": images})
    assert len(np.unique(outputs.top_ids[:, 0])) == 3
