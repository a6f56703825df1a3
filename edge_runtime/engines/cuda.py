"""CUDA by cuda.bindings: is there a device?"""

from __future__ import annotations


def why_no_device() -> str:
    """Why no CUDA device can be used; empty where one can. TensorRT must not be touched before: without a driver its runtime crashes."""
    try:
        from cuda.bindings import runtime
    except ModuleNotFoundError:
        return "cuda.bindings is not installed; fix: pip install 'kcm[tensorrt]'"
    error, count = runtime.cudaGetDeviceCount()
    if int(error):
        return f"no CUDA device: {error.name} (error {int(error)})"
    return "" if count else "no CUDA device"
