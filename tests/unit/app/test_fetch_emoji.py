"""`kcm fetch emoji` from a registry on this machine, with archives made here."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pair_kit import COLOURS, SHAPES, picture

from kcm.app import fetch_emoji as module
from kcm.app.fetch_emoji import Archive, fetch_emoji, read_items
from kcm.errors import DataError, UnavailableError
from kcm.task import load_task
from training.data import load_split
from training.retrieval.gallery import load_gallery, load_pairs

Kcm = Callable[..., tuple[int, str, str]]
VENDORS = ("one", "two")


def emoji() -> list[dict[str, object]]:
    """90 emoji; two flags that are to be left out; one whose name another has."""
    rows: list[dict[str, object]] = [
        {
            "name": f"{colour} {shape}".upper(),
            "short_name": f"{colour}_{shape}",
            "short_names": [f"{shape}-{colour}", f"{shape}_in_{colour}"],
            "image": f"{colour}-{shape}.png",
            "subcategory": "geometric",
        }
        for colour in COLOURS
        for shape in SHAPES
    ]
    rows += [{**rows[0], "name": f"Flag {kind}", "short_name": f"flag-{kind}", "subcategory": kind} for kind in module._FLAGS]
    return [*rows, {**rows[0], "short_name": "again"}]


def archive(vendor: str, root: Path, *, listed: bool = True) -> Archive:
    """A .tgz as npm has it, under the path that a registry serves it by."""
    package = f"emoji-{vendor}"
    folder = root / package / "-"
    folder.mkdir(parents=True, exist_ok=True)
    files = {"package/emoji.json": json.dumps(emoji()).encode()} if listed else {}
    for colour in COLOURS:
        for shape in SHAPES:
            png = io.BytesIO()
            picture(colour, shape, scale=1.0 if vendor == "one" else 0.8).save(png, "PNG")
            files[f"package/img/{vendor}/64/{colour}-{shape}.png"] = png.getvalue()
    files[f"package/img/{vendor}/64/../../outside.png"] = b"never written"
    path = folder / f"{package}-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return Archive(package, "1.0.0", hashlib.sha256(path.read_bytes()).hexdigest(), 1, f"package/img/{vendor}/64/")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Archive, ...]]:
    """The archives, served over HTTP, an empty cache, and how often each was asked for (`asked`)."""
    root = tmp_path / "registry"
    archives = tuple(archive(vendor, root) for vendor in VENDORS)

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("KCM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", f"http://127.0.0.1:{server.server_port}/")
    yield archives
    server.shutdown()
    thread.join()
    server.server_close()


def test_two_tasks_of_the_archives(registry: tuple[Archive, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    fetch_emoji(said.append, registry)
    assert len(said) == 2 and "emoji-one 1.0.0 from npm" in said[0]
    i2t, t2i = (load_task(tmp_path / "cache" / "tasks" / name) for name in ("emoji-i2t", "emoji-t2i"))
    assert i2t.labels == t2i.labels and len(i2t.labels) == 45 and not any(label.startswith("flag") for label in i2t.labels)
    assert len(load_split(i2t, "test")) == 2 * len(set(load_split(i2t, "test").y.tolist()))
    assert len(load_pairs(i2t)) == 45 * 2 * 2  # pictures of two vendors, two wordings: the third has the second's words
    assert sorted(load_gallery(t2i).items.tolist()) == sorted([*range(45)] * 2)
    first = load_gallery(i2t)
    texts = [text for text, item in zip(first.payloads, first.items, strict=True) if i2t.labels[item] == i2t.labels[0]]
    colour, shape = i2t.labels[0].split("_")
    assert texts == [f"{colour} {shape}", f"{shape} in {colour}"]
    assert not list(tmp_path.rglob("outside.png"))
    # A second time nothing is downloaded: the registry is gone.
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:9/")
    fetch_emoji(said.append, registry)


def test_other_bytes_are_refused_and_leave_nothing(registry: tuple[Archive, ...], tmp_path: Path) -> None:
    first, second = registry
    wrong = Archive(second.package, second.version, "0" * 64, 1, second.images)
    with pytest.raises(UnavailableError, match=r"has sha256 .*, not 0000"):
        fetch_emoji(lambda _: None, (first, wrong))
    cache = tmp_path / "cache"
    assert [path.name for path in (cache / "archives").iterdir()] == ["emoji-one-1.0.0.tgz"]
    assert not (cache / "tasks").exists()
    # An archive that was spoilt on disk is fetched again.
    spoilt = cache / "archives" / "emoji-one-1.0.0.tgz"
    spoilt.write_bytes(b"spoilt")
    fetch_emoji(lambda _: None, registry)
    assert hashlib.sha256(spoilt.read_bytes()).hexdigest() == first.sha256


def test_more_than_was_promised_is_not_read(registry: tuple[Archive, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    small = Archive(registry[0].package, "1.0.0", registry[0].sha256, 0, registry[0].images)
    monkeypatch.setattr(module, "_CHUNK", 1000)
    with pytest.raises(UnavailableError, match="has sha256"):
        fetch_emoji(lambda _: None, (small,))


@pytest.mark.parametrize(
    ("registry_url", "said"), [("http://127.0.0.1:9", "can't be had"), ("file:///etc", "is no web address"), ("none", "is no web address")]
)
def test_no_registry(registry: tuple[Archive, ...], monkeypatch: pytest.MonkeyPatch, registry_url: str, said: str) -> None:
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", registry_url)
    with pytest.raises(UnavailableError, match=said):
        fetch_emoji(lambda _: None, registry)


def test_a_missing_archive_is_named(registry: tuple[Archive, ...]) -> None:
    gone = Archive("emoji-three", "1.0.0", "0" * 64, 1, "package/")
    with pytest.raises(UnavailableError, match=r"emoji-three-1\.0\.0\.tgz can't be had: .*not found"):
        fetch_emoji(lambda _: None, (gone,))


def test_archives_of_something_else(tmp_path: Path) -> None:
    bare = archive("one", tmp_path, listed=False)
    file = tmp_path / "emoji-one" / "-" / "emoji-one-1.0.0.tgz"
    with pytest.raises(DataError, match=r"holds no emoji.json"):
        read_items([file], (bare,), tmp_path / "scratch")
    (tmp_path / "no.tgz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="can't be read as an npm archive"):
        read_items([tmp_path / "no.tgz"], (bare,), tmp_path / "second")


def test_the_verb_lists_and_fetches_it(registry: tuple[Archive, ...], kcm: Kcm, monkeypatch: pytest.MonkeyPatch) -> None:
    code, said, _ = kcm("fetch")
    assert code == 0 and "emoji              not fetched" in said
    monkeypatch.setattr(module.fetch_emoji, "__defaults__", (registry,))
    code, said, err = kcm("fetch", "emoji")
    assert code == 0 and "tasks/emoji-i2t and" in said, err
    code, said, _ = kcm("fetch", "emoji")
    assert "already at" in said
    code, said, _ = kcm("fetch")
    assert "emoji              fetched" in said
