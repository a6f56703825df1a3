"""Routing on recorded outcomes: a judge that reads prompt and answer predicts what the strong model would gain.

Numbers read off both (training/reading.py), their words and the subject that the prompt seems to be of are first reduced, each by a
plain learner, to three scores: expected gain, P(weak right), P(strong right). Those scores are out of fold in fitting, so that the
judge sees what it will see later. The head is one additive KAN over three outcomes, hurt / neutral / benefit, in residual form on
their base rates; rows are ranked by P(benefit) − P(hurt). The twin is an MLP of as many parameters. Either chooses for itself, by
held-out groups of its training rows, how many views it reads and its penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
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
Float32 = NDArray[np.float32]
Index = NDArray[np.int64]
Progress = Callable[[str], None]
Scores = dict[str, Float]  # per system what a call is worth [N], higher goes up
View = Callable[[Index, Index], Float]  # (train rows, test rows [M]) → scores [M, 3] of the test rows
Kind = Literal["kan", "mlp"]

_INNER = 5  # folds for the scores of the views
_TUNING = 3  # folds that choose what a head reads, and its penalty
_ALPHA = 30.0  # of the ridge on words, the floor's own
_LINE = 100.0  # of the ridge on numbers, in standard deviations
_CLIP = 3.0  # a number further off says no more than that
_SUBJECT = 20.0  # rows' worth of the overall mean that a subject's mean is drawn to
_TREES, _LEAF, _TRIED = 100, 8, 0.4  # extremely randomised trees (Geurts et al. 2006)
_BOOSTED = {"max_iter": 100, "learning_rate": 0.04, "max_leaf_nodes": 8, "min_samples_leaf": 20, "l2_regularization": 20.0}
_L2 = (10.0, 30.0, 100.0)
_MIDDLE = _L2[1]
_HEADS: dict[str, Kind] = {"ours": "kan", "mlp": "mlp"}


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
    counts = {"words": words.transform(data.prompts)}
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


def judge_scores(
    data: Outcomes, views: Views, train: Index, test: Index, groups: Index, *, seed: int = 0, progress: Progress = lambda _: None
) -> Scores:
    """What a call is worth for the test rows, fitted on the train rows: by "ours" (KAN) and "mlp", and by the "forest" alone.

    Args:
        groups: rows of one group are never on both sides of an inner fold.

    Raises:
        DataError: train rows of fewer than two groups.
    """
    makers = _makers(data, views)
    fitted = np.zeros((len(makers), len(train), 3))
    for a, b in _inside(groups[train], _INNER, seed):
        fitted[:, b] = [make(train[a], train[b]) for make in makers]
    later = np.stack([make(train, test) for make in makers])
    x, z = (np.concatenate(list(scores), 1).astype(np.float32) for scores in (fitted, later))
    target = outcome_targets("benefit", data.weak[train], data.strong[train])
    splits = list(_inside(groups[train], _TUNING, seed + 1))
    found: Scores = {"ours": np.zeros(0), "mlp": np.zeros(0), "forest": later[0, :, 0]}
    for name, kind in _HEADS.items():
        width, l2 = tune(kind, x, target, splits)
        progress(f"{name} reads {width // 3} of {len(makers)} views, L2 {l2:g}")
        p = np.exp(_fit(kind, x[:, :width], target, l2)(z[:, :width]))
        found[name] = p[:, 2] - p[:, 0]
    return found


def _inside(groups: Index, most: int, seed: int) -> Iterator[tuple[Index, Index]]:
    _, place = np.unique(groups, return_inverse=True)
    count = min(most, len(np.unique(place)))
    if count < 2:
        raise DataError(
            f"{len(groups)} training rows in {count} group(s) are too few to learn from",
            fix="more rows, or a test file that doesn't repeat the training prompts",
        )
    return folds(place, count, seed)


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


# Each view gives deviations [M, 3] from the mean gain, weak and strong of the rows that it was fitted on. With those means in them,
# an out-of-fold score would be low where its own fold's outcomes are high, and a judge that learns from that turns everything round.


def _makers(data: Outcomes, views: Views) -> list[View]:
    """The views, those first that carry over best to groups never seen: trees, all of the numbers, words and the subject."""
    targets = np.stack([data.gain, data.weak, data.strong], 1).astype(np.float64)
    makers = [of(views.numbers, targets) for of in (_forest_view, _boosted_view, _line_view)]
    makers += [_text_view(counts, targets) for counts in views.counts.values()]
    if data.subjects:
        makers.append(_subject_view(views.counts["words"], np.unique(data.subjects, return_inverse=True)[1], targets))
    return makers


def _forest_view(numbers: Float, targets: Float) -> View:
    from sklearn.ensemble import ExtraTreesRegressor

    def score(train: Index, test: Index) -> Float:
        forest = ExtraTreesRegressor(_TREES, min_samples_leaf=_LEAF, max_features=_TRIED, random_state=0)
        found: Float = forest.fit(numbers[train], targets[train] - targets[train].mean(0)).predict(numbers[test])
        return found

    return score


def _boosted_view(numbers: Float, targets: Float) -> View:
    from sklearn.ensemble import HistGradientBoostingRegressor

    def score(train: Index, test: Index) -> Float:
        trees = HistGradientBoostingRegressor(max_features=_TRIED, early_stopping=False, random_state=0, **_BOOSTED)
        wanted = targets[train] - targets[train].mean(0)
        return np.stack([trees.fit(numbers[train], column).predict(numbers[test]) for column in wanted.T], 1)

    return score


def _line_view(numbers: Float, targets: Float) -> View:
    from sklearn.linear_model import Ridge

    def score(train: Index, test: Index) -> Float:
        mean, sd = numbers[train].mean(0), numbers[train].std(0)
        known, asked = (((numbers[of] - mean) / np.where(sd > 1e-6, sd, np.inf)).clip(-_CLIP, _CLIP) for of in (train, test))
        found: Float = Ridge(alpha=_LINE).fit(known, targets[train] - targets[train].mean(0)).predict(asked)
        return found

    return score


def _text_view(counts: Any, targets: Float) -> View:
    from sklearn.linear_model import Ridge

    def score(train: Index, test: Index) -> Float:
        known, asked = _tfidf(counts, train, test)
        fit = Ridge(alpha=_ALPHA, solver="sparse_cg", tol=1e-3).fit(known, targets[train] - targets[train].mean(0))
        found: Float = fit.predict(asked)
        return found

    return score


def _subject_view(counts: Any, subject: Index, targets: Float) -> View:
    """The mean outcomes of each subject, drawn to the overall ones, by how probable it is by the prompt's words: naive Bayes.

    Subjects of test rows are never read.
    """
    from sklearn.naive_bayes import MultinomialNB

    def score(train: Index, test: Index) -> Float:
        known, asked = _tfidf(counts, train, test)
        guess = MultinomialNB(alpha=0.02).fit(known, subject[train])
        member = subject[train][:, None] == guess.classes_
        means = member.T @ (targets[train] - targets[train].mean(0)) / (member.sum(0)[:, None] + _SUBJECT)
        found: Float = guess.predict_proba(asked) @ means
        return found

    return score


def _tfidf(counts: Any, train: Index, test: Index) -> tuple[Any, Any]:
    """TF-IDF of both in the words that at least two train rows hold (in all, where no word is shared)."""
    from sklearn.feature_extraction.text import TfidfTransformer

    shared = counts[train].getnnz(axis=0) >= 2
    columns = np.flatnonzero(shared if shared.any() else ~shared)
    known, asked = counts[train][:, columns], counts[test][:, columns]
    weigh = TfidfTransformer(sublinear_tf=True).fit(known)
    return weigh.transform(known), weigh.transform(asked)


def tune(kind: Kind, x: Float32, target: Float32, splits: list[tuple[Index, Index]]) -> tuple[int, float]:
    """(columns, L2) with the least log loss on held-out rows; the columns at the middle L2, then the L2.

    Columns come three to a view: those of both kinds of trees, with the line's, or all.
    """

    @cache
    def loss(width: int, l2: float) -> float:
        total = 0.0
        for a, b in splits:
            total -= float((target[b] * _fit(kind, x[a, :width], target[a], l2)(x[b, :width])).sum())
        return total

    width = min((6, 9, x.shape[1]), key=lambda columns: loss(columns, _MIDDLE))
    return width, min(_L2, key=lambda l2: loss(width, l2))


def _fit(kind: Kind, x: Float32, target: Float32, l2: float) -> Callable[[Float32], Float]:
    """A head on inputs [N, F], targets [N, 3] of (hurt, neutral, benefit); it gives rows [M, F] their log-probabilities [M, 3]."""
    torch.manual_seed(0)
    layers = build_layers(JudgeSpec(kind=kind), x.shape[1], 3).eval()
    inputs, wanted = torch.from_numpy(x), torch.from_numpy(target)
    normalise_by(layers[0], inputs)
    base = wanted.mean(0).clamp(min=1e-3).log()
    weights = [p for p in layers.parameters() if p.dim() > 1]

    def loss() -> Tensor:
        misfit = -(wanted * torch.log_softmax(base + layers(inputs), 1)).sum()
        return (misfit + l2 / 2 * sum(p.square().sum() for p in weights) + SMOOTH / 2 * roughness(layers)) / len(wanted)

    minimise(list(layers.parameters()), loss)

    def log_p(rows: Float32) -> Float:
        with torch.inference_mode():
            found: Float = torch.log_softmax(base + layers(torch.from_numpy(rows)), 1).double().numpy()
        return found

    return log_p
