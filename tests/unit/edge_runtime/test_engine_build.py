"""Building engines: TensorRT-RTX's real parser and builder, which need no GPU, in real processes that are starved and killed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import edge_kit
import msgspec
import numpy as np
import psutil
import pytest
from onnx import TensorProto, helper, load_from_string

from edge_runtime.engines import build, compile
from edge_runtime.engines.build import BuildLimits, build_apart
from edge_runtime.engines.compile import BuildSpec, build_plan, module_of
from edge_runtime.engines.protocol import OUTPUTS
from kcm.errors import EngineError, MissingExtraError

trt = pytest.importorskip("tensorrt_rtx", reason="pip install 'kcm[tensorrt-rtx]'")

TABLE = np.random.default_rng(0).normal(0, 1, (3 * 1024, 4)).astype(np.float32)
MODEL = edge_kit.graph(TABLE, ngrams=True)
INPUTS = {"ids": 600, "weights": 600, "words": 30, "word_weights": 30}
SPEC = BuildSpec(flavour="tensorrt-rtx", inputs=INPUTS, max_batch=64, targets=("sm86",))


def spec(**more: Any) -> BuildSpec:
    return msgspec.structs.replace(SPEC, **more)


def changed(change: Any) -> bytes:
    model = load_from_string(MODEL)
    change(model.graph)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize("targets", [("sm86",), ("sm89",), ("sm120",), ("sm86", "sm89", "sm120"), ()], ids="+".join)
def test_the_tiny_graph_builds_for_every_target_and_again_to_the_byte(targets: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (build_apart(MODEL, spec(targets=targets), reproducible=True) for _ in range(2))
    report = first.report
    assert len(first.plan) == report.size > 100_000 and report.version == trt.__version__ and 0 < report.seconds < 60
    assert any("top_ids" in line for line in report.warnings), "the builder's warning about int64 came through"
    with capsys.disabled():
        print(f" {report.size} bytes, {report.seconds} s", end="")
    if any("not reproducible" in line for line in report.warnings):
        pytest.skip(report.warnings[-1])
    assert first.plan == second.plan


def test_targets_change_the_plan() -> None:
    plans = [build_apart(MODEL, spec(targets=targets), reproducible=True).plan for targets in (("sm86",), ("sm120",), ("sm86", "sm120"))]
    assert len(set(plans)) == 3


def test_a_target_twice_is_a_target() -> None:
    assert build_plan(trt, MODEL, spec(targets=("sm86", "sm86"))).report.size == build_plan(trt, MODEL, SPEC).report.size


def test_the_builder_is_told_what_the_spec_says(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Builder(trt.Builder):
        def create_builder_config(self) -> Any:
            made.append((self, super().create_builder_config()))
            return made[-1][1]

    monkeypatch.setattr(trt, "Builder", Builder)
    build_plan(trt, MODEL, spec(targets=("sm86", "sm120"), workspace_mb=300))
    config = made[0][1]
    assert not config.get_flag(trt.BuilderFlag.TF32), "10 bits of fraction: decisions near ε would differ"
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 300 * 2**20
    assert [config.get_compute_capability(k).name for k in range(config.num_compute_capabilities)] == ["SM86", "SM120"]
    assert config.num_optimization_profiles == 1


@pytest.mark.parametrize(
    ("more", "says", "fix"),
    [
        ({"max_batch": 0}, "max_batch of an engine is 0, must be 1 to 2147483647", ""),
        # These the library refuses with a RuntimeError or TypeError, or takes modulo 2³².
        ({"max_batch": 2**31}, "max_batch of an engine is 2147483648, must be 1 to 2147483647", ""),
        ({"max_batch": 2**40}, "max_batch of an engine is 1099511627776, must be 1 to", ""),
        ({"inputs": {**INPUTS, "ids": 2**70}}, "the largest length of 'ids' of an engine is 1180591620717411303424, must be 1 to", ""),
        ({"workspace_mb": 2**50}, "workspace_mb of an engine is 1125899906842624, must be 1 to", ""),
        ({"inputs": {**INPUTS, "words": -1}}, "the largest length of 'words' of an engine is -1, must be 1 to", ""),
        ({"workspace_mb": 0}, "workspace_mb of an engine is 0", ""),
        ({"targets": ("sm90",)}, r"tensorrt-rtx .* can't build for 'sm90'", "one of sm75, sm80, sm86, sm89, sm120"),
        ({"targets": ("current",)}, "can't build for 'current'", "one of sm75"),
        ({"inputs": {"ids": 600}}, "the model reads ids, weights, words, word_weights; its manifest says ids", ""),
        ({"flavour": "tensorrt"}, "TensorRT builds for the GPU that it runs on, not for named targets", "use tensorrt-rtx"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(more: dict[str, Any], says: str, fix: str) -> None:
    with pytest.raises(EngineError, match=says) as caught:
        build_plan(trt, MODEL, spec(**more))
    assert fix in caught.value.fix


def _unknown_op(graph: Any) -> None:
    graph.node[7].op_type = "Softmaxx"


def _fixed_batch(graph: Any) -> None:
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4


def _double(graph: Any) -> None:
    graph.output[0].type.tensor_type.elem_type = TensorProto.INT32
    graph.node[6].output[0] = "wide"
    graph.node.insert(7, helper.make_node("Cast", ["wide"], ["logits"], to=TensorProto.INT32))
    graph.node[8].input[0] = "wide"


BROKEN: dict[str, tuple[bytes, str]] = {
    "unknown op": (changed(_unknown_op), r"can't parse the model: .*node 7 .*\(Softmaxx\)"),
    "truncated": (MODEL[: len(MODEL) // 2], "can't parse the model: .*Failed to parse the ONNX model"),
    "no model": (b"no model", "can't parse the model: "),
    "empty": (b"", "the model reads nothing; its manifest says ids, weights, words, word_weights"),
    "an output is missing": (
        changed(lambda graph: graph.output.pop()),
        "the model has no output 'score', only logits, top_ids, top_probs, confidence",
    ),
    "an output of another type": (changed(_double), "output 'logits' holds INT32, must be FLOAT"),
    "a fixed batch": (changed(_fixed_batch), r"input 'ids' has shape \[4, -1\]: its batch is fixed"),
    "tensors outside": (
        edge_kit.graph(TABLE, ngrams=True, external="table.bin"),
        "Failed to open file: /dev/null/external-data-is-refused/table.bin",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_model_that_cannot_be_built_says_where(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, says = BROKEN[case]
    monkeypatch.chdir(tmp_path)
    Path("table.bin").write_bytes(TABLE.tobytes())  # without the path that we give, the parser would read it
    with pytest.raises(EngineError, match=says):
        build_plan(trt, model, SPEC)
    with pytest.raises(EngineError, match=says):
        build_apart(model, SPEC)


def test_the_largest_sizes_that_are_taken_do_build() -> None:
    largest = 2**31 - 1
    huge = spec(max_batch=largest, inputs=dict.fromkeys(INPUTS, largest), workspace_mb=largest)
    assert build_plan(trt, MODEL, huge).report.size > 100_000


def test_profiles_reach_from_one_to_the_largest_and_keep_what_is_fixed() -> None:
    for dims, shapes in {
        (-1, -1): ((1, 1), (8, 128), (64, 600)),
        (-1,): ((1,), (8,), (64,)),
        (-1, 3, 224, 224): ((1, 3, 224, 224), (8, 3, 224, 224), (64, 3, 224, 224)),
        (-1, 3, -1, -1): ((1, 3, 1, 1), (8, 3, 128, 128), (64, 3, 600, 600)),
    }.items():
        assert compile._shapes("ids", dims, SPEC) == shapes
    assert compile._shapes("words", (-1, -1), SPEC) == ((1, 1), (8, 30), (64, 30)), "each input has its own longest"
    assert compile._shapes("x", (-1, -1), spec(max_batch=2, inputs={"x": 5})) == ((1, 1), (2, 5), (2, 5))
    with pytest.raises(EngineError, match=r"has shape \[\]"):
        compile._shapes("ids", (), SPEC)


def test_an_engine_of_images_builds() -> None:
    """[B, 3, H, W], where H and W are fixed: a profile of B alone."""
    given = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["B", 3, 8, 8])
    model = load_from_string(edge_kit.graph(TABLE))
    nodes = [
        helper.make_node("ReduceMean", ["pixels"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["means", "to"], ["logits"]),
    ]
    graph, first = model.graph, [node.output[0] for node in model.graph.node].index("logits")
    nodes += list(graph.node[first + 1 :])
    to = helper.make_tensor("to", TensorProto.FLOAT, (3, 4), np.eye(3, 4, dtype=np.float32).ravel())
    made = helper.make_graph(nodes, "images", [given], graph.output, [*graph.initializer, to])
    built = build_plan(
        trt, helper.make_model(made, opset_imports=model.opset_import, ir_version=9).SerializeToString(), spec(inputs={"pixels": 1})
    )
    assert built.report.size > 10_000


def test_no_plan_can_be_loaded_without_a_gpu_and_the_reason_is_error_35() -> None:
    """The real library, asked to load a plan that it built; in a process of its own, since without a driver it may crash."""
    from edge_runtime.engines import cuda

    if cuda._has_driver():
        pytest.skip("this machine has a driver")
    code = f"""
        import sys
        import edge_kit, numpy as np, test_engine_build as our
        from edge_runtime.engines.execute import TensorRTEngine
        from edge_runtime.engines.compile import build_plan, module_of
        from kcm.bundle import GraphSpec
        from kcm.errors import EngineError, MissingExtraError
        trt = module_of("tensorrt-rtx")
        plan = build_plan(trt, our.MODEL, our.SPEC).plan
        try:
            TensorRTEngine(trt, plan, GraphSpec(inputs=our.SPEC.inputs, candidates=3), {len(edge_kit.LABELS)}, provider="tensorrt-rtx")
        except EngineError as error:
            print(error.message)
    """
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(edge_kit.__file__).parent), *sys.path])
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("tensorrt-rtx can't load the plan: ") and "cudaError 35" in ran.stdout


def test_full_tensorrt_is_not_begun_without_a_gpu() -> None:
    from edge_runtime.engines import cuda

    if cuda._has_driver():
        pytest.skip("this machine has a driver")
    with pytest.raises(EngineError, match="error 35"):
        build_apart(MODEL, spec(flavour="tensorrt", targets=()))


def test_the_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingExtraError, match="tensorrt_rtx is not installed") as caught:
        module_of("tensorrt-rtx")
    assert "kcm[tensorrt-rtx]" in caught.value.fix


def test_the_logger_keeps_what_matters_and_one_is_enough() -> None:
    log = compile.logger_of(trt)
    assert log is compile.logger_of(trt)
    log.errors.clear()
    log.warnings.clear()
    severity = trt.ILogger.Severity
    for kind in (severity.VERBOSE, severity.INFO, severity.WARNING, severity.ERROR, severity.INTERNAL_ERROR, severity.ERROR):
        log.log(kind, kind.name)
    assert list(log.warnings) == ["WARNING"] and log.take_errors() == "ERROR | INTERNAL_ERROR" and log.take_errors() == "it gave no reason"


def test_outputs_have_a_type_each() -> None:
    assert {name: kind.name for name, kind in compile.output_types(trt).items()} == dict.fromkeys(OUTPUTS, "FLOAT") | {"top_ids": "INT64"}


# --- the process ---


def python(code: str) -> list[str]:
    """A builder that does something else."""
    return [sys.executable, "-c", textwrap.dedent(code)]


def test_a_builder_that_crashes_is_an_error_with_its_last_words() -> None:
    # The parser doesn't hold its network: a real crash inside TensorRT.
    crash = """
        import sys, tensorrt_rtx as trt
        print("about to parse", file=sys.stderr, flush=True)
        log = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(log)
        parser = trt.OnnxParser(builder.create_network(0), log)
        parser.parse(sys.stdin.buffer.read()[4097:])
    """
    with pytest.raises(EngineError, match=r"the engine's builder was killed by SIGSEGV; its last words: .*about to parse"):
        build_apart(MODEL, SPEC, command=python(crash))


def test_a_builder_that_takes_too_long_is_killed_with_all_that_it_started() -> None:
    code = """
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print("child", child.pid, file=sys.stderr, flush=True)
        time.sleep(60)
    """
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"took longer than 1\.5 s; its last words: child \d+") as caught:
        build_apart(MODEL, SPEC, BuildLimits(seconds=1.5), command=python(code))
    assert time.monotonic() - began < 5 and "raise the limit" in caught.value.fix
    child = int(caught.value.message.split()[-1])
    edge_kit.until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie", 5, "the builder's child is gone")


def test_the_real_builder_that_needs_too_much_memory_is_killed() -> None:
    with pytest.raises(EngineError, match=r"took \d+ MB of memory, more than 40") as caught:
        build_apart(MODEL, SPEC, BuildLimits(memory_mb=40))
    assert int(caught.value.message.partition("took ")[2].split()[0]) > 40


def test_what_the_kernel_kills_for_memory_is_told_so() -> None:
    with pytest.raises(EngineError, match="was killed by SIGKILL, as the kernel does when memory runs out; it said nothing"):
        build_apart(MODEL, SPEC, command=python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise RuntimeError('no')", r"ended with code 1 and no answer; its last words: .*RuntimeError: no"),
        ("print('not JSON')", "ended with code 0 and no answer"),
        ("""print('{"report": {"version": "1", "seconds": 1, "size": 5, "sha256": "00"}}\\nabc', end='')""", "sent 3 of 5 bytes"),
        ("""print('{"error": "out of luck", "fix": "try again"}')""", "^out of luck\n  fix: try again$"),
    ],
)
def test_a_builder_that_answers_wrongly(code: str, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        build_apart(MODEL, SPEC, command=python(code))


def test_a_builder_that_cannot_be_started_is_an_error() -> None:
    with pytest.raises(EngineError, match=r"builder can't be started: .*No such file"):
        build_apart(MODEL, SPEC, command=["/nowhere/python"])


def test_a_build_that_is_cancelled_ends_at_once() -> None:
    cancelled = threading.Event()
    threading.Timer(0.3, cancelled.set).start()
    began = time.monotonic()
    with pytest.raises(EngineError, match="was cancelled"):
        build_apart(MODEL, SPEC, cancelled=cancelled, command=python("import time; time.sleep(60)"))
    assert 0.3 <= time.monotonic() - began < 3


def builders(parent: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(parent).children() if "edge_runtime.engines.build" in " ".join(child.cmdline())]


def _confined(process: psutil.Process) -> bool:
    return Path(f"/proc/{process.pid}/oom_score_adj").read_text().strip() == "1000"


@pytest.fixture
def asked(tmp_path: Path) -> Any:
    """A process that builds, over and over; its builder, as soon as that has put its limits on."""
    code = "import test_engine_build as our\nwhile True: our.build_apart(our.MODEL, our.SPEC)"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(edge_kit.__file__).parent), *sys.path])
    log = (tmp_path / "log").open("w")
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, stderr=log, cwd=tmp_path)
    found: list[psutil.Process] = []

    def there() -> bool:
        try:
            if not found or found[0].status() == "zombie":
                found[:] = [child for child in builders(parent.pid) if _confined(child)]
                if found:
                    found[0].suspend()
            return bool(found) and found[0].status() == "stopped"
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            found.clear()
            return False

    edge_kit.until(there, 20, "a builder with its limits on: " + Path(log.name).read_text())
    yield parent, found[0]
    parent.kill()
    parent.wait()
    log.close()
    if found[0].is_running():
        found[0].kill()


def test_the_builder_stands_back_for_the_daemon(asked: Any) -> None:
    parent, builder = asked
    assert builder.nice() == psutil.Process(parent.pid).nice() + BuildLimits().nice
    assert os.getsid(builder.pid) == builder.pid != os.getsid(parent.pid)
    assert builder.cwd() == "/", "-m looks for modules in the working directory first"
    assert psutil.Process(builder.pid).rlimit(psutil.RLIMIT_CORE) == (0, 0)
    assert Path(f"/proc/{builder.pid}/oom_score_adj").read_text().strip() == "1000"


def test_the_builder_dies_with_its_parent(asked: Any) -> None:
    parent, builder = asked
    assert builder.status() == "stopped", "it can't end by itself"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    edge_kit.until(lambda: not psutil.pid_exists(builder.pid) or builder.status() == "zombie", 5, "the builder is gone")


def test_a_builder_that_is_killed_from_outside_is_an_error() -> None:
    failed: list[EngineError] = []

    def run() -> None:
        try:
            build_apart(MODEL, SPEC)
        except EngineError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    edge_kit.until(lambda: bool(builders(os.getpid())), 5, "a builder")
    builders(os.getpid())[0].kill()
    thread.join(10)
    assert failed and "killed by SIGKILL" in failed[0].message


def test_modules_in_the_working_directory_are_not_the_builders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text("raise SystemExit('hijacked')")
    (tmp_path / "edge_runtime").mkdir()
    (tmp_path / "edge_runtime" / "__init__.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert build_apart(MODEL, SPEC).report.version == trt.__version__


def test_what_a_library_prints_does_not_spoil_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt_rtx.py").write_text(
        "import os, sys\nprint('chatter', flush=True)\nos.write(1, b'more chatter')\nsys.path.remove(os.path.dirname(__file__))\n"
        "del sys.modules['tensorrt_rtx']\nimport tensorrt_rtx"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert build_apart(MODEL, SPEC).report.size > 100_000


def test_the_default_memory_limit_is_three_quarters_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize() // 2**20
    for used, killed in ((total * 3 // 4 - 1, False), (total * 3 // 4 + 2, True)):
        monkeypatch.setattr(build, "_resident_mb", lambda pid, used=used: used)
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.2)"], start_new_session=True)
        assert ("of memory" in build._watch(process, BuildLimits(), None)) == killed
