"""A run on disk is the run in memory; a half-written one is none."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tiny_kit import SIZES

from kcm.errors import ConfigError
from kcm.task import load_task
from training.data import load_split
from training.program import distil_run, train_run
from training.run import Run, load_run, next_run_folder, save_calibrated, save_run
from training.small import Ngrams


def test_a_run_comes_back_equal(tiny_run: Run, tiny_task: Path, tmp_path: Path) -> None:
    run = replace(tiny_run, payloads=[*tiny_run.payloads[:-1], 'line\u2028sep\r\n"quoted" \\ 東京'])
    save_run(tmp_path / "again", run)
    again = load_run(tmp_path / "again")
    assert again.info == run.info and again.threshold == run.threshold and again.payloads == run.payloads
    assert again.metrics == run.metrics
    for name in ("targets", "weights", "labelled"):
        assert np.array_equal(getattr(again, name), getattr(run, name)), name
    kind = Ngrams(run.task, None)
    features = kind.featurise(load_split(load_task(tiny_task), "test").payloads)
    for one, other in ((again, run),):
        first, second = kind.predict(one.small, features), kind.predict(other.small, features)
        assert np.array_equal(first.logits, second.logits)
        assert np.array_equal(one.judge.confidence(first), other.judge.confidence(second))
        assert np.array_equal(one.out_of_fold.logits, other.out_of_fold.logits)


def test_training_is_repeatable(tiny_run: Run, tiny_task: Path) -> None:
    task = load_task(tiny_task)
    again = train_run(task, Ngrams(task, None), load_split(task, "train"), None, seed=0, progress=lambda _: None)
    assert np.array_equal(again.out_of_fold.logits, tiny_run.out_of_fold.logits)
    assert again.judge.confidence(again.out_of_fold) == pytest.approx(tiny_run.judge.confidence(tiny_run.out_of_fold), abs=1e-6)


def test_metrics_are_strict_json_and_true(tiny_run: Run, tiny_run_dir: Path) -> None:
    text = (tiny_run_dir / "metrics.json").read_text()
    metrics = msgspec.json.decode(text)  # refuses NaN
    assert metrics["schema"] == 1
    test = metrics["test"]
    assert test["samples"] == SIZES["test"]
    assert 0.6 < test["accuracy"] < 1 and test["accuracy_interval"][0] <= test["accuracy"] <= test["accuracy_interval"][1]
    assert all(0.5 < test[f"auroc_{name}"] <= 1 for name in ("kan", "mlp", "max_softmax"))


def test_a_run_without_a_mistake_has_no_ranking_and_still_strict_json(tiny_task: Path, tmp_path: Path) -> None:
    """AUROC doesn't exist where every answer is right."""
    task = load_task(tiny_task)
    train = load_split(task, "train")
    easy = replace(train, payloads=[f"word{label} word{label}" for label in train.y])
    run = train_run(task, Ngrams(task, None), easy, None, seed=0, progress=lambda _: None)
    save_run(tmp_path / "run", run)
    metrics = msgspec.json.decode((tmp_path / "run" / "metrics.json").read_bytes())
    assert metrics["out_of_fold"]["accuracy"] == 1.0
    assert metrics["out_of_fold"]["auroc_kan"] is None


@pytest.mark.parametrize("missing", ["run.json", "judge.safetensors", "small.safetensors", "examples.jsonl", "calibration.json"])
def test_an_unfinished_run_is_refused(tiny_run_dir: Path, tmp_path: Path, missing: str) -> None:
    folder = shutil.copytree(tiny_run_dir, tmp_path / "run")
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match="no finished run" if missing == "run.json" else "can't be read as a run"):
        load_run(folder)


@pytest.mark.parametrize("name", ["judge.safetensors", "small.safetensors", "predictions.safetensors", "run.json", "metrics.json"])
def test_a_damaged_run_is_an_error_and_no_crash(tiny_run_dir: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(tiny_run_dir, tmp_path / "run")
    whole = (folder / name).read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        (folder / name).write_bytes(content)
        with pytest.raises(ConfigError, match="can't be read as a run"):
            load_run(folder)


def test_a_run_of_a_newer_kcm_is_refused(tiny_run_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_run_dir, tmp_path / "run")
    info = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**info, "schema": 2}))
    with pytest.raises(ConfigError, match="schema 2"):
        load_run(folder)


def test_saving_again_never_shows_a_mixture(tiny_run: Run, tmp_path: Path) -> None:
    """run.json goes first and comes last: a crash in between leaves no run."""
    folder = tmp_path / "run"
    save_run(folder, tiny_run)
    broken = replace(tiny_run, payloads=[object()])  # type: ignore[list-item]
    with pytest.raises(TypeError):
        save_run(folder, broken)
    with pytest.raises(ConfigError, match="no finished run"):
        load_run(folder)


def test_a_threshold_alone_can_be_written_anew(tiny_run_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_run_dir, tmp_path / "run")
    run = load_run(folder)
    threshold = msgspec.structs.replace(run.threshold, epsilon=0.123)
    save_calibrated(folder, replace(run, threshold=threshold))
    assert load_run(folder).threshold == threshold


def test_run_folders_are_numbered(tmp_path: Path) -> None:
    assert [next_run_folder(tmp_path, "train").name for _ in range(3)] == ["1", "2", "3"]
    (tmp_path / "train" / "10").mkdir()
    (tmp_path / "train" / "notes").mkdir()
    assert next_run_folder(tmp_path, "train") == tmp_path / "train" / "11"


def test_a_folder_that_can_not_be_made_is_an_error_and_no_crash(tiny_run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", Path("/proc/kcm")):
        with pytest.raises(ConfigError, match="can't be made") as error:
            save_run(root / "run", tiny_run)
        assert "folder that you may write" in error.value.fix
        with pytest.raises(ConfigError, match="can't be made"):
            next_run_folder(root, "train")


def test_runs_at_one_time_never_share_a_number(tmp_path: Path) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # else each listing and making goes through in one piece
    try:
        with ThreadPoolExecutor(8) as pool:
            folders = list(pool.map(lambda _: next_run_folder(tmp_path, "train"), range(200)))
    finally:
        sys.setswitchinterval(interval)
    assert sorted(int(folder.name) for folder in folders) == list(range(1, 201))


def test_a_round_learns_from_the_teacher(tiny_run: Run, tiny_task: Path) -> None:
    """The large model's answers to the stream, here the truth of a labelled file, make the small model better."""
    task = load_task(tiny_task)
    more = load_split(task, "large_train")
    more = more.take(np.arange(SIZES["train"], len(more)))
    logits = np.full((len(more), len(task.labels)), -4, np.float32)
    logits[np.arange(len(more)), more.y] = 4
    new = distil_run(
        tiny_run,
        Ngrams(task, None),
        load_split(task, "train"),
        load_split(task, "test"),
        more.payloads,
        logits,
        parent="p",
        teacher_id="t",
        gauge=None,
        seed=0,
        progress=lambda _: None,
    )
    assert new.metrics["test"]["accuracy"] > tiny_run.metrics["test"]["accuracy"] + 0.02
    assert (new.info.round, new.info.parent, new.info.teacher_id) == (1, "p", "t")
    assert new.labelled.sum() == SIZES["train"] and len(new.payloads) == SIZES["train"] + len(more)
    assert new.payloads[: SIZES["train"]] == tiny_run.payloads
    assert (new.metrics["teacher_rows"], new.metrics["teacher_rows_used"]) == (len(more), 1.0)
