"""What examples/ and docs/deploy.md show is run: the client, both configurations, and the certificates that openssl makes."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import edge_kit
import image_kit
import msgspec
import numpy as np
import picture_kit
import pytest
from edge_kit import EASY, HARD, request, running_edge, stub, until

import edge_runtime.config
from cloud_server.config import CloudConfig
from cloud_server.metrics import CloudMetrics
from edge_runtime.metrics import NAMES
from kcm.config import load, parse_toml
from kcm.errors import ConfigError
from kcm.rpc import TlsConfig

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DEPLOY = ROOT / "docs" / "deploy.md"


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edge_kit.make_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


def client(*arguments: str, lines: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "client.py"), *arguments]
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60)


def test_the_client_asks_a_real_edge(tiny_bundle: Path, tmp_path: Path) -> None:
    with running_edge(tiny_bundle, tmp_path) as edge:
        asked = client(EASY[1], HARD[0], "--address", edge.address)
        piped = client("--address", edge.address, lines="\n".join([*EASY, *HARD] * 20))
        name = asked.stdout.split("\t")[3]
        told = client("--truth", f"{name}=beta", "--truth", "unknown=alpha", "--address", edge.address)
        wrong = client("--truth", f"{name}=omega", "--address", edge.address)
    assert told.stdout == "2 kept, 1 matched\n" and wrong.returncode == 1 and "'omega' is none of the task's 4 labels" in wrong.stderr
    first, second = (line.split("\t") for line in asked.stdout.splitlines())
    assert first[:2] == ["beta", "LOCAL"] and float(first[2]) > edge_kit.EPSILON and first[4] == EASY[1]
    assert second[1] == "DEGRADED" and float(second[2]) <= edge_kit.EPSILON and second[5] == "(no cloud configured)"
    lines = [line.split("\t") for line in piped.stdout.splitlines()]
    assert [line[4] for line in lines] == [*EASY, *HARD] * 20, "two calls' worth, in order"
    gone = client(EASY[0], "--address", edge.address)
    assert gone.returncode == 1 and gone.stderr.startswith("UNAVAILABLE: ") and "Traceback" not in gone.stderr


def test_the_client_asks_about_images(tmp_path: Path) -> None:
    bundle = picture_kit.make_image_bundle(tmp_path / "bundle")
    files = [tmp_path / "red.png", tmp_path / "grey.png", tmp_path / "photo.jpg"]
    photo = image_kit.jpeg(np.full((480, 640, 3), picture_kit.COLOURS[1], np.uint8)) + bytes(3 * 2**20)
    for file, data in zip(files, (picture_kit.flat(picture_kit.COLOURS[0]), picture_kit.flat(picture_kit.GREY), photo), strict=True):
        file.write_bytes(data)
    with running_edge(bundle, tmp_path) as edge:
        asked = client(*(part for file in [*files, *[files[2]] * 5] for part in ("--image", str(file))), "--address", edge.address)
        (tmp_path / "notes.txt").write_text("no image")
        wrong = client("--image", str(tmp_path / "notes.txt"), "--address", edge.address)
        missing = client("--image", str(tmp_path / "gone.png"), "--address", edge.address)
    lines = [line.split("\t") for line in asked.stdout.splitlines()]
    assert [line[:2] for line in lines] == [["acq", "LOCAL"], [lines[1][0], "DEGRADED"], *[["crude oil", "LOCAL"]] * 6], asked.stderr
    assert [line[4] for line in lines[:3]] == [str(file)[:60] for file in files]
    assert wrong.returncode == 1 and "JPEG and PNG are read" in wrong.stderr and "INVALID_ARGUMENT" in wrong.stderr
    assert missing.returncode == 1 and "gone.png: No such file" in missing.stderr and "Traceback" not in missing.stderr


def keys(kind: type[msgspec.Struct], path: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            found |= keys(field.type, f"{path}.{field.encode_name}")
        else:
            found[f"{path}.{field.encode_name}"] = field.default
    return found


@pytest.mark.parametrize(("name", "kind"), [("edge", edge_runtime.config.EdgeConfig), ("cloud", CloudConfig)])
def test_the_configurations_load_and_name_every_key(name: str, kind: type[msgspec.Struct]) -> None:
    path = EXAMPLES / f"{name}.toml"
    settings, origin = load(kind, name, file=path, environ={})
    unset = {key for key in keys(kind, name) if key.removeprefix(f"{name}.") not in origin}
    assert unset == ({"edge.bundle", "edge.tls.certificate", "edge.tls.key", "edge.tls.ca"} if name == "edge" else set())
    # The commented table is a table too.
    text = path.read_text()
    commented = re.sub(r"(?m)^# (?=\[edge\.tls\]|certificate|key|ca)", "", text)
    assert set(parse_toml(commented.encode(), name)[name].get("tls", {})) == {"certificate", "key", "ca"}
    assert max(map(len, text.splitlines())) <= 140
    # All is right but the files, which aren't on this machine.
    with pytest.raises(ConfigError, match=r"/etc/kcm/.*can't be read: No such file"):
        settings.tls.read() if isinstance(settings, CloudConfig) else edge_runtime.config.check(settings)  # type: ignore[arg-type]


def test_the_openssl_commands_of_the_deployment_page_make_what_mtls_needs(tmp_path: Path) -> None:
    text = DEPLOY.read_text()
    (block,) = re.findall(r"```sh openssl\n(.*?)```", text, re.DOTALL)
    subprocess.run(["bash", "-euc", block], cwd=tmp_path, check=True, capture_output=True)
    for name, san in (("edge", "DNS:edge-1.example.org"), ("cloud", "DNS:cloud.example.org")):
        TlsConfig(certificate=str(tmp_path / f"{name}.pem"), key=str(tmp_path / f"{name}.key"), ca=str(tmp_path / "ca.pem")).read()
        command = ["openssl", "x509", "-noout", "-ext", "subjectAltName", "-in", str(tmp_path / f"{name}.pem")]
        assert san in subprocess.run(command, check=True, capture_output=True, text=True).stdout
        subprocess.run(["openssl", "verify", "-CAfile", "ca.pem", f"{name}.pem"], cwd=tmp_path, check=True, capture_output=True)
        assert (tmp_path / f"{name}.key").stat().st_mode & 0o077 == 0, "a private key for its owner alone"


def test_the_dead_letters_of_the_deployment_page_are_found_and_sent_again(tiny_bundle: Path, tmp_path: Path) -> None:
    (query,) = re.findall(r'spool.db "(SELECT .*)"', DEPLOY.read_text())
    (update,) = re.findall(r"`(UPDATE spool .*)`, start", DEPLOY.read_text())
    cloud = edge_kit.Cloud(tmp_path / "c")
    cloud.set(mode="poison")
    with cloud.run():
        with running_edge(tiny_bundle, tmp_path, "--cloud", cloud.address) as edge:
            made, channel = stub(edge.address)
            with channel:
                made.Infer(request("poison", ids=("bad",)), timeout=10)
            with contextlib.closing(sqlite3.connect(tmp_path / "state" / "spool.db")) as spool:
                assert spool.execute(query).fetchall() == [("bad", "the cloud refused: sample can't be read")]
            assert edge.stop() == 0
        cloud.set()
        with contextlib.closing(sqlite3.connect(tmp_path / "state" / "spool.db")) as spool, spool:
            spool.execute(update)
        with running_edge(tiny_bundle, tmp_path, "--cloud", cloud.address):
            until(lambda: "bad" in cloud.rows(), 10, "sent again")


def test_the_deployment_page_names_every_metric() -> None:
    text = DEPLOY.read_text()
    cloud = {metric.name for metric in CloudMetrics().registry.collect()}
    named = {name.removesuffix("_total") for name in re.findall(r"kcm_(?:edge|cloud)_[a-z_]+[a-z]", text)}
    assert named == {*NAMES, *cloud}
    assert len(text.splitlines()) <= 120
