"""What a verb may replace: its own kind of folder, when asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from kcm.app.folders import claim
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
