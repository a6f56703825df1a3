"""Payload → the small model's inputs: the one implementation that training, edge and cloud share.

"ngrams" hashes words, word pairs and character n-grams of each word into buckets; "tokenizer" runs a tokenizer.json; "image" is in
kcm/images.py.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kcm.errors import BundleError, require
from kcm.sample import Tensors
from kcm.task import PreprocessSpec

Inputs = dict[str, NDArray[Any]]

# Scripts that put no space between words, and emoji: each character is a word, and pairs of them are word pairs.
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u2600-\u27bf\U0001f300-\U0001faff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")  # "what's" → what, s: contractions then meet known words
_CACHED_WORDS = 50_000  # per-word ids kept; about 40 MB at worst, and a device sees far fewer words
_IDS_PER_WORD = 20  # on the whole of a text at most: English has about 15, only blobs and hashes have more
_LONGEST_WORD = 40  # characters of a word that become n-grams; the rest of a URL or a blob says little
WORDS, PAIRS, GRAMS = range(3)  # the three groups of buckets; a group's ids begin at group · buckets
GROUPS = 3
_START, _END = 0x9E37, 0x1234567  # stand for the neighbours that a first and a last word lack


_UNSIGNED: dict[np.dtype[Any], np.dtype[Any]] = {np.dtype(np.int32): np.dtype(np.uint32), np.dtype(np.int64): np.dtype(np.uint64)}


class InputSpec(NamedTuple):
    """One input of the graph, [B, L] with L ≤ `longest`; inputs with one `longest` share their L.

    Its values are below `limit`, and not negative, where there is one. With a `shape` it is [B, *shape], and `longest` says nothing.
    """

    dtype: np.dtype[Any]
    longest: int
    limit: int | None = None
    shape: tuple[int, ...] | None = None


class Preprocessor(Protocol):
    """Payloads → the graph's inputs by name, each padded to the longest of the batch."""

    @property
    def inputs(self) -> Mapping[str, InputSpec]: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    def batch(self, payloads: Sequence[str | bytes]) -> Inputs:
        """Raises ValueError for a payload of another modality."""
        ...


def batch_of(payloads: Sequence[str | bytes | Tensors], preprocessor: Preprocessor) -> Inputs:
    """The graph's inputs [B, L] of any mixture of payloads.

    Raises:
        ValueError: a payload of another modality, or tensors that the graph can't read.
    """
    if not any(isinstance(payload, Tensors) for payload in payloads):
        return preprocessor.batch(payloads)  # type: ignore[arg-type]
    rows: list[Mapping[str, Any]] = [
        payload.inputs if isinstance(payload, Tensors) else {name: array[0] for name, array in preprocessor.batch([payload]).items()}
        for payload in payloads
    ]
    for row in rows:
        if row.keys() != preprocessor.inputs.keys():
            raise ValueError(f"tensors {', '.join(sorted(row)) or 'none'} given, the graph reads {', '.join(preprocessor.inputs)}")
    inputs: Inputs = {}
    lengths: dict[int, tuple[str, list[int]]] = {}
    for name, spec in preprocessor.inputs.items():
        if spec.shape is not None:
            inputs[name] = np.stack([_shaped(name, row[name], spec.dtype, spec.shape) for row in rows])
            continue
        arrays = [_array(name, row[name], spec.dtype) for row in rows]
        found = list(map(len, arrays))
        if spec.longest not in lengths:
            if not 0 < min(found) <= max(found) <= spec.longest:
                raise ValueError(f"tensor {name!r} has {max(found)} values, 1 to {spec.longest} are taken")
            lengths[spec.longest] = name, found
        elif lengths[spec.longest][1] != found:
            raise ValueError(f"tensor {name!r} has another length than {lengths[spec.longest][0]!r}")
        whole = _padded(arrays, spec.dtype)
        # A look-up beyond a table's end is an error in one runtime and foreign memory in another. Unsigned: negative ones are large.
        if spec.limit is not None and int(np.maximum.reduce(whole.view(_UNSIGNED[spec.dtype]), axis=None)) >= spec.limit:
            raise ValueError(f"tensor {name!r} has a value outside 0..{spec.limit - 1}")
        # One product tells in a microsecond; it may overflow where all is well, and then each is looked at.
        if spec.dtype.kind == "f" and not math.isfinite(np.vdot(whole, whole)) and not np.isfinite(whole).all():
            raise ValueError(f"tensor {name!r} has a value that is no finite number")
        inputs[name] = whole
    return inputs


def longest_of(preprocessor: Preprocessor) -> dict[str, int]:
    """The largest L of each input, in order, or the size of one whose shape is fixed: what a bundle's manifest says of its graph."""
    return {name: spec.shape[0] if spec.shape else spec.longest for name, spec in preprocessor.inputs.items()}


def check_sums(inputs: Inputs) -> NDArray[np.int64]:
    """One number for each row of a batch, [B], over its inputs of whole numbers: preprocessing elsewhere must give the same."""
    whole = [array for array in inputs.values() if array.dtype.kind in "iu"]
    sums = [place * array.reshape(len(array), -1).sum(1, dtype=np.int64) for place, array in enumerate(whole, 1)]
    total: NDArray[np.int64] = np.sum(sums, axis=0, dtype=np.int64)
    return total


def _padded(arrays: Sequence[NDArray[Any]], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Rows as one array [B, L], zeros behind the shorter ones; L >= 1, since graphs need that."""
    if len(arrays) == 1 and len(arrays[0]):
        return arrays[0][None]  # no copy
    found = [len(array) for array in arrays]
    longest = max(found, default=0) or 1
    if found and min(found) == longest:
        return np.stack(arrays)
    whole = np.zeros((len(arrays), longest), dtype)
    for row, array in zip(whole, arrays, strict=True):
        row[: len(array)] = array
    return whole


def _array(name: str, given: NDArray[Any] | bytes, dtype: np.dtype[Any]) -> NDArray[Any]:
    if isinstance(given, bytes):
        if len(given) % dtype.itemsize:
            raise ValueError(f"tensor {name!r} has {len(given)} bytes, no whole number of {dtype}")
        return np.frombuffer(given, dtype.newbyteorder("<"))
    if not isinstance(given, np.ndarray) or given.ndim != 1 or given.dtype != dtype:
        what = f"{given.dtype} {list(given.shape)}" if isinstance(given, np.ndarray) else type(given).__name__
        raise ValueError(f"tensor {name!r} is {what}, the graph reads one row of {dtype}")
    return given


def _shaped(name: str, given: NDArray[Any] | bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """A row of fixed shape: an array of it, or the same values flat."""
    if isinstance(given, np.ndarray) and given.dtype == dtype and given.shape == shape:
        return given
    flat = _array(name, given, dtype)
    if flat.size != math.prod(shape):
        raise ValueError(f"tensor {name!r} has {flat.size} values, {' × '.join(map(str, shape))} are taken")
    return flat.reshape(shape)


def load_preprocessor(spec: PreprocessSpec, files: Mapping[str, bytes]) -> Preprocessor:
    """The preprocessor of a task; `files` holds tokenizer.json where one is used.

    Raises:
        BundleError: tokenizer.json is missing or can't be read.
    """
    if spec.kind == "ngrams":
        return NgramPreprocessor(spec)
    if spec.kind == "image":
        from kcm.images import ImagePreprocessor  # it needs Pillow, and this module

        return ImagePreprocessor(spec)
    if "tokenizer.json" not in files:
        raise BundleError("the task's preprocessing needs tokenizer.json, which isn't there")
    return TokenizerPreprocessor(spec, files["tokenizer.json"])


class Encoded(NamedTuple):
    """One text: word pairs and character n-grams [L], L >= 1, and its words [W], each id once, weights = 1 + ln(count)."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    words: NDArray[np.int32]
    word_weights: NDArray[np.float32]


class NgramPreprocessor:
    """Hashed words, and hashed word pairs and character n-grams of `<word>`: inputs as in `Encoded`.

    Words are inputs of their own, since they alone have vectors: those are looked up for twenty ids and not for two hundred. Padding
    has id 0 and weight 0. Buckets come from CRC-32, the same on every machine and in every process. What a word alone gives is cached,
    so a warm sentence costs a look-up per word.
    """

    names = Encoded._fields

    def __init__(self, spec: PreprocessSpec) -> None:
        if spec.buckets & (spec.buckets - 1):
            raise BundleError(f"[preprocess] buckets {spec.buckets} is not a power of two")
        self._spec, self._mask, self._longest = spec, spec.buckets - 1, spec.max_words * _IDS_PER_WORD
        ids, weights = np.dtype(np.int32), np.dtype(np.float32)
        self.inputs = {
            "ids": InputSpec(ids, self._longest, GROUPS * spec.buckets),
            "weights": InputSpec(weights, self._longest),
            "words": InputSpec(ids, spec.max_words, spec.buckets),
            "word_weights": InputSpec(weights, spec.max_words),
        }
        self._words: dict[str, tuple[int, list[int]]] = {}

    def batch(self, payloads: Sequence[str | bytes]) -> Inputs:
        rows = [self.encode(as_text(payload)) for payload in payloads]
        if len(rows) == 1 and len(rows[0].words):  # nothing to pad
            return {name: part[None] for name, part in zip(self.names, rows[0], strict=True)}
        return {name: _padded([row[place] for row in rows], spec.dtype) for place, (name, spec) in enumerate(self.inputs.items())}

    def encode(self, text: str) -> Encoded:
        """What one text holds; an empty one has no word, and the pair start–end."""
        buckets, mask = self._spec.buckets, self._mask
        keys: list[int] = []
        words: list[int] = []
        last = _START
        for word in _WORD.findall(text.lower())[: self._spec.max_words]:
            crc, grams = self._words.get(word) or self._remember(word)
            words.append(crc & mask)
            keys += grams
            keys.append(PAIRS * buckets + (_mix(last, crc) & mask))
            last = crc
        keys.append(PAIRS * buckets + (_mix(last, _END) & mask))
        return Encoded(*_counted(keys[: self._longest]), *_counted(words))

    @property
    def buckets(self) -> int:
        """Buckets of one group."""
        return self._spec.buckets

    def word_bucket(self, word: str) -> int:
        """The id of a word, lower case: where its row lies in a table of word vectors."""
        return zlib.crc32(word.encode()) & self._mask

    def _remember(self, word: str) -> tuple[int, list[int]]:
        """(CRC of the word, ids of its character n-grams)."""
        spec, marked = self._spec, f"<{word[:_LONGEST_WORD]}>"
        crc = zlib.crc32(word.encode())
        grams: list[int] = []
        for size in range(spec.char_min, min(spec.char_max, len(marked) - 1) + 1):
            for start in range(len(marked) - size + 1):
                gram = zlib.crc32(marked[start : start + size].encode(), size)
                grams.append(GRAMS * spec.buckets + (gram & self._mask))
        if len(self._words) >= _CACHED_WORDS:
            self._words.clear()
        self._words[word] = crc, grams
        return crc, grams


class TokenizerPreprocessor:
    """A tokenizer.json: input_ids and attention_mask int64 [B, L], truncated to max_tokens."""

    names = ("input_ids", "attention_mask")

    def __init__(self, spec: PreprocessSpec, tokenizer_json: bytes) -> None:
        tokenizers = require("tokenizers", "edge")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"tokenizer.json can't be read: {error}") from error
        kind = np.dtype(np.int64)
        ids = InputSpec(kind, spec.max_tokens, self._tokenizer.get_vocab_size())
        self.inputs = {"input_ids": ids, "attention_mask": InputSpec(kind, spec.max_tokens)}
        self._tokenizer.enable_truncation(spec.max_tokens)
        self._tokenizer.enable_padding()

    def batch(self, payloads: Sequence[str | bytes]) -> Inputs:
        encoded = self._tokenizer.encode_batch([as_text(p) for p in payloads])
        inputs = {
            "input_ids": np.array([e.ids for e in encoded], dtype=np.int64),
            "attention_mask": np.array([e.attention_mask for e in encoded], dtype=np.int64),
        }
        if inputs["input_ids"].size or not encoded:
            return inputs
        # Empty texts and no special tokens: one token of padding, since graphs need L >= 1.
        return {name: np.zeros((len(encoded), 1), np.int64) for name in self.names}


def _counted(keys: list[int]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Each id once, and 1 + ln(how often)."""
    counts = Counter(keys)
    ids = np.fromiter(counts, np.int32, len(counts))
    if len(counts) == len(keys):
        return ids, np.ones(len(ids), np.float32)
    return ids, 1 + np.log(np.fromiter(counts.values(), np.float32, len(counts)))


def _mix(first: int, second: int) -> int:
    """A pair's hash: odd multipliers, then the high bits, since the low ones of a product mix least."""
    return (first * 0x9E3779B1 ^ second * 0x85EBCA6B) >> 7


def as_text(payload: str | bytes) -> str:
    """Raises ValueError where the payload isn't text."""
    if not isinstance(payload, str):
        raise ValueError("this task reads text, the payload is an image")
    return payload


def as_image(payload: str | bytes) -> bytes:
    """Raises ValueError where the payload isn't the bytes of an image file."""
    if not isinstance(payload, bytes):
        raise ValueError("this task reads images, the payload is text")
    return payload
