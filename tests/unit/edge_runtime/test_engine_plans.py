"""The cache of built engines: what is refused, why, and what goes when there are too many."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_runtime.engines.plans import PlanCache, PlanKey
from kcm.assets import cache_dir
from kcm.errors import EngineError

PLAN = bytes(range(256)) * 16


def key(**more: Any) -> PlanKey:
    base = PlanKey(
        model=hashlib.sha256(b"onnx").hexdigest(),
        flavour="tensorrt-rtx",
        version="1.7.1.116",
        target="sm86",
        flags=("strongly-typed", "no-tf32"),
        inputs={"ids": 600, "weights": 600},
        max_batch=64,
        workspace_mb=1024,
    )
    return msgspec.structs.replace(base, **more)


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "engines")


def test_what_was_written_is_read(cache: PlanCache) -> None:
    sidecar = cache.write(key(), PLAN, 1.25)
    assert cache.read(key()) == PLAN and cache.why_not(key()) == ""
    assert (sidecar.size, sidecar.seconds, sidecar.key) == (len(PLAN), 1.25, key())
    assert sidecar.sha256 == hashlib.sha256(PLAN).hexdigest()
    names = sorted(path.name for path in cache.folder.iterdir())
    assert names == [f"{key().name}.json", f"{key().name}.plan"]
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in cache.folder.iterdir()} == {0o600}


def test_the_cache_lies_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KCM_CACHE", str(tmp_path / "kcm"))
    assert PlanCache().folder == cache_dir() / "engines" == tmp_path / "kcm" / "engines"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": "1.8.0"}, "version 1.7.1.116, wanted 1.8.0"),
        ({"target": "sm89"}, "target sm86, wanted sm89"),
        ({"max_batch": 128}, "max_batch 64, wanted 128"),
        ({"inputs": {"ids": 600, "weights": 5}}, r"inputs ids:600\+weights:600, wanted ids:600\+weights:5"),
        ({"flags": ("strongly-typed",)}, r"flags strongly-typed\+no-tf32, wanted strongly-typed"),
        ({"inputs": {"ids": 600}}, r"inputs ids:600\+weights:600, wanted ids:600"),
        ({"workspace_mb": 1}, "workspace_mb 1024, wanted 1"),
        ({"version": "2", "target": "sm120"}, "version 1.7.1.116, wanted 2, target sm86, wanted sm120"),
    ],
)
def test_a_plan_of_other_circumstances_is_not_used_and_the_difference_is_named(cache: PlanCache, change: dict[str, Any], says: str) -> None:
    cache.write(key(), PLAN, 1.0)
    with pytest.raises(EngineError, match=f"no cached tensorrt-rtx engine of this model fits: {says}$"):
        cache.read(key(**change))


def test_of_another_model_or_library_nothing_is_said(cache: PlanCache) -> None:
    cache.write(key(), PLAN, 1.0)
    assert cache.why_not(key(model="0" * 64)) == "no tensorrt-rtx engine of this model is cached"
    assert cache.why_not(key(flavour="tensorrt")) == "no tensorrt engine of this model is cached"


def _edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path, Path], None]:
    def damage(plan: Path, sidecar: Path) -> None:
        found = json.loads(sidecar.read_text())
        change(found)
        sidecar.write_text(json.dumps(found))

    return damage


def _link(plan: Path, sidecar: Path) -> None:
    plan.rename(plan.with_name("elsewhere"))
    plan.symlink_to("elsewhere")


def _pipe(plan: Path, sidecar: Path) -> None:
    plan.unlink()
    os.mkfifo(plan, 0o600)


DAMAGE: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "truncated plan": (lambda plan, _: plan.write_bytes(PLAN[:-1]), "its plan has 4095 bytes, its sidecar says 4096"),
    "longer plan": (lambda plan, _: plan.write_bytes(PLAN + b"x"), "its plan has 4097 bytes, its sidecar says 4096"),
    "one bit": (lambda plan, _: plan.write_bytes(b"\x01" + PLAN[1:]), "its plan is not the one that was built: another sha256"),
    "empty plan": (lambda plan, _: plan.write_bytes(b""), "its plan has 0 bytes"),
    "no plan": (lambda plan, _: plan.unlink(), "its plan is gone"),
    "no sidecar": (lambda _, sidecar: sidecar.unlink(), "no tensorrt-rtx engine of this model is cached"),
    "sidecar cut": (lambda _, sidecar: sidecar.write_bytes(sidecar.read_bytes()[:50]), "it can't be read: Input data was truncated"),
    "sidecar no JSON": (lambda _, sidecar: sidecar.write_bytes(b"\xff"), "it can't be read"),
    "sidecar of another version": (
        _edit(lambda found: found["key"].update(version="9.9")),
        "is of another engine: version 9.9, wanted 1.7.1.116",
    ),
    "sidecar of another schema": (_edit(lambda found: found["key"].update(schema=1)), "is of another engine: schema 1, wanted 2"),
    "sidecar with more": (_edit(lambda found: found.update(more=1)), "it can't be read: Object contains unknown field `more`"),
    "sidecar of another plan": (_edit(lambda found: found.update(sha256="0" * 64)), "another sha256"),
    "sidecar of another size": (_edit(lambda found: found.update(size=10)), "its plan has 11 bytes, its sidecar says 10"),
    "plan is a link": (_link, "it can't be read: .*symbolic"),
    "plan is a pipe": (_pipe, "is no file"),
    "plan others may write": (lambda plan, _: plan.chmod(0o622), r"plan can be written by others \(mode 622\)"),
    "sidecar others may write": (lambda _, sidecar: sidecar.chmod(0o620), r"json can be written by others \(mode 620\)"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_entry_is_refused_and_building_anew_mends_it(cache: PlanCache, case: str) -> None:
    damage, says = DAMAGE[case]
    cache.write(key(), PLAN, 1.0)
    damage(cache.folder / f"{key().name}.plan", cache.folder / f"{key().name}.json")
    with pytest.raises(EngineError, match=says) as caught:
        cache.read(key())
    assert cache.why_not(key()) == caught.value.message and "\n" not in caught.value.message
    cache.write(key(), PLAN, 1.0)
    assert cache.read(key()) == PLAN


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o720])
def test_a_folder_that_others_may_write_is_refused(cache: PlanCache, mode: int) -> None:
    cache.write(key(), PLAN, 1.0)
    cache.folder.chmod(mode)
    for use in (lambda: cache.read(key()), lambda: cache.write(key(), PLAN, 1.0)):
        with pytest.raises(EngineError, match=f"can be written by others \\(mode {mode:o}\\): plans are code") as caught:
            use()
        assert f"chmod 700 {cache.folder}" in caught.value.fix


def test_a_folder_of_another_user_is_refused(cache: PlanCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write(key(), PLAN, 1.0)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert "belongs to user" in cache.why_not(key())


def test_a_folder_that_is_a_link_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        assert "can't be used" in PlanCache(tmp_path / name).why_not(key())


def test_those_used_longest_ago_go_and_the_other_flavour_stays(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "engines", keep=2)
    cache.write(key(flavour="tensorrt"), PLAN, 1.0)
    for batch in (1, 2):
        cache.write(key(max_batch=batch), PLAN, 1.0)
        time.sleep(0.02)
    cache.read(key(max_batch=1))  # used since 2 was
    time.sleep(0.02)
    cache.write(key(max_batch=3), PLAN, 1.0)
    there = [batch for batch in (1, 2, 3) if not cache.why_not(key(max_batch=batch))]
    assert there == [1, 3] and cache.read(key(flavour="tensorrt")) == PLAN
    assert len(list(cache.folder.iterdir())) == 6


def test_what_a_broken_write_left_goes(cache: PlanCache) -> None:
    cache.write(key(), PLAN, 1.0)
    old, fresh, orphan, broken = (cache.folder / name for name in ("a.plan.1.new", "b.plan.2.new", f"{'0' * 64}.plan", f"{'1' * 64}.json"))
    for path in (old, fresh, orphan, broken):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 100_000,) * 2)
    cache.write(key(max_batch=1), PLAN, 1.0)
    assert [path.exists() for path in (old, fresh, orphan, broken)] == [False, True, False, False]
    assert cache.read(key()) == cache.read(key(max_batch=1)) == PLAN


def test_a_build_that_failed_is_remembered_by_its_key_until_it_succeeds(cache: PlanCache) -> None:
    assert cache.failures() == [] and cache.failed(key()) is None and not cache.folder.exists()
    cache.note_failure(key(), "the builder was killed by SIGSEGV")
    found = cache.failed(key())
    assert found is not None and (found.key, found.reason) == (key(), "the builder was killed by SIGSEGV")
    for other in (key(model="0" * 64), key(version="2"), key(target="sm89"), key(max_batch=1)):
        assert cache.failed(other) is None, "another model, library, GPU or profile may build"
    cache.write(key(max_batch=1), PLAN, 1.0)
    assert cache.failures() == [found], "another plan says nothing of it"
    cache.write(key(), PLAN, 1.0)
    assert cache.failures() == [] and not cache.failure_file(key()).exists()


def test_removing_the_file_forgets_a_failure_and_a_damaged_one_counts_for_nothing(cache: PlanCache) -> None:
    cache.note_failure(key(), "no")
    cache.failure_file(key()).unlink()
    assert cache.failed(key()) is None
    cache.note_failure(key(), "no")
    cache.failure_file(key()).write_bytes(b"{")
    assert cache.failed(key()) is None


def test_failures_are_few(cache: PlanCache, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(f"2026-11-24T15:00:{second:02}Z" for second in range(60))
    monkeypatch.setattr("edge_runtime.engines.plans._now", lambda: next(times))
    for batch in range(1, 21):
        cache.note_failure(key(max_batch=batch), "no")
    assert [failure.key.max_batch for failure in cache.failures()] == list(range(5, 21))


def test_a_write_that_dies_half_way_changes_nothing(cache: PlanCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write(key(), PLAN, 1.0)
    replace = os.replace

    def full(source: str, target: str, **more: Any) -> None:
        if target.endswith(".json"):
            raise OSError(28, "No space left on device")
        replace(source, target, **more)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(EngineError, match="can't be written: No space left on device"):
        cache.write(key(), PLAN[::-1], 1.0)
    assert "another sha256" in cache.why_not(key()), "the new plan with the old sidecar must not pass"
