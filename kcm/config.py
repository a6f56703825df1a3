"""Typed settings of a process: default < TOML file < environment < flag.

The struct that describes a process lives beside its owner (edge_runtime/config.py, cloud_server/config.py); this module
fills it. Environment names spell the path: KCM_EDGE__CLOUD__DEADLINE_MS is `deadline_ms` of `[edge.cloud]`.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec

from kcm.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T", bound=msgspec.Struct)


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        ConfigError: it is missing or isn't TOML.
    """
    try:
        return parse_toml(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error


def parse_toml(data: bytes, where: str) -> dict[str, Any]:
    """Raises ConfigError where `data` isn't UTF-8 TOML."""
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} is not valid TOML: {error}") from error


def convert(values: Mapping[str, Any], kind: type[T], where: str) -> T:
    """`values` as a `kind`; an unknown key fails with the right spelling, a wrong type with the field's path.

    Raises:
        ConfigError: as said.
    """
    _refuse_unknown(values, kind, where)
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error


def load(
    kind: type[T],
    section: str,
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> tuple[T, dict[str, str]]:
    """The settings of one process, and for each dotted key that was set, where it came from.

    Args:
        section: the TOML table, and the environment's prefix KCM_<SECTION>__.
        flags: dotted keys ("cloud.target"); None values count as not given.

    Raises:
        ConfigError: the file is missing, a key is unknown, or a value has the wrong type.
    """
    tree: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if file is not None:
        whole = read_toml(file)
        if unknown := set(whole) - {"edge", "cloud"}:
            raise ConfigError(f"{file}: unknown table [{sorted(unknown)[0]}]", fix=f"settings of this process go under [{section}]")
        _merge(tree, whole.get(section, {}), origin, str(file))
    prefix = f"KCM_{section.upper()}__"
    for name, text in sorted((os.environ if environ is None else environ).items()):
        if name.startswith(prefix):
            keys = name[len(prefix) :].lower().split("__")
            _merge(tree, _nest(keys, _parse(text)), origin, f"${name}")
    for dotted, value in (flags or {}).items():
        if value is not None:
            _merge(tree, _nest(dotted.split("."), value), origin, "flag")
    return convert(tree, kind, f"[{section}]"), origin


def _parse(text: str) -> Any:
    """An environment value as TOML would read it, else as it stands."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _nest(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value  # type: ignore[no-any-return]


def _merge(into: dict[str, Any], values: Mapping[str, Any], origin: dict[str, str], source: str, path: str = "") -> None:
    for key, value in values.items():
        dotted = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            child = into.setdefault(key, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{source}: {dotted} is a value and a table at once")
            _merge(child, value, origin, source, dotted)
        else:
            into[key] = value
            origin[dotted] = source


def _refuse_unknown(values: Mapping[str, Any], kind: type[msgspec.Struct], where: str) -> None:
    hints = get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            known = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(hints))}"
            raise ConfigError(f"{where}: unknown key {key!r}", fix=known)
        inner = hints[key]
        if isinstance(value, Mapping) and isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            _refuse_unknown(value, inner, f"{where[:-1]}.{key}]" if where.endswith("]") else f"{where}: [{key}]")
