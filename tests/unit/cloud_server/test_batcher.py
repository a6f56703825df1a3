from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from typing import Any

import cloud_kit
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_server.batcher import Batcher, Closed, DeadlinePassed, ModelFailed, Overloaded, Unreadable, Urgency
from kcm.sample import Float32, Hint

NONE: list[Hint | None] = [None]


class Steps(Executor):
    """Runs the model in the loop's own thread, and lets a test's clock pass meanwhile: time is exact, nothing sleeps."""

    def __init__(self, clock: Clock, seconds_each: float) -> None:
        self._clock, self._seconds_each = clock, seconds_each
        self.batches: list[list[str]] = []
        self.ended: dict[str, float] = {}

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        _, texts, _ = args
        self.batches.append(list(texts))
        future: Future[Any] = Future()

        def end() -> None:
            self._clock.now += self._seconds_each * len(texts)
            self.ended.update(dict.fromkeys(texts, self._clock.now))
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)

        asyncio.get_running_loop().call_soon(lambda: asyncio.get_running_loop().call_soon(end))
        return future


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def rows(texts: Sequence[str], hints: Sequence[Hint | None]) -> Float32:
    return np.stack([cloud_kit.RuleModel.row(text, hint) for text, hint in zip(texts, hints, strict=True)])


Call = st.tuples(
    st.integers(1, 5),  # samples
    st.sampled_from([0.0, 0.5, 2.0, 8.0, 1e9]),  # deadline from now
    st.sampled_from(list(Urgency)),
    st.integers(0, 3),  # turns of the loop before the next call
    st.sampled_from([None, None, None, 0, 1, 3]),  # cancelled after as many turns
)


@given(
    calls=st.lists(Call, min_size=1, max_size=25),
    max_batch=st.integers(1, 6),
    max_queue=st.integers(5, 12),
    each=st.sampled_from([0.0, 0.1, 0.7]),
)
@settings(max_examples=150, deadline=None)
def test_every_sample_has_exactly_one_outcome(calls: list[Any], max_batch: int, max_queue: int, each: float) -> None:
    asyncio.run(_play(calls, max_batch, max_queue, each))


async def _play(calls: list[Any], max_batch: int, max_queue: int, each: float) -> None:
    clock = Clock()
    steps = Steps(clock, each)
    batcher = Batcher(rows, max_batch=max_batch, max_queue=max_queue, executor=steps, clock=clock)
    outcomes: dict[int, list[str]] = {}
    texts_of: dict[int, list[str]] = {}

    async def one(number: int, samples: int, left: float, urgency: Urgency) -> None:
        texts = texts_of[number] = [f"{number}.{place}" for place in range(samples)]
        deadline = clock.now + left
        seen = outcomes.setdefault(number, [])
        try:
            got = await batcher.submit(texts, NONE * samples, deadline=deadline, urgency=urgency)
        except (Overloaded, DeadlinePassed) as error:
            seen.append(type(error).__name__)
        except asyncio.CancelledError:
            seen.append("cancelled")
        else:
            seen.append("scores")
            assert all(steps.ended[text] < deadline for text in texts), "answered after its deadline"
            np.testing.assert_array_equal(np.stack(got), rows(texts, NONE * samples))

    tasks = []
    for number, (samples, left, urgency, turns, cancel) in enumerate(calls):
        task = asyncio.ensure_future(one(number, samples, left, urgency))
        tasks.append(task)
        for turn in range(turns + 1):
            if cancel == turn:
                task.cancel()
            await asyncio.sleep(0)
            assert batcher.waiting <= max_queue
    await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
    await asyncio.wait_for(batcher.drain(), 20)
    assert batcher.idle
    scored = [text for batch in steps.batches for text in batch]
    assert len(scored) == len(set(scored)), "a sample was scored twice"
    assert all(0 < len(batch) <= max_batch for batch in steps.batches)
    for number, task in enumerate(tasks):
        assert len(outcomes.get(number, [])) == 1 or (task.cancelled() and number not in outcomes), "lost, or answered twice"
        if outcomes.get(number) == ["scores"]:
            assert set(texts_of[number]) <= set(scored)


def test_no_scores_after_the_deadline() -> None:
    async def play() -> None:
        clock = Clock()
        batcher = Batcher(rows, max_batch=4, max_queue=8, executor=Steps(clock, 3.0), clock=clock)
        with pytest.raises(DeadlinePassed):
            await batcher.submit(["slow"], NONE, deadline=2.0)  # taken in, since the speed isn't known yet; scored too late
        with pytest.raises(DeadlinePassed):
            await batcher.submit(["late"], NONE, deadline=clock.now)
        await batcher.drain()

    asyncio.run(play())


def test_what_waits_goes_together_and_the_urgent_first() -> None:
    async def play() -> None:
        clock = Clock()
        steps = Steps(clock, 0.1)
        batcher = Batcher(rows, max_batch=3, max_queue=20, executor=steps, clock=clock)
        first = asyncio.ensure_future(batcher.submit(["a"], NONE, deadline=99))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        others = [
            asyncio.ensure_future(batcher.submit([f"fill{i}" for i in range(2)], NONE * 2, deadline=99, urgency=Urgency.FILL)),
            asyncio.ensure_future(batcher.submit(["back0", "back1"], NONE * 2, deadline=99, urgency=Urgency.BACKFILL)),
            asyncio.ensure_future(batcher.submit(["live0", "live1"], NONE * 2, deadline=99)),
        ]
        await asyncio.gather(first, *others)
        assert steps.batches == [["a"], ["live0", "live1", "back0"], ["back1", "fill0", "fill1"]]
        await batcher.drain()

    asyncio.run(play())


def test_a_full_queue_refuses_the_whole_call_and_says_when_to_come_back() -> None:
    async def play() -> None:
        model = cloud_kit.RuleModel()
        model.hold = threading.Event()
        batcher = Batcher(model.logits, max_batch=1, max_queue=3)
        running = asyncio.ensure_future(batcher.submit(["in the model"], NONE, deadline=np.inf))
        await asyncio.sleep(0.05)
        waiting = asyncio.ensure_future(batcher.submit(["b", "c"], NONE * 2, deadline=np.inf))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="full") as caught:
            await batcher.submit(["d", "e"], NONE * 2, deadline=np.inf)
        assert caught.value.retry_s > 0 and batcher.waiting == 2
        one_more = asyncio.ensure_future(batcher.submit(["f"], NONE, deadline=np.inf))
        await asyncio.sleep(0)
        model.hold.set()
        await asyncio.gather(running, waiting, one_more)
        assert [text for text, _ in model.calls] == ["in the model", "b", "c", "f"]
        await batcher.drain()

    asyncio.run(play())


def test_a_wait_that_would_outlast_the_deadline_is_refused_at_once() -> None:
    async def play() -> None:
        clock = Clock()
        batcher = Batcher(rows, max_batch=1, max_queue=50, executor=Steps(clock, 1.0), clock=clock)
        await batcher.submit(["measure"], NONE, deadline=99)
        waiting = [asyncio.ensure_future(batcher.submit([f"w{i}"], NONE, deadline=99)) for i in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="outlast") as caught:
            await batcher.submit(["hopeless"], NONE, deadline=clock.now + 3.0)
        assert caught.value.retry_s == pytest.approx(5.0)
        await asyncio.gather(*waiting)
        await batcher.drain()

    asyncio.run(play())


def test_an_idle_model_is_always_tried() -> None:
    """A wrong estimate must not shut the door for good."""

    async def play() -> None:
        clock = Clock()
        steps = Steps(clock, 100.0)
        batcher = Batcher(rows, max_batch=1, max_queue=5, executor=steps, clock=clock)
        await batcher.submit(["slow start"], NONE, deadline=1e6)
        steps._seconds_each = 0.01
        assert len(await batcher.submit(["fast now"], NONE, deadline=clock.now + 1.0)) == 1
        await batcher.drain()

    asyncio.run(play())


def test_a_cancelled_call_leaves_the_queue() -> None:
    async def play() -> None:
        model = cloud_kit.RuleModel()
        model.hold = threading.Event()
        batcher = Batcher(model.logits, max_batch=8, max_queue=8)
        running = asyncio.ensure_future(batcher.submit(["a"], NONE, deadline=np.inf))
        await asyncio.sleep(0.05)
        gone = asyncio.ensure_future(batcher.submit(["b", "c"], NONE * 2, deadline=np.inf))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert batcher.waiting == 0
        model.hold.set()
        await running
        await batcher.drain()
        assert [text for text, _ in model.calls] == ["a"]

    asyncio.run(play())


@pytest.mark.parametrize("scores", [np.full((1, 4), np.nan, "f4"), np.zeros((2, 4), "f4"), np.zeros(4, "f4")])
def test_scores_that_make_no_sense_fail_the_call(scores: Float32) -> None:
    async def play() -> None:
        batcher = Batcher(lambda texts, hints: scores, max_batch=4, max_queue=4)
        with pytest.raises(ModelFailed):
            await batcher.submit(["a"], NONE, deadline=np.inf)
        await batcher.drain()

    asyncio.run(play())


def test_a_failing_model_fails_its_batch_and_the_next_is_served() -> None:
    async def play() -> None:
        batcher = Batcher(cloud_kit.RuleModel().logits, max_batch=4, max_queue=4)
        with pytest.raises(ModelFailed):
            await batcher.submit(["explode"], NONE, deadline=np.inf)
        assert len(await batcher.submit(["fine"], NONE, deadline=np.inf)) == 1
        await batcher.drain()
        with pytest.raises(Closed):
            await batcher.submit(["after the end"], NONE, deadline=np.inf)

    asyncio.run(play())


def test_drain_answers_what_waits() -> None:
    async def play() -> None:
        batcher = Batcher(cloud_kit.RuleModel(0.02).logits, max_batch=1, max_queue=9)
        calls = [asyncio.ensure_future(batcher.submit([str(i)], NONE, deadline=np.inf)) for i in range(5)]
        await asyncio.sleep(0.01)
        await batcher.drain()
        assert all(len(got) == 1 for got in await asyncio.wait_for(asyncio.gather(*calls), 1))

    asyncio.run(play())


class Reader:
    """Reads a payload by turning it round, in the batcher's own threads. Holds those that it was told to, refuses "bad" ones."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.seen: list[str] = []

    def __call__(self, payload: Any) -> str:
        self.seen.append(payload)
        self.go.wait(20)
        if "bad" in payload:
            raise ValueError("it is bad")
        return payload[::-1]


def _reading(reader: Reader, *, max_queue: int = 64, readers: int = 1, **more: Any) -> Batcher:
    return Batcher(rows, max_batch=4, max_queue=max_queue, read=reader, readers=readers, **more)


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("number", [1, 8, 9, 50])
def test_payloads_are_read_before_they_queue_and_keep_their_order(number: int, readers: int) -> None:
    async def play() -> None:
        told: list[int] = []
        batcher = _reading(Reader(), readers=readers, on_read=lambda size, seconds: told.append(size))
        texts = [f"text {place}" for place in range(number)]
        got = await batcher.submit(texts, NONE * number, deadline=float("inf"))
        np.testing.assert_array_equal(np.stack(got), rows([text[::-1] for text in texts], NONE * number))
        assert told == [number]
        await batcher.drain()

    asyncio.run(play())


def test_a_payload_that_cannot_be_read_costs_its_own_call_alone() -> None:
    async def play() -> None:
        reader = Reader()
        batcher = _reading(reader)
        texts = ["good"] * 11 + ["a bad one"]
        calls = [batcher.submit(["fine"], NONE, deadline=float("inf")), batcher.submit(texts, NONE * 12, deadline=float("inf"))]
        calls.append(batcher.submit(["fine too"], NONE, deadline=float("inf")))
        first, bad, last = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(bad, Unreadable) and (bad.place, bad.reason) == (11, "it is bad")
        np.testing.assert_array_equal(np.stack([first[0], last[0]]), rows(["enif", "oot enif"], NONE * 2))  # type: ignore[index]
        assert batcher.idle
        await batcher.drain()

    asyncio.run(play())


def test_what_is_being_read_counts_as_waiting_and_is_answered_by_a_drain() -> None:
    async def play() -> None:
        reader = Reader()
        reader.go.clear()
        batcher = _reading(reader, max_queue=3)
        call = asyncio.ensure_future(batcher.submit(["a", "b"], NONE * 2, deadline=float("inf")))
        await asyncio.sleep(0.05)
        assert batcher.waiting == 2 and not batcher.idle
        with pytest.raises(Overloaded, match="full"):
            await batcher.submit(["c", "d"], NONE * 2, deadline=float("inf"))
        assert "c" not in reader.seen, "what isn't taken in isn't read"
        draining = asyncio.ensure_future(batcher.drain())
        await asyncio.sleep(0.05)
        assert not draining.done()
        reader.go.set()
        assert len(await call) == 2
        # Not wait_for: drain() takes the cancellation for the worker's, and ends as if all were well.
        assert (await asyncio.wait([draining], timeout=5))[0]

    asyncio.run(play())


def test_a_drain_ends_where_the_last_payload_cannot_be_read() -> None:
    async def play() -> None:
        reader = Reader()
        reader.go.clear()
        batcher = _reading(reader)
        call = asyncio.ensure_future(batcher.submit(["bad"], NONE, deadline=float("inf")))
        await asyncio.sleep(0.05)
        draining = asyncio.ensure_future(batcher.drain())
        await asyncio.sleep(0.05)
        reader.go.set()
        with pytest.raises(Unreadable):
            await call
        # Not wait_for: drain() takes the cancellation for the worker's, and ends as if all were well.
        assert (await asyncio.wait([draining], timeout=5))[0]

    asyncio.run(play())


def test_a_call_whose_deadline_passes_while_it_is_read_is_dropped() -> None:
    async def play() -> None:
        clock, reader = Clock(), Reader()
        reader.go.clear()
        batcher = _reading(reader, clock=clock)
        call = asyncio.ensure_future(batcher.submit([str(place) for place in range(30)], NONE * 30, deadline=1.0))
        await asyncio.sleep(0.05)
        clock.now = 2.0
        reader.go.set()
        with pytest.raises(DeadlinePassed):
            await call
        assert len(reader.seen) == 8, "the rest isn't read for nothing"
        assert batcher.idle
        await batcher.drain()

    asyncio.run(play())


def test_a_call_of_one_is_read_between_the_payloads_of_a_call_of_many() -> None:
    async def play() -> None:
        reader = Reader()
        reader.go.clear()
        batcher = _reading(reader)
        many = asyncio.ensure_future(
            batcher.submit([f"m{i}" for i in range(40)], NONE * 40, deadline=float("inf"), urgency=Urgency.BACKFILL)
        )
        await asyncio.sleep(0.02)
        one = asyncio.ensure_future(batcher.submit(["one"], NONE, deadline=float("inf")))
        await asyncio.sleep(0.02)
        reader.go.set()
        await asyncio.gather(many, one)
        assert reader.seen.index("one") == 8
        await batcher.drain()

    asyncio.run(play())


def test_a_cancelled_call_leaves_nothing_behind_while_it_is_read() -> None:
    async def play() -> None:
        reader = Reader()
        reader.go.clear()
        batcher = _reading(reader)
        call = asyncio.ensure_future(batcher.submit(["a"] * 20, NONE * 20, deadline=float("inf")))
        await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert batcher.idle
        reader.go.set()
        assert len(await batcher.submit(["b"], NONE, deadline=float("inf"))) == 1
        assert len(reader.seen) <= 9
        await batcher.drain()

    asyncio.run(play())
