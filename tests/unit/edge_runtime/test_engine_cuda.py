"""CUDA through cuda.bindings: real errors where there is no GPU, and every call's error on a device that is faked."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="needs cuda-bindings: pip install 'kcm[tensorrt-rtx]'")

from cuda_kit import FakeCuda
from tensorrt_kit import Gpu, fake_gpu

from edge_runtime.engines import cuda
from kcm.errors import EngineError


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Gpu]:
    with fake_gpu(monkeypatch, tmp_path) as found:
        yield found


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real cuda.bindings, on a machine that has no driver."""
    if cuda._has_driver():
        pytest.skip("this machine has a driver")
    monkeypatch.setattr(cuda, "_has_driver", lambda: True)


def test_a_machine_without_a_driver_is_told_so_before_anything_is_imported() -> None:
    if cuda._has_driver():
        pytest.skip("this machine has a driver")
    assert "libcuda.so.1 is not there (CUDA's error 35); fix: install or update the NVIDIA driver" in cuda.why_no_device()


@pytest.mark.usefixtures("no_gpu")
def test_every_real_call_without_a_driver_raises_error_35() -> None:
    assert cuda.why_no_device().startswith("no CUDA device: cudaErrorInsufficientDriver (error 35); fix: ")
    for make, call in (
        (cuda.Stream, "cudaStreamCreateWithFlags"),
        (lambda: cuda.Mirror(16), "cudaMalloc"),
        (cuda.device, "cudaGetDeviceProperties"),
    ):
        with pytest.raises(EngineError, match=rf"CUDA: {call} failed with cudaErrorInsufficientDriver \(error 35\)") as caught:
            make()
        assert "NVIDIA driver" in caught.value.fix


def test_why_there_is_no_device(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda.why_no_device() == ""
    gpu.cuda.devices = 0
    assert cuda.why_no_device().startswith("no CUDA device; fix: nvidia-smi")
    gpu.cuda.fail["cudaGetDeviceCount"] = (100, 1)
    assert "cudaErrorNoDevice (error 100); fix: " in cuda.why_no_device()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert cuda.why_no_device() == "cuda.bindings is not installed; fix: pip install 'kcm[tensorrt]'"


def test_what_the_device_is(gpu: Gpu) -> None:
    gpu.cuda.capability = (12, 0)
    found = cuda.device()
    assert (found.name, found.capability, found.target, found.memory) == ("Fake RTX", (12, 0), "sm120", 8 * 2**30)


def test_a_mirror_copies_when_the_stream_comes_to_it(gpu: Gpu) -> None:
    stream, mirror = cuda.Stream(), cuda.Mirror(8)
    mirror.host[:] = range(8)
    mirror.upload(stream, 8)
    stream.synchronize()
    mirror.host[:] = 0
    mirror.download(stream, 4)
    assert mirror.host.tolist() == [0] * 8
    stream.synchronize()
    assert mirror.host.tolist() == [0, 1, 2, 3, 0, 0, 0, 0]
    mirror.close()
    stream.close()
    mirror.close()
    stream.close()
    assert gpu.live() == {}
    assert gpu.cuda.calls["cudaFree"] == gpu.cuda.calls["cudaFreeHost"] == gpu.cuda.calls["cudaStreamDestroy"] == 1


def test_a_mirror_of_which_one_half_fails_leaves_nothing(gpu: Gpu) -> None:
    gpu.cuda.fail["cudaMallocHost"] = (2, 1)
    with pytest.raises(EngineError, match=r"cudaMallocHost failed with cudaErrorMemoryAllocation \(error 2\)") as caught:
        cuda.Mirror(8)
    assert "max_batch" in caught.value.fix and gpu.live() == {}


def test_what_fails_while_it_is_given_back_is_logged(gpu: Gpu, caplog: pytest.LogCaptureFixture) -> None:
    stream, mirror = cuda.Stream(), cuda.Mirror(8)
    for call in ("cudaFree", "cudaFreeHost", "cudaStreamDestroy", "cudaStreamSynchronize"):
        gpu.cuda.fail[call] = (700, 1)
    with caplog.at_level(logging.ERROR):
        stream.settle()
        mirror.close()
        stream.close()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 4 and all("cudaErrorIllegalAddress (error 700)" in line for line in said), said


def captured(gpu: Gpu) -> tuple[cuda.Stream, cuda.Mirror, cuda.Graph]:
    stream, mirror = cuda.Stream(), cuda.Mirror(4)

    def queue() -> None:
        mirror.upload(stream, 4)
        mirror.download(stream, 4)

    return stream, mirror, stream.capture(queue)


def test_a_graph_runs_when_it_is_launched(gpu: Gpu) -> None:
    stream, mirror, graph = captured(gpu)
    stream.synchronize()
    assert gpu.live() == {"device": 1, "host": 1, "stream": 1, "executable": 1}
    mirror.host[:] = 7
    stream.launch(graph)
    stream.synchronize()
    _, memory, size = next(block for block in gpu.cuda._blocks.values() if block[0] == "device")
    assert np.frombuffer(memory, np.uint8, size).tolist() == [7] * 4
    graph.close()
    graph.close()
    assert "executable" not in gpu.live()


@pytest.mark.parametrize("call", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaMemcpyAsync"])
def test_a_capture_that_fails_leaves_no_graph(gpu: Gpu, call: str) -> None:
    gpu.cuda.fail[call] = (901, 1)
    with pytest.raises(EngineError, match=rf"{call} failed with cudaErrorStreamCaptureInvalidated \(error 901\)"):
        captured(gpu)
    assert {"graph", "executable"}.isdisjoint(gpu.live())


def test_a_stream_whose_capture_failed_can_be_used(gpu: Gpu) -> None:
    stream, mirror = cuda.Stream(), cuda.Mirror(4)

    def queue() -> None:
        mirror.upload(stream, 4)
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        stream.capture(queue)
    stream.synchronize()
    mirror.upload(stream, 4)
    stream.synchronize()
    assert gpu.live() == {"device": 1, "host": 1, "stream": 1}


@pytest.mark.parametrize("call", ["cudaMemcpyAsync", "cudaStreamSynchronize", "cudaGraphLaunch"])
def test_every_other_call_says_its_error(gpu: Gpu, call: str) -> None:
    stream, mirror, graph = captured(gpu)
    gpu.cuda.fail[call] = (719, 1)

    def use() -> None:
        mirror.upload(stream, 4)
        stream.launch(graph)
        stream.synchronize()

    with pytest.raises(EngineError, match=rf"CUDA: {call} failed with cudaErrorLaunchFailure \(error 719\)"):
        use()


def test_the_fake_refuses_what_a_device_refuses() -> None:
    """Else the tests above prove nothing: foreign addresses, sizes beyond, and a stream that captures."""
    fake = FakeCuda()
    stream = fake.cudaStreamCreateWithFlags(fake.cudaStreamNonBlocking)[1]
    device, host = fake.cudaMalloc(8)[1], fake.cudaMallocHost(8)[1]
    up = fake.cudaMemcpyKind.cudaMemcpyHostToDevice
    assert fake.cudaMemcpyAsync(device, host, 8, up, stream)[0] == fake.cudaError_t.cudaSuccess
    for to, start, size in ((device, host, 9), (host, device, 8), (device + 4, host, 8), (1, host, 8)):
        assert fake.cudaMemcpyAsync(to, start, size, up, stream)[0] == fake.cudaError_t.cudaErrorInvalidValue
    assert fake.cudaFree(host)[0] == fake.cudaError_t.cudaErrorInvalidValue
    fake.cudaFree(device)
    assert fake.cudaStreamSynchronize(stream)[0] == fake.cudaError_t.cudaErrorInvalidValue
    fake.cudaStreamBeginCapture(stream, fake.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
    assert fake.cudaStreamSynchronize(stream)[0] == fake.cudaError_t.cudaErrorStreamCaptureUnsupported
