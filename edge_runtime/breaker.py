"""A circuit breaker: after failures in a row the cloud is left alone for a while, then one call probes."""

from __future__ import annotations

import enum
import random
import time
from collections.abc import Callable


class State(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"  # one probe is under way


class Ticket(enum.Enum):
    """Leave to make one call."""

    NORMAL = enum.auto()
    PROBE = enum.auto()


class Breaker:
    """Not thread-safe: it belongs to one event loop.

    Every ticket from `enter` goes back through `leave`, also where the call was cancelled.
    """

    def __init__(
        self,
        *,
        failures: int,
        base_s: float,
        max_s: float,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._limit, self._base_s, self._max_s = failures, base_s, max_s
        self._clock, self._jitter = clock, jitter
        self._in_a_row = 0
        self._failed_probes = 0
        self._until = 0.0  # on `clock`; no call before
        self._probing = False
        self._open = False

    @property
    def state(self) -> State:
        if self._probing:
            return State.HALF_OPEN
        return State.OPEN if self._open else State.CLOSED

    @property
    def wait_s(self) -> float:
        """Seconds until a call would be let through, as far as is known."""
        return max(0.0, self._until - self._clock())

    def enter(self) -> Ticket | None:
        """A ticket, or None: don't call now."""
        if self._probing or self._clock() < self._until:
            return None
        if self._open:
            self._probing = True
            return Ticket.PROBE
        return Ticket.NORMAL

    def leave(self, ticket: Ticket, verdict: bool | None) -> None:
        """Report a call: True: the cloud is there; False: it isn't; None: the call says nothing."""
        if ticket is Ticket.PROBE:
            self._probing = False
        if verdict is None:
            return
        if verdict:
            self._open, self._in_a_row, self._failed_probes = False, 0, 0
        elif ticket is Ticket.PROBE:
            self._failed_probes += 1
            self._pause()
        elif not self._open:  # calls that began before it opened say nothing new
            self._in_a_row += 1
            if self._in_a_row >= self._limit:
                self._open = True
                self._pause()

    def hold(self, seconds: float) -> None:
        """No calls for `seconds`: the cloud asked for it."""
        self._until = max(self._until, self._clock() + min(seconds, self._max_s))

    def _pause(self) -> None:
        full = min(self._max_s, self._base_s * 2.0 ** min(self._failed_probes, 30))
        self._until = self._clock() + full * (0.5 + 0.5 * self._jitter())  # many edges must not probe in step
