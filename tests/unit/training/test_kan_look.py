"""Attribution, pruning, curves and effects say what is true of a judge whose truth is known."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from test_judge import length_tells, predictions

from kcm.errors import ConfigError
from kcm.task import JudgeSpec
from training.fit import one_hot
from training.judge import FEATURES, Judge, Predictions, features, fit_judge
from training.kan import KanLayer
from training.kan_look import attribution, bend, effects, kan_layers, look, node_names, prune, trend
from training.kan_plots import draw_edges, draw_effects

LENGTH = 5 + FEATURES.index("ln(1 + length)")  # of the inputs, behind five ranks


@cache
def listening(spec: JudgeSpec) -> tuple[Judge, Predictions]:
    """A judge that length alone tells something."""
    given, labels = length_tells()
    return fit_judge(spec, given, one_hot(labels, 6)), given


def plain_layer(inputs: int, outputs: int, weights: list[list[float]]) -> KanLayer:
    """Edges that are straight lines: φ = w z."""
    layer = KanLayer(inputs, outputs).eval()
    with torch.no_grad():
        layer.spline.zero_()
        layer.base.copy_(torch.tensor(weights))
    return layer


def test_the_input_that_tells_is_found_and_its_effect_is_the_right_way_round() -> None:
    judge, given = listening(JudgeSpec())
    edges = look(judge, given)
    assert [edge.share for edge in edges] == sorted((edge.share for edge in edges), reverse=True)
    assert sum(edge.share for edge in edges) == pytest.approx(1)
    assert edges[0].input == LENGTH
    into_right = next(edge for edge in edges if (edge.input, edge.output) == (LENGTH, 0))
    assert into_right.trend == "falling" and into_right.low < -0.2 and into_right.high > 0.2
    first = effects(judge, given)[0]
    assert first.input == LENGTH and first.mean[0] > 0.05 and first.mean[-1] < -0.05 and first.spread > 0.1
    names = node_names(judge)
    assert names[0][LENGTH] == "ln(1 + length)" and names[1] == ["rank 1", "rank 2", "rank 3", "rank 4", "rank 5", "none"]


def test_edges_are_in_the_inputs_own_units_and_centred_on_the_data() -> None:
    judge, given = listening(JudgeSpec())
    x = features(*given.tensors(), judge.ranks)
    (layer,) = kan_layers(judge)
    said = layer.edges(x).detach().double().numpy()
    for edge in look(judge, given)[:20]:
        data = x[:, edge.input].double().numpy()
        assert (edge.x[0], edge.x[-1]) == pytest.approx((data.min(), data.max()))
        shown = np.interp(data, edge.x, edge.y)
        assert shown == pytest.approx(said[:, edge.output, edge.input] - edge.mean, abs=0.02 * (edge.high - edge.low) + 1e-6)
        assert shown.mean() == pytest.approx(0, abs=0.02 * (edge.high - edge.low) + 1e-6)


def test_an_effect_is_the_change_of_confidence() -> None:
    """Length stands in no prior: setting it in the data and in the features is the same."""
    judge, given = listening(JudgeSpec())
    effect = next(e for e in effects(judge, given) if e.input == LENGTH)
    moved = replace(given, length=np.full(len(given), np.expm1(effect.x[-1]), np.float32))
    change = judge.confidence(moved) - judge.confidence(given)
    assert effect.mean[-1] == pytest.approx(change.mean(), abs=1e-4)
    assert (effect.low[-1], effect.high[-1]) == pytest.approx(np.percentile(change, [25, 75]), abs=1e-4)


def test_attribution_of_one_layer_is_each_edges_deviation() -> None:
    layer = plain_layer(2, 1, [[1.0, -3.0]])
    x = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    assert attribution([layer], x)[0] == pytest.approx(np.array([[0.25, 0.75]]), abs=1e-6)


def test_attribution_passes_through_a_hidden_layer_and_loses_nothing() -> None:
    """h1 hears input 1 alone, h2 both alike; the output hears h1 three times as much as h2."""
    first = plain_layer(2, 2, [[1.0, 0.0], [1.0, 1.0]])
    x = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    deviation = first(x).detach().std(0, correction=0)
    second = plain_layer(2, 1, [[3.0 / float(deviation[0]), 1.0 / float(deviation[1])]])
    before, after = attribution([first, second], x)
    assert after == pytest.approx(np.array([[0.75, 0.25]]), abs=1e-3)
    assert before == pytest.approx(np.array([[0.75, 0.0], [0.125, 0.125]]), abs=1e-3)


@pytest.mark.parametrize("hidden", [0, 3])
def test_a_judge_that_adds_nothing_has_no_shares_and_no_nan(hidden: int) -> None:
    given, _ = predictions(50)
    judge = Judge(JudgeSpec(hidden=hidden), 6)
    edges = look(judge, given)
    assert all(edge.share == 0 for edge in edges)
    assert {edge.trend for edge in edges if edge.layer == bool(hidden)} == {"flat"}
    assert all(np.isfinite(edge.y).all() and np.isfinite(edge.bend) for edge in edges)
    assert all(effect.spread == 0 for effect in effects(judge, given))


@pytest.mark.parametrize("spec", [JudgeSpec(), JudgeSpec(hidden=4), JudgeSpec(degree=1)], ids=["one layer", "two", "k = 1"])
def test_pruning_takes_the_weak_edges_and_keeps_what_the_judge_says(spec: JudgeSpec) -> None:
    judge, given = listening(spec)
    x = features(*given.tensors(), judge.ranks)
    kept = {name: tensor.clone() for name, tensor in judge.state_dict().items()}
    pruned, left = prune(judge, given, 0.01)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in judge.state_dict().items()), "the judge itself stays"
    cut = 0
    for layer, share in zip(kan_layers(pruned), attribution(kan_layers(judge), x), strict=True):
        weak = torch.from_numpy(share < 0.01)
        assert (layer.spline[weak] == 0).all() and (layer.base[weak] == 0).all()
        assert (layer.base[~weak] != 0).all()
        cut += int(weak.sum())
    assert cut > 0 and left == sum(layer.base.numel() for layer in kan_layers(judge)) - cut
    assert np.corrcoef(pruned.confidence(given), judge.confidence(given))[0, 1] > 0.99
    # On average an output says what it said: a pruned edge's mean is in the bias.
    assert pruned.layers(x).mean(0).detach().numpy() == pytest.approx(judge.layers(x).mean(0).detach().numpy(), abs=0.03)
    assert all(np.isfinite(edge.y).all() for edge in look(pruned, given))


def test_pruning_everything_leaves_a_constant_and_nothing_leaves_the_judge() -> None:
    judge, given = listening(JudgeSpec(hidden=3))
    constant, left = prune(judge, given, 1.1)
    x = features(*given.tensors(), judge.ranks)
    assert left == 0 and constant.layers(x).std(0).max() < 1e-5
    assert constant.layers(x)[0].detach().numpy() == pytest.approx(judge.layers(x).mean(0).detach().numpy(), abs=0.1)
    same, left = prune(judge, given, 0.0)
    assert left == 10 * 3 + 3 * 6 and np.array_equal(same.confidence(given), judge.confidence(given))


def test_l1_and_entropy_leave_fewer_edges_and_nearly_the_same_judge() -> None:
    given, labels = length_tells()
    targets = one_hot(labels, 6)
    plain, sparse = (fit_judge(JudgeSpec(l1=weight, entropy=weight), given, targets) for weight in (0.0, 0.01))

    def strong(judge: Judge) -> int:
        return sum(edge.share > 0.005 for edge in look(judge, given))

    assert strong(sparse) < 0.5 * strong(plain)
    assert all(torch.isfinite(tensor).all() for tensor in sparse.state_dict().values())
    assert np.corrcoef(sparse.confidence(given), plain.confidence(given))[0, 1] > 0.95
    mlp = fit_judge(JudgeSpec(kind="mlp", l1=0.01), given, targets)
    assert np.array_equal(mlp.confidence(given), fit_judge(JudgeSpec(kind="mlp"), given, targets).confidence(given))


@pytest.mark.parametrize(
    ("curve", "way"),
    [([0, 1, 2], "rising"), ([2, 1, 1], "falling"), ([0, 2, 1], "mixed"), ([0, 1, 0.999, 2], "rising"), ([3, 3, 3], "flat")],
)
def test_trend(curve: list[float], way: str) -> None:
    assert trend(np.array(curve, float)) == way


def test_bend_is_nothing_for_a_line_and_all_for_a_symmetric_bow() -> None:
    z = np.linspace(-1, 1, 101)
    assert bend(z, 3 * z - 1) == pytest.approx(0, abs=1e-6)
    assert bend(z, z**2) == pytest.approx(1, abs=1e-6)
    assert bend(z, z + 0 * z) < bend(z, z + z**2) < 1
    assert bend(np.zeros(5), np.zeros(5)) == 0 and bend(np.ones(5), np.arange(5.0)) == 1


def test_an_mlp_has_no_edges_and_the_error_says_what_to_do() -> None:
    given, _ = predictions(50)
    judge = Judge(JudgeSpec(kind="mlp"), 6)
    for call in (lambda: look(judge, given), lambda: effects(judge, given), lambda: prune(judge, given, 0.1)):
        with pytest.raises(ConfigError, match="MLP") as error:
            call()
        assert 'kind = "kan"' in error.value.fix


@pytest.mark.parametrize("hidden", [0, 3])
def test_figures_show_the_edges_with_their_names_and_units(hidden: int, tmp_path: Path) -> None:
    judge, given = listening(JudgeSpec(hidden=hidden))
    names, edges = node_names(judge), look(judge, given)
    figure = draw_edges(edges[:6], names, "a title")
    panels = [axes for axes in figure.axes if axes.lines]
    assert len(panels) == 6
    for axes, edge in zip(panels, edges, strict=False):
        assert axes.get_title(loc="left") == f"{names[edge.layer][edge.input]} → {names[edge.layer + 1][edge.output]}"
        line = axes.lines[-1]
        assert np.array_equal(line.get_xdata(), edge.x) and np.array_equal(line.get_ydata(), edge.y)
        low, high = axes.get_ylim()
        assert low < edge.y.min() and high > edge.y.max()
    words = next(axes for axes in panels if axes.get_title(loc="left").startswith("ln(1 + length)"))
    assert words.get_xlabel() == "words"
    assert all(np.log1p(float(t.get_text())) == pytest.approx(t.get_position()[0]) for t in words.get_xticklabels())
    figure.savefig(tmp_path / "edges.png")
    drawn = draw_effects(effects(judge, given), names, "a title")
    assert sum(bool(axes.lines) for axes in drawn.axes) == 10
    drawn.savefig(tmp_path / "effects.png")
    assert (tmp_path / "edges.png").stat().st_size > 20_000


def test_a_constant_input_draws_too(tmp_path: Path) -> None:
    judge, given = listening(JudgeSpec())
    same = replace(given, length=np.full(len(given), 7, np.float32), unknown=np.zeros(len(given), np.float32))
    draw_edges(look(judge, same)[:60], node_names(judge), "constant").savefig(tmp_path / "e.png", dpi=30)
    draw_effects(effects(judge, same), node_names(judge), "constant").savefig(tmp_path / "f.png", dpi=30)
