"""The spine with the real program in real processes: init → train → calibrate → export → verify → edge, and back by distillation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cloud_kit import CloudProcess, by_rule, real_model, wait_until, write_large
from edge_kit import request, running, stub
from tiny_kit import LABELS, SIZES, sentences, without_vectors, write_tiny_files, write_tiny_task

from cloud_server.compact import read_stats
from edge_runtime import EdgeRuntime
from kcm.sample import Sample, Source
from training.reserve import reserved

KCM = str(Path(sys.executable).with_name("kcm"))
TEXTS = [text for text, _ in sentences(40, seed=99)]


def kcm(*arguments: str | Path, cwd: Path, code: int = 0) -> str:
    """The installed program; its stdout."""
    done = subprocess.run([KCM, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == code, f"kcm {arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with task, run and bundle, made as the README says: data → init → train → calibrate → export."""
    folder = tmp_path_factory.mktemp("path")
    files = write_tiny_files(folder / "data")
    flags = [str(part) for split, path in files.items() for part in (f"--{split.replace('_', '-')}", path)]
    assert "next: kcm simulate" in kcm("init", "task", *flags, cwd=folder)
    without_vectors(folder / "task")
    kcm("train", "--task", "task", cwd=folder)
    kcm("calibrate", "runs/train/1", "--cloud-rate", "0.3", cwd=folder)
    kcm("export", "runs/train/1", "--out", "bundle", cwd=folder)
    return folder


def test_verify_agrees_on_the_test_split(made: Path) -> None:
    report = json.loads(kcm("verify", "bundle", "--run", "runs/train/1", "--json", cwd=made))
    assert report["samples"] == SIZES["test"]
    assert report["labels"] == 0 and report["decisions"] == report["excused"]
    shown = json.loads(kcm("bundle", "verify-files", "bundle", "--json", cwd=made))
    assert shown["bundle_id"] == (made / "runs" / "train" / "1" / "bundle_id").read_text()


def test_the_daemon_answers_as_the_runtime_in_process(made: Path, tmp_path: Path) -> None:
    here = EdgeRuntime.load(made / "bundle").infer([Sample(payload=text) for text in TEXTS])
    command = [KCM, "edge", "--bundle", str(made / "bundle"), "--listen", "127.0.0.1:0", "--state", str(tmp_path)]
    with running(command, tmp_path / "log") as edge:
        made_stub, channel = stub(edge.address)
        with channel:
            answers = made_stub.Infer(request(*TEXTS), timeout=30).answers
        assert [a.label for a in answers] == [a.label for a in here]
        assert [a.source for a in answers] == [a.source for a in here]
        assert [a.confidence for a in answers] == pytest.approx([a.confidence for a in here], abs=1e-4)
        assert edge.stop() == 0
    sources = {a.source for a in here}
    assert sources == {Source.LOCAL, Source.DEGRADED}, "an ε for 30 % calls must keep some samples and not others"
    truth = [label for _, label in sentences(40, seed=99)]
    assert sum(a.label == label for a, label in zip(here, truth, strict=True)) >= 22


def test_a_changed_bundle_stops_every_station(made: Path, tmp_path: Path) -> None:
    import shutil

    bad = shutil.copytree(made / "bundle", tmp_path / "bad")
    data = bytearray((bad / "models" / "fp32.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bad / "models" / "fp32.onnx").write_bytes(data)
    said = json.loads(kcm("verify", bad, "--run", "runs/train/1", "--json", cwd=made, code=5))
    assert said["error"] == "BundleError" and "hash" in said["message"]
    kcm("edge", "--bundle", bad, "--dry-run", cwd=made, code=5)
    kcm("bundle", "install", bad, "--store", tmp_path / "store", cwd=made, code=5)


def escalate(edge_address: str, texts: list[str]) -> list[int]:
    """Ask the daemon for all texts in two calls; who answered."""
    made_stub, channel = stub(edge_address)
    with channel:
        parts = [made_stub.Infer(request(*texts[start : start + 200]), timeout=60).answers for start in range(0, len(texts), 200)]
    return [answer.source for part in parts for answer in part]


def stream_texts(folder: Path) -> list[str]:
    return [text for text, _ in sentences(SIZES["stream"], seed=2)]


def distilled(made: Path, tmp_path: Path, code: str, large: Path) -> dict[str, Any]:
    """Stream through edge and cloud, compact, distil, export: the JSON of `kcm distill`, and how many samples went up."""
    cloud = CloudProcess(made / "task" / "task.toml", large, tmp_path / "store", code=code)
    try:
        command = [KCM, "edge", "--bundle", str(made / "bundle"), "--listen", "127.0.0.1:0", "--state", str(tmp_path / "state")]
        with running([*command, "--cloud", cloud.address, "--deadline-ms", "60000", "--explore", "0"], tmp_path / "edge.log") as edge:
            sources = escalate(edge.address, stream_texts(made))
            assert edge.stop() == 0
        # Where a hint was used the teacher's own logits come later, in the background.
        wait_until(lambda: not any(inbox.unfilled for inbox in read_stats(tmp_path / "store").inboxes), 60)
        assert cloud.terminate() == 0
    finally:
        cloud.end()
    assert Source.DEGRADED not in sources
    written = json.loads(kcm("store", "compact", "store", "--json", cwd=tmp_path))["written"]
    assert written == sources.count(Source.CLOUD)
    assert 0.15 * len(sources) < written < 0.45 * len(sources), "ε was calibrated for 30 % calls on this very stream"
    out = kcm("distill", made / "runs" / "train" / "1", "--store", "store", "--out", "run2", "--bundle", "bundle2", "--json", cwd=tmp_path)
    asked = [text for text, source in zip(stream_texts(made), sources, strict=True) if source == Source.CLOUD]
    return {"learnable": sum(not reserved(text) for text in asked), **json.loads(out)}


# A large model that knows the truth: the label is the one whose sentence it is.
KNOWS = """
import cloud_kit, cloud_server.server, numpy, tiny_kit
class Truth(cloud_kit.RuleModel):
    labels = tiny_kit.LABELS
    truth = {text: label for seed in (2,) for text, label in tiny_kit.sentences(tiny_kit.SIZES["stream"], seed)}
    def row(self, text, hint=None):
        return numpy.array([8.0 * (label == self.truth.get(text)) for label in self.labels], numpy.float32)
cloud_server.server.load_model = lambda config: Truth()
"""


def test_what_the_cloud_answers_makes_the_next_bundle_better(made: Path, tmp_path: Path) -> None:
    """A real edge, a real cloud process with its real store; the large model's answers are the truth."""
    result = distilled(
        made, tmp_path, by_rule() + KNOWS, write_large(tmp_path / "large", "encoder", "none", labels=list(LABELS), task_id="task")
    )
    before, after = result["before"]["test"], result["after"]["test"]
    assert after["accuracy"] > before["accuracy"] + 0.02
    assert 0 < result["after"]["teacher_rows"] == result["learnable"]
    manifest = json.loads((tmp_path / "bundle2" / "manifest.json").read_text())
    assert (manifest["round"], manifest["parent"]) == (1, (made / "runs" / "train" / "1" / "bundle_id").read_text())
    assert manifest["teacher_id"] == "rule"
    calibration = json.loads((tmp_path / "bundle2" / "calibration.json").read_text())["fp32"]
    assert (calibration["method"], calibration["target"]) == ("cloud-rate", 0.3)
    # As `kcm calibrate` does it after a round: on the tenth that is never distilled.
    assert calibration["samples"] == sum(map(reserved, stream_texts(made)))
    assert calibration["cloud_rate"] == pytest.approx(0.3, abs=0.03)
    kcm("verify", tmp_path / "bundle2", "--run", tmp_path / "run2", cwd=tmp_path)


@pytest.mark.slow
def test_a_round_with_the_real_encoder(made: Path, tmp_path: Path) -> None:
    """MiniLM with a head fitted by `kcm train-large` answers in a real `kcm cloud`."""
    real_model("minilm")
    said = json.loads(kcm("train-large", "--task", "task", "--out", tmp_path / "large", "--json", cwd=made))
    assert said["test_accuracy"] > 0.7
    result = distilled(made, tmp_path, "", tmp_path / "large")
    large_id = json.loads((tmp_path / "large" / "large.json").read_text())["large_id"]
    assert large_id in json.loads((tmp_path / "bundle2" / "manifest.json").read_text())["teacher_id"]
    assert result["after"]["test"]["accuracy"] >= result["before"]["test"]["accuracy"]


@pytest.mark.slow
def test_simulate_prints_what_was_promised(tmp_path: Path) -> None:
    real_model("minilm")
    write_tiny_task(tmp_path / "task")
    out = kcm("simulate", "--task", "task", "--seeds", "2", "--rounds", "2", "--json", "--out", "deep/result.json", cwd=tmp_path)
    whole = json.loads(out)
    assert json.loads((tmp_path / "deep" / "result.json").read_text()) == whole
    assert whole["schema"] == 1 and [seed["seed"] for seed in whole["seeds"]] == [0, 1]
    wanted = {"round", "small_accuracy", "large_accuracy", "kcm_accuracy", "cloud_rate", "escalated_of_stream", "curve"}
    for row in (row for seed in whole["seeds"] for row in seed["rounds"]):
        assert wanted <= set(row)
        assert {float(rate) for rate in row["curve"]} == {0, 0.1, 0.2, 0.3, 0.4, 0.5, 1}
        assert all({"accuracy", "realised_rate", "max_softmax_accuracy"} <= set(point) for point in row["curve"].values())
    assert wanted <= set(whole["mean"]) and whole["mean"]["round"] == 2
    text = kcm("simulate", "--task", "task", "--seeds", "1", "--rounds", "1", "--no-floor", cwd=tmp_path)
    assert "max-softmax" in text and f"{len(LABELS)} labels" not in text and " 30% " in text
