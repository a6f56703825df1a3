"""One cloud process: load → open the store → bind → warm up → serve → drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc

from cloud_server.batcher import Batcher, ModelFailed, Unreadable
from cloud_server.config import CloudConfig
from cloud_server.fill import fill_when_idle
from cloud_server.metrics import CloudMetrics
from cloud_server.models import LargeFile, LargeModel, ReadsAhead, load_large, read_large
from cloud_server.service import SERVICE_NAME, CloudService
from cloud_server.store import TeacherStore
from kcm.assets import task_path
from kcm.errors import ConfigError, KcmError, require
from kcm.rpc import Server, metrics_endpoint, require_tls_beyond_loopback, start_server, until_signal
from kcm.sample import Hint, Payload
from kcm.task import Task, load_task
from protos.kcm.v1 import cloud_pb2_grpc

_log = logging.getLogger(__name__)

Ready = Callable[[str, str], None]


def check(config: CloudConfig) -> Task:
    """All that can be known before the model is loaded.

    Raises:
        ConfigError: a setting is missing or wrong, or the large model is of another task or other labels.
    """
    config.check()
    require_tls_beyond_loopback(config.listen, config.tls)
    if config.tls.enabled:
        config.tls.read("[cloud.tls]")
    task = load_task(task_path(config.task))
    large = read_large(Path(config.large))
    if large.task_id != task.id:
        raise ConfigError(f"{config.large} was fitted for task {large.task_id}, not for {task.id}", fix="give the large model of this task")
    if large.labels != task.labels:
        raise ConfigError(
            f"{config.large} scores {len(large.labels)} labels, task {task.id} has {len(task.labels)} (or in another order)",
            fix="fit the large model again: kcm train-large --task TASK --out FOLDER",
        )
    _check_modality(task, large, config.large)
    return task


def _check_modality(task: Task, large: LargeFile, folder: str) -> None:
    """Raises ConfigError where the large model can't read what the task's devices send."""
    if large.modality != task.modality:
        raise ConfigError(f"{folder} reads {large.modality}, task {task.id} is of modality {task.modality}", fix="give this task's own")
    if task.modality == "text":
        return
    for name in ("max_bytes", "max_pixels"):
        if getattr(large.preprocess, name) < getattr(task.preprocess, name):
            raise ConfigError(
                f"{folder} takes images of {name} {getattr(large.preprocess, name)}, task {task.id} of {getattr(task.preprocess, name)}",
                fix="fit the large model again, or raise it in large.json",
            )


def load_model(config: CloudConfig) -> LargeModel:
    """The large model, with the process's threads set. Raises as load_large does."""
    folder = Path(config.large)
    large = read_large(folder)
    if large.modality == "text" or large.kind == "clip":
        require("torch", "cloud").set_num_threads(config.threads)
    return load_large(folder, threads=config.threads)


async def serve(config: CloudConfig, task: Task, model: LargeModel, ready: Ready) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Args:
        ready: called with the addresses of gRPC and of /metrics ("" for none) once the warm-up is answered.

    Raises:
        StoreError: the inbox can't be opened. UnavailableError: an address is taken. KcmError: the warm-up failed.
    """
    stop = asyncio.ensure_future(until_signal())  # before `ready`: who reads that may send SIGTERM at once
    async with running(config, task, model) as (address, metrics_address):
        ready(address, metrics_address)
        await stop
        _log.info("draining", extra={"drain_s": config.drain_s})
    _log.info("stopped")


@contextlib.asynccontextmanager
async def running(config: CloudConfig, task: Task, model: LargeModel) -> AsyncIterator[tuple[str, str]]:
    """A serving cloud process's parts, in order; on the way out calls in flight end, then the model, then the store."""
    metrics = CloudMetrics()
    store = TeacherStore(Path(config.store), config.replica)
    ahead = model if isinstance(model, ReadsAhead) else None
    batcher = Batcher(
        ahead.scores if ahead else model.logits,
        max_batch=config.max_batch,
        max_queue=config.max_queue,
        read=ahead.read if ahead else None,
        readers=config.threads,
        on_batch=metrics.on_batch,
        on_read=metrics.on_read,
    )
    metrics.queue_depth.set_function(lambda: batcher.waiting)
    service = CloudService(config=config, task=task, model=model, batcher=batcher, store=store, metrics=metrics)
    filling: asyncio.Task[None] | None = None
    server: Server | None = None
    try:
        async with metrics_endpoint(config.metrics_listen, metrics.registry) as metrics_address:

            def register(grpc_server: grpc.aio.Server) -> None:
                cloud_pb2_grpc.add_CloudServicer_to_server(service, grpc_server)

            server = await start_server(register, [SERVICE_NAME], listen=config.listen, tls=config.tls)
            await _warm_up(batcher, task)
            if config.fill and model.reads_hints:
                filling = asyncio.ensure_future(
                    fill_when_idle(store, batcher, model.teacher_id, batch=min(config.max_batch, config.max_queue), metrics=metrics)
                )
            await server.set_serving(True)
            _log.info("serving", extra={"address": server.address, "task": task.id, "teacher_id": model.teacher_id})
            yield server.address, metrics_address
            if filling is not None:
                filling.cancel()
            await server.drain(config.drain_s)
    finally:
        if filling is not None:
            filling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await filling
        if server is not None:
            await server.drain(0.0)
        await batcher.drain()
        await asyncio.to_thread(store.close)


async def _warm_up(batcher: Batcher, task: Task) -> None:
    """An inference without a hint and one with, on the way that calls take: the first caller doesn't pay for lazy start-up.

    Raises:
        KcmError: the model can't score.
    """
    started = time.monotonic()
    payload = _example(task)
    hint = Hint(label_ids=(0, 1), probabilities=(0.6, 0.4), confidence=0.5)
    for given in (None, hint):
        try:
            scores = await batcher.submit([payload], [given], deadline=math.inf)
        except (ModelFailed, Unreadable):
            raise KcmError("the large model failed on its warm-up; the log has the cause", fix="check the large model's folder") from None
        if scores[0].shape != (len(task.labels),):
            raise KcmError(f"the large model gives {scores[0].shape[-1]} scores for {len(task.labels)} labels")
    _log.info("warm", extra={"seconds": round(time.monotonic() - started, 3)})


def _example(task: Task) -> Payload:
    if task.modality == "text":
        return "warm up"
    import numpy as np

    from kcm.images import png

    return png(np.full((task.preprocess.size, task.preprocess.size, 3), 127, np.uint8))
