"""A small client of `kcm edge`: sends texts or images, prints who answered what.

    python examples/client.py "the price of oil rose" "profit fell"
    cat texts.txt | python examples/client.py --address 127.0.0.1:50051
    python examples/client.py --image cat.jpg --image dog.png
    python examples/client.py --truth 0199b2f0-7c7e-7c3a-9d7a-3f1f6f0f4b11=crude

One line per text, tab-separated: label, source (LOCAL, CLOUD, DEGRADED), confidence of the small model, sample_id, text.
One line per image, with the file's name last: JPEG or PNG, sent as it is. The task's max_bytes and max_pixels are its limits.
--truth tells the edge which label was right, once you know. Tell it about a random share of the samples, not only of the mistakes:
from these the edge estimates how well it answers.
Needs grpcio and the stubs in protos/, which kcm installs; any language can do the same from protos/kcm/v1/edge.proto.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc

from protos.kcm.v1 import edge_pb2, edge_pb2_grpc, sample_pb2

BATCH = 64  # samples per call: one run of the model each
BATCH_BYTES = 8 * 2**20  # in one call: gRPC's limit here is 16 MiB, and photos get there soon
Source = edge_pb2.InferAnswer.Source


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask a running `kcm edge`.")
    parser.add_argument("texts", nargs="*", help="What to ask; without any: one text per line of stdin.")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="Ask about this JPEG or PNG; sends no text.")
    parser.add_argument("--truth", action="append", default=[], metavar="ID=LABEL", help="What was right; sends this and no text.")
    parser.add_argument("--address", default="127.0.0.1:50051", help="HOST:PORT or unix:/path, as `kcm edge` says in `ready on ...`.")
    # The deadline is yours. The edge keeps it: what the cloud can't answer in time comes back DEGRADED, not as an error.
    parser.add_argument("--seconds", type=float, default=5.0, help="Deadline of each call.")
    arguments = parser.parse_args()

    # One channel for the life of the program: it reconnects by itself. An edge with [edge.tls] wants
    # grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate)) here.
    with grpc.insecure_channel(arguments.address) as channel:
        edge = edge_pb2_grpc.EdgeStub(channel)
        try:
            if arguments.truth:
                tell(edge, arguments.truth, arguments.seconds)
                return 0
            for batch in batches(images(arguments.image) if arguments.image else texts(arguments.texts)):
                # No sample_id: the edge makes one. Keep it (or set your own) where the truth may come later.
                samples = [edge_pb2.InferSample(payload=payload) for _, payload in batch]
                reply = edge.Infer(edge_pb2.InferRequest(samples=samples), timeout=arguments.seconds)
                for (name, _), answer in zip(batch, reply.answers, strict=True):  # as many as asked, in order
                    show(name, answer)
        except OSError as error:
            print(f"{error.filename}: {error.strerror}", file=sys.stderr)
            return 1
        except grpc.RpcError as error:
            # UNAVAILABLE: no edge at this address, or truths that its disk didn't take. INVALID_ARGUMENT: the details say what is wrong.
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    return 0


def tell(edge: edge_pb2_grpc.EdgeStub, pairs: Iterable[str], seconds: float) -> None:
    truths = [edge_pb2.Truth(sample_id=name, label=label) for name, _, label in (pair.partition("=") for pair in pairs)]
    reply = edge.Feedback(edge_pb2.FeedbackRequest(truths=truths), timeout=seconds)
    # Kept: on the edge's disk, and sent to the cloud from there. Matched: the edge remembers the sample, and learns from it at once.
    print(f"{reply.kept} kept, {reply.matched} matched")


def show(name: str, answer: edge_pb2.InferAnswer) -> None:
    source = Source.Name(answer.source).removeprefix("SOURCE_")
    # `confidence` is C_x, the small model's own, also where the cloud answered; `reason` says why an answer is DEGRADED.
    why = f"\t({answer.reason})" if answer.reason else ""
    print(f"{answer.label}\t{source}\t{answer.confidence:.3f}\t{answer.sample_id}\t{name[:60]}{why}", flush=True)


Named = tuple[str, sample_pb2.Payload]


def texts(given: list[str]) -> Iterator[Named]:
    for text in given or (line.rstrip("\n") for line in sys.stdin):
        yield text, sample_pb2.Payload(text=text)


def images(files: list[str]) -> Iterator[Named]:
    for file in files:
        yield file, sample_pb2.Payload(image=Path(file).read_bytes())


def batches(asked: Iterable[Named]) -> Iterator[list[Named]]:
    batch: list[Named] = []
    size = 0
    for name, payload in asked:
        if batch and (len(batch) == BATCH or size + payload.ByteSize() > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append((name, payload))
        size += payload.ByteSize()
    if batch:
        yield batch


if __name__ == "__main__":
    sys.exit(main())
