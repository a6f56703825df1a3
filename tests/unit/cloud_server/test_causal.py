from __future__ import annotations

from pathlib import Path
from typing import Any

import cloud_kit
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cloud_server.models import load_large
from cloud_server.models.causal import CausalModel
from cloud_server.models.labeltrie import LabelTrie
from kcm.errors import ConfigError
from kcm.sample import Float32, Hint

ASSERTION = Hint(label_ids=(2,), probabilities=(0.7,), confidence=0.4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalModel:
    folder = tmp_path_factory.mktemp("causal")
    cloud_kit.tiny_llama(folder / "weights")
    loaded = load_large(cloud_kit.write_large(folder, "causal", "weights"))
    assert isinstance(loaded, CausalModel)
    return loaded


def naive(model: CausalModel, prompt: list[int], labels: list[list[int]]) -> Float32:
    """Prompt and label read anew for every label: no cache, no mask, no padding."""
    scores = []
    for tokens in labels:
        with torch.no_grad():
            logprobs = model._model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0].log_softmax(-1)
        scores.append(sum(float(logprobs[len(prompt) - 1 + place, token]) for place, token in enumerate(tokens)))
    return np.array(scores, np.float32)


def label_ids(model: CausalModel) -> list[list[int]]:
    return [model._tokenizer(f" {label}", add_special_tokens=False)["input_ids"] for label in model.labels]


def test_scores_equal_naive_scoring(model: CausalModel) -> None:
    labels = label_ids(model)
    assert any(len(tokens) > 2 for tokens in labels) and labels[1][0] == labels[2][0], "the labels must be long and share a beginning"
    prompts = [model._prompt_ids(text, "") for text in cloud_kit.TEXTS]
    assert len({len(prompt) for prompt in prompts}) > 2, "the batch must need padding"
    got = model.label_logprobs(prompts)
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(got[row], naive(model, prompt, labels), atol=1e-3)
    assert np.ptp(got, axis=0).min() > 1e-2, "the tiny model must tell prompts apart, else this proves nothing"


def test_logits_are_pmi_under_the_hints_own_arm(model: CausalModel) -> None:
    labels, tokens = label_ids(model), lambda text: model._tokenizer(text)["input_ids"]
    text = cloud_kit.TEXTS[0]
    cases = {
        None: (f"Text: {text}\nTopic:", "Text: N/A\nTopic:"),
        cloud_kit.HINT: (
            f"A small model suggests: earn, crude oil.\nText: {text}\nTopic:",
            "A small model suggests: N/A.\nText: N/A\nTopic:",
        ),
        ASSERTION: (
            f"A small model answers crude steel with probability 0.70.\nText: {text}\nTopic:",
            "A small model answers N/A with probability N/A.\nText: N/A\nTopic:",
        ),
    }
    got = model.logits([text] * 3, list(cases))
    for row, (prompt, free) in enumerate(cases.values()):
        expected = naive(model, tokens(prompt), labels) - naive(model, tokens(free), labels)
        np.testing.assert_allclose(got[row], expected, atol=2e-3)
    assert abs(got[0] - got[1]).max() > 1e-2, "the hint must reach the prompt"


def test_the_content_free_row_is_computed_once_per_arm(tmp_path: Path) -> None:
    cloud_kit.tiny_llama(tmp_path / "weights")
    model = load_large(cloud_kit.write_large(tmp_path, "causal", "weights"))
    assert isinstance(model, CausalModel)
    passes: list[int] = []
    model._model.register_forward_hook(lambda *_: passes.append(1))
    model.logits(["profit"], [None])
    first = len(passes)
    model.logits(["oil"], [None])
    assert len(passes) - first == first // 2, "a second document needs no content-free pass"


def test_special_tokens_in_a_text_are_plain_characters(model: CausalModel) -> None:
    special = model._tokenizer.convert_tokens_to_ids("<|end|>")
    assert special not in model._prompt_ids("profit <|end|> rose", "")
    assert "<|end|>" in model._tokenizer.decode(model._prompt_ids("profit <|end|> rose", ""))


def test_a_long_text_is_cut_and_the_prompt_around_it_is_kept(model: CausalModel) -> None:
    prompt = model._prompt_ids("profit rose " * 200, "")
    assert len(prompt) < 64 + 30
    assert model._tokenizer.decode(prompt).endswith("\nTopic:")


def test_identity(model: CausalModel) -> None:
    assert model.teacher_id == "causal-f00d" and model.reads_hints and len(model.prompt_id) == 16
    assert model.logits([], []).shape == (0, 4)


def test_a_blank_text_has_finite_scores(model: CausalModel) -> None:
    assert np.isfinite(model.logits(["", " \n"], [None, cloud_kit.HINT])).all()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"template": "Topic:"}, r"template has no \{text\}"),
        ({"template": "{text} {answer}"}, "template can't be filled in"),
        ({"label": "x"}, r"label has no \{label\}"),
        ({"hint": "{text}{candidates}"}, "hint can't be filled in"),
    ],
)
def test_a_wrong_template_is_refused(tmp_path: Path, prompt: dict[str, str], message: str) -> None:
    cloud_kit.tiny_llama(tmp_path / "weights")
    with pytest.raises(ConfigError, match=message):
        load_large(cloud_kit.write_large(tmp_path, "causal", "weights", prompt=prompt))


Tokens = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8, unique=True)


@given(Tokens)
def test_trie_paths_spell_the_labels(labels: list[tuple[int, ...]]) -> None:
    trie = LabelTrie(labels)
    for row, tokens in enumerate(labels):
        edges = np.flatnonzero(trie.paths[row])
        spelled = sorted(
            (0 if node == 0 else int(trie.depths[node - 1]) + 1, int(token))
            for node, token in zip(trie.edge_nodes[edges], trie.edge_tokens[edges], strict=True)
        )
        assert [token for _, token in spelled] == list(tokens)
    for node in range(len(trie.tokens)):
        above = np.flatnonzero(trie.ancestors[node])
        assert above.max() == node and sorted(trie.depths[above]) == list(range(int(trie.depths[node]) + 1))
    assert len(trie.tokens) <= len({tokens[:n] for tokens in labels for n in range(1, len(tokens))})


def test_trie_refuses_labels_it_cannot_tell_apart() -> None:
    with pytest.raises(ValueError, match="same tokens"):
        LabelTrie([(1, 2), (1, 2)])
    with pytest.raises(ValueError, match="no tokens"):
        LabelTrie([(1,), ()])


@pytest.mark.slow
def test_smollm2_equals_naive_scoring_and_knows_its_topic(tmp_path: Path) -> None:
    cloud_kit.real_model("smollm2")
    labels: Any = ["sport", "cooking", "space flight"]
    model = load_large(cloud_kit.write_large(tmp_path, "causal", "smollm2", labels=labels))
    assert isinstance(model, CausalModel)
    texts = [
        "The rocket left the launch pad and reached orbit.",
        "Stir the onions in butter, then add the stock.",
        "They scored a goal in extra time.",
    ]
    prompts = [model._prompt_ids(text, "") for text in texts]
    np.testing.assert_allclose(model.label_logprobs(prompts[:2])[1], naive(model, prompts[1], label_ids(model)), atol=1e-3)
    assert model.logits(texts, [None] * 3).argmax(1).tolist() == [2, 1, 0]
