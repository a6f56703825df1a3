"""The Cloud service over real gRPC on loopback, in this process, with a rule in the model's place so that scores are known."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path
from typing import Any

import apsw
import cloud_kit
import grpc
import numpy as np
import pytest
from cloud_kit import HINT, SPACE, request, sample
from grpc_health.v1 import health_pb2, health_pb2_grpc
from service_kit import TASK, play, refused, scores, scraped, serving

from cloud_server.config import CloudConfig
from cloud_server.server import running
from kcm.errors import KcmError
from kcm.sample import Float32, HintArm
from protos.kcm.v1 import cloud_pb2, cloud_pb2_grpc, sample_pb2

pytestmark = pytest.mark.slow


def test_samples_are_answered_in_order_and_stored(tmp_path: Path) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        texts = list(cloud_kit.TEXTS)
        reply = await stub.Predict(request(*(sample(f"s{i}", text) for i, text in enumerate(texts))), timeout=5)
        assert (reply.teacher_id, reply.prompt_id) == ("rule", "prompt")
        assert [p.sample_id for p in reply.predictions] == [f"s{i}" for i in range(5)]
        for text, prediction in zip(texts, reply.predictions, strict=True):
            expected = model.row(text)
            np.testing.assert_array_equal(scores(prediction), expected)
            assert prediction.label_id == expected.argmax() and prediction.label == cloud_kit.LABELS[expected.argmax()]
            assert prediction.stored and prediction.hint_arm == HintArm.NONE and prediction.scores.kind == sample_pb2.Scores.LOGIT

    play(tmp_path, act)
    with apsw.Connection(str(tmp_path / "store" / "inbox-0.db")) as db:
        assert db.execute("SELECT count(*), count(teacher_logits) FROM rows").fetchall() == [(5, 5)]


def test_a_resend_gets_the_stored_bytes_and_the_model_is_not_asked(tmp_path: Path) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        first = await stub.Predict(request(sample("s1"), sample("s2", "oil")), timeout=5)
        again = await stub.Predict(request(sample("s2", "oil"), sample("s3", "steel"), sample("s1")), timeout=5)
        assert [text for text, _ in model.calls] == ["profit rose", "oil", "steel"]
        assert first.predictions[0] == again.predictions[2] and first.predictions[1] == again.predictions[0]

    play(tmp_path, act)


def test_another_edge_may_use_the_same_id(tmp_path: Path) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        await stub.Predict(request(sample("s1")), timeout=5)
        await stub.Predict(request(sample("s1", "oil"), edge_id="edge-2"), timeout=5)
        assert len(model.calls) == 2

    play(tmp_path, act)


def test_two_calls_at_once_with_one_sample_get_one_answer(tmp_path: Path) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        model.hold = threading.Event()
        calls = [asyncio.ensure_future(_call(stub, "s1")) for _ in range(2)]
        await asyncio.sleep(0.2)
        model.hold.set()
        first, second = await asyncio.gather(*calls)
        assert first.predictions == second.predictions and first.predictions[0].stored

    play(tmp_path, act)


def test_two_calls_at_once_with_one_id_and_two_payloads_get_each_its_own_answer_and_one_is_stored(tmp_path: Path) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        model.hold = threading.Event()
        calls = [asyncio.ensure_future(_call(stub, "s1", text)) for text in ("oil", "steel")]
        await asyncio.sleep(0.2)
        model.hold.set()
        answers = [reply.predictions[0] for reply in await asyncio.gather(*calls)]
        for text, answer in zip(("oil", "steel"), answers, strict=True):
            np.testing.assert_array_equal(scores(answer), model.row(text))
        assert sorted(answer.stored for answer in answers) == [False, True]

    play(tmp_path, act)


def test_what_another_teacher_answered_is_scored_anew_and_stays_stored(tmp_path: Path) -> None:
    old = cloud_kit.row("s1", text="oil", teacher_id="last year's")
    cloud_kit.put(tmp_path / "store", old)

    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        (answer,) = (await _call(stub, "s1", "oil")).predictions
        np.testing.assert_array_equal(scores(answer), model.row("oil"))
        assert answer.stored

    play(tmp_path, act)
    with apsw.Connection(str(tmp_path / "store" / "inbox-0.db")) as db:
        assert db.execute("SELECT teacher_id, answer_logits FROM rows").fetchall() == [("last year's", old.answer_logits.tobytes())]


async def _call(stub: Any, sample_id: str, text: str = "profit rose") -> Any:
    return await stub.Predict(request(sample(sample_id, text)), timeout=5)


def test_hints_reach_the_model_and_the_store_waits_for_the_teachers_own_logits(tmp_path: Path) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        reply = await stub.Predict(request(sample("s1", hint=HINT, p_hint=0.75), sample("s2", p_hint=0.75)), timeout=5)
        assert [hint.label_ids if hint else None for _, hint in model.calls] == [(3, 1), None]
        assert [p.hint_arm for p in reply.predictions] == [HintArm.CANDIDATES, HintArm.NONE]
        np.testing.assert_array_equal(scores(reply.predictions[0]), model.row("profit rose", model.calls[0][1]))

    play(tmp_path, act, fill=False)
    with apsw.Connection(str(tmp_path / "store" / "inbox-0.db")) as db:
        assert db.execute("SELECT sample_id, p_hint, hint_arm, teacher_logits IS NULL FROM rows ORDER BY seq").fetchall() == [
            ("s1", 0.75, 2, 1),
            ("s2", 0.75, 1, 0),
        ]


def test_an_idle_server_fills_the_teachers_own_logits(tmp_path: Path) -> None:
    def filled() -> list[Any]:
        with apsw.Connection(str(tmp_path / "store" / "inbox-0.db")) as db:
            return [value for (value,) in db.execute("SELECT teacher_logits FROM rows")]

    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        await stub.Predict(request(sample("s1", hint=HINT)), timeout=5)
        await asyncio.to_thread(cloud_kit.wait_until, lambda: filled() != [None])

    play(tmp_path, act)
    assert filled() == [cloud_kit.RuleModel.row("profit rose").tobytes()]


def test_the_fill_counts_the_answers_that_the_hint_had_changed(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(40)]
    row = cloud_kit.RuleModel.row
    changed = sum(row(text, HINT).argmax() != row(text).argmax() for text in texts)
    assert 0 < changed < 40

    async def run() -> None:
        async with serving(tmp_path, cloud_kit.RuleModel()) as (stub, _, metrics):
            await stub.Predict(request(*(sample(text, text, hint=HINT) for text in texts)), timeout=5)
            for _ in range(100):
                text = await scraped(metrics)
                if f'kcm_cloud_hint_pairs_total{{answer="same"}} {40.0 - changed}' in text:
                    break
                await asyncio.sleep(0.1)
            assert f'kcm_cloud_hint_pairs_total{{answer="changed"}} {float(changed)}' in text

    asyncio.run(run())


def test_a_model_that_reads_no_hints_gets_none(tmp_path: Path) -> None:
    async def run() -> None:
        model = cloud_kit.RuleModel()
        model.reads_hints = False
        async with serving(tmp_path, model) as (stub, _, _):
            model.calls.clear()
            reply = await stub.Predict(request(sample("s1", hint=HINT)), timeout=5)
            assert model.calls == [("profit rose", None)] and reply.predictions[0].hint_arm == HintArm.NONE

    asyncio.run(run())


def test_backfill_is_served_behind_live(tmp_path: Path) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        model.hold = threading.Event()

        async def call(sample_id: str, purpose: Any) -> None:
            await stub.Predict(request(sample(sample_id, sample_id, purpose=purpose)), timeout=10)

        calls = []
        for sample_id, purpose in [
            ("running", cloud_pb2.LIVE),
            ("old", cloud_pb2.BACKFILL),
            ("shadow", cloud_pb2.SHADOW),
            ("live", cloud_pb2.LIVE),
        ]:
            calls.append(asyncio.ensure_future(call(sample_id, purpose)))
            await asyncio.sleep(0.15)
        model.hold.set()
        await asyncio.gather(*calls)
        assert [text for text, _ in model.calls] == ["running", "live", "old", "shadow"]

    play(tmp_path, act, max_batch=1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(), "no samples"),
        (request(sample("s1"), edge_id=""), "edge_id is empty"),
        (request(sample("")), "sample 0 (''): sample_id is empty"),
        (request(sample("ok"), sample("s\n1")), "sample 1 ('s\\n1'): sample_id is longer"),
        (request(sample("s1"), sample("s1")), "sample 1 ('s1'): its sample_id appears twice"),
        (request(sample("s1", payload=None)), "sample 0 ('s1'): payload is empty"),
        (request(sample("s1", "x" * 5000)), "payload has 5000 bytes, at most 4096"),
        (request(cloud_pb2.PredictSample(sample_id="s1", purpose=1, payload=sample_pb2.Payload(image=b"png"))), "the payload is an image"),
        (request(sample("s1", purpose=0)), "purpose is not set"),
        (request(sample("s1", confidence=float("nan"))), "confidence is outside 0..1"),
        (request(sample("s1", p_escalate=1.5)), "p_escalate is outside 0..1"),
        (request(sample("s1", p_hint=-0.1)), "p_hint is outside 0..1"),
        (request(sample("s1", p_hint=float("nan"))), "p_hint is outside 0..1"),
        (request(sample("s1", small=np.zeros(3, np.float32))), "scores have 12 bytes, expected 16"),
        (request(sample("s1", small=np.full(4, np.inf, np.float32))), "scores are not finite"),
        (request(*(sample(f"s{i}") for i in range(9))), "9 samples, at most 8"),
    ],
)
def test_what_can_never_be_answered_is_refused_with_its_reason(tmp_path: Path, bad: cloud_pb2.PredictRequest, message: str) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        await refused(stub.Predict(bad, timeout=5), grpc.StatusCode.INVALID_ARGUMENT, message)
        assert not model.calls

    play(tmp_path, act, max_sample_bytes=4096, max_samples=8)


def test_a_blank_text_is_answered(tmp_path: Path) -> None:
    """An application may send one, and a refusal would cost the samples beside it their answers."""

    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        reply = await stub.Predict(request(sample("s1", ""), sample("s2", " \n")), timeout=5)
        assert all(prediction.stored for prediction in reply.predictions)

    play(tmp_path, act)


def test_a_bad_hint_is_refused(tmp_path: Path) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        bad = sample("s1")
        bad.hint.CopyFrom(sample_pb2.Hint(label_ids=[7], probabilities=[0.5], confidence=0.5))
        await refused(stub.Predict(request(bad), timeout=5), grpc.StatusCode.INVALID_ARGUMENT, "hint names label 7, the task has 4")

    play(tmp_path, act)


def test_a_used_id_with_another_payload_is_refused(tmp_path: Path) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        await stub.Predict(request(sample("s1")), timeout=5)
        error = await refused(
            stub.Predict(request(sample("s1", "secret text")), timeout=5), grpc.StatusCode.INVALID_ARGUMENT, "used before"
        )
        assert "secret" not in str(error.details())

    play(tmp_path, act)


def test_a_call_without_a_deadline_is_refused(tmp_path: Path) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        await refused(stub.Predict(request(sample("s1"))), grpc.StatusCode.INVALID_ARGUMENT, "no deadline")
        await refused(stub.Describe(cloud_pb2.DescribeRequest()), grpc.StatusCode.INVALID_ARGUMENT, "no deadline")

    play(tmp_path, act)


def test_another_task_or_label_space_is_a_failed_precondition(tmp_path: Path) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        await refused(
            stub.Predict(request(sample("s1"), task_id="other"), timeout=5), grpc.StatusCode.FAILED_PRECONDITION, "answers for task toy"
        )
        await refused(
            stub.Predict(request(sample("s1"), label_space="0"), timeout=5), grpc.StatusCode.FAILED_PRECONDITION, "label space '0'"
        )

    play(tmp_path, act)


def test_describe_says_what_is_served(tmp_path: Path) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        got = await stub.Describe(cloud_pb2.DescribeRequest(), timeout=5)
        assert got == cloud_pb2.DescribeReply(
            task_id="toy", label_space=SPACE, teacher_id="rule", prompt_id="prompt", reads_hints=True, max_samples=7
        )

    play(tmp_path, act, max_samples=7)


def test_a_full_queue_gives_resource_exhausted_with_a_pushback(tmp_path: Path) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        model.hold = threading.Event()
        waiting = []
        for sample_id in ("in the model", "in the queue"):
            waiting.append(asyncio.ensure_future(_call(stub, sample_id)))
            await asyncio.sleep(0.2)
        error = await refused(stub.Predict(request(sample("s3")), timeout=5), grpc.StatusCode.RESOURCE_EXHAUSTED, "queue is full")
        pushback = error.trailing_metadata()["grpc-retry-pushback-ms"]
        assert int(pushback) >= 1
        model.hold.set()
        await asyncio.gather(*waiting)

    play(tmp_path, act, max_batch=1, max_queue=1, max_samples=1)


def test_a_deadline_that_passes_in_the_queue_costs_the_model_nothing(tmp_path: Path) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        model.hold = threading.Event()
        running_call = asyncio.ensure_future(_call(stub, "running"))
        await asyncio.sleep(0.2)
        await refused(stub.Predict(request(sample("late", "late")), timeout=0.3), grpc.StatusCode.DEADLINE_EXCEEDED, "")
        await asyncio.sleep(0.1)
        model.hold.set()
        await running_call
        await _call(stub, "after")
        assert "late" not in [text for text, _ in model.calls]

    play(tmp_path, act, max_batch=1)


def test_a_failing_model_leaks_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def act(stub: Any, model: cloud_kit.RuleModel) -> None:
        error = await refused(stub.Predict(request(sample("s1", "explode")), timeout=5), grpc.StatusCode.INTERNAL, "the model failed")
        assert "secret" not in str(error.details())
        assert (await _call(stub, "s2")).predictions[0].stored

    play(tmp_path, act)


def test_a_full_store_is_no_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is really full: the file may not grow past a cap."""
    import cloud_server.server
    from cloud_server.store import TeacherStore

    monkeypatch.setattr(cloud_server.server, "TeacherStore", lambda root, replica: TeacherStore(root, replica, max_bytes=300_000))

    async def run() -> None:
        async with serving(tmp_path, cloud_kit.RuleModel()) as (stub, _, metrics):
            stored = []
            for number in range(80):
                reply = await stub.Predict(request(sample(f"s{number}", f"{number} " + "x" * 9000)), timeout=5)
                stored.append(reply.predictions[0].stored)
                assert len(scores(reply.predictions[0])) == 4
            assert stored[0] and not stored[-1]
            resend = await stub.Predict(request(sample("s0", "0 " + "x" * 9000)), timeout=5)
            assert resend.predictions[0].stored, "what is in the store is still answered from it"
            text = await scraped(metrics)
            assert f'kcm_cloud_store_rows_total{{result="failed"}} {float(stored.count(False))}' in text

    asyncio.run(run())


def test_metrics_count_what_happened(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, cloud_kit.RuleModel()) as (stub, _, metrics):
            await stub.Predict(request(sample("s1"), sample("s2", hint=HINT, purpose=cloud_pb2.BACKFILL)), timeout=5)
            await stub.Predict(request(sample("s1")), timeout=5)
            await refused(stub.Predict(request(), timeout=5), grpc.StatusCode.INVALID_ARGUMENT, "")
            text = await scraped(metrics)
            for line in (
                'kcm_cloud_requests_total{code="OK"} 2.0',
                'kcm_cloud_requests_total{code="INVALID_ARGUMENT"} 1.0',
                'kcm_cloud_samples_total{purpose="live"} 2.0',
                'kcm_cloud_samples_total{purpose="backfill"} 1.0',
                'kcm_cloud_hint_arm_total{arm="none"} 2.0',
                'kcm_cloud_hint_arm_total{arm="candidates"} 1.0',
                'kcm_cloud_store_rows_total{result="stored"} 2.0',
                'kcm_cloud_store_rows_total{result="resent"} 1.0',
                "kcm_cloud_queue_depth 0.0",
                'kcm_cloud_batch_size_bucket{le="2.0"}',
                "kcm_cloud_model_seconds_count",
            ):
                assert line in text, line

    asyncio.run(run())


def test_health_serves_after_the_warm_up_and_a_model_that_cannot_warm_up_never_serves(tmp_path: Path) -> None:
    class Broken(cloud_kit.RuleModel):
        def logits(self, samples: Any, hints: Any) -> Float32:
            raise RuntimeError("no weights")

    async def run() -> None:
        model = cloud_kit.RuleModel()
        async with serving(tmp_path, model) as (_, channel, _):
            assert model.calls, "a warm-up inference went first"
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="kcm.v1.Cloud"), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(KcmError, match="warm-up"):
            async with serving(tmp_path, Broken()):
                pass

    asyncio.run(run())


def test_calls_in_flight_end_when_the_server_stops(tmp_path: Path) -> None:
    async def run() -> None:
        model = cloud_kit.RuleModel()
        settings = CloudConfig(task="t", large="l", store=str(tmp_path), listen="127.0.0.1:0", drain_s=5.0)
        stack = contextlib.AsyncExitStack()
        address, _ = await stack.enter_async_context(running(settings, TASK, model))
        model.hold = threading.Event()
        async with grpc.aio.insecure_channel(address) as channel:
            call = asyncio.ensure_future(_call(cloud_pb2_grpc.CloudStub(channel), "s1"))
            await asyncio.sleep(0.2)
            stopping = asyncio.ensure_future(stack.aclose())
            await asyncio.sleep(0.2)
            model.hold.set()
            assert (await call).predictions[0].stored
            await stopping

    asyncio.run(run())
