"""`kcm doctor` says what runs here, what was asked for, and why the rest is skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import edge_kit

from edge_runtime.engines.chain import BACKENDS
from edge_runtime.engines.plans import PlanCache, PlanKey


def test_every_engine_is_listed_with_the_reason_that_keeps_it_from_running(kcm: Any) -> None:
    report = json.loads(kcm("doctor", "--json")[1])
    engines = {at["name"]: at["reason"] for at in report["engines"]}
    assert engines.keys() == BACKENDS.keys() and engines["onnx-cpu"] == ""
    assert all(reason for name, reason in engines.items() if "cpu" not in name), "a GPU here? then this test wants others"
    assert report["extras"]["cpu"]["onnxruntime"] and report["problems"] == []
    text = kcm("doctor")[1]
    assert "onnx-cpu      can run here" in text and engines["tensorrt-rtx"] in text


def test_a_bundle_is_loaded_as_the_edge_would(kcm: Any, tmp_path: Path) -> None:
    bundle = edge_kit.make_bundle(tmp_path / "b")
    assert "requested auto, CPUExecutionProvider runs it" in kcm("doctor", "--bundle", bundle)[1]
    code, out, _ = kcm("doctor", "--bundle", bundle, "--engine", "onnx-cuda", "--json")
    assert code == 10 and "CUDAExecutionProvider" in json.loads(out)["message"]
    (bundle / "models" / "fp32.onnx").write_bytes(b"damaged")
    assert kcm("doctor", "--bundle", bundle)[0] == 5


def test_a_build_that_failed_is_shown_with_how_to_try_it_again(kcm: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("KCM_CACHE", str(tmp_path))
    assert json.loads(kcm("doctor", "--json")[1])["failed_builds"] == []
    key = PlanKey(
        model="ab" * 32, flavour="tensorrt", version="10.3.0", target="sm87 Orin", flags=(), inputs={"ids": 1}, max_batch=1, workspace_mb=1
    )
    PlanCache().note_failure(key, "the builder was killed by SIGSEGV")
    (at,) = json.loads(kcm("doctor", "--json")[1])["failed_builds"]
    assert (at["engine"], at["version"], at["target"], at["model"]) == ("tensorrt", "10.3.0", "sm87 Orin", "ab" * 32)
    assert at["reason"] == "the builder was killed by SIGSEGV" and Path(at["file"]).is_file()
    text = kcm("doctor")[1]
    assert "failed build, not tried again: tensorrt 10.3.0 for sm87 Orin, model abababababab" in text and "killed by SIGSEGV" in text
    assert f"rm {at['file']}" in text
    Path(at["file"]).unlink()
    assert "failed build" not in kcm("doctor")[1]
    PlanCache().folder.chmod(0o777)
    assert kcm("doctor")[0] == 0


def test_a_misspelt_engine_is_refused_with_the_known_ones(kcm: Any) -> None:
    code, _, err = kcm("doctor", "--engine", "tensort")
    assert code == 3 and "'tensort' is unknown" in err and "onnx-cpu" in err
    assert [at["name"] for at in json.loads(kcm("doctor", "--engine", "onnx-cpu,onnx-cuda", "--json")[1])["engines"]] == [
        "onnx-cpu",
        "onnx-cuda",
    ]
    assert kcm("doctor", "--precision", "int8")[0] == 3
