"""A bundle from a run: whole, repeatable, verified, and refused where it was changed."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny_kit import LABELS, sentences

from edge_runtime import EdgeRuntime
from export.bundle import GOLDEN, export_bundle, model_card
from export.verify import Report, verify
from kcm.app.export import export_run
from kcm.bundle import GraphSpec, load_bundle, write_manifest
from kcm.calibration import Guarantee
from kcm.errors import BundleError, ConfigError, VerifyError
from kcm.sample import Sample, Source
from kcm.task import load_task
from training.ngrams import NgramModel
from training.run import Run, save_run
from training.small import Ngrams

TEXTS = [text for text, _ in sentences(60, seed=77)]


@pytest.fixture
def copy(bundle_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle_dir, tmp_path / "copy")


def checked(run: Run, folder: Path) -> Report:
    return verify(run, Ngrams(run.task, None), load_bundle(folder), TEXTS)


def resealed(folder: Path) -> Path:
    """Hashes that are right again: what somebody with the folder could do."""
    bundle = msgspec.json.decode((folder / "manifest.json").read_bytes())
    write_manifest(folder, task=load_task(folder), graph=msgspec.convert(bundle["graph"], GraphSpec), version=bundle["kcm_version"])
    return folder


def change_graph(folder: Path, initializer: int, factor: float) -> Path:
    """Multiply one float constant of the fused graph."""
    path = folder / "models" / "fp32.onnx"
    model = onnx.load_model_from_string(path.read_bytes())
    floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 3]
    tensor = sorted(floats, key=lambda t: -np.prod(t.dims))[initializer]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    path.write_bytes(model.SerializeToString())
    return resealed(folder)


def test_torch_and_the_bundle_agree(tiny_run: Run, bundle_dir: Path) -> None:
    report = checked(tiny_run, bundle_dir)
    assert report.samples == 60 and report.labels == 0 and report.decisions == report.excused
    assert report.logits_error < 1e-5 and report.confidence_error < 1e-3


def test_the_device_answers_as_the_run_does(tiny_run: Run, bundle_dir: Path) -> None:
    kind = Ngrams(tiny_run.task, None)
    predictions = kind.predict(tiny_run.small, kind.featurise(TEXTS))
    confidence = tiny_run.judge.confidence(predictions)
    answers = EdgeRuntime.load(bundle_dir).infer([Sample(payload=text) for text in TEXTS])
    assert [a.label for a in answers] == [LABELS[i] for i in predictions.logits.argmax(1)]
    assert [a.confidence for a in answers] == pytest.approx(confidence.tolist(), abs=1e-3)
    away = np.abs(confidence - tiny_run.threshold.epsilon) > 1e-3
    local = np.array([a.source is Source.LOCAL for a in answers])
    assert np.array_equal(local[away], (confidence > tiny_run.threshold.epsilon)[away])
    assert 0 < local.sum() < 60


@pytest.mark.parametrize("factor", [1.01, 0.99, -1.0])
def test_a_changed_table_is_caught_by_verify_and_by_the_device(tiny_run: Run, copy: Path, factor: float) -> None:
    change_graph(copy, 0, factor)
    with pytest.raises(VerifyError, match="logits differ"):
        checked(tiny_run, copy)
    with pytest.raises(BundleError, match="golden input"):
        EdgeRuntime.load(copy)


def test_a_changed_judge_is_caught_by_verify_and_by_the_device(tiny_run: Run, copy: Path) -> None:
    model = onnx.load_model_from_string((copy / "models" / "fp32.onnx").read_bytes())
    floats = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 3]
    last_gemm = next(node for node in reversed(model.graph.node) if node.op_type == "Gemm")
    order = sorted(floats, key=lambda t: -np.prod(t.dims))
    change_graph(copy, next(i for i, t in enumerate(order) if t.name == last_gemm.input[1]), 1.5)
    with pytest.raises(VerifyError, match="C_x differs") as error:
        checked(tiny_run, copy)
    assert "logits differ" not in error.value.message
    with pytest.raises(BundleError, match="confidence differ"):
        EdgeRuntime.load(copy)


def test_a_graph_that_gives_nan_is_caught(tiny_run: Run, copy: Path) -> None:
    """NaN compares as neither above nor below the bar."""
    change_graph(copy, 0, float("nan"))
    with pytest.raises(VerifyError, match="logits differ"):
        checked(tiny_run, copy)


def test_another_runs_bundle_is_refused(tiny_run: Run, bundle_dir: Path) -> None:
    task = msgspec.structs.replace(tiny_run.task, labels=LABELS[::-1])
    other = replace(tiny_run, info=msgspec.structs.replace(tiny_run.info, task=task))
    with pytest.raises(VerifyError, match="other labels"):
        checked(other, bundle_dir)


def test_one_run_gives_one_bundle_id(tiny_run: Run, bundle_dir: Path, tmp_path: Path) -> None:
    first = load_bundle(bundle_dir).manifest
    again = export_bundle(tiny_run, tmp_path / "again", golden_payloads=tiny_run.payloads)
    assert again.bundle_id == first.bundle_id and again.files == first.files
    moved = replace(tiny_run, threshold=msgspec.structs.replace(tiny_run.threshold, epsilon=0.5))
    assert export_bundle(moved, tmp_path / "moved", golden_payloads=tiny_run.payloads).bundle_id != first.bundle_id


def test_a_bundle_is_never_overwritten_by_accident(tiny_run_dir: Path, copy: Path) -> None:
    before = load_bundle(copy).manifest.bundle_id
    with pytest.raises(ConfigError, match="exists") as error:
        export_run(tiny_run_dir, copy, force=False)
    assert "--force" in error.value.fix
    assert load_bundle(copy).manifest.bundle_id == before
    assert export_run(tiny_run_dir, copy, force=True).bundle_id == load_bundle(copy).manifest.bundle_id
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


def test_force_replaces_bundles_and_nothing_else(tiny_run_dir: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_text("precious")
    for out in (photos, tiny_run_dir, photos / "a.jpg"):
        with pytest.raises(ConfigError, match=r"not replaced|is a file"):
            export_run(tiny_run_dir, out, force=True)
    assert (photos / "a.jpg").read_text() == "precious"
    assert (tiny_run_dir / "run.json").exists()


def test_an_export_that_fails_leaves_the_old_bundle(tiny_run: Run, copy: Path, tmp_path: Path) -> None:
    before = load_bundle(copy).manifest.bundle_id
    weight = tiny_run.judge.layers[0].norm.running_var  # type: ignore[union-attr]
    weight[0] = float("nan")  # type: ignore[index]
    save_run(tmp_path / "broken", tiny_run)
    with pytest.raises(VerifyError):
        export_run(tmp_path / "broken", copy, force=True)
    assert load_bundle(copy).manifest.bundle_id == before
    assert not [p.name for p in copy.parent.iterdir() if p.name.startswith(".")]


def test_the_model_card_says_what_it_is(tiny_run: Run, bundle_dir: Path) -> None:
    card = (bundle_dir / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert card.startswith("# tiny, round 0\n")
    for said in (
        "6 labels",
        "`ngrams`",
        "`kan`",
        "72 labelled samples",
        "by cloud-rate",
        f"ε = {tiny_run.threshold.epsilon:.4f}",
        "in the clear",
    ):
        assert said in card
    assert "30.6% cloud calls on 72" in card


def test_nothing_in_a_bundle_names_the_machine_that_trained(bundle_dir: Path, tiny_task: Path) -> None:
    for path in bundle_dir.rglob("*"):
        if path.is_file():
            assert str(tiny_task.parent).encode() not in path.read_bytes(), path.name


def test_golden_holds_some_training_texts_and_their_answers(tiny_run: Run, bundle_dir: Path) -> None:
    with np.load(io.BytesIO(load_bundle(bundle_dir).files["golden.npz"]), allow_pickle=False) as stored:
        golden = dict(stored)
    data, offsets = golden["text"].tobytes(), golden["offsets"]
    texts = [data[a:b].decode() for a, b in pairwise(offsets.tolist())]
    assert texts == tiny_run.payloads[:GOLDEN]
    kind = Ngrams(tiny_run.task, None)
    predictions = kind.predict(tiny_run.small, kind.featurise(texts))
    assert golden["logits"] == pytest.approx(predictions.logits, abs=1e-3)
    assert golden["confidence"] == pytest.approx(tiny_run.judge.confidence(predictions), abs=1e-3)
    assert golden["top_ids"][:, 0].tolist() == predictions.logits.argmax(1).tolist()
    encoded = [kind.preprocessor.encode(text) for text in texts]
    assert golden["input_sums"].tolist() == [int(row.ids.sum(dtype=np.int64) + 2 * row.words.sum(dtype=np.int64)) for row in encoded]


@pytest.mark.parametrize(("name", "change"), [("logits", 0.5), ("confidence", 0.01), ("score", 0.01), ("input_sums", 1), ("top_ids", 1)])
def test_a_changed_golden_file_is_refused_by_the_device(copy: Path, name: str, change: float) -> None:
    with np.load(copy / "golden.npz", allow_pickle=False) as stored:
        golden = dict(stored)
    golden[name][0] += np.array(change, golden[name].dtype)
    if name == "top_ids":
        golden[name] %= len(LABELS)
    np.savez(copy / "golden.npz", **golden)
    with pytest.raises(BundleError, match=r"doesn't match its hash|bytes"):
        EdgeRuntime.load(copy)
    with pytest.raises(BundleError, match="golden input 0"):
        EdgeRuntime.load(resealed(copy))


def test_a_calibration_is_of_this_graph_and_this_task(tiny_run: Run, bundle_dir: Path, tmp_path: Path) -> None:
    stored = json.loads((bundle_dir / "calibration.json").read_text())["fp32"]
    assert stored["epsilon"] == tiny_run.threshold.epsilon and stored["method"] == "cloud-rate" and stored["target"] == 0.3
    assert re.fullmatch("[0-9a-f]{16}", stored["calibration_id"])
    info = msgspec.structs.replace(tiny_run.info, teacher_id="another")
    prompt = msgspec.structs.replace(tiny_run.task, prompt=msgspec.structs.replace(tiny_run.task.prompt, label="{label}!"))
    changed = {
        "teacher": replace(tiny_run, info=info),
        "prompt": replace(tiny_run, info=msgspec.structs.replace(tiny_run.info, task=prompt)),
        "graph": replace(tiny_run, small=_twice(tiny_run)),
    }
    ids = {stored["calibration_id"]}
    for name, run in changed.items():
        export_bundle(run, tmp_path / name, golden_payloads=TEXTS[:2])
        ids.add(json.loads((tmp_path / name / "calibration.json").read_text())["fp32"]["calibration_id"])
    assert len(ids) == 4


def _twice(run: Run) -> object:
    arrays = {name: tensor.numpy().copy() for name, tensor in run.small.state_dict().items()}
    arrays["table"] *= 2
    return NgramModel(arrays)


INPUTS = {"ids": 8000, "weights": 8000, "words": 400, "word_weights": 400}


def test_the_manifest_lists_what_is_there(bundle_dir: Path) -> None:
    manifest = load_bundle(bundle_dir).manifest
    assert set(manifest.files) == {"MODEL_CARD.md", "calibration.json", "golden.npz", "metrics.json", "models/fp32.onnx", "task.toml"}
    assert manifest.files["task.toml"].sha256 == hashlib.sha256((bundle_dir / "task.toml").read_bytes()).hexdigest()
    assert (manifest.graph.inputs, manifest.graph.candidates, manifest.precisions) == (INPUTS, 5, ("fp32",))


def test_a_bundle_that_can_not_be_made_is_an_error_and_no_crash(tiny_run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "b", Path("/proc/kcm/b")):
        with pytest.raises(ConfigError, match="can't be made") as error:
            export_bundle(tiny_run, out, golden_payloads=TEXTS)
        assert "folder that you may write" in error.value.fix
    assert (tmp_path / "file").read_text() == "mine"


def test_the_card_says_a_high_confidence_in_full(tiny_run: Run) -> None:
    promise = Guarantee(max_drop=0.005, confidence=0.9999, upper=0.004, effective_n=9000.0, method="m")
    threshold = msgspec.structs.replace(tiny_run.threshold, guarantee=promise, teacher_id="t")
    said = model_card(replace(tiny_run, threshold=threshold), {"fp32": 1}, {})
    assert "promise: at most 0.5 points below the large model `t` with 99.99% confidence" in said
