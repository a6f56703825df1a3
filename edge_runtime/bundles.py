"""The bundles of one device: install, roll back, and always one that serves.

ROOT/bundles/<bundle_id>/   verified copies, written beside and renamed into place
ROOT/state.json             which is current; replaced in one rename, so a reader sees the old or the new, never neither
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kcm.bundle import MANIFEST, Bundle, Manifest, Precision, load_bundle, read_manifest
from kcm.errors import BundleError, StoreError

_KEEP = 3
_DISK = "check the disk and the folder's owner"


class State(msgspec.Struct, frozen=True, kw_only=True):
    """state.json."""

    schema: int = 1
    current: str = ""
    previous: str = ""  # where `rollback` goes
    installed: tuple[str, ...] = ()  # oldest first
    blocked: dict[str, str] = {}  # bundle_id → why it was rolled back
    last_refusal: str = ""  # of the newest install; empty where it was taken


class BundleStore:
    """One writer at a time across processes; readers need no lock."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._bundles = root / "bundles"
        self._state_file = root / "state.json"

    def state(self) -> State:
        """Raises StoreError where state.json is damaged; a store that was never written is empty."""
        try:
            return msgspec.json.decode(self._state_file.read_bytes(), type=State)
        except FileNotFoundError:
            return State()
        except (OSError, msgspec.DecodeError) as error:
            raise StoreError(
                f"{self._state_file} can't be read: {error}", fix="kcm bundle install DIR --store ROOT   writes it anew"
            ) from error

    def existing(self) -> State:
        """The state of a store that was written before. Raises StoreError where it wasn't, or is damaged."""
        if not self._state_file.exists():
            raise StoreError(f"{self.root} is no bundle store: it has no state.json", fix=f"kcm bundle install DIR --store {self.root}")
        return self.state()

    def problem(self, state: State) -> str:
        """Why the current bundle can't serve on this device, and what serves instead; empty where it can."""
        from edge_runtime.runtime import EdgeRuntime

        if not state.current:
            return "no bundle is installed"
        try:
            EdgeRuntime.load(self.folder(state.current))
        except BundleError as error:
            instead = f"kcm edge starts with {state.previous}" if state.previous else "kcm edge can't start"
            return f"the current bundle can't be loaded, {instead}: {error.message}"
        return ""

    def current(self) -> Path:
        """The folder that serves.

        Raises:
            BundleError: nothing is installed.
        """
        if not (bundle_id := self.state().current):
            raise BundleError(f"{self.root} has no bundle yet", fix=f"kcm bundle install DIR --store {self.root}")
        return self.folder(bundle_id)

    def folder(self, bundle_id: str) -> Path:
        return self._bundles / bundle_id

    def version(self) -> tuple[int, int]:
        """Changes whenever state.json does; cheap enough to poll."""
        try:
            info = self._state_file.stat()
        except OSError:
            return (0, 0)
        return (info.st_mtime_ns, info.st_ino)

    def install(self, path: Path, *, force: bool = False, precision: Precision = "fp32") -> State:
        """Verify a bundle, try it on this device, copy it in, make it current. Idempotent.

        Args:
            force: also take one of another task or label space, or one that was rolled back.

        Raises:
            BundleError: damaged, failing its golden check, foreign or blocked. The store is as it was, but for `last_refusal`.
            StoreError: the store can't be written.
        """
        with self._locked():
            state = self._state_or_empty()
            try:
                bundle = load_bundle(path)
                self._check(bundle, state, force, precision)
            except BundleError as error:
                self._write(msgspec.structs.replace(state, last_refusal=f"{path.name}: {error.message}"))
                raise
            bundle_id = bundle.manifest.bundle_id
            self._place(bundle)
            if bundle_id == state.current:
                if state.last_refusal:
                    state = self._write(msgspec.structs.replace(state, last_refusal=""))
                return state
            blocked = {id_: why for id_, why in state.blocked.items() if id_ != bundle_id}
            installed = (*(id_ for id_ in state.installed if id_ != bundle_id), bundle_id)
            kept = self._kept(installed, {bundle_id, state.current})
            state = self._write(State(current=bundle_id, previous=state.current, installed=kept, blocked=blocked))
            self._prune(state)
            return state

    def rollback(self, reason: str = "rolled back by hand") -> State:
        """Serve the previous bundle again, and block the one that served.

        Raises:
            BundleError: there is no previous one, it was rolled back itself, or it is damaged.
        """
        with self._locked():
            state = self.state()
            if not state.previous:
                raise BundleError(f"{self.root} has no earlier bundle to go back to")
            if state.previous in state.blocked:
                raise BundleError(
                    f"the earlier bundle {state.previous} was rolled back itself: {state.blocked[state.previous]}",
                    fix=f"kcm bundle install {self.folder(state.previous)} --store {self.root} --force",
                )
            load_bundle(self.folder(state.previous))
            blocked = {**state.blocked, state.current: reason}
            return self._write(
                msgspec.structs.replace(state, current=state.previous, previous=state.current, blocked=blocked, last_refusal="")
            )

    def _check(self, bundle: Bundle, state: State, force: bool, precision: Precision) -> None:
        manifest = bundle.manifest
        if manifest.bundle_id in state.blocked and not force:
            raise BundleError(
                f"bundle {manifest.bundle_id} is blocked: {state.blocked[manifest.bundle_id]}", fix="--force takes it all the same"
            )
        now = self._manifest(state.current)
        if now is not None and (now.task_id, now.label_space) != (manifest.task_id, manifest.label_space) and not force:
            raise BundleError(
                f"the bundle is of task {manifest.task_id} (label space {manifest.label_space}), "
                f"this store serves {now.task_id} ({now.label_space})",
                fix="--force takes it all the same",
            )
        from edge_runtime.runtime import EdgeRuntime

        EdgeRuntime.from_bundle(bundle, precision)

    def _manifest(self, bundle_id: str) -> Manifest | None:
        """None where it can't be read: a damaged bundle must not keep its successor out."""
        try:
            return read_manifest(self.folder(bundle_id)) if bundle_id else None
        except BundleError:
            return None

    def _place(self, bundle: Bundle) -> None:
        """Write the bytes that were verified into bundles/<id>, unless they are there."""
        target = self.folder(bundle.manifest.bundle_id)
        if target.exists():
            try:
                load_bundle(target)
                return
            except BundleError:
                self._discard(target)
        folder = self._bundles / f".new-{bundle.manifest.bundle_id}"
        if folder.exists():
            self._discard(folder)
        try:
            folder.mkdir(parents=True)
            for name, data in bundle.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                write_synced(folder / name, data)
            write_synced(folder / MANIFEST, msgspec.json.format(msgspec.json.encode(bundle.manifest), indent=1))
            for inner in sorted({(folder / name).parent for name in bundle.files} | {folder}):
                _sync_folder(inner)
            load_bundle(folder)
            os.rename(folder, target)  # noqa: PTH104 (os, as fsync: on 3.10 pathlib's own can't be watched by a test)
            _sync_folder(self._bundles)
        except OSError as error:
            raise StoreError(f"{folder} can't be written: {error.strerror}", fix=_DISK) from error

    def _write(self, state: State) -> State:
        temporary = self.root / ".state.json.new"
        try:
            write_synced(temporary, msgspec.json.format(msgspec.json.encode(state), indent=1))
            os.replace(temporary, self._state_file)  # noqa: PTH105
            _sync_folder(self.root)
        except OSError as error:
            raise StoreError(
                f"{self._state_file} can't be written: {error.strerror}", fix="check the disk and the folder's owner"
            ) from error
        return state

    def _state_or_empty(self) -> State:
        try:
            return self.state()
        except StoreError:
            return State()

    def _kept(self, installed: tuple[str, ...], needed: set[str]) -> tuple[str, ...]:
        newest = set(installed[-_KEEP:])
        return tuple(id_ for id_ in installed if id_ in newest | needed)

    def _prune(self, state: State) -> None:
        keep = {*state.installed, state.current, state.previous}
        for folder in self._bundles.iterdir():
            if folder.name not in keep:
                self._discard(folder)

    def _discard(self, folder: Path) -> None:
        """Out of the way first: half a deleted bundle must not carry a bundle's name."""
        trash = folder.with_name(f".trash-{folder.name.lstrip('.')}")
        shutil.rmtree(trash, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rename(folder, trash)  # noqa: PTH104
        shutil.rmtree(trash, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._bundles.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(f"{self.root} can't be written: {error.strerror}", fix="check the folder's owner") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
