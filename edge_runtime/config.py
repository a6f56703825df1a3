"""The daemon's settings: one TOML file under [edge], KCM_EDGE__* in the environment, flags."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec

from kcm.bundle import Precision
from kcm.errors import ConfigError
from kcm.rpc import SampleBytes, TlsConfig, is_local, require_tls_beyond_loopback

Positive = Annotated[int, msgspec.Meta(gt=0)]


class CloudConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where escalated samples go. An empty target: nowhere, they are answered DEGRADED."""

    target: str = ""
    deadline_ms: Positive = 1000  # of a live call, retries included: the longest that an answer may wait for the cloud
    backfill_deadline_ms: Positive = 30_000
    max_samples: Positive = 64  # per Predict call
    breaker_failures: Positive = 3  # in a row; then calls stop
    breaker_base_ms: Positive = 500  # first pause; doubles with each failed probe
    breaker_max_ms: Positive = 15_000
    tls: TlsConfig = TlsConfig()


class SpoolConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Samples that wait for the cloud, in STATE_DIR/spool.db."""

    max_mb: Positive = 256  # when full, explored samples go first, then those of the highest confidence, and are counted
    drain_interval_ms: Positive = 100  # between two backfill calls, ±50 %
    drain_max_ms: Positive = 30_000  # longest pause after failures


class EdgeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One daemon. Exactly one of `store` and `bundle` is set."""

    listen: str = "127.0.0.1:50051"
    store: str = ""  # root of a bundle store: `kcm bundle install` swaps under traffic
    bundle: str = ""  # one fixed bundle folder
    precision: Precision = "fp32"
    # In order of preference, with commas; "auto": tensorrt, tensorrt-rtx, onnx-cuda, onnx-cpu. What can't run here is skipped,
    # and the log says why.
    engine: str = "auto"
    state_dir: str = ""  # spool and identity; default $XDG_STATE_HOME/kcm/edge
    edge_id: str = ""  # default: made once, kept in state_dir; with cloud.tls: the DNS name (SAN) of its certificate
    metrics_listen: str = ""  # HTTP on loopback; empty: none
    max_samples: Positive = 1024  # per Infer or Feedback call
    explore: Annotated[float, msgspec.Meta(ge=0, le=1)] = (
        0.01  # of what stays here: goes up as well, later, to measure and to learn; 0: none
    )
    # Of one text or one sample's tensors; not above the cloud's own. An image's limits are the task's: max_bytes and max_pixels.
    max_sample_bytes: SampleBytes = 2**20
    drain_s: Annotated[float, msgspec.Meta(ge=0)] = 10.0  # how long SIGTERM waits for calls in flight
    cloud: CloudConfig = CloudConfig()
    spool: SpoolConfig = SpoolConfig()
    tls: TlsConfig = TlsConfig()

    @property
    def state_path(self) -> Path:
        if self.state_dir:
            return Path(self.state_dir)
        return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "kcm" / "edge"


def check(config: EdgeConfig) -> None:
    """What types can't say.

    Raises:
        ConfigError: no bundle or two, an address beyond loopback without TLS, TLS files that don't fit, or a certificate and no edge_id.
    """
    if bool(config.store) == bool(config.bundle):
        which = "both are set" if config.store else "neither is set"
        raise ConfigError(f"[edge] needs one of store and bundle; {which}", fix="kcm edge --bundle DIR   (or --store ROOT)")
    require_tls_beyond_loopback(config.listen, config.tls)
    target, tls = config.cloud.target, config.cloud.tls
    if target and not tls.enabled and not is_local(target):
        fix = "set certificate, key and ca under [edge.cloud.tls], or call 127.0.0.1 or unix:"
        raise ConfigError(f"[edge.cloud] refusing to call {target} without TLS", fix=fix)
    for name, files in (("[edge.tls]", config.tls), ("[edge.cloud.tls]", tls)):
        if files.enabled:
            files.read(name)
    if tls.enabled and not config.edge_id:
        # The cloud takes a call only under a name that the certificate holds; a name made here would never be in it.
        raise ConfigError(
            f"[edge] edge_id is not set, and [edge.cloud.tls] shows the cloud certificate {tls.certificate}",
            fix="set edge_id to the certificate's DNS name (SAN); openssl x509 -noout -ext subjectAltName -in CERTIFICATE   shows it",
        )
    if config.metrics_listen and (config.metrics_listen.startswith("unix:") or not is_local(config.metrics_listen)):
        raise ConfigError(f"[edge] metrics_listen must be loopback, not {config.metrics_listen}", fix="metrics_listen = '127.0.0.1:9464'")
