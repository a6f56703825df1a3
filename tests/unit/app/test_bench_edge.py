"""`kcm bench edge` end to end on a tiny bundle: structure and sense, never how fast. And its reference graphs against torch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from vision_kit import fixed_bundle

from kcm.app.bench.figures import ALSO, IMAGE_ALSO, IMAGE_RATIOS, RATIOS

Kcm = Callable[..., tuple[int, str, str]]
SPREAD = {"median", "low", "high"}


@pytest.mark.slow
def test_one_repeat_fills_every_figure(kcm: Kcm, bundle_dir: Path, tmp_path: Path) -> None:
    code, out, err = kcm("bench", "edge", "--bundle", bundle_dir, "--repeats", 1, "--json", "--out", tmp_path / "out")
    assert code == 0 and err == ""
    said = json.loads(out)
    assert set(said["ratios"]) == set(RATIOS) and set(said["also"]) == set(ALSO)
    for group in ("ratios", "also", "spread", "figures"):
        for name, found in said[group].items():
            assert set(found) == SPREAD and all(math.isfinite(value) and value > 0 for value in found.values()), name
    assert all(said[name] == said["spread"][name]["median"] for name in ("rss_mb", "cold_start_s", "preprocess_us"))
    assert all(said[name] == said["figures"][name.replace("_us", "")]["median"] for name in ("preprocess_us", "preprocess_cold_us"))
    assert 20 < said["rss_mb"] < 2000, "MB, of a process that has imported ONNX Runtime"
    assert set(said["bars"]) == {*RATIOS, "rss_mb", "cold_start_s", "judge_nodes"}
    assert said["bundle"]["source"] == str(bundle_dir) and said["bundle"]["task_id"] == "tiny" and said["repeats"] == 1
    assert said["judge_nodes"]["kan"] <= 10, "the reference judge grew"
    assert json.loads((tmp_path / "out" / "edge.json").read_text()) == said

    code, out, _ = kcm("bench", "compare", tmp_path / "out", tmp_path / "out")
    assert code == 0 and "nothing is worse" in out


@pytest.mark.slow
def test_a_bundle_of_images_is_measured_on_pixels_and_files(kcm: Kcm, tmp_path: Path) -> None:
    code, out, err = kcm("bench", "edge", "--bundle", fixed_bundle(tmp_path), "--repeats", 1, "--json", "--out", tmp_path / "out")
    assert code == 0 and err == ""
    said = json.loads(out)
    assert set(said["ratios"]) == set(IMAGE_RATIOS) and set(said["also"]) == set(IMAGE_ALSO)
    assert not any("text" in name for name in (*said["ratios"], *said["also"], *said["figures"]))
    for group in ("ratios", "also", "spread", "figures"):
        for name, found in said[group].items():
            assert set(found) == SPREAD and all(math.isfinite(value) and value > 0 for value in found.values()), name
    figures = {name: found["median"] for name, found in said["figures"].items()}
    assert said["preprocess_us"] == figures["preprocess"] and said["preprocess_photo_us"] == figures["preprocess_photo"]
    assert figures["preprocess_photo"] > figures["preprocess"] > 0, "a JPEG of 640 × 480 takes scaling too"
    assert figures["photo_decision"] > figures["image_decision"] > figures["decision"]
    judged = {"decision_over_run", "judge_over_mlp_b1", "judge_over_mlp_b256", "effkan_over_judge_b1", "cold_start_s", "judge_nodes"}
    assert set(said["bars"]) == judged
    code, out, _ = kcm("bench", "compare", tmp_path / "out", tmp_path / "out")
    assert code == 0 and "image_decision_over_run" in out and "nothing is worse" in out


@pytest.mark.slow
def test_without_a_bundle_it_makes_one_and_says_so(kcm: Kcm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with nothing fetched."""
    monkeypatch.setenv("KCM_CACHE", str(tmp_path / "empty"))
    code, out, err = kcm("bench", "edge", "--repeats", 1)
    assert code == 0, err
    assert "(made-up sentences): task bench, 60 labels" in out and "repeat 1 of 1" in err
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert all(name in lines for name in RATIOS)
    assert all(line.split()[-1] in ("ok", "over", "under") for name, line in lines.items() if name in RATIOS)


def test_what_cannot_be_measured_is_refused_before_the_work(kcm: Kcm, bundle_dir: Path, tmp_path: Path) -> None:
    code, _, err = kcm("bench", "edge", "--bundle", tmp_path)
    assert code == 5 and "is not a bundle" in err
    (tmp_path / "edge.json").write_text("mine")
    code, _, err = kcm("bench", "edge", "--bundle", bundle_dir, "--out", tmp_path)
    assert code == 3 and "not replaced" in err and (tmp_path / "edge.json").read_text() == "mine"


def test_the_other_styles_layer_is_a_b_spline_layer() -> None:
    """Bases by recursion against scipy's, inside the grid and off it."""
    import torch
    from scipy.interpolate import BSpline

    from kcm.app.bench.judge_graphs import SplineLinear

    layer = SplineLinear(2, 3)
    x = np.linspace(-0.99, 0.99, 41, dtype=np.float32)
    with torch.no_grad():
        got = layer.bases(torch.from_numpy(np.stack([x, -x], 1))).numpy()
        off = layer.bases(torch.tensor([[-9.0, 9.0]])).numpy()
    knots = layer.knots[0].double().numpy()
    want = np.stack([BSpline(knots, np.eye(8)[i], 3)(x.astype(np.float64)) for i in range(8)], 1)
    np.testing.assert_allclose(got[:, 0], want, atol=1e-5)
    np.testing.assert_allclose(got[:, 1], want[::-1], atol=1e-5)
    assert not off.any()


@pytest.mark.slow
def test_the_reference_graphs_are_what_they_are_called() -> None:
    """The pinned graph computes its layers; the MLP has as many parameters; the other style's export computes its module."""
    import torch
    from onnx import numpy_helper

    from kcm.app.bench.judge_graphs import SIZES, exported, kan, layers_of, mlp, session, spline_network

    assert SIZES == (64, 32, 2)
    layers = layers_of(SIZES)
    x = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    with torch.no_grad():
        want = layers[1](layers[0](torch.from_numpy(x))).numpy()
    got = session(kan(layers)).run(None, {"x": x})[0]
    assert np.abs(got - want).max() < 1e-3 * np.abs(want).max()

    held = sum(numpy_helper.to_array(array).size for array in mlp(*SIZES).graph.initializer)
    edges = 64 * 32 + 32 * 2
    assert held == pytest.approx(9 * edges + 32 + 2, rel=0.01), "9 numbers an edge, a bias a node"

    network = spline_network(SIZES)
    x = np.tanh(x)  # on its grid
    with torch.no_grad():
        want = network(torch.from_numpy(x)).numpy()
    (got,) = session(exported(network, 64)).run(None, {"x": x})
    np.testing.assert_allclose(got, want, atol=1e-4, err_msg="five rows through a graph that was traced with three")


def test_the_clock_of_another_process_counts_its_work_and_not_its_sleep() -> None:
    from kcm.app.bench.clocks import cpu_seconds, rss_mb

    program = (
        "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass\nprint('done', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        worked = cpu_seconds(process.pid)
        assert worked > 0.3
        time.sleep(0.3)
        assert cpu_seconds(process.pid) - worked < 0.15
        assert 1 < rss_mb(process.pid) < 500
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
