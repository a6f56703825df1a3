"""`kcm fetch emoji`: pictures and names of emoji from two npm archives, as two retrieval tasks. The archives are plain .tgz: no Node."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kcm import assets
from kcm.app.pairs import I2T, T2I, Item, write_pair_tasks
from kcm.errors import DataError, UnavailableError

TASKS = {I2T: "emoji-i2t", T2I: "emoji-t2i"}
_REGISTRY = "https://registry.npmjs.org"
_TIMEOUT = 60.0  # seconds without a byte
_CHUNK = 2**20
_FLAGS = ("country-flag", "subdivision-flag")


@dataclass(frozen=True)
class Archive:
    """An npm archive: its hash, its size in MB, and the folder of its 64-pixel images."""

    package: str
    version: str
    sha256: str
    size_mb: int
    images: str

    @property
    def url(self) -> str:
        """Under npm's own setting of the registry, where it is set."""
        registry = os.environ.get("NPM_CONFIG_REGISTRY") or _REGISTRY
        return f"{registry.rstrip('/')}/{self.package}/-/{self.package}-{self.version}.tgz"


ARCHIVES = (
    Archive(
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        74,
        "package/img/google/64/",
    ),
    Archive(
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        62,
        "package/img/twitter/64/",
    ),
)
WHAT = "1,649 emoji as Google and Twitter draw them, with names: two retrieval tasks (Apache-2.0, CC BY 4.0; names MIT)"


def fetch_emoji(say: Callable[[str], None], archives: tuple[Archive, ...] = ARCHIVES) -> None:
    """Download what isn't there yet, and build both tasks beside their place.

    Raises:
        UnavailableError: the registry can't be reached, or sends other bytes.
        DataError: an archive doesn't hold what it ought to.
    """
    files = []
    for archive in archives:
        say(f"emoji: {archive.package} {archive.version} from npm, {archive.size_mb} MB")
        files.append(_download(archive))
    root = assets.cache_dir() / "tasks"
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".emoji-") as scratch:
        items = read_items(files, archives, Path(scratch) / "images")
        built = {direction: Path(scratch) / name for direction, name in TASKS.items()}
        write_pair_tasks(built, "emoji", items, "Emoji: pictures and their names")
        sources = [f"{archive.package} {archive.version}" for archive in archives]
        for direction, folder in built.items():
            (folder / "SOURCE.json").write_text(json.dumps({"packages": sources, "title": WHAT}))
            shutil.rmtree(root / TASKS[direction], ignore_errors=True)
            folder.rename(root / TASKS[direction])


def read_items(files: list[Path], archives: tuple[Archive, ...], scratch: Path) -> list[Item]:
    """Each emoji with its picture from every archive, name and short names; `scratch` holds the pictures then.

    Flags of countries are left out: nothing in the picture of one says its name to a model that wasn't told, so they'd be noise.

    Raises:
        DataError: an archive can't be read, or lacks the list of emoji or one's picture.
    """
    scratch.mkdir(parents=True)
    described: list[dict[str, Any]] = []
    pictures: list[dict[str, Path]] = []
    for place, (file, archive) in enumerate(zip(files, archives, strict=True)):
        found: dict[str, Path] = {}
        try:
            with tarfile.open(file, "r:gz") as tar:
                for member in tar:
                    stream = tar.extractfile(member) if member.isfile() else None
                    if stream is None:
                        continue
                    if member.name == "package/emoji.json" and not place:
                        described = json.load(stream)
                    elif member.name.startswith(archive.images):
                        name = member.name.removeprefix(archive.images)
                        found[name] = scratch / f"{place}-{len(found)}.png"  # a name of ours: theirs may point anywhere
                        found[name].write_bytes(stream.read())
        except (tarfile.TarError, OSError, ValueError) as error:
            raise DataError(f"{file} can't be read as an npm archive: {error}") from error
        pictures.append(found)
    return _items(described, pictures, files)


def _items(described: list[dict[str, Any]], pictures: list[dict[str, Path]], files: list[Path]) -> list[Item]:
    items, taken = [], set[str]()
    try:
        for emoji in described:
            texts = [text for text in _wordings(emoji) if text not in taken]
            if emoji["subcategory"] in _FLAGS or not texts:
                continue
            taken.update(texts)  # a wording that two emoji share names the first
            items.append(Item(emoji["short_name"], tuple(found[emoji["image"]] for found in pictures), tuple(texts)))
    except (KeyError, TypeError) as error:
        raise DataError(f"{files[0]} doesn't describe its emoji as expected: {error} is missing") from error
    if not items:
        raise DataError(f"{files[0]} holds no emoji.json with emoji")
    return items


def _wordings(emoji: dict[str, Any]) -> list[str]:
    """The name and the short names, lower case; of wordings with the same words the first."""
    found: dict[frozenset[str], str] = {}
    for text in (emoji["name"], *emoji["short_names"]):
        words = re.findall(r"[a-z0-9]+", text.lower())
        if words:
            found.setdefault(frozenset(words), " ".join(words))
    return list(found.values())


def _download(archive: Archive) -> Path:
    """The archive in the cache, its hash checked each time."""
    target = assets.cache_dir() / "archives" / f"{archive.package}-{archive.version}.tgz"
    if target.is_file() and assets.file_sha256(target) == archive.sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".{os.getpid()}-{target.name}")
    if not archive.url.startswith(("https://", "http://")):
        raise UnavailableError(f"{archive.url} is no web address", fix="unset NPM_CONFIG_REGISTRY")
    most, got = archive.size_mb * 2 * 10**6, 0
    try:
        with urllib.request.urlopen(archive.url, timeout=_TIMEOUT) as reply, building.open("wb") as out:  # noqa: S310  # checked above
            while (chunk := reply.read(_CHUNK)) and got <= most:
                got += len(chunk)
                out.write(chunk)
        if (found := assets.file_sha256(building)) != archive.sha256:
            raise UnavailableError(
                f"{archive.url} has sha256 {found[:16]}…, not {archive.sha256[:16]}…", fix="try again, or name another NPM_CONFIG_REGISTRY"
            )
        building.replace(target)
    except (OSError, http.client.HTTPException) as error:
        fix = "check the network, or name a registry: export NPM_CONFIG_REGISTRY=URL"
        raise UnavailableError(f"{archive.url} can't be had: {getattr(error, 'reason', error)}", fix=fix) from error
    finally:
        building.unlink(missing_ok=True)
    return target
