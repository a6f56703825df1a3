"""Precedence, origins, and errors that name the right spelling."""

from pathlib import Path

import msgspec
import pytest

from kcm.config import load
from kcm.errors import ConfigError


class Cloud(msgspec.Struct, frozen=True, kw_only=True):
    target: str = ""
    deadline_ms: int = 2000


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    listen: str = "127.0.0.1:1"
    cloud: Cloud = Cloud()


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "edge.toml"
    file.write_text('[edge]\nlisten = "file"\n[edge.cloud]\ndeadline_ms = 10\ntarget = "file"\n')
    environ = {"KCM_EDGE__CLOUD__DEADLINE_MS": "20", "KCM_EDGE__CLOUD__TARGET": "env:1", "OTHER": "x"}
    settings, origin = load(Edge, "edge", file=file, environ=environ, flags={"cloud.target": "flag", "listen": None})
    assert settings == Edge(listen="file", cloud=Cloud(target="flag", deadline_ms=20))
    assert origin == {"listen": str(file), "cloud.deadline_ms": "$KCM_EDGE__CLOUD__DEADLINE_MS", "cloud.target": "flag"}
    assert load(Edge, "edge", environ={})[0] == Edge()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[edge]\nlisen = 'x'", "did you mean 'listen'"),
        ("[edge.cloud]\ndeadline = 3", "did you mean 'deadline_ms'"),
        ("[edge.cloud]\ndeadline_ms = 'soon'", "deadline_ms"),
        ("[egde]\nlisten = 'x'", "unknown table [egde]"),
        ("[edge", "not valid TOML"),
    ],
)
def test_a_wrong_file_says_what_and_where(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "edge.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(Edge, "edge", file=file, environ={})
    assert said in str(error.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        load(Edge, "edge", file=tmp_path / "none.toml", environ={})
