"""A real `kcm edge` process on loopback beside an empty handler: CPU of the server per request, requests per second, memory, start."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from kcm.app.bench.clocks import cpu_seconds, rss_mb
from kcm.app.bench.payloads import payloads
from kcm.app.demo.processes import started
from kcm.bundle import Bundle
from kcm.preprocess import load_preprocessor
from kcm.sample import Route, Source, payload_to_proto
from protos.kcm.v1 import edge_pb2, edge_pb2_grpc, sample_pb2

BATCH = 32
BUSY = 32  # requests in flight where requests/s are measured; CPU is measured with one
_CALLS, _BATCHES, _BUSY_CALLS = 300, 20, 640  # a repeat
_RUN_S = 5e-4  # of a graph's run, up to which these are the calls
_SETTLE_S = 0.5
Drive = Callable[[Any, Sequence[edge_pb2.InferRequest], int, int], Coroutine[Any, Any, None]]


class Serving:
    """Both servers, warmed. Traffic is asked to stay LOCAL, so neither cloud nor ε has a part in it."""

    def __init__(self, bundle: Bundle, edge: tuple[int, str], empty: tuple[int, str], run_s: float) -> None:
        """
        Args:
            edge, empty: process id and address.
            run_s: of one run of the graph: a large one gets fewer calls.
        """
        share = min(1.0, _RUN_S / run_s)
        self._calls, self._batches = max(10, int(_CALLS * share)), max(2, int(_BATCHES * share))
        self._busy_calls = max(2 * BUSY, int(_BUSY_CALLS * share))
        self._modality = bundle.task.modality
        self._pids = {"edge": edge[0], "empty": empty[0]}
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)  # gRPC asks for one outside of coroutines too
        self._channels, self._stubs = {}, {}
        for name, (_, address) in {"edge": edge, "empty": empty}.items():
            channel = self._loop.run_until_complete(_connected(address))
            self._channels[name], self._stubs[name] = channel, edge_pb2_grpc.EdgeStub(channel)
        given = payloads(bundle, BATCH)
        preprocessor = load_preprocessor(bundle.task.preprocess, bundle.files)
        as_given = [payload_to_proto(payload) for payload in given]
        as_tensors = [
            sample_pb2.Payload(tensors=sample_pb2.Tensors(inputs={name: array[0].tobytes() for name, array in inputs.items()}))
            for inputs in (preprocessor.batch([payload]) for payload in given)
        ]
        self._given, self._tensors = ([_request([payload]) for payload in protos] for protos in (as_given, as_tensors))
        self._given32, self._tensors32 = [_request(as_given)], [_request(as_tensors)]
        self._check()

    def measure(self) -> dict[str, float]:
        """CPU µs of the server per sample, and requests/s (_rps), by figure."""
        before = self._answered()
        kind, calls, batches, busy = self._modality, self._calls, self._batches, self._busy_calls
        taken = {
            "empty": self._cpu("empty", self._tensors, calls),
            "unary": self._cpu("edge", self._tensors, calls),
            f"empty_{kind}": self._cpu("empty", self._given, calls),
            f"unary_{kind}": self._cpu("edge", self._given, calls),
            "batch32": self._cpu("edge", self._tensors32, batches) / BATCH,
            f"batch32_{kind}": self._cpu("edge", self._given32, batches) / BATCH,
        }
        taken["busy_empty"], _ = self._run("empty", unary, self._tensors, busy, BUSY)
        taken["busy_unary"], taken["unary_rps"] = self._run("edge", unary, self._tensors, busy, BUSY)
        taken["busy_stream"], taken["stream_rps"] = self._run("edge", stream, self._tensors, busy, BUSY)
        sent = 2 * (calls + batches * BATCH + busy)
        assert self._answered() - before == sent, "every sample that is divided by was answered here"
        return taken

    def close(self) -> None:
        for channel in self._channels.values():
            self._loop.run_until_complete(channel.close())
        asyncio.set_event_loop(None)
        self._loop.close()

    def _cpu(self, server: str, requests: Sequence[edge_pb2.InferRequest], calls: int) -> float:
        return self._run(server, unary, requests, calls, 1)[0]

    def _run(self, server: str, drive: Drive, requests: Sequence[edge_pb2.InferRequest], calls: int, in_flight: int) -> tuple[float, float]:
        """(CPU µs of the server per call, calls per second)."""
        pid = self._pids[server]
        cpu, began = cpu_seconds(pid), time.perf_counter()
        self._loop.run_until_complete(drive(self._stubs[server], requests, calls, in_flight))
        seconds = time.perf_counter() - began
        return (cpu_seconds(pid) - cpu) / calls * 1e6, calls / seconds

    def _answered(self) -> int:
        """Samples that the daemon has answered LOCAL so far, by its own count."""
        status = self._loop.run_until_complete(_awaited(self._stubs["edge"].Status(edge_pb2.StatusRequest())))
        return int(status.answered_local)

    def _check(self) -> None:
        """Both forms of a sample get the same answer, from the device: the bench measures what it says."""
        edge = self._stubs["edge"]
        requests = (self._tensors32[0], self._given32[0])
        tensors, given = (self._loop.run_until_complete(_awaited(edge.Infer(request))) for request in requests)
        assert [int(answer.source) for answer in tensors.answers] == [int(Source.LOCAL)] * BATCH
        assert [answer.label_id for answer in tensors.answers] == [answer.label_id for answer in given.answers]


async def unary(stub: Any, requests: Sequence[edge_pb2.InferRequest], calls: int, in_flight: int) -> None:
    """Clients that each wait for one answer before the next call."""

    async def client(first: int) -> None:
        for turn in range(first, calls, in_flight):
            await stub.Infer(requests[turn % len(requests)])

    await asyncio.gather(*(client(first) for first in range(in_flight)))


async def stream(stub: Any, requests: Sequence[edge_pb2.InferRequest], calls: int, in_flight: int) -> None:
    """The same with a stream each."""

    async def client(first: int) -> None:
        call = stub.InferStream()
        for turn in range(first, calls, in_flight):
            await call.write(requests[turn % len(requests)])
            await call.read()
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF

    await asyncio.gather(*(client(first) for first in range(in_flight)))


@contextlib.contextmanager
def serving(bundle: Bundle, folder: Path, run_s: float) -> Iterator[Serving]:
    """Both processes run until the block ends; `run_s` is of one run of the graph. Raises UnavailableError where one doesn't start."""
    with contextlib.ExitStack() as stack:
        edge, address = stack.enter_context(started(_edge(bundle, folder), "kcm edge", folder / "edge.log"))
        command = [sys.executable, "-m", "kcm.app.bench.empty"]
        empty, other = stack.enter_context(started(command, "the empty handler", folder / "empty.log"))
        made = Serving(bundle, (edge.pid, address), (empty.pid, other), run_s)
        stack.callback(made.close)
        yield made


def start_up(bundle: Bundle, folder: Path) -> dict[str, float]:
    """Seconds from the process's start to its ready line, CPU seconds until then, and its memory at rest."""
    began = time.perf_counter()
    with started(_edge(bundle, folder), "kcm edge", folder / "start.log") as (process, _):
        seconds = time.perf_counter() - began
        cpu = cpu_seconds(process.pid)
        time.sleep(_SETTLE_S)
        return {"cold_start_s": seconds, "cold_start_cpu_s": cpu, "rss_mb": rss_mb(process.pid)}


def _edge(bundle: Bundle, folder: Path) -> list[str]:
    settings = ("--bundle", str(bundle.path), "--listen", "127.0.0.1:0", "--explore", "0", "--json")
    # A state folder each: one daemon runs while another is started.
    return [sys.executable, "-m", "kcm.app", "edge", *settings, "--state", str(folder / f"state-{time.monotonic_ns()}")]


def _request(payloads: Sequence[sample_pb2.Payload]) -> edge_pb2.InferRequest:
    samples = [
        edge_pb2.InferSample(sample_id=f"{place}", payload=payload, route=int(Route.LOCAL))  # type: ignore[arg-type]
        for place, payload in enumerate(payloads)
    ]
    return edge_pb2.InferRequest(samples=samples)


async def _connected(address: str) -> grpc.aio.Channel:
    channel = grpc.aio.insecure_channel(address)
    await channel.channel_ready()
    return channel


async def _awaited(call: Awaitable[Any]) -> Any:
    """A gRPC call is awaitable and no coroutine, which a loop wants."""
    return await call
