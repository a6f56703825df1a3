"""The folders are the architecture: imports point one way, and what is installed is what is here."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("kcm", "training", "export", "edge_runtime", "cloud_server")
DEVICE = ("edge_runtime.daemon", "edge_runtime.runtime", "edge_runtime.cli", "kcm.preprocess", "kcm.bundle", "kcm.rpc", "kcm.database")
NOT_ON_A_DEVICE = ("torch", "transformers", "onnx", "sklearn", "scipy", "pyarrow", "safetensors", "training", "export", "cloud_server")


def test_imports_point_one_way() -> None:
    """The contracts of pyproject.toml; they see imports inside functions too."""
    done = subprocess.run([str(Path(sys.executable).with_name("lint-imports")), "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", DEVICE)
def test_a_device_loads_nothing_that_only_training_needs(module: str) -> None:
    """What is really loaded, third parties' imports included."""
    program = f"import sys, {module}; print([m for m in sys.argv[1:] if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program, *NOT_ON_A_DEVICE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ["kcm", "edge_runtime"])
def test_what_a_device_runs_is_python_3_10(package: str) -> None:
    """JetPack 6 has 3.10; the trainer's own verbs in kcm/app are held to the same grammar."""
    for path in sorted((ROOT / package).rglob("*.py")):
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))


def test_no_module_does_its_work_on_import() -> None:
    """No prints, and no name that says nothing."""
    for path in modules():
        assert path.stem not in {"utils", "common", "helpers", "manager", "misc"}, path
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), path


def test_every_verb_can_be_loaded() -> None:
    found = {entry.name: entry for entry in entry_points(group="kcm.verbs")}
    assert {"demo", "train", "calibrate", "export", "verify", "edge", "cloud", "distill", "simulate", "fetch", "init"} <= set(found)
    for entry in found.values():
        assert callable(entry.load()), entry.name


@pytest.mark.slow
def test_a_wheel_holds_the_packages_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install hatchling")
    program = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True)
    import zipfile

    names = zipfile.ZipFile(tmp_path / done.stdout.split()[-1]).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {*PACKAGES, "protos"}
    assert not [name for name in names if "test" in name or name.endswith((".pyc", ".npz"))]
    assert "protos/kcm/v1/edge_pb2.py" in names
