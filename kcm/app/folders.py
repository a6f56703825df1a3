"""Folders that a verb may write: nothing of the user's is ever replaced unasked, nor anything that isn't ours."""

from __future__ import annotations

from pathlib import Path

from kcm.errors import ConfigError


def claim(out: Path, marker: str, *, force: bool) -> Path:
    """`out`, once it is sure that it may be written: before the work begins, not after it.

    Args:
        marker: the file that says that a folder is of this kind; `force` replaces no other.

    Raises:
        ConfigError: it is a file or the current folder, can't be made, or holds something.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file", fix="give a folder")
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
        raise ConfigError(f"{out.parent} can't be made: {error.strerror}") from error
    return out
