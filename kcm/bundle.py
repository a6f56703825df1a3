"""What an edge installs: a folder of models, task, calibration and golden outputs under one manifest of hashes.

manifest.json  models/fp32.onnx  tokenizer.json task.toml calibration.json  golden.npz  metrics.json  MODEL_CARD.md
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import msgspec

import kcm.config
import kcm.task
from kcm.calibration import Calibration
from kcm.errors import BundleError, ConfigError

MANIFEST = "manifest.json"
SCHEMA = 4  # 2: the graph has a fifth output, the routing score; 3: the longest row; 4: of each input, words among them
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Precision = Literal["fp32", "fp16", "int8"]


def as_precision(name: str) -> Precision:
    """Raises ConfigError where there is no such precision."""
    try:
        precision: Precision = msgspec.convert(name, Precision)
    except msgspec.ValidationError:
        raise ConfigError(f"precision {name!r} is unknown", fix="fp32, fp16 or int8") from None
    return precision


def golden_name(precision: Precision) -> str:
    """The file that holds a precision's golden outputs."""
    return "golden.npz" if precision == "fp32" else f"golden-{precision}.npz"


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    sha256: Sha256
    size: Annotated[int, msgspec.Meta(ge=0)]


class GraphSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fused graph's signature: inputs [B, L] by name with the largest L of each, and how many hint candidates top_ids [B, k] holds.

    B is 1..max_batch and L from 1: what an engine that is built for a range of shapes is built for. Inputs with one largest L share
    their L. Images have a fixed shape [B, S, S, 3]: for them it is S.
    """

    inputs: dict[str, int]
    candidates: int
    max_batch: int = 32


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    schema: int
    bundle_id: str  # hash over all the rest but `created`: two bundles with one id are the same
    task_id: str
    label_space: str
    created: str  # UTC, ISO 8601
    kcm_version: str
    graph: GraphSpec
    precisions: tuple[Precision, ...]
    files: dict[str, FileEntry]
    round: int = 0  # distillation round
    parent: str = ""  # bundle that this one was distilled from
    teacher_id: str = ""


class _Schema(msgspec.Struct):
    schema: int


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle whose every byte matched its manifest when it was read. `files` holds them: nothing is read twice."""

    path: Path
    manifest: Manifest
    task: kcm.task.Task
    calibration: dict[str, Calibration]
    files: dict[str, bytes]

    def model(self, precision: Precision) -> bytes:
        """Raises BundleError where this precision isn't in the bundle."""
        try:
            return self.files[f"models/{precision}.onnx"]
        except KeyError:
            fix = f"kcm export RUN --out DIR --precision {precision}"
            raise BundleError(f"{self.path} has no {precision} model, only {', '.join(self.manifest.precisions)}", fix=fix) from None


def write_manifest(
    folder: Path, *, task: kcm.task.Task, graph: GraphSpec, version: str, round_: int = 0, parent: str = "", teacher_id: str = ""
) -> Manifest:
    """Hash every file of `folder` and write its manifest: the last step of making a bundle."""
    files = {
        path.relative_to(folder).as_posix(): FileEntry(sha256=hashlib.sha256(data := path.read_bytes()).hexdigest(), size=len(data))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    precisions: tuple[Precision, ...] = tuple(p for p in ("fp32", "fp16", "int8") if f"models/{p}.onnx" in files)
    manifest = Manifest(
        schema=SCHEMA,
        bundle_id="",
        task_id=task.id,
        label_space=task.label_space,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        kcm_version=version,
        graph=graph,
        precisions=precisions,
        files=files,
        round=round_,
        parent=parent,
        teacher_id=teacher_id,
    )
    manifest = msgspec.structs.replace(manifest, bundle_id=_bundle_id(manifest))
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    return manifest


def load_bundle(path: Path) -> Bundle:
    """Read a bundle and check all of it: manifest, hashes, sizes, no links, no stray files.

    Raises:
        BundleError: anything that doesn't match.
    """
    manifest = read_manifest(path)
    files: dict[str, bytes] = {}
    for name, entry in manifest.files.items():
        files[name] = _read_checked(path, name, entry)
    found = {p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir() or p.is_symlink()}
    if stray := sorted(found - set(files) - {MANIFEST}):
        raise BundleError(f"{path} holds {stray[0]!r}, which its manifest doesn't name")
    try:
        task = kcm.task.parse_task(kcm.config.parse_toml(files["task.toml"], "task.toml"), "task.toml")
        calibration = msgspec.json.decode(files["calibration.json"], type=dict[str, Calibration])
    except KeyError as error:
        raise BundleError(f"{path} has no {error.args[0]}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, ConfigError) as error:
        raise BundleError(f"{path}: task.toml or calibration.json can't be read: {error}") from error
    if task.label_space != manifest.label_space or task.id != manifest.task_id:
        raise BundleError(f"{path}: the manifest is of task {manifest.task_id}, task.toml of {task.id} (or of other labels)")
    if missing := [p for p in manifest.precisions if p not in calibration or f"models/{p}.onnx" not in files]:
        raise BundleError(f"{path}: precision {missing[0]} lacks its model or its calibration")
    return Bundle(path=path, manifest=manifest, task=task, calibration=calibration, files=files)


def read_manifest(path: Path) -> Manifest:
    """The manifest alone, its own id checked against the files it lists.

    Raises:
        BundleError: missing, unreadable, of another schema, or with an id that isn't the hash of its files.
    """
    try:
        data = (path / MANIFEST).read_bytes()
        schema = msgspec.json.decode(data, type=_Schema).schema  # first: a manifest of another schema has other fields
        manifest = msgspec.json.decode(data, type=Manifest) if schema == SCHEMA else None
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}", fix="kcm export RUN --out DIR   makes one") from None
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise BundleError(f"{path / MANIFEST} can't be read: {error}") from error
    if manifest is None:
        fix = "upgrade kcm on this device" if schema > SCHEMA else "export it again with this kcm"
        raise BundleError(f"{path} has bundle schema {schema}, this kcm reads {SCHEMA}", fix=fix)
    if manifest.bundle_id != _bundle_id(manifest):
        raise BundleError(f"{path}: the bundle id doesn't match what the manifest lists: damaged or changed")
    return manifest


def _bundle_id(manifest: Manifest) -> str:
    bare = msgspec.structs.replace(manifest, bundle_id="", created="")
    return hashlib.sha256(msgspec.json.encode(bare, order="deterministic")).hexdigest()[:16]


def _read_checked(root: Path, name: str, entry: FileEntry) -> bytes:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or not name:
        raise BundleError(f"{root}: the manifest names {name!r}, outside the bundle")
    path = root / name
    for folder in (path, *path.parents):
        if folder == root:
            break
        if folder.is_symlink():
            raise BundleError(f"{folder} is a link; a bundle holds plain files only")
    try:
        # O_NOFOLLOW and fstat on the open file: what is checked is what is read.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(descriptor, "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:
                raise BundleError(f"{path} is a link or no plain file")
            if info.st_size != entry.size:
                raise BundleError(f"{path} has {info.st_size} bytes, the manifest says {entry.size}")
            data = file.read()
    except OSError as error:
        raise BundleError(f"{path} can't be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise BundleError(f"{path} doesn't match its hash: damaged or changed")
    return data
