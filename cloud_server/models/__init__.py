"""Large models: what they have in common, and how a folder becomes one.

A folder holds large.json and, for an encoder, head.safetensors; the weights of the model itself lie where
kcm.assets.model_path finds them, or inside the folder. Safetensors only, nothing fetched, no code from a folder run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

import msgspec

from kcm.assets import model_path
from kcm.errors import ConfigError, require
from kcm.sample import Float32, Hint
from kcm.task import PromptSpec, Share, check_labels
from protos.kcm.v1 import sample_pb2

LARGE_FILE = "large.json"
SCHEMA = 1


class LargeModel(Protocol):
    """Reads texts, gives one score per label.

    teacher_id names weights, head and temperature; prompt_id the templates ("none" where no hint is read and no prompt built).
    reads_hints: False means that hints given to `logits` are withheld from the model.
    """

    teacher_id: str
    prompt_id: str
    reads_hints: bool
    labels: tuple[str, ...]
    scores_kind: sample_pb2.Scores.Kind

    def logits(self, samples: Sequence[str], hints: Sequence[Hint | None]) -> Float32:
        """float32 [B, C] over `labels` in order. One caller at a time."""
        ...


class LargeFile(msgspec.Struct, frozen=True, kw_only=True):
    """large.json, as training writes it."""

    schema: int
    kind: Literal["encoder", "causal"]
    model: str
    labels: tuple[str, ...]
    task_id: str
    large_id: str
    max_tokens: Annotated[int, msgspec.Meta(ge=8)] = 128
    hint_dropout: Share = 0.0
    temperature: Annotated[float, msgspec.Meta(gt=0.0)] = 1.0
    prompt: PromptSpec = PromptSpec()

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
    return large


def load_large(folder: Path) -> LargeModel:
    """The large model of `folder`, in memory.

    Raises:
        ConfigError: a file is missing or doesn't fit the others.
        MissingExtraError: torch or transformers is missing.
    """
    large = read_large(folder)
    # Imported here: torch takes seconds, and the command line's help must not.
    for module in ("torch", "transformers", "safetensors"):
        require(module, "cloud")
    if large.kind == "encoder":
        from cloud_server.models.encoder import EncoderModel

        return EncoderModel(folder, large)
    from cloud_server.models.causal import CausalModel

    return CausalModel(folder, large)
