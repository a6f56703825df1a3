"""JSON lines on stderr: time, level, logger, message and the record's own fields. Payload texts are never among them."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from datetime import datetime, timezone

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """One JSON object a line. Of an exception: its type and where it was raised, not its message, which may quote a payload."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({name: value for name, value in vars(record).items() if name not in _STANDARD})
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            trace = record.exc_info[2]
            frames = []
            while trace is not None:
                frames.append(f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}")
                trace = trace.tb_next
            line["at"] = frames
        return json.dumps(line, default=str)


class Alarm:
    """Says each kind of trouble at most once a minute, with how often it was held back: a fault must not flood the log."""

    def __init__(self, log: logging.Logger, every_s: float = 60.0) -> None:
        self._log, self._every_s = log, every_s
        self._last: dict[str, float] = {}
        self._held: dict[str, int] = {}

    def __call__(self, kind: str, message: str) -> None:
        now = time.monotonic()
        if kind in self._last and now - self._last[kind] < self._every_s:
            self._held[kind] = self._held.get(kind, 0) + 1
            return
        self._last[kind] = now
        held = self._held.pop(kind, 0)
        self._log.error("%s%s", message, f" (and {held} times since this was last said)" if held else "")


def quiet_grpc() -> None:
    """Keep gRPC's C core from writing lines of its own between ours, unless the user asked for them. Before grpc is imported."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def configure_logging(level: int = logging.INFO) -> None:
    """Send the root logger's records to stderr as JSON lines, in place of other handlers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
