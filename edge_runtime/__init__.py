"""The edge daemon: engine, router, cloud client, spool, bundle store. Never imports torch or transformers.

In-process use: `EdgeRuntime.load("bundles/r52").infer([Sample(payload="...")])` without a cloud, `Edge` with one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_runtime.edge import Edge
    from edge_runtime.runtime import EdgeRuntime

__all__ = ["Edge", "EdgeRuntime"]


def __getattr__(name: str) -> object:
    # Lazy (PEP 562): `kcm --help` imports this package, and must not pay for ONNX Runtime.
    if name == "EdgeRuntime":
        from edge_runtime.runtime import EdgeRuntime

        return EdgeRuntime
    if name == "Edge":
        from edge_runtime.edge import Edge

        return Edge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
