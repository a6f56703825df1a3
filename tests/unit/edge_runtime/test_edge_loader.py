"""Which engine serves, why the others don't, and how a built one takes over."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import edge_kit
import numpy as np
import pytest

from edge_runtime.config import EdgeConfig
from edge_runtime.engines import chain
from edge_runtime.engines.onnx import OrtBackend
from edge_runtime.engines.protocol import Engine, Outputs
from edge_runtime.loader import Loader
from edge_runtime.router import Router
from edge_runtime.stats import Stats
from edge_runtime.updater import Updater
from kcm.bundle import GraphSpec
from kcm.errors import ConfigError, EngineError
from kcm.preprocess import Inputs
from kcm.sample import Sample


class Built:
    """Stands for an engine that has to be built, as this machine has no GPU: ONNX Runtime runs it, once `prepare` was called."""

    def __init__(self, name: str = "built", *, fails: str = "", shift: float = 0.0) -> None:
        self.name, self.prepared, self.closed, self.cancelled = name, 0, 0, 0
        self._fails, self._shift, self.lost = fails, shift, False

    def probe(self) -> str:
        return ""

    def ready(self, model: bytes, graph: GraphSpec) -> bool:
        return self.prepared > 0

    def prepare(self, model: bytes, graph: GraphSpec) -> None:
        if self._fails:
            raise EngineError(self._fails)
        self.prepared += 1

    def cancel(self) -> None:
        self.cancelled += 1

    def load(self, model: bytes, graph: GraphSpec, classes: int) -> Engine:
        assert self.prepared
        return _Shifted(self, OrtBackend("x").load(model, graph, classes))


class _Shifted:
    provider = "built here"

    def __init__(self, backend: Built, inner: Engine) -> None:
        self._backend, self._inner = backend, inner

    def infer(self, inputs: Inputs) -> Outputs:
        if self._backend.lost:
            raise EngineError("cudaErrorIllegalAddress (error 700)")
        outputs = self._inner.infer(inputs)
        return outputs._replace(score=outputs.score + np.float32(self._backend._shift))

    def close(self) -> None:
        self._backend.closed += 1
        self._inner.close()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Built:
    backend = Built()
    monkeypatch.setitem(chain.BACKENDS, "built", lambda: backend)
    return backend


@pytest.fixture(scope="module")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edge_kit.make_bundle(tmp_path_factory.mktemp("bundle") / "b")


def test_an_unknown_engine_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="engine 'tensort' is unknown") as refused:
        Loader("tensort, onnx-cpu", "fp32")
    assert "onnx-cpu" in refused.value.fix


def test_what_this_machine_lacks_is_skipped_with_its_reason(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        loader = Loader("onnx-cuda,onnx-cpu", "fp32")
        runtime = loader.load(tiny_bundle)
    assert [skip.name for skip in loader.skipped] == ["onnx-cuda"] and "CUDAExecutionProvider" in loader.skipped[0].reason
    assert runtime.provider == "CPUExecutionProvider" and runtime.engine == "onnx-cpu"
    assert "engine onnx-cuda is skipped" in caplog.text and "CPUExecutionProvider runs bundle" in caplog.text


def test_a_list_without_any_usable_engine_is_an_error_that_says_why() -> None:
    with pytest.raises(EngineError, match=r"no engine can run here: onnx-cuda: .*CUDAExecutionProvider") as refused:
        Loader("onnx-cuda", "fp32")
    assert "onnx-cpu" in refused.value.fix and refused.value.exit_code == 10


def test_what_must_be_built_waits_and_the_next_engine_serves(tiny_bundle: Path, built: Built) -> None:
    loader = Loader("built,onnx-cpu", "fp32")
    runtime = loader.load(tiny_bundle)
    assert runtime.engine == "onnx-cpu" and not built.prepared
    assert [backend.name for backend in loader.better(runtime)] == ["built"]
    better = loader.improve(runtime, tiny_bundle)
    assert better is not None and better.engine == "built" and better.bundle_id == runtime.bundle_id
    assert loader.better(better) == []


def test_where_it_is_the_only_one_it_is_built_before_the_first_answer(tiny_bundle: Path, built: Built) -> None:
    assert Loader("built", "fp32").load(tiny_bundle).engine == "built" and built.prepared == 1


def test_a_build_that_fails_leaves_what_serves(tiny_bundle: Path, built: Built, caplog: pytest.LogCaptureFixture) -> None:
    built._fails = "the builder ran out of memory"
    loader = Loader("built,onnx-cpu", "fp32")
    assert loader.improve(loader.load(tiny_bundle), tiny_bundle) is None
    assert "engine built is skipped, CPUExecutionProvider serves on: the builder ran out of memory" in caplog.text


def test_an_engine_whose_decisions_differ_is_not_taken_and_is_closed(
    tiny_bundle: Path, built: Built, caplog: pytest.LogCaptureFixture
) -> None:
    built._shift = 0.01
    loader = Loader("built,onnx-cpu", "fp32")
    assert loader.improve(loader.load(tiny_bundle), tiny_bundle) is None
    assert "its decisions differ: golden input 0: score differ by 0.01" in caplog.text and built.closed == 1


def test_the_daemon_swaps_it_in_under_traffic_and_keeps_its_estimates(tmp_path: Path, built: Built) -> None:
    bundle = edge_kit.make_bundle(tmp_path / "b")

    async def main() -> None:
        stats = Stats()
        config = EdgeConfig(bundle=str(bundle), engine="built,onnx-cpu")
        updater = Updater(config, stats)
        router = Router(config, updater.first(), client=None, spool=None, stats=stats)
        before, drift = router.runtime, router.drift
        work = asyncio.create_task(updater.run(router))
        answered = 0
        while router.runtime is before:
            answers = await router.infer([Sample(payload=text) for text in edge_kit.EASY])
            answered += len(answers)
            assert all(answer.model_id == before.bundle_id for answer in answers)
            await asyncio.sleep(0.001)
        assert (router.runtime.engine, router.runtime.bundle_id) == ("built", before.bundle_id)
        assert router.drift is drift and stats.swaps == 0 and answered
        assert await router.infer([Sample(payload=edge_kit.EASY[0])])
        work.cancel()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_an_engine_is_closed_once_nobody_holds_its_runtime(tiny_bundle: Path, built: Built) -> None:
    runtime = Loader("built", "fp32").load(tiny_bundle)
    assert runtime.infer([Sample(payload="x")]) and not built.closed
    del runtime
    assert built.closed == 1


def test_a_device_that_fails_in_service_is_replaced_for_good_and_no_sample_is_lost(
    tiny_bundle: Path, built: Built, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Loader("built", "fp32").load(tiny_bundle)
    want = [answer.label for answer in runtime.infer([Sample(payload=text) for text in edge_kit.EASY])]
    built.lost = True
    assert [answer.label for answer in runtime.infer([Sample(payload=text) for text in edge_kit.EASY])] == want
    assert (runtime.engine, runtime.provider) == ("onnx-cpu", "CPUExecutionProvider") and built.closed == 1
    assert "built here failed and serves no more, CPUExecutionProvider does: cudaErrorIllegalAddress" in caplog.text
    built.lost = False
    runtime.infer([Sample(payload="x")])
    assert runtime.engine == "onnx-cpu"
