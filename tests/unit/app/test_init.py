"""`kcm init`: a task.toml that says what the user's files hold, whatever their labels are called."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_kit import LABELS, SIZES, write_csv, write_tiny_files

from kcm.app.cli import main
from kcm.app.fetch import Recipe, write_task
from kcm.app.init import write_task_toml
from kcm.errors import ConfigError, DataError
from kcm.task import PromptSpec, load_task
from training.data import load_split

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda t: bool(t.strip()))
nasty = st.sampled_from(
    ['a "quoted" one', "back\\slash", "\\u0041", "new\nline", "tab\t", "\x7f", "\x00", "{braces}", "'''", '"""', "# no", "ü🙂"]
)


def init(*arguments: str | Path) -> None:
    sys.argv = ["kcm", "init", *map(str, arguments)]
    code: object = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    assert not code


@pytest.fixture(autouse=True)
def arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(labels=st.lists(names | nasty, min_size=2, max_size=6, unique=True), columns=st.lists(names | nasty, min_size=2, max_size=2))
def test_labels_and_columns_of_any_name_read_back(tmp_path: Path, labels: list[str], columns: list[str]) -> None:
    files = {"train": f"{columns[0]}.csv", "test": "../größer/t 1.jsonl"}
    write_task_toml(tmp_path, "t", labels, files, text_column=columns[0], label_column=columns[1])
    task = load_task(tmp_path)
    assert list(task.labels) == labels
    assert [task.data.text_column, task.data.label_column] == columns
    assert (task.data.train, task.data.test, task.data.stream) == (files["train"], files["test"], "")


def test_the_commented_file_holds_the_defaults(tmp_path: Path) -> None:
    """A value in the template that isn't the default would be a second default."""
    write_task_toml(tmp_path, "t", ["a", "b"], {"train": "x.csv"})
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "task.toml").write_text('[task]\nid = "t"\nlabels = ["a", "b"]\n[data]\ntrain = "x.csv"\n')
    written, bare = load_task(tmp_path), load_task(tmp_path / "bare")
    assert written.shipped() == bare.shipped()
    assert written.data == bare.data
    lines = (tmp_path / "task.toml").read_text().splitlines()
    assert [line for line in lines if line.startswith("hint_dropout = 0.0 ") and "# 0: it never sees a hint" in line]


def test_all_five_files_are_described_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_tiny_files(tmp_path / "data")
    flags = [part for split, path in files.items() for part in (f"--{split.replace('_', '-')}", str(path))]
    init(tmp_path / "my task", *flags)
    task = load_task(tmp_path / "my task")
    assert (task.id, task.labels) == ("my-task", LABELS)
    assert task.data.stream == "../data/stream.csv"
    assert len(load_split(task, "train")) == SIZES["train"]
    out = capsys.readouterr().out
    assert "6 labels" in out and "stream 400" in out and f"next: kcm simulate --task {tmp_path / 'my task'}" in out


def test_the_folder_can_be_moved_with_its_data(tmp_path: Path) -> None:
    write_tiny_files(tmp_path / "a")
    init(tmp_path / "a", "--train", tmp_path / "a" / "train.csv")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert len(load_split(load_task(tmp_path / "b"), "train")) == SIZES["train"]


def test_labels_of_the_large_models_file_count_too(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "t.csv", [("x", "a"), ("y", "b")])
    large = write_csv(tmp_path / "l.csv", [("x", "a"), ("z", "c")])
    init(tmp_path / "task", "--train", train, "--large-train", large)
    assert load_task(tmp_path / "task").labels == ("a", "b", "c")


def test_an_existing_task_is_not_overwritten(tmp_path: Path) -> None:
    train = write_csv(tmp_path / "t.csv", [("x", "a"), ("y", "b")])
    init(tmp_path / "task", "--train", train)
    file = tmp_path / "task" / "task.toml"
    file.write_text(own := file.read_text() + "# edited by hand\n")
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == ConfigError.exit_code
    assert file.read_text() == own
    init(tmp_path / "task", "--train", train, "--force")
    assert file.read_text() != own


@pytest.mark.parametrize("existing", [True, False])
def test_bad_data_leaves_things_as_they_were(tmp_path: Path, existing: bool) -> None:
    good = write_csv(tmp_path / "t.csv", [("x", "a"), ("y", "b")])
    bad = write_csv(tmp_path / "test.csv", [("x", "unheard of")])
    file = tmp_path / "task" / "task.toml"
    if existing:
        init(tmp_path / "task", "--train", good)
        file.write_text("# mine\n")
    sys.argv = ["kcm", "init", str(tmp_path / "task"), "--train", str(good), "--test", str(bad), "--force"]
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == DataError.exit_code
    assert (file.read_text() if file.exists() else None) == ("# mine\n" if existing else None)


@pytest.mark.parametrize("folder", ["___", "日本", "a.b_c-d", "x y/z"])
def test_a_folder_of_any_name_makes_a_valid_id(tmp_path: Path, folder: str) -> None:
    train = write_csv(tmp_path / "t.csv", [("x", "a"), ("y", "b")])
    init(tmp_path / folder, "--train", train)
    assert load_task(tmp_path / folder).id


def corpus(rows: int, seed: int) -> list[tuple[str, str]]:
    return [(f"text {seed} {i}", f"label {i % 7}") for i in range(rows)]


def test_a_built_in_task_is_split_the_same_way_everywhere(tmp_path: Path) -> None:
    """Two machines that fetch one corpus must train on the same rows."""
    recipe = Recipe(("", ""), 3, 60, 20, "A corpus")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_task(tmp_path / name, "corpus", recipe, corpus(200, 0), [*corpus(50, 1), ("odd", "unknown label")])
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_the_splits_of_a_built_in_task_keep_their_promises(tmp_path: Path) -> None:
    write_task(tmp_path, "corpus", Recipe(("", ""), 3, 60, 20, "A corpus"), corpus(200, 0), [*corpus(50, 1), ("odd", "unknown label")])
    task = load_task(tmp_path)
    parts = {name: load_split(task, name) for name in ("train", "large_train", "stream", "calibration", "test")}
    texts = {name: set(part.payloads) for name, part in parts.items()}
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 21,
        "large_train": 60,
        "stream": 140,
        "calibration": 20,
        "test": 30,
    }
    assert texts["train"] < texts["large_train"]
    for one, other in (("large_train", "stream"), ("calibration", "test"), ("stream", "test"), ("large_train", "calibration")):
        assert not texts[one] & texts[other], (one, other)
    assert sorted(set(parts["train"].y.tolist())) == list(range(7))


def test_the_prompts_that_it_shows_are_the_defaults(tmp_path: Path) -> None:
    write_task_toml(tmp_path, "t", ["a", "b"], {"train": "t.csv"})
    assert load_task(tmp_path).prompt == PromptSpec()
    shown = (tmp_path / "task.toml").read_text()
    assert all(f"\n{name} = " in shown for name in PromptSpec.__struct_fields__)
