"""Large models: what they have in common, and how a folder becomes one.

A folder holds large.json and, for an encoder, head.safetensors; the weights of the model itself lie where
kcm.assets.model_path finds them, or inside the folder. An image model is large.onnx beside it, whole. Safetensors and ONNX only,
nothing fetched, no code from a folder run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import msgspec

from kcm.assets import model_path
from kcm.errors import ConfigError, require
from kcm.sample import Float32, Hint, Payload
from kcm.task import PreprocessSpec, PromptSpec, Share, Weight, check_labels
from protos.kcm.v1 import sample_pb2

LARGE_FILE = "large.json"
SCHEMA = 1


class LargeModel(Protocol):
    """Reads texts or images, gives one score per label.

    teacher_id names weights, head and temperature; prompt_id the templates, or how an image model fuses a hint ("none" where no hint is
    read and no prompt built).
    reads_hints: False means that hints given to `logits` are withheld from the model.
    """

    teacher_id: str
    prompt_id: str
    reads_hints: bool
    labels: tuple[str, ...]
    scores_kind: sample_pb2.Scores.Kind

    def logits(self, samples: Sequence[Payload], hints: Sequence[Hint | None]) -> Float32:
        """float32 [B, C] over `labels` in order. One caller at a time."""
        ...


@runtime_checkable
class ReadsAhead(LargeModel, Protocol):
    """A large model whose payloads cost time to read: a server reads them beside the model's thread.

    logits(samples, hints) is scores([read(sample) for each], hints).
    """

    def read(self, payload: Payload) -> Any:
        """What `scores` takes of one payload. Many callers at a time.

        Raises:
            ValueError: the payload can't be read; the message names none of its content.
        """
        ...

    def scores(self, ready: Sequence[Any], hints: Sequence[Hint | None]) -> Float32:
        """float32 [B, C], as `logits` gives it. One caller at a time."""
        ...


class LargeFile(msgspec.Struct, frozen=True, kw_only=True):
    """large.json, as training writes it.

    Of images: `model` is an ONNX file in the folder; `preprocess` is how it reads an image, with its own size and the limits;
    hint_weight is the weight of a hint as a prior over classes (kcm/fusion.py), 0: it reads none.
    Of "clip": `queries` are images or texts, and the gallery lies beside it (cloud_server/models/clip.py).
    """

    schema: int
    kind: Literal["encoder", "causal", "resnet", "bbn", "efficientnet-lite", "onnx", "clip"]
    model: str
    labels: tuple[str, ...]
    task_id: str
    large_id: str
    max_tokens: Annotated[int, msgspec.Meta(ge=8)] = 128
    hint_dropout: Share = 0.0
    temperature: Annotated[float, msgspec.Meta(gt=0.0)] = 1.0
    prompt: PromptSpec = PromptSpec()
    hint_weight: Weight = 0.0
    preprocess: PreprocessSpec = PreprocessSpec()
    queries: Literal["text", "image"] = "text"

    @property
    def modality(self) -> Literal["text", "image"]:
        if self.kind == "clip":
            return self.queries
        return "text" if self.kind in ("encoder", "causal") else "image"

    def weights(self, folder: Path) -> Path:
        """The folder of the model's weights: inside `folder`, fetched by name, or the user's own path.

        Raises:
            ConfigError: it isn't there, or holds no safetensors.
        """
        inside = folder / self.model
        path = inside if inside.is_dir() else model_path(self.model)
        if not any(path.glob("*.safetensors")):
            raise ConfigError(f"{path} holds no .safetensors file", fix="save the model with save_pretrained; pickled weights are not read")
        return path


def read_large(folder: Path) -> LargeFile:
    """large.json of `folder`.

    Raises:
        ConfigError: missing, unreadable, or of another schema.
    """
    path = folder / LARGE_FILE
    try:
        large = msgspec.json.decode(path.read_bytes(), type=LargeFile)
    except OSError as error:
        raise ConfigError(
            f"{folder} is no large model: {LARGE_FILE} can't be read ({error.strerror})",
            fix="kcm train-large --task TASK --out FOLDER   makes one",
        ) from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
    if large.schema != SCHEMA:
        raise ConfigError(f"{path} has schema {large.schema}, this kcm reads {SCHEMA}", fix="upgrade kcm on this server")
    check_labels(large.labels, str(path))
    if large.modality == "image" and large.preprocess.kind != "image":
        raise ConfigError(f'{path}: a model of kind {large.kind!r} needs [preprocess] kind "image", not {large.preprocess.kind!r}')
    return large


def load_large(folder: Path, *, threads: int = 1) -> LargeModel:
    """The large model of `folder`, in memory.

    Args:
        threads: of an image model; torch's are the process's own.

    Raises:
        ConfigError: a file is missing or doesn't fit the others.
        MissingExtraError: torch or transformers, or for images onnxruntime or Pillow, is missing.
    """
    large = read_large(folder)
    if large.modality == "image" and large.kind != "clip":
        require("PIL", "cloud")
        from cloud_server.models.image import ImageModel

        return ImageModel(folder, large, threads=threads)
    # Imported here: torch takes seconds, and the command line's help must not.
    for module in ("torch", "transformers", "safetensors"):
        require(module, "cloud")
    if large.kind == "clip":
        require("PIL", "cloud")
        from cloud_server.models.clip import ClipModel

        return ClipModel(folder, large)
    if large.kind == "encoder":
        from cloud_server.models.encoder import EncoderModel

        return EncoderModel(folder, large)
    from cloud_server.models.causal import CausalModel

    return CausalModel(folder, large)
