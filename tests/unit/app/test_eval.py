"""`kcm eval` on real parts in small: a trained run, a large encoder with a fitted head, and the page that comes of them."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import re
import shutil
import subprocess
import sys
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from tiny_kit import LABELS, sentences, write_csv, write_tiny_task

from kcm.app.cli import main
from kcm.calibration import Guarantee, HintGate
from training.calibrate import for_rate
from training.run import Run, load_run, save_calibrated

Kcm = Callable[..., tuple[int, str, str]]
SYSTEMS = ["kcm", "mlp", "tempered", "max-softmax", "entropy", "margin", "length", "random", "oracle"]


def call(*arguments: str) -> tuple[int, str, str]:
    """Run the program in this process: (exit code, stdout, stderr)."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["kcm", *arguments])
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def kcm() -> Kcm:
    return call


def word_encoder(folder: Path, texts: list[str]) -> Path:
    """A wide BERT of one layer with random weights that knows the texts' words: enough for a head that beats the small model."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir()
    words = sorted({word for text in texts for word in re.findall(r"[a-z]+", text.lower())})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(str(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model = BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.embeddings.position_embeddings.weight.zero_()
    model.save_pretrained(str(folder), safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def large_dir(tiny_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head fitted on the tiny task's large_train, by `kcm train-large`."""
    folder = tmp_path_factory.mktemp("large")
    task = shutil.copytree(tiny_task, folder / "task")
    encoder = word_encoder(folder / "encoder", (task / "large_train.csv").read_text(encoding="utf-8").splitlines())
    text = (task / "task.toml").read_text(encoding="utf-8")
    assert text.count('model = "minilm"') == 1
    (task / "task.toml").write_text(text.replace('model = "minilm"', f"model = {json.dumps(str(encoder))}"), encoding="utf-8")
    assert call("train-large", "--task", str(task), "--out", str(folder / "model"))[0] == 0
    return folder / "model"


@pytest.fixture(scope="session")
def evaluated(tiny_run_dir: Path, large_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The evaluation of the tiny run, by the program itself: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("eval") / "out"
    code, printed, _ = call("eval", str(tiny_run_dir), "--large", str(large_dir), "--out", str(out), "--json")
    assert code == 0
    return out, json.loads(printed)


def changed_run(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a run with other entries in run.json."""
    shutil.copytree(source, folder)
    info = json.loads((folder / "run.json").read_text())
    for key, value in changes.items():
        if isinstance(value, dict):
            info[key] = {**info[key], **value}
        else:
            info[key] = value
    (folder / "run.json").write_text(json.dumps(info))
    return folder


def test_every_system_and_figure_is_there(evaluated: tuple[Path, dict[str, Any]], tiny_run: Run) -> None:
    folder, printed = evaluated
    stored = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    assert stored == printed and stored["schema"] == 1
    assert list(stored["systems"]) == SYSTEMS
    for name, system in stored["systems"].items():
        assert len(system["targets"]) == 9 and len(system["curve"]["accuracy"]) == 101, name
        for key in ("apgr", "apgr_exact", "cpt50", "cpt80", "cpt95", "aurc"):
            assert system[key]["mean"] is not None, (name, key)
        claims = name in ("kcm", "mlp", "tempered", "max-softmax")
        assert (system["ece"]["mean"] is not None) == claims == (system["reliability"] is not None) == (system["brier"]["mean"] is not None)
    assert set(stored["paired"]) == set(SYSTEMS) - {"kcm"}
    assert stored["runs"][0]["epsilon"] == tiny_run.threshold.epsilon
    assert stored["runs"][0]["calibrated_on"] == "fresh samples of the stream" and stored["runs"][0]["calibration_samples"] == 400
    assert stored["samples"] == {"test": 200, "labelled_calibration": stored["samples"]["labelled_calibration"]}
    assert 60 <= stored["samples"]["labelled_calibration"] <= 100, "two thirds of 120, less texts that come twice"


def test_the_figures_are_those_of_the_run_and_the_large_model(
    evaluated: tuple[Path, dict[str, Any]], tiny_run: Run, large_dir: Path
) -> None:
    """The same, worked out here from the models alone."""
    from cloud_server.models import load_large
    from training.data import load_split
    from training.small import Ngrams

    _, result = evaluated
    kind, test = Ngrams(tiny_run.task, None), load_split(tiny_run.task, "test")
    predictions = kind.predict(tiny_run.small, kind.featurise(test.payloads))
    small = predictions.logits.argmax(1) == test.y
    large = load_large(large_dir).logits(test.payloads, [None] * 200).argmax(1) == test.y
    assert 0.3 < small.mean() < large.mean() - 0.02, "the setting: a large model that is better"
    up = tiny_run.score(predictions) <= tiny_run.threshold.epsilon
    point = result["operating_point"]
    assert result["references"]["always-small"]["accuracy"]["mean"] == pytest.approx(small.mean())
    assert result["references"]["always-large"]["accuracy"]["mean"] == pytest.approx(large.mean())
    assert point["calls"]["mean"] == pytest.approx(up.mean()) and 0.1 < up.mean() < 0.5
    assert point["accuracy"]["mean"] == pytest.approx(np.where(up, large, small).mean())
    assert point["cost_per_1000"] == pytest.approx(1000 * up.mean())
    assert result["bytes_up"]["samples"] == up.sum()
    assert result["bytes_up"]["per_1000_requests"] == pytest.approx(5 * up.sum() * result["bytes_up"]["mean_per_sample"])
    longest = max(len(text.encode()) for text in test.payloads)
    # Logits of six labels, ids of sample and bundle, label space, hint: about 150 bytes besides the text.
    assert 100 < result["bytes_up"]["p50_per_sample"] < longest + 300
    # n-grams of templated sentences: what the judge knows, chance doesn't.
    assert result["systems"]["kcm"]["auroc"]["mean"] > 0.65 and result["systems"]["kcm"]["apgr_exact"]["mean"] > 0.55


def test_the_message_is_the_one_that_the_edge_sends(tiny_run: Run, bundle_dir: Path) -> None:
    from edge_runtime import EdgeRuntime
    from edge_runtime.messages import to_predict
    from kcm.app.evaluation.measure import message_sizes
    from kcm.policy import gate_hint
    from kcm.sample import Purpose, Route, Sample
    from training.small import Ngrams

    texts = ["parcel and espresso again", "this is a problem", "café, 東京 and currency " * 20]
    kind = Ngrams(tiny_run.task, None)
    predictions = kind.predict(tiny_run.small, kind.featurise(texts))
    shown = HintGate(arm="candidates")
    tiny_run = replace(tiny_run, threshold=msgspec.structs.replace(tiny_run.threshold, hint=shown))
    runtime = EdgeRuntime.load(bundle_dir)
    samples = [Sample(payload=text, sample_id=str(uuid.UUID(int=row)), route=Route.CLOUD) for row, text in enumerate(texts)]
    sent = [
        to_predict(
            decision,
            runtime,
            purpose=Purpose.LIVE,
            p_escalate=1.0,
            hint=gate_hint(decision.hint, shown, decision.answer.sample_id),
        )
        for decision in runtime.decide(samples)
    ]
    assert all(message.HasField("hint") for message in sent), "the setting: hints are shown"
    assert message_sizes(tiny_run, predictions, texts, np.array([True, False, True])) == [sent[0].ByteSize(), sent[2].ByteSize()]


def test_latency_is_measured_and_says_on_what(evaluated: tuple[Path, dict[str, Any]]) -> None:
    latency = evaluated[1]["latency"]
    assert latency["local"]["samples"] == 200 and latency["cloud"]["samples"] == 100
    assert "ONNX graph" in latency["local"]["measured_on"] and "no network" in latency["cloud"]["measured_on"]
    for path in ("local", "cloud"):
        assert 0 < latency[path]["p50_ms"] <= latency[path]["p99_ms"] <= max(latency[path]["milliseconds"]) + 1e-3
    assert latency["degraded"] is None and "not measured" in latency["degraded_note"]
    assert "cores" in latency["machine"] and "/" not in latency["machine"].split(",")[1]


def about_teachers(run_dir: Path, large: Path, folder: Path, learnt_from: str = "", **threshold: Any) -> tuple[list[str], dict[str, Any]]:
    """What an evaluation warns of the large model, in JSON and on its page alike; and what it says of the run."""
    changed = changed_run(run_dir, folder, teacher_id=learnt_from)
    run = load_run(changed)
    save_calibrated(changed, replace(run, threshold=msgspec.structs.replace(run.threshold, **threshold)))
    code, out, _ = call("eval", str(changed), "--large", str(large), "--out", str(folder / "eval"), "--json")
    assert code == 0
    result = json.loads(out)
    page = html.unescape((folder / "eval" / "report.html").read_text(encoding="utf-8"))
    found = [warning for warning in result["warnings"] if "large model here" in warning or "reads prompt" in warning]
    assert all(warning in page for warning in found)
    return found, result["runs"][0]


def test_another_large_model_than_the_calibrations_is_said(
    evaluated: tuple[Path, dict[str, Any]], tiny_run_dir: Path, large_dir: Path, tmp_path: Path
) -> None:
    here = evaluated[1]["large"]["teacher_id"]
    promise = Guarantee(max_drop=0.01, confidence=0.95, upper=0.009, effective_n=500.0, method="m")
    (first, second), about = about_teachers(
        tiny_run_dir, large_dir, tmp_path / "run", "old-teacher", teacher_id="encoder-other", guarantee=promise
    )
    assert f"here is {here}, ε was calibrated with encoder-other; the promise on accuracy doesn't hold" in first
    assert "kcm calibrate RUN --large FOLDER" in first and f"here is {here}, the small model learnt from old-teacher" in second
    assert (about["calibrated_with"], about["learnt_from"]) == ("encoder-other", "old-teacher")
    assert not any("large model here" in warning for warning in evaluated[1]["warnings"]), "calibrated without one"


@pytest.mark.slow
def test_another_prompt_is_said_and_the_same_large_model_is_not(
    evaluated: tuple[Path, dict[str, Any]], tiny_run_dir: Path, large_dir: Path, tmp_path: Path
) -> None:
    here, prompt = evaluated[1]["large"]["teacher_id"], evaluated[1]["large"]["prompt_id"]
    (said,), _ = about_teachers(tiny_run_dir, large_dir, tmp_path / "a", teacher_id=here, prompt_id="another")
    assert f"reads prompt {prompt} here, ε was calibrated with another" in said
    assert about_teachers(tiny_run_dir, large_dir, tmp_path / "b", here, teacher_id=here, prompt_id=prompt)[0] == []


class Page(HTMLParser):
    """Every attribute that could make a browser fetch something, and the text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.fetches: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        self.fetches += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "action", "data", "poster", "xlink:href")]
        self.fetches += [value for key, value in attrs if key == "style" and value and "url(" in value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_one_well_formed_file_that_fetches_nothing(evaluated: tuple[Path, dict[str, Any]]) -> None:
    folder, result = evaluated
    source = (folder / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(source)
    page.close()
    assert not page.open and not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in source and "url(" not in source and "http" not in source.replace(result["command"], "")
    assert len(page.fetches) == 5 and all(f.startswith("data:image/svg+xml;base64,") for f in page.fetches)
    for image in page.fetches:
        root = ET.fromstring(base64.b64decode(image.partition(",")[2]))
        assert root.tag.endswith("svg") and len(list(root.iter())) > 50
        links = [value for node in root.iter() for key, value in node.attrib.items() if key.endswith("href")]
        assert links and all(link.startswith("#") for link in links)
    for said in ("tiny: how it routes", "1 run(s)", "max-softmax, tempered", "oracle", "kcm eval", "400 fresh samples of the stream"):
        assert said in page.text, said
    assert "nan" not in page.text.lower().split() and "None" not in page.text and "{{" not in source


def test_plots_are_there_and_not_empty(evaluated: tuple[Path, dict[str, Any]]) -> None:
    from matplotlib.image import imread

    plots = sorted((evaluated[0] / "plots").glob("*.png"))
    assert [path.stem for path in plots] == ["accuracy-against-calls", "latency", "reliability", "risk-coverage", "targets"]
    for path in plots:
        pixels = imread(path)[..., :3]
        assert min(pixels.shape[:2]) > 300 and 0.02 < (pixels.min(2) < 0.8).mean() < 0.5, path


def test_a_class_name_cannot_break_out_of_the_page(evaluated: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    from kcm.app.evaluation.report import write

    result = json.loads(json.dumps(evaluated[1]))
    result["classes"] = [{**result["classes"][0], "label": "<script>alert(1)</script>", "small_says": '"><img src=x>'}]
    result["command"] = "kcm eval '</code><script>'"
    write(tmp_path, result)
    page = Page()
    page.feed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and "x" not in page.fetches and "<script>alert(1)</script>" in page.text


def test_the_terminal_gets_a_table_and_the_warnings(evaluated: tuple[Path, dict[str, Any]]) -> None:
    from kcm.app.evaluation.report import table

    text = table(evaluated[1])
    for said in ("task tiny: 1 run(s), 200 test samples", "MLP judge, equal size", "bytes a sample", "warning: 1 run(s): the protocol is"):
        assert said in text, said
    assert any("only 400 calibration samples" in warning and "5 points off" in warning for warning in evaluated[1]["warnings"])
    assert any("only 200 test samples" in warning for warning in evaluated[1]["warnings"])


@pytest.mark.slow
def test_several_runs_are_seeds(kcm: Kcm, tiny_run_dir: Path, tiny_task: Path, large_dir: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    assert kcm("train", "--task", str(tiny_task), "--out", str(second), "--seed", "1")[0] == 0
    code, out, _ = kcm("eval", str(tiny_run_dir), str(second), "--large", str(large_dir), "--out", str(tmp_path / "out"))
    assert code == 0 and "2 run(s)" in out and f"{tmp_path / 'out' / 'report.html'} written" in out
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert [run["seed"] for run in result["runs"]] == [0, 1]
    assert result["systems"]["kcm"]["apgr"]["values"] == 2 and result["systems"]["kcm"]["apgr"]["sd"] is not None
    assert result["systems"]["random"]["apgr"]["values"] == 40
    assert any("mean ± sd over 2 runs" in w for w in result["warnings"]) and any("judge's alone" in w for w in result["warnings"])
    assert any("set by hand, not calibrated" in w for w in result["warnings"]), "the second run was not calibrated"


def test_runs_that_are_no_seeds_of_one_program_are_3(kcm: Kcm, tiny_run_dir: Path, large_dir: Path, tmp_path: Path) -> None:
    run, large = str(tiny_run_dir), ("--large", str(large_dir), "--out", str(tmp_path / "out"))
    info = json.loads((tiny_run_dir / "run.json").read_text())
    others = {
        "of task other": changed_run(tiny_run_dir, tmp_path / "a", task={"id": "other"}),
        "is round 1": changed_run(tiny_run_dir, tmp_path / "b", round=1),
        "differ in data": changed_run(tiny_run_dir, tmp_path / "c", task={"data": {**info["task"]["data"], "test": "train.csv"}}),
    }
    for said, other in others.items():
        code, _, err = kcm("eval", run, str(other), *large)
        assert code == 3 and said in err and "fix: " in err, said
    code, _, err = kcm("eval", run, str(others["is round 1"]), *large)
    assert f"kcm eval {run} --large FOLDER\n       kcm eval {others['is round 1']} --large FOLDER\n" in err, "the command for each round"
    code, _, err = kcm("eval", run, run, *large)
    assert code == 3 and "given twice" in err
    code, _, err = kcm("eval", str(tmp_path), *large)
    assert code == 3 and "no finished run" in err
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_said_before_the_work(kcm: Kcm, tiny_run_dir: Path, large_dir: Path, tmp_path: Path) -> None:
    data = json.loads((tiny_run_dir / "run.json").read_text())["task"]["data"]
    out = ("--out", str(tmp_path / "out"))
    cases = [
        ({"test": ""}, 4, "names no test file"),
        ({"test": "stream.csv"}, 4, "no column 'label'"),
        ({"test": str(write_csv(tmp_path / "empty.csv", []))}, 4, "has no rows"),
        ({"test": "none.csv"}, 4, "does not exist"),
    ]
    for place, (change, number, said) in enumerate(cases):
        run = changed_run(tiny_run_dir, tmp_path / f"run{place}", task={"data": {**data, **change}})
        code, _, err = kcm("eval", str(run), "--large", str(large_dir), *out)
        assert code == number and said in err, (code, err)
    code, _, err = kcm("eval", str(tiny_run_dir), "--large", str(tmp_path), *out)
    assert code == 3 and "is no large model" in err and "kcm train-large" in err
    foreign = shutil.copytree(large_dir, tmp_path / "foreign")
    description = json.loads((foreign / "large.json").read_text())
    (foreign / "large.json").write_text(json.dumps({**description, "labels": description["labels"][::-1]}))
    code, _, err = kcm("eval", str(tiny_run_dir), "--large", str(foreign), *out)
    assert code == 3 and "labels that are not task tiny's" in err and "fix: " in err
    assert kcm("eval", str(tiny_run_dir), *out)[0] == 2, "--large is required"


def test_nothing_of_the_users_is_replaced_unasked(kcm: Kcm, tiny_run_dir: Path, large_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.json").write_text("mine")
    for force in ([], ["--force"]):
        code, _, err = kcm("eval", str(tiny_run_dir), "--large", str(large_dir), "--out", str(other), *force)
        assert code == 3 and "no eval.json" in err
    assert (other / "metrics.json").read_text() == "mine"
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "eval.json").write_text("{}")
    code, _, err = kcm("eval", str(tiny_run_dir), "--large", str(large_dir), "--out", str(earlier))
    assert code == 3 and "--force replaces it" in err and (earlier / "eval.json").read_text() == "{}"


@pytest.mark.slow
def test_an_earlier_evaluation_is_replaced_when_asked_and_without_out_it_has_a_number(
    kcm: Kcm, tiny_run_dir: Path, large_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "eval.json").write_text("{}")
    (earlier / "stale.txt").write_text("")
    assert kcm("eval", str(tiny_run_dir), "--large", str(large_dir), "--out", str(earlier), "--force")[0] == 0
    assert not (earlier / "stale.txt").exists() and json.loads((earlier / "eval.json").read_text())["schema"] == 1
    monkeypatch.chdir(tmp_path)
    assert kcm("eval", str(tiny_run_dir), "--large", str(large_dir))[0] == 0
    assert (tmp_path / "runs" / "eval" / "1" / "report.html").is_file()
    assert not [path for path in tmp_path.rglob(".*") if "building" in path.name]


@pytest.mark.slow
def test_a_small_model_that_is_always_right_leaves_gaps_that_are_said(
    kcm: Kcm, tiny_run_dir: Path, large_dir: Path, tmp_path: Path
) -> None:
    """A test split of what the small model answers rightly, two texts of it learnt; no stream: out-of-fold predictions calibrate."""
    from training.small import Ngrams

    run = load_run(tiny_run_dir)
    kind = Ngrams(run.task, None)
    rows = sentences(400, seed=77)
    answers = kind.predict(run.small, kind.featurise([text for text, _ in rows])).logits.argmax(1)
    right = [row for row, answer in zip(rows, answers, strict=True) if LABELS[answer] == row[1]]
    learnt = [(run.payloads[i], LABELS[run.targets[i].argmax()]) for i in range(30)]
    learnt = [row for row in learnt if LABELS[kind.predict(run.small, kind.featurise([row[0]])).logits.argmax()] == row[1]]
    task = write_tiny_task(tmp_path / "task")
    write_csv(task / "test.csv", right[:150] + learnt[:2])
    data = json.loads((tiny_run_dir / "run.json").read_text())["task"]["data"]
    changed = changed_run(tiny_run_dir, tmp_path / "run", task={"root": str(task), "data": {**data, "stream": "", "calibration": ""}})
    code, out, _ = kcm("eval", str(changed), "--large", str(large_dir), "--out", str(tmp_path / "out"), "--json")
    assert code == 0
    result = json.loads(out)
    ours = result["systems"]["kcm"]
    assert ours["auroc"]["mean"] is None and ours["apgr"]["mean"] is None and ours["cpt50"]["mean"] is None
    assert result["samples"]["labelled_calibration"] == 0 and ours["targets"][0]["expected_accuracy"] is None
    said = "\n".join(result["warnings"])
    for part in ("AUROC is undefined", "APGR and CPT are undefined", "out-of-fold predictions of training texts", "2 test texts are also"):
        assert part in said, part
    assert "–" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_another_head_routes_and_c_x_stands_beside_it(kcm: Kcm, tiny_run_dir: Path, large_dir: Path, tmp_path: Path) -> None:
    import dataclasses

    import msgspec

    from kcm.calibration import HeadChoice

    folder = shutil.copytree(tiny_run_dir, tmp_path / "run")
    run = load_run(folder)
    run = dataclasses.replace(run, threshold=msgspec.structs.replace(run.threshold, head=HeadChoice(head="max-softmax")))
    scores = run.score(run.out_of_fold)
    threshold = msgspec.structs.replace(for_rate(scores, 0.0), head=run.threshold.head)  # nothing goes up
    save_calibrated(folder, dataclasses.replace(run, threshold=threshold))
    code, out, _ = kcm("eval", str(folder), "--large", str(large_dir), "--out", str(tmp_path / "out"), "--json")
    assert code == 0
    result = json.loads(out)
    assert result["head"] == "max-softmax" and list(result["systems"])[:2] == ["kcm", "confidence"]
    kept, tempered = result["systems"]["kcm"]["curve"]["accuracy"], result["systems"]["tempered"]["curve"]["accuracy"]
    assert kept == pytest.approx(tempered, abs=0.02), "max-softmax routes: it is its own baseline but for rounding"
    assert result["bytes_up"] == {"samples": 0, "p50_per_sample": None, "mean_per_sample": None, "per_1000_requests": 0.0}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "No test sample goes up" in page and "KCM (max-softmax)" in page


@pytest.mark.slow
def test_a_wheel_carries_the_template(tmp_path: Path) -> None:
    import zipfile

    pytest.importorskip("hatchling", reason="hatchling is not installed: pip install hatchling")
    program = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=root, capture_output=True, text=True, check=True)
    names = zipfile.ZipFile(tmp_path / done.stdout.split()[-1]).namelist()
    assert "kcm/app/evaluation/report.html.j2" in names
