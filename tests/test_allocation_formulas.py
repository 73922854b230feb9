"""Each allocation's formula against a slow one, and the faults of public code."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from secateur import LayerStatistics, Refit, Select, SparseGPT, StatisticsError, Unstructured, Wanda, allocate, prune_
from secateur.layers import select_layers
from secateur.patterns import SparsityPattern
from secateur.pruning._allocation import _sides
from secateur.pruning._counts import meet
from secateur.pruning._formulas import (
    alpha_shares,
    erk_shares,
    hill_exponent,
    lamp_costs,
    outliers,
    owl_shares,
    saliency_costs,
    threshold_shares,
)
from secateur.pruning._sensitivity import Curve, Sensitivity, least_loss, proxy

FREE = (0.0, 1.0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def total(shares, sizes):
    return float(np.asarray(shares) @ np.asarray(sizes, float))


# Budgets and bounds.


@pytest.mark.parametrize("sparsity", [0.01, 0.3, 0.5, 0.9, 0.99])
def test_every_formula_meets_the_budget_and_stays_within_zero_and_one(sparsity):
    """Public code of OWL and of AlphaPruning gives densities outside of [0, 1], and means of layers, not of weights."""
    sizes = [100, 5000, 800, 20]
    budget = sparsity * sum(sizes)
    values = torch.rand(4, 50)
    costs = [saliency_costs(Unstructured(), row[None] ** (3 * number + 1)) for number, row in enumerate(values)]
    for shares in (
        erk_shares([(10, 10), (50, 100), (20, 40), (4, 5)], sizes, budget, FREE),
        owl_shares([0.0, 0.5, 0.1, 0.01], sizes, budget, FREE),
        alpha_shares([2.0, 9.0, 3.0, None], ["", "", "", ""], sizes, budget, FREE),
        threshold_shares(costs, sizes, budget, FREE),
    ):
        assert total(shares, sizes) == pytest.approx(budget)
        assert ((shares >= 0) & (shares <= 1)).all()


def test_layers_that_are_all_alike_get_equal_shares():
    """Public code of OWL and of AlphaPruning divides by zero here."""
    sizes = [64, 256, 128]
    for shares in (
        owl_shares([0.2] * 3, sizes, 224, FREE),
        alpha_shares([3.0] * 3, ["a", "b", "c"], sizes, 224, FREE),
        alpha_shares([None] * 3, ["a", "b", "c"], sizes, 224, FREE),
    ):
        assert shares == pytest.approx([0.5] * 3)


def test_a_family_that_jumps_over_the_budget_is_met_in_between():
    shares = meet(lambda number: np.array([0.2, 0.4]) if number < 1 else np.array([0.6, 0.8]), [10, 10], 9, FREE)
    assert shares == pytest.approx([0.35, 0.55])


def test_one_layer_gets_the_budget():
    assert owl_shares([0.3], [50], 20, FREE) == pytest.approx([0.4])


# The formulas.


def test_erk_is_the_published_density_and_layers_that_would_be_above_one_stay_dense():
    sides, sizes = [(16, 4, 3, 3), (64, 64), (8, 8)], [576, 4096, 64]
    shares = erk_shares(sides, sizes, 0.9 * sum(sizes), FREE)
    raw = [sum(dims) / math.prod(dims) for dims in sides]
    assert (1 - shares[1]) / (1 - shares[0]) == pytest.approx(raw[1] / raw[0])
    dense = erk_shares(sides, sizes, 0.3 * sum(sizes), FREE)
    assert dense[2] == 0
    assert total(dense, sizes) == pytest.approx(0.3 * sum(sizes))


def test_erk_counts_the_sides_of_a_kernel():
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Flatten(), nn.Linear(16, 5))
    assert [_sides(layer) for layer in select_layers(model)[0]] == [(16, 4, 3, 3), (5, 16)]


def test_lamp_is_the_published_score():
    weight = torch.tensor([[3.0, -1.0], [2.0, 0.5]])
    squares = sorted(float(w) ** 2 for w in weight.flatten())
    expected = [square / sum(squares[place:]) for place, square in enumerate(squares)]
    found = np.exp(lamp_costs(Unstructured(), weight))
    assert found[0] == pytest.approx(expected[0])
    assert found[-1] == pytest.approx(expected[-1]) == 1.0
    assert set(np.round(found, 6)) == set(np.round(expected, 6))


def test_lamp_keeps_the_largest_weight_of_every_layer():
    large, small = 100 * torch.rand(20, 20), 0.001 * torch.rand(3, 3)
    shares = threshold_shares([lamp_costs(Unstructured(), w) for w in (large, small)], [400, 9], 390, FREE)
    assert shares[1] < 1  # one threshold on the magnitudes would empty it


def test_global_minimises_the_sum_of_relative_errors_of_uncorrelated_inputs():
    scores = [torch.rand(6, 10) ** power for power in (1, 4)]
    shares = threshold_shares([saliency_costs(Unstructured(), one) for one in scores], [60, 60], 60, FREE)

    def error(first):
        parts = []
        for one, count in zip(scores, (first, 60 - first), strict=True):
            squares = one.flatten().square().sort().values
            parts.append(float(squares[:count].sum() / squares.sum()))
        return sum(parts)

    best = min(range(61), key=error)
    assert abs(round(float(shares[0]) * 60) - best) <= 1


def test_the_scale_of_global_does_not_depend_on_the_scale_of_a_layer():
    scores = torch.rand(8, 8)
    for pattern in (Unstructured(), SparsityPattern.parse("block:2x2"), SparsityPattern.parse("row")):
        assert saliency_costs(pattern, scores) == pytest.approx(saliency_costs(pattern, 1e6 * scores), abs=1e-5)


def test_owl_spares_blocks_with_outliers_by_as_much_as_the_paper():
    scores = torch.ones(10, 10)
    scores[0, :3] = 100.0  # mean 3.97, of which five times is 19.85
    assert outliers([scores]) == 0.03
    assert outliers([scores, torch.ones(10, 10)]) == 0.015
    shares = owl_shares([0.03, 0.0, 0.015], [100] * 3, 150, FREE)
    assert shares[1] - shares[0] == pytest.approx(0.16)
    assert shares[2] == pytest.approx(0.5)


def test_the_hill_exponent_is_that_of_its_definition():
    weight = torch.randn(30, 12, dtype=torch.float64)
    values = sorted(float(v) ** 2 for v in torch.linalg.svdvals(weight))
    expected = 1 + 6 / sum(math.log(value / values[5]) for value in values[6:])
    assert hill_exponent(weight) == pytest.approx(expected)
    assert hill_exponent(weight.T) == pytest.approx(expected)
    assert hill_exponent(1000 * weight) == pytest.approx(expected)


@pytest.mark.parametrize("weight", [torch.zeros(5, 5), torch.ones(5, 5), torch.eye(6), torch.randn(1, 9)])
def test_a_spectrum_without_a_tail_has_no_exponent(weight):
    assert hill_exponent(weight) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 4), (64, 64), (192, 64), (64, 300)], ids=str)
def test_rounding_is_no_tail(shape, dtype):
    weight = torch.nn.init.orthogonal_(torch.empty(shape, dtype=torch.promote_types(dtype, torch.float32))).to(dtype)
    assert hill_exponent(weight) is None
    assert hill_exponent(torch.randn(shape).to(dtype)) is not None


def test_a_heavy_tail_is_spared_and_blocks_have_one_share():
    blocks = ["a", "a", "b", "b"]
    shares = alpha_shares([2.0, 3.0, 5.0, 6.0], blocks, [10, 30, 10, 30], 40, FREE)
    assert shares[0] == shares[1] < shares[2] == shares[3]
    assert shares[2] / shares[0] == pytest.approx(1.3 / 0.7)


# Sensitivity.


def test_a_curve_passes_through_its_points_and_rises_to_the_whole_output():
    curve = Curve((0.25, 0.5), (1.0, 4.0), 20.0)
    assert [curve.at(s) for s in (0, 0.25, 0.5, 1.0)] == pytest.approx([0, 1.0, 4.0, 20.0])
    assert curve.at(0.125) == pytest.approx(1 / 8)
    values = [curve.at(number / 100) for number in range(101)]
    assert values == sorted(values)
    assert Curve((0.5,), (0.0,), 0.0).at(0.7) == 0.0  # an output of zero has no error
    assert Sensitivity(Curve((0.5,), (0.0,), 0.0), 1.0).relative_error(0.7) is None


def test_the_least_loss_is_that_of_trying_all_shares():
    curves = [Curve((0.5,), (error,), 10.0) for error in (0.1, 1.0, 4.0)]
    layers = [Sensitivity(curve, weight) for curve, weight in zip(curves, (1.0, 2.0, 0.5), strict=True)]
    sizes = [64, 128, 64]
    shares = least_loss(layers, sizes, 128, FREE)
    assert total(shares, sizes) == pytest.approx(128)
    levels = [number / 64 for number in range(65)]
    best = min(
        sum(layer.loss(share) for layer, share in zip(layers, picked, strict=True))
        for first, second in itertools.product(levels, levels)
        if 0 <= (last := (128 - 64 * first - 128 * second) / 64) <= 1
        for picked in ((first, second, last),)
    )
    assert sum(layer.loss(share) for layer, share in zip(layers, shares, strict=True)) == pytest.approx(best)


@pytest.mark.parametrize("bounds", [(0.25, 0.75), (0.5, 0.5), (0.1, 0.51)])
def test_the_least_loss_keeps_bounds(bounds):
    layers = [Sensitivity(Curve((0.5,), (1.0,), 10.0), weight) for weight in (0.0, 1.0, 100.0)]
    shares = least_loss(layers, [10, 20, 30], 30, bounds)
    assert total(shares, [10, 20, 30]) == pytest.approx(30)
    assert ((shares >= bounds[0]) & (shares <= bounds[1])).all()


def test_a_method_that_selects_is_its_own_proxy_and_one_that_updates_has_sparsegpt():
    assert proxy(Select(Wanda())) == Select(Wanda())
    assert proxy(Refit(Select(Wanda()))) == proxy(SparseGPT()) == SparseGPT()


class Skipping(nn.Module):
    """The first layer's output hardly counts, the second's does."""

    def __init__(self):
        super().__init__()
        self.idle, self.busy = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return 0.01 * self.idle(x) + self.busy(x)


def with_logits(model, batch):
    return {"logits": model(batch)}


@pytest.mark.parametrize("forward", [None, with_logits], ids=["outputs", "logits"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "wanda+refit"])
def test_what_hardly_counts_is_pruned_first_although_its_own_error_is_as_large(method, forward):
    model, rows = Skipping(), [torch.randn(30, 16) for _ in range(3)]
    found = allocate(model, rows, sparsity=0.5, method=method, allocation="sensitivity", forward=forward)
    idle, busy = found.layers
    assert idle.sparsity > 0.8
    assert busy.sparsity < 0.2
    uniform, ours = copy.deepcopy(model), copy.deepcopy(model)
    prune_(uniform, rows, sparsity=0.5, method=method)
    prune_(ours, rows, sparsity=0.5, method=method, allocation="sensitivity", forward=forward)
    output = model(rows[0])
    assert (ours(rows[0]) - output).norm() < 0.6 * (uniform(rows[0]) - output).norm()


def test_two_to_four_goes_where_it_hurts_least():
    rows = [torch.randn(30, 16)]
    found = allocate(Skipping(), rows, pattern="2:4", sparsity=0.25, method="wanda", allocation="sensitivity")
    assert {layer.name: layer.pattern for layer in found.layers} == {"idle": "2:4", "busy": "dense"}
    assert found.num_pruned == found.budget == 128
    assert found.layers[0].error is not None
    assert 0 < found.layers[0].error < 1


def test_the_expected_error_is_that_of_pruning():
    rows = [torch.randn(200, 16)]
    model = Skipping()
    found = allocate(model, rows, sparsity=0.6, method="wanda", allocation="sensitivity", sparsity_bounds=(0.6, 0.6))
    assert found.layers[0].error is None  # nothing to measure
    found = allocate(model, rows, sparsity=0.6, method="wanda", allocation="sensitivity")
    report = prune_(model, rows, sparsity=0.6, method="wanda", allocation="sensitivity")
    for layer, row in zip(report.layers, found.layers, strict=True):
        assert layer.relative_error == pytest.approx(row.error, rel=0.15)


def test_padding_is_no_part_of_the_output():
    class Marked(Skipping):
        def forward(self, x, attention_mask):
            found = super().forward(x)
            return torch.where(attention_mask[..., None], found, 1e4 * self.idle(x))

    mask = torch.ones(4, 10, dtype=torch.bool)
    mask[:, 6:] = False
    batch = {"x": torch.randn(4, 10, 16), "attention_mask": mask}
    found = allocate(Marked(), [batch], sparsity=0.5, method="wanda", allocation="sensitivity")
    assert found.layers[0].sparsity > found.layers[1].sparsity


def test_an_output_without_a_tensor_is_an_error():
    with pytest.raises(StatisticsError, match="without a floating-point tensor"):
        allocate(
            Skipping(),
            [torch.randn(4, 16)],
            sparsity=0.5,
            allocation="sensitivity",
            forward=lambda model, batch: model(batch).argmax(-1),
        )


def test_only_one_block_is_in_memory_at_a_time(monkeypatch):
    from secateur.pruning import _allot

    largest = []
    gather = _allot.gather

    def counted(*args, **kwargs):
        found = gather(*args, **kwargs)
        largest.append(sum(isinstance(one, LayerStatistics) for one in found.values()))
        return found

    monkeypatch.setattr(_allot, "gather", counted)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(4)])
    allocate(model, [torch.randn(30, 8)], sparsity=0.5, allocation="sensitivity")
    assert largest == [2] * 4
