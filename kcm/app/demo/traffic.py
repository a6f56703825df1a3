"""Documents through the edge daemon by gRPC, and what came back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
import numpy as np
from numpy.typing import NDArray

from kcm.sample import Payload, Route, Source, payload_to_proto
from protos.kcm.v1 import edge_pb2, edge_pb2_grpc

Watch = Callable[["Pass"], None]
_DEADLINE_S = 120.0


@dataclass
class Pass:
    """One pass of N documents: per document its label id, who answered, and how long it took in ms (its call's share)."""

    total: int
    labels: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def count(self, source: Source) -> int:
        return self.sources.count(int(source))

    @property
    def cloud_rate(self) -> float:
        """Share of documents that left the device, or tried to."""
        return 1 - self.count(Source.LOCAL) / max(1, len(self))

    def escalated(self) -> NDArray[np.bool_]:
        left: NDArray[np.bool_] = np.array(self.sources) != int(Source.LOCAL)
        return left

    def right(self, truth: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the answers so far are right."""
        right: NDArray[np.bool_] = np.array(self.labels) == truth[: len(self)]
        return right

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.latency_ms, q))


def stream(address: str, payloads: Sequence[Payload], *, route: Route = Route.AUTO, batch: int = 1, watch: Watch = lambda _: None) -> Pass:
    """Send all samples in order, `batch` a call, one call at a time; each sample's latency is its call's."""
    done = Pass(len(payloads))
    with grpc.insecure_channel(address) as channel:
        edge = edge_pb2_grpc.EdgeStub(channel)
        for start in range(0, len(payloads), batch):
            samples = [
                edge_pb2.InferSample(payload=payload_to_proto(payload), route=int(route))  # type: ignore[arg-type]
                for payload in payloads[start : start + batch]
            ]
            began = time.perf_counter()
            reply = edge.Infer(edge_pb2.InferRequest(samples=samples), timeout=_DEADLINE_S)
            took = 1000 * (time.perf_counter() - began)
            for answer in reply.answers:
                done.labels.append(answer.label_id)
                done.sources.append(answer.source)
                done.latency_ms.append(took)
            watch(done)
    return done


def wait_for_bundle(address: str, bundle_id: str, seconds: float = 15.0) -> bool:
    """True once the daemon serves this bundle."""
    end = time.monotonic() + seconds
    with grpc.insecure_channel(address) as channel:
        edge = edge_pb2_grpc.EdgeStub(channel)
        while time.monotonic() < end:
            if edge.Status(edge_pb2.StatusRequest(), timeout=5).bundle.bundle_id == bundle_id:
                return True
            time.sleep(0.05)
    return False
