"""The golden check: a bundle's own inputs must give its own outputs on this device, or it isn't served."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kcm.errors import BundleError
from kcm.preprocess import check_sums

if TYPE_CHECKING:
    from edge_runtime.engines.protocol import Engine, Outputs
    from kcm.bundle import Precision
    from kcm.preprocess import Preprocessor
    from kcm.sample import Payload

# Of logits, relative to the largest of them; of C_x and the routing score, absolute: so a decision differs only that near to ε.
# Below fp32 two runtimes round in different places, and the outputs that are compared with are ONNX Runtime's.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "fp16": 1e-2, "int8": 5e-2}
_OUTPUTS = ("logits", "confidence", "score", "top_ids", "input_sums")  # of each input
_BATCH = 16
_ALONE = 8


def check_golden(engine: Engine, preprocessor: Preprocessor, golden: bytes, precision: Precision = "fp32") -> None:
    """Preprocess and run the golden inputs, in batches and a few of them alone; compare.

    Raises:
        BundleError: golden.npz can't be read, or preprocessing, logits, candidates, C_x or the routing score differ.
    """
    payloads, want = _read(golden)
    if not payloads:
        raise BundleError("golden.npz holds no inputs")
    rows = len(payloads)
    if any(len(want[name]) != rows for name in _OUTPUTS):
        raise BundleError(f"golden.npz has {rows} inputs, but other numbers of outputs")
    tolerance = TOLERANCE[precision] * max(1.0, float(np.abs(want["logits"]).max()))
    for start, stop in [(i, min(i + _BATCH, rows)) for i in range(0, rows, _BATCH)] + [(i, i + 1) for i in range(min(rows, _ALONE))]:
        try:
            inputs = preprocessor.batch(payloads[start:stop])
        except ValueError as error:  # of another modality, or damaged images
            raise BundleError(f"golden inputs {start} to {stop - 1} can't be read: {error}") from error
        for row in np.flatnonzero(check_sums(inputs) != want["input_sums"][start:stop]):
            raise BundleError(f"golden input {start + row} is preprocessed differently here than where the bundle was made")
        _compare(engine.infer(inputs), {name: want[name][start:stop] for name in _OUTPUTS}, start, tolerance, TOLERANCE[precision])


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


def golden_payloads(golden: bytes) -> Sequence[Payload]:
    """The inputs that golden.npz holds: `text` or `image` as bytes, one input from each of its `offsets` to the next.

    Raises:
        BundleError: it can't be read.
    """
    return _read(golden)[0]


def _read(golden: bytes) -> tuple[list[Payload], dict[str, NDArray[Any]]]:
    """(inputs, expected outputs by name)."""
    try:
        with np.load(io.BytesIO(golden), allow_pickle=False) as archive:
            images = "image" in archive.files
            data, offsets = archive["image" if images else "text"], archive["offsets"]
            want = {name: archive[name] for name in _OUTPUTS}
    except KeyError as error:
        raise BundleError(f"golden.npz has no array {error.args[0]}") from error
    except Exception as error:  # zipfile, struct and numpy each raise their own
        raise BundleError(f"golden.npz can't be read: {error}") from error
    if data.dtype != np.uint8 or offsets.dtype.kind not in "iu" or offsets.ndim != 1:
        raise BundleError(f"golden.npz holds its inputs as {data.dtype} with {offsets.dtype} offsets, expected bytes and whole numbers")
    parts = _parts(data.tobytes(), offsets.tolist())
    try:
        return [*parts] if images else [part.decode() for part in parts], want
    except UnicodeDecodeError as error:
        raise BundleError("golden.npz holds text that isn't UTF-8") from error


def _parts(data: bytes, offsets: Sequence[int]) -> list[bytes]:
    parts = []
    for begin, end in pairwise(offsets):
        if not 0 <= begin <= end <= len(data):
            raise BundleError("golden.npz has offsets outside its inputs")
        parts.append(data[begin:end])
    return parts
