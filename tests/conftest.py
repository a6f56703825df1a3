"""Its place puts tests/ on the import path: the kits that several test files share lie here, and the run that they share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from training.run import Run


@pytest.fixture(scope="session")
def tiny_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small text task: task.toml and its five files. Read only."""
    from tiny_kit import write_tiny_task

    return write_tiny_task(tmp_path_factory.mktemp("tiny") / "task")


@pytest.fixture(scope="session")
def tiny_run_dir(tiny_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of round 0 on the tiny task, saved, its ε calibrated for 30 % calls. Read only."""
    from dataclasses import replace

    import torch

    from kcm.task import load_task
    from training.calibrate import for_rate
    from training.data import load_split
    from training.program import train_run
    from training.run import save_run
    from training.small import Ngrams

    torch.set_num_threads(1)
    task = load_task(tiny_task)
    run = train_run(task, Ngrams(task, None), load_split(task, "train"), load_split(task, "test"), seed=0, progress=lambda _: None)
    folder = tmp_path_factory.mktemp("runs") / "run"
    save_run(folder, replace(run, threshold=for_rate(run.judge.confidence(run.out_of_fold), 0.3)))
    return folder


@pytest.fixture
def tiny_run(tiny_run_dir: Path) -> Run:
    """That run, read anew for each test."""
    from training.run import load_run

    return load_run(tiny_run_dir)


@pytest.fixture(scope="session")
def bundle_dir(tiny_run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run as a bundle. Read only: copy it before a change."""
    from export.bundle import export_bundle
    from training.run import load_run

    run = load_run(tiny_run_dir)
    out = tmp_path_factory.mktemp("bundles") / "bundle"
    export_bundle(run, out, golden_payloads=run.payloads)
    return out


@pytest.fixture
def kcm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the program in this process: (exit code, stdout, stderr)."""
    from kcm.app.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kcm", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        out, err = capsys.readouterr()
        return code, out, err

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real processes take their time: each of these tests a second or so, all of them a minute and a half of a quick run's three."""
    for item in items:
        if {"integration", "ux"} & set(item.path.parts):
            item.add_marker(pytest.mark.slow)
