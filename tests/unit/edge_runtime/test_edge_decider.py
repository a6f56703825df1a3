"""What comes in together is decided in one run; a bad request takes no other along; nobody waits for company."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import edge_kit
import pytest

from edge_runtime.config import EdgeConfig
from edge_runtime.decider import TURN
from edge_runtime.loader import Loader
from edge_runtime.router import Begun, Router
from edge_runtime.runtime import Decision, EdgeRuntime, InvalidSample
from edge_runtime.stats import Stats
from kcm.sample import Answer, Sample

TEXTS = [*edge_kit.EASY, *edge_kit.HARD]


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edge_kit.make_bundle(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture
def runtime(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> EdgeRuntime:
    """Notes the size of each run in `runs`, and takes `seconds` for each."""
    loaded = Loader("onnx-cpu", "fp32").load(tiny_bundle)
    loaded.runs, loaded.seconds = [], 0.0  # type: ignore[attr-defined]
    real = EdgeRuntime.decide

    def decide(self: EdgeRuntime, samples: Sequence[Sample], first: int = 0) -> list[Decision]:
        self.runs.append(len(samples))  # type: ignore[attr-defined]
        time.sleep(self.seconds)  # type: ignore[attr-defined]
        return real(self, samples, first)

    monkeypatch.setattr(EdgeRuntime, "decide", decide)
    return loaded


def ask_all(runtime: EdgeRuntime, requests: list[list[Sample]]) -> list[list[Answer] | BaseException]:
    async def main() -> list[list[Answer] | BaseException]:
        router = Router(EdgeConfig(bundle="b"), runtime, client=None, spool=None, stats=Stats())
        await router.infer([Sample(payload="x")])
        runtime.runs.clear()  # type: ignore[attr-defined]
        return await asyncio.gather(*(router.ask(samples) for samples in requests), return_exceptions=True)

    return asyncio.run(main())


def labels(found: list[Answer] | BaseException) -> list[str]:
    assert isinstance(found, list)
    return [answer.label for answer in found]


def test_requests_of_one_turn_share_runs_and_each_gets_its_own(runtime: EdgeRuntime) -> None:
    alone = {text: labels(ask_all(runtime, [[Sample(payload=text)]])[0])[0] for text in TEXTS}
    requests = [[Sample(payload=TEXTS[(i + k) % len(TEXTS)], sample_id=f"{i}-{k}") for k in range(i % 3 + 1)] for i in range(40)]
    found = ask_all(runtime, requests)
    for samples, answers in zip(requests, found, strict=True):
        assert isinstance(answers, list) and [a.sample_id for a in answers] == [s.sample_id for s in samples]
        assert labels(answers) == [alone[str(s.payload)] for s in samples]
    runs = runtime.runs  # type: ignore[attr-defined]
    assert sum(runs) == sum(map(len, requests)) and max(runs) <= TURN and len(runs) <= 4


def test_a_request_that_can_not_be_read_fails_alone_and_names_its_own_sample(runtime: EdgeRuntime) -> None:
    good, bad = [Sample(payload="x"), Sample(payload="y")], [Sample(payload="x"), Sample(payload=b"an image")]
    found = ask_all(runtime, [good, bad, good])
    assert labels(found[0]) == labels(found[2])
    assert isinstance(found[1], InvalidSample) and "sample 1: this task reads text" in str(found[1])


def test_a_lone_request_is_decided_in_the_next_turn_of_the_loop(runtime: EdgeRuntime) -> None:
    async def main() -> int:
        router = Router(EdgeConfig(bundle="b"), runtime, client=None, spool=None, stats=Stats())
        answers, turns = router.ask([Sample(payload=edge_kit.EASY[0])]), 0
        while not answers.done():
            await asyncio.sleep(0)
            turns += 1
        return turns

    assert asyncio.run(main()) <= 2


def test_a_slow_model_decides_together_what_came_while_its_thread_was_busy(runtime: EdgeRuntime) -> None:
    runtime.seconds = 0.02  # type: ignore[attr-defined]
    found = ask_all(runtime, [[Sample(payload=text)] for text in TEXTS * 4])
    assert all(isinstance(answers, list) for answers in found)
    assert len(runtime.runs) <= 2 + len(TEXTS) * 4 // TURN  # type: ignore[attr-defined]


def test_giving_up_on_an_answer_leaves_the_others(runtime: EdgeRuntime) -> None:
    async def main() -> list[Answer]:
        router = Router(EdgeConfig(bundle="b"), runtime, client=None, spool=None, stats=Stats())
        first, second = router.ask([Sample(payload="x")]), router.ask([Sample(payload="y")])
        first.cancel()
        return await second

    assert labels(asyncio.run(main()))


def test_an_estimate_that_fails_is_told_to_whoever_waits_and_holds_up_nobody(runtime: EdgeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> list[list[Answer] | BaseException]:
        router = Router(EdgeConfig(bundle="b"), runtime, client=None, spool=None, stats=Stats())
        real = router.taken

        def taken(begun: Begun, budget_s: float | None = None) -> object:
            if begun.decisions[0].sample.sample_id == "bad":
                raise RuntimeError("a bug of ours")
            return real(begun, budget_s)

        monkeypatch.setattr(router, "taken", taken)
        asked = [router.ask([Sample(payload="x", sample_id=name)]) for name in ("a", "bad", "b")]
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 5)

    found = asyncio.run(main())
    assert labels(found[0]) == labels(found[2]) and str(found[1]) == "a bug of ours"
