"""An image bundle on the device: files and tensors in, clear refusals, golden pixels, and large samples within every bound."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from image_kit import LABELS, jpeg, make_image_bundle, noise, plain, png, scene

from edge_runtime.cloud_client import CloudClient
from edge_runtime.config import CloudConfig, EdgeConfig
from edge_runtime.decider import TURN
from edge_runtime.explorer import Explorer
from edge_runtime.golden import golden_payloads
from edge_runtime.router import Router
from edge_runtime.runtime import EdgeRuntime, InvalidSample
from edge_runtime.spool import Spool, Waiting
from edge_runtime.stats import Stats
from kcm.bundle import load_bundle, read_manifest, write_manifest
from kcm.config import parse_toml
from kcm.errors import BundleError
from kcm.images import ImagePreprocessor
from kcm.rpc import MAX_MESSAGE
from kcm.sample import Answer, Sample, Source, Tensors
from kcm.task import PreprocessSpec, parse_task
from protos.kcm.v1 import cloud_pb2, sample_pb2

MB = 2**20


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_bundle(tmp_path_factory.mktemp("image") / "b")


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> EdgeRuntime:
    return EdgeRuntime.load(bundle)


def test_files_of_any_kind_and_tensors_are_answered_alike(runtime: EdgeRuntime) -> None:
    for label in range(4):
        forms = [png(plain(label)), jpeg(plain(label, 200)), png(plain(label, 33)), Tensors({"image": plain(label)})]
        forms.append(Tensors({"image": plain(label).tobytes()}))
        answers = runtime.infer([Sample(payload=form) for form in forms])
        assert {(answer.label, answer.source) for answer in answers} == {(LABELS[label], Source.LOCAL)}
    (hard,) = runtime.infer([Sample(payload=png(noise(64)))])
    assert hard.source is Source.DEGRADED and hard.confidence < 0.9


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        ("a text", "sample 1: this task reads images, the payload is text"),
        (b"GIF89a", "sample 1: the payload is GIF: JPEG and PNG are read"),
        (png(scene(64, 64))[:-60], "sample 1: the image is cut short"),
        (Tensors({"ids": np.zeros(3, np.int32)}), "sample 1: tensors ids given, the graph reads image"),
        (Tensors({"image": np.zeros((8, 8, 3), np.uint8)}), "sample 1: tensor 'image' is uint8"),
        (Tensors({"image": bytes(100)}), "sample 1: tensor 'image' has 100 values, 32 × 32 × 3 are taken"),
    ],
    ids=range(6),
)
def test_what_is_no_image_names_its_sample(runtime: EdgeRuntime, payload: str | bytes | Tensors, reason: str) -> None:
    with pytest.raises(InvalidSample, match=reason) as error:
        runtime.infer([Sample(payload=png(plain(0))), Sample(payload=payload), Sample(payload=png(plain(1)))])
    assert "89a" not in str(error.value)


def test_a_broken_image_takes_no_other_request_along(runtime: EdgeRuntime) -> None:
    good = [Sample(payload=png(plain(i))) for i in range(4)]
    broken = [good[0], Sample(payload=png(scene(64, 64))[:-60])]

    async def main() -> list[list[Answer] | BaseException]:
        router = Router(EdgeConfig(bundle="b"), runtime, client=None, spool=None, stats=Stats())
        return await asyncio.gather(*(router.ask(samples) for samples in (good, broken, good)), return_exceptions=True)

    first, second, third = asyncio.run(main())
    assert isinstance(first, list) and isinstance(third, list)
    assert [answer.label for answer in first] == [answer.label for answer in third] == list(LABELS)
    assert isinstance(second, InvalidSample) and str(second) == "sample 1: the image is cut short"
    assert len(good) * 2 + len(broken) <= TURN  # they did share a run


def test_the_golden_images_are_the_pixels_themselves(bundle: Path) -> None:
    payloads = golden_payloads(load_bundle(bundle).files["golden.npz"])
    pixels = ImagePreprocessor(PreprocessSpec(kind="image")).batch(payloads)["image"]
    assert np.array_equal(pixels[0], plain(0)) and np.array_equal(pixels[5], scene(32, 32))


@pytest.mark.parametrize("damage", ["pixel", "cut", "gif", "offsets", "float", "none", "text", "fewer", "negative"])
def test_changed_golden_images_are_refused(tmp_path: Path, damage: str) -> None:
    with np.load(make_image_bundle(tmp_path / "good") / "golden.npz") as archive:
        arrays = dict(archive)
    data, offsets = arrays["image"].tobytes(), arrays["offsets"].tolist()
    parts = [data[a:b] for a, b in pairwise(offsets)]
    if damage == "pixel":
        other = plain(0).copy()
        other[0, 0, 0] -= 1  # one level of one channel of one pixel
        parts[0] = png(other)
    elif damage == "cut":
        parts[1] = parts[1][:-30]
    elif damage == "gif":
        parts[2] = b"GIF89a"
    changed: dict[str, object] = {"image": np.frombuffer(b"".join(parts), np.uint8), "offsets": np.cumsum([0, *map(len, parts)])}
    if damage == "offsets":
        changed["offsets"] = np.array(offsets) * 2
    elif damage == "negative":
        changed["offsets"] = np.array([-offsets[-1], *offsets[1:]])  # a slice of the same bytes
    elif damage == "float":
        changed["image"] = arrays["image"].astype(np.float32)
    elif damage == "none":
        changed["image"] = None
    elif damage == "text":
        changed = {"image": None, "text": np.frombuffer(b"abcdef", np.uint8), "offsets": np.arange(7)}
    elif damage == "fewer":
        changed["offsets"] = changed["offsets"][:-1]  # type: ignore[index]
    reason = {
        "pixel": "golden input 0 is preprocessed differently",
        "cut": "golden inputs 0 to 5 can't be read: the image is",
        "gif": "can't be read: the payload is GIF",
        "offsets": "offsets outside its inputs",
        "negative": "offsets outside its inputs",
        "float": "holds its inputs as float32",
        "none": "has no array text",
        "text": "can't be read: this task reads images, the payload is text",
        "fewer": "golden.npz has 5 inputs, but other numbers of outputs",
    }[damage]
    folder = make_image_bundle(tmp_path / "bad", golden=changed)
    with pytest.raises(BundleError, match=reason):
        EdgeRuntime.load(folder)


def test_a_graph_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = make_image_bundle(tmp_path / "b")
    toml = (folder / "task.toml").read_text()
    assert "size = 32" in toml
    (folder / "task.toml").write_text(toml.replace("size = 32", "size = 64", 1))
    graph = read_manifest(folder).graph
    write_manifest(folder, task=parse_task(parse_toml((folder / "task.toml").read_bytes(), "t"), "t"), graph=graph, version="0")
    with pytest.raises(BundleError, match=r"its graph reads image \(up to 32\); this kcm makes image \(up to 64\)"):
        EdgeRuntime.load(folder)


def away(name: str, size: int, *, confidence: float = 0.1, explore: bool = False) -> Waiting:
    sample = cloud_pb2.PredictSample(
        sample_id=name,
        payload=sample_pb2.Payload(image=np.random.default_rng(len(name)).bytes(size)),
        confidence=confidence,
        purpose=cloud_pb2.EXPLORE if explore else cloud_pb2.LIVE,
    )
    return Waiting(sample=sample, task_id="t", label_space="s")


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path / "spool.db", max_bytes=16 * MB)
    yield made
    made.close()


def test_a_spool_of_photos_stays_within_its_bytes_and_comes_out_whole(tmp_path: Path, spool: Spool) -> None:
    rows = [away(f"{i:03}", 400_000 + 1000 * (i % 7), confidence=(i * 37 % 100) / 100) for i in range(100)]

    async def scenario() -> None:
        for start in range(0, 100, 10):
            await spool.put(rows[start : start + 10])
        assert 25 <= spool.waiting <= 40 and spool.waiting + spool.evicted == 100
        assert max(row.sample.confidence for row in await spool.take(100)) < 0.6
        came: list[str] = []
        by_id = {row.sample.sample_id: row.sample.payload.image for row in rows}
        while taken := await spool.take(64):
            assert sum(row.sample.ByteSize() for row in taken) <= 4 * MB
            assert all(by_id[row.sample.sample_id] == row.sample.payload.image for row in taken)
            came += [row.sample.sample_id for row in taken]
            await spool.settle(stored=came[-len(taken) :])
        assert len(set(came)) == len(came) >= 25

    asyncio.run(scenario())
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1.6 * 16 * MB


def test_an_image_of_the_largest_size_is_kept_and_sent_alone(spool: Spool) -> None:
    most = MAX_MESSAGE // 2  # of one payload
    assert msgspec.convert({"max_bytes": most}, PreprocessSpec).max_bytes == most
    with pytest.raises(msgspec.ValidationError, match=r"max_bytes"):  # no task may ask for what no message holds
        msgspec.convert({"max_bytes": most + 1}, PreprocessSpec)

    async def scenario() -> None:
        assert await spool.put([away("a", most), away("b", 100)]) == ()
        taken = await spool.take(64)
        assert [row.sample.sample_id for row in taken] == ["a"]

    asyncio.run(scenario())


def test_a_call_to_the_cloud_is_split_below_what_a_message_holds() -> None:
    async def scenario() -> list[list[cloud_pb2.PredictSample]]:
        client = CloudClient(CloudConfig(target="127.0.0.1:1"), "e")
        sizes = [2**23, 10, 3 * MB, 3 * MB, 3 * MB, *[MB] * 9]
        chunks = client._chunks([away(f"{i}", size).sample for i, size in enumerate(sizes)])
        await client.close()
        return chunks

    chunks = asyncio.run(scenario())
    assert [sample.sample_id for chunk in chunks for sample in chunk] == [str(i) for i in range(14)]
    for chunk in chunks:
        assert cloud_pb2.PredictRequest(edge_id="e", task_id="t", label_space="s", samples=chunk).ByteSize() < MAX_MESSAGE * 3 / 4
    assert len(chunks) <= 5


def test_explored_photos_that_wait_for_a_slow_disk_are_bounded_in_bytes(spool: Spool) -> None:
    async def scenario() -> None:
        explorer = Explorer(1.0, spool, stats := Stats())
        for i in range(40):
            explorer.keep(away(f"{i}", MB, explore=True))
        assert sum(row.sample.ByteSize() for row in explorer._rows) <= 32 * MB and len(explorer._rows) == 31
        await explorer.close()
        assert stats.explored + spool.evicted == 31
        explorer.keep(away("after", MB, explore=True))  # there is room again
        assert len(explorer._rows) == 1
        await explorer.close()

    asyncio.run(scenario())


def test_the_golden_reader_still_reads_texts() -> None:
    out = io.BytesIO()
    outputs = {name: np.zeros((2, 2), np.float32) for name in ("logits", "confidence", "score", "top_ids", "input_sums")}
    np.savez(out, text=np.frombuffer("größer".encode(), np.uint8), offsets=np.array([0, 4, 8]), **outputs)
    assert golden_payloads(out.getvalue()) == ["grö", "ßer"]
