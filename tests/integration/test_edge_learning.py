"""What the edge sends up beside the answers: gated hints, explored samples, truths; and what it learns of ε from what comes back."""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import edge_kit
import grpc
import pytest
from edge_kit import EASY, EPSILON, HARD, LABELS, Cloud, feedback, request, running_edge, stub, until

from edge_runtime.bundles import BundleStore
from kcm.calibration import Calibration, Guarantee, HintGate, Reference
from kcm.policy import explores, gate_hint
from kcm.sample import Hint, Purpose, Route
from protos.kcm.v1 import edge_pb2, edge_pb2_grpc

LOCAL, CLOUD, DEGRADED = edge_pb2.InferAnswer.SOURCE_LOCAL, edge_pb2.InferAnswer.SOURCE_CLOUD, edge_pb2.InferAnswer.SOURCE_DEGRADED
QUICK = {
    "KCM_EDGE__SPOOL__DRAIN_MAX_MS": "200",
    "KCM_EDGE__SPOOL__DRAIN_INTERVAL_MS": "20",
    "KCM_EDGE__CLOUD__BREAKER_BASE_MS": "100",
    "KCM_EDGE__CLOUD__BREAKER_MAX_MS": "300",
}
PROMISE = Guarantee(max_drop=0.01, confidence=0.95, upper=0.009, effective_n=900, method="test")


def calibration(**more: object) -> Calibration:
    return Calibration(epsilon=EPSILON, calibration_id="c", **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edge_kit.make_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    made = Cloud(tmp_path / "c")
    with made.run():
        yield made


def status(edge: edge_pb2_grpc.EdgeStub) -> edge_pb2.StatusReply:
    return edge.Status(edge_pb2.StatusRequest(), timeout=5)


@pytest.mark.parametrize(
    ("arm", "lowest", "labels"), [("none", 0.0, 0), ("candidates", 0.0, 3), ("assertion", 0.0, 1), ("candidates", 0.99, 0)]
)
@pytest.mark.parametrize("down", [False, True])
def test_hints_are_gated_by_the_calibration_also_of_what_is_spooled(
    tmp_path: Path, arm: str, lowest: float, labels: int, down: bool
) -> None:
    gate = HintGate(arm=arm, lowest=lowest, no_hint=0.5)  # type: ignore[arg-type]
    bundle = edge_kit.make_bundle(tmp_path / "bundle", calibration=calibration(hint=gate))
    names = tuple(map(str, range(60)))
    cloud = Cloud(tmp_path / "c")
    with running_edge(bundle, tmp_path, "--cloud", cloud.address, **QUICK) as edge:
        made, channel = stub(edge.address)
        with channel:
            if down:
                made.Infer(request(*[HARD[0]] * 60, ids=names), timeout=10)
            with cloud.run():
                if not down:
                    made.Infer(request(*[HARD[0]] * 60, ids=names), timeout=10)
                until(lambda: set(cloud.rows()) == set(names), 10, "all sent")
    full = Hint(label_ids=(0, 1, 2), probabilities=(0.4, 0.3, 0.2), confidence=0.4)
    sent = cloud.sent()
    shown = 0
    for name in names:
        hint, p_hint = gate_hint(full, gate, name)
        assert sent[name]["hint"] == (0 if hint is None else labels)
        assert sent[name]["p_hint"] == pytest.approx(p_hint)
        assert (sent[name]["p_escalate"], sent[name]["small"]) == (1.0, 16), "the small model's logits go along, hint or not"
        assert 0 < sent[name]["confidence"] < EPSILON
        shown += hint is not None
    assert 10 < shown < 50 if labels else shown == 0


def test_explored_samples_are_answered_here_and_sent_later_without_a_hint(tiny_bundle: Path, cloud: Cloud, tmp_path: Path) -> None:
    names = [str(i) for i in range(300)]
    chosen = {name for name in names if explores(name, 0.2)}
    assert 30 < len(chosen) < 90
    with running_edge(
        tiny_bundle, tmp_path, "--cloud", cloud.address, "--explore", "0.2", "--metrics", "127.0.0.1:0", "--json", **QUICK
    ) as edge:
        made, channel = stub(edge.address)
        with channel:
            for name in names:
                (answer,) = made.Infer(request(EASY[int(name) % 4], ids=(name,)), timeout=10).answers
                assert answer.source == LOCAL
            for route in (Route.LOCAL, Route.CLOUD):
                made.Infer(request(*[EASY[0]] * 50, ids=tuple(f"{route.name}-{i}" for i in range(50)), route=route), timeout=10)
            made.Infer(request(HARD[0], ids=("hard",)), timeout=10)
            until(lambda: chosen <= set(cloud.rows()) and status(made).spool_depth == 0, 10, "explored")
            assert status(made).explored == len(chosen) == edge.scrape()["kcm_edge_explored_total"]
            agreement = edge.scrape()['kcm_edge_estimate{of="agreement_local"}']
    sent = cloud.sent()
    assert set(sent) == chosen | {f"CLOUD-{i}" for i in range(50)} | {"hard"}, "route LOCAL never leaves, route CLOUD is no chance"
    for name in chosen:
        row = sent[name]
        assert (row["purpose"], row["hint"], row["p_hint"], row["small"], row["times"]) == (Purpose.EXPLORE, 0, 0.0, 16, 1)
        assert row["p_escalate"] == pytest.approx(0.2) and row["confidence"] > EPSILON
    assert (sent["hard"]["purpose"], sent["hard"]["p_escalate"]) == (Purpose.LIVE, 1.0)
    assert agreement == pytest.approx(sum(len(EASY[int(n) % 4]) % 4 == int(n) % 4 for n in chosen) / len(chosen))


def test_route_local_leaves_no_trace_on_the_disk_though_everything_is_explored(tiny_bundle: Path, tmp_path: Path) -> None:
    cloud = Cloud(tmp_path / "c")  # not running: all that is explored stays in the spool
    with running_edge(tiny_bundle, tmp_path, "--cloud", cloud.address, "--explore", "1") as edge:
        made, channel = stub(edge.address)
        with channel:
            made.Infer(request("the alpha case secret", route=Route.LOCAL), timeout=10)
            made.Infer(request("the alpha case planted"), timeout=10)
            until(lambda: status(made).explored == 1, 5, "in the spool")
        assert edge.stop() == 0
    written = b"".join(path.read_bytes() for path in (tmp_path / "state").iterdir())
    assert b"planted" in written and b"secret" not in written


@pytest.mark.parametrize("arguments", [("--explore", "0"), ("--cloud", "")])
def test_nothing_is_explored_where_it_is_switched_off_or_nobody_would_ask(
    tiny_bundle: Path, cloud: Cloud, tmp_path: Path, arguments: tuple[str, str]
) -> None:
    with running_edge(tiny_bundle, tmp_path, "--cloud", cloud.address, "--explore", "1", *arguments) as edge:
        made, channel = stub(edge.address)
        with channel:
            made.Infer(request(*[EASY[0]] * 50), timeout=10)
            time.sleep(0.5)
            assert (status(made).explored, status(made).spool_depth) == (0, 0)
    assert cloud.rows() == {}


def test_what_is_explored_survives_a_clean_end(tiny_bundle: Path, tmp_path: Path) -> None:
    cloud = Cloud(tmp_path / "c")
    with running_edge(tiny_bundle, tmp_path, "--cloud", cloud.address, "--explore", "1") as edge:
        made, channel = stub(edge.address)
        with channel:
            made.Infer(request(*[EASY[0]] * 40), timeout=10)
        assert edge.stop() == 0  # within the 50 ms that it gathers
    with sqlite3.connect(tmp_path / "state" / "spool.db") as connection:
        assert connection.execute("SELECT count(*) FROM spool").fetchone() == (40,)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((("a", "alpha"), ("b", "omega")), "truth 1: 'omega' is none of the task's 4 labels"),
        ((("", "alpha"),), "truth 0 has no sample_id"),
        ((("a", ""),), "truth 0: '' is none"),
        ((("a", "alpha"), ("x" * 257, "alpha")), "truth 1: sample_id has 257 characters, at most 256"),
        (tuple((str(i), "alpha") for i in range(1025)), "1025 truths in one call, at most 1024"),
    ],
)
def test_a_truth_that_cannot_be_read_is_refused_with_all_of_its_call(
    tiny_bundle: Path, tmp_path: Path, bad: tuple[tuple[str, str], ...], message: str
) -> None:
    with running_edge(tiny_bundle, tmp_path) as edge:
        made, channel = stub(edge.address)
        with channel:
            with pytest.raises(grpc.RpcError, match=message) as caught:
                made.Feedback(feedback(*bad), timeout=5)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert status(made).feedback == 0
            assert made.Feedback(feedback(), timeout=5) == edge_pb2.FeedbackReply()


def test_truths_are_kept_matched_and_sent_and_the_last_one_holds(tiny_bundle: Path, cloud: Cloud, tmp_path: Path) -> None:
    with running_edge(tiny_bundle, tmp_path, "--cloud", cloud.address, "--metrics", "127.0.0.1:0", "--json", **QUICK) as edge:
        made, channel = stub(edge.address)
        with channel:
            made.Infer(request(EASY[0], EASY[1], HARD[0], ids=("a", "b", "c")), timeout=10)
            reply = made.Feedback(feedback(("a", "alpha"), ("b", "alpha"), ("c", "delta"), ("elsewhere", "gamma")), timeout=5)
            assert (reply.kept, reply.matched, reply.dropped) == (4, 3, 0)
            until(lambda: len(cloud.truths()) == 4, 10, "sent")
            assert made.Feedback(feedback(("a", "gamma"), ("a", "beta")), timeout=5).matched == 1
            until(lambda: cloud.truths()["a"] == 1, 10, "corrected")
            until(lambda: edge.scrape()["kcm_edge_feedback_waiting"] == 0, 5, "let go")
            values = edge.scrape()
            assert status(made).feedback == values["kcm_edge_feedback_total"] == 6 and values["kcm_edge_feedback_sent_total"] == 5
            assert values['kcm_edge_estimate{of="accuracy_local"}'] == 0.5
            right = edge_kit.LABELS[len(HARD[0]) % 4] == "delta"
            assert values['kcm_edge_estimate{of="accuracy_escalated"}'] == right
    assert cloud.truths() == {"a": 1, "b": 0, "c": 3, "elsewhere": 2}


def test_a_truth_that_the_cloud_never_takes_goes_alone(tiny_bundle: Path, cloud: Cloud, tmp_path: Path) -> None:
    cloud.set(mode="poison")
    with running_edge(tiny_bundle, tmp_path, "--cloud", cloud.address, "--metrics", "127.0.0.1:0", "--json", **QUICK) as edge:
        made, channel = stub(edge.address)
        with channel:
            made.Feedback(feedback(*((name, "beta") for name in ("a", "b", "poison", "c", "d"))), timeout=5)
            until(lambda: edge.scrape()["kcm_edge_feedback_waiting"] == 0, 10, "settled")
            assert edge.scrape()['kcm_edge_feedback_dropped_total{why="refused"}'] == 1
    assert set(cloud.truths()) == {"a", "b", "c", "d"}
    assert any("truth about sample poison" in line for line in edge.log.splitlines())


def test_a_cloud_without_label_keeps_answering_and_gets_the_truths_once_it_is_updated(
    tiny_bundle: Path, cloud: Cloud, tmp_path: Path
) -> None:
    cloud.set(mode="old")
    # Asked again after 2 s; and a breaker that opens at the first call that says the cloud is down.
    env = {**QUICK, "KCM_EDGE__SPOOL__DRAIN_MAX_MS": "100", "KCM_EDGE__CLOUD__BREAKER_FAILURES": "1"}
    with running_edge(tiny_bundle, tmp_path, "--cloud", cloud.address, "--metrics", "127.0.0.1:0", "--json", **env) as edge:
        made, channel = stub(edge.address)
        with channel:
            made.Feedback(feedback(("a", "beta")), timeout=5)
            until(lambda: edge.scrape()['kcm_edge_cloud_failures_total{kind="unknown"}'] >= 1, 5, "asked")
            for i in range(40):
                assert made.Infer(request(HARD[0], ids=(str(i),)), timeout=5).answers[0].source == CLOUD
                time.sleep(0.02)
            values = edge.scrape()
            assert values['kcm_edge_cloud_failures_total{kind="unknown"}'] == 1 and values["kcm_edge_feedback_waiting"] == 1
            cloud.set()
            until(lambda: cloud.truths() == {"a": 1}, 10, "sent in the end")


def test_a_truth_of_another_task_waits_and_holds_up_no_other(tmp_path: Path) -> None:
    first = edge_kit.make_bundle(tmp_path / "first", labels=(*LABELS, "epsilon"))
    cloud = Cloud(tmp_path / "c")
    with running_edge(first, tmp_path, "--cloud", cloud.address, **QUICK) as edge:
        made, channel = stub(edge.address)
        with channel:
            made.Feedback(feedback(("old", "epsilon")), timeout=5)
    second = edge_kit.make_bundle(tmp_path / "second")
    cloud.set(mode="strict")
    with cloud.run(), running_edge(second, tmp_path, "--cloud", cloud.address, **QUICK) as edge:
        made, channel = stub(edge.address)
        with channel:
            made.Feedback(feedback(("new", "beta")), timeout=5)
            until(lambda: set(cloud.truths()) == {"new"}, 10, "the older one in front of it waits")
            time.sleep(0.5)
            assert set(cloud.truths()) == {"new"}
            cloud.set()
            until(lambda: cloud.truths() == {"old": 4, "new": 1}, 10, "both, each under its own label space")


def test_a_disk_that_fails_is_said_and_nothing_is_acknowledged(tiny_bundle: Path, tmp_path: Path) -> None:
    env = {"KCM_EDGE__SPOOL__MAX_MB": "1", "KCM_EDGE__MAX_SAMPLES": "2000"}
    with running_edge(tiny_bundle, tmp_path, **env) as edge:
        made, channel = stub(edge.address)
        with channel:
            with pytest.raises(grpc.RpcError, match="not kept, send it again: 2000 truths at once, at most 1024") as caught:
                made.Feedback(feedback(*((str(i), "beta") for i in range(2000))), timeout=10)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            made.Feedback(feedback(*((str(i), "beta") for i in range(1000))), timeout=10)
            assert made.Feedback(feedback(*((f"x{i}", "beta") for i in range(100))), timeout=10).dropped == 76


def test_drift_is_in_status_metrics_and_log_and_ends_with_another_calibration(tmp_path: Path) -> None:
    reference = Reference(samples=1000, cloud_rate=0.1, quantiles=tuple(0.95 + i / 1000 for i in range(1, 20)))
    usual = calibration(reference=reference, guarantee=PROMISE)
    store = BundleStore(tmp_path / "store")
    store.install(edge_kit.make_bundle(tmp_path / "b0", calibration=usual))
    command = edge_kit.edge_command("--store", str(store.root), "--listen", "127.0.0.1:0", "--state", str(tmp_path / "s"))
    with edge_kit.running([*command, "--metrics", "127.0.0.1:0", "--json"], tmp_path / "edge.log") as edge:
        made, channel = stub(edge.address)
        with channel:
            made.Infer(request(*[HARD[0]] * 499), timeout=10)
            assert (status(made).guaranteed, status(made).drift) == (True, "")
            made.Infer(request(*[HARD[0]] * 2, route=Route.LOCAL), timeout=10)
            assert status(made).drift == "", "what the application routes itself is no sample of its traffic"
            made.Infer(request(HARD[0]), timeout=10)
            seen = status(made)
            assert not seen.guaranteed and "100.0% of the last 500 samples escalate, 10.0% did in calibration" in seen.drift
            values = edge.scrape()
            assert values['kcm_edge_drift{signal="escalations"}'] == values['kcm_edge_drift{signal="score"}'] == 1
            assert values['kcm_edge_drift{signal="teacher"}'] == values["kcm_edge_guaranteed"] == 0
            assert values['kcm_edge_estimate{of="escalation_rate"}'] == 1
            edge.signal(signal.SIGHUP)
            until(lambda: edge.scrape()["kcm_edge_bundle_swaps_total"] == 1, 5, "the same bundle, loaded again")
            assert status(made).drift == seen.drift
            current = store.install(edge_kit.make_bundle(tmp_path / "b1", seed=1, calibration=usual)).current
            until(lambda: status(made).bundle.bundle_id == current, 5, "swapped")
            assert (status(made).guaranteed, status(made).drift) == (True, "")
    alarms = [line["message"] for line in map(json.loads, edge.log.splitlines()) if line["level"] == "error"]
    assert sum("drift:" in alarm and "run `kcm calibrate` again" in alarm for alarm in alarms) == 2


def test_another_teacher_in_a_reply_withdraws_the_guarantee_live_or_from_the_spool(tmp_path: Path) -> None:
    promised = calibration(guarantee=PROMISE, teacher_id="rule", prompt_id="none")
    bundle = edge_kit.make_bundle(tmp_path / "bundle", calibration=promised)
    for turn, down in enumerate((False, True)):
        cloud = Cloud(tmp_path / f"c{turn}")
        (folder := tmp_path / str(turn)).mkdir()
        with running_edge(bundle, folder, "--cloud", cloud.address, **QUICK) as edge:
            made, channel = stub(edge.address)
            with channel:
                if down:
                    made.Infer(request(HARD[0], ids=("early",)), timeout=10)
                cloud.set(teacher="other")
                with cloud.run():
                    if not down:
                        cloud.set()
                        made.Infer(request(HARD[0]), timeout=10)
                        assert status(made).guaranteed
                        cloud.set(teacher="other")
                        made.Infer(request(HARD[0]), timeout=10)
                    until(lambda client=made: not status(client).guaranteed, 10, "withdrawn")  # type: ignore[misc]
                    assert "the cloud answers with teacher 'other', ε was calibrated with 'rule'" in status(made).drift
                    assert status(made).epsilon == EPSILON


def test_what_another_bundle_sent_says_nothing_about_this_one(tiny_bundle: Path, cloud: Cloud, tmp_path: Path) -> None:
    env = {**QUICK, "KCM_EDGE__EXPLORE": "1"}
    other = edge_kit.make_bundle(tmp_path / "other", seed=7)
    cloud.set(mode="full")  # kept until the other bundle serves
    with running_edge(other, tmp_path, "--cloud", cloud.address, **env) as edge:
        made, channel = stub(edge.address)
        with channel:
            made.Infer(request(*[EASY[0]] * 20), timeout=10)
            until(lambda: status(made).explored == 20, 5, "in the spool")
        assert edge.stop() == 0
    cloud.set()
    with running_edge(tiny_bundle, tmp_path, "--cloud", cloud.address, "--metrics", "127.0.0.1:0", "--json", **env) as edge:
        made, channel = stub(edge.address)
        with channel:
            until(lambda: status(made).spool_depth == 0, 10, "drained")
            assert len(cloud.rows()) == 20 and not [name for name in edge.scrape() if name.startswith("kcm_edge_estimate")]
            made.Infer(request(EASY[0], ids=("own",)), timeout=10)
            until(lambda: 'kcm_edge_estimate{of="agreement_local"}' in edge.scrape(), 10, "its own counts")
