"""What a verb may replace: its own kind of folder, when asked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kcm.app.folders import claim, claim_file, claim_run, writable
from kcm.errors import ConfigError


def test_a_new_and_an_empty_folder_are_free(tmp_path: Path) -> None:
    assert claim(tmp_path / "a" / "b", "run.json", force=False).parent.is_dir()
    (tmp_path / "empty").mkdir()
    claim(tmp_path / "empty", "run.json", force=False)


def test_only_its_own_kind_is_replaced_and_only_by_force(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
        (folder / "something").touch()
    (run / "run.json").touch()
    with pytest.raises(ConfigError, match="exists") as error:
        claim(run, "run.json", force=False)
    assert "--force" in error.value.fix
    claim(run, "run.json", force=True)
    with pytest.raises(ConfigError, match="not replaced"):
        claim(other, "run.json", force=True)


def test_files_and_the_current_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        claim(tmp_path / "file", "run.json", force=True)
    monkeypatch.chdir(tmp_path)
    for out in (Path(), Path("..")):
        with pytest.raises(ConfigError, match="current folder"):
            claim(out, "run.json", force=True)
    with pytest.raises(ConfigError, match="can't be made"):
        claim(tmp_path / "file" / "below" / "x", "run.json", force=False)


@pytest.mark.parametrize("place", ["file/x", "file/below/x", "/proc/kcm", "/proc/kcm/x"])
def test_what_can_not_be_made_is_said_and_nothing_is_left_behind(tmp_path: Path, place: str) -> None:
    """A parent that is a file, and a folder that refuses even an administrator."""
    (tmp_path / "file").touch()
    for check in (writable, lambda out: claim(out, "run.json", force=True), lambda out: claim_file(out / "x.json")):
        with pytest.raises(ConfigError, match="can't be made") as error:
            check(tmp_path / place)
        assert "folder that you may write" in error.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_can_be_made_is_not_made_yet(tmp_path: Path) -> None:
    assert writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    (tmp_path / "there").mkdir()
    writable(tmp_path / "there")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file"):
        writable(tmp_path / "file")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="nowhere can't be written"):
        writable(tmp_path / "nowhere")


def test_a_folder_that_only_its_owner_may_write_is_refused(read_only: Path) -> None:
    for out in (read_only, read_only / "run", read_only / "a" / "b"):
        with pytest.raises(ConfigError, match="Permission denied"):
            claim(out, "run.json", force=False)


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that this process may read, not write; an administrator becomes nobody meanwhile."""
    with tempfile.TemporaryDirectory() as scratch:  # pytest's own folders are closed to others
        folder = Path(scratch) / "folder"
        folder.mkdir(mode=0o555)
        Path(scratch).chmod(0o755)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(user)


def test_a_run_without_a_folder_goes_below_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    claim_run(None, "train", "run.json", force=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "runs").touch()
    with pytest.raises(ConfigError, match="runs is a file"):
        claim_run(None, "train", "run.json", force=False)
    claim_run(tmp_path / "run", "train", "run.json", force=False)
    with pytest.raises(ConfigError, match="runs is a file"):
        claim_run(tmp_path / "runs", "train", "run.json", force=False)


def test_a_result_of_ours_is_replaced_and_no_other_file(tmp_path: Path) -> None:
    for text in ("", '{"schema": 1, "task": "t"}'):
        (tmp_path / "ours.json").write_text(text)
        assert claim_file(tmp_path / "ours.json").read_text() == text
    for text in ("[task]\n", "[1]", '{"mine": 1}', "\x00"):
        (tmp_path / "other").write_text(text)
        with pytest.raises(ConfigError, match="is not replaced"):
            claim_file(tmp_path / "other")
    with pytest.raises(ConfigError, match="is a folder"):
        claim_file(tmp_path)
    assert claim_file(tmp_path / "new" / "x.json").parent.is_dir()
