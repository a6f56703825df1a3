"""A real gRPC Cloud that answers by rule: the label is the payload's length modulo the classes. Commits before it replies.

How it answers is read from FOLDER/behaviour.json at each call: {"mode": ..., "delay_ms": ..., "teacher": ...}. Modes: ok, full,
mismatch, poison (refuses a call that holds the word, in a text or in the id of a truth), garbage, wrong-ids, unstored, broken,
old (has no Label), strict (takes truths about its own labels only).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from kcm.rpc import MAX_MESSAGE
from kcm.sample import scores_to_proto
from kcm.task import label_space
from protos.kcm.v1 import cloud_pb2, cloud_pb2_grpc, sample_pb2

_LABELS = ("alpha", "beta", "gamma", "delta")
_SCHEMA = """PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;
CREATE TABLE IF NOT EXISTS inbox (edge_id, sample_id, purpose, times, text, hint, p_escalate, p_hint, confidence, small,
  UNIQUE (edge_id, sample_id));
CREATE TABLE IF NOT EXISTS truths (edge_id, sample_id, label_id, times, UNIQUE (edge_id, sample_id));
CREATE TABLE IF NOT EXISTS calls (purpose, samples);"""


class ByRule(cloud_pb2_grpc.CloudServicer):
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._inbox = sqlite3.connect(folder / "inbox.db")
        self._inbox.executescript(_SCHEMA)

    async def Predict(self, request: cloud_pb2.PredictRequest, context: grpc.aio.ServicerContext) -> cloud_pb2.PredictReply:
        behaviour, mode = await self._behave(context)
        if mode == "poison" and any("poison" in sample.payload.text for sample in request.samples):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "sample can't be read")
        if mode != "unstored":
            self._commit(request)
        predictions = [self._predict(sample, request.label_space, mode) for sample in request.samples]
        return cloud_pb2.PredictReply(teacher_id=behaviour.get("teacher", "rule"), prompt_id="none", predictions=predictions)

    async def Label(self, request: cloud_pb2.LabelRequest, context: grpc.aio.ServicerContext) -> cloud_pb2.LabelReply:
        _, mode = await self._behave(context)
        if mode == "old":
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        if mode == "poison" and any("poison" in label.sample_id for label in request.labels):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "label can't be read")
        if mode == "strict" and request.label_space != label_space(_LABELS):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another label space")
        with self._inbox:
            self._inbox.executemany(
                "INSERT INTO truths VALUES (?, ?, ?, 1) ON CONFLICT DO UPDATE SET label_id = excluded.label_id, times = times + 1",
                [(request.edge_id, label.sample_id, label.label_id) for label in request.labels],
            )
        return cloud_pb2.LabelReply(stored=len(request.labels))

    async def _behave(self, context: grpc.aio.ServicerContext) -> tuple[dict[str, Any], str]:
        """What every call does under the behaviour of the moment; returns it, with its mode."""
        behaviour = json.loads((self._folder / "behaviour.json").read_text())
        mode = behaviour.get("mode", "ok")
        await asyncio.sleep(behaviour.get("delay_ms", 0) / 1000)
        if mode == "full":
            context.set_trailing_metadata((("grpc-retry-pushback-ms", "300"),))
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full")
        if mode == "mismatch":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another label space")
        if mode == "broken":
            raise RuntimeError("a bug in the cloud")
        return behaviour, mode

    def _predict(self, sample: cloud_pb2.PredictSample, label_space: str, mode: str) -> cloud_pb2.Prediction:
        label = len(sample.payload.text or sample.payload.image) % len(_LABELS)
        scores = np.zeros(len(_LABELS), np.float32)
        scores[label] = 5.0
        if mode == "garbage":
            scores[0] = np.nan
        return cloud_pb2.Prediction(
            sample_id=sample.sample_id if mode != "wrong-ids" else f"not-{sample.sample_id}",
            label_id=label,
            label=_LABELS[label],
            scores=scores_to_proto(scores, label_space),
            stored=mode != "unstored",
        )

    def _commit(self, request: cloud_pb2.PredictRequest) -> None:
        with self._inbox:
            self._inbox.execute("INSERT INTO calls VALUES (?, ?)", (request.samples[0].purpose, len(request.samples)))
            self._inbox.executemany(
                "INSERT INTO inbox VALUES (?, ?, ?, 1, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET times = times + 1",
                [
                    (
                        *(request.edge_id, s.sample_id, s.purpose, _kept(s.payload), len(s.hint.label_ids)),
                        *(s.p_escalate, s.p_hint, s.confidence, len(s.small.values)),
                    )
                    for s in request.samples
                ],
            )


def _kept(payload: sample_pb2.Payload) -> str:
    """The text, or an image's SHA-256."""
    return hashlib.sha256(payload.image).hexdigest() if payload.image else str(payload.text)


async def main(folder: Path) -> None:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", MAX_MESSAGE)])
    cloud_pb2_grpc.add_CloudServicer_to_server(ByRule(folder), server)
    address = f"unix:{folder}/c.sock"
    if (folder / "key.pem").exists():  # mTLS
        key, certificate, ca = ((folder / f"{name}.pem").read_bytes() for name in ("key", "certificate", "ca"))
        credentials = grpc.ssl_server_credentials([(key, certificate)], root_certificates=ca, require_client_auth=True)
        address = f"localhost:{server.add_secure_port('localhost:0', credentials)}"
    else:
        server.add_insecure_port(address)
    await server.start()
    print(f"ready on {address}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
