"""/metrics: reads the daemon's counts when Prometheus scrapes. Imported only where metrics_listen is set.

Names are a contract with dashboards: `NAMES` lists them, a test compares.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from edge_runtime.breaker import State
from edge_runtime.cloud_client import CloudClient, Kind
from edge_runtime.drain import Drain
from edge_runtime.drift import SIGNALS
from edge_runtime.router import Router
from edge_runtime.spool import Spool
from edge_runtime.stats import BUCKETS, Histogram, Stats
from kcm.sample import Source

NAMES = (
    "kcm_edge_answers",
    "kcm_edge_latency_seconds",
    "kcm_edge_escalations",
    "kcm_edge_invalid_requests",
    "kcm_edge_cloud_failures",
    "kcm_edge_cloud_up",
    "kcm_edge_spool_depth",
    "kcm_edge_spool_bytes",
    "kcm_edge_spool_dead",
    "kcm_edge_spool_evicted",
    "kcm_edge_spool_errors",
    "kcm_edge_spool_drained",
    "kcm_edge_explored",
    "kcm_edge_feedback",
    "kcm_edge_feedback_waiting",
    "kcm_edge_feedback_sent",
    "kcm_edge_feedback_dropped",
    "kcm_edge_drift",
    "kcm_edge_estimate",
    "kcm_edge_guaranteed",
    "kcm_edge_bundle_info",
    "kcm_edge_epsilon",
    "kcm_edge_bundle_swaps",
    "kcm_edge_bundle_refusals",
)

_INFO = ("bundle_id", "task_id", "label_space", "precision", "engine", "round")


class EdgeCollector(Collector):
    """Every metric of one daemon."""

    def __init__(self, stats: Stats, router: Router, *, client: CloudClient | None, spool: Spool | None, drain: Drain | None) -> None:
        self._stats, self._router = stats, router
        self._client, self._spool, self._drain = client, spool, drain

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        answers = CounterMetricFamily("kcm_edge_answers", "Samples answered, by who answered.", labels=["source"])
        latency = HistogramMetricFamily(
            "kcm_edge_latency_seconds", "From a request's arrival: to the decision (local), to the answer (others).", labels=["source"]
        )
        for source in Source:
            name = source.name.lower()
            answers.add_metric([name], stats.answers[source])
            latency.add_metric([name], _cumulative(stats.latency[source]), stats.latency[source].sum)
        yield answers
        yield latency
        yield CounterMetricFamily("kcm_edge_escalations", "Samples that the policy or the application sent away.", value=stats.escalations)
        yield CounterMetricFamily("kcm_edge_invalid_requests", "Requests refused as invalid.", value=stats.invalid_requests)
        yield from self._cloud()
        yield from self._spooled()
        yield from self._feedback()
        yield from self._drift()
        yield from self._bundle()

    def _cloud(self) -> Iterator[Metric]:
        failures = CounterMetricFamily("kcm_edge_cloud_failures", "Failed calls to the cloud, by kind.", labels=["kind"])
        for kind in Kind:
            if kind is not Kind.PAUSED:  # not a call
                failures.add_metric([kind.value], self._client.failures[kind] if self._client else 0)
        yield failures
        up = self._client is not None and self._client.breaker.state is State.CLOSED
        yield GaugeMetricFamily("kcm_edge_cloud_up", "1: the cloud is called; 0: the breaker is open, or no cloud is configured.", value=up)

    def _spooled(self) -> Iterator[Metric]:
        spool = self._spool
        yield GaugeMetricFamily("kcm_edge_spool_depth", "Samples that wait for the cloud.", value=spool.waiting if spool else 0)
        yield GaugeMetricFamily("kcm_edge_spool_bytes", "Bytes in use in the spool's file.", value=spool.used if spool else 0)
        yield GaugeMetricFamily("kcm_edge_spool_dead", "Samples that the cloud refused for good.", value=spool.dead if spool else 0)
        yield CounterMetricFamily("kcm_edge_spool_evicted", "Samples lost since the spool was full.", value=spool.evicted if spool else 0)
        yield CounterMetricFamily("kcm_edge_spool_errors", "Samples not kept since the disk failed.", value=self._stats.spool_errors)
        drained = self._drain.drained if self._drain else 0
        yield CounterMetricFamily("kcm_edge_spool_drained", "Spooled samples that the cloud has stored.", value=drained)

    def _feedback(self) -> Iterator[Metric]:
        truths = self._spool.truths if self._spool else None
        yield CounterMetricFamily("kcm_edge_explored", "Samples kept here that go to the cloud too, by chance.", value=self._stats.explored)
        yield CounterMetricFamily("kcm_edge_feedback", "Truths taken.", value=self._stats.feedback)
        yield GaugeMetricFamily("kcm_edge_feedback_waiting", "Truths that wait for the cloud.", value=truths.waiting if truths else 0)
        sent = self._drain.labelled if self._drain else 0
        yield CounterMetricFamily("kcm_edge_feedback_sent", "Truths that the cloud has stored.", value=sent)
        dropped = CounterMetricFamily("kcm_edge_feedback_dropped", "Truths lost: no room here, or refused there.", labels=["why"])
        dropped.add_metric(["full"], truths.dropped if truths else 0)
        dropped.add_metric(["refused"], self._drain.refused if self._drain else 0)
        yield dropped

    def _drift(self) -> Iterator[Metric]:
        drift = self._router.drift
        raised = GaugeMetricFamily(
            "kcm_edge_drift", "1: live traffic left what calibration saw, until another bundle serves.", labels=["signal"]
        )
        for signal in SIGNALS:
            raised.add_metric([signal], drift.raised(signal))
        yield raised
        estimate = GaugeMetricFamily("kcm_edge_estimate", "What is known of live traffic; absent while nothing is.", labels=["of"])
        for name, value in drift.estimates().items():
            estimate.add_metric([name], value)
        yield estimate
        yield GaugeMetricFamily("kcm_edge_guaranteed", "1: the calibration's promise on accuracy is in force.", value=drift.guaranteed)

    def _bundle(self) -> Iterator[Metric]:
        runtime = self._router.runtime
        manifest = runtime.manifest
        info = GaugeMetricFamily(
            "kcm_edge_bundle_info",
            "The bundle that serves.",
            labels=_INFO,
        )
        info.add_metric(
            [manifest.bundle_id, manifest.task_id, manifest.label_space, runtime.precision, runtime.provider, str(manifest.round)], 1
        )
        yield info
        yield GaugeMetricFamily("kcm_edge_epsilon", "A routing score above it stays on the device.", value=runtime.epsilon)
        yield CounterMetricFamily("kcm_edge_bundle_swaps", "Bundles swapped in.", value=self._stats.swaps)
        yield CounterMetricFamily("kcm_edge_bundle_refusals", "Bundles that this daemon refused.", value=self._stats.refusals)


def registry(collector: EdgeCollector) -> CollectorRegistry:
    own = CollectorRegistry()
    own.register(collector)
    return own


def _cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*map(str, BUCKETS), "+Inf"), histogram.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets
