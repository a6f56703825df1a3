"""The circuit breaker, on a clock that the test moves."""

from __future__ import annotations

from edge_runtime.breaker import Breaker, State, Ticket


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, jitter: float = 1.0) -> Breaker:
    return Breaker(failures=3, base_s=1.0, max_s=8.0, clock=clock, jitter=lambda: jitter)


def fail(breaker: Breaker) -> None:
    ticket = breaker.enter()
    assert ticket is not None
    breaker.leave(ticket, False)


def test_it_opens_after_failures_in_a_row_only() -> None:
    breaker = make(Clock())
    fail(breaker)
    fail(breaker)
    breaker.leave(Ticket.NORMAL, True)
    fail(breaker)
    fail(breaker)
    assert breaker.state is State.CLOSED
    fail(breaker)
    assert breaker.state is State.OPEN and breaker.enter() is None


def test_one_call_probes_and_success_closes() -> None:
    clock = Clock()
    breaker = make(clock)
    for _ in range(3):
        fail(breaker)
    clock.now += 1.0
    assert breaker.enter() is Ticket.PROBE
    assert breaker.state is State.HALF_OPEN and breaker.enter() is None
    breaker.leave(Ticket.PROBE, True)
    assert breaker.state is State.CLOSED and breaker.enter() is Ticket.NORMAL


def test_failed_probes_double_the_pause_up_to_the_cap() -> None:
    clock = Clock()
    breaker = make(clock)
    for _ in range(3):
        fail(breaker)
    pauses = []
    for _ in range(5):
        pauses.append(breaker.wait_s)
        clock.now += breaker.wait_s
        fail(breaker)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 8.0]


def test_jitter_shortens_the_pause_by_half_at_most() -> None:
    breaker = make(Clock(), jitter=0.0)
    for _ in range(3):
        fail(breaker)
    assert breaker.wait_s == 0.5


def test_a_cancelled_probe_lets_the_next_one_through() -> None:
    clock = Clock()
    breaker = make(clock)
    for _ in range(3):
        fail(breaker)
    clock.now += 1.0
    assert breaker.enter() is Ticket.PROBE
    breaker.leave(Ticket.PROBE, None)
    assert breaker.state is State.OPEN and breaker.enter() is Ticket.PROBE


def test_stragglers_of_before_do_not_lengthen_the_pause() -> None:
    breaker = make(Clock())
    tickets = [breaker.enter() for _ in range(10)]
    for ticket in tickets:
        assert ticket is not None
        breaker.leave(ticket, False)
    assert breaker.wait_s == 1.0


def test_the_clouds_own_wish_is_kept_but_not_for_ever() -> None:
    clock = Clock()
    breaker = make(clock)
    breaker.hold(2.0)
    assert breaker.enter() is None and breaker.state is State.CLOSED
    clock.now += 2.0
    assert breaker.enter() is Ticket.NORMAL
    breaker.hold(1e9)
    assert breaker.wait_s == 8.0
