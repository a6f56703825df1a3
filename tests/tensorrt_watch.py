"""Holds code to the real TensorRT API of a version: what it asks for is checked against that version's bindings first.

Whatever the real class doesn't have raises, as it would there: an attribute, an argument, an argument's type, an assignment. Two ways to
let the code run: on fakes (tensorrt_kit.py), whose classes get the checks while a test lasts, and on real objects of TensorRT-RTX, which
are then seen through the eyes of another version.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorrt_bindings import Api, Member, Parameter, Signature

_PYTHON: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool, np.bool_), "bytes": (bytes,), "None": (type(None),)}
_INTEGERS = ("int", "typing.SupportsInt", "typing.SupportsIndex")
_BUFFERS = ("buffer", "typing_extensions.Buffer")


class Watch:
    """`seen` holds every access: (file's name, line, attribute). `wrong` holds what was refused, even where our code caught it;
    `uncalled` the methods that were asked for and never called, as if they were properties."""

    def __init__(self, api: Api, sources: Collection[Path]) -> None:
        """
        Args:
            sources: only accesses from these files are checked.
        """
        self.api = api
        self.seen: set[tuple[str, int, str]] = set()
        self.wrong: list[str] = []
        self._read: set[str] = set()
        self._called: set[str] = set()
        self._fakes: dict[str, type] = {}
        self._sources = {str(path.resolve()) for path in sources}

    @property
    def uncalled(self) -> set[str]:
        return self._read - self._called

    def module(self, module: object, *, held: bool = False) -> Any:
        """Stands for `import tensorrt as trt`.

        Args:
            held: `module` is a real one, whose objects are to be held to this API; else it holds fakes that `install` was given.
        """
        return _Module(self, module, held)

    def install(self, patch: pytest.MonkeyPatch, fakes: Mapping[str, type]) -> None:
        """Put the checks on the classes of fakes, by the API's name."""
        self._fakes = {name: fake for name, fake in fakes.items() if name in self.api.classes}
        for name, fake in self._fakes.items():
            self._install(patch, name, fake)

    def _install(self, patch: pytest.MonkeyPatch, name: str, fake: type) -> None:
        watch, members = self, self.api.classes[name]
        get, put, make = fake.__getattribute__, fake.__setattr__, fake.__init__  # type: ignore[misc]

        def getattribute(this: Any, attribute: str) -> Any:
            own = attribute.startswith("__") or (type(this) is not fake and attribute not in members)  # a subclass of ours may have more
            return get(this, attribute) if own or not watch.asks(attribute) else watch.read(name, attribute, lambda: get(this, attribute))

        def setattribute(this: Any, attribute: str, value: Any) -> None:
            if (type(this) is fake or attribute in members) and watch.asks(attribute):
                watch.check_write(name, attribute, value)
            put(this, attribute, value)

        def init(this: Any, *args: Any, **kwargs: Any) -> None:
            if watch.asks("__init__"):
                watch.check_call(members["__init__"].signatures, f"{name}.__init__", args, kwargs)
            make(this, *args, **kwargs)

        for attribute, value in (("__getattribute__", getattribute), ("__setattr__", setattribute), ("__init__", init)):
            patch.setattr(fake, attribute, value)

    def asks(self, attribute: str) -> bool:
        """Does the caller's caller lie in our sources?"""
        frame = sys._getframe(2)
        if frame.f_code.co_filename not in self._sources:
            return False
        self.seen.add((Path(frame.f_code.co_filename).name, frame.f_lineno, attribute))
        return True

    def refuse(self, kind: type[Exception], message: str) -> None:
        message = f"TensorRT {self.api.version}: {message}"
        self.wrong.append(message)
        raise kind(message)

    def read(self, name: str, attribute: str, get: Any, *, held: bool = False) -> Any:
        """A member of a class: its value, or a call that checks its arguments and its answer."""
        member = self.api.classes[name].get(attribute)
        if member is None:
            self.refuse(AttributeError, f"{name} has no {attribute!r}")
            raise AssertionError
        return self.checked(get(), member, f"{name}.{attribute}", held)

    def check_write(self, name: str, attribute: str, value: Any) -> None:
        member = self.api.classes[name].get(attribute)
        if member is None:
            self.refuse(AttributeError, f"{name} has no {attribute!r} to set")
        elif not member.writable:
            self.refuse(AttributeError, f"{name}.{attribute} can't be set")
        elif not self.fits(value, member.type):
            self.refuse(TypeError, f"{name}.{attribute} is of type {member.type}, not {type(value).__name__}")

    def checked(self, value: Any, member: Member, name: str, held: bool) -> Any:
        if member.kind != "method":
            if member.kind == "property" and member.type and value is not None and not self.fits(value, member.type):
                self.refuse(TypeError, f"{name} is of type {member.type}, it has {type(value).__name__}")
            return self.hold(value) if held else value
        if not callable(value):
            self.refuse(TypeError, f"{name} is a method, it has {type(value).__name__}")

        self._read.add(name)

        @functools.wraps(value)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._called.add(name)
            signature = self.check_call(member.signatures, name, args, kwargs)
            result = value(*map(_released, args), **{key: _released(v) for key, v in kwargs.items()})
            # None is how TensorRT says that it failed.
            if signature is not None and result is not None and not self.fits(result, signature.returns):
                self.refuse(TypeError, f"{name} returns {signature.returns}, it gave {type(result).__name__}")
            return self.hold(result) if held else result

        return call

    def check_call(self, signatures: tuple[Signature, ...], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature | None:
        """The overload that takes these arguments; None where the bindings document none."""
        reasons = []
        for signature in signatures:
            reason = signature.refusal(args, kwargs)
            named = [(p, kwargs[p.name]) for p in signature.parameters if p.name in kwargs]
            given = [*zip(signature.parameters, args, strict=False), *named]
            reason = reason or next((_misfit(p, value) for p, value in given if not self.fits(value, p.type)), "")
            if not reason:
                return signature
            reasons.append(reason)
        if signatures:
            self.refuse(TypeError, f"{name}: {'; or '.join(reasons)}")
        return None

    def fits(self, value: Any, kind: str) -> bool:
        """Is `value` what stands for the C++ type behind `kind`, or would pybind11 convert it?"""
        if kind == "Dims":
            if isinstance(value, (tuple, list)):
                return all(isinstance(size, (int, np.integer)) for size in value)
            return kind in self._kinds(value)
        if kind in self.api.classes:
            return kind in self._kinds(value) or any(value is known for known in self._enumerated(kind))
        if kind in _INTEGERS:
            return isinstance(value, (int, np.integer)) or hasattr(value, "__index__")
        if kind in _PYTHON:
            return isinstance(value, _PYTHON[kind])
        if kind in _BUFFERS:
            return isinstance(value, (bytes, bytearray, memoryview, np.ndarray)) or "IHostMemory" in self._kinds(value)
        if kind.lower().startswith(("list[", "tuple[", "collections.abc.sequence[")):
            return isinstance(value, (list, tuple))
        return kind in ("", "object")

    def hold(self, value: Any) -> Any:
        """Objects that have methods of interest; plain values (sizes, enumerations' members, memory) as they are."""
        name = type(value).__qualname__
        plain = name in ("Dims", "IHostMemory") or "value" in self.api.classes.get(name, {})
        return value if plain or name not in self.api.classes else _Held(self, value, name)

    def _kinds(self, value: Any) -> set[str]:
        return {kind.__qualname__ for kind in type(_released(value)).__mro__}

    def _enumerated(self, kind: str) -> Iterator[Any]:
        """The members of an enumeration that is faked."""
        head, _, nested = kind.partition(".")
        owner = self._fakes.get(head)
        owner = getattr(owner, nested, None) if nested else owner
        yield from vars(owner).values() if owner is not None else ()


def _misfit(parameter: Parameter, value: Any) -> str:
    return f"{parameter.name} takes {parameter.type}, not {type(value).__name__}"


def _released(value: Any) -> Any:
    return object.__getattribute__(value, "_real") if type(value) is _Held else value


class _Held:
    """A real object, with no more of it to be had than the API's version has."""

    def __init__(self, watch: Watch, real: Any, name: str) -> None:
        for attribute, value in (("_watch", watch), ("_real", real), ("_name", name)):
            object.__setattr__(self, attribute, value)

    def __getattr__(self, attribute: str) -> Any:
        self._watch.asks(attribute)
        return self._watch.read(self._name, attribute, lambda: getattr(self._real, attribute), held=True)

    def __setattr__(self, attribute: str, value: Any) -> None:
        self._watch.asks(attribute)
        self._watch.check_write(self._name, attribute, value)
        setattr(self._real, attribute, _released(value))


class _Module:
    def __init__(self, watch: Watch, module: object, held: bool) -> None:
        self._watch, self._module, self._held = watch, module, held

    def __getattr__(self, name: str) -> Any:
        watch = self._watch
        if name == "__version__":
            return watch.api.version
        if name.startswith("__") or not watch.asks(name):
            return getattr(self._module, name)
        if not watch.api.has(name):
            raise AttributeError(f"TensorRT {watch.api.version} has no {name!r}")  # not in `wrong`: hasattr may ask
        value = getattr(self._module, name)
        if not self._held or name not in watch.api.classes:
            return value
        signatures = watch.api.classes[name]["__init__"].signatures if "__init__" in watch.api.classes[name] else ()
        if not signatures or name == "ILogger":  # nothing to construct; or a base class of ours
            return value

        def construct(*args: Any, **kwargs: Any) -> Any:
            watch.check_call(signatures, name, args, kwargs)
            return watch.hold(value(*map(_released, args), **{key: _released(v) for key, v in kwargs.items()}))

        # Enumerations have a constructor too, but are used by their members.
        return value if "value" in watch.api.classes[name] else construct
