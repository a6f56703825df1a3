"""Settings: where they come from, what is refused and how the message helps."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import tls_kit
import trustme

from edge_runtime.config import CloudConfig, EdgeConfig, check
from kcm.config import load
from kcm.errors import ConfigError


def read(text: str, tmp_path: Path, **environ: str) -> EdgeConfig:
    file = tmp_path / "edge.toml"
    file.write_text(text)
    return load(EdgeConfig, "edge", file=file, environ=environ)[0]


def test_a_misspelt_key_names_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read("[edge]\nbundle = 'b'\n[edge.cloud]\ndeadline_sm = 3\n", tmp_path)
    assert "[edge.cloud]" in str(caught.value) and "did you mean 'deadline_ms'?" in str(caught.value)


def test_a_wrong_type_names_the_field(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_mb"):
        read("[edge.spool]\nmax_mb = 'much'\n", tmp_path)


def test_the_environment_beats_the_file(tmp_path: Path) -> None:
    settings = read("[edge]\nbundle = 'b'\n[edge.cloud]\ndeadline_ms = 3\n", tmp_path, KCM_EDGE__CLOUD__DEADLINE_MS="400")
    assert settings.cloud.deadline_ms == 400 and settings.bundle == "b"


def test_zero_and_negative_limits_are_refused(tmp_path: Path) -> None:
    for field in ("max_samples", "max_sample_bytes"):
        with pytest.raises(ConfigError, match=field):
            read(f"[edge]\n{field} = 0\n", tmp_path)


def test_one_source_of_bundles_is_needed() -> None:
    with pytest.raises(ConfigError, match="neither is set"):
        check(EdgeConfig())
    with pytest.raises(ConfigError, match="both are set"):
        check(EdgeConfig(bundle="b", store="s"))


@pytest.mark.parametrize("address", ["0.0.0.0:50061", "[::]:50061", "192.168.1.4:50061", "edge.example.org:50061"])
def test_beyond_loopback_needs_tls(address: str) -> None:
    with pytest.raises(ConfigError, match="without TLS"):
        check(EdgeConfig(bundle="b", listen=address))


def test_a_remote_cloud_needs_tls() -> None:
    with pytest.raises(ConfigError, match=r"\[edge.cloud\] refusing to call cloud.example.org:443 without TLS"):
        check(EdgeConfig(bundle="b", cloud=CloudConfig(target="cloud.example.org:443")))


def test_an_edge_with_a_certificate_is_told_to_say_its_name(tmp_path: Path) -> None:
    tls = tls_kit.issue(trustme.CA(), tmp_path, "edge-1")
    cloud = CloudConfig(target="cloud.example.org:443", tls=tls)
    with pytest.raises(ConfigError, match="edge_id is not set") as caught:
        check(EdgeConfig(bundle="b", cloud=cloud))
    assert "set edge_id to the certificate's DNS name (SAN)" in caught.value.fix
    check(EdgeConfig(bundle="b", cloud=cloud, edge_id="edge-1"))


@pytest.mark.parametrize("place", ["tls", "cloud"])
def test_tls_files_are_checked_before_anything_starts(tmp_path: Path, place: str) -> None:
    good, other = (tls_kit.issue(trustme.CA(), tmp_path / name, "edge-1") for name in "ab")
    tls = msgspec.structs.replace(good, key=other.key)
    config = EdgeConfig(bundle="b", edge_id="edge-1", **{place: CloudConfig(target="127.0.0.1:1", tls=tls) if place == "cloud" else tls})
    with pytest.raises(ConfigError, match="does not belong to certificate") as caught:
        check(config)
    assert ("[edge.cloud.tls]" if place == "cloud" else "[edge.tls]") in caught.value.message


def test_a_payload_must_fit_into_a_message(tmp_path: Path) -> None:
    assert EdgeConfig().max_sample_bytes == 2**20
    assert read(f"[edge]\nmax_sample_bytes = {2**23}\n", tmp_path).max_sample_bytes == 2**23
    with pytest.raises(ConfigError, match="max_sample_bytes"):
        read(f"[edge]\nmax_sample_bytes = {2**23 + 1}\n", tmp_path)


def test_metrics_stay_on_loopback() -> None:
    with pytest.raises(ConfigError, match="metrics_listen must be loopback"):
        check(EdgeConfig(bundle="b", metrics_listen="0.0.0.0:9464"))


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0", "localhost:1", "unix:/run/kcm.sock"])
def test_this_machine_needs_none(address: str) -> None:
    check(EdgeConfig(bundle="b", listen=address))
