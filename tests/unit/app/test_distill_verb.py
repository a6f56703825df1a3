"""`kcm distill` with a real store: a better run goes on, a worse one is kept and stopped at the gate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cloud_kit import put, real_model, row
from tiny_kit import LABELS, SIZES, sentences, write_csv, write_tiny_task

from cloud_server.compact import compact
from kcm.app.distill import held_back
from kcm.task import label_space, load_task
from training.data import load_split
from training.reserve import reserved
from training.run import load_run

Kcm = Callable[..., tuple[int, str, str]]
STREAM = sentences(SIZES["stream"], seed=2)
GOLD = sentences(300, seed=60)


def written(root: Path, turn: int, rows: list[tuple[str, str]] = STREAM) -> Path:
    """A compacted store in which the large model gives each text its label, turned `turn` places on."""
    answers = [8 * np.eye(6, dtype=np.float32)[(LABELS.index(label) + turn) % 6] for _, label in rows]
    put(
        root,
        *(
            row(f"s{i}", text=text, task_id="tiny", label_space=label_space(LABELS), answer_logits=logits)
            for i, ((text, _), logits) in enumerate(zip(rows, answers, strict=True))
        ),
    )
    compact(root)
    return root


@pytest.fixture(scope="module")
def right_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("right"), 0)


@pytest.fixture(scope="module")
def wrong_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("wrong"), 1)


@pytest.fixture(scope="module")
def with_gold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task's folder, with a gold file."""
    folder = write_tiny_task(tmp_path_factory.mktemp("gold") / "task")
    write_csv(folder / "gold.csv", GOLD)
    file = folder / "task.toml"
    file.write_text(file.read_text(encoding="utf-8").replace("[data]\n", '[data]\ngold = "gold.csv"\n'), encoding="utf-8")
    return folder


@pytest.fixture
def gold_run(with_gold: Path, tiny_run_dir: Path, tmp_path: Path) -> Path:
    """The tiny run, its task with a gold file."""
    folder = shutil.copytree(tiny_run_dir, tmp_path / "gold-run")
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    info["task"] |= {"root": str(with_gold), "data": {**info["task"]["data"], "gold": "gold.csv"}}
    (folder / "run.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def test_a_better_run_passes_the_gate_and_is_exported(kcm: Kcm, gold_run: Path, right_store: Path, tmp_path: Path) -> None:
    code, out, err = kcm("distill", gold_run, "--store", right_store, "--out", tmp_path / "r", "--bundle", tmp_path / "b")
    assert code == 0, err
    assert (tmp_path / "b" / "manifest.json").exists()
    new = load_run(tmp_path / "r")
    verdict = new.metrics["gate"]
    assert verdict["passed"] and not verdict["weak"] and not verdict["overridden"]
    figures = verdict["figures"]["gold"]
    assert figures["samples"] == 300 and figures["interval"][0] > 0
    assert f"gate passed: gold {figures['before']:.1%} → {figures['after']:.1%}" in out
    forgotten = new.metrics["forgetting"]
    assert f"forgetting, out of fold: {forgotten['before']:.1%} → {forgotten['after']:.1%}" in out
    assert "forgetting, test: " in out and "weaker" not in out
    stored = f"{SIZES['stream'] - sum(reserved(text) for text, _ in STREAM)} of the 400 rows that rule answered"
    assert stored in err


def test_a_worse_run_is_kept_and_no_bundle_is_written(kcm: Kcm, gold_run: Path, wrong_store: Path, tmp_path: Path) -> None:
    command = ("distill", gold_run, "--store", wrong_store, "--bundle", tmp_path / "b", "--out")
    code, out, err = kcm(*command, tmp_path / "r")
    assert code == 6
    assert "gate FAILED: gold " in out and "may be worse than" in err and "--no-gate" in err.split("fix: ")[1]
    new = load_run(tmp_path / "r")
    assert not new.metrics["gate"]["passed"] and new.info.round == 1
    figures = new.metrics["gate"]["figures"]["gold"]
    assert f"{figures['before']:.1%} → {figures['after']:.1%}, {100 * figures['difference']:+.1f} points" in err
    assert not (tmp_path / "b").exists()
    code, out, err = kcm(*command, tmp_path / "r2", "--json")
    said = json.loads(out)
    assert code == 6 and said["error"] == "VerifyError" and not (tmp_path / "b").exists()


def test_the_gate_can_be_overridden_with_a_warning(kcm: Kcm, gold_run: Path, wrong_store: Path, tmp_path: Path) -> None:
    code, out, err = kcm(
        "distill", gold_run, "--store", wrong_store, "--out", tmp_path / "r", "--bundle", tmp_path / "b", "--no-gate", "--json"
    )
    assert code == 0 and "warning: --no-gate: " in err
    assert (tmp_path / "b" / "manifest.json").exists()
    verdict = json.loads(out)["after"]["gate"]
    assert verdict["overridden"] and not verdict["passed"]


def test_without_a_gold_file_the_gate_reads_round_0_and_says_that_it_is_weaker(
    kcm: Kcm, tiny_run_dir: Path, right_store: Path, wrong_store: Path, tmp_path: Path
) -> None:
    code, out, _ = kcm("distill", tiny_run_dir, "--store", right_store, "--out", tmp_path / "r")
    assert code == 0 and "gate passed: round 0 " in out and "which is weaker" in out
    code, _, err = kcm("distill", tiny_run_dir, "--store", wrong_store, "--out", tmp_path / "w")
    assert code == 6 and "round 0 " in err, "a script that exports the run later must see it, too"
    assert (tmp_path / "w" / "run.json").exists()


def test_gold_texts_are_never_learnt_from(kcm: Kcm, gold_run: Path, with_gold: Path, tmp_path: Path) -> None:
    task = load_task(with_gold)
    texts = held_back(task)
    assert texts == {text for name in ("test", "calibration", "gold") for text in load_split(task, name).payloads}
    store = written(tmp_path / "store", 0, GOLD[:200] + STREAM[:150])
    code, _, err = kcm("distill", gold_run, "--store", store, "--out", tmp_path / "r", "--json")
    assert code in (0, 6), err
    new = load_run(tmp_path / "r")
    assert not set(new.payloads) & {text for text, _ in GOLD}
    assert new.metrics["teacher_rows"] == sum(not reserved(text) for text, _ in STREAM[:150])


def test_gold_that_was_trained_on_is_refused(kcm: Kcm, gold_run: Path, with_gold: Path, right_store: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(with_gold, tmp_path / "task")
    write_csv(folder / "gold.csv", [*GOLD[:20], *sentences(SIZES["train"], 0)[:3]])
    info = json.loads((gold_run / "run.json").read_text(encoding="utf-8"))
    info["task"]["root"] = str(folder)
    (gold_run / "run.json").write_text(json.dumps(info), encoding="utf-8")
    code, _, err = kcm("distill", gold_run, "--store", right_store, "--out", tmp_path / "r")
    assert code == 4 and "3 text(s) of gold.csv are in train.csv" in err
    assert not (tmp_path / "r").exists()


def test_a_method_can_be_named(kcm: Kcm, tiny_run_dir: Path, right_store: Path, tmp_path: Path) -> None:
    code, _, err = kcm("distill", tiny_run_dir, "--store", right_store, "--out", tmp_path / "r", "--method", "mcm")
    assert code == 0, err
    new = load_run(tmp_path / "r")
    assert new.metrics["method"] == new.task.distill.method == "mcm" and new.judge.spec.kind == "mlp"
    code, _, err = kcm("distill", tiny_run_dir, "--store", right_store, "--out", tmp_path / "x", "--method", "cmk")
    assert code == 3 and "choose from d, kd, mcm, kcm" in err


def test_an_unknown_teacher_and_a_missing_store_are_named(kcm: Kcm, tiny_run_dir: Path, right_store: Path, tmp_path: Path) -> None:
    command = ("distill", tiny_run_dir, "--out", tmp_path / "r", "--store")
    code, _, err = kcm(*command, right_store, "--teacher", "nope")
    assert code == 9 and "no row of teacher 'nope', but of rule (400 rows)" in err and "fix: --teacher rule" in err
    code, _, err = kcm(*command, tmp_path / "none")
    assert code == 9 and "none is no folder" in err
    assert not (tmp_path / "r").exists()


def test_ctrl_c_after_the_run_says_where_it_is(
    kcm: Kcm, tiny_run_dir: Path, right_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    command = ("distill", tiny_run_dir, "--store", right_store, "--bundle", tmp_path / "b", "--out")
    with monkeypatch.context() as patch:
        patch.setattr("export.bundle.export_bundle", cut)
        code, _, err = kcm(*command, tmp_path / "r")
    assert code == 130
    assert err.splitlines()[-1] == (
        f"interrupted; the new run is in {tmp_path / 'r'}, no bundle was written; kcm export {tmp_path / 'r'} --out {tmp_path / 'b'}"
    )
    assert load_run(tmp_path / "r").info.round == 1 and not (tmp_path / "b").exists()
    monkeypatch.setattr("training.program.distil_run", cut)
    code, _, err = kcm(*command, tmp_path / "r2")
    assert code == 130 and err.splitlines()[-1] == f"interrupted; no run was written, {tiny_run_dir} is as it was"


def test_caps_of_the_task_hold(kcm: Kcm, tiny_run_dir: Path, right_store: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_run_dir, tmp_path / "run")
    info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    info["task"]["distill"] |= {"per_class": 20}
    (folder / "run.json").write_text(json.dumps(info), encoding="utf-8")
    code, _, err = kcm("distill", folder, "--store", right_store, "--out", tmp_path / "r", "--no-gate")
    assert code == 0 and "120 of the 400 rows" in err
    taught = load_run(tmp_path / "r").targets[SIZES["train"] :].argmax(1)
    assert np.bincount(taught).tolist() == [20] * 6


@pytest.mark.slow
def test_with_the_large_model_the_gate_compares_whole_systems(
    kcm: Kcm, gold_run: Path, with_gold: Path, right_store: Path, tmp_path: Path
) -> None:
    real_model("minilm")
    assert kcm("train-large", "--task", with_gold, "--out", tmp_path / "large")[0] == 0
    code, out, err = kcm("distill", gold_run, "--store", right_store, "--out", tmp_path / "r", "--large", tmp_path / "large")
    assert code == 0, err
    verdict = msgspec.json.decode((tmp_path / "r" / "metrics.json").read_bytes())["gate"]
    assert verdict["figures"]["same calls"]["cloud_rate"] == 0.3
    assert "; same calls " in out
    assert verdict["figures"]["same calls"]["before"] > verdict["figures"]["gold"]["before"]


@pytest.mark.slow
def test_simulate_prints_the_papers_rows(kcm: Kcm, with_gold: Path, tmp_path: Path) -> None:
    real_model("minilm")
    command = ("simulate", "--task", with_gold, "--seeds", "1", "--rounds", "1", "--no-floor")
    code, out, err = kcm(*command, "--methods", "d,kd, mcm,kcm", "--out", tmp_path / "s.json")
    assert code == 0, err
    whole = json.loads((tmp_path / "s.json").read_text())
    assert list(whole["methods"]) == ["d", "kd", "mcm", "kcm"] and set(whole["paired"]) == {f"kcm_minus_{m}" for m in ("d", "kd", "mcm")}
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("+ ")] == [["+", name] for name in ("D", "KD", "MCM", "KCM")]
    assert "KCM − D: small " in out
    code, out, _ = kcm(*command, "--methods", "kd", "--json")
    alone = json.loads(out)
    assert alone["method"] == "kd" and alone["mean"] == whole["methods"]["kd"]["mean"]
    code, _, err = kcm(*command, "--methods", "kd,cd")
    assert code == 3 and "'cd' is unknown" in err
