"""A Task: modality, labels, data files, preprocessing, small model, judge, large model, prompt, cost. Read from task.toml."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from kcm.config import convert, read_toml
from kcm.errors import ConfigError
from kcm.policy import DEFAULT_EPSILON

Positive = Annotated[int, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]


class DataSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Files of `text,label` (CSV, JSONL or Parquet), relative to task.toml. Only train is needed to begin.

    train: the edge's own labels. large_train: the large model's, disjoint from the stream. stream: what reaches the devices;
    labels in it are withheld. calibration: labels kept back to choose ε. test: read by reports alone.
    """

    train: str = ""
    large_train: str = ""
    stream: str = ""
    calibration: str = ""
    test: str = ""
    text_column: str = "text"
    label_column: str = "label"


class PreprocessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How text becomes ids. "ngrams": hashed words, word pairs and character n-grams. "tokenizer": a tokenizer.json."""

    kind: Literal["ngrams", "tokenizer"] = "ngrams"
    buckets: Positive = 2**18
    char_min: Positive = 3
    char_max: Positive = 5
    max_words: Positive = 400
    tokenizer: str = ""
    max_tokens: Positive = 128


class SmallSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The small model. "ngrams": ours. "encoder": a Hugging Face folder. "onnx": the user's graph with named logits.

    vectors: the encoder that gives "ngrams" its static word vectors (a fetched model or a folder); "" for none.
    """

    kind: Literal["ngrams", "encoder", "onnx"] = "ngrams"
    path: str = ""
    vectors: str = "minilm"
    vector_size: Positive = 256
    logits: str = "logits"


class JudgeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The judge. "kan", or the equal-parameter "mlp" of the paper's ablation (MCM).

    hidden: width between two KAN layers; 0 is one layer, an additive model whose every curve can be read. degree 1: fast mode.
    """

    kind: Literal["kan", "mlp"] = "kan"
    ranks: Positive = 5
    hidden: Annotated[int, msgspec.Meta(ge=0)] = 0
    grid: Annotated[int, msgspec.Meta(ge=2, le=8)] = 5
    degree: Literal[1, 3] = 3
    epsilon: Share = DEFAULT_EPSILON
    folds: Annotated[int, msgspec.Meta(ge=2)] = 5


class LargeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The large model. "encoder": a transformers encoder with a trained head. "causal": a language model that scores labels."""

    kind: Literal["encoder", "causal"] = "encoder"
    model: str = "minilm"
    max_tokens: Positive = 128
    hint_dropout: Share = 0.0


class DistillSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A distillation round. Each term can be switched off by its weight.

    teacher_weight: of L_ls, on teacher logits whose max C_l > teacher_epsilon; "auto" is the lowest at which the large model is
    no worse than the small one on labelled samples, and 0 where it can't be asked about them.
    judge_weight: of L_js, on labelled samples whose C_x > judge_epsilon.
    direction: "forward" KL(C ‖ F_s), or the seed's "reverse" KL(F_s ‖ C), for L_ls.
    """

    temperature: Annotated[float, msgspec.Meta(gt=0.0)] = 1.0
    label_weight: Annotated[float, msgspec.Meta(ge=0.0)] = 1.0
    teacher_weight: Annotated[float, msgspec.Meta(ge=0.0)] = 1.0
    teacher_epsilon: Share | Literal["auto"] = "auto"
    judge_weight: Annotated[float, msgspec.Meta(ge=0.0)] = 0.1
    judge_epsilon: Share = DEFAULT_EPSILON
    direction: Literal["forward", "reverse"] = "forward"


class PromptSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Templates. {text}, {label}, {hint}, {labels} are filled in; a hint is always label names, never device text."""

    template: str = "{hint}Text: {text}\nTopic:"
    hint: str = "A small model suggests: {candidates}.\n"
    label: str = " {label}"


class CostSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Money per sample that the small model reads, and per call of the large one, in one unit."""

    cloud_call: Annotated[float, msgspec.Meta(ge=0.0)] = 1.0
    local_call: Annotated[float, msgspec.Meta(ge=0.0)] = 0.0


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that edge, cloud and trainer must agree on. Labels are ordered: a label's id is its place."""

    id: str
    labels: tuple[str, ...]
    modality: Literal["text"] = "text"
    data: DataSpec = DataSpec()
    preprocess: PreprocessSpec = PreprocessSpec()
    small: SmallSpec = SmallSpec()
    judge: JudgeSpec = JudgeSpec()
    large: LargeSpec = LargeSpec()
    distill: DistillSpec = DistillSpec()
    prompt: PromptSpec = PromptSpec()
    cost: CostSpec = CostSpec()
    root: str = "."

    @property
    def label_space(self) -> str:
        return label_space(self.labels)

    def path(self, relative: str) -> Path:
        """A path of task.toml, made absolute by the file's own folder."""
        return Path(self.root) / relative

    def shipped(self) -> dict[str, Any]:
        """The tables of task.toml as a bundle carries them: no data files, no path of the machine that trained."""
        tables: dict[str, Any] = msgspec.to_builtins(self)
        for table, key in (("small", "path"), ("small", "vectors"), ("large", "model")):
            tables[table][key] = Path(tables[table][key]).name
        del tables["root"], tables["data"]
        head = {key: tables.pop(key) for key in ("id", "modality", "labels")}
        return {"task": head, **tables}


def label_space(labels: tuple[str, ...]) -> str:
    """A short hash of the ordered labels: peers compare it before they trust an id."""
    return hashlib.sha256("\x00".join(labels).encode()).hexdigest()[:16]


def load_task(path: Path) -> Task:
    """Read task.toml, or the folder that holds one.

    Raises:
        ConfigError: missing, not TOML, an unknown key, a wrong type, fewer than two labels, or a label twice.
    """
    if path.is_dir():
        path = path / "task.toml"
    if not path.exists():
        raise ConfigError(f"{path} does not exist", fix="kcm init DIR --train FILE.csv   (or: kcm fetch r52)")
    return parse_task(read_toml(path), str(path), root=str(path.parent.resolve()))


def parse_task(values: dict[str, Any], where: str, root: str = ".") -> Task:
    """The Task of a parsed task.toml: [task] holds id, modality and labels, the other tables their structs."""
    values = dict(values)
    head = values.pop("task", None)
    if not isinstance(head, dict):
        raise ConfigError(f"{where}: table [task] with id and labels is missing")
    if clash := sorted(set(head) & set(values) | set(head) & {"root"}):
        raise ConfigError(f"{where}: [task] has an unknown key {clash[0]!r}")
    task = convert({**head, **values, "root": root}, Task, where)
    check_labels(task.labels, where)
    if not task.id or not task.id.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ConfigError(f"{where}: task id {task.id!r} must be letters, digits, '-', '_' and '.'")
    if (task.small.kind, task.preprocess.kind) in (("ngrams", "tokenizer"), ("encoder", "ngrams")):
        fix = 'small kind "ngrams" reads preprocess kind "ngrams", "encoder" reads "tokenizer"'
        raise ConfigError(f"{where}: a small model of kind {task.small.kind!r} can't read {task.preprocess.kind!r} preprocessing", fix=fix)
    if task.preprocess.char_min > task.preprocess.char_max:
        raise ConfigError(f"{where}: [preprocess] char_min {task.preprocess.char_min} is above char_max {task.preprocess.char_max}")
    return task


def check_labels(labels: tuple[str, ...], where: str) -> None:
    """Raises ConfigError where a task can't be learnt: one class, a label twice, an empty name."""
    if len(labels) < 2:
        raise ConfigError(f"{where}: {len(labels)} label(s); a task needs at least two classes")
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ConfigError(f"{where}: label {twice!r} appears twice")
    if any(not label.strip() for label in labels):
        raise ConfigError(f"{where}: a label is empty")
