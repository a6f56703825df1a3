"""Numbers read off a prompt and an answer, for a judge of recorded outcomes: does what is written hold together?

Made for word problems and multiple choice; where a feature says nothing of a data set it is constant, and the judge ignores it.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

_NUMBER = re.compile(r"(?:(?<![\d)])-)?\d[\d,]*\.?\d*")  # a minus behind a digit is an operation
_CALL = re.compile(r"<<([^<>=]*)=([^<>]*)>>")  # GSM8K's calculator notes: <<2*3=6>>
_EQUATION = re.compile(r"([\d$.,%\s+\-*/x×÷()]{3,50})=\s*\$?(-?\d[\d,]*\.?\d*)")
_FINAL = re.compile(r"####\s*\$?(-?[\d,]*\.?\d+)")
_HEDGES = re.compile(r"\b(however|assum\w*|wait|not possible|cannot|can't|don't know|approximately|about|let's|we need|therefore)\b")
_QUANTITIES = re.compile(
    r"\b(half|third|quarter|twice|times|percent|fraction|ratio|each|every|more than|less than|remaining|rest|average|total)\b|\d/\d"
)
_OPTION = re.compile(r"^\(?[A-J][.):] ?(.*)$", re.M)
_SIGNS = str.maketrans({"x": "*", "×": "*", "÷": "/", ",": None, "$": None})
_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def read_prompt(prompt: str) -> dict[str, float]:
    """Size, quantities and form of a prompt."""
    numbers = _numbers(prompt)
    options = _OPTION.findall(prompt)
    stem = re.split(r"^\(?A[.):]", prompt, maxsplit=1, flags=re.M)[0]
    sizes = [len(option) for option in options] or [0]
    return {
        "prompt: length": math.log1p(len(prompt)),
        "prompt: stem": math.log1p(len(stem)),
        "prompt: numbers": math.log1p(len(numbers)),
        "prompt: sentences": math.log1p(stem.count(".") + stem.count("?")),
        "prompt: quantities": math.log1p(len(_QUANTITIES.findall(prompt.lower()))),
        "prompt: largest number": math.log1p(max((abs(n) for n in numbers), default=0.0)),
        "prompt: symbols": math.log1p(sum(not c.isalnum() and not c.isspace() for c in prompt)),
        "prompt: options": float(len(options)),
        "prompt: option length": math.log1p(sum(sizes) / len(sizes)),
        "prompt: option spread": math.log1p(max(sizes) - min(sizes)),
        "prompt: negated": float(bool(re.search(r"\b(not|except|false|incorrect|least)\b", stem.lower()))),
        "prompt: statements": float("statement" in prompt.lower()),
        "prompt: blank": float("__" in prompt),
        "prompt: word length": sum(map(len, prompt.split())) / max(1, len(prompt.split())),
    }


def read_answer(prompt: str, answer: str) -> dict[str, float]:
    """Whether an answer is finished, whether its arithmetic holds, whether it uses what the prompt gives."""
    calls, wrong_calls = _checked(_CALL.findall(answer))
    plain = re.sub(r"<<[^>]*>>", "", answer)
    equations, wrong_equations = _checked(_EQUATION.findall(plain))
    found = _FINAL.search(answer)
    final = _number(found.group(1)) if found else None
    given, used = set(_numbers(prompt)), set(_numbers(answer))
    unused = len(given - used)
    last = _CALL.findall(answer)[-1:]
    return {
        "answer: final given": float(found is not None),
        "answer: cut off": float(answer.count("<<") != answer.count(">>")),
        "answer: wrong calculations": float(wrong_calls),
        "answer: calculations": math.log1p(calls),
        "answer: wrong equations": float(wrong_equations),
        "answer: equations": math.log1p(equations),
        "answer: length": math.log1p(len(answer)),
        "answer: lines": math.log1p(sum(bool(line.strip()) for line in answer.split("\n"))),
        "answer: numbers unused": float(unused),
        "answer: share unused": unused / max(1, len(given)),
        "answer: final not whole": float(final is not None and final != int(final)),
        "answer: final negative": float(final is not None and final < 0),
        "answer: size of final": math.log1p(abs(final)) if final is not None else 0.0,
        "answer: final in prompt": float(final is not None and final in given),
        "answer: final is last result": float(final is not None and bool(last) and _number(last[0][1]) == final),
        "answer: decimals": math.log1p(sum("." in n.strip(".") for n in _NUMBER.findall(answer))),
        "answer: hedges": math.log1p(len(_HEDGES.findall(answer.lower()))),
        "answer: unknowns": math.log1p(len(re.findall(r"\b[a-z]\s*=|=\s*[a-z]\b", answer.lower()))),
        "answer: negative results": math.log1p(len(re.findall(r"=\s*-\d", answer))),
    }


def table(rows: list[dict[str, float]]) -> tuple[list[str], NDArray[np.float64]]:
    """Names [F] and values [N, F]."""
    names = list(rows[0])
    return names, np.array([[row[name] for name in names] for row in rows], np.float64)


def evaluate(expression: str) -> float | None:
    """The value of an expression of numbers and + − * / ( ), None for anything else: text from a model is never run."""
    text = expression.translate(_SIGNS).replace("%", "/100").strip()
    if len(text) > 60:
        return None
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("not arithmetic")


def _checked(pairs: list[tuple[str, str]]) -> tuple[int, int]:
    """(equations that can be recomputed, those whose stated result is off by more than a hundredth)."""
    found = wrong = 0
    for left, right in pairs:
        value, stated = evaluate(left), _number(right.strip().strip("$").rstrip(".,"))
        if value is not None and stated is not None:
            found += 1
            wrong += abs(value - stated) > 0.01 * max(1.0, abs(value))
    return found, wrong


def _numbers(text: str) -> list[float]:
    return [value for value in map(_number, _NUMBER.findall(text)) if value is not None]


def _number(text: str) -> float | None:
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
