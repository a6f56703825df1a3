"""Images over real gRPC to a service with a real ONNX model: answered, kept, filled, compacted, read back by training; or refused."""

from __future__ import annotations

import asyncio
import struct
import threading
import time
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import apsw
import cloud_kit
import grpc
import image_kit
import numpy as np
import picture_kit
import pyarrow.parquet as pq
import pytest
from cloud_kit import HINT, LABELS, put, request, row, sample, tell
from picture_kit import COLOURS, GREY, flat, image_task, noisy, write_image_large
from service_kit import refused, scores, scraped, serving

import cloud_server.compact
from cloud_server.compact import compact
from cloud_server.config import CloudConfig
from cloud_server.models import load_large
from cloud_server.models.image import ImageModel
from cloud_server.server import check
from cloud_server.store import TeacherStore, hash_payload
from kcm.errors import ConfigError
from kcm.rpc import MAX_MESSAGE
from kcm.sample import Float32, Hint, HintArm, Payload
from training.teacher_rows import read_lessons
from training.truths import read_truths

pytestmark = pytest.mark.slow


def play(folder: Path, act: Callable[[Any, ImageModel], Awaitable[None]], preprocess: dict[str, Any] | None = None, **changes: Any) -> None:
    """Run `act(stub, model)` against a server of its own. preprocess: of the task; the model takes more."""
    model = _model(folder)

    async def run() -> None:
        async with serving(folder, model, image_task(**(preprocess or {})), **changes) as (stub, _, _):
            await act(stub, model)

    asyncio.run(run())


def _model(folder: Path, **changes: Any) -> ImageModel:
    spec = {"kind": "image", "size": picture_kit.SIZE, "mean": picture_kit.MEAN, "std": picture_kit.STD, "max_bytes": 2**23}
    model = load_large(write_image_large(folder / "large", preprocess=spec, **changes))
    assert isinstance(model, ImageModel)
    return model


def bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """A PNG of few bytes that says it has billions of pixels, and has a million bytes of zeros to inflate."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


def test_images_are_answered_under_their_hint_and_stored_as_they_came(tmp_path: Path) -> None:
    payloads = [*map(flat, COLOURS), image_kit.jpeg(image_kit.scene(60, 90))]

    async def act(stub: Any, model: ImageModel) -> None:
        sent = [sample(f"s{i}", payload, hint=HINT if i == 1 else None) for i, payload in enumerate(payloads)]
        reply = await stub.Predict(request(*sent), timeout=10)
        hints = [HINT if i == 1 else None for i in range(5)]
        np.testing.assert_allclose(np.stack([scores(p) for p in reply.predictions]), model.logits(payloads, hints), atol=1e-5)
        assert [p.label for p in reply.predictions[:1]] == [LABELS[0]]
        assert [p.hint_arm for p in reply.predictions[:2]] == [HintArm.NONE, HintArm.CANDIDATES] and reply.prompt_id == model.prompt_id
        assert all(p.stored for p in reply.predictions)

    play(tmp_path, act, fill=False)
    with apsw.Connection(str(tmp_path / "store" / "inbox-0.db")) as db:
        assert db.execute("SELECT image, text, teacher_logits IS NULL FROM rows ORDER BY seq").fetchall() == [
            (payload, None, int(i == 1)) for i, payload in enumerate(payloads)
        ]


def test_a_resend_is_answered_from_the_store_and_other_bytes_under_its_id_are_refused(tmp_path: Path) -> None:
    async def act(stub: Any, model: ImageModel) -> None:
        first = await stub.Predict(request(sample("s1", flat(GREY))), timeout=5)
        again = await stub.Predict(request(sample("s1", flat(GREY))), timeout=5)
        assert again.predictions == first.predictions
        other = image_kit.png(np.full((16, 16, 3), GREY, np.uint8), compress_level=9) + b"tail"  # the same pixels, another file
        await refused(
            stub.Predict(request(sample("s0", noisy(1)), sample("s1", other)), timeout=5),
            grpc.StatusCode.INVALID_ARGUMENT,
            "sample 1 ('s1'): its sample_id was used before for another payload",
        )

    play(tmp_path, act)
    assert len({hash_payload(payload) for payload in (noisy(1), noisy(1) + b"t", noisy(1)[:-1] + b"t")}) == 3


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ("a text", "task toy reads image, the payload is a text"),
        (b"", "the payload is empty: JPEG and PNG are read"),
        (b"no picture", "of an unknown format: JPEG and PNG are read"),
        (b"GIF89a" + bytes(100), "the payload is GIF"),
        (bomb(), "the image is 50000 × 50000, at most 16777216 pixels are taken"),
        (flat(GREY)[:40], "the image is"),
        (noisy(3)[:-300], "the image is cut short"),
        (noisy(3)[:200] + bytes(100) + noisy(3)[300:], "the image is damaged"),
        (image_kit.jpeg(image_kit.scene(300, 300))[:-4000], "the image is cut short"),
        (flat(GREY) + bytes(70_000), "at most 60000 are taken"),
    ],
)
def test_what_is_no_image_is_refused_by_name_and_costs_the_calls_beside_it_nothing(tmp_path: Path, payload: Payload, message: str) -> None:
    """The broken one and good ones are in flight at once, and would have been one batch."""

    async def act(stub: Any, model: ImageModel) -> None:
        good = [stub.Predict(request(sample(f"g{i}", noisy(i))), timeout=10) for i in range(6)]
        bad = stub.Predict(request(sample("ok", flat(GREY)), sample("bad", payload)), timeout=10)
        error = await refused(bad, grpc.StatusCode.INVALID_ARGUMENT, message)
        assert (error.details() or "").startswith("sample 1 ('bad'): ")
        replies = await asyncio.gather(*good)
        expected = model.logits([noisy(i) for i in range(6)], [None] * 6)
        np.testing.assert_allclose(np.stack([scores(reply.predictions[0]) for reply in replies]), expected, atol=1e-5)
        assert (await stub.Predict(request(sample("ok", flat(GREY))), timeout=5)).predictions[0].stored

    play(tmp_path, act, {"max_bytes": 60_000})
    with apsw.Connection(str(tmp_path / "store" / "inbox-0.db")) as db:
        assert db.execute("SELECT count(*) FROM rows").fetchall() == [(7,)]


def test_bombs_beside_traffic_take_neither_memory_nor_time(tmp_path: Path) -> None:
    """Of one that passes the pixel limit in its header, no more is decoded than the limit: the time is that of one large image."""

    async def act(stub: Any, model: ImageModel) -> None:
        started = time.monotonic()
        calls = [stub.Predict(request(sample(f"b{i}", bomb())), timeout=10) for i in range(50)]
        calls.append(stub.Predict(request(sample("g", flat(GREY))), timeout=10))
        *bombs, good = await asyncio.gather(*calls, return_exceptions=True)
        assert {error.code() for error in bombs} == {grpc.StatusCode.INVALID_ARGUMENT}
        assert good.predictions[0].stored and time.monotonic() - started < 5

    play(tmp_path, act)


def test_the_models_thread_does_not_wait_for_images_to_be_read(tmp_path: Path) -> None:
    """One call's image hangs in the reader; another's, which is read by the second thread, is answered meanwhile."""
    hold = threading.Event()
    slow = flat((1, 2, 3))

    async def run() -> None:
        model = _model(tmp_path)
        plain = model.read
        model.read = lambda payload: (hold.wait(20) if payload == slow else None, plain(payload))[1]  # type: ignore[method-assign]
        async with serving(tmp_path, model, image_task(), threads=2) as (stub, _, _):
            stuck = asyncio.ensure_future(_call(stub, "slow", slow))
            await asyncio.sleep(0.1)
            assert (await stub.Predict(request(sample("fast", flat(GREY))), timeout=5)).predictions[0].stored
            assert not stuck.done()
            hold.set()
            assert (await stuck).predictions[0].stored

    asyncio.run(run())


async def _call(stub: Any, sample_id: str, payload: Payload) -> Any:
    return await stub.Predict(request(sample(sample_id, payload)), timeout=10)


def test_an_image_of_the_largest_size_that_a_task_may_allow_fits_a_call(tmp_path: Path) -> None:
    big = flat(GREY) + bytes(2**23 - len(flat(GREY)))  # what stands behind the image's end is no part of it
    assert len(big) == MAX_MESSAGE // 2

    async def act(stub: Any, model: ImageModel) -> None:
        (answer,) = (await stub.Predict(request(sample("s1", big)), timeout=20)).predictions
        np.testing.assert_allclose(scores(answer), model.logits([flat(GREY)], [None])[0], atol=1e-5)
        assert answer.stored
        await refused(stub.Predict(request(sample("s2", big + b"1")), timeout=20), grpc.StatusCode.INVALID_ARGUMENT, "at most 8388608")

    play(tmp_path, act, {"max_bytes": 2**23})


def test_metrics_tell_how_long_images_are_read_and_how_many_cannot_be(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, _model(tmp_path), image_task()) as (stub, _, metrics):
            await stub.Predict(request(sample("s1", flat(GREY))), timeout=5)
            await refused(stub.Predict(request(sample("s2", b"?")), timeout=5), grpc.StatusCode.INVALID_ARGUMENT, "")
            text = await scraped(metrics)
            assert 'kcm_cloud_shed_samples_total{reason="unreadable"} 1.0' in text
            assert "kcm_cloud_read_seconds_count 3.0" in text, "the warm-up's two and one call's"

    asyncio.run(run())


def test_an_idle_server_scores_hinted_images_again_without_the_hint(tmp_path: Path) -> None:
    payloads = [noisy(seed) for seed in range(5)]

    def filled() -> list[Any]:
        with apsw.Connection(str(tmp_path / "store" / "inbox-0.db")) as db:
            return [value for (value,) in db.execute("SELECT teacher_logits FROM rows ORDER BY seq")]

    async def act(stub: Any, model: ImageModel) -> None:
        await stub.Predict(request(*(sample(f"s{i}", payload, hint=HINT) for i, payload in enumerate(payloads))), timeout=5)
        await asyncio.to_thread(cloud_kit.wait_until, lambda: None not in filled())
        expected = model.logits(payloads, [None] * 5)
        np.testing.assert_allclose(np.stack([np.frombuffer(value, "<f4") for value in filled()]), expected, atol=1e-5)

    play(tmp_path, act)


def test_a_row_whose_image_cannot_be_read_any_more_is_passed_over(tmp_path: Path) -> None:
    hinted = {"hint_arm": HintArm.CANDIDATES, "teacher_id": "resnet-f00d"}
    rows = [row("a", payload=noisy(0), **hinted), row("b", payload=b"broken on the disk", **hinted), row("c", payload=noisy(1), **hinted)]
    put(tmp_path / "store", *rows)

    def waiting() -> list[str]:
        with apsw.Connection(str(tmp_path / "store" / "inbox-0.db")) as db:
            return [name for (name,) in db.execute("SELECT sample_id FROM rows WHERE teacher_logits IS NULL")]

    async def act(stub: Any, model: ImageModel) -> None:
        await asyncio.to_thread(cloud_kit.wait_until, lambda: waiting() == ["b"])
        assert (await stub.Predict(request(sample("s1", noisy(2))), timeout=5)).predictions[0].stored

    play(tmp_path, act)


def test_images_go_through_the_store_to_training_as_their_bytes(tmp_path: Path) -> None:
    payloads: list[Payload] = [noisy(seed) for seed in range(6)]
    put(tmp_path, *(row(f"s{i}", payload=payload, p_escalate=0.5) for i, payload in enumerate(payloads)))
    tell(tmp_path, {"s1": 2, "s3": 0})
    done = compact(tmp_path)
    assert (done.written, done.labelled) == (6, 2)
    table = pq.read_table(next((tmp_path / "parquet").glob("*.parquet")))
    assert table["image"].to_pylist() == payloads and table["text"].null_count == 6
    lessons = read_lessons(tmp_path, image_task())
    assert sorted(map(bytes, lessons.payloads)) == sorted(payloads)  # type: ignore[arg-type]
    truths = read_truths(tmp_path, image_task(), lambda payload: True)
    assert dict(zip(truths.payloads, truths.labels.tolist(), strict=True)) == {payloads[1]: 2, payloads[3]: 0}
    # A truth that comes later rewrites the part, and the images stay as they are.
    tell(tmp_path, {"s5": 1})
    assert compact(tmp_path).rewritten == 1
    again = pq.read_table(next((tmp_path / "parquet").glob("*.parquet")))
    assert again["image"].to_pylist() == payloads and again["label"].to_pylist() == [None, 2, None, 0, None, 1]


def test_row_groups_and_parts_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight thousand photos in one row group would be gigabytes at once."""
    monkeypatch.setattr(cloud_server.compact, "_GROUP_BYTES", 50_000)
    monkeypatch.setattr(cloud_server.compact, "_PART_BYTES", 200_000)
    rng = np.random.default_rng(0)
    images = {f"s{i:02}": rng.bytes(20_000) for i in range(40)}
    put(tmp_path, *(row(name, payload=image) for name, image in images.items()))
    tell(tmp_path, {"s07": 1})
    assert compact(tmp_path).written == 40
    found: dict[str, bytes] = {}
    parts = sorted((tmp_path / "parquet").glob("*.parquet"))
    assert 3 <= len(parts) <= 5
    for part in parts:
        with pq.ParquetFile(part) as file:
            groups = [file.read_row_group(group, columns=["sample_id", "image"]).to_pydict() for group in range(file.num_row_groups)]
        assert all(sum(map(len, group["image"])) <= 70_000 for group in groups) and len(groups) > 1
        for group in groups:
            found.update(zip(group["sample_id"], group["image"], strict=True))
    assert found == images
    before = [part.name for part in parts]
    tell(tmp_path, {"s11": 3})
    assert compact(tmp_path).rewritten == 1
    for part in sorted((tmp_path / "parquet").glob("*.parquet")):
        assert part.name in before
        with pq.ParquetFile(part) as file:
            assert all(file.metadata.row_group(group).num_rows <= 4 for group in range(file.num_row_groups))


def test_unfilled_rows_carry_their_payload_whatever_it_is(tmp_path: Path) -> None:
    store = TeacherStore(tmp_path, "0")
    hinted = {"hint_arm": HintArm.ASSERTION}
    store.commit([row("s1", payload=noisy(0), **hinted), row("s2", text="oil", **hinted)]).result()
    assert [waiting.payload for waiting in store.unfilled("rule", 9).result()] == [noisy(0), "oil"]
    store.close()


def test_a_model_that_cannot_read_what_the_tasks_devices_send_is_refused_at_the_start(tmp_path: Path) -> None:
    def settings(task: Path, large: Path) -> CloudConfig:
        return CloudConfig(task=str(task), large=str(large), store=str(tmp_path / "store"))

    pictures = picture_kit.write_image_task(tmp_path / "pictures")
    texts = cloud_kit.write_task(tmp_path / "texts")
    assert check(settings(pictures, write_image_large(tmp_path / "a"))).modality == "image"
    with pytest.raises(ConfigError, match="reads image, task toy is of modality text"):
        check(settings(texts, write_image_large(tmp_path / "b")))
    with pytest.raises(ConfigError, match="reads text, task toy is of modality image"):
        check(settings(pictures, cloud_kit.write_large(tmp_path / "c", "causal", "x")))
    small = {"kind": "image", "size": picture_kit.SIZE, "max_pixels": 1000}
    with pytest.raises(ConfigError, match="takes images of max_pixels 1000, task toy of 16777216"):
        check(settings(pictures, write_image_large(tmp_path / "d", preprocess=small)))


class _Blind(ImageModel):
    """Fails on black images, and only when it runs."""

    def scores(self, ready: Any, hints: Any) -> Float32:
        if any(not pixels.any() for pixels in ready):
            raise RuntimeError("black")
        return super().scores(ready, hints)


def test_a_model_that_fails_on_an_image_fails_that_batch_and_serves_on(tmp_path: Path) -> None:
    from cloud_server.models import read_large

    folder = write_image_large(tmp_path / "large")

    async def run() -> None:
        async with serving(tmp_path, _Blind(folder, read_large(folder)), image_task()) as (stub, _, _):
            await refused(stub.Predict(request(sample("s1", flat((0, 0, 0)))), timeout=5), grpc.StatusCode.INTERNAL, "the model failed")
            assert (await stub.Predict(request(sample("s2", flat(GREY))), timeout=5)).predictions[0].stored

    asyncio.run(run())


def test_hints_that_are_gated_reach_the_fusion_as_they_are(tmp_path: Path) -> None:
    """An assertion is a prior of one label; nothing at all where the hint names none."""
    one = Hint(label_ids=(3,), probabilities=(0.7,), confidence=0.5)

    async def act(stub: Any, model: ImageModel) -> None:
        sent = request(
            sample("s1", flat(GREY), hint=one), sample("s2", flat(GREY), hint=Hint(label_ids=(), probabilities=(), confidence=0.5))
        )
        first, second = (await stub.Predict(sent, timeout=5)).predictions
        assert (first.hint_arm, second.hint_arm) == (HintArm.ASSERTION, HintArm.NONE)
        difference = scores(first) - scores(second)
        np.testing.assert_allclose(difference, 0.7 * np.log([0.1, 0.1, 0.1, 0.7]), atol=1e-5)

    play(tmp_path, act)
