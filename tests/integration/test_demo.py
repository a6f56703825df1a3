"""`kcm demo` as a user runs it, on a tiny task: real processes, a real swap, a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kcm.assets import cache_dir

KCM = [sys.executable, "-m", "kcm.app"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (cache_dir() / "models" / "minilm").is_dir(), reason="MiniLM is not fetched: kcm fetch minilm"),
]


def test_the_demo_learns_swaps_and_reports(tiny_task: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [*KCM, "demo", "--task", str(tiny_task), "--out", str(out), "--stream", "300", "--test", "120", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["degraded"] == 0
    for row in ("small", "large", "before", "after"):
        low, high = result[row]["accuracy_interval"]
        assert low <= result[row]["accuracy"] <= high
        assert 0 < result[row]["p50_ms"] <= result[row]["p99_ms"]
    assert (result["small"]["cloud_calls"], result["large"]["cloud_calls"]) == (0, 120)
    learnt = result["learnt_from"]
    # A tenth is never distilled, but for chance all the rest is.
    assert 0.75 * learnt["answered_by_cloud"] < learnt["rows_distilled"] < learnt["answered_by_cloud"]
    assert result["after"]["cloud_calls"] <= result["before"]["cloud_calls"]

    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http://" not in page and "https://" not in page  # self-contained
    rounds = [json.loads((out / "bundles" / name / "manifest.json").read_text()) for name in ("round-0", "round-1")]
    assert [manifest["round"] for manifest in rounds] == [0, 1]
    assert rounds[1]["parent"] == rounds[0]["bundle_id"]
    assert json.loads((out / "edge" / "bundles" / "state.json").read_text())["current"] == rounds[1]["bundle_id"]
    assert not [line for line in (out / "edge.log").read_text().splitlines() if json.loads(line)["level"] == "error"]


def test_a_second_demo_does_not_overwrite_the_first(tiny_task: Path, tmp_path: Path) -> None:
    (tmp_path / "edge").mkdir()
    done = subprocess.run([*KCM, "demo", "--task", str(tiny_task), "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "earlier demo" in done.stderr
