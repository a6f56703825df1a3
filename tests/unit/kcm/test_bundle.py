"""A bundle is read whole and true, or refused."""

import json
import os
from pathlib import Path

import msgspec
import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kcm.bundle import SCHEMA, GraphSpec, load_bundle, write_manifest
from kcm.calibration import Calibration
from kcm.errors import BundleError
from kcm.task import Task


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small whole bundle; load_bundle checks files, not that the graph runs."""
    task = Task(id="t", labels=("a", "b"))
    folder = tmp_path / "bundle"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "fp32.onnx").write_bytes(b"graph")
    (folder / "task.toml").write_text(tomli_w.dumps(task.shipped()))
    calibration = {"fp32": Calibration(epsilon=0.5, calibration_id="c", method="fixed")}
    (folder / "calibration.json").write_bytes(msgspec.json.encode(calibration))
    write_manifest(folder, task=task, graph=GraphSpec(inputs={"ids": 1}, candidates=2), version="0")
    return folder


def test_a_whole_bundle_loads(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert bundle.model("fp32") == b"graph"
    assert bundle.calibration["fp32"].epsilon == 0.5
    with pytest.raises(BundleError, match="no int8"):
        bundle.model("int8")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_changed_byte_is_accepted(folder: Path, data: st.DataObject) -> None:
    whole = load_bundle(folder)
    path = data.draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p.is_file())))
    before = path.read_bytes()
    place = data.draw(st.integers(0, len(before) - 1))
    change = data.draw(st.integers(1, 255))
    path.write_bytes(before[:place] + bytes([before[place] ^ change]) + before[place + 1 :])
    try:
        changed = load_bundle(folder)
    except BundleError:
        return
    finally:
        path.write_bytes(before)
    # Only what says nothing may differ: white space in the manifest, and `created`, which is outside the id.
    assert path.name == "manifest.json"
    assert msgspec.structs.replace(changed.manifest, created="") == msgspec.structs.replace(whole.manifest, created="")
    assert changed.files == whole.files


@pytest.mark.parametrize("keep", [0, 1, 4])
def test_a_truncated_file_is_refused(folder: Path, keep: int) -> None:
    (folder / "models" / "fp32.onnx").write_bytes(b"graph"[:keep])
    with pytest.raises(BundleError, match="bytes"):
        load_bundle(folder)


def test_missing_stray_and_linked_files_are_refused(folder: Path, tmp_path: Path) -> None:
    stray = folder / "models" / "evil.so"
    stray.write_bytes(b"x")
    with pytest.raises(BundleError, match=r"evil\.so"):
        load_bundle(folder)
    stray.unlink()

    model = folder / "models" / "fp32.onnx"
    outside = tmp_path / "outside"
    outside.write_bytes(model.read_bytes())
    model.unlink()
    with pytest.raises(BundleError, match="can't be read"):
        load_bundle(folder)
    model.symlink_to(outside)
    with pytest.raises(BundleError):
        load_bundle(folder)
    model.unlink()
    os.link(outside, model)
    with pytest.raises(BundleError, match="link"):
        load_bundle(folder)


def test_a_manifest_cannot_reach_outside(folder: Path) -> None:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("models/fp32.onnx", "../fp32.onnx"))
    with pytest.raises(BundleError):
        load_bundle(folder)


@pytest.mark.parametrize(("schema", "fix"), [(SCHEMA - 1, "export it again with this kcm"), (SCHEMA + 1, "upgrade kcm on this device")])
def test_a_manifest_of_another_schema_says_so_whatever_its_fields_are(folder: Path, schema: int, fix: str) -> None:
    manifest = folder / "manifest.json"
    old = {**json.loads(manifest.read_text()), "schema": schema, "graph": {"inputs": ["ids", "weights"], "max_length": 600}}
    manifest.write_text(json.dumps(old))
    with pytest.raises(BundleError, match=f"has bundle schema {schema}, this kcm reads {SCHEMA}") as caught:
        load_bundle(folder)
    assert caught.value.fix == fix


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        load_bundle(tmp_path)
