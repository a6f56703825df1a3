"""What somebody sees who tries this for the first time, and what a script sees: one path, both ways."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_kit import without_vectors, write_tiny_files

KCM = str(Path(sys.executable).with_name("kcm"))


def kcm(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([KCM, *arguments], cwd=cwd, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("first")


def test_each_step_says_the_next_and_following_it_works(folder: Path) -> None:
    """Nobody should need a manual between `init` and a served bundle: the printed command is the next one."""
    write_tiny_files(folder / "data")
    said = kcm("init", "task", "--train", "data/train.csv", "--test", "data/test.csv", cwd=folder)
    without_vectors(folder / "task")
    seen = []
    for _ in range(3):
        assert said.returncode == 0 and "Traceback" not in said.stderr, said.stderr
        line = said.stdout.strip().splitlines()[-1]
        command = re.search(r"next: kcm (.+?)(?:, then|$)", line)
        assert command, f"no next step in {line!r}"
        seen.append(command[1].split()[0])
        said = kcm(*command[1].replace("BUNDLE", "bundle").split(), cwd=folder)
    assert seen == ["train", "calibrate", "export"]
    assert said.returncode == 0 and said.stdout.rstrip().endswith("next: kcm edge --bundle bundle")
    shown = kcm("edge", "--bundle", "bundle", "--dry-run", "--json", cwd=folder)
    assert json.loads(shown.stdout)["task_id"] == "task"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--task", "task"],
        ["calibrate", "runs/train/1", "--cloud-rate", "0.2"],
        ["export", "runs/train/1", "--out", "bundle", "--force"],
        ["verify", "bundle", "--run", "runs/train/1"],
        ["edge", "--bundle", "bundle", "--dry-run"],
        ["bundle", "verify-files", "bundle"],
        ["verify", "no-bundle", "--run", "runs/train/1"],
        ["train", "--task", "no-task"],
    ],
    ids=" ".join,
)
def test_with_json_stdout_is_one_object_and_nothing_else(folder: Path, arguments: list[str]) -> None:
    done = kcm(*arguments, "--json", cwd=folder)
    said = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert isinstance(said, dict) and done.stdout.count("\n") == 1
    assert ("error" in said) == (done.returncode != 0)


def test_off_a_terminal_there_are_no_control_characters(folder: Path) -> None:
    done = kcm("train", "--task", "task", cwd=folder)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stdout + done.stderr
    assert all(re.match(r"\[ *\d+\.\d s\] ", line) for line in done.stderr.splitlines()), done.stderr


def test_a_mistake_is_explained_in_few_lines(folder: Path) -> None:
    (folder / "bad.csv").write_text("text,label\nfine,a\n,b\n")
    done = kcm("init", "other", "--train", "bad.csv", cwd=folder)
    assert done.returncode == 4
    assert done.stderr == "error: bad.csv:3: 'text' is empty\n"
    assert not (folder / "other" / "task.toml").exists()
