"""The golden check: a bundle's own inputs must give its own outputs on this device, or it isn't served."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kcm.errors import BundleError

if TYPE_CHECKING:
    from edge_runtime.engines.protocol import Engine, Outputs
    from kcm.bundle import Precision
    from kcm.preprocess import Preprocessor

# Of logits, relative to the largest of them; of C_x and the routing score, absolute: so a decision differs only that near to ε.
# Below fp32 two runtimes round in different places, and the outputs that are compared with are ONNX Runtime's.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 1e-2, "int8": 5e-2}
_NAMES = ("text", "offsets", "logits", "confidence", "score", "top_ids", "input_sums")
_BATCH = 16
_ALONE = 8


def check_golden(engine: Engine, preprocessor: Preprocessor, golden: bytes, precision: Precision = "fp32") -> None:
    """Preprocess and run the golden texts, in batches and a few of them alone; compare.

    Raises:
        BundleError: golden.npz can't be read, or preprocessing, logits, candidates, C_x or the routing score differ.
    """
    want = _read(golden)
    texts = _texts(want["text"], want["offsets"])
    if not texts:
        raise BundleError("golden.npz holds no inputs")
    rows = len(texts)
    if any(len(want[name]) != rows for name in _NAMES[2:]):
        raise BundleError(f"golden.npz has {rows} texts, but other numbers of outputs")
    tolerance = TOLERANCE[precision] * max(1.0, float(np.abs(want["logits"]).max()))
    for start, stop in [(i, min(i + _BATCH, rows)) for i in range(0, rows, _BATCH)] + [(i, i + 1) for i in range(min(rows, _ALONE))]:
        inputs = preprocessor.batch(texts[start:stop])
        sums = inputs[preprocessor.names[0]].astype(np.int64).sum(axis=1)
        for row in np.flatnonzero(sums != want["input_sums"][start:stop]):
            raise BundleError(f"golden input {start + row} is preprocessed differently here than where the bundle was made")
        _compare(engine.infer(inputs), {name: want[name][start:stop] for name in _NAMES[2:]}, start, tolerance, TOLERANCE[precision])


def _compare(got: Outputs, want: dict[str, NDArray[Any]], start: int, tolerance: float, near: float) -> None:
    if got.logits.shape != want["logits"].shape or got.top_ids.shape != want["top_ids"].shape:
        raise BundleError(f"golden outputs have {want['logits'].shape[1]} logits, the model gives {got.logits.shape[1]}")
    for name, allowed in (("logits", tolerance), ("confidence", near), ("score", near)):
        off = np.abs(getattr(got, name) - want[name]).reshape(len(want[name]), -1).max(axis=1)
        # not <=: a NaN fails too
        for row in np.flatnonzero(~(off <= allowed)):
            raise BundleError(f"golden input {start + row}: {name} differ by {off[row]:.3g}, allowed are {allowed:.3g}")
    for row, rank in np.argwhere(got.top_ids != want["top_ids"]):
        scores, ours, theirs = want["logits"][row], got.top_ids[row, rank], want["top_ids"][row, rank]
        if not abs(scores[ours] - scores[theirs]) <= 2 * tolerance:  # a tie may fall either way
            raise BundleError(f"golden input {start + row}: candidate {rank} is label {ours}, expected {theirs}")


def _read(golden: bytes) -> dict[str, NDArray[Any]]:
    try:
        with np.load(io.BytesIO(golden), allow_pickle=False) as archive:
            return {name: archive[name] for name in _NAMES}
    except KeyError as error:
        raise BundleError(f"golden.npz has no array {error.args[0]}") from error
    except Exception as error:  # zipfile, struct and numpy each raise their own
        raise BundleError(f"golden.npz can't be read: {error}") from error


def _texts(text: NDArray[np.uint8], offsets: NDArray[np.int64]) -> list[str]:
    data = text.tobytes()

    def each() -> Iterator[str]:
        for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            if not 0 <= begin <= end <= len(data):
                raise BundleError("golden.npz has offsets outside its text")
            yield data[begin:end].decode()

    try:
        return list(each())
    except UnicodeDecodeError as error:
        raise BundleError("golden.npz holds text that isn't UTF-8") from error
