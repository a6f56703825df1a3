"""A task's prompt templates, filled in: for a causal model, for an encoder's second segment, for a chat API.

A hint becomes label names and a number: no text of a device stands in for one. A sample's text is put between finished pieces,
so that its braces stay braces, and in a chat it is part of what the user says, whatever it says itself.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

import msgspec

from kcm.errors import ConfigError
from kcm.sample import Hint, HintArm
from kcm.task import PromptSpec

_RENDERING = 2  # part of prompt_id: raise it when the code below renders otherwise
NEUTRAL = "N/A"  # stands for the text, and for what a hint says, where a prompt without content is wanted

Pieces = Sequence[tuple[str, str | None]]  # literal text, and the placeholder behind it


class Message(TypedDict):
    """One message of a chat, as OpenAI-compatible servers take it."""

    role: Literal["system", "user"]
    content: str


def hint_arm(hint: Hint | None) -> HintArm:
    """What a model that reads hints sees of this one: nothing, the small model's answer, or its candidates."""
    if hint is None or not hint.label_ids:
        return HintArm.NONE
    return HintArm.ASSERTION if len(hint.label_ids) == 1 else HintArm.CANDIDATES


class Prompt:
    """The templates of one task over its labels."""

    def __init__(self, spec: PromptSpec, labels: tuple[str, ...]) -> None:
        """Raises ConfigError where a template names an unknown placeholder or lacks the one it must have."""
        self._labels = labels
        self._template = _parse("template", spec.template, ("hint", "labels", "text"), needs="text")
        self._candidates = _parse("hint", spec.hint, ("candidates", "labels"), needs="candidates")
        self._assertion = _parse("assertion", spec.assertion, ("candidates", "labels", "probability"), needs="candidates")
        self._label = _parse("label", spec.label, ("label",), needs="label")
        # No {text}: what a device sends is never said in the system's name.
        self._chat_system = _parse("chat_system", spec.chat_system, ("hint", "labels"))
        self._chat_user = _parse("chat_user", spec.chat_user, ("hint", "labels", "text"), needs="text")
        content = msgspec.json.encode([_RENDERING, spec, labels])
        self.prompt_id = hashlib.sha256(content).hexdigest()[:16]

    def hint(self, hint: Hint | None) -> str:
        """The hint's sentence by its arm, names best first; empty where there is no hint."""
        arm = hint_arm(hint)
        if hint is None or arm is HintArm.NONE:
            return ""
        return self._fill_hint(arm, ", ".join(self._labels[i] for i in hint.label_ids), f"{hint.probabilities[0]:.2f}")

    def neutral_hint(self, arm: HintArm) -> str:
        """The hint's sentence of this arm with no label in it."""
        return "" if arm is HintArm.NONE else self._fill_hint(arm, NEUTRAL, NEUTRAL)

    def split(self, hint: str) -> tuple[str, str]:
        """What stands before and after the sample's text, the hint's sentence filled in.

        A second {text} in the template repeats nothing: it stays empty, so that the prompt's length is bounded.
        """
        return self._around(self._template, hint)

    def label(self, label: str) -> str:
        return _fill(self._label, {"label": label})

    def messages(self, text: str, hint: Hint | None) -> list[Message]:
        """The chat for one sample: the system's message, where the template isn't empty, and the user's."""
        sentence = self.hint(hint)
        system = _fill(self._chat_system, self._values(sentence))
        before, after = self._around(self._chat_user, sentence)
        user: Message = {"role": "user", "content": before + text + after}
        return [{"role": "system", "content": system}, user] if system else [user]

    def _around(self, template: Pieces, hint: str) -> tuple[str, str]:
        place = next(i for i, (_, field) in enumerate(template) if field == "text")
        values = self._values(hint)
        return _fill(template[:place], values) + template[place][0], _fill(template[place + 1 :], values)

    def _values(self, hint: str) -> dict[str, str]:
        return {"hint": hint, "labels": ", ".join(self._labels), "text": ""}

    def _fill_hint(self, arm: HintArm, candidates: str, probability: str) -> str:
        values = {"candidates": candidates, "probability": probability, "labels": ", ".join(self._labels)}
        return _fill(self._assertion if arm is HintArm.ASSERTION else self._candidates, values)


def _fill(pieces: Pieces, values: Mapping[str, str]) -> str:
    return "".join(literal + (values[field] if field is not None else "") for literal, field in pieces)


def _parse(name: str, template: str, known: Sequence[str], needs: str = "") -> Pieces:
    """The template in pieces; {{ and }} are braces. Raises ConfigError as Prompt does."""
    listed = ", ".join("{" + key + "}" for key in known)
    fix = f"use {listed}, and write a brace as {{{{ or }}}}"
    pieces: list[tuple[str, str | None]] = []
    try:
        for literal, field, form, conversion in string.Formatter().parse(template):
            if field is not None and (field not in known or form or conversion):
                shown = field + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
                raise ConfigError(f"[prompt] {name} can't be filled in: {{{shown}}} is no placeholder", fix=fix)
            pieces.append((literal, field))
    except ValueError as error:
        raise ConfigError(f"[prompt] {name} can't be filled in: {error}", fix=fix) from error
    if needs and needs not in {field for _, field in pieces}:
        raise ConfigError(f"[prompt] {name} has no {{{needs}}}", fix=f"known: {listed}")
    return pieces
