"""EdgeRuntime: what it answers, what the policy escalates, and which bundles it refuses to load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import edge_kit
import msgspec
import numpy as np
import pytest

import kcm.bundle
from edge_runtime import EdgeRuntime
from edge_runtime.engines.onnx import OrtEngine
from edge_runtime.engines.protocol import Outputs
from edge_runtime.runtime import NO_CLOUD, InvalidSample
from kcm.bundle import GraphSpec
from kcm.errors import BundleError
from kcm.preprocess import Inputs
from kcm.sample import Route, Sample, Source

TOKENS = {"input_ids": 32, "attention_mask": 32}


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edge_kit.make_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> EdgeRuntime:
    return EdgeRuntime.load(tiny_bundle)


def test_easy_samples_stay_and_hard_ones_are_degraded_without_a_cloud(runtime: EdgeRuntime) -> None:
    answers = runtime.infer([Sample(payload=text, sample_id=text) for text in (*edge_kit.EASY, *edge_kit.HARD)])
    easy, hard = answers[: len(edge_kit.EASY)], answers[len(edge_kit.EASY) :]
    assert [a.label for a in easy] == list(edge_kit.LABELS)
    assert {a.source for a in easy} == {Source.LOCAL} and {a.reason for a in easy} == {""}
    assert {a.source for a in hard} == {Source.DEGRADED} and {a.reason for a in hard} == {NO_CLOUD}
    assert [a.sample_id for a in answers] == [*edge_kit.EASY, *edge_kit.HARD]
    assert all(a.model_id == runtime.bundle_id and len(a.candidates) == edge_kit.CANDIDATES for a in answers)
    assert all(a.candidates[0][0] == a.label_id for a in answers)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("bare text", TypeError, "infer takes a sequence of Sample, not one str"),
        (Sample(payload="x"), TypeError, "infer takes a sequence of Sample, not one Sample"),
        ([Sample(payload="x"), "bare text"], TypeError, r"sample 1 is of type str: wrap it, infer\(\[Sample\(payload=...\)\]\)"),
        ([Sample(payload=3)], InvalidSample, "sample 0: its payload is of type int: give str, bytes"),
        ([Sample(payload=None)], InvalidSample, "sample 0: its payload is of type NoneType"),
    ],
)
def test_what_is_no_sample_is_told_how_to_be_one(runtime: EdgeRuntime, given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        runtime.infer(given)


def test_a_confidence_of_exactly_epsilon_escalates(tmp_path: Path, runtime: EdgeRuntime) -> None:
    confidence = runtime.infer([Sample(payload=edge_kit.EASY[0])])[0].confidence
    at = EdgeRuntime.load(edge_kit.make_bundle(tmp_path / "at", epsilon=confidence))
    below = EdgeRuntime.load(edge_kit.make_bundle(tmp_path / "below", epsilon=float(np.nextafter(confidence, 0))))
    assert at.infer([Sample(payload=edge_kit.EASY[0])])[0].source is Source.DEGRADED
    assert below.infer([Sample(payload=edge_kit.EASY[0])])[0].source is Source.LOCAL


def test_the_route_overrules_the_policy(runtime: EdgeRuntime) -> None:
    easy, hard = runtime.decide([Sample(payload=edge_kit.EASY[0], route=Route.CLOUD), Sample(payload=edge_kit.HARD[0], route=Route.LOCAL)])
    assert not easy.local and easy.hint is not None
    assert hard.local


def test_an_escalated_sample_carries_a_hint_that_the_cloud_accepts(runtime: EdgeRuntime) -> None:
    (decision,) = runtime.decide([Sample(payload=edge_kit.HARD[0])])
    assert decision.hint is not None
    read = type(decision.hint).from_proto(decision.hint.to_proto(), len(edge_kit.LABELS))
    assert read.label_ids == decision.hint.label_ids == tuple(i for i, _ in decision.answer.candidates)


def test_a_model_that_yields_nan_escalates_without_a_hint(runtime: EdgeRuntime) -> None:
    class Nan:
        provider = "test"

        def infer(self, inputs: Inputs) -> Outputs:
            ids = np.array([[0, 1, 2]], np.int64)
            nan = np.full((1, 4), np.nan, np.float32)
            return Outputs(nan, ids, nan[:, :3], nan[:, 0], nan[:, 0])

        def close(self) -> None:
            pass

    broken = EdgeRuntime(
        manifest=runtime.manifest,
        task=runtime.task,
        calibration=runtime.calibration,
        precision="fp32",
        preprocessor=runtime._preprocessor,
        engine=Nan(),
    )
    (decision,) = broken.decide([Sample(payload=edge_kit.EASY[0])])
    assert not decision.local and decision.hint is None


def test_a_bundle_of_hashed_ngrams_answers_as_well(tmp_path: Path) -> None:
    runtime = EdgeRuntime.load(edge_kit.make_bundle(tmp_path / "b", ngrams=True))
    answers = runtime.infer([Sample(payload=text) for text in (*edge_kit.EASY, *edge_kit.HARD, "", "日本 🙂", "a" * 100_000)])
    assert [a.label for a in answers[:4]] == list(edge_kit.LABELS)
    assert {a.source for a in answers[:4]} == {Source.LOCAL} and {a.source for a in answers[4:]} == {Source.DEGRADED}


def test_no_samples_give_no_answers(runtime: EdgeRuntime) -> None:
    assert runtime.infer([]) == []


def test_more_samples_than_a_batch_keep_their_order(runtime: EdgeRuntime) -> None:
    texts = [edge_kit.EASY[i % 4] for i in range(150)]  # the manifest's max_batch is 64
    assert [a.label_id for a in runtime.infer([Sample(payload=t) for t in texts])] == [i % 4 for i in range(150)]


def test_another_modality_names_the_sample(runtime: EdgeRuntime) -> None:
    samples = [Sample(payload="alpha")] * 70 + [Sample(payload=b"\xff\xd8")]
    with pytest.raises(ValueError, match="sample 70: this task reads text"):
        runtime.infer(samples)


def test_a_sample_id_twice_is_refused(runtime: EdgeRuntime) -> None:
    with pytest.raises(ValueError, match="sample 2 has the sample_id of sample 0: 'a'"):
        runtime.infer([Sample(payload="x", sample_id=i) for i in ("a", "b", "a")])


def test_missing_sample_ids_are_made_and_differ(runtime: EdgeRuntime) -> None:
    first, second = (a.sample_id for a in runtime.infer([Sample(payload="x"), Sample(payload="x")]))
    assert first and second and first != second


def test_an_over_long_text_is_truncated(runtime: EdgeRuntime) -> None:
    (answer,) = runtime.infer([Sample(payload="alpha " + "x " * 100_000)])
    assert answer.label == "alpha" and answer.source is Source.LOCAL


def test_odd_text_is_answered(runtime: EdgeRuntime) -> None:
    assert len(runtime.infer([Sample(payload=t) for t in ("", " \n", "\x00", "ß" * 3, "日本 🙂", "﷽")])) == 6


def test_wrong_golden_outputs_are_refused_though_every_hash_is_right(tmp_path: Path) -> None:
    folder = edge_kit.make_bundle(tmp_path / "b", golden_shift=0.01)
    kcm.bundle.load_bundle(folder)
    with pytest.raises(BundleError, match=r"golden input 0: logits differ by 0\.01"):
        EdgeRuntime.load(folder)


def test_golden_outputs_within_tolerance_are_taken(tmp_path: Path) -> None:
    EdgeRuntime.load(edge_kit.make_bundle(tmp_path / "b", golden_shift=0.001))  # logits reach 6: 0.006 is allowed


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("input_sums", lambda a: a + 1, "golden input 0 is preprocessed differently"),
        ("confidence", lambda a: a + np.float32(0.002), "golden input 0: confidence differ"),
        ("logits", lambda a: np.full_like(a, np.nan), "logits differ by nan"),
        ("logits", lambda a: a[:-1], "other numbers of outputs"),
        ("top_ids", lambda a: a[:, ::-1], "golden input 0: candidate 0 is label 0, expected"),
        ("offsets", lambda a: a * 100, "offsets outside its inputs"),
        ("text", lambda a: a | 0x80, "isn't UTF-8"),
    ],
)
def test_each_golden_array_is_checked(tmp_path: Path, name: str, change: object, message: str) -> None:
    folder = edge_kit.make_bundle(tmp_path / "b")
    with np.load(folder / "golden.npz") as archive:
        arrays = dict(archive)
    arrays[name] = change(arrays[name])  # type: ignore[operator]
    np.savez(folder / "golden.npz", **arrays)
    _resign(folder)
    with pytest.raises(BundleError, match=message):
        EdgeRuntime.load(folder)


def test_a_pickle_in_golden_is_refused(tmp_path: Path) -> None:
    folder = edge_kit.make_bundle(tmp_path / "b")
    np.savez(folder / "golden.npz", text=np.array([object()], dtype=object))
    _resign(folder)
    with pytest.raises(BundleError, match=r"golden\.npz"):
        EdgeRuntime.load(folder)


@pytest.mark.parametrize("ngrams", [False, True])
def test_a_graph_of_other_inputs_than_the_preprocessing_makes_is_refused(tmp_path: Path, ngrams: bool) -> None:
    """A bundle of an older kcm: before its golden inputs are preprocessed in vain."""
    folder = edge_kit.make_bundle(tmp_path / "b", ngrams=ngrams)
    bundle = kcm.bundle.load_bundle(folder)
    inputs = bundle.manifest.graph.inputs
    for change in (dict(list(inputs.items())[:-1]), {**inputs, next(iter(inputs)): 5}):
        graph = msgspec.structs.replace(bundle.manifest.graph, inputs=change)
        kcm.bundle.write_manifest(folder, task=bundle.task, graph=graph, version="0")
        with pytest.raises(BundleError, match=r"its graph reads .*; this kcm makes .* \(up to") as caught:
            EdgeRuntime.load(folder)
        assert caught.value.fix == "export it again with this kcm"
        assert all(f"{name} (up to {longest})" in caught.value.message for name, longest in [*inputs.items(), *change.items()])
    kcm.bundle.write_manifest(folder, task=bundle.task, graph=bundle.manifest.graph, version="0")
    EdgeRuntime.load(folder)


def test_external_tensors_never_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In the working directory, where ONNX Runtime looks for the data of a model that came as bytes.
    table = np.zeros((2 + len(edge_kit._WORDS), 4), np.float32)
    (tmp_path / "weights.bin").write_bytes(table.tobytes())
    monkeypatch.chdir(tmp_path)
    model = edge_kit.graph(edge_kit.table_of(4, 0), external="weights.bin")
    import onnxruntime

    onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])  # without our option it does load
    with pytest.raises(BundleError, match="can't be loaded"):
        OrtEngine(model, GraphSpec(inputs=TOKENS, candidates=3), 4)


@pytest.mark.parametrize(
    ("spec", "classes", "message"),
    [
        (
            GraphSpec(inputs={"ids": 1, "weights": 1}, candidates=3),
            4,
            "the model reads input_ids, attention_mask; its manifest says ids, weights",
        ),
        (GraphSpec(inputs=TOKENS, candidates=2), 4, "'top_ids' has shape"),
        (GraphSpec(inputs=TOKENS, candidates=3), 5, "'logits' has shape"),
    ],
)
def test_a_model_of_another_signature_is_refused(spec: GraphSpec, classes: int, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        OrtEngine(edge_kit.graph(edge_kit.table_of(4, 0)), spec, classes)


def test_a_file_that_is_no_model_is_refused() -> None:
    with pytest.raises(BundleError, match="can't be loaded"):
        OrtEngine(b"not a model", GraphSpec(inputs={"input_ids": 1}, candidates=1), 4)


def test_the_runtime_reports_what_really_runs(runtime: EdgeRuntime) -> None:
    assert runtime.provider == "CPUExecutionProvider"


def test_importing_is_cheap_and_serving_needs_no_training_library(tiny_bundle: Path) -> None:
    program = f"""
import sys, edge_runtime
assert not {{"onnxruntime", "grpc", "numpy"}} & set(sys.modules), "import edge_runtime is not cheap"
import edge_runtime.cli
assert not {{"onnxruntime", "grpc", "numpy", "apsw"}} & set(sys.modules), "the command line is not cheap"
import edge_runtime.daemon
from edge_runtime import EdgeRuntime
EdgeRuntime.load({str(tiny_bundle)!r})
banned = {{"torch", "transformers", "onnx", "pyarrow", "scipy", "prometheus_client"}} & set(sys.modules)
assert not banned, banned
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def _resign(folder: Path) -> None:
    """Write a manifest that fits the changed files."""
    bundle = kcm.bundle.read_manifest(folder)
    (folder / kcm.bundle.MANIFEST).unlink()
    task = kcm.task.parse_task(kcm.config.read_toml(folder / "task.toml"), "task.toml")
    kcm.bundle.write_manifest(folder, task=task, graph=bundle.graph, version="0")
    assert msgspec.json.decode((folder / kcm.bundle.MANIFEST).read_bytes())
