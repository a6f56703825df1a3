"""`kcm export --engine`: what it builds, and what it refuses before the work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_runtime.engines.cuda import why_no_device

Kcm = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCM_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_every_precision_is_built_for_every_target_and_kept_in_the_cache(kcm: Kcm, tiny_run_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs kcm[tensorrt-rtx]")
    flags = ("--engine", "tensorrt-rtx", "--target", "sm86", "--target", "sm120", "--precision", "all", "--json")
    code, out, err = kcm("export", tiny_run_dir, "--out", tmp_path / "b", *flags)
    assert code == 0, err
    engines = json.loads(out)["engines"]
    assert {(at["precision"], at["target"]) for at in engines} == {(p, t) for p in ("fp32", "fp16", "int8") for t in ("sm86", "sm120")}
    assert all(at["bytes"] > 0 and at["executed"] is False for at in engines)
    assert len(list((tmp_path / "cache" / "engines").glob("*.plan"))) == 6
    assert not list((tmp_path / "b").rglob("*.plan")), "an engine is no part of a bundle"


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--engine", "onnx-cuda"), 3, "can't be built"),
        (("--target", "sm89"), 3, "--target goes with an engine"),
        (("--engine", "tensorrt", "--target", "sm89"), 3, "--target is TensorRT-RTX's"),
        (("--engine", "tensorrt-rtx", "--target", "sm87"), 3, "no target 'sm87'"),
        (("--engine", "tensorrt-rtx", "--target", "BAD"), 3, "one of sm75, sm80, sm86, sm89, sm120"),
        (("--precision", "fp8"), 3, "precision 'fp8' is unknown"),
    ],
)
def test_what_can_not_be_built_is_said_before_the_export(
    kcm: Kcm, tiny_run_dir: Path, tmp_path: Path, flags: tuple[str, ...], code: int, message: str
) -> None:
    if "tensorrt-rtx" in flags:
        pytest.importorskip("tensorrt_rtx", reason="needs kcm[tensorrt-rtx]")
    got, _, err = kcm("export", tiny_run_dir, "--out", tmp_path / "b", *flags)
    assert (got, not (tmp_path / "b").exists()) == (code, True) and message in err


@pytest.mark.skipif(not why_no_device(), reason="this machine has a GPU")
def test_without_a_gpu_it_names_the_way_that_is_left(kcm: Kcm, tiny_run_dir: Path, tmp_path: Path) -> None:
    code, _, err = kcm("export", tiny_run_dir, "--out", tmp_path / "b", "--engine", "tensorrt-rtx")
    assert code == 10 and "--target sm89" in err
    code, _, err = kcm("export", tiny_run_dir, "--out", tmp_path / "b", "--engine", "tensorrt")
    assert code == 10 and "run kcm edge on the device" in err


@pytest.mark.parametrize(("precision", "then"), [("fp32", "kcm edge --bundle"), ("fp32,int8", "kcm verify")])
def test_one_next_step_is_named(kcm: Kcm, tiny_run_dir: Path, tmp_path: Path, precision: str, then: str) -> None:
    code, out, err = kcm("export", tiny_run_dir, "--out", tmp_path / "b", "--precision", precision)
    assert code == 0, err
    assert out.count("next: ") == 1 and f"next: {then}" in out
