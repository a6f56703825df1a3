"""Images end to end: a net that is really trained, exported, and served by a `kcm edge` process that is given files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import edge_kit
import grpc
import numpy as np
import pytest
import torch
from edge_kit import Process, running_edge
from image_kit import jpeg, png, scene
from vision_kit import LABELS, SIZE, image_split, tinted

from kcm.bundle import load_bundle
from kcm.preprocess import load_preprocessor
from protos.kcm.v1 import edge_pb2, edge_pb2_grpc, sample_pb2
from training.run import Run, load_run

pytestmark = pytest.mark.slow
MAX_BYTES, MAX_PIXELS = 200_000, 640 * 480
PRECISIONS = ("fp32", "fp16", "int8")
TASK = """
[task]
id = "tints"
modality = "image"
labels = ["red", "green", "blue"]

[data]
train = "train.npz"
test = "test.npz"

[preprocess]
kind = "image"
size = 32
max_bytes = 200000
max_pixels = 307200

[small]
kind = "resnet"

[small.net]
depth = 8
width = 4
epochs = 6
batch = 16

[judge]
folds = 2
epsilon = 0.9

[large]
kind = "resnet"
"""


def kcm(*arguments: object) -> str:
    command = [sys.executable, "-m", "kcm.app", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task, its run and its bundle in three precisions, by the commands that a user gives."""
    folder = tmp_path_factory.mktemp("images")
    for name, seed, rows in (("train", 0, 96), ("test", 7, 90)):
        images, labels = tinted(rows, seed=seed)
        np.savez(folder / f"{name}.npz", images=images, labels=np.array(LABELS)[labels])
    (folder / "task.toml").write_text(TASK)
    kcm("train", "--task", folder, "--out", folder / "run")
    kcm("export", folder / "run", "--out", folder / "bundle", "--precision", "all")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    torch.set_num_threads(1)
    return load_run(folder / "run")


@pytest.fixture(scope="module")
def edge(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with running_edge(folder / "bundle", tmp_path_factory.mktemp("state")) as process:
        yield process


@pytest.fixture
def client(edge: Process) -> Iterator[edge_pb2_grpc.EdgeStub]:
    made, channel = edge_kit.stub(edge.address)
    with channel:
        yield made


def request(*files: bytes, route: int = edge_pb2.LOCAL) -> edge_pb2.InferRequest:
    samples = [edge_pb2.InferSample(payload=sample_pb2.Payload(image=file), route=route) for file in files]  # type: ignore[arg-type]
    return edge_pb2.InferRequest(samples=samples)


def test_a_process_answers_files_as_the_run_does_offline(client: edge_pb2_grpc.EdgeStub, run: Run) -> None:
    data = image_split(90, seed=7)
    pixels = load_preprocessor(run.task.preprocess, {}).batch(data.payloads)["image"]
    assert np.array_equal(pixels, tinted(90, seed=7)[0]), "PNG files of the size that is read lose nothing"
    want = run.small.logits(pixels)
    answers = [a for start in (0, 30, 60) for a in client.Infer(request(*data.payloads[start : start + 30]), timeout=30).answers]  # type: ignore[arg-type]
    assert [a.label_id for a in answers] == want.argmax(1).tolist()
    assert {a.source for a in answers} == {edge_pb2.InferAnswer.SOURCE_LOCAL} and {a.label for a in answers} == set(LABELS)
    best = np.exp(want - want.max(1, keepdims=True))
    np.testing.assert_allclose([a.candidates[0].probability for a in answers], (1 / best.sum(1)), atol=1e-3)
    assert (want.argmax(1) == data.y).mean() > 0.7, "it has learnt something"
    alone = client.Infer(request(data.payloads[3]), timeout=10).answers[0]  # type: ignore[arg-type]
    assert alone.label_id == want[3].argmax() and alone.confidence == pytest.approx(answers[3].confidence, abs=1e-3)


def test_epsilon_divides_what_stays(client: edge_pb2_grpc.EdgeStub, run: Run) -> None:
    """Without a cloud, what would go there is answered DEGRADED."""
    data = image_split(60, seed=7)
    sources = [a.source for a in client.Infer(request(*data.payloads, route=edge_pb2.AUTO), timeout=30).answers]  # type: ignore[arg-type]
    pixels = load_preprocessor(run.task.preprocess, {}).batch(data.payloads)["image"]
    from training.judge import Predictions

    score = run.score(Predictions(run.small.logits(pixels), *np.zeros((2, len(pixels)), np.float32)))
    epsilon = run.threshold.epsilon
    clear = np.abs(score - epsilon) > 1e-3
    local = np.array(sources) == edge_pb2.InferAnswer.SOURCE_LOCAL
    assert 0 < local.sum() < len(local) and np.array_equal(local[clear], (score > epsilon)[clear])


def test_a_photograph_is_scaled_and_a_jpeg_read(client: edge_pb2_grpc.EdgeStub, run: Run) -> None:
    files = [jpeg(scene(240, 320, seed=1)), png(scene(200, 150, seed=2))]
    want = run.small.logits(load_preprocessor(run.task.preprocess, {}).batch(files)["image"]).argmax(1)
    assert [a.label_id for a in client.Infer(request(*files), timeout=10).answers] == want.tolist()


def test_what_is_no_image_is_refused_by_name(client: edge_pb2_grpc.EdgeStub) -> None:
    good = png(scene(SIZE, SIZE))
    large = png(scene(700, 480))  # a small file, and too many pixels
    noise = png(np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8))
    assert len(large) < MAX_BYTES < len(noise) and 700 * 480 > MAX_PIXELS > 400 * 400
    cases = {
        good[: len(good) // 2]: "sample 1: ",
        b"GIF89a" + bytes(40): "sample 1: .*GIF",
        b"": "sample 1: ",
        large: "sample 1: .*pixels",
        noise: f"sample 1: .*at most {MAX_BYTES}",
    }
    for bad, said in cases.items():
        with pytest.raises(grpc.RpcError, match=said) as error:
            client.Infer(request(good, bad), timeout=10)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    text = edge_pb2.InferRequest(samples=[edge_pb2.InferSample(payload=sample_pb2.Payload(text="red"))])
    with pytest.raises(grpc.RpcError, match=r"sample 0: .*reads images"):
        client.Infer(text, timeout=10)
    assert len(client.Infer(request(good), timeout=10).answers) == 1, "and it serves on"


def test_pixels_as_tensors_are_answered_alike(client: edge_pb2_grpc.EdgeStub) -> None:
    images = tinted(5, seed=7)[0]
    payloads = [sample_pb2.Payload(tensors=sample_pb2.Tensors(inputs={"image": image.tobytes()})) for image in images]
    samples = [edge_pb2.InferSample(payload=payload, route=edge_pb2.LOCAL) for payload in payloads]
    tensors = client.Infer(edge_pb2.InferRequest(samples=samples), timeout=10).answers
    files = client.Infer(request(*map(png, images)), timeout=10).answers
    assert [(a.label_id, a.confidence) for a in tensors] == [(a.label_id, a.confidence) for a in files]


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_narrow_precisions_serve(precision: str, folder: Path, tmp_path: Path) -> None:
    data = image_split(60, seed=7)
    with running_edge(folder / "bundle", tmp_path, "--precision", precision) as process:
        made, channel = edge_kit.stub(process.address)
        with channel:
            answers = made.Infer(request(*data.payloads), timeout=30).answers  # type: ignore[arg-type]
    assert np.mean([a.label_id for a in answers] == data.y) > 0.7


def test_verify_and_the_card_speak_of_it(folder: Path) -> None:
    said = json.loads(kcm("verify", folder / "bundle", "--run", folder / "run", "--json"))
    assert said["samples"] == 90 and said["labels"] == 0 and said["decisions"] == said["excused"]
    assert set(said["precisions"]) == {"fp16", "int8"} and all(p["labelled"] == 90 for p in said["precisions"].values())
    bare = folder / "bare"  # a folder of images without labels
    bare.mkdir()
    for row, payload in enumerate(image_split(9, seed=3).payloads):
        (bare / f"{row}.png").write_bytes(payload)  # type: ignore[arg-type]
    said = json.loads(kcm("verify", folder / "bundle", "--run", folder / "run", "--samples", bare, "--json"))
    assert said["samples"] == 9 and all(p["labelled"] == 0 for p in said["precisions"].values())
    bundle = load_bundle(folder / "bundle")
    assert bundle.manifest.precisions == PRECISIONS and bundle.manifest.graph.inputs == {"image": SIZE}
    assert "text" not in (folder / "bundle" / "MODEL_CARD.md").read_text()
