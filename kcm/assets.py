"""Where fetched models and tasks lie: a cache folder, and what `kcm fetch` puts in it. Nothing is downloaded here."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from kcm.errors import ConfigError

MODELS = ("minilm", "smollm2", "efficientnet-lite0")
TASKS = ("r52", "20newsgroups", "emoji-i2t", "emoji-t2i")


def cache_dir() -> Path:
    """$KCM_CACHE, else $XDG_CACHE_HOME/kcm, else ~/.cache/kcm."""
    if explicit := os.environ.get("KCM_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kcm"


def file_sha256(path: Path) -> str:
    """As hashlib.file_digest, which Python 3.10 lacks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def model_path(name_or_path: str, base: str = ".") -> Path:
    """The folder of a fetched model by name, or of the user's own by a path that is relative to `base`.

    Raises:
        ConfigError: neither is there.
    """
    folder = cache_dir() / "models" / name_or_path if name_or_path in MODELS else Path(base) / name_or_path
    if not folder.is_dir():
        fix = f"kcm fetch {name_or_path}" if name_or_path in MODELS else f"give a folder, or one of {', '.join(MODELS)}"
        raise ConfigError(f"model {name_or_path!r} is not at {folder}", fix=fix)
    return folder


def task_path(name_or_path: str) -> Path:
    """The task.toml of a fetched task by name, or of the user's own by path (file or folder).

    Raises:
        ConfigError: neither is there.
    """
    if name_or_path in TASKS and not Path(name_or_path).exists():
        folder = cache_dir() / "tasks" / name_or_path
        if not (folder / "task.toml").exists():
            asset = "emoji" if name_or_path.startswith("emoji-") else name_or_path  # one fetch makes both directions
            raise ConfigError(f"task {name_or_path!r} is not fetched yet", fix=f"kcm fetch {asset}")
        return folder / "task.toml"
    path = Path(name_or_path)
    path = path / "task.toml" if path.is_dir() else path
    if not path.exists():
        raise ConfigError(f"task {name_or_path!r}: {path} does not exist", fix=f"give a task.toml, or one of {', '.join(TASKS)}")
    return path
