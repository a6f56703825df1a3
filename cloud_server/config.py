"""Settings of `kcm cloud`: the [cloud] table, KCM_CLOUD__… and flags."""

from __future__ import annotations

from typing import Annotated

import msgspec

from kcm.errors import ConfigError
from kcm.rpc import SampleBytes, TlsConfig
from kcm.task import Positive

Seconds = Annotated[float, msgspec.Meta(gt=0.0)]


class CloudConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One cloud process.

    task: a task.toml, its folder, or a fetched task's name. large: a folder with large.json. store: the teacher store's folder.
    listen: HOST:PORT (port 0: a free one) or unix:PATH. metrics_listen: HOST:PORT of /metrics, "" for none.
    replica: this process's name within the store; each replica has its own inbox.
    max_queue: samples that wait at most, over all calls; an image waits as size × size × 3 bytes of pixels. max_samples: in one call.
    max_sample_bytes: of one text; not below the edges' own, or what they take is refused here. An image's limits are the task's:
    max_bytes and max_pixels under [preprocess].
    threads: of the model, and as many again that decode images. drain_s: how long calls in flight may take after SIGTERM.
    fill: score hinted rows again without the hint.
    """

    task: str = ""
    large: str = ""
    store: str = ""
    listen: str = "127.0.0.1:50061"
    metrics_listen: str = ""
    replica: str = "0"
    max_batch: Positive = 32
    max_queue: Positive = 1024
    max_samples: Positive = 256
    max_sample_bytes: SampleBytes = 2**20
    threads: Positive = 1
    drain_s: Seconds = 10.0
    fill: bool = True
    tls: TlsConfig = TlsConfig()

    def check(self) -> None:
        """Raises ConfigError for what a type can't say: a path that is missing, limits that contradict each other."""
        for field in ("task", "large", "store"):
            if not getattr(self, field):
                raise ConfigError(f"[cloud] {field} is not set", fix=f'kcm cloud --{field} PATH, or `{field} = "PATH"` under [cloud]')
        if self.max_samples > self.max_queue:
            raise ConfigError(
                f"[cloud] max_samples {self.max_samples} is above max_queue {self.max_queue}: such a call could never be taken in"
            )
