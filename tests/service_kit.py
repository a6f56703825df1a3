"""The Cloud service over real gRPC on loopback, in this process, for a test to call."""

from __future__ import annotations

import asyncio
import contextlib
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import cloud_kit
import grpc
import pytest
from cloud_kit import SPACE

import kcm.task
from cloud_server.config import CloudConfig
from cloud_server.server import running
from kcm.sample import Float32, scores_from_proto
from protos.kcm.v1 import cloud_pb2, cloud_pb2_grpc

Play = Callable[[Any, cloud_kit.RuleModel], Awaitable[None]]
TASK = kcm.task.Task(id="toy", labels=cloud_kit.LABELS)


@contextlib.asynccontextmanager
async def serving(folder: Path, model: Any, task: kcm.task.Task = TASK, **changes: Any) -> AsyncIterator[tuple[Any, grpc.aio.Channel, str]]:
    settings = {
        "task": "t",
        "large": "l",
        "store": str(folder / "store"),
        "listen": "127.0.0.1:0",
        "metrics_listen": "127.0.0.1:0",
        **changes,
    }
    async with running(CloudConfig(**settings), task, model) as (address, metrics):
        async with grpc.aio.insecure_channel(address) as channel:
            yield cloud_pb2_grpc.CloudStub(channel), channel, metrics


def play(folder: Path, act: Play, **changes: Any) -> cloud_kit.RuleModel:
    """Run `act(stub, model)` against a server of its own; calls of the warm-up are forgotten."""
    model = cloud_kit.RuleModel()

    async def run() -> None:
        async with serving(folder, model, **changes) as (stub, _, _):
            model.calls.clear()
            await act(stub, model)

    asyncio.run(run())
    return model


def scores(prediction: cloud_pb2.Prediction) -> Float32:
    return scores_from_proto(prediction.scores, SPACE, 4)


async def refused(call: Awaitable[Any], code: grpc.StatusCode, message: str) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is code, caught.value
    assert message in (caught.value.details() or ""), caught.value.details()
    assert "Traceback" not in (caught.value.details() or "")
    return caught.value


async def scraped(metrics: str) -> str:
    """What /metrics says."""
    return await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{metrics}/metrics").read().decode())
