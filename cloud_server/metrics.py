"""What /metrics says of a cloud process. Names are part of the interface: dashboards and alerts use them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class CloudMetrics:
    """All under `kcm_cloud_`, each process with its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("kcm_cloud_requests", "Predict calls by status code.", ["code"], registry=self.registry)
        self.request_seconds = Histogram("kcm_cloud_request_seconds", "Seconds of a Predict call.", registry=self.registry)
        self.samples = Counter("kcm_cloud_samples", "Samples answered, by purpose.", ["purpose"], registry=self.registry)
        self.shed = Counter("kcm_cloud_shed_samples", "Samples refused or dropped, by reason.", ["reason"], registry=self.registry)
        self.batch_size = Histogram(
            "kcm_cloud_batch_size", "Samples per run of the model.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256), registry=self.registry
        )
        self.model_seconds = Histogram("kcm_cloud_model_seconds", "Seconds per run of the model.", registry=self.registry)
        self.queue_depth = Gauge("kcm_cloud_queue_depth", "Samples that wait for the model.", registry=self.registry)
        self.store_rows = Counter(
            "kcm_cloud_store_rows", "Answered samples: stored, resent (were there before), failed.", ["result"], registry=self.registry
        )

    def on_batch(self, size: int, seconds: float) -> None:
        self.batch_size.observe(size)
        self.model_seconds.observe(seconds)
