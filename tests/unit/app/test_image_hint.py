"""Images through hint gate, calibration and evaluation, with the user's own ONNX classifiers on both sides: no training, real programs.

The small model looks at the left half of a picture and the large one at the right half, each with its own noise: so they err
independently, and a hint is worth as much as the large model's own evidence.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import picture_kit
import pytest
import tomli_w
from cloud_kit import LABELS
from numpy.typing import NDArray
from picture_kit import COLOURS, GREY, SIZE, colour_graph

from cloud_server.models import LargeModel, load_large, read_large
from cloud_server.models.image import ImageModel
from kcm.app.hint import gate_for, hints_by_arm
from kcm.app.models import LargeInProcess, load_small_kind
from kcm.errors import ConfigError, DataError
from kcm.task import Task, load_task
from training.data import load_split
from training.program import train_run
from training.run import Run

pytestmark = pytest.mark.slow

ROWS = {"train": 200, "large_train": 600, "calibration": 600, "test": 600, "stream": 300}


def quiet(_: str) -> None:
    """No progress."""


def pictures(rows: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """[N, S, S, 3] and labels: each half is grey, a little of the label's colour, and noise of its own."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(LABELS), rows)
    tint = 0.25 * (np.array(COLOURS)[labels] - np.array(GREY))
    halves = np.array(GREY) + tint[:, None] + rng.normal(0, 22, (rows, 2, 3))
    images = np.repeat(halves, SIZE // 2, axis=1)[:, None].repeat(SIZE, axis=1) + rng.normal(0, 3, (rows, SIZE, SIZE, 3))
    return np.clip(images, 0, 255).astype(np.uint8), labels.astype(np.int64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("halves")
    tables = picture_kit._tables({})
    tables["large"] = {"kind": "onnx", "model": "large.onnx"}
    tables["data"] = {name: f"{name}.npz" for name in ROWS}
    tables["judge"] = {"folds": 2}
    (made / "task.toml").write_text(tomli_w.dumps(tables))
    (made / "small.onnx").write_bytes(colour_graph(half="left", scale=4.0, name="picture"))
    (made / "large.onnx").write_bytes(colour_graph(half="right", scale=8.0, name="picture"))
    for seed, (name, rows) in enumerate(ROWS.items()):
        images, labels = pictures(rows, seed)
        np.savez(made / f"{name}.npz", images=images, labels=np.array(LABELS)[labels])
    return made


@pytest.fixture(scope="module")
def task(folder: Path) -> Task:
    return load_task(folder)


@pytest.fixture(scope="module")
def run(task: Task) -> Run:
    return train_run(task, load_small_kind(task, quiet), load_split(task, "train"), None, seed=0, progress=quiet)


@pytest.fixture(scope="module")
def large_dir(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("large")
    LargeInProcess(task, out, load_split(task, "large_train"), quiet)
    return out


@pytest.fixture(scope="module")
def large(large_dir: Path) -> LargeModel:
    return load_large(large_dir)


def test_a_users_classifier_gets_a_temperature_and_a_weight_that_its_rows_speak_for(
    task: Task, run: Run, large_dir: Path, large: LargeModel
) -> None:
    described = read_large(large_dir)
    assert described.kind == "onnx" and 1.2 < described.temperature < 8.0, "its logits are far too large"
    assert 0.4 < described.hint_weight < 1.5, "two independent experts: their product"
    assert large.reads_hints and large.prompt_id.startswith("prior-")
    test = load_split(task, "test")
    kind = load_small_kind(task, quiet)
    predictions = kind.predict(run.small, kind.featurise(test.payloads))
    hints = hints_by_arm(predictions.logits, run.judge.confidence(predictions))
    right = {arm: (large.logits(test.payloads, given).argmax(1) == test.y).mean() for arm, given in hints.items()}
    small = (predictions.logits.argmax(1) == test.y).mean()
    assert right["candidates"] > max(right["none"], small) + 0.04
    assert right["none"] < 0.97 and small < 0.97, "there is something to gain"


def test_the_gate_shows_the_hint_where_it_helps_and_not_where_the_weight_is_zero(
    task: Task, run: Run, large_dir: Path, large: LargeModel
) -> None:
    split = load_split(task, "calibration")
    kind = load_small_kind(task, quiet)
    predictions = kind.predict(run.small, kind.featurise(split.payloads))
    gate = gate_for(run, large, split, predictions, epsilon=0.9, progress=quiet)
    assert gate.arm in ("candidates", "assertion") and gate.evidence["candidates"].difference > 0.02
    deaf = ImageModel(large_dir, msgspec.structs.replace(read_large(large_dir), hint_weight=0.0))
    closed = gate_for(run, deaf, split, predictions, epsilon=0.9, progress=quiet)
    assert closed.arm == "none" and "weight of a hint is 0" in closed.reason


def test_without_rows_of_its_own_the_large_model_reads_no_hints(task: Task, tmp_path: Path) -> None:
    said: list[str] = []
    LargeInProcess(task, tmp_path / "plain", None, said.append)
    plain = read_large(tmp_path / "plain")
    assert (plain.temperature, plain.hint_weight) == (1.0, 0.0) and any("reads no hints" in line for line in said)
    LargeInProcess(task, tmp_path / "deaf", load_split(task, "large_train"), quiet, hints=False)
    assert read_large(tmp_path / "deaf").hint_weight == 0.0 and read_large(tmp_path / "deaf").temperature > 1.2
    assert read_large(tmp_path / "deaf").large_id != plain.large_id
    with pytest.raises(DataError, match="20 rows are too few"):
        LargeInProcess(task, tmp_path / "few", load_split(task, "large_train").take(np.arange(20)), quiet)


def test_a_large_model_that_is_not_there_is_named(task: Task, tmp_path: Path) -> None:
    gone = msgspec.structs.replace(task, large=msgspec.structs.replace(task.large, model="gone.onnx"))
    with pytest.raises(ConfigError, match=r"gone\.onnx does not exist"):
        LargeInProcess(gone, tmp_path, None, quiet)


def test_the_verbs_go_all_the_way_on_images(folder: Path, tmp_path: Path, kcm: Callable[..., tuple[int, str, str]]) -> None:
    """train → train-large → calibrate with the hint's gate → eval: as of texts."""
    run, large, report = tmp_path / "run", tmp_path / "large", tmp_path / "report"
    steps: list[tuple[Any, ...]] = [
        ("train", "--task", folder, "--out", run, "--json"),
        ("train-large", "--task", folder, "--out", large, "--json"),
        ("calibrate", run, "--cloud-rate", "0.4", "--large", large, "--json"),
        ("eval", run, "--large", large, "--out", report, "--json"),
    ]
    told: dict[str, Any] = {}
    for step in steps:
        code, out, err = kcm(*step)
        assert code == 0, f"{step}: {out}{err}"
        told[step[0]] = json.loads(out.strip().splitlines()[-1])
    assert told["train-large"]["test_accuracy"] > 0.7
    threshold = told["calibrate"]
    assert threshold["hint"]["arm"] in ("candidates", "assertion")
    assert threshold["teacher_id"] == load_large(large).teacher_id and threshold["prompt_id"] == load_large(large).prompt_id
    assert threshold["accuracy"] > told["train-large"]["test_accuracy"], "hinted answers of independent models beat the large one alone"
