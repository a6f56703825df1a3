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
from kcm.preprocess import GROUPS, PAIRS, NgramPreprocessor, TokenizerPreprocessor, load_preprocessor
from kcm.task import PreprocessSpec

SMALL = PreprocessSpec(buckets=256)
words = st.text("abcäß東1", min_size=1, max_size=6)
texts = st.one_of(st.text(max_size=80), st.lists(words, max_size=12).map(" ".join))

# Whoever changes one of these breaks every bundle that is out there: then the kind needs a new name.
EXACT = {
    "": ([342], [1.0]),
    "a b a": ([67, 270, 249, 480, 496, 510], [1.693147, 1.0, 1.0, 1.0, 1.0, 1.0]),
}
DIGESTS = {
    "Is my card lost, or is my card locked?": (52, "120f5d8078a9e744", 65.1698),
    "Grüße aus München – 東京タワー ½ ١٢٣ straße": (76, "90c70008df010b06", 77.3863),
    "x" * 100: (12, "74e1eb3ba35426e5", 22.832),
    "the " * 50: (9, "eb817116e7ea8948", 36.364),
}


def digest(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("text", EXACT)
def test_ids_and_weights_of_short_texts_never_change(text: str) -> None:
    ids, weights = NgramPreprocessor(SMALL).encode(text)
    assert ids.tolist() == EXACT[text][0]
    assert weights == pytest.approx(EXACT[text][1], abs=1e-6)
    assert (ids.dtype, weights.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize("text", DIGESTS)
def test_ids_of_longer_texts_never_change(text: str) -> None:
    ids, weights = NgramPreprocessor(PreprocessSpec()).encode(text)
    length, wanted, total = DIGESTS[text]
    assert (len(ids), digest(ids)) == (length, wanted)
    assert float(weights.sum()) == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("seed", ["0", "4242"])
def test_another_process_gives_the_same_ids(seed: str) -> None:
    """Python's own hash is salted per process; ours must not be."""
    program = (
        "import sys, kcm.preprocess, kcm.task; p = kcm.preprocess.NgramPreprocessor(kcm.task.PreprocessSpec());"
        "i = p.batch(sys.argv[1:]); sys.stdout.buffer.write(i['ids'].tobytes() + i['weights'].tobytes())"
    )
    given = list(DIGESTS)
    ours = NgramPreprocessor(PreprocessSpec()).batch(given)
    theirs = subprocess.run(
        [sys.executable, "-c", program, *given], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
    ).stdout
    assert theirs == ours["ids"].tobytes() + ours["weights"].tobytes()


@given(st.lists(texts, min_size=1, max_size=6))
def test_a_batch_is_its_single_rows_padded_with_nothing(batch: list[str]) -> None:
    preprocessor = NgramPreprocessor(SMALL)
    inputs = preprocessor.batch(batch)
    assert inputs["ids"].shape == inputs["weights"].shape
    for row, text in enumerate(batch):
        alone = preprocessor.batch([text])
        length = alone["ids"].shape[1]
        assert np.array_equal(inputs["ids"][row, :length], alone["ids"][0])
        assert np.array_equal(inputs["weights"][row, :length], alone["weights"][0])
        assert not inputs["weights"][row, length:].any() and not inputs["ids"][row, length:].any()


@given(texts)
def test_each_id_appears_once_within_range_and_counts_all_occurrences(text: str) -> None:
    ids, weights = NgramPreprocessor(SMALL).encode(text)
    assert len(ids) == len(set(ids.tolist())) >= 1
    assert ids.min() >= 0 and ids.max() < GROUPS * SMALL.buckets
    found = kcm.preprocess._WORD.findall(text.lower())
    grams = sum(max(0, len(word) + 3 - size) for word in found for size in (3, 4, 5) if size < len(word) + 2)
    occurrences = np.exp(weights.astype(float) - 1)
    assert occurrences.sum() == pytest.approx(len(found) + len(found) + 1 + grams, rel=1e-4)
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
            assert np.array_equal(got[0], fresh[0]) and np.array_equal(got[1], fresh[1])
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
    assert encode("a b c d e")[0].tolist() == encode("a b c d e f g")[0].tolist()
    assert encode("a b c d e")[0].tolist() != encode("a b c d")[0].tolist()


@pytest.mark.parametrize("text", ["lorem ipsum " * 83_334, "x" * 10**6, "🙂" * 10**6, "a," * 500_000])
def test_a_million_characters_cost_little(text: str) -> None:
    """Whoever sends a book must not stop the device. Processor time: other processes don't count."""
    preprocessor = NgramPreprocessor(PreprocessSpec())
    began = time.process_time()
    ids, _ = preprocessor.encode(text)
    assert time.process_time() - began < 1.0
    assert len(ids) < 20_000


@pytest.mark.parametrize("preprocessor", [NgramPreprocessor(SMALL), TokenizerPreprocessor(PreprocessSpec(), tokenizer_json())])
def test_an_image_is_refused(preprocessor: NgramPreprocessor) -> None:
    with pytest.raises(ValueError, match="image"):
        preprocessor.batch(["text", b"\x89PNG"])


def test_the_word_bucket_is_the_words_own_id() -> None:
    preprocessor = NgramPreprocessor(SMALL)
    assert preprocessor.word_bucket("refund") in preprocessor.encode("refund")[0].tolist()


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
    words = [{i for i in preprocessor.encode(text)[0].tolist() if i < preprocessor.buckets} for text in (one, other)]
    assert words[0] & words[1] == {preprocessor.word_bucket(c) for c in (set(one) & set(other)) - set("ok ")} | (
        {preprocessor.word_bucket("ok")} if one.startswith("ok") else set()
    )
    assert words[0] - words[1]
