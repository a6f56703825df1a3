"""The bundle store: install, refuse, roll back, and survive SIGKILL anywhere."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import edge_kit
import pytest

from edge_runtime import EdgeRuntime
from edge_runtime.bundles import BundleStore
from kcm.bundle import load_bundle
from kcm.errors import BundleError, StoreError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six bundles of one task."""
    root = tmp_path_factory.mktemp("made")
    return [edge_kit.make_bundle(root / f"b{seed}", seed=seed, round_=seed) for seed in range(6)]


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    return BundleStore(tmp_path / "store")


def id_of(path: Path) -> str:
    return load_bundle(path).manifest.bundle_id


def test_an_installed_bundle_is_current_and_whole(store: BundleStore, made: list[Path]) -> None:
    state = store.install(made[0])
    assert state.current == id_of(made[0]) == id_of(store.current())
    EdgeRuntime.load(store.current())
    shutil.copytree(made[0], store.root.parent / "copy")
    assert store.install(store.root.parent / "copy") == state, "the same bundle again changes nothing"


def test_an_empty_store_says_how_to_fill_it(store: BundleStore) -> None:
    with pytest.raises(BundleError) as caught:
        store.current()
    assert "kcm bundle install" in str(caught.value)


def test_rollback_returns_to_the_previous_and_blocks_the_bad_one(store: BundleStore, made: list[Path]) -> None:
    store.install(made[0])
    store.install(made[1])
    state = store.rollback("worse on the canary set")
    assert (state.current, state.previous) == (id_of(made[0]), id_of(made[1]))
    with pytest.raises(BundleError, match="is blocked: worse on the canary set"):
        store.install(made[1])
    with pytest.raises(BundleError, match="was rolled back itself"):
        store.rollback()
    state = store.install(made[1], force=True)
    assert state.current == id_of(made[1]) and not state.blocked


def test_rollback_needs_an_earlier_bundle(store: BundleStore, made: list[Path]) -> None:
    store.install(made[0])
    with pytest.raises(BundleError, match="no earlier bundle"):
        store.rollback()


def test_rollback_to_a_damaged_bundle_is_refused(store: BundleStore, made: list[Path]) -> None:
    store.install(made[0])
    state = store.install(made[1])
    (store.folder(id_of(made[0])) / "models" / "fp32.onnx").write_bytes(b"gone bad")
    with pytest.raises(BundleError):
        store.rollback()
    assert store.state() == state


def test_the_last_three_are_kept_and_always_the_previous(store: BundleStore, made: list[Path]) -> None:
    for path in made:
        store.install(path)
    kept = {folder.name for folder in (store.root / "bundles").iterdir()}
    assert kept == {id_of(path) for path in made[-3:]}
    assert store.state().previous == id_of(made[-2])


@pytest.mark.parametrize("damage", ["flip", "missing", "stray", "golden", "link", "none-at-all"])
def test_a_bad_bundle_changes_nothing_and_is_remembered(store: BundleStore, made: list[Path], tmp_path: Path, damage: str) -> None:
    before = store.install(made[0])
    bad = tmp_path / "bad"
    if damage == "golden":
        edge_kit.make_bundle(bad, seed=9, golden_shift=1.0)
    elif damage != "none-at-all":
        shutil.copytree(made[1], bad)
    model = bad / "models" / "fp32.onnx"
    if damage == "flip":
        data = bytearray(model.read_bytes())
        data[len(data) // 2] ^= 1
        model.write_bytes(data)
    elif damage == "missing":
        model.unlink()
    elif damage == "stray":
        (bad / "extra.bin").write_bytes(b"x")
    elif damage == "link":
        model.rename(tmp_path / "elsewhere.onnx")
        model.symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(BundleError):
        store.install(bad)
    after = store.state()
    assert (after.current, after.installed) == (before.current, before.installed)
    assert after.last_refusal.startswith("bad: ")
    assert [folder.name for folder in (store.root / "bundles").iterdir()] == [before.current]
    assert store.install(made[1]).last_refusal == ""


def test_other_labels_need_force(store: BundleStore, made: list[Path], tmp_path: Path) -> None:
    store.install(made[0])
    other = edge_kit.make_bundle(tmp_path / "other", labels=("alpha", "beta", "gamma", "zeta"))
    with pytest.raises(BundleError, match="label space"):
        store.install(other)
    assert store.install(other, force=True).current == id_of(other)


def test_a_damaged_installed_copy_is_replaced(store: BundleStore, made: list[Path]) -> None:
    store.install(made[0])
    (store.current() / "golden.npz").write_bytes(b"gone bad")
    store.install(made[0])
    EdgeRuntime.load(store.current())


def test_a_damaged_state_is_said_and_a_new_install_mends_it(store: BundleStore, made: list[Path]) -> None:
    store.install(made[0])
    (store.root / "state.json").write_text("{")
    with pytest.raises(StoreError, match=r"state.json can't be read"):
        store.current()
    assert store.install(made[0]).current == id_of(made[0])


def test_installs_side_by_side_take_turns(store: BundleStore, made: list[Path]) -> None:
    failed: list[Exception] = []

    def install(path: Path) -> None:
        try:
            for _ in range(3):
                BundleStore(store.root).install(path)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=install, args=(path,)) for path in made[:3]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    load_bundle(store.current())
    assert {folder.name for folder in (store.root / "bundles").iterdir()} == set(store.state().installed)


def test_every_byte_is_on_the_disk_before_a_name_points_to_it(
    store: BundleStore, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut, unlike a SIGKILL, forgets what was not fsynced: so the order of the calls is what can be checked."""
    events: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def synced(descriptor: int) -> None:
        events.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def renamed(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        events.append(("rename", f"{source} {target}"))
        (replace if Path(target).name == "state.json" else rename)(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "replace", renamed)
    store.install(made[0])
    bundle, root = store.current(), store.root
    new = bundle.with_name(f".new-{bundle.name}")
    placed = events.index(("rename", f"{new} {bundle}"))
    switched = events.index(("rename", f"{root / '.state.json.new'} {root / 'state.json'}"))
    before = {path for kind, path in events[:placed] if kind == "fsync"}
    files = [new / path.relative_to(bundle) for path in bundle.rglob("*")]
    assert {str(path) for path in (new, *files)} <= before
    assert ("fsync", str(bundle.parent)) in events[placed:switched]
    assert ("fsync", str(root / ".state.json.new")) in events[placed:switched]
    assert ("fsync", str(root)) in events[switched:]


# Dies at the nth call that changes the disk, before or after it took effect.
_DIES = """
import os, signal, sys
from pathlib import Path
from edge_runtime.bundles import BundleStore
import edge_runtime.runtime
nth, after, verb, root, path = int(sys.argv[1]), sys.argv[2] == "after", *sys.argv[3:]
count = 0
def dying(real):
    def call(*args, **kwargs):
        global count
        count += 1
        mine = count
        if mine == nth and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return real(*args, **kwargs)
        finally:
            if mine == nth:
                os.kill(os.getpid(), signal.SIGKILL)
    return call
for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
    setattr(os, name, dying(getattr(os, name)))
store = BundleStore(Path(root))
store.install(Path(path)) if verb == "install" else store.rollback()
"""


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize("verb", ["install", "rollback"])
def test_sigkill_at_every_step_leaves_the_old_or_the_new(tmp_path: Path, made: list[Path], verb: str) -> None:
    template = tmp_path / "template"
    for path in made[:3]:
        BundleStore(template).install(path)
    old, new = (made[2], made[3]) if verb == "install" else (made[2], made[1])
    outcomes: list[str] = []
    for nth in range(1, 100):
        for when in ("before", "after"):
            root = tmp_path / f"{nth}{when}"
            shutil.copytree(template, root)
            child = subprocess.run([sys.executable, "-c", _DIES, str(nth), when, verb, str(root), str(made[3])], timeout=60)
            store = BundleStore(root)
            current = load_bundle(store.current()).manifest.bundle_id
            assert current in (id_of(old), id_of(new)), f"neither, killed {when} step {nth}"
            outcomes.append("old" if current == id_of(old) else "new")
            # and what was left lying about hinders nobody
            store.install(made[4])
            assert id_of(store.current()) == id_of(made[4])
            assert {folder.name for folder in (root / "bundles").iterdir()} <= set(store.state().installed)
            shutil.rmtree(root)
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
    assert outcomes == sorted(outcomes, reverse=True), "once new, it stays new"
    assert {"old", "new"} == set(outcomes) and len(outcomes) > (20 if verb == "install" else 6)


def test_the_precision_that_is_served_is_the_one_that_is_tried(tmp_path: Path, kcm: Any) -> None:
    bundle = edge_kit.make_bundle(tmp_path / "b")
    code, _, err = kcm("bundle", "install", bundle, "--store", tmp_path / "s", "--precision", "int8")
    assert code == 5 and "has no int8 model, only fp32" in err and not BundleStore(tmp_path / "s").state().current
    assert kcm("bundle", "install", bundle, "--store", tmp_path / "s", "--precision", "fp8")[0] == 3
    assert kcm("bundle", "install", bundle, "--store", tmp_path / "s")[0] == 0
