"""The cache of built engines: KEY.plan with KEY.json beside it, in cache_dir()/engines; KEY.failed where building it failed.

A plan is code for the GPU. So it is made here, from a verified model, and never taken from a peer or out of a bundle; the folder is the
user's alone; and what doesn't match its sidecar and the machine in every point is refused, with the reason, and built anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kcm.assets import cache_dir
from kcm.errors import EngineError

_SCHEMA = 2  # 2: a largest length of each input
_OLD_S = 24 * 3600.0  # of a file that a write which never ended left behind
_SIDECAR_LIMIT = 2**16
_FAILURES_KEPT = 16


class PlanKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that makes one plan another one."""

    model: str  # sha256 of the ONNX bytes
    flavour: str  # tensorrt or tensorrt-rtx
    version: str  # the library's, in full: plans of one don't load in another
    target: str  # compute capability, and the GPU's name where the plan is tuned for it
    flags: tuple[str, ...]
    inputs: dict[str, int]  # with the largest length of each
    max_batch: int
    workspace_mb: int
    schema: int = _SCHEMA

    @property
    def name(self) -> str:
        """The file's."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


class Sidecar(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What lies beside a plan."""

    key: PlanKey
    sha256: str  # of the plan
    size: int
    seconds: float  # that building took
    created: str  # UTC, ISO 8601


class Failure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A build that failed: it isn't begun again at every start."""

    key: PlanKey
    reason: str
    created: str  # UTC, ISO 8601


class PlanCache:
    """Plans by key. Several processes may share it."""

    def __init__(self, folder: Path | None = None, keep: int = 4) -> None:
        """
        Args:
            folder: default cache_dir()/engines.
            keep: plans per flavour; beyond, those that were used longest ago go.
        """
        self.folder = folder or cache_dir() / "engines"
        self._keep = keep

    def why_not(self, key: PlanKey) -> str:
        """Why `read` would refuse; empty where it wouldn't."""
        try:
            self.read(key)
        except EngineError as error:
            return error.message
        return ""

    def read(self, key: PlanKey) -> bytes:
        """The plan, every byte checked.

        Raises:
            EngineError: none, damaged, or the folder isn't the user's alone; the message says which.
        """
        with self._open(fcntl.LOCK_SH) as folder:
            try:
                sidecar = msgspec.json.decode(_read(folder, f"{key.name}.json", _SIDECAR_LIMIT), type=Sidecar)
                if sidecar.key != key:
                    raise EngineError(f"its sidecar is of another engine: {_difference(sidecar.key, key)}")
                plan = _read(folder, f"{key.name}.plan", sidecar.size)
                if len(plan) != sidecar.size:
                    raise EngineError(f"its plan has {len(plan)} bytes, its sidecar says {sidecar.size}")
                if hashlib.sha256(plan).hexdigest() != sidecar.sha256:
                    raise EngineError("its plan is not the one that was built: another sha256")
            except FileNotFoundError as error:
                if str(error.filename).endswith(".plan"):
                    raise EngineError(f"the cached engine {key.name[:12]} is refused: its plan is gone") from None
                raise EngineError(self._none(folder, key)) from None
            except (EngineError, OSError, msgspec.DecodeError) as error:
                why = error.message if isinstance(error, EngineError) else f"it can't be read: {error}"
                raise EngineError(f"the cached engine {key.name[:12]} is refused: {why}") from None
            os.utime(f"{key.name}.json", dir_fd=folder)  # used now: pruning goes by that
            return plan

    def write(self, key: PlanKey, plan: bytes, seconds: float) -> Sidecar:
        """Keep a plan that was built here. Replaces the one of the same key; the oldest of its flavour go.

        Raises:
            EngineError: the folder can't be written, or isn't the user's alone.
        """
        digest = hashlib.sha256(plan).hexdigest()
        sidecar = Sidecar(key=key, sha256=digest, size=len(plan), seconds=round(seconds, 3), created=_now())
        with self._writing() as folder:
            # The plan first: a sidecar without its plan, or with another's, is refused.
            _replace(folder, f"{key.name}.plan", plan)
            _replace(folder, f"{key.name}.json", msgspec.json.format(msgspec.json.encode(sidecar), indent=1))
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{key.name}.failed", dir_fd=folder)
            os.fsync(folder)
            self._prune(folder, key)
        return sidecar

    def note_failure(self, key: PlanKey, reason: str) -> None:
        """Remember that building it failed, until a plan is written, or somebody removes the file. Raises as `write` does."""
        failure = Failure(key=key, reason=reason, created=_now())
        with self._writing() as folder:
            _replace(folder, f"{key.name}.failed", msgspec.json.format(msgspec.json.encode(failure), indent=1))
            for old in self._failures(folder)[:-_FAILURES_KEPT]:
                os.unlink(f"{old.key.name}.failed", dir_fd=folder)

    def failures(self) -> list[Failure]:
        """Builds that failed, the latest last. Raises EngineError: the folder can't be used, or isn't the user's alone."""
        if not self.folder.exists():
            return []
        with self._open(fcntl.LOCK_SH) as folder:
            return self._failures(folder)

    def failed(self, key: PlanKey) -> Failure | None:
        """Whether building it has failed here before."""
        return next((failure for failure in self.failures() if failure.key == key), None)

    def failure_file(self, key: PlanKey) -> Path:
        """Without it, the next start tries again."""
        return self.folder / f"{key.name}.failed"

    @staticmethod
    def _failures(folder: int) -> list[Failure]:
        found: list[Failure] = []
        for name in os.listdir(folder):
            if name.endswith(".failed"):
                with contextlib.suppress(OSError, EngineError, msgspec.DecodeError):
                    found.append(msgspec.json.decode(_read(folder, name, _SIDECAR_LIMIT), type=Failure))
        return sorted(found, key=lambda failure: failure.created)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[int]:
        with self._open(fcntl.LOCK_EX) as folder:
            try:
                yield folder
            except OSError as error:
                raise EngineError(
                    f"{self.folder} can't be written: {error.strerror}", fix="check the disk and the folder's owner"
                ) from error

    @contextlib.contextmanager
    def _open(self, lock: int) -> Iterator[int]:
        """The folder, checked and locked; a descriptor, so that what was checked is what is used."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise EngineError(f"the engine cache {self.folder} can't be used: {error.strerror}", fix="set KCM_CACHE to a folder") from error
        try:
            if why := _not_ours(os.fstat(folder)):
                raise EngineError(f"the engine cache {self.folder} {why}: plans are code", fix=f"chmod 700 {self.folder}, or set KCM_CACHE")
            fcntl.flock(folder, lock)
            yield folder
        finally:
            os.close(folder)

    def _none(self, folder: int, key: PlanKey) -> str:
        """What to say where no plan has this key: of the same model there may be one that no longer fits."""
        others = [sidecar.key for _, sidecar in _sidecars(folder) if (sidecar.key.model, sidecar.key.flavour) == (key.model, key.flavour)]
        if not others:
            return f"no {key.flavour} engine of this model is cached"
        return f"no cached {key.flavour} engine of this model fits: {_difference(others[-1], key)}"

    def _prune(self, folder: int, key: PlanKey) -> None:
        rivals = [name for name, sidecar in _sidecars(folder) if sidecar.key.flavour == key.flavour and sidecar.key != key]
        for name in rivals[: max(0, len(rivals) + 1 - self._keep)]:
            os.unlink(f"{name}.json", dir_fd=folder)
        kept = {name for name, _ in _sidecars(folder)}
        for name in os.listdir(folder):
            stem, _, kind = name.partition(".")
            left = kind.endswith("new") and time.time() - os.stat(name, dir_fd=folder).st_mtime > _OLD_S
            if left or (kind in ("plan", "json") and stem not in kept):
                os.unlink(name, dir_fd=folder)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _sidecars(folder: int) -> list[tuple[str, Sidecar]]:
    """Those that can be read, by key's name; the one that was used longest ago first."""
    found: list[tuple[int, str, Sidecar]] = []
    for name in os.listdir(folder):
        if name.endswith(".json"):
            with contextlib.suppress(OSError, EngineError, msgspec.DecodeError):
                sidecar = msgspec.json.decode(_read(folder, name, _SIDECAR_LIMIT), type=Sidecar)
                found.append((os.stat(name, dir_fd=folder).st_mtime_ns, name.removesuffix(".json"), sidecar))
    return [(name, sidecar) for _, name, sidecar in sorted(found, key=lambda entry: entry[:2])]


def _difference(was: PlanKey, now: PlanKey) -> str:
    fields = [f for f in PlanKey.__struct_fields__ if getattr(was, f) != getattr(now, f)]
    return ", ".join(f"{field} {_shown(getattr(was, field))}, wanted {_shown(getattr(now, field))}" for field in fields)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "+".join(f"{name}:{longest}" for name, longest in value.items())
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _not_ours(status: os.stat_result) -> str:
    if status.st_uid != os.geteuid():
        return f"belongs to user {status.st_uid}, not to {os.geteuid()}"
    if status.st_mode & 0o022:
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):03o})"
    return ""


def _read(folder: int, name: str, limit: int) -> bytes:
    """At most one byte more than `limit`: enough to see that there is more."""
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        why = _not_ours(status) if stat.S_ISREG(status.st_mode) else "is no file"
        if why:
            raise EngineError(f"{name} {why}")
        return file.read(limit + 1)


def _replace(folder: int, name: str, data: bytes) -> None:
    temporary = f"{name}.{os.getpid()}.new"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)
    os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
