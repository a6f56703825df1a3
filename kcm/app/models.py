"""Joining the packages: a task's small model with its word vectors, and its large model in process."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kcm.app.folders import writable
from kcm.assets import cache_dir, model_path
from kcm.errors import ConfigError, require
from kcm.preprocess import as_text
from kcm.sample import Payload
from kcm.task import Task

if TYPE_CHECKING:
    from cloud_server.models import LargeModel
    from training.data import Split
    from training.ngrams import WordVectors
    from training.small import Small

Float32 = NDArray[np.float32]
Progress = Callable[[str], None]


def one_thread() -> None:
    """PyTorch on one thread: on busy cores more are slower, many times so."""
    require("torch", "train").set_num_threads(1)


def load_small_kind(task: Task, progress: Progress) -> Small:
    """The trainer of the task's kind of small model.

    Raises:
        ConfigError: the encoder that gives word vectors, or the user's model, isn't there.
    """
    if task.small.kind == "encoder":
        from training.encoder import Encoder

        return Encoder(task)
    if task.small.kind == "onnx":
        from training.fixed import Fixed
        from training.fixed_images import FixedImages

        return (FixedImages if task.preprocess.kind == "image" else Fixed)(task)
    if task.small.kind in ("resnet", "efficientnet-lite"):
        from training.vision import load_vision

        return load_vision(task, progress)
    if task.small.kind == "dual":
        from training.retrieval import load_dual

        return load_dual(task, lambda: word_vectors(task, progress), lambda texts: _captions(task, texts))
    from training.small import Ngrams

    # Only fitting needs the vectors: a run that is calibrated, exported or verified holds its own.
    return Ngrams(task, (lambda: word_vectors(task, progress)) if task.small.vectors else None)


def _captions(task: Task, texts: Sequence[str]) -> Float32:
    """Embeddings [N, D] by the encoder that also gives the small model its word vectors."""
    from cloud_server.models.encoder import Encoder

    return Encoder(model_path(task.small.vectors, task.root), task.large.max_tokens).embed(texts)


def word_vectors(task: Task, progress: Progress) -> WordVectors:
    """Static vectors of the words that an encoder's tokenizer knows whole; made once per encoder, kept in the cache."""
    from kcm.preprocess import NgramPreprocessor
    from training.ngrams import distil_words

    folder = model_path(task.small.vectors, task.root)
    file = cache_dir() / "word-vectors" / f"{_identity(folder)}.npz"
    if not file.exists():
        from cloud_server.models.encoder import Encoder

        writable(file.parent)
        words = _vocabulary(folder)
        progress(f"word vectors: {len(words)} words through {folder.name}, once")
        vectors = Encoder(folder, max_tokens=16).embed(words)
        file.parent.mkdir(parents=True, exist_ok=True)
        building = file.with_suffix(".building")
        with building.open("wb") as out:
            np.savez(out, words=np.array(words), vectors=vectors.astype(np.float16))
        building.rename(file)
    with np.load(file, allow_pickle=False) as stored:
        table = dict(zip(stored["words"].tolist(), stored["vectors"].astype(np.float32), strict=True))

    def embed(words: list[str]) -> Float32:
        return np.stack([table[word] for word in words])

    return distil_words(list(table), embed, NgramPreprocessor(task.preprocess), task.small.vector_size)


def _identity(folder: Path) -> str:
    """A hash over name, size and the first and last bytes of the weights, and the tokenizer: cheap, and enough for a cache."""
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.name}\x00{path.stat().st_size}".encode() + file.read(2**16))
            file.seek(-min(2**16, path.stat().st_size), 2)
            digest.update(file.read())
    return digest.hexdigest()[:16]


def _vocabulary(folder: Path) -> list[str]:
    """Whole words of tokenizer.json, lower case, in a fixed order; word pieces are left out."""
    try:
        vocabulary: Any = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ConfigError(f"{folder} has no readable tokenizer.json: {error}", fix='set vectors = "" under [small]') from error
    entries = vocabulary if isinstance(vocabulary, dict) else [entry[0] for entry in vocabulary]
    whole = {entry.lstrip("▁Ġ").lower() for entry in entries if not entry.startswith("##")}
    return sorted(word for word in whole if re.fullmatch(r"[^\W_]+", word))


def large_logits(folder: Path, split: Split, progress: Progress) -> Float32:
    """The large model's logits [N, C] for labelled samples, without a hint."""
    from cloud_server.models import load_large

    progress(f"large model: {len(split)} labelled samples")
    return load_large(folder).logits(split.payloads, [None] * len(split))


class LargeInProcess:
    """A task's large model here, without a server: fit its head where it has one, and answer with each sample computed once."""

    def __init__(self, task: Task, folder: Path, train: Split | None, progress: Progress, *, hints: bool = True) -> None:
        """Fit (encoder, images) or describe (causal, onnx) the large model in `folder`.

        With hint dropout, a share 1 − hint_dropout of the rows is read with the hint that a small model gives it, fitted on the
        edge's labels, as it would at run time; else the head never sees a hint, and the cloud withholds them. An image model's
        weight of a hint is fitted where `hints` says so.

        Raises:
            ConfigError: the model's weights aren't there.
            DataError: too few images, one that can't be decoded, or a fit that diverges.
        """
        from training.large_head import fit_head, save_large

        self.folder, self._known = folder, dict[Payload, Float32]()
        if task.large.kind == "encoder":
            from cloud_server.models.encoder import Encoder

            assert train is not None
            encoder = Encoder(model_path(task.large.model, task.root), task.large.max_tokens)
            pairs = hint_texts(task, train, progress) if task.large.hint_dropout > 0 else None
            head = fit_head(self._embed(encoder, train.payloads, progress, pairs), train.y, len(task.labels))
            save_large(folder, task, head)
            self._answer: Callable[[Sequence[Payload]], Float32] = lambda payloads: head.logits(self._embed(encoder, payloads, progress))
        else:
            from cloud_server.models import load_large

            if task.gallery.file:
                from kcm.app.large_retrieval import make_large_retrieval

                make_large_retrieval(task, folder, train, progress, hints=hints)
            elif task.large.kind == "onnx":
                from kcm.app.large_images import describe_graph

                describe_graph(task, folder, train, progress, hints=hints)
            elif task.modality == "image":
                from kcm.app.large_images import make_large_images

                assert train is not None
                make_large_images(task, folder, train, progress, hints=hints)
            else:
                save_large(folder, task, None)
            model = load_large(folder)
            self._answer = lambda payloads: _asked(model, payloads, progress)

    @classmethod
    def of(cls, task: Task, folder: Path, progress: Progress) -> LargeInProcess:
        """The large model that `kcm train-large` made in `folder`.

        Raises:
            ConfigError: there is none, or it is of other labels.
        """
        from cloud_server.models import load_large

        model = load_large(folder)
        if model.labels != task.labels:
            raise ConfigError(f"{folder} has other labels than task {task.id}", fix="kcm train-large --task TASK --out FOLDER")
        made = cls.__new__(cls)
        made.folder, made._known = folder, {}
        made._answer = lambda payloads: _asked(model, payloads, progress)
        return made

    def logits(self, payloads: Sequence[Payload]) -> Float32:
        """[N, C], without a hint."""
        from training.data import identity, taken

        keys, missing = list(map(identity, payloads)), dict[Payload, int]()
        for row, key in enumerate(keys):
            if key not in self._known:
                missing.setdefault(key, row)
        if missing:
            self._known.update(zip(missing, self._answer(taken(payloads, list(missing.values()))), strict=True))
        return np.stack([self._known[key] for key in keys])

    @staticmethod
    def _embed(encoder: Any, payloads: Sequence[Payload], progress: Progress, pairs: Sequence[str | None] | None = None) -> Float32:
        """Embeddings [N, D], with a word on progress every thousand texts."""
        parts, texts = [], [as_text(payload) for payload in payloads]
        for start in range(0, len(texts), 1000):
            if len(texts) > 1000:
                progress(f"large model: {start} of {len(texts)} texts")
            chosen = slice(start, start + 1000)
            parts.append(encoder.embed(texts[chosen], None if pairs is None else pairs[chosen]))
        return np.concatenate(parts)


def _asked(model: LargeModel, payloads: Sequence[Payload], progress: Progress) -> Float32:
    """Logits [N, C] without hints, with a word on progress every thousand samples."""
    parts = []
    for start in range(0, len(payloads), 1000):
        if len(payloads) > 1000:
            progress(f"large model: {start} of {len(payloads)} samples")
        chosen = payloads[start : start + 1000]
        parts.append(model.logits(chosen, [None] * len(chosen)))
    return np.concatenate(parts)


def unseen_predictions(task: Task, split: Split, progress: Progress, seed: int = 0) -> tuple[Float32, Float32]:
    """Logits [N, C] and C_x [N] for a split by a small model on the edge's labels: out of fold for rows that are among these."""
    from training.data import identity, load_split
    from training.fit import fit
    from training.program import labelled_examples

    own = load_split(task, "train")
    kind = load_small_kind(task, progress)
    fitted = fit(task, kind, labelled_examples(task, kind, own), seed=seed, progress=progress)
    predictions = kind.predict(fitted.small, kind.featurise(split.payloads))
    place = {identity(payload): i for i, payload in enumerate(own.payloads)}
    found = [(row, place[key]) for row, key in enumerate(map(identity, split.payloads)) if key in place]
    if found:
        rows, places = map(list, zip(*found, strict=True))
        predictions.logits[rows] = fitted.out_of_fold.logits[places]
    return predictions.logits, fitted.judge.confidence(predictions)


def hint_texts(task: Task, train: Split, progress: Progress, seed: int = 0) -> list[str | None]:
    """For each of the large model's rows the hint's sentence, or None where dropout left it out.

    One kept in two is the small model's answer, the others are its candidates: a head that saw one form alone reads the other worse
    (an assertion, on R52: 85.6 % after candidates alone, 86.6 % after both, which costs candidates nothing).
    The hints come from a small model that hadn't seen the row: fitted on the edge's labels, out of fold for those.
    """
    from cloud_server.prompt import Prompt
    from kcm.app.hint import hints_by_arm

    hints = hints_by_arm(*unseen_predictions(task, train, progress, seed))
    prompt = Prompt(task.prompt, task.labels)
    rng = np.random.default_rng(seed)
    kept, alone = rng.random(len(train)) >= task.large.hint_dropout, rng.random(len(train)) < 0.5
    drawn = [
        hints["assertion" if one else "candidates"][row] if keep else None for row, (keep, one) in enumerate(zip(kept, alone, strict=True))
    ]
    return [prompt.hint(hint).strip() or None for hint in drawn]
