"""fp16 and int8 beside fp32: what is counted, what fails, and what can't be told without labels; through the program, too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_export_bundle import resealed
from tiny_kit import LABELS, sentences, write_csv

from edge_runtime import EdgeRuntime
from export.agreement import LOSS, Agreement, Side, agreements, hold, table
from export.session import Session
from kcm.app.export import export_run, parse_precisions
from kcm.bundle import Precision, golden_name, load_bundle
from kcm.errors import BundleError, ConfigError, VerifyError
from kcm.preprocess import load_preprocessor
from kcm.sample import Sample, Source
from training.ngrams import NgramModel
from training.run import Run, load_run, save_run

Kcm = Callable[..., tuple[int, str, str]]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
ROWS = sentences(240, seed=93)
TEXTS = [text for text, _ in ROWS]
TRUTH = np.array([LABELS.index(label) for _, label in ROWS])


@pytest.fixture(scope="module")
def shared(tiny_run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """(run, bundle) of all precisions, under one folder; read only."""
    from export.bundle import export_bundle
    from kcm.app.samples import fresh_payloads

    folder = tmp_path_factory.mktemp("precisions")
    run = load_run(tiny_run_dir)
    shutil.copytree(tiny_run_dir, folder / "run")
    export_bundle(run, folder / "bundle", golden_payloads=run.payloads, precisions=PRECISIONS, fresh_payloads=fresh_payloads(run))
    return folder


@pytest.fixture
def copy(shared: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shared / "bundle", tmp_path / "copy")


def broken(folder: Path, precision: Precision, factor: float) -> Path:
    """Every row of the precision's table scaled: other logits, hence other scores."""
    path = folder / "models" / f"{precision}.onnx"
    model = onnx.load_model_from_string(path.read_bytes())
    tables = [t for t in model.graph.initializer if t.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT) and len(t.dims) < 3]
    kinds = {"fp16": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.FLOAT}
    tensor = max((t for t in tables if t.data_type == kinds[precision]), key=lambda t: np.prod(t.dims))
    values = numpy_helper.to_array(tensor)
    noise = np.random.default_rng(0).permutation(len(values)) if factor == 0 else np.arange(len(values))
    tensor.CopyFrom(numpy_helper.from_array((values * (factor or 1))[noise].astype(values.dtype), tensor.name))
    path.write_bytes(model.SerializeToString())
    return resealed(folder)


def test_each_precision_is_there_with_its_own_epsilon_and_golden_outputs(shared: Path) -> None:
    bundle = load_bundle(shared / "bundle")
    assert bundle.manifest.precisions == PRECISIONS
    assert len({bundle.calibration[p].calibration_id for p in PRECISIONS}) == 3
    assert all(bundle.calibration[p].method == "cloud-rate" and bundle.calibration[p].target == 0.3 for p in PRECISIONS)
    sizes = [len(bundle.model(p)) for p in PRECISIONS]
    assert sizes == sorted(sizes, reverse=True)
    preprocessor = load_preprocessor(bundle.task.preprocess, bundle.files)
    for precision in PRECISIONS:
        with np.load(shared / "bundle" / golden_name(precision), allow_pickle=False) as stored:
            text, offsets = stored["text"].tobytes(), stored["offsets"].tolist()
            texts = [text[a:b].decode() for a, b in pairwise(offsets)]
            out = Session(bundle.model(precision)).answer(preprocessor, texts)
            for name in ("logits", "confidence", "score"):
                assert stored[name] == pytest.approx(out[name], abs=1e-4), (precision, name)
    card = (shared / "bundle" / "MODEL_CARD.md").read_text(encoding="utf-8")
    for precision in ("fp16", "int8"):
        calibration = bundle.calibration[precision]
        assert f"- {precision}: {len(bundle.model(precision)) / 1e6:.1f} MB" in card  # type: ignore[arg-type]
        assert f"ε = {calibration.epsilon:.4f}, {calibration.cloud_rate:.1%} cloud calls on {calibration.samples} samples" in card


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_edge_serves_every_precision_by_its_own_epsilon(shared: Path, precision: Precision) -> None:
    bundle = load_bundle(shared / "bundle")
    answers = EdgeRuntime.load(shared / "bundle", precision=precision).infer([Sample(payload=text) for text in TEXTS])
    out = Session(bundle.model(precision)).answer(load_preprocessor(bundle.task.preprocess, bundle.files), TEXTS)
    away = np.abs(out["score"] - bundle.calibration[precision].epsilon) > 1e-3
    local = np.array([a.source is Source.LOCAL for a in answers])
    assert np.array_equal(local[away], (out["score"] > bundle.calibration[precision].epsilon)[away])
    assert 0 < local.sum() < len(TEXTS)


def test_one_run_gives_the_same_precisions_again(shared: Path, tmp_path: Path) -> None:
    from export.bundle import export_bundle
    from kcm.app.samples import fresh_payloads

    run = load_run(shared / "run")
    manifest = export_bundle(
        run, tmp_path / "again", golden_payloads=run.payloads, precisions=("int8", "fp16"), fresh_payloads=fresh_payloads(run)
    )
    assert manifest.bundle_id == load_bundle(shared / "bundle").manifest.bundle_id


def test_it_counts_answers_decisions_and_right_ones(copy: Path) -> None:
    """Against the same numbers written out plainly; fp16 has another table, so that they differ."""
    bundle = load_bundle(broken(copy, "fp16", 0))
    preprocessor = load_preprocessor(bundle.task.preprocess, bundle.files)
    out = {p: Session(bundle.model(p)).answer(preprocessor, TEXTS) for p in PRECISIONS}
    found = agreements(bundle, TEXTS, TRUTH)
    assert [a.precision for a in found] == ["fp16", "int8"]
    for agreement in found:
        plain, narrow = out["fp32"], out[agreement.precision]
        local = [o["score"] > bundle.calibration[p].epsilon for o, p in ((plain, "fp32"), (narrow, agreement.precision))]
        right = [o["top_ids"][:, 0] == TRUTH for o in (plain, narrow)]
        assert agreement.labels == (plain["top_ids"][:, 0] != narrow["top_ids"][:, 0]).sum()
        assert agreement.decisions == (local[0] != local[1]).sum() and agreement.samples == agreement.labelled == len(TEXTS)
        assert agreement.lowered.cloud_rate == pytest.approx(1 - local[1].mean())
        assert agreement.lowered.accuracy == right[1].mean() and agreement.lowered.local_accuracy == right[1][local[1]].mean()
        best = np.argsort(-narrow["score"], kind="stable")[: local[0].sum()]
        assert agreement.lost == (right[0][local[0]].sum() - right[1][best].sum()) / len(TEXTS)
    assert found[0].labels > 20 and found[0].decisions > 20 and (found[0].lost or 0) > 0.05
    assert found[0].wrong and not found[1].wrong
    half_known = np.where(np.arange(len(TEXTS)) % 2, TRUTH, -1)
    assert [a.labelled for a in agreements(bundle, TEXTS, half_known)] == [len(TEXTS) // 2] * 2


def side(**values: Any) -> Side:
    return msgspec.convert({"megabytes": 1.0, "epsilon": 0.5, "cloud_rate": 0.3, "accuracy": 0.9, "local_accuracy": 0.95, **values}, Side)


def agreement(**values: Any) -> Agreement:
    kept = {"samples": 2000, "labelled": 2000, "labels": 20, "decisions": 10, "logits": 0.1, "score": 0.01, "lost": 0.0}
    return Agreement(precision="int8", plain=side(), lowered=side(), **{**kept, **values})


def test_the_bar_is_three_tenths_of_a_point_and_more_than_one_sample() -> None:
    assert agreement(lost=LOSS).wrong == agreement(lost=-0.5).wrong == agreement(lost=None, labelled=0).wrong == ""
    assert "loses 0.35 points" in agreement(lost=0.0035).wrong
    assert agreement(samples=100, labelled=100, labels=1, lost=0.01).wrong == ""  # one sample of a hundred is no evidence
    assert "loses 2.00 points" in agreement(samples=100, labelled=100, labels=2, lost=0.02).wrong
    assert agreement(labels=200).wrong == "" and "answers 201 of 2000 samples differently" in agreement(labels=201).wrong
    assert "no numbers" in agreement(logits=float("nan")).wrong and "no numbers" in agreement(score=float("inf")).wrong


def test_without_labels_it_says_what_it_can_not_tell(shared: Path) -> None:
    found = agreements(load_bundle(shared / "bundle"), TEXTS, None)
    assert all(a.lost is None and a.lowered.accuracy is None and a.labelled == 0 for a in found)
    assert "no labels: how well they answer can't be told" in table(found)
    assert "no labels" not in table(agreements(load_bundle(shared / "bundle"), TEXTS, TRUTH))


def test_a_precision_that_answers_otherwise_is_refused_by_verify_and_by_the_device(copy: Path) -> None:
    bundle = load_bundle(broken(copy, "fp16", 0))
    with pytest.raises(VerifyError, match=r"fp16 (answers \d+ of 240 samples differently|loses)") as error:
        hold(agreements(bundle, TEXTS, TRUTH), bundle)
    assert "int8" not in error.value.message and "--precision" in error.value.fix
    with pytest.raises(BundleError, match="golden input"):
        EdgeRuntime.load(copy, precision="fp16")
    EdgeRuntime.load(copy, precision="int8")


def test_precisions_by_name() -> None:
    assert parse_precisions(["int8", "fp16"]) == parse_precisions(["all"]) == PRECISIONS
    assert parse_precisions(["int8"]) == ("fp32", "int8") and parse_precisions(["fp32"]) == ("fp32",)
    with pytest.raises(ConfigError, match="'fp8' is unknown") as error:
        parse_precisions(["fp16", "fp8"])
    assert "fp32, fp16 or int8" in error.value.fix


def test_export_and_verify_through_the_program(kcm: Kcm, shared: Path, tmp_path: Path) -> None:
    code, out, err = kcm("export", shared / "run", "--out", tmp_path / "b", "--precision", "int8", "--precision", "fp16", "--json")
    assert code == 0, err
    said = json.loads(out)
    bundle = load_bundle(tmp_path / "b")
    assert said["model_bytes"] == {p: len(bundle.model(p)) for p in PRECISIONS} and said["bundle_id"] == bundle.manifest.bundle_id
    assert bundle.calibration["int8"].samples == 400  # the stream's fresh texts, not what the run was fitted on
    assert bundle.manifest.bundle_id == load_bundle(shared / "bundle").manifest.bundle_id

    code, out, err = kcm("verify", tmp_path / "b", "--run", shared / "run")
    assert code == 0, err
    assert "\nfp32 " in out and "\nfp16 " in out and "\nint8 " in out and "no labels" not in out
    code, out, _ = kcm("verify", tmp_path / "b", "--run", shared / "run", "--json")
    assert code == 0 and json.loads(out)["precisions"]["int8"]["labelled"] == 200  # the test file
    bare = write_csv(tmp_path / "bare.csv", [[text] for text in TEXTS], ("text",))
    code, out, _ = kcm("verify", tmp_path / "b", "--run", shared / "run", "--texts", bare)
    assert code == 0 and "no labels" in out
    rows = write_csv(tmp_path / "rows.csv", ROWS)
    code, out, _ = kcm("verify", tmp_path / "b", "--run", shared / "run", "--texts", rows, "--json")
    assert code == 0 and json.loads(out)["precisions"]["fp16"]["labelled"] == len(ROWS)

    broken(tmp_path / "b", "fp16", 0)
    code, out, err = kcm("verify", tmp_path / "b", "--run", shared / "run")
    assert code == 6 and "\nfp16 " in out and "fp16" in err  # the table first, then what is wrong
    code, out, err = kcm("verify", tmp_path / "b", "--run", shared / "run", "--json")
    assert code == 6 and "fp16" in out + err


def test_an_unknown_precision_and_a_failing_one_leave_nothing(kcm: Kcm, shared: Path, tmp_path: Path) -> None:
    code, _, err = kcm("export", shared / "run", "--out", tmp_path / "b", "--precision", "fp64")
    assert code == 3 and "fp64" in err
    run = shutil.copytree(shared / "run", tmp_path / "run")
    threshold = msgspec.structs.replace(load_run(run).threshold, method="accuracy", target=0.9)
    (run / "calibration.json").write_bytes(msgspec.json.encode(threshold))
    code, _, err = kcm("export", run, "--out", tmp_path / "b", "--precision", "int8")
    assert code == 4 and "keeps no answers" in err and "kcm calibrate" in err
    assert not (tmp_path / "b").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    code, _, err = kcm("export", run, "--out", tmp_path / "b")  # fp32 needs no new ε
    assert code == 0, err


def test_a_precision_that_the_weights_do_not_bear_is_not_exported(tiny_run: Run, tmp_path: Path) -> None:
    """A label with a huge weight against it in every row: the step of an int8 row is larger than all that tells the others apart."""
    arrays = {name: tensor.numpy().copy() for name, tensor in tiny_run.small.state_dict().items()}
    arrays["table"][1:, 0] = -1e4
    save_run(tmp_path / "run", replace(tiny_run, small=NgramModel(arrays)))
    with pytest.raises(VerifyError, match=r"int8 answers \d+ of 72 samples differently"):
        export_run(tmp_path / "run", tmp_path / "b", force=False, precisions=("fp32", "int8"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    export_run(tmp_path / "run", tmp_path / "b", force=False, precisions=("fp32", "fp16"))
