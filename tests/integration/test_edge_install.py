"""A device's environment: base plus the edge and cpu extras runs the daemon, and nothing of PyTorch is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from edge_kit import make_bundle, request, running, stub

from kcm.config import read_toml
from kcm.sample import Route, Source

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a fresh environment with kcm[edge,cpu] from this checkout; skips where no package index answers."""
    folder = tmp_path_factory.mktemp("device")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".venv*", ".git", "runs", ".*cache"))
    constraint = ROOT / ("constraints.txt" if sys.version_info >= (3, 11) else "constraints-edge-py310.txt")
    environment = {key: value for key, value in os.environ.items() if key != "PIP_CONSTRAINT"}
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraint), f"{source}[edge,cpu]"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "No matching distribution" in done.stderr + done.stdout:
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return python


@pytest.mark.slow
def test_a_device_runs_the_daemon_without_torch(device: Path, tmp_path: Path) -> None:
    for absent in ("torch", "transformers", "onnx", "scipy", "pyarrow"):
        assert subprocess.run([str(device), "-c", f"import {absent}"], capture_output=True, check=False).returncode != 0, absent
    bundle = make_bundle(tmp_path / "bundle", ngrams=True)
    command = [str(device.parent / "kcm"), "edge", "--bundle", str(bundle), "--listen", "127.0.0.1:0", "--state", str(tmp_path / "state")]
    with running([*command, "--json"], tmp_path / "edge.log") as process:
        edge, channel = stub(process.address)
        with channel:
            reply = edge.Infer(request("the alpha case", "who can say this", route=int(Route.LOCAL)), timeout=10)
    assert [answer.source for answer in reply.answers] == [int(Source.LOCAL)] * 2
    assert reply.answers[0].label == "alpha"


@pytest.mark.slow
def test_a_training_verb_on_a_device_names_the_extra(device: Path, tmp_path: Path) -> None:
    (tmp_path / "task.toml").write_text('[task]\nid = "t"\nlabels = ["a", "b"]\n')
    done = subprocess.run([str(device.parent / "kcm"), "train", "--task", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert "pip install 'kcm[train]'" in done.stderr


def test_the_edge_extra_leaves_the_runtime_to_the_device() -> None:
    extras = read_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    assert not [need for need in extras["edge"] if need.startswith("onnxruntime")]
    assert {need.split("[")[0].split(">")[0] for need in extras["cpu"]} == {"onnxruntime"}
    assert {need.split("[")[0] for need in extras["gpu"]} == {"onnxruntime-gpu"}
