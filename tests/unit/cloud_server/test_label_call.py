"""Cloud.Label over real gRPC: what is refused, and that what is acknowledged is committed."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import apsw
import cloud_kit
import grpc
import pytest
from cloud_kit import labels_request, request, sample
from service_kit import play, refused, scraped, serving

from cloud_server.compact import compact


def told(folder: Path) -> list[Any]:
    with apsw.Connection(str(folder / "store" / "inbox-0.db")) as db:
        return db.execute("SELECT edge_id, sample_id, label_space, label_id FROM labels ORDER BY seq").fetchall()


def test_truths_are_committed_before_the_reply_and_end_in_the_rows(tmp_path: Path) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        early = await stub.Label(labels_request(s2=3), timeout=5)
        assert early.stored == 1 and told(tmp_path) == [("edge-1", "s2", cloud_kit.SPACE, 3)]
        await stub.Predict(request(sample("s1"), sample("s2"), sample("s3")), timeout=5)
        assert (await stub.Label(labels_request(s1=0, unknown=2), timeout=5)).stored == 2
        assert not [text for text, _ in model.calls if text != "profit rose"], "a label asks no model"

    play(tmp_path, act)
    compact(tmp_path / "store")
    assert cloud_kit.stored_labels(tmp_path / "store") == {"s1": 0, "s2": 3, "s3": None}


def test_of_two_truths_about_a_sample_the_last_holds_within_a_call_and_between_calls(tmp_path: Path) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        twice = labels_request(s1=1, s2=2)
        twice.labels.add(sample_id="s1", label_id=3)
        assert (await stub.Label(twice, timeout=5)).stored == 3
        await stub.Label(labels_request(s2=0), timeout=5)

    play(tmp_path, act)
    assert [(sample_id, label) for _, sample_id, _, label in told(tmp_path)] == [("s1", 3), ("s2", 0)]


@pytest.mark.parametrize(
    ("bad", "code", "message"),
    [
        (labels_request(), grpc.StatusCode.INVALID_ARGUMENT, "the call has no labels"),
        (labels_request(s1=1, edge_id=""), grpc.StatusCode.INVALID_ARGUMENT, "edge_id is empty"),
        (labels_request(**{"": 1}), grpc.StatusCode.INVALID_ARGUMENT, "label 0 (''): sample_id is empty"),
        (labels_request(**{"s\n1": 1}), grpc.StatusCode.INVALID_ARGUMENT, "label 0 ('s\\n1'): sample_id is longer"),
        (labels_request(s1=1, s2=4), grpc.StatusCode.INVALID_ARGUMENT, "label 1 ('s2'): label_id is 4, the task has 4 labels"),
        (labels_request(**{f"s{i}": 1 for i in range(9)}), grpc.StatusCode.INVALID_ARGUMENT, "9 labels, at most 8"),
        (labels_request(s1=1, task_id="other"), grpc.StatusCode.FAILED_PRECONDITION, "answers for task toy"),
        (labels_request(s1=1, label_space="0"), grpc.StatusCode.FAILED_PRECONDITION, "label space '0'"),
    ],
)
def test_a_call_that_can_never_be_taken_is_refused_whole(tmp_path: Path, bad: Any, code: grpc.StatusCode, message: str) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        await refused(stub.Label(bad, timeout=5), code, message)

    play(tmp_path, act, max_samples=8)
    assert told(tmp_path) == []


def test_a_call_without_a_deadline_is_refused(tmp_path: Path) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        await refused(stub.Label(labels_request(s1=1)), grpc.StatusCode.INVALID_ARGUMENT, "no deadline")

    play(tmp_path, act)
    assert told(tmp_path) == []


def test_a_store_that_cannot_commit_is_unavailable_and_nothing_of_the_call_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is really full: the file may not grow past a cap."""
    import cloud_server.server
    from cloud_server.store import TeacherStore

    monkeypatch.setattr(cloud_server.server, "TeacherStore", lambda root, replica: TeacherStore(root, replica, max_bytes=300_000))

    async def run() -> None:
        async with serving(tmp_path, cloud_kit.RuleModel()) as (stub, _, metrics):
            taken, calls = 0, 0

            async def until_it_fails() -> None:
                nonlocal taken, calls
                while calls < 100:
                    # Their ids are long: each call needs pages of its own.
                    names = {f"{calls}-{number}-" + "x" * 200: 1 for number in range(50)}
                    taken += (await stub.Label(labels_request(**names), timeout=5)).stored
                    calls += 1

            await refused(until_it_fails(), grpc.StatusCode.UNAVAILABLE, "send them again")
            assert taken >= 200 and len(told(tmp_path)) == taken
            text = await scraped(metrics)
            for line in (
                f'kcm_cloud_labels_total{{result="stored"}} {float(taken)}',
                'kcm_cloud_labels_total{result="failed"} 50.0',
                'kcm_cloud_label_requests_total{code="UNAVAILABLE"} 1.0',
            ):
                assert line in text, line
            assert 'kcm_cloud_requests_total{code="UNAVAILABLE"}' not in text, "Predict calls are counted apart"

    asyncio.run(run())


def test_more_truths_than_the_disk_keeps_up_with_are_sent_back(tmp_path: Path) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        with contextlib.closing(apsw.Connection(str(tmp_path / "store" / "inbox-0.db"))) as slow:
            slow.execute("BEGIN IMMEDIATE")  # the server's commits wait
            waiting = [asyncio.ensure_future(stub.Label(labels_request(**{f"s{i}": 1}), timeout=9)) for i in range(4)]
            await asyncio.sleep(0.3)
            error = await refused(stub.Label(labels_request(s9=1), timeout=5), grpc.StatusCode.RESOURCE_EXHAUSTED, "wait for the disk")
            assert int(error.trailing_metadata()["grpc-retry-pushback-ms"]) >= 1
            slow.execute("COMMIT")
        assert [reply.stored for reply in await asyncio.gather(*waiting)] == [1] * 4
        await stub.Label(labels_request(s9=1), timeout=5)

    play(tmp_path, act, max_queue=4, max_samples=4)
    assert len(told(tmp_path)) == 5
