"""Building an engine in a process of its own: a builder may crash, hang or eat the memory; the daemon serves on.

`build_apart` starts `python -m edge_runtime.engines.build` with limits, and turns whatever happens to it into an EngineError.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import msgspec

from edge_runtime.engines.compile import BuildReport, BuildSpec, Built, build_plan, logger_of, module_of
from edge_runtime.engines.cuda import why_no_device
from kcm.errors import EngineError, KcmError

_POLL_S = 0.02
_CANCELLED = "was cancelled"
_LAST_LINES = 5
_PR_SET_PDEATHSIG = 1
_ADDR_NO_RANDOMIZE = 0x0040000
_REPRODUCIBLE = "--reproducible"
_ENVIRONMENT = ("HOME", "LANG", "LD_LIBRARY_PATH", "PATH")  # of a reproducible build: what is allocated where depends on it
_LINE = 4096  # bytes of the request, whatever the process's id


class BuildFailed(EngineError):
    """The builder ended without a plan: it refused, crashed, or took too much. Another try would end alike."""


class BuildLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the builder may use. Memory is what is resident, looked at every 20 ms: CUDA reserves address space by the
    hundred gigabytes, so that a limit on that (RLIMIT_AS) would stop every build on a machine with a GPU."""

    seconds: float = 1800.0
    memory_mb: int = 0  # resident; 0: three quarters of the machine's
    nice: int = 10


class _Request(msgspec.Struct, frozen=True, kw_only=True):
    spec: BuildSpec
    nice: int
    parent: int


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    report: BuildReport | None = None  # the plan's bytes follow after the line
    error: str = ""
    fix: str = ""


def build_apart(
    model: bytes,
    spec: BuildSpec,
    limits: BuildLimits = BuildLimits(),  # noqa: B008  frozen
    *,
    reproducible: bool = False,
    cancelled: threading.Event | None = None,
    command: Sequence[str] = (),
) -> Built:
    """Build in a process of its own; returns when it has ended.

    Args:
        reproducible: on one machine, the same bytes for the same model and spec. TensorRT-RTX orders some things by address, so the
            builder gets fixed addresses and a bare environment, where the system allows it (Docker's default profile doesn't; the
            report then warns). Not for devices: there, random addresses are worth more.
        cancelled: set it from another thread to kill the builder.
        command: the builder; default: this module.

    Raises:
        BuildFailed: it refused, crashed, took too long or too much memory; the message holds its own words.
        EngineError: it was cancelled, or couldn't be started.
    """
    request = _Request(spec=spec, nice=limits.nice, parent=os.getpid())
    command = command or [sys.executable, "-m", "edge_runtime.engines.build", *([_REPRODUCIBLE] if reproducible else [])]
    # -m looks into the working directory first, so that is one which only root writes; all else is found as we find it.
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry)
    kept = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT} if reproducible else {**os.environ}
    environment = {**kept, "PYTHONPATH": path, **({"PYTHONHASHSEED": "0"} if reproducible else {})}
    try:
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as log:
            given.write(msgspec.json.encode(request).ljust(_LINE) + b"\n" + model)
            given.seek(0)
            process = subprocess.Popen(command, stdin=given, stdout=said, stderr=log, cwd="/", env=environment, start_new_session=True)
            stopped = _watch(process, limits, cancelled)
            said.seek(0)
            line, _, plan = said.read().partition(b"\n")
            return _judge(process.returncode, stopped, line, plan, _last_lines(log))
    except OSError as error:
        raise EngineError(f"the engine's builder can't be started: {error}", fix="check memory and the temporary folder's disk") from error


def _say(line: str) -> None:
    """At once: a builder that crashes says nothing more."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _watch(process: subprocess.Popen[bytes], limits: BuildLimits, cancelled: threading.Event | None) -> str:
    """Wait for its end; why it was killed, where it was."""
    deadline = time.monotonic() + limits.seconds
    allowed_mb = limits.memory_mb or os.sysconf("SC_PHYS_PAGES") * resource.getpagesize() * 3 // 4 // 2**20
    try:
        while process.poll() is None:
            if cancelled is not None and cancelled.is_set():
                return _CANCELLED
            if time.monotonic() > deadline:
                return f"took longer than {limits.seconds:g} s"
            if (used := _resident_mb(process.pid)) > allowed_mb:
                return f"took {used} MB of memory, more than {allowed_mb}"
            time.sleep(_POLL_S)
        return ""
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its session: what it may have started, too
            process.wait()


def _judge(code: int, stopped: str, line: bytes, plan: bytes, log: str) -> Built:
    words = f"; its last words: {log}" if log else "; it said nothing"
    if stopped:
        kind = EngineError if stopped == _CANCELLED else BuildFailed
        raise kind(f"the engine's builder {stopped}{words}", fix="raise the limit, or serve with ONNX Runtime")
    if code < 0:
        name = signal.Signals(-code).name
        why = ", as the kernel does when memory runs out" if code == -signal.SIGKILL else ""
        raise BuildFailed(f"the engine's builder was killed by {name}{why}{words}")
    try:
        answer = msgspec.json.decode(line, type=_Answer)
    except msgspec.DecodeError:
        raise BuildFailed(f"the engine's builder ended with code {code} and no answer{words}") from None
    if answer.report is None:
        raise BuildFailed(answer.error, fix=answer.fix)
    if hashlib.sha256(plan).hexdigest() != answer.report.sha256:
        raise EngineError(
            f"the engine's builder sent {len(plan)} of {answer.report.size} bytes", fix="check the disk of the temporary folder"
        )
    return Built(plan=plan, report=answer.report)


def _resident_mb(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:  # noqa: PTH123  50 times a second
            return int(file.read().split()[1]) * resource.getpagesize() // 2**20
    except OSError:  # it has just ended
        return 0


def _last_lines(log: IO[bytes]) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
    lines = log.read().decode(errors="replace").strip().splitlines()
    return " | ".join(lines[-_LAST_LINES:])


def _confine(request: _Request) -> None:
    """Die with the parent, stand back for it, and go first when memory runs out."""
    # The signal comes when the thread that started us ends; it waits for us.
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) or os.getppid() != request.parent:
        sys.exit("the builder's parent is gone")
    os.nice(request.nice)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash must not fill the disk with the model
    with open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
        file.write("1000")


def _without_randomisation() -> tuple[str, ...]:
    """Start this program anew with fixed addresses, unless it has them; a warning where that isn't allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    now = libc.personality(ctypes.c_ulong(0xFFFFFFFF))  # asks, and changes nothing
    if now & _ADDR_NO_RANDOMIZE:
        return ()
    if libc.personality(ctypes.c_ulong(now | _ADDR_NO_RANDOMIZE)) == -1:
        return (f"not reproducible: the system keeps addresses random ({os.strerror(ctypes.get_errno())})",)
    os.execv(sys.executable, [sys.executable, "-m", "edge_runtime.engines.build", _REPRODUCIBLE])  # noqa: S606  ourselves


def main() -> None:
    """The builder's process: a line of JSON and the model on stdin; a line of JSON and the plan on stdout."""
    warnings = _without_randomisation() if _REPRODUCIBLE in sys.argv else ()
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints goes to the log
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=_Request)
    _confine(request)
    plan = b""
    try:
        if request.spec.flavour == "tensorrt" and (why := why_no_device()):
            raise EngineError(why)
        trt = module_of(request.spec.flavour)
        logger_of(trt).echo = _say
        built = build_plan(trt, sys.stdin.buffer.read(), request.spec)
        report = msgspec.structs.replace(built.report, warnings=(*built.report.warnings, *warnings))
        answer, plan = _Answer(report=report), built.plan
    except KcmError as error:
        answer = _Answer(error=error.message, fix=error.fix)
    with os.fdopen(answers, "wb") as out:
        out.write(msgspec.json.encode(answer) + b"\n" + plan)


if __name__ == "__main__":
    main()
