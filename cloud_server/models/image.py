"""An image classifier served by ONNX Runtime: ours (large.onnx of `kcm train-large`) or the user's own graph.

It reads a hint as a prior over classes: calibrated logit fusion with a fitted temperature and weight (kcm/fusion.py). The graph
itself never sees the hint, so an answer under one and the teacher's own logits come from the same run of it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cloud_server.models import LargeFile
from kcm.errors import ConfigError, require
from kcm.fusion import fuse, fusion_id, log_prior
from kcm.images import ImagePreprocessor, Pixels
from kcm.preprocess import as_image
from kcm.sample import Float32, Hint, Payload
from protos.kcm.v1 import sample_pb2

_log = logging.getLogger(__name__)

_ROWS = 32  # of one run: bounds memory where a caller asks about thousands
_ALIKE = 1e-3  # of an image's logits alone and in a batch, relative to the largest
_TYPES: dict[str, Any] = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}
_LOGIT_TYPES = ("tensor(float)", "tensor(float16)", "tensor(double)")
# Names a folder that can't exist, so that tensors outside the graph's bytes never load.
_NO_FOLDER = "/dev/null/external-data-is-refused"
_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class _Input(NamedTuple):
    """How the graph is fed: uint8 pixels as they are, or floats (x − mean) / std."""

    name: str
    dtype: Any
    channels_first: bool


class ImageModel:
    """Logits of an image classifier, a hint fused in by its weight."""

    def __init__(self, folder: Path, large: LargeFile, *, threads: int = 1) -> None:
        """Load the graph, with CUDA where this onnxruntime has it, and try it.

        Raises:
            ConfigError: the graph is missing, keeps tensors in other files, reads or gives something else than images and logits, or
                fails a probe: other classes, values that aren't finite, probabilities, rows that depend on each other.
            MissingExtraError: onnxruntime or Pillow is missing.
        """
        self._path = folder / large.model
        self._preprocess = large.preprocess
        self._preprocessor = ImagePreprocessor(large.preprocess)
        self._session, self.provider = _session(self._path, threads)
        self._input = self._find_input(ours=large.kind != "onnx")
        self._output = self._find_output(ours=large.kind != "onnx")
        self._temperature, self._weight = large.temperature, large.hint_weight
        self.labels = large.labels
        self.reads_hints = large.hint_weight > 0.0
        self.teacher_id = f"{large.kind}-{large.large_id}"
        self.prompt_id = fusion_id(temperature=large.temperature, weight=large.hint_weight) if self.reads_hints else "none"
        self.scores_kind = sample_pb2.Scores.LOGIT
        self._probe()
        _log.info("image model", extra={"teacher_id": self.teacher_id, "provider": self.provider, "size": large.preprocess.size})

    def read(self, payload: Payload) -> Pixels:
        """uint8 [S, S, 3] of a JPEG's or PNG's bytes. Raises ValueError where it is no such image, damaged, or above the limits."""
        return self._preprocessor.pixels(as_image(payload))

    def logits(self, samples: Sequence[Payload], hints: Sequence[Hint | None]) -> Float32:
        """float32 [B, C]: log_softmax(logits / T) + w · log p_hint. Raises ValueError as `read` does."""
        parts = [
            self.scores([self.read(sample) for sample in samples[start : start + _ROWS]], hints[start : start + _ROWS])
            for start in range(0, len(samples), _ROWS)
        ]
        return np.concatenate(parts) if parts else np.empty((0, len(self.labels)), np.float32)

    def scores(self, ready: Sequence[Pixels], hints: Sequence[Hint | None]) -> Float32:
        """float32 [B, C] of images that were read."""
        prior_BC = log_prior(hints, len(self.labels))
        return fuse(self._run(np.stack(ready)), prior_BC, temperature=self._temperature, weight=self._weight)

    def _run(self, image_BSSC: Pixels) -> Float32:
        """The graph's own logits [B, C]."""
        name, dtype, channels_first = self._input
        fed: NDArray[Any] = image_BSSC
        if dtype is not np.uint8:
            spec = self._preprocess
            mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
            fed = ((image_BSSC.astype(np.float32) - mean) / std).astype(dtype)
        if channels_first:
            fed = np.ascontiguousarray(fed.transpose(0, 3, 1, 2))
        logits: Float32 = self._session.run([self._output], {name: fed})[0].astype(np.float32)
        return logits

    def _find_input(self, *, ours: bool) -> _Input:
        size, found = self._preprocess.size, self._session.get_inputs()
        if len(found) != 1 or (ours and found[0].name != "image"):
            names = ", ".join(node.name for node in found) or "nothing"
            raise ConfigError(f"{self._path} reads {names}; an image model reads one input" + (" 'image'" if ours else ""))
        node = found[0]
        dtype = _TYPES.get(node.type)
        first, last = (_fits(node.shape, (3, size, size)), _fits(node.shape, (size, size, 3)))
        if dtype is None or not (first or last) or (ours and (dtype is not np.uint8 or not last)):
            wanted = f"uint8 [B, {size}, {size}, 3]" + ("" if ours else f", or float [B, 3, {size}, {size}]")
            raise ConfigError(f"{self._path}: input {node.name!r} is {node.type} {node.shape}, not {wanted}", fix="size under [large]")
        if isinstance(node.shape[0], int):
            raise ConfigError(
                f"{self._path} takes {node.shape[0]} image(s) at a time", fix="export it with a dynamic batch (dynamic_shapes)"
            )
        # Where the shape fits both, by habit: floats come from torch.
        return _Input(node.name, dtype, channels_first=first and not (last and dtype is np.uint8))

    def _find_output(self, *, ours: bool) -> str:
        outputs = {node.name: node.type for node in self._session.get_outputs()}
        name = "logits" if ours or "logits" in outputs or len(outputs) != 1 else next(iter(outputs))
        if name not in outputs:
            raise ConfigError(f"{self._path} has no output 'logits', only {', '.join(map(repr, outputs))}", fix="name that output 'logits'")
        if outputs[name] not in _LOGIT_TYPES:
            raise ConfigError(f"{self._path}: output {name!r} is {outputs[name]}, logits are floats")
        return name

    def _probe(self) -> None:
        """Two images, together and alone. Raises ConfigError as the constructor does."""
        size, classes = self._preprocess.size, len(self.labels)
        noise = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
        try:
            together = self._run(noise)
            alone = [self._run(noise[row : row + 1]) for row in range(2)]
        except Exception as error:  # the runtime has a dozen exception types without a common base
            raise ConfigError(f"{self._path} can't run on two images of {size} × {size}: {error}") from error
        if together.shape != (2, classes):
            raise ConfigError(f"{self._path} gives {list(together.shape)} for two images, the model has {classes} labels")
        if not np.isfinite(together).all():
            raise ConfigError(f"{self._path} gives logits that are not finite")
        if (together >= 0).all() and np.allclose(together.sum(1), 1.0, atol=1e-3):
            raise ConfigError(f"{self._path} gives probabilities, not logits", fix="export it without the softmax at its end")
        apart = float(np.abs(np.concatenate(alone) - together).max())
        if not apart <= _ALIKE * max(1.0, float(np.abs(together).max())):
            raise ConfigError(
                f"{self._path}: an image's logits change by {apart:.2g} beside another image",
                fix="export it in evaluation mode: model.eval()",
            )


def _fits(shape: Sequence[Any], wanted: tuple[int, int, int]) -> bool:
    """True where [B, ...] can be of this shape: a name stands for any number."""
    return len(shape) == 4 and all(not isinstance(given, int) or given == want for given, want in zip(shape[1:], wanted, strict=True))


def _session(path: Path, threads: int) -> tuple[Any, str]:
    """(session, the provider that runs it)."""
    ort = require("onnxruntime", "cpu")
    try:
        graph = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}", fix="kcm train-large --task TASK --out FOLDER --force") from error
    providers: list[Any] = [_CPU]
    if _CUDA in ort.get_available_providers():
        ort.preload_dlls()
        providers.insert(0, (_CUDA, {"use_tf32": "0"}))  # the same answers as where ε was calibrated
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # failures arrive as exceptions
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", _NO_FOLDER)
    try:
        session = ort.InferenceSession(graph, options, providers=providers)
    except Exception as error:  # the runtime has a dozen exception types without a common base
        raise ConfigError(
            f"{path} can't be loaded by ONNX Runtime: {error}",
            fix="an ONNX file with its tensors inside: onnx.save_model(onnx.load(PATH), OUT, save_as_external_data=False)",
        ) from error
    return session, str(session.get_providers()[0])
