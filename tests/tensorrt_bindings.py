"""NVIDIA's real TensorRT Python bindings, imported without TensorRT's libraries, and their API as data.

The bindings' wheel is 1.2 MB and needs nine C symbols of libraries that only NVIDIA's own index has. A stub that defines them, with
the libraries' sonames, lets the wheel's module be imported: nothing in it can be run, but every class, method, property, enum member
and signature is there. It happens in a process of its own: python tests/tensorrt_bindings.py MODULE prints the API as JSON.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

# Flavour → wheel and exact version. 10.3 is JetPack 6's; cu13 wheels begin at 10.13.
WHEELS = {
    "10.3": ("tensorrt-cu12-bindings", "10.3.0"),
    "10.13": ("tensorrt-cu13-bindings", "10.13.3.9"),
    "11.4": ("tensorrt-cu13-bindings", "11.4.0.106"),
}
FLAVOURS = (*WHEELS, "rtx")
_LIBRARIES = ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin")
_STUB = """
void *createInferBuilder_INTERNAL(void) { return 0; }
void *createInferRefitter_INTERNAL(void) { return 0; }
void *createInferRuntime_INTERNAL(void) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }
void *createNvOnnxParser_INTERNAL(void) { return 0; }
void *getBuilderPluginRegistry(void) { return 0; }
void *getPluginRegistry(void) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void) { return 0; }
"""
_OPEN, _CLOSE = "([{<", ")]}>"


class Parameter(msgspec.Struct, frozen=True):
    name: str
    type: str
    optional: bool


class Signature(msgspec.Struct, frozen=True):
    """Without self. `returns` is a class of the API by its short name, or a Python type."""

    parameters: tuple[Parameter, ...]
    returns: str

    def refusal(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Why it can't be called so; empty where it can."""
        names = [p.name for p in self.parameters]
        if len(args) > len(names):
            return f"takes {len(names)} arguments, got {len(args)}"
        for name in kwargs:
            if name not in names:
                return f"has no argument {name!r}, only {', '.join(names) or 'none'}"
            if name in names[: len(args)]:
                return f"got {name!r} twice"
        missing = [p.name for p in self.parameters[len(args) :] if not p.optional and p.name not in kwargs]
        return f"needs {', '.join(missing)}" if missing else ""


class Member(msgspec.Struct, frozen=True):
    """A method (`signatures`, empty where its docstring has none), a property (`type`), or a value: an enum's member, a constant."""

    kind: str
    signatures: tuple[Signature, ...] = ()
    type: str = ""
    writable: bool = False


class Api(msgspec.Struct, frozen=True):
    """What a bindings module offers. Nested classes are named "ILogger.Severity"; members include those of base classes."""

    version: str
    classes: dict[str, dict[str, Member]]
    functions: dict[str, Member]
    values: tuple[str, ...]  # everything else on the module
    bases: dict[str, tuple[str, ...]]

    def has(self, path: str) -> bool:
        """Does "Builder", "Builder.create_network", "volume" or "float32" exist?"""
        owner, _, member = path.rpartition(".")
        if path in self.classes or path in self.functions or path in self.values:
            return True
        return member in self.classes.get(owner, ())


class NoBindingsError(Exception):
    """The bindings can't be had here; the message is a test's reason to skip."""


@cache
def load_api(flavour: str) -> Api:
    """The API of "10.3", "10.13", "11.4", or of the installed TensorRT-RTX ("rtx").

    Raises:
        NoBindingsError: no C compiler, no package index, or no wheel for this Python.
    """
    if flavour == "rtx":
        return _dump("tensorrt_rtx", {})
    package, version = WHEELS[flavour]
    with tempfile.TemporaryDirectory() as folder:
        stubs = _build_stubs(Path(folder), version.partition(".")[0])
        return _dump("tensorrt_bindings", {"LD_LIBRARY_PATH": str(stubs), "PYTHONPATH": str(_unpacked(package, version))})


def _dump(module: str, environment: dict[str, str]) -> Api:
    command = [sys.executable, str(Path(__file__)), module]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise NoBindingsError(f"{module} can't be imported: {done.stderr.strip()[-300:]}")
    return msgspec.json.decode(done.stdout, type=Api)


def _build_stubs(folder: Path, major: str) -> Path:
    """The three libraries with the sonames of this major version."""
    named = (sysconfig.get_config_var("CC") or "").split()[:1]
    compiler = next((found for name in (*named, "cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None or not sys.platform.startswith("linux"):
        raise NoBindingsError("no C compiler for the stub of TensorRT's libraries, or not Linux")
    source = folder / "stub.c"
    source.write_text(_STUB)
    for library in _LIBRARIES:
        soname = f"{library}.so.{major}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", str(folder / soname), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise NoBindingsError(f"the stub of {soname} can't be built: {done.stderr.strip()[-300:]}")
    return folder


def _unpacked(package: str, version: str) -> Path:
    """The wheel's content in the cache folder, fetched once."""
    from kcm.assets import cache_dir

    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    target = cache_dir() / "tensorrt-bindings" / f"{version}-{tag}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fetch = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "-q",
            "-d",
            scratch,
            f"{package}=={version}",
        ]
        try:
            done = subprocess.run(fetch, capture_output=True, text=True, timeout=180, check=False)
        except subprocess.TimeoutExpired:
            raise NoBindingsError(f"{package} {version}: the package index doesn't answer") from None
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise NoBindingsError(f"{package} {version} can't be fetched for {tag}: {done.stderr.strip()[-300:]}")
        content = Path(scratch) / "content"
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(content)
        try:
            content.rename(target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise
    return target


def describe(module: Any) -> Api:
    """The API of an imported bindings module, from its objects and pybind11's docstrings."""
    found = _classes(module)
    short = {_qualified(kind): name for name, kind in reversed(found.items())}
    classes, bases, functions, values = {}, {}, {}, []
    for name, kind in found.items():
        mro = [k for k in kind.__mro__ if _qualified(k) in short or k is kind]
        bases[name] = tuple(short[_qualified(k)] for k in mro[1:])
        classes[name] = {
            member: _member(value, kind, short) for owner in reversed(mro) for member, value in vars(owner).items() if _public(member)
        }
    for name, value in vars(module).items():
        if name in found or not (_public(name) or name == "__version__") or inspect.ismodule(value):
            continue
        if callable(value) and not _is_instance_of(value, found):
            functions[name] = _member(value, None, short)
        else:
            values.append(name)
    return Api(version=module.__version__, classes=classes, functions=functions, values=tuple(sorted(values)), bases=bases)


def _classes(owner: Any, prefix: str = "") -> dict[str, type]:
    found: dict[str, type] = {}
    for name, value in vars(owner).items():
        if isinstance(value, type) and _public(name) and "tensorrt" in value.__module__:
            found[prefix + name] = value
            found |= _classes(value, f"{prefix}{name}.") if not prefix else {}
    return found


def _public(name: str) -> bool:
    return not name.startswith("_") or name in ("__init__", "__getitem__", "__len__", "__enter__", "__exit__")


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_instance_of(value: Any, found: dict[str, type]) -> bool:
    return type(value) in found.values()


def _member(value: Any, owner: type | None, short: dict[str, str]) -> Member:
    if isinstance(value, property):
        typed = _signatures(value.fget.__doc__ or "", short) if value.fget else ()
        return Member("property", type=typed[0].returns if typed else "", writable=value.fset is not None)
    if isinstance(value, type) or not callable(value) or (owner is not None and isinstance(value, owner)):
        return Member("value", type=short.get(_qualified(value if isinstance(value, type) else type(value)), type(value).__name__))
    if inspect.isfunction(value):
        parameters = list(inspect.signature(value).parameters.values())[1 if owner else 0 :]
        made = tuple(Parameter(p.name, "", p.default is not p.empty or p.kind is p.VAR_KEYWORD) for p in parameters)
        return Member("method", (Signature(made, ""),))
    return Member("method", _signatures(value.__doc__ or "", short))


def _signatures(text: str, short: dict[str, str]) -> tuple[Signature, ...]:
    """Of pybind11's docstring: one line, or numbered lines after "Overloaded function."."""
    lines = text.split("\n")
    if "Overloaded function." in text:
        lines = [line.partition(". ")[2] for line in lines if re.match(r"\d+\. \w+\(", line)]
    else:
        lines = [line for line in lines[:1] if re.match(r"\w*\(", line)]
    return tuple(_signature(line, short) for line in lines)


def _signature(line: str, short: dict[str, str]) -> Signature:
    """ "f(self: m.A, n: int = 0) -> m.B" → n, optional; B."""
    depth, begin, parts = 0, line.index("(") + 1, []
    end = begin
    line = line.replace("->", "\0\0")  # an arrow is no bracket
    for place in range(begin - 1, len(line)):
        depth += (line[place] in _OPEN) - (line[place] in _CLOSE)
        if depth == 0 or (depth == 1 and line[place] == ","):
            parts.append(line[begin:place].strip())
            begin = end = place + 1
        if depth == 0:
            break
    parameters = []
    for part in parts:
        name, _, rest = part.partition(":")
        if name in ("self", "arg0", "", "/", "*") and part is parts[0]:
            continue
        kind, equals, _ = rest.partition(" = ")
        parameters.append(Parameter(name.strip(), _shortened(kind.strip(), short), bool(equals)))
    return Signature(tuple(parameters), _shortened(line[end:].replace("\0\0", "").strip(), short))


def _shortened(name: str, short: dict[str, str]) -> str:
    if name in short:
        return short[name]
    last = name.rpartition("::")[2]  # a C++ name: pybind11 met it before its class
    known = set(short.values())
    return next((n for n in (last, last.removeprefix("I")) if "::" in name and n in known), name)


if __name__ == "__main__":
    sys.path.pop(0)  # tests/ holds nothing that the bindings may import
    sys.stdout.buffer.write(msgspec.json.encode(describe(__import__(sys.argv[1]))))
