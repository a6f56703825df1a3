"""Folders that a verb may write: nothing of the user's is ever replaced unasked, nor anything that isn't ours."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from kcm.errors import ConfigError

RUNS = Path("runs")  # where runs go that nobody gave a folder


def claim(out: Path, marker: str, *, force: bool) -> Path:
    """`out`, once it is sure that it may be written: before the work begins, not after it.

    Args:
        marker: the file that says that a folder is of this kind; `force` replaces no other.

    Raises:
        ConfigError: it is a file or the current folder, can't be made or written, or holds something.
    """
    writable(out)
    if out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ConfigError(f"{out} holds the current folder", fix="give a folder of its own")
    if out.is_dir() and any(out.iterdir()):
        if not (out / marker).is_file():
            raise ConfigError(f"{out} holds other files (no {marker}): it is not replaced", fix="give an empty or a new folder")
        if not force:
            raise ConfigError(f"{out} exists", fix="--force replaces it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out.parent} can't be made: {error.strerror}", fix=_ELSEWHERE) from error
    return out


def claim_run(out: Path | None, verb: str, marker: str, *, force: bool) -> None:
    """The same for a verb that makes runs/<verb>/<n> once its work is done, unless it is given a folder."""
    if out is None:
        writable(RUNS / verb)
    else:
        claim(out, marker, force=force)


def claim_file(out: Path) -> Path:
    """`out`, once it is sure that a result in JSON may be written there: a new file, or our own of an earlier time.

    Raises:
        ConfigError: it is a folder or a file of something else, or can't be written.
    """
    writable(out.parent)
    if out.is_dir():
        raise ConfigError(f"{out} is a folder", fix=f"give a file: {out / 'result.json'}")
    if out.exists() and not _ours(out):
        raise ConfigError(f"{out} is no result of ours: it is not replaced", fix="give a new file")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def writable(folder: Path) -> Path:
    """`folder`, once it is sure that it can be made where it isn't there, and that files can be made in it. Leaves nothing behind.

    Permission bits don't tell (an administrator ignores them, a read-only file system does too): a nameless file is made.

    Raises:
        ConfigError: it can't.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    wrong = "can't be written" if there == folder else f"can't be made: no file can be written in {there}"
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except NotADirectoryError as error:
        raise ConfigError(
            f"{folder} can't be made: {there} is a file" if there != folder else f"{folder} is a file", fix=_ELSEWHERE
        ) from error
    except OSError as error:
        raise ConfigError(f"{folder} {wrong}: {os.strerror(error.errno or 0)}", fix=_ELSEWHERE) from error
    return folder


def _ours(file: Path) -> bool:
    """An empty file, or a JSON object with a schema's number."""
    try:
        text = file.read_text(encoding="utf-8")
        held = json.loads(text) if text.strip() else {"schema": 0}
    except (OSError, ValueError):
        return False
    return isinstance(held, dict) and "schema" in held


_ELSEWHERE = "give a folder that you may write"
