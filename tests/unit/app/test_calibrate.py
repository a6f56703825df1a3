"""`kcm calibrate` on a real run with a real (tiny) large model: what it writes, prints, promises and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cloud_kit
import msgspec
import numpy as np
import pytest
from tiny_kit import SIZES, sentences
from typer.testing import CliRunner

from cloud_server.compact import compact
from kcm.app.calibrate import parse_drop
from kcm.app.cli import build
from kcm.app.export import export_run
from kcm.app.models import LargeInProcess, load_small_kind
from kcm.bundle import load_bundle
from kcm.errors import ConfigError, DataError, StoreError
from kcm.task import load_task
from training.calibrate import distinct, divide, for_rate, reference
from training.data import Split, load_split
from training.run import load_run


@pytest.fixture(scope="module")
def large(tiny_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head on a tiny BERT, fitted on the task's large_train."""
    folder = tmp_path_factory.mktemp("large")
    task = load_task(tiny_task)
    spec = msgspec.structs.replace(task.large, model=str(cloud_kit.tiny_bert(folder / "bert")))
    LargeInProcess(msgspec.structs.replace(task, large=spec), folder / "large", load_split(task, "large_train"), lambda _: None)
    return folder / "large"


@pytest.fixture
def run(tiny_run_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_run_dir, tmp_path / "run")
    return tmp_path / "run"


def calibrate(run: Path, *arguments: object) -> dict[str, object]:
    result = CliRunner().invoke(build("calibrate"), ["calibrate", str(run), "--json", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def test_a_rate_without_a_large_model_routes_by_confidence_and_leaves_a_reference(run: Path) -> None:
    said = calibrate(run, "--cloud-rate", 0.3)
    assert said["head"]["head"] == "confidence" and "no labelled samples" in said["head"]["reason"]  # type: ignore[index]
    threshold = load_run(run).threshold
    assert threshold.reference is not None and threshold.reference.samples == SIZES["stream"] == threshold.samples
    assert len(threshold.reference.quantiles) == 19 and list(threshold.reference.quantiles) == sorted(threshold.reference.quantiles)
    assert threshold.reference.agreement_local is None and threshold.guarantee is None and threshold.teacher_id == ""
    assert threshold.cloud_rate == threshold.reference.cloud_rate == pytest.approx(0.3, abs=0.01)


def test_with_a_large_model_the_head_is_chosen_on_samples_that_epsilon_never_sees(run: Path, large: Path) -> None:
    said = calibrate(run, "--accuracy", 0.3, "--large", large, "--hint", "none")
    threshold = load_run(run).threshold
    selection, rest = divide(distinct(load_split(load_run(run).task, "calibration")))
    assert len(selection) + len(rest) == SIZES["calibration"] and not set(selection.payloads) & set(rest.payloads)
    assert threshold.head.samples == len(selection) and threshold.samples == len(rest)
    assert threshold.hint.arm == "none" and threshold.hint.reason == "set by hand" and threshold.hint.no_hint == 0.02
    assert threshold.teacher_id.startswith("encoder-") and threshold.reference is not None
    found = threshold.reference
    assert found.escalated + found.local == len(rest)
    assert said["curve"]["1.0"]["accuracy"] == pytest.approx(_large_accuracy(run, large, rest))  # type: ignore[index]


def _large_accuracy(run: Path, large: Path, split: Split) -> float:
    from cloud_server.models import load_large

    return float((load_large(large).logits(split.payloads, [None] * len(split)).argmax(1) == split.y).mean())


@pytest.mark.parametrize("head", ["benefit", "correctness", "max-softmax"])
def test_a_head_by_hand_is_saved_with_the_run_and_its_scores_come_back(run: Path, large: Path, head: str) -> None:
    calibrate(run, "--cloud-rate", 0.3, "--large", large, "--head", head, "--hint", "candidates")
    loaded = load_run(run)
    assert loaded.threshold.head.head == head and (loaded.head is not None) == (head != "max-softmax")
    score = loaded.score(loaded.out_of_fold)
    assert score.std() > 0 and not np.allclose(score, loaded.judge.confidence(loaded.out_of_fold))
    again = load_run(run)
    np.testing.assert_array_equal(again.score(again.out_of_fold), score)
    calibrate(run, "--epsilon", 0.5)  # back to confidence: the head's file goes
    assert load_run(run).head is None and not (run / "head.safetensors").exists()


def test_a_promise_that_the_labels_cannot_support_is_refused_and_nothing_is_written(run: Path, large: Path) -> None:
    before = (run / "calibration.json").read_bytes()
    with pytest.raises(DataError, match="can't promise a drop of at most 1 points") as error:
        calibrate(run, "--max-accuracy-drop", "1pt", "--large", large)
    assert "301" in str(error.value) and "--head confidence" in str(error.value)
    with pytest.raises(DataError, match=r"with 99.99% confidence: without a single loss") as error:
        calibrate(run, "--max-accuracy-drop", "1pt", "--large", large, "--head", "confidence", "--hint", "none", "--confidence", 0.9999)
    assert "--head" not in error.value.fix
    assert (run / "calibration.json").read_bytes() == before


def test_too_few_labels_are_said_before_a_model_is_loaded(run: Path, tmp_path: Path) -> None:
    """A folder without a large model would be the next error."""
    with pytest.raises(DataError, match="can't promise"):
        calibrate(run, "--max-accuracy-drop", "1pt", "--large", tmp_path)
    with pytest.raises(ConfigError, match="is no large model"):
        calibrate(run, "--max-accuracy-drop", "20pt", "--large", tmp_path)
    with pytest.raises(StoreError, match="nothing in it is compacted"):
        calibrate(run, "--cloud-rate", 0.3, "--large", tmp_path, "--store", tmp_path)


def test_a_promise_that_holds_says_what_it_is_worth(run: Path, large: Path) -> None:
    wanted = ["--max-accuracy-drop", "10pt", "--confidence", "0.9", "--large", str(large), "--head", "confidence", "--hint", "none"]
    result = CliRunner().invoke(build("calibrate"), ["calibrate", str(run), *wanted], catch_exceptions=False)
    promised = load_run(run).threshold.guarantee
    assert promised is not None and promised.upper <= promised.max_drop + 1e-5 and promised.effective_n == SIZES["calibration"]
    assert "promised: at most 10 points below the large model with 90% confidence" in result.output
    assert "thresholds from the safe end" in result.output


@pytest.mark.parametrize(("text", "value"), [("0.5pt", 0.005), ("0.005", 0.005), ("2%", 0.02), (" 1 points ", 0.01)])
def test_a_drop_is_read_in_points_and_as_a_share(text: str, value: float) -> None:
    assert parse_drop(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "pt", "-1pt", "0", "100pt", "1.2.3", "half", "5 apples"])
def test_what_is_no_drop_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no drop"):
        parse_drop(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "choose one of"),
        (["--cloud-rate", "0.1", "--epsilon", "0.5"], "choose one of"),
        (["--accuracy", "0.9"], "weighed against the large model"),
        (["--cloud-rate", "0.1", "--head", "gain"], "'gain' is unknown"),
        (["--cloud-rate", "0.1", "--head", "benefit"], "fitted on labelled samples"),
        (["--cloud-rate", "0.1", "--hint", "loud"], "'loud' is unknown"),
    ],
)
def test_what_does_not_fit_together_is_refused(run: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrate(run, *arguments)


def test_a_text_that_comes_twice_is_one_witness() -> None:
    split = Split("calibration", ["a", "b", "a", "c"], np.array([0, 1, 2, 3]))
    assert distinct(split).payloads == ["a", "b", "c"] and distinct(split).y.tolist() == [0, 1, 3]


def test_the_reference_counts_agreement_on_both_sides_of_epsilon() -> None:
    score = np.linspace(0, 1, 101).astype(np.float32)
    found = reference(score, 0.5, np.array([True, False, True, True]), np.array([0.1, 0.2, 0.9, 0.8], np.float32))
    assert (found.escalated, found.agreement_escalated, found.local, found.agreement_local) == (2, 0.5, 2, 1.0)
    assert found.cloud_rate == pytest.approx(51 / 101) and found.quantiles[9] == pytest.approx(0.5)
    assert for_rate(score, 0.5).epsilon == pytest.approx(0.5, abs=0.01)


def test_truths_that_applications_told_choose_the_head(run: Path, tmp_path: Path) -> None:
    """Feedback on escalated and explored samples, out of a real store; without a file of labels, and without the large model."""
    loaded = load_run(run)
    task = loaded.task
    rng = np.random.default_rng(0)
    told = [(text, label) for text, label in sentences(600, seed=77) if text not in set(loaded.payloads)]
    rows, labels = [], {}
    for place, (text, label) in enumerate(told):
        truth = task.labels.index(label)
        answer = truth if rng.random() < 0.9 else int(rng.integers(len(task.labels)))
        logits = np.where(np.arange(len(task.labels)) == answer, 5, 0).astype(np.float32)
        explored = place % 2 == 0
        about = {"task_id": task.id, "label_space": task.label_space, "answer_logits": logits, "small_logits": None}
        rows.append(cloud_kit.row(str(place), text=text, p_escalate=0.1 if explored else 1.0, **about))
        labels[str(place)] = truth
    cloud_kit.put(tmp_path / "store", *rows)
    cloud_kit.tell(tmp_path / "store", labels, label_space=task.label_space)
    compact(tmp_path / "store")
    said = calibrate(run, "--cloud-rate", 0.3, "--store", tmp_path / "store")
    head = said["head"]
    assert head["samples"] == len(told) and set(head["evidence"]) == {"confidence", "max-softmax", "correctness", "benefit"}  # type: ignore[index,arg-type]
    again = load_run(run)
    assert again.threshold.head.head == head["head"]  # type: ignore[index]
    with pytest.raises(StoreError, match="nothing is no folder"):
        calibrate(run, "--cloud-rate", 0.3, "--store", tmp_path / "nothing")


def test_a_promise_is_of_the_answers_under_the_gate(run: Path, tiny_task: Path, tmp_path: Path) -> None:
    """A large model that reads hints is asked with the hints that the gate lets through: the curve's end is its accuracy with them."""
    from cloud_server.models import load_large
    from kcm.app.hint import small_hints

    task = load_task(tiny_task)
    spec = msgspec.structs.replace(task.large, model=str(cloud_kit.tiny_bert(tmp_path / "bert")), hint_dropout=0.3)
    LargeInProcess(msgspec.structs.replace(task, large=spec), tmp_path / "large", load_split(task, "large_train"), lambda _: None)
    said = calibrate(run, "--accuracy", 0.3, "--large", tmp_path / "large", "--head", "confidence", "--hint", "candidates")
    loaded, large = load_run(run), load_large(tmp_path / "large")
    split = distinct(load_split(loaded.task, "calibration"))
    kind = load_small_kind(loaded.task, lambda _: None)
    predictions = kind.predict(loaded.small, kind.featurise(split.payloads))
    hints = small_hints(predictions.logits, loaded.judge.confidence(predictions))
    with_hints = large.logits(split.payloads, hints).argmax(1) == split.y
    without = large.logits(split.payloads, [None] * len(split)).argmax(1) == split.y
    assert (with_hints != without).any(), "a model that doesn't listen would make this test empty"
    assert said["curve"]["1.0"]["accuracy"] == pytest.approx(with_hints.mean())  # type: ignore[index]


def test_the_answers_that_epsilon_was_weighed_on_stay_with_the_run_for_other_precisions(run: Path, large: Path) -> None:
    """fp16 and int8 get an ε of their own for the same promise, without the large model."""
    calibrate(run, "--accuracy", 0.3, "--large", large, "--hint", "none")
    rest = divide(distinct(load_split(load_run(run).task, "calibration")))[1]
    kept = load_run(run).answered
    assert kept is not None and kept.payloads == rest.payloads and np.array_equal(kept.labels, rest.y)
    assert (kept.large == kept.labels).mean() == pytest.approx(_large_accuracy(run, large, rest))
    narrow = load_bundle(_exported(run, run.parent / "bundle")).calibration
    assert all(narrow[p].method == "accuracy" and narrow[p].samples == len(rest) for p in ("fp32", "fp16", "int8"))
    calibrate(run, "--cloud-rate", 0.3)
    assert load_run(run).answered is None


def _exported(run: Path, out: Path) -> Path:
    export_run(run, out, force=False, precisions=("fp32", "fp16", "int8"))
    return out
