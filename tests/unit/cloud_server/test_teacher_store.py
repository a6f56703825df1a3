from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import cloud_kit
import numpy as np
import pytest
from cloud_kit import row

from cloud_server.batcher import Batcher, Urgency
from cloud_server.fill import fill_when_idle
from cloud_server.store import TeacherStore, hash_payload
from kcm.errors import ConfigError, StoreError
from kcm.sample import HintArm


@pytest.fixture
def store(tmp_path: Path) -> Any:
    opened = TeacherStore(tmp_path, "0")
    yield opened
    opened.close()


def test_a_resend_finds_the_very_bytes_that_were_committed(store: TeacherStore) -> None:
    first = row("s1")
    assert store.commit([first]).result() == [None]
    found = store.lookup("edge-1", ["s1", "s2"]).result()
    assert list(found) == ["s1"]
    assert found["s1"].answer_logits.tobytes() == first.answer_logits.tobytes()
    assert found["s1"].payload_hash == hash_payload("profit rose") != hash_payload(b"profit rose")


def test_the_first_commit_wins(store: TeacherStore) -> None:
    first, second = row("s1"), row("s1", answer_logits=np.ones(4, np.float32))
    store.commit([first]).result()
    (kept,) = store.commit([second]).result()
    assert kept is not None
    np.testing.assert_array_equal(kept.answer_logits, first.answer_logits)


def test_one_id_of_two_edges_is_two_samples(store: TeacherStore) -> None:
    assert store.commit([row("s1"), row("s1", edge_id="edge-2")]).result() == [None, None]
    assert store.lookup("edge-3", ["s1"]).result() == {}


def test_rows_survive_a_reopen(tmp_path: Path) -> None:
    first = TeacherStore(tmp_path, "0")
    first.commit([row("s1")]).result()
    first.close()
    again = TeacherStore(tmp_path, "0")
    assert list(again.lookup("edge-1", ["s1"]).result()) == ["s1"]
    again.close()
    with pytest.raises(StoreError, match="closed"):
        again.commit([row("s2")]).result()


def test_a_replica_is_one_process_at_a_time(tmp_path: Path) -> None:
    first = TeacherStore(tmp_path, "0")
    with pytest.raises(StoreError, match="another kcm cloud is replica '0'") as caught:
        TeacherStore(tmp_path, "0")
    assert "--replica NAME" in caught.value.fix
    TeacherStore(tmp_path, "1").close()
    first.close()
    TeacherStore(tmp_path, "0").close()


def test_a_full_store_says_so_keeps_what_it_has_and_still_reads(tmp_path: Path) -> None:
    store = TeacherStore(tmp_path, "0", max_bytes=300_000)
    kept: list[str] = []

    def commit_until_it_fails() -> None:
        while True:
            store.commit([row(f"s{len(kept)}", text="x" * 5000)]).result()
            kept.append(f"s{len(kept)}")

    with pytest.raises(StoreError, match="full"):
        commit_until_it_fails()
    assert len(kept) > 10
    assert sorted(store.lookup("edge-1", kept).result()) == sorted(kept)
    store.close()


def test_only_hinted_rows_wait_for_teacher_logits(store: TeacherStore) -> None:
    hinted = row("s2", text="oil fell", hint_arm=HintArm.CANDIDATES)
    other = row("s3", hint_arm=HintArm.ASSERTION, teacher_id="another teacher")
    store.commit([row("s1"), hinted, other]).result()
    (waiting,) = store.unfilled("rule", 10).result()
    assert waiting.payload == "oil fell"


def test_fill_scores_hinted_rows_without_the_hint_and_passes_over_one_that_the_model_fails_on(store: TeacherStore) -> None:
    texts = ["oil", "steel", "explode", "price", "share"]
    store.commit([row(f"s{i}", text=text, hint_arm=HintArm.CANDIDATES) for i, text in enumerate(texts)]).result()

    async def play() -> None:
        model = cloud_kit.RuleModel()
        batcher = Batcher(model.logits, max_batch=4, max_queue=8)
        filling = asyncio.ensure_future(fill_when_idle(store, batcher, "rule", batch=4, pause_s=0.01))
        await asyncio.to_thread(cloud_kit.wait_until, lambda: [r.payload for r in store.unfilled("rule", 9).result()] == ["explode"])
        filling.cancel()
        await batcher.drain()
        assert {hint for _, hint in model.calls} == {None}

    asyncio.run(play())


def test_fill_waits_behind_live_calls() -> None:
    assert Urgency.LIVE < Urgency.BACKFILL < Urgency.FILL


@pytest.mark.parametrize("replica", ["", "a/b", "../up", "x" * 65])
def test_a_replica_that_is_no_name_is_refused(tmp_path: Path, replica: str) -> None:
    with pytest.raises(ConfigError, match="is no name"):
        TeacherStore(tmp_path, replica)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        TeacherStore(tmp_path / "file" / "store", "0")
