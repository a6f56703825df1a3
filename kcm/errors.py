"""One error tree. Each class has its exit code; each message says what, where, and the command that fixes it.

KcmError (1)
├── ConfigError (3)        a setting, flag or task.toml is wrong
├── DataError (4)          a data file is wrong: carries file and line
├── BundleError (5)        a bundle is damaged, foreign or mismatching
├── VerifyError (6)        two forms of one model disagree
├── MissingExtraError (7)  an optional dependency isn't installed
├── UnavailableError (8)   a peer or a port can't be reached or bound
├── StoreError (9)         spool or teacher store can't be read or written
└── EngineError (10)       no engine, or not the one that was asked for, can run the graph on this machine
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import ClassVar


class KcmError(Exception):
    """A failure that the user can mend. `fix` names how, where we know."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message


class ConfigError(KcmError):
    exit_code = 3


class DataError(KcmError):
    exit_code = 4


class BundleError(KcmError):
    exit_code = 5


class VerifyError(KcmError):
    exit_code = 6


class MissingExtraError(KcmError):
    exit_code = 7


class UnavailableError(KcmError):
    exit_code = 8


class StoreError(KcmError):
    exit_code = 9


class EngineError(KcmError):
    exit_code = 10


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra brings it.

    Raises:
        MissingExtraError: the module isn't installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise MissingExtraError(f"{module} is not installed", fix=f"pip install 'kcm[{extra}]'") from error
