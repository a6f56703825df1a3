"""A causal language model that scores fixed label tokens: it never generates, so a text can't make it say anything else.

score(label) = log p(label | prompt) - log p(label | content-free prompt), the pointwise mutual information: it takes away
what the model says of a label whatever the text (Holtzman et al. 2021). The content-free prompt is the same template with
"N/A" for the text and, under a hint, "N/A" for the candidates: the wording of the hint's sentence cancels, what it says
stays. So one content-free row per hint arm serves all samples, and it is computed once.

The prompt is read once; its keys and values serve all labels. The labels form a trie whose nodes are read in one more
pass, each attending to the prompt and to its own ancestors (tree attention): 52 labels cost about one short sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from cloud_server.models import LargeFile
from cloud_server.models.labeltrie import LabelTrie
from cloud_server.prompt import NEUTRAL, Prompt, hint_arm
from kcm.errors import ConfigError
from kcm.preprocess import as_text
from kcm.sample import Float32, Hint, HintArm, Payload
from protos.kcm.v1 import sample_pb2

_LOGIT_BYTES = 256 * 2**20  # of one pass [B, N, V]: bounds memory
_PROMPTS = 8  # read together at most: beyond, one thread gains nothing


class CausalModel:
    """PMI of every label under the task's prompt, the hint in it."""

    def __init__(self, folder: Path, large: LargeFile) -> None:
        """Raises ConfigError where weights or tokenizer can't be loaded, or labels can't be told apart by their tokens."""
        weights = large.weights(folder)
        hf_logging.disable_progress_bar()  # its bars would break the log's JSON lines
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(weights), local_files_only=True, trust_remote_code=False)
            # sdpa takes our masks as they are; "flash" kernels don't.
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(weights),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation="sdpa",
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"{weights} can't be loaded as a causal language model: {error}") from error
        self._model = model.eval()
        self._prompt = Prompt(large.prompt, large.labels)
        self._max_tokens = large.max_tokens
        self._temperature = large.temperature
        try:
            self._trie = LabelTrie([self._ids(self._prompt.label(label)) for label in large.labels])
        except ValueError as error:
            raise ConfigError(f"[prompt] label {large.prompt.label!r}: {error} under the tokenizer of {weights}") from error
        self._content_free: dict[HintArm, Float32] = {}
        self.labels = large.labels
        self.reads_hints = True
        self.teacher_id = f"causal-{large.large_id}"
        self.prompt_id = self._prompt.prompt_id
        self.scores_kind = sample_pb2.Scores.PMI

    def logits(self, samples: Sequence[Payload], hints: Sequence[Hint | None]) -> Float32:
        """float32 [B, C]: PMI / temperature."""
        arms = [hint_arm(hint) for hint in hints]
        for arm in sorted(set(arms) - set(self._content_free)):
            self._content_free[arm] = self._label_logprobs([self._prompt_ids(NEUTRAL, self._prompt.neutral_hint(arm))])[0]
        prompts = [self._prompt_ids(as_text(sample), self._prompt.hint(hint)) for sample, hint in zip(samples, hints, strict=True)]
        free_BC = np.stack([self._content_free[arm] for arm in arms]) if arms else np.empty((0, len(self.labels)), np.float32)
        scores: Float32 = (self.label_logprobs(prompts) - free_BC) / np.float32(self._temperature)
        return scores

    def label_logprobs(self, prompts: Sequence[Sequence[int]]) -> Float32:
        """float32 [B, C]: log p(label's tokens | prompt), read in batches of like length."""
        out = np.empty((len(prompts), len(self.labels)), np.float32)
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        row_bytes = 4 * self._model.config.vocab_size * max(1, len(self._trie.tokens))
        step = max(1, min(_PROMPTS, _LOGIT_BYTES // row_bytes))
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            out[rows] = self._label_logprobs([prompts[row] for row in rows])
        return out

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _prompt_ids(self, text: str, hint: str) -> list[int]:
        """The prompt's tokens, the text cut to max_tokens; the sentence around it is never cut.

        The text is encoded with special tokens as plain characters, the template with theirs: a device can't close a turn
        of a chat template. Space before the text goes with the text, since tokenizers join it to the first word.
        """
        before, after = self._prompt.split(hint)
        kept = before.rstrip(" ")
        text_ids = self._tokenizer(
            before[len(kept) :] + text, add_special_tokens=False, split_special_tokens=True, truncation=True, max_length=self._max_tokens
        )["input_ids"]
        ids: list[int] = [*self._tokenizer(kept)["input_ids"], *text_ids, *self._ids(after)]
        return ids or [self._model.config.eos_token_id or 0]

    def _label_logprobs(self, prompts: Sequence[Sequence[int]]) -> Float32:
        """One batch, padded on the left to [B, P], then the trie's N nodes for each."""
        real_BP, ids_BP = _left_padded(prompts)
        positions_BP = (real_BP.long().cumsum(1) - 1).clamp(min=0)
        with torch.inference_mode():
            read = self._model(
                input_ids=ids_BP,
                attention_mask=_additive(_causal(real_BP)),
                position_ids=positions_BP,
                use_cache=True,
                logits_to_keep=1,
            )
            logits_BNV = read.logits[:, -1:]  # the root
            if len(self._trie.tokens):
                nodes = self._read_nodes(real_BP, read.past_key_values)
                logits_BNV = torch.cat([logits_BNV, nodes], dim=1)
            total_BN = logits_BNV.float().logsumexp(-1)
            from_E, to_E = torch.from_numpy(self._trie.edge_nodes), torch.from_numpy(self._trie.edge_tokens)
            edges_BE = logits_BNV[:, from_E, to_E].float() - total_BN[:, from_E]
            scores: Float32 = (edges_BE @ torch.from_numpy(self._trie.paths).float().T).numpy()
        return scores

    def _read_nodes(self, real_BP: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits [B, N, V] after each node, given the prompt's cache."""
        batch, nodes = len(real_BP), len(self._trie.tokens)
        tree_NN = torch.from_numpy(self._trie.ancestors)
        may_BNK = torch.cat([real_BP[:, None].expand(batch, nodes, -1), tree_NN.expand(batch, nodes, nodes)], dim=2)
        lengths_B1 = real_BP.sum(1, keepdim=True)
        read = self._model(
            input_ids=torch.from_numpy(self._trie.tokens).expand(batch, nodes),
            attention_mask=_additive(may_BNK),
            position_ids=lengths_B1 + torch.from_numpy(self._trie.depths),
            past_key_values=cache,
            use_cache=True,
        )
        logits: torch.Tensor = read.logits
        return logits


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(real bool [B, P], ids int64 [B, P]): the prompts end together, so that one place holds every row's last logits."""
    longest = max(len(prompt) for prompt in prompts)
    ids, real = np.zeros((len(prompts), longest), np.int64), np.zeros((len(prompts), longest), bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        real[row, longest - len(prompt) :] = True
    return torch.from_numpy(real), torch.from_numpy(ids)


def _causal(real_BP: torch.Tensor) -> torch.Tensor:
    """bool [B, P, P]: to real tokens at or before, and to itself, so that a padding's row isn't empty (it would be NaN)."""
    length = real_BP.shape[1]
    before = torch.ones(length, length, dtype=torch.bool).tril()
    return before & real_BP[:, None] | torch.eye(length, dtype=torch.bool)


def _additive(may_BQK: torch.Tensor) -> torch.Tensor:
    """float32 [B, 1, Q, K]: 0 where attention is allowed, the lowest number elsewhere."""
    return torch.where(may_BQK, 0.0, torch.finfo(torch.float32).min)[:, None]
