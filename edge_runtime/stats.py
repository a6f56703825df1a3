"""What the daemon counts, as plain numbers: a count costs nothing, and Prometheus reads them only when it scrapes."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from kcm.sample import Source

# Upper bounds in seconds: local answers take under a millisecond, a language model in the cloud seconds.
BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Histogram:
    """Counts per bucket; the last one is above all bounds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float, times: int) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += times
        self.sum += seconds * times


class Stats:
    """Since the daemon started. Written by the event loop alone."""

    def __init__(self) -> None:
        self.answers: Counter[Source] = Counter()
        self.latency = {source: Histogram() for source in Source}
        self.escalations = 0
        self.invalid_requests = 0
        self.spool_errors = 0  # samples that should have been kept, and the disk refused
        self.explored = 0  # kept here, and in the spool for the cloud as well
        self.feedback = 0  # truths taken
        self.swaps = 0
        self.refusals = 0

    def answered(self, source: Source, seconds: float, times: int) -> None:
        """`times` samples of one request, answered `seconds` after it came in."""
        if times:
            self.answers[source] += times
            self.latency[source].observe(seconds, times)
