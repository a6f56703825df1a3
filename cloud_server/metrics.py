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
        self.read_seconds = Histogram("kcm_cloud_read_seconds", "Seconds until a call's images are decoded.", registry=self.registry)
        self.queue_depth = Gauge("kcm_cloud_queue_depth", "Samples that wait for the model, or are read for it.", registry=self.registry)
        self.store_rows = Counter(
            "kcm_cloud_store_rows", "Answered samples: stored, resent (were there before), failed.", ["result"], registry=self.registry
        )
        self.label_requests = Counter("kcm_cloud_label_requests", "Label calls by status code.", ["code"], registry=self.registry)
        self.labels = Counter("kcm_cloud_labels", "Truths: stored, failed.", ["result"], registry=self.registry)
        self.hint_arm = Counter(
            "kcm_cloud_hint_arm", "Samples answered, by what the model saw of the hint.", ["arm"], registry=self.registry
        )
        self.hint_pairs = Counter(
            "kcm_cloud_hint_pairs",
            "Samples answered under a hint and again without it: the answer is the same, or the hint changed it.",
            ["answer"],
            registry=self.registry,
        )

    def on_pairs(self, number: int, changed: int) -> None:
        self.hint_pairs.labels("changed").inc(changed)
        self.hint_pairs.labels("same").inc(number - changed)

    def on_read(self, size: int, seconds: float) -> None:
        self.read_seconds.observe(seconds)

    def on_batch(self, size: int, seconds: float) -> None:
        self.batch_size.observe(size)
        self.model_seconds.observe(seconds)
