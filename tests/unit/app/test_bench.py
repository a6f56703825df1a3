"""`kcm bench route` from a file to a table, JSON and a plot."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from kcm.app.cli import build
from kcm.errors import ConfigError, DataError

SYSTEMS = {"ours", "mlp", "forest", "ridge", "ridge_answer", "length", "random", "oracle"}
FIGURES = {"apgr", "apgr_exact", "cpt50", "cpt80", "cpt95"}


def write(path: Path, rows: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "weak_correct", "strong_correct", "weak_response", "subject"])
        for i in range(rows):
            a, b = rng.integers(100 * seed, 100 * seed + 99, 2).tolist()
            right = rng.random() < 0.6
            result = a + b + (0 if right else 3)
            writer.writerow([f"{a} and {b}, how many?", right, rng.random() < 0.9, f"<<{a}+{b}={result}>>\n#### {result}", "abc"[i % 3]])
    return path


def bench(*arguments: object) -> str:
    result = CliRunner().invoke(build("bench"), ["bench", "route", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
def test_cross_validation_prints_one_json_object_and_leaves_a_plot(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", 120, 1)
    said = json.loads(bench("--train", file, "--cv", 3, "--seeds", 2, "--json", "--out", tmp_path / "out"))
    assert set(said["systems"]) == SYSTEMS and all(set(said[name]) >= FIGURES for name in SYSTEMS)
    assert said["ours"]["apgr_exact"] > said["ridge"]["apgr_exact"] and said["paired"]["ours_minus_ridge"]["low"] > 0
    assert json.loads((tmp_path / "out" / "route.json").read_text())["ours"] == said["ours"]
    assert (tmp_path / "out" / "route.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_another_file_can_be_scored_and_the_table_names_every_system(tmp_path: Path) -> None:
    train, test = write(tmp_path / "a.csv", 150, 1), write(tmp_path / "b.csv", 80, 2)
    text = bench("--train", train, "--test", test)
    assert all(f"\n{name} " in text for name in SYSTEMS) and "fitted on a.csv, scored on b.csv" in text
    blind = bench("--train", train, "--test", test, "--no-answer")
    assert "ridge_answer" not in blind


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", 30, 1)
    with pytest.raises(ConfigError, match="'topic' is unknown"):
        bench("--train", file, "--group-by", "topic")
    with pytest.raises(ConfigError, match="nothing is left out"):
        bench("--train", file, "--test", file, "--group-by", "subject")
    with pytest.raises(DataError, match="can't be read"):
        bench("--train", tmp_path / "none.csv")
    with pytest.raises(DataError, match="3 groups can't be split into 5 folds"):
        bench("--train", file, "--group-by", "subject")
