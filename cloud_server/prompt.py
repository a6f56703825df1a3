"""A task's prompt templates, filled in. A hint becomes label names of the task: no text of a device stands in for one."""

from __future__ import annotations

import hashlib

import msgspec

from kcm.errors import ConfigError
from kcm.sample import Hint, HintArm
from kcm.task import PromptSpec

_RENDERING = 1  # part of prompt_id: raise it when the code below renders otherwise
NEUTRAL = "N/A"  # stands for the text, and for the candidates, where a prompt without content is wanted


def hint_arm(hint: Hint | None) -> HintArm:
    """What a model that reads hints sees of this one: nothing, the small model's answer, or its candidates."""
    if hint is None or not hint.label_ids:
        return HintArm.NONE
    return HintArm.ASSERTION if len(hint.label_ids) == 1 else HintArm.CANDIDATES


class Prompt:
    """The templates of one task over its labels."""

    def __init__(self, spec: PromptSpec, labels: tuple[str, ...]) -> None:
        """Raises ConfigError where a template names an unknown placeholder or lacks the one it must have."""
        self._spec, self._labels = spec, labels
        _check("template", spec.template, {"text": "", "hint": "", "labels": ""}, needs="text")
        _check("hint", spec.hint, {"candidates": "", "labels": ""}, needs="candidates")
        _check("label", spec.label, {"label": ""}, needs="label")
        content = msgspec.json.encode([_RENDERING, spec, labels])
        self.prompt_id = hashlib.sha256(content).hexdigest()[:16]

    def hint(self, hint: Hint | None) -> str:
        """The hint's sentence, names best first; empty where there is no hint."""
        if hint is None or not hint.label_ids:
            return ""
        return self._fill_hint(", ".join(self._labels[i] for i in hint.label_ids))

    def neutral_hint(self, arm: HintArm) -> str:
        """The hint's sentence of this arm with no label in it."""
        return "" if arm is HintArm.NONE else self._fill_hint(NEUTRAL)

    def split(self, hint: str) -> tuple[str, str]:
        """What stands before and after the sample's text, the hint's sentence filled in.

        A second {text} in the template repeats nothing: it stays empty, so that the prompt's length is bounded.
        """
        before, _, after = self._spec.template.partition("{text}")
        values = {"hint": hint, "labels": ", ".join(self._labels), "text": ""}
        return before.format(**values), after.format(**values)

    def label(self, label: str) -> str:
        return self._spec.label.format(label=label)

    def _fill_hint(self, candidates: str) -> str:
        return self._spec.hint.format(candidates=candidates, labels=", ".join(self._labels))


def _check(name: str, template: str, values: dict[str, str], needs: str) -> None:
    known = ", ".join("{" + key + "}" for key in sorted(values))
    try:
        template.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ConfigError(f"[prompt] {name} can't be filled in: {error}", fix=f"use {known}, and write a brace as {{{{ or }}}}") from error
    if "{" + needs + "}" not in template:
        raise ConfigError(f"[prompt] {name} has no {{{needs}}}", fix=f"known: {known}")
