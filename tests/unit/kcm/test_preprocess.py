"""Text → ids: the same in every process and forever, since tables trained on them lie on devices."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_kit import tokenizer_json

import kcm.preprocess
from kcm.errors import BundleError
from kcm.preprocess import (
    GROUPS,
    PAIRS,
    NgramPreprocessor,
    TokenizerPreprocessor,
    batch_of,
    check_sums,
    load_preprocessor,
    longest_of,
)
from kcm.task import PreprocessSpec

SMALL = PreprocessSpec(buckets=256)
words = st.text("abcäß東1", min_size=1, max_size=6)
texts = st.one_of(st.text(max_size=80), st.lists(words, max_size=12).map(" ".join))

# Whoever changes one of these breaks every bundle that is out there: then the kind needs a new name.
EXACT = {
    "": ([342], [1.0], [], []),
    "a b a": ([270, 480, 496, 510], [1.0, 1.0, 1.0, 1.0], [67, 249], [1.693147, 1.0]),
}
# n-grams, words: how many, digest of the ids, sum of the weights
DIGESTS = {
    "Is my card lost, or is my card locked?": ((46, "370230a7ece34420", 57.0904), (6, "a257442f2710a05b", 8.0794)),
    "Grüße aus München – 東京タワー ½ ١٢٣ straße": ((65, "f63cc6eb11a4567d", 66.3863), (11, "de1d83de1c7493b4", 11)),
    "x" * 100: ((11, "889168a18eb57024", 21.832), (1, "7ef1a66a6691f55e", 1)),
    "the " * 50: ((8, "8dddb1aa419ed65a", 31.452), (1, "8fc25dcaea2a2fcc", 4.912)),
}


def digest(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("text", EXACT)
def test_ids_and_weights_of_short_texts_never_change(text: str) -> None:
    encoded = NgramPreprocessor(SMALL).encode(text)
    for got, want in zip(encoded, EXACT[text], strict=True):
        assert got == pytest.approx(want, abs=1e-6) and len(got) == len(want)
    assert [part.dtype for part in encoded] == [np.int32, np.float32] * 2


@pytest.mark.parametrize("text", DIGESTS)
def test_ids_of_longer_texts_never_change(text: str) -> None:
    ids, weights, words, word_weights = NgramPreprocessor(PreprocessSpec()).encode(text)
    for got, its, (length, wanted, total) in zip((ids, words), (weights, word_weights), DIGESTS[text], strict=True):
        assert (len(got), digest(got)) == (length, wanted)
        assert float(its.sum()) == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("seed", ["0", "4242"])
def test_another_process_gives_the_same_ids(seed: str) -> None:
    """Python's own hash is salted per process; ours must not be."""
    program = (
        "import sys, kcm.preprocess, kcm.task; p = kcm.preprocess.NgramPreprocessor(kcm.task.PreprocessSpec());"
        "i = p.batch(sys.argv[1:]); sys.stdout.buffer.write(b''.join(array.tobytes() for array in i.values()))"
    )
    given = list(DIGESTS)
    ours = NgramPreprocessor(PreprocessSpec()).batch(given)
    theirs = subprocess.run(
        [sys.executable, "-c", program, *given], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
    ).stdout
    assert theirs == b"".join(array.tobytes() for array in ours.values())


@given(st.lists(texts, min_size=1, max_size=6))
def test_a_batch_is_its_single_rows_padded_with_nothing(batch: list[str]) -> None:
    preprocessor = NgramPreprocessor(SMALL)
    inputs = preprocessor.batch(batch)
    assert tuple(inputs) == preprocessor.names and all(array.shape[1] >= 1 for array in inputs.values())
    assert inputs["ids"].shape == inputs["weights"].shape and inputs["words"].shape == inputs["word_weights"].shape
    for row, text in enumerate(batch):
        alone = preprocessor.batch([text])
        for name, encoded in zip(preprocessor.names, preprocessor.encode(text), strict=True):
            length = len(encoded)
            assert np.array_equal(inputs[name][row, :length], encoded) and np.array_equal(alone[name][0, :length], encoded)
            assert alone[name].shape == (1, max(1, length)) and not alone[name][0, length:].any()
            assert not inputs[name][row, length:].any()
            assert inputs[name].dtype == preprocessor.inputs[name].dtype
    assert np.array_equal(check_sums(inputs), np.concatenate([check_sums(preprocessor.batch([text])) for text in batch]))


@given(texts)
def test_each_id_appears_once_within_range_and_counts_all_occurrences(text: str) -> None:
    ids, weights, own, own_weights = NgramPreprocessor(SMALL).encode(text)
    assert len(ids) == len(set(ids.tolist())) >= 1 and len(own) == len(set(own.tolist()))
    assert ids.min() >= SMALL.buckets and ids.max() < GROUPS * SMALL.buckets
    assert own.min(initial=0) >= 0 and own.max(initial=0) < SMALL.buckets
    found = kcm.preprocess._WORD.findall(text.lower())
    grams = sum(max(0, len(word) + 3 - size) for word in found for size in (3, 4, 5) if size < len(word) + 2)
    occurrences = np.exp(weights.astype(float) - 1)
    assert occurrences.sum() == pytest.approx(len(found) + 1 + grams, rel=1e-4)
    assert np.exp(own_weights.astype(float) - 1).sum() == pytest.approx(len(found), rel=1e-4)
    pairs = (ids >= PAIRS * SMALL.buckets) & (ids < (PAIRS + 1) * SMALL.buckets)
    assert occurrences[pairs].sum() == pytest.approx(len(found) + 1, rel=1e-4)


@given(st.lists(words, min_size=1, max_size=30))
def test_a_full_word_cache_changes_nothing(many: list[str]) -> None:
    kept = kcm.preprocess._CACHED_WORDS
    fresh = NgramPreprocessor(SMALL).encode(" ".join(many))
    try:
        kcm.preprocess._CACHED_WORDS = 2
        cramped = NgramPreprocessor(SMALL)
        for _ in range(2):
            got = cramped.encode(" ".join(many))
            assert all(np.array_equal(one, other) for one, other in zip(got, fresh, strict=True))
        assert len(cramped._words) <= 2
    finally:
        kcm.preprocess._CACHED_WORDS = kept


def test_case_and_punctuation_say_nothing_but_order_does() -> None:
    encode = NgramPreprocessor(PreprocessSpec()).encode
    assert encode("Lost, CARD!")[0].tolist() == encode("lost card")[0].tolist()
    assert set(encode("card lost")[0].tolist()) != set(encode("lost card")[0].tolist())


def test_words_past_the_limit_are_cut() -> None:
    spec = PreprocessSpec(max_words=5)
    encode = NgramPreprocessor(spec).encode
    assert all(map(np.array_equal, encode("a b c d e"), encode("a b c d e f g")))
    assert encode("a b c d e").ids.tolist() != encode("a b c d").ids.tolist()
    assert encode("a b c d e").words.tolist() != encode("a b c d").words.tolist()


def test_a_blob_loses_ngrams_and_no_word() -> None:
    """Past the longest row that an engine is built for; the words behind it still count."""
    random = np.random.default_rng(0)
    text = " ".join("".join(random.choice(list("abcdefghijklmnop"), 40)) for _ in range(5))
    preprocessor = NgramPreprocessor(PreprocessSpec(max_words=5))
    found, longest = preprocessor.encode(text), longest_of(preprocessor)
    assert longest == {"ids": 100, "weights": 100, "words": 5, "word_weights": 5}
    assert (len(found.ids), len(found.words)) == (100, 5)
    assert batch_of([text], preprocessor)["ids"].shape == (1, 100)


def test_one_check_sum_tells_words_from_the_rest() -> None:
    inputs = NgramPreprocessor(SMALL).batch(["a b", "c"])
    swapped = {**inputs, "words": inputs["words"] + 1, "ids": inputs["ids"].copy()}
    swapped["ids"][:, 0] -= inputs["words"].shape[1]
    for changed in ({**inputs, "words": inputs["words"][::-1]}, {**inputs, "ids": inputs["ids"] + 1}, swapped):
        assert (check_sums(changed) != check_sums(inputs)).all()
    assert (check_sums({**inputs, "weights": inputs["weights"] * 2}) == check_sums(inputs)).all(), "floats round elsewhere"


@pytest.mark.parametrize("text", ["lorem ipsum " * 83_334, "x" * 10**6, "🙂" * 10**6, "a," * 500_000])
def test_a_million_characters_cost_little(text: str) -> None:
    """Whoever sends a book must not stop the device. Processor time: other processes don't count."""
    preprocessor = NgramPreprocessor(PreprocessSpec())
    began = time.process_time()
    ids = preprocessor.encode(text).ids
    assert time.process_time() - began < 1.0
    assert len(ids) < 20_000


@pytest.mark.parametrize("preprocessor", [NgramPreprocessor(SMALL), TokenizerPreprocessor(PreprocessSpec(), tokenizer_json())])
def test_an_image_is_refused(preprocessor: NgramPreprocessor) -> None:
    with pytest.raises(ValueError, match="image"):
        preprocessor.batch(["text", b"\x89PNG"])


def test_the_word_bucket_is_the_words_own_id() -> None:
    preprocessor = NgramPreprocessor(SMALL)
    assert preprocessor.encode("refund").words.tolist() == [preprocessor.word_bucket("refund")]


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(BundleError, match="power of two"):
        NgramPreprocessor(PreprocessSpec(buckets=1000))
    tokens = PreprocessSpec(kind="tokenizer", tokenizer="tokenizer.json")
    with pytest.raises(BundleError, match="isn't there"):
        load_preprocessor(tokens, {})
    with pytest.raises(BundleError, match="can't be read"):
        load_preprocessor(tokens, {"tokenizer.json": b"{}"})


def test_tokens_are_cut_and_padded() -> None:
    preprocessor = load_preprocessor(PreprocessSpec(kind="tokenizer", max_tokens=3), {"tokenizer.json": tokenizer_json()})
    inputs = preprocessor.batch(["oil steel profit rose", "oil", ""])
    assert inputs["input_ids"].shape == (3, 3)
    assert inputs["attention_mask"].sum(1).tolist() == [3, 1, 0]
    assert preprocessor.batch([""])["input_ids"].shape == (1, 1)


@pytest.mark.parametrize(("one", "other"), [("我的卡被锁了", "我的卡丢了"), ("カードが使えない", "カードを失くした"), ("ok 😀", "ok 😡")])
def test_scripts_without_spaces_and_emoji_share_what_they_share(one: str, other: str) -> None:
    """Each such character is a word: two sentences meet in the ones they have in common, and only there."""
    preprocessor = NgramPreprocessor(PreprocessSpec())
    words = [set(preprocessor.encode(text).words.tolist()) for text in (one, other)]
    assert words[0] & words[1] == {preprocessor.word_bucket(c) for c in (set(one) & set(other)) - set("ok ")} | (
        {preprocessor.word_bucket("ok")} if one.startswith("ok") else set()
    )
    assert words[0] - words[1]
