"""Routing on recorded outcomes: a judge that reads prompt and answer predicts what the strong model would gain.

Inputs are numbers read off both (training/reading.py) and a few scores of the gain: ridge regressions on words and letters, a
forest on the numbers for what hangs on several of them at once, the subject's mean. Those scores are out of fold in fitting, so
that the judge sees what it will see later. The head is one additive KAN over three outcomes, hurt / neutral / benefit, in residual
form on their base rates; rows are ranked by P(benefit) − P(hurt). The twin is an MLP of as many parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kcm.errors import DataError
from kcm.task import JudgeSpec
from training.heads import outcomes as outcome_targets
from training.judge import SMOOTH, build_layers, minimise, normalise_by, roughness
from training.outcomes import Outcomes
from training.reading import read_answer, read_prompt, table

Float = NDArray[np.float64]
Index = NDArray[np.int64]
Progress = Callable[[str], None]
Scores = dict[str, Float]  # per system what a call is worth [N], higher goes up

_INNER = 5  # folds for the scores of the text's views
_ALPHA = 30.0  # of the ridge on a view, the floor's own
_SUBJECT = 20.0  # rows' worth of the overall mean that a subject's mean is drawn to
_TREES, _LEAF, _TRIED = 100, 8, 0.4  # extremely randomised trees (Geurts et al. 2006)
_L2 = 10.0


@dataclass(frozen=True)
class Views:
    """What is read of N rows, without a label: numbers [N, F] with their names, and counts [N, ...] by view of the text."""

    names: list[str]
    numbers: Float
    counts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.numbers)


def read_views(data: Outcomes, *, answers: bool) -> Views:
    """Views of the prompts, and of the weak model's answers where they count."""
    from sklearn.feature_extraction.text import HashingVectorizer

    rows = [read_prompt(prompt) for prompt in data.prompts]
    if answers:
        rows = [row | read_answer(prompt, answer) for row, prompt, answer in zip(rows, data.prompts, data.answers, strict=True)]
    names, numbers = table(rows)
    # Hashing learns nothing from the rows, so the table may be made once for all folds.
    words = HashingVectorizer(n_features=2**18, ngram_range=(1, 2), alternate_sign=False, norm=None)
    letters = HashingVectorizer(n_features=2**17, ngram_range=(3, 4), analyzer="char_wb", alternate_sign=False, norm=None)
    counts = {"words": words.transform(data.prompts), "letters": letters.transform(data.prompts)}
    if answers:
        counts["words of the answer"] = words.transform(data.answers)
    return Views(names, numbers, counts)


def folds(groups: Index, count: int, seed: int) -> Iterator[tuple[Index, Index]]:
    """(train, test) rows of each fold; rows of one group lie in one fold.

    Raises:
        DataError: fewer groups than folds.
    """
    if len(np.unique(groups)) < count:
        raise DataError(f"{len(np.unique(groups))} groups can't be split into {count} folds", fix="lower --cv")
    fold = np.random.default_rng(seed).permutation(int(groups.max()) + 1)[groups] % count
    for number in range(count):
        yield np.flatnonzero(fold != number), np.flatnonzero(fold == number)


def judge_scores(data: Outcomes, views: Views, train: Index, test: Index, groups: Index, *, subjects: bool, seed: int = 0) -> Scores:
    """What a call is worth for the test rows, fitted on the train rows: by "ours" (KAN) and "mlp", and by the "forest" alone.

    Args:
        groups: rows of one group are never on both sides of an inner fold.
        subjects: let the subject count as a category; not where whole subjects are left out.
    """
    gain = data.gain
    fitted, later = [views.numbers[train]], [views.numbers[test]]
    forest = _forest_score(views.numbers, gain)
    for make in [*(_text_score(counts, gain) for counts in views.counts.values()), forest]:
        own = np.zeros(len(train))
        _, inside = np.unique(groups[train], return_inverse=True)
        for a, b in folds(inside, min(_INNER, int(inside.max()) + 1), seed):
            own[b] = make(train[a], train[b])
        fitted.append(own[:, None])
        later.append(make(train, test)[:, None])
    if subjects:
        own, other = _subject_scores(np.unique(data.subjects, return_inverse=True)[1], gain, train, test)
        fitted.append(own[:, None])
        later.append(other[:, None])
    x, z = (np.concatenate(parts, 1).astype(np.float32) for parts in (fitted, later))
    target = outcome_targets("benefit", data.weak[train], data.strong[train])
    return {"ours": _fit("kan", x, target)(z), "mlp": _fit("mlp", x, target)(z), "forest": forest(train, test)}


def ridge_scores(data: Outcomes, train: Index, test: Index, *, answers: bool) -> Float:
    """The floor: ridge on TF-IDF of the prompt (and the weak model's answer), target strong − weak."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    parts = []
    for column in (data.prompts, data.answers) if answers else (data.prompts,):
        known, asked = [column[i] for i in train], [column[i] for i in test]
        vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2).fit(known)
        parts.append((vectorizer.transform(known), vectorizer.transform(asked)))
    fit = Ridge(alpha=_ALPHA).fit(hstack([part[0] for part in parts]), data.gain[train])
    scores: Float = fit.predict(hstack([part[1] for part in parts]))
    return scores


# Both give deviations from the mean gain of the rows that they were fitted on. With that mean in it, an out-of-fold score would
# be low where its own fold's gain is high, and a judge that learns from that turns everything round.


def _text_score(counts: Any, gain: Float) -> Callable[[Index, Index], Float]:
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.linear_model import Ridge

    def score(train: Index, test: Index) -> Float:
        weigh = TfidfTransformer(sublinear_tf=True).fit(counts[train])
        fit = Ridge(alpha=_ALPHA, solver="sparse_cg", tol=1e-3).fit(weigh.transform(counts[train]), gain[train])
        found: Float = fit.predict(weigh.transform(counts[test])) - gain[train].mean()
        return found

    return score


def _forest_score(numbers: Float, gain: Float) -> Callable[[Index, Index], Float]:
    from sklearn.ensemble import ExtraTreesRegressor

    def score(train: Index, test: Index) -> Float:
        forest = ExtraTreesRegressor(_TREES, min_samples_leaf=_LEAF, max_features=_TRIED, random_state=0)
        found: Float = forest.fit(numbers[train], gain[train]).predict(numbers[test]) - gain[train].mean()
        return found

    return score


def _subject_scores(subject: Index, gain: Float, train: Index, test: Index) -> tuple[Float, Float]:
    """Each subject's mean gain, drawn to the overall mean; a train row's own outcome is left out of its."""
    size = int(subject.max()) + 1
    total, count = np.bincount(subject[train], gain[train], size), np.bincount(subject[train], minlength=size)
    overall = gain[train].mean()
    own = (total[subject[train]] - gain[train] + _SUBJECT * overall) / (count[subject[train]] - 1 + _SUBJECT)
    return own, ((total + _SUBJECT * overall) / (count + _SUBJECT))[subject[test]]


def _fit(kind: Literal["kan", "mlp"], x: NDArray[np.float32], target: NDArray[np.float32]) -> Callable[[NDArray[np.float32]], Float]:
    """A head on inputs [N, F], targets [N, 3] of (hurt, neutral, benefit); it scores rows [M, F]."""
    torch.manual_seed(0)
    layers = build_layers(JudgeSpec(kind=kind), x.shape[1], 3).eval()
    inputs, wanted = torch.from_numpy(x), torch.from_numpy(target)
    normalise_by(layers[0], inputs)
    base = wanted.mean(0).clamp(min=1e-3).log()
    weights = [p for p in layers.parameters() if p.dim() > 1]

    def loss() -> Tensor:
        misfit = -(wanted * torch.log_softmax(base + layers(inputs), 1)).sum()
        return (misfit + _L2 / 2 * sum(p.square().sum() for p in weights) + SMOOTH / 2 * roughness(layers)) / len(wanted)

    minimise(list(layers.parameters()), loss)

    def score(rows: NDArray[np.float32]) -> Float:
        with torch.inference_mode():
            p = torch.softmax(base + layers(torch.from_numpy(rows)), 1).double().numpy()
        found: Float = p[:, 2] - p[:, 0]
        return found

    return score
