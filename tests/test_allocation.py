"""Laws of every allocation, and what prune_ does for one that reads statistics."""

import pytest
import torch
from cases import PATTERNS
from torch import nn

from secateur import NM, PatternError, Recipe, RecipeError, Unstructured, prune_
from secateur.layers import select_layers
from secateur.pruning import _allocation
from secateur.pruning._allocation import ALLOCATIONS, Allocation, Candidate, allocate


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def model_of(*shapes):
    """Linear layers of the given (out, in) shapes."""
    return nn.ModuleList(nn.Linear(columns, rows) for rows, columns in shapes)


def candidates_of(pattern, *shapes):
    return [Candidate(layer, layer.fit(pattern)) for layer in select_layers(model_of(*shapes))[0]]


def recipe_of(allocation, pattern, sparsity):
    return Recipe(pattern, sparsity if pattern.sparsity is None else None, allocation=allocation)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_layer_gets_a_share_and_the_budget_is_kept(allocation, pattern):
    layers = candidates_of(pattern, (6, 20), (12, 40), (24, 20))
    for sparsity in (0.0, 0.29, 0.5, 1.0):
        recipe = recipe_of(allocation, pattern, sparsity)
        shares = allocate(layers, recipe.allocation, recipe.sparsity)
        assert list(shares) == ["0", "1", "2"]
        assert all(0 <= share <= 1 for share in shares.values())
        shapes = dict(zip(shares, ((6, 20), (12, 40), (24, 20)), strict=True))
        budget = sum(pattern.num_pruned(shape, recipe.sparsity) for shape in shapes.values())
        assert sum(pattern.num_pruned(shape, shares[name]) for name, shape in shapes.items()) == budget


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_share_is_what_the_layer_is_pruned_to(allocation):
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    recipe = Recipe(sparsity=0.4, allocation=allocation)
    shares = allocate(
        [Candidate(layer, layer.fit(recipe.pattern)) for layer in select_layers(model)[0]],
        recipe.allocation,
        recipe.sparsity,
    )
    report = prune_(model, [torch.randn(20, 8)], recipe)
    assert {layer.name: layer.asked for layer in report.layers} == shares


def test_uniform_gives_every_layer_the_sparsity_of_the_recipe_or_of_the_pattern():
    assert allocate(candidates_of(Unstructured(), (3, 7), (5, 2)), "uniform", 0.3) == {"0": 0.3, "1": 0.3}
    assert allocate(candidates_of(NM(1, 4), (3, 8)), "uniform", None) == {"0": 0.75}


# An allocation of one's own.


def by_norm(layers, sparsity):
    """Prune the layer with smaller inputs fully, the other not at all; both have the same size."""
    assert sparsity == 0.5
    quiet, loud = sorted(layers, key=lambda candidate: float(candidate.statistics.require("input_norm").sum()))
    return {quiet.layer.name: 1.0, loud.layer.name: 0.0}


@pytest.fixture
def by_norm_allocation(monkeypatch):
    monkeypatch.setitem(_allocation.ALLOCATIONS, "by_norm", Allocation(by_norm, frozenset({"input_norm"})))


class Two(nn.Module):
    """The second layer's input is a hundred times the first layer's, until the first layer is pruned."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8, bias=False)) for _ in range(2)])

    def forward(self, x):
        return self.blocks[1](100 * self.blocks[0](x))


@pytest.mark.usefixtures("by_norm_allocation")
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_an_allocation_reads_statistics_of_the_dense_model(method):
    model = Two()
    report = prune_(model, [torch.randn(20, 8)], sparsity=0.5, method=method, allocation="by_norm")
    assert {layer.name: layer.sparsity for layer in report.layers} == {"blocks.0.0": 1.0, "blocks.1.0": 0.0}
    assert report.sparsity == 0.5
    assert report.recipe["allocation"] == "by_norm"


@pytest.mark.usefixtures("by_norm_allocation")
def test_an_allocation_that_reads_statistics_needs_batches():
    with pytest.raises(RecipeError, match=r"allocation 'by_norm' needs calibration inputs \(input_norm\)"):
        prune_(Two(), sparsity=0.5, method="magnitude", allocation="by_norm")


@pytest.mark.parametrize(
    ("share", "error", "message"),
    [
        (0.4, RecipeError, "'wrong' prunes 52 weights, but the budget is 64"),
        (1.5, PatternError, r"between 0 and 1, got 1\.5"),
    ],
)
def test_an_allocation_that_breaks_the_budget_changes_nothing(monkeypatch, share, error, message):
    wrong = Allocation(lambda layers, sparsity: {candidate.layer.name: share for candidate in layers})
    monkeypatch.setitem(_allocation.ALLOCATIONS, "wrong", wrong)
    model = Two()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(error, match=message):
        prune_(model, sparsity=0.5, method="magnitude", allocation="wrong")
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
