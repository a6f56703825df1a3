"""Images from an application to a real edge daemon, and on to a real `kcm cloud` with an ONNX model: answers, hints, store, spool."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import cloud_kit
import grpc
import image_kit
import numpy as np
import picture_kit
import pytest
from cloud_kit import LABELS
from edge_kit import Process, depth, running_edge, stub, until
from picture_kit import COLOURS, GREY, flat, make_image_bundle, write_image_large, write_image_task

from cloud_server.compact import compact
from cloud_server.models import load_large
from kcm.calibration import HintGate
from kcm.sample import Hint, HintArm, Purpose
from protos.kcm.v1 import edge_pb2, sample_pb2
from training.teacher_rows import read_lessons

LOCAL, CLOUD, DEGRADED = edge_pb2.InferAnswer.SOURCE_LOCAL, edge_pb2.InferAnswer.SOURCE_CLOUD, edge_pb2.InferAnswer.SOURCE_DEGRADED
HARD = image_kit.png(np.full((24, 40, 3), GREY, np.uint8))  # of another size: each side crops it for itself


class Pair:
    """A cloud that comes back at the same address, and its folders."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, folder / "store"
        self.task, self.large = write_image_task(folder / "task"), write_image_large(folder / "large")
        self.address = f"unix:{folder}/cloud.sock"

    def cloud(self) -> Any:
        return cloud_kit.cloud_process(self.task, self.large, self.store, "--listen", self.address)

    def rows(self) -> dict[str, tuple[Any, ...]]:
        """sample_id → (purpose, image, hint arm, p_hint, has small logits, teacher logits filled)."""
        with apsw.Connection(str(self.store / "inbox-0.db")) as db:
            found = db.execute(
                "SELECT sample_id, purpose, image, hint_arm, p_hint, small_logits IS NOT NULL, teacher_logits IS NOT NULL FROM rows"
            )
            return {str(row[0]): row[1:] for row in found.fetchall()}


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


@pytest.fixture
def edge(pair: Pair, tmp_path: Path) -> Iterator[Process]:
    bundle = make_image_bundle(tmp_path / "bundle")
    env = {"KCM_EDGE__EXPLORE": "0", "KCM_EDGE__SPOOL__DRAIN_MAX_MS": "300", "KCM_EDGE__CLOUD__BREAKER_MAX_MS": "500"}
    with running_edge(bundle, tmp_path, "--cloud", pair.address, "--metrics", "127.0.0.1:0", "--json", **env) as process:
        yield process


def ask(edge: Process, **images: bytes) -> dict[str, edge_pb2.InferAnswer]:
    made, channel = stub(edge.address)
    with channel:
        samples = [edge_pb2.InferSample(sample_id=name, payload=sample_pb2.Payload(image=image)) for name, image in images.items()]
        return {answer.sample_id: answer for answer in made.Infer(edge_pb2.InferRequest(samples=samples), timeout=10).answers}


def test_a_hard_image_is_answered_by_the_cloud_under_its_hint_and_stored(edge: Process, pair: Pair) -> None:
    with pair.cloud():
        easy = {f"easy{label}": flat(colour) for label, colour in enumerate(COLOURS)}
        answers = ask(edge, hard=HARD, **easy)
        assert {name: (answers[name].source, answers[name].label) for name in easy} == {
            f"easy{label}": (LOCAL, LABELS[label]) for label in range(4)
        }
        hard = answers["hard"]
        assert (hard.source, hard.model_id) == (CLOUD, "resnet-f00d")
        until(lambda: pair.rows()["hard"][-1] == 1, what="the teacher's own logits are filled")
    assert pair.rows() == {"hard": (Purpose.LIVE, HARD, HintArm.CANDIDATES, 1.0, 1, 1)}
    assert compact(pair.store).written == 1
    # What is kept is what this model says, with the hint that the device had and without one.
    model = load_large(pair.large)
    import pyarrow.parquet as pq

    (row,) = pq.read_table(next((pair.store / "parquet").glob("*.parquet"))).to_pylist()
    small = np.array(row["small_logits"], np.float32)
    p = np.exp(small - small.max()) / np.exp(small - small.max()).sum()
    best = np.argsort(-p)[: picture_kit.CANDIDATES]
    hint = Hint(label_ids=tuple(best.tolist()), probabilities=tuple(p[best].tolist()), confidence=row["confidence"])
    np.testing.assert_allclose(row["answer_logits"], model.logits([HARD], [hint])[0], atol=5e-3)
    np.testing.assert_allclose(row["teacher_logits"], model.logits([HARD], [None])[0], atol=5e-3)
    assert np.abs(np.subtract(row["answer_logits"], row["teacher_logits"])).max() > 0.1, "the hint changed nothing"
    assert read_lessons(pair.store, picture_kit.image_task()).payloads == [HARD]


@pytest.mark.parametrize(("gate", "arm"), [("none", HintArm.NONE), ("assertion", HintArm.ASSERTION)])
def test_the_bundles_gate_decides_what_of_the_hint_goes_up(pair: Pair, tmp_path: Path, gate: Any, arm: HintArm) -> None:
    bundle = make_image_bundle(tmp_path / "bundle", gate=HintGate(arm=gate, no_hint=0.0))
    with pair.cloud(), running_edge(bundle, tmp_path, "--cloud", pair.address, "--json", KCM_EDGE__EXPLORE="0") as edge:
        assert ask(edge, hard=HARD)["hard"].source == CLOUD
        assert pair.rows()["hard"][:3] == (Purpose.LIVE, HARD, arm)


def test_images_wait_in_the_spool_while_the_cloud_is_dead_and_reach_it_once(edge: Process, pair: Pair) -> None:
    hard = {f"h{i}": image_kit.png(np.full((20, 20 + i, 3), GREY, np.uint8)) for i in range(8)}
    with pair.cloud() as cloud:
        assert ask(edge, h0=hard["h0"])["h0"].source == CLOUD
        cloud.kill()
    for name, image in list(hard.items())[1:]:
        assert ask(edge, **{name: image})[name].source == DEGRADED
    assert depth(edge.address) == 7
    with pair.cloud():
        until(lambda: depth(edge.address) == 0, 15, "the spool drains")
        assert ask(edge, again=HARD)["again"].source == CLOUD
    rows = pair.rows()
    assert {name: rows[name][1] for name in hard} == hard
    assert {rows[name][0] for name in list(hard)[1:]} == {Purpose.BACKFILL}
    compact(pair.store, force=True)
    keys = cloud_kit.stored_keys(pair.store)
    assert len(keys) == len(set(keys)) == 9


def test_a_photo_of_the_size_that_the_task_allows_goes_all_the_way(edge: Process, pair: Pair) -> None:
    """A task's own limit holds on both sides, not the smaller one that texts have."""
    photo = HARD + bytes(3 * 2**20)
    with pair.cloud():
        assert ask(edge, photo=photo)["photo"].source == CLOUD
        assert pair.rows()["photo"][1] == photo


def test_what_is_no_image_is_refused_by_the_edge_and_never_reaches_the_cloud(edge: Process, pair: Pair) -> None:
    with pair.cloud():
        for image, message in ((b"GIF89a" + bytes(60), "GIF"), (HARD[:60], "the image is"), (HARD + bytes(2**22), "at most 4194304")):
            with pytest.raises(grpc.RpcError) as caught:
                ask(edge, good=flat(COLOURS[0]), bad=image)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and message in caught.value.details()
        assert ask(edge, hard=HARD)["hard"].source == CLOUD
        assert set(pair.rows()) == {"hard"}
