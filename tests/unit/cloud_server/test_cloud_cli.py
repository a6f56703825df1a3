from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import cloud_kit
import msgspec
import pytest
import tls_kit
import trustme

from cloud_server.config import CloudConfig
from cloud_server.requests import peer_identities
from kcm.errors import ConfigError
from kcm.logs import JsonLines

KCM = [sys.executable, "-c", "from kcm.app.cli import main; main()"]


def kcm(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*KCM, *arguments], capture_output=True, text=True, timeout=60, env={**os.environ, **environ})


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    large = cloud_kit.write_large(tmp_path / "large", "encoder", "weights")
    return ["--task", str(cloud_kit.write_task(tmp_path / "task")), "--large", str(large), "--store", str(tmp_path / "store")]


def test_help_imports_no_torch() -> None:
    code = "import sys, cloud_server.cli; sys.exit(bool({'torch', 'transformers', 'grpc', 'numpy', 'pyarrow', 'apsw'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    shown = kcm("cloud", "--help").stdout
    assert "ready on ADDRESS" in shown and "Try it:" in shown


def test_dry_run_says_where_each_setting_comes_from(tmp_path: Path, settings: list[str]) -> None:
    (tmp_path / "kcm.toml").write_text("[cloud]\nmax_batch = 8\nmax_queue = 300\n")
    done = kcm("cloud", *settings, "--config", str(tmp_path / "kcm.toml"), "--max-batch", "4", "--dry-run", KCM_CLOUD__REPLICA="blue")
    assert done.returncode == 0, done.stderr
    lines = {line.split(" = ")[0]: line for line in done.stdout.splitlines()}
    assert lines["max_batch"] == "max_batch = 4   # flag"
    assert lines["max_queue"].endswith("kcm.toml") and lines["replica"] == "replica = 'blue'   # $KCM_CLOUD__REPLICA"
    assert lines["listen"].endswith("# default")
    assert not (tmp_path / "store").exists()
    as_json = json.loads(kcm("cloud", *settings, "--dry-run", "--json").stdout)
    assert msgspec.convert(as_json["settings"], CloudConfig).max_batch == 32


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--listen", "0.0.0.0:0"], "without TLS"),
        (["--listen", "nonsense"], "is no address"),
        (["--large", "nowhere"], "large.json can't be read"),
        (["--task", "nowhere"], "does not exist"),
        (["--max-batch", "0"], "max_batch"),
    ],
)
def test_wrong_settings_end_with_exit_code_3_and_what_to_do(settings: list[str], flags: list[str], message: str) -> None:
    done = kcm("cloud", *settings, *flags, "--dry-run", "--json")
    assert done.returncode == 3, done.stderr
    assert message in json.loads(done.stdout)["message"] and "Traceback" not in done.stderr


@pytest.mark.parametrize("change", [{"task_id": "other"}, {"labels": ["a", "b"]}, {"labels": list(reversed(cloud_kit.LABELS))}])
def test_a_large_model_of_another_task_is_refused(tmp_path: Path, settings: list[str], change: dict[str, object]) -> None:
    cloud_kit.write_large(tmp_path / "large", "causal", "weights", **change)
    done = kcm("cloud", *settings, "--dry-run")
    assert done.returncode == 3 and "fix:" in done.stderr


@pytest.mark.parametrize("missing", ["task", "large", "store"])
def test_a_missing_path_names_its_flag(missing: str) -> None:
    config = msgspec.structs.replace(CloudConfig(task="t", large="l", store="s"), **{missing: ""})
    with pytest.raises(ConfigError, match=f"kcm cloud --{missing} PATH"):
        config.check()


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="above max_queue"):
        CloudConfig(task="t", large="l", store="s", max_samples=10, max_queue=9).check()


def test_store_verbs(tmp_path: Path) -> None:
    cloud_kit.put(tmp_path / "store", cloud_kit.row("s1"), cloud_kit.row("s2"))
    cloud_kit.tell(tmp_path / "store", {"s1": 1, "s9": 2})
    assert json.loads(kcm("store", "compact", str(tmp_path / "store"), "--dry-run", "--json").stdout)["written"] == 2
    shown = kcm("store", "compact", str(tmp_path / "store")).stdout
    assert "wrote 2 rows in 1 parts" in shown and "1 truths went into rows; 1 wait for theirs" in shown
    stats = json.loads(kcm("store", "stats", str(tmp_path / "store"), "--json").stdout)
    assert (stats["compacted"], stats["labelled"]) == (2, 1)
    assert stats["inboxes"] == [{"name": "inbox-0", "waiting": 0, "unfilled": 0, "compacted": 2, "labels": 1}]
    missing = kcm("store", "stats", str(tmp_path / "nowhere"), "--json")
    assert missing.returncode == 9 and "the folder does not exist" in json.loads(missing.stdout)["message"]
    (tmp_path / "empty").mkdir()
    for verb in ("stats", "compact"):
        empty = kcm("store", verb, str(tmp_path / "empty"), "--json")
        assert empty.returncode == 9 and "it holds no inbox and no Parquet part" in json.loads(empty.stdout)["message"]
    uncompacted = kcm("store", "hints", str(tmp_path / "empty"), "--json")
    assert uncompacted.returncode == 9 and json.loads(uncompacted.stdout)["fix"].startswith("kcm store compact")


def test_a_key_that_is_not_the_certificates_is_named_by_the_dry_run(tmp_path: Path, settings: list[str]) -> None:
    good, other = (tls_kit.issue(trustme.CA(), tmp_path / name, "localhost") for name in "ab")
    config = tmp_path / "kcm.toml"
    config.write_text(tls_kit.table("cloud.tls", msgspec.structs.replace(good, key=other.key)))
    done = kcm("cloud", *settings, "--config", str(config), "--dry-run", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["message"] == f"[cloud.tls] key {other.key} does not belong to certificate {good.certificate}"
    config.write_text(tls_kit.table("cloud.tls", good))
    assert kcm("cloud", *settings, "--config", str(config), "--dry-run").returncode == 0


def test_the_cloud_takes_what_an_edge_takes_by_default() -> None:
    from edge_runtime.config import EdgeConfig

    assert CloudConfig().max_sample_bytes >= EdgeConfig().max_sample_bytes


def test_identities_come_from_the_alternative_names_first() -> None:
    ssl = {"transport_security_type": [b"ssl"]}
    assert peer_identities({}) is None
    assert peer_identities({"transport_security_type": [b"insecure"]}) is None
    assert peer_identities({**ssl, "x509_common_name": [b"edge-1"]}) == {"edge-1"}
    assert peer_identities({**ssl, "x509_common_name": [b"edge-1"], "x509_subject_alternative_name": [b"edge-2"]}) == {"edge-2"}
    assert peer_identities(ssl) == set()


def test_a_log_line_is_json_and_quotes_no_exception_message() -> None:
    try:
        raise ValueError("the payload's text")
    except ValueError:
        record = logging.getLogger("x").makeRecord("x", logging.ERROR, "f", 1, "failed %s", ("here",), sys.exc_info(), extra={"rows": 3})
    line = json.loads(JsonLines().format(record))
    assert (line["message"], line["rows"], line["error"], line["level"]) == ("failed here", 3, "ValueError", "error")
    assert "payload" not in JsonLines().format(record)
