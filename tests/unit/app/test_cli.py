"""`kcm VERB` as its users meet it: found quickly, explained, and failing with a message and a number."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest
from tiny_kit import sentences, write_csv

from kcm.errors import (
    BundleError,
    ConfigError,
    DataError,
    KcmError,
    MissingExtraError,
    StoreError,
    UnavailableError,
    VerifyError,
    require,
)

VERBS = sorted(entry.name for entry in entry_points(group="kcm.verbs"))
HEAVY = ("torch", "onnxruntime", "grpc", "transformers", "onnx", "sklearn", "scipy", "pyarrow", "matplotlib", "numpy", "apsw")
Kcm = Callable[..., tuple[int, str, str]]


def test_help_lists_every_verb(kcm: Kcm) -> None:
    code, out, _ = kcm("--help")
    assert code == 0
    listed = {line.split()[0] for line in out.split("Commands:")[1].splitlines() if line.strip()}
    assert listed == set(VERBS)
    assert "Exit codes" in out and "kcm demo" in out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(kcm: Kcm, verb: str) -> None:
    code, out, _ = kcm(verb, "--help")
    assert code == 0
    assert f"kcm {verb}" in out and "--help" in out
    assert len(out.split("Options:")[0].strip().splitlines()) > 2, "a verb needs a line that says what it does"


def test_help_imports_nothing_heavy() -> None:
    """What makes the first second of a command line; a clock would blame the machine instead."""
    program = "import sys, kcm.app.cli as c; c.build(); print([m for m in sys.argv[1:] if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program, *HEAVY], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [[str(Path(sys.executable).with_name("kcm"))], [sys.executable, "-m", "kcm.app"]])
def test_the_installed_program_and_the_module_say_the_version(command: list[str]) -> None:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == version("kcm")


def test_wrong_usage_is_2_and_names_it(kcm: Kcm) -> None:
    for arguments in (["trian"], ["train"], ["train", "--tusk", "x"], ["calibrate", "run", "--cloud-rate", "1.5"]):
        code, _, err = kcm(*arguments)
        assert code == 2, arguments
        assert "Usage:" in err or "Error" in err


def test_each_error_has_its_own_exit_code() -> None:
    tree = [KcmError, ConfigError, DataError, BundleError, VerifyError, MissingExtraError, UnavailableError, StoreError]
    assert [kind.exit_code for kind in tree] == [1, 3, 4, 5, 6, 7, 8, 9]
    assert str(DataError("what", fix="how")) == "what\n  fix: how"


def test_a_missing_extra_says_what_to_install() -> None:
    with pytest.raises(MissingExtraError, match="not installed") as error:
        require("no_such_module_here", "train")
    assert error.value.fix == "pip install 'kcm[train]'"


def test_an_unknown_task_is_3_with_the_way_out(kcm: Kcm, tmp_path: Path) -> None:
    code, out, err = kcm("train", "--task", str(tmp_path / "none"))
    assert (code, out) == (3, "")
    assert err.startswith("error: ") and "does not exist" in err and "fix: " in err
    assert "Traceback" not in err


def test_a_task_that_is_not_fetched_says_how(kcm: Kcm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCM_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    code, _, err = kcm("train", "--task", "r52")
    assert code == 3 and "fix: kcm fetch r52" in err


def test_a_small_model_whose_vectors_are_not_fetched_says_how(
    kcm: Kcm, tiny_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KCM_CACHE", str(tmp_path))
    task = shutil.copytree(tiny_task, tmp_path / "task")
    text = (task / "task.toml").read_text(encoding="utf-8")
    (task / "task.toml").write_text(text.replace('vectors = ""', 'vectors = "minilm"'), encoding="utf-8")
    code, _, err = kcm("train", "--task", str(task), "--out", str(tmp_path / "run"))
    assert code == 3 and "fix: kcm fetch minilm" in err


def test_a_bad_row_is_4_with_file_and_line_and_json_errors_are_json(kcm: Kcm, tiny_task: Path, tmp_path: Path) -> None:
    task = shutil.copytree(tiny_task, tmp_path / "task")
    with (task / "train.csv").open("a", encoding="utf-8") as file:
        file.write("a text,no such label\n")
    code, out, err = kcm("train", "--task", str(task), "--out", str(tmp_path / "run"), "--json")
    assert code == 4
    error = json.loads(out)
    assert error["error"] == "DataError" and "train.csv:74: unknown label 'no such label'" in error["message"]
    assert error["fix"] and error["message"] in err
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_none_is_3_and_a_store_that_is_none_is_9(kcm: Kcm, tiny_run_dir: Path, tmp_path: Path) -> None:
    assert kcm("calibrate", str(tmp_path), "--cloud-rate", "0.3")[0] == 3
    assert kcm("export", str(tmp_path), "--out", str(tmp_path / "b"))[0] == 3
    code, _, err = kcm("distill", str(tiny_run_dir), "--store", str(tmp_path), "--out", str(tmp_path / "r"))
    assert code == 9 and "kcm store compact" in err


def test_calibrate_wants_one_target(kcm: Kcm, tiny_run_dir: Path) -> None:
    for flags in ([], ["--cloud-rate", "0.3", "--epsilon", "0.5"]):
        code, _, err = kcm("calibrate", str(tiny_run_dir), *flags)
        assert code == 3 and "choose one of" in err
    code, _, err = kcm("calibrate", str(tiny_run_dir), "--accuracy", "0.9")
    assert code == 3 and "--large FOLDER" in err


def test_calibrate_reads_the_rate_off_fresh_traffic_and_keeps_it(kcm: Kcm, tiny_run_dir: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run_dir, tmp_path / "run")
    code, out, _ = kcm("calibrate", str(run), "--cloud-rate", "0.2", "--json")
    said = json.loads(out)
    assert code == 0 and said["source"] == "400 fresh samples of the stream"
    assert said["cloud_rate"] == pytest.approx(0.2, abs=0.005) and said["cloud_rate_interval"][0] < 0.2 < said["cloud_rate_interval"][1]
    assert said["curve"]["0.2"]["epsilon"] == pytest.approx(said["epsilon"])
    values = [at["epsilon"] for at in said["curve"].values()]
    assert values == sorted(values) and (values[0], values[-1]) == (-1.0, 1.0)
    assert json.loads((run / "calibration.json").read_text())["epsilon"] == said["epsilon"]
    code, out, _ = kcm("calibrate", str(run), "--epsilon", "0.98")
    assert code == 0 and out.startswith("ε = 0.9800: ") and "next: kcm export" in out


def test_verify_is_6_where_the_graph_was_changed(kcm: Kcm, tiny_run_dir: Path, bundle_dir: Path, tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    from kcm.bundle import GraphSpec, write_manifest
    from kcm.task import load_task

    code, out, _ = kcm("verify", str(bundle_dir), "--run", str(tiny_run_dir), "--json")
    assert code == 0 and json.loads(out)["samples"] == 200 and json.loads(out)["labels"] == 0

    changed = shutil.copytree(bundle_dir, tmp_path / "changed")
    path = changed / "models" / "fp32.onnx"
    model = onnx.load_model_from_string(path.read_bytes())
    table = max(model.graph.initializer, key=lambda t: len(t.raw_data) * (t.data_type == onnx.TensorProto.FLOAT))
    table.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(table), table.name))
    path.write_bytes(model.SerializeToString())
    assert kcm("verify", str(changed), "--run", str(tiny_run_dir))[0] == 5, "its hash is wrong"
    write_manifest(changed, task=load_task(changed), graph=GraphSpec(inputs={"ids": 1}, candidates=5), version="0")
    code, _, err = kcm("verify", str(changed), "--run", str(tiny_run_dir))
    assert code == 6 and "answers differ" in err and "logits differ" in err


def test_verify_takes_texts_of_any_kind(kcm: Kcm, tiny_run_dir: Path, bundle_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "block card"}\n{"text": "東京"}\n')
    code, out, _ = kcm("verify", str(bundle_dir), "--run", str(tiny_run_dir), "--texts", str(tmp_path / "t.jsonl"))
    assert code == 0 and out.startswith("2 samples: ")


def test_export_refuses_to_overwrite_and_takes_a_bundle_back_that_is_not_verified(
    kcm: Kcm, tiny_run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = shutil.copytree(tiny_run_dir, tmp_path / "run"), tmp_path / "bundle"
    code, said, _ = kcm("export", str(run), "--out", str(out), "--json")
    assert code == 0
    assert (run / "bundle_id").read_text() == json.loads(said)["bundle_id"] == json.loads((out / "manifest.json").read_text())["bundle_id"]
    assert kcm("export", str(run), "--out", str(out))[0] == 3
    assert kcm("export", str(run), "--out", str(out), "--force")[0] == 0
    monkeypatch.setattr("export.verify.LOGITS", -1.0)  # nothing agrees this well
    assert kcm("export", str(run), "--out", str(tmp_path / "bad"))[0] == 6
    assert not (tmp_path / "bad").exists()


def test_fetch_without_names_lists_what_there_is(kcm: Kcm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCM_CACHE", str(tmp_path))
    (tmp_path / "models" / "minilm").mkdir(parents=True)
    code, out, _ = kcm("fetch")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0 and set(lines) == {"minilm", "smollm2", "efficientnet-lite0", "r52", "20newsgroups", "emoji"}
    assert " fetched " in lines["minilm"] and "not fetched" in lines["r52"]
    assert all("==" in line and "MB" in line for line in lines.values()), "it names what it installs"
    assert kcm("fetch", "minilm")[1] == f"minilm: already at {tmp_path / 'models' / 'minilm'}\n"


def test_fetch_of_an_unknown_name_fetches_nothing(kcm: Kcm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCM_CACHE", str(tmp_path))
    code, out, err = kcm("fetch", "r52", "bert")
    assert code == 4 and "unknown asset 'bert'" in err and "smollm2" in err
    assert out == "" and not list(tmp_path.iterdir())


def test_train_numbers_its_runs_and_says_what_comes_next(
    kcm: Kcm, tiny_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = kcm("train", "--task", str(tiny_task))
    assert code == 0 and "next: kcm calibrate runs/train/1 --cloud-rate" in out
    assert "test: small model " in out and "judge" in out
    assert "folds" in err, "progress goes to stderr"
    code, out, _ = kcm("train", "--task", str(tiny_task), "--json")
    said = json.loads(out)
    assert said["run"] == "runs/train/2" and said["test"]["samples"] == 200
    metrics = json.loads((tmp_path / "runs" / "train" / "1" / "metrics.json").read_text())
    assert metrics["test"] == said["test"]


def test_a_label_without_a_row_is_said(kcm: Kcm, tiny_task: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_task, tmp_path / "t")
    toml = tmp_path / "t" / "task.toml"
    toml.write_text(toml.read_text().replace("labels = [", 'labels = ["nobody", ', 1))
    code, _, err = kcm("train", "--task", tmp_path / "t", "--out", tmp_path / "run")
    assert code == 0 and "warning: 1 label(s) have no row in train" in err and "nobody" in err


PROGRAM = str(Path(sys.executable).with_name("kcm"))
NOWHERE = "/proc/kcm"  # refuses even an administrator


def test_what_can_not_be_written_is_3_before_the_work(kcm: Kcm, tiny_task: Path, tiny_run_dir: Path, tmp_path: Path) -> None:
    """Every verb that writes, and no step of its work before the word; a result that isn't ours stays."""
    run = shutil.copytree(tiny_run_dir, tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    commands = [
        ("train", "--task", tiny_task),
        ("train-large", "--task", tiny_task),
        ("export", run),
        ("judge", "show", run),
        ("eval", run, "--large", tmp_path),
        ("distill", run, "--store", tmp_path),
        ("simulate", "--task", tiny_task),
    ]
    for command in commands:
        for out in (tmp_path / "file" / "x" / "y", f"{NOWHERE}/x"):
            code, printed, err = kcm(*command, "--out", out)
            assert (code, printed) == (3, ""), (command, err)
            assert err.startswith("error: ") and "can't be made" in err and "folder that you may write" in err, (command, err)
    code, _, err = kcm("distill", run, "--store", tmp_path, "--out", tmp_path / "r", "--bundle", f"{NOWHERE}/b")
    assert code == 3 and "can't be made" in err
    code, _, err = kcm("judge", "show", run, "--prune", "0.1", "--save", f"{NOWHERE}/b")
    assert code == 3 and "can't be made" in err
    code, _, err = kcm("simulate", "--task", tiny_task, "--out", tmp_path / "file")
    assert code == 3 and err.startswith("error: ") and "is not replaced" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"] and (tmp_path / "file").read_text() == "mine"


def test_without_out_the_runs_folder_is_checked_before_the_work(
    kcm: Kcm, tiny_task: Path, tiny_run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    for command in (
        ("train", "--task", tiny_task),
        ("eval", tiny_run_dir, "--large", tmp_path),
        ("distill", tiny_run_dir, "--store", tmp_path),
    ):
        code, _, err = kcm(*command)
        assert code == 3 and err.startswith("error: runs/") and "runs is a file" in err, (command, err)


def test_a_task_or_cache_folder_that_can_not_be_made_is_3(
    kcm: Kcm, tiny_task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = kcm("init", f"{NOWHERE}/task", "--train", tiny_task / "train.csv")
    assert code == 3 and "can't be made" in err
    (tmp_path / "task.toml").mkdir()
    code, _, err = kcm("init", tmp_path, "--train", tiny_task / "train.csv", "--force")
    assert code == 3 and "task.toml is a folder" in err
    monkeypatch.setenv("KCM_CACHE", NOWHERE)
    code, out, err = kcm("fetch", "minilm")
    assert (code, out) == (3, "") and "the cache: " in err and "fix: export KCM_CACHE=FOLDER" in err


def test_calibrate_of_a_run_that_can_not_be_written_is_3_before_the_work(kcm: Kcm, tiny_run_dir: Path) -> None:
    with as_reader(tiny_run_dir) as run:
        for command in (("calibrate", run, "--cloud-rate", "0.3"), ("export", run, "--out", run.parent / "open" / "b")):
            code, out, err = kcm(*command)
            assert (code, out) == (3, "") and err.startswith("error: ") and "Permission denied" in err, err


@contextmanager
def as_reader(source: Path) -> Iterator[Path]:
    """A copy of a folder that this process may read, not write; an administrator becomes nobody meanwhile."""
    with tempfile.TemporaryDirectory() as scratch:  # pytest's own folders are closed to others
        folder = Path(scratch) / "folder"
        shutil.copytree(source, folder)
        Path(scratch).chmod(0o755)
        (Path(scratch) / "open").mkdir()
        (Path(scratch) / "open").chmod(0o777)
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o444)
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(user)


def started(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    def default() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background ignores it, and so would its children

    command = [PROGRAM, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=default, **options)


def interrupted(process: subprocess.Popen[str], word: str) -> tuple[int, str]:
    """Ctrl-C once the verb says `word`: (exit code, the rest of stderr)."""
    assert process.stderr is not None
    for line in process.stderr:
        if word in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def test_ctrl_c_is_130_and_says_what_is_left(tiny_task: Path, tmp_path: Path) -> None:
    process = started("train", "--task", slow_task(tiny_task, tmp_path), "--out", tmp_path / "run")
    code, err = interrupted(process, "small model on")
    assert code == 130 and err.splitlines()[-1] == "interrupted; no run was written" and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def slow_task(source: Path, folder: Path) -> Path:
    """The task with so many rows that its fit lasts longer than a signal takes."""
    task = shutil.copytree(source, folder / "task")
    write_csv(task / "train.csv", sentences(12_000, seed=5))
    return task


def test_ctrl_c_in_the_middle_of_a_verb_carries_its_innermost_word(kcm: Kcm, monkeypatch: pytest.MonkeyPatch) -> None:
    from kcm.app.progress import left_behind

    def verb() -> None:
        with left_behind("all"), left_behind("a run in runs/1"):
            raise KeyboardInterrupt

    monkeypatch.setattr("kcm.app.fetch._target", lambda name: verb())
    assert kcm("fetch") == (130, "", "interrupted; a run in runs/1\n")
    code, out, _ = kcm("--help")
    assert code == 0 and "130 interrupted" in out and "141" in out


@pytest.mark.parametrize("command", [["--help"], ["fetch"], ["train", "--task", "none", "--json"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_went_away_ends_it_silently(command: list[str], unbuffered: str) -> None:
    process = started(*command, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(60), err) == (141, "")


def test_another_broken_pipe_is_a_bug_and_shows() -> None:
    program = """
import sys, kcm.app.cli, kcm.app.fetch
def broken(name):
    raise BrokenPipeError(32, "of a process")
kcm.app.fetch._target = broken
sys.argv = ["kcm", "fetch"]
kcm.app.cli.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "BrokenPipeError: [Errno 32] of a process"
