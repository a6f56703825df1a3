"""An empty grpc.aio handler of the same service, as a process of its own: what gRPC alone costs."""

from __future__ import annotations

import asyncio
import json

import grpc
import typer

from protos.kcm.v1 import edge_pb2, edge_pb2_grpc


class _Empty(edge_pb2_grpc.EdgeServicer):  # type: ignore[misc]
    async def Infer(self, request: edge_pb2.InferRequest, context: object) -> edge_pb2.InferReply:
        return edge_pb2.InferReply()


async def _serve() -> None:
    server = grpc.aio.server()
    edge_pb2_grpc.add_EdgeServicer_to_server(_Empty(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    typer.echo(json.dumps({"ready": f"127.0.0.1:{port}"}))
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve())
