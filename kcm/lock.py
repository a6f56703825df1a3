"""A file that one process at a time may hold. The kernel drops the lock with the process, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from kcm.errors import StoreError


@contextlib.contextmanager
def exclusive(path: Path, *, taken: str, fix: str) -> Iterator[None]:
    """Hold `path` for this process alone; made if it isn't there, its folder too.

    Args:
        taken, fix: the error where another process holds it, and what the user can do then.

    Raises:
        StoreError: another process holds it, or the folder can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"{path.parent} can't be written: {error.strerror}", fix="check the disk and the folder's owner") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(taken, fix=fix) from None
        yield
    finally:
        os.close(descriptor)
