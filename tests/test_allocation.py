"""Laws of every allocation: the budget is met to the weight, bounds hold, and looking changes nothing."""

import copy
import dataclasses
import math

import pytest
import torch
from cases import ALLOCATIONS, PATTERNS
from torch import nn

import secateur
from secateur import NM, Block, Column, PatternError, Recipe, RecipeError, Unstructured, allocate, prune_
from secateur.pruning import ALLOCATIONS as TABLE
from secateur.pruning import _allocation
from secateur.pruning._allocation import Allocation
from secateur.pruning._counts import Steps, meet, whole_steps


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def blocks_of(*shapes, bias=True):
    """Blocks of two linear layers each, of the given (hidden, width) shapes."""
    made = [
        nn.Sequential(nn.Linear(width, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, width, bias=bias))
        for hidden, width in shapes
    ]
    for number, block in enumerate(made):  # so that no two layers matter equally
        with torch.no_grad():
            block[0].weight *= torch.rand_like(block[0].weight) ** (2 * number) * (1 + number)
    return nn.Sequential(*made)


def batches_of(width=20, number=3):
    scale = torch.logspace(-1, 1, width)
    return [torch.randn(40, width) * scale for _ in range(number)]


def at(pattern, sparsity):
    return {"pattern": pattern, "sparsity": sparsity if pattern.sparsity is None else None}


def test_the_list_of_cases_is_the_table():
    assert list(TABLE) == ALLOCATIONS


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_the_budget_is_that_of_uniform_to_the_weight_and_pruning_meets_it(allocation, pattern):
    model = blocks_of((40, 20), (60, 20))
    batches = batches_of()
    for method, sparsity in (("magnitude", 0.29), ("wanda", 0.5)):
        settings = {**at(pattern, sparsity), "method": method}
        uniform = prune_(copy.deepcopy(model), batches, **settings)
        found = allocate(model, batches, **settings, allocation=allocation)
        assert found.num_pruned == found.budget == uniform.num_pruned
        assert all(0 <= share <= 1 for share in found.shares.values())
        pruned = copy.deepcopy(model)
        report = prune_(pruned, batches, **settings, allocation=allocation)
        assert report.num_pruned == uniform.num_pruned
        assert {layer.name: layer.pruned for layer in report.layers} == {row.name: row.pruned for row in found.layers}
        assert {layer.name: layer.asked for layer in report.layers} == found.shares


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_nothing_and_everything_are_budgets_too(allocation, sparsity):
    model = blocks_of((24, 20), (60, 20))
    found = allocate(model, batches_of(), sparsity=sparsity, allocation=allocation)
    assert set(found.shares.values()) == {sparsity}


@pytest.mark.parametrize("allocation", [name for name in ALLOCATIONS if name != "uniform"])
def test_an_allocation_tells_layers_apart(allocation):
    found = allocate(blocks_of((24, 20), (60, 20), (36, 20)), batches_of(), sparsity=0.5, allocation=allocation)
    assert max(found.shares.values()) - min(found.shares.values()) > 0.03


@pytest.mark.parametrize("bounds", [(0.4, 0.55), (0.5, 0.9)])
@pytest.mark.parametrize("pattern", [Unstructured("row"), Block(2, 4), Column()], ids=str)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_bounds_hold_for_every_layer_and_the_budget_is_still_exact(allocation, pattern, bounds):
    model = blocks_of((24, 20), (60, 20))
    found = allocate(model, batches_of(), pattern=pattern, sparsity=0.5, allocation=allocation, sparsity_bounds=bounds)
    assert found.num_pruned == found.budget
    for layer in found.layers:
        low, high = (pattern.num_pruned(layer.shape, bound) for bound in bounds)
        assert low <= layer.pruned <= high


class Idle(nn.Module):
    """The first of two layers does nothing for the output."""

    def __init__(self):
        super().__init__()
        self.idle, self.busy = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return 1e-6 * self.idle(x) + self.busy(x)


@pytest.mark.parametrize(("sparsity", "highest"), [(0.5, 0.875), (0.6, 0.9)])
def test_sensitivity_empties_no_layer_unless_bounds_allow_it(sparsity, highest):
    settings = {"sparsity": sparsity, "method": "magnitude", "allocation": "sensitivity"}
    found = allocate(Idle(), [torch.randn(40, 16)], **settings)
    assert highest - 1 / 64 <= found.layers[0].sparsity <= highest
    wide = allocate(Idle(), [torch.randn(40, 16)], **settings, sparsity_bounds=(0.0, 0.999))
    assert wide.layers[0].sparsity > highest + 0.05
    assert wide.num_pruned == found.num_pruned == found.budget


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.7, "sparsity_bounds": (0.0, 0.6)}, "a sparsity from 0 to 0.6, and 0.7 was asked for"),
        ({"sparsity": 0.2, "sparsity_bounds": [0.3, 0.6]}, "a sparsity from 0.3 to 0.6, and 0.2 was asked for"),
        ({"sparsity": 0.5, "sparsity_bounds": (0.6, 0.4)}, "0 <= low <= high <= 1"),
        ({"sparsity": 0.5, "sparsity_bounds": (0.0, 40)}, "0 <= low <= high <= 1"),
        (
            {"pattern": "2:4", "sparsity": 0.3, "sparsity_bounds": (0.1, 1.0)},
            "a layer under 2:4 has a sparsity of 0.5 or 0, and sparsity_bounds=.0.1, 1. leave out one",
        ),
        ({"pattern": "2:4", "sparsity": 0.3, "sparsity_bounds": (0.0, 0.4)}, "leave out one of them"),
    ],
)
@pytest.mark.parametrize("allocation", ["uniform", "sensitivity"])
def test_bounds_that_cannot_be_kept_are_refused_before_any_work_with_what_is_possible(allocation, settings, message):
    if allocation == "uniform" and "pattern" in settings:
        message = "An allocation such as 'sensitivity' reaches less"
    with pytest.raises((RecipeError, PatternError), match=message):
        Recipe(**settings, allocation=allocation)


@pytest.mark.parametrize("bounds", [0.5, "wide", (0.1,), (0.1, 0.2, 0.3), (0.1, None)])
def test_bounds_are_two_numbers(bounds):
    with pytest.raises(TypeError, match=r"sparsity_bounds|number"):
        Recipe(sparsity=0.5, sparsity_bounds=bounds)


def test_a_recipe_with_bounds_is_written_and_read_and_one_without_keeps_its_form():
    recipe = Recipe(sparsity=0.5, allocation="erk", sparsity_bounds=(0.25, 0.75))
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert "sparsity_bounds" not in Recipe(sparsity=0.5, allocation="erk").to_dict()


# A choice between a pattern and nothing.


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.45, 0.5])
@pytest.mark.parametrize("allocation", [name for name in ALLOCATIONS if name != "uniform"])
def test_two_to_four_below_a_half_goes_to_whole_layers_as_near_to_the_budget_as_these_allow(allocation, sparsity):
    model = blocks_of((24, 20), (60, 20), (8, 20))
    settings = {"pattern": "2:4", "sparsity": sparsity, "method": "wanda", "allocation": allocation}
    found = allocate(model, batches_of(), **settings)
    sizes = [layer.shape[0] * layer.shape[1] // 2 for layer in found.layers]
    totals = {0}
    for size in sizes:
        totals |= {total + size for total in totals}
    budget = round(sum(sizes) * sparsity / 0.5)
    assert found.budget == budget
    assert abs(found.num_pruned - budget) == min(abs(total - budget) for total in totals)
    assert {layer.pattern for layer in found.layers} <= {"2:4", "dense"}
    before = copy.deepcopy(model)
    report = prune_(model, batches_of(), **settings)
    assert report.num_pruned == found.num_pruned
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight
        if layer.pruned:
            assert ((weight == 0).unflatten(1, (-1, 4)).sum(2) >= 2).all()
            assert layer.pattern == "2:4"
        else:
            assert torch.equal(weight, before.get_submodule(layer.name).weight)
            if 0 < sparsity < 0.5:
                assert any("stays dense" in note and "the budget of" in note for note in layer.notes)


def test_uniform_refuses_less_than_the_pattern_and_says_what_reaches_it():
    with pytest.raises(PatternError, match=r"fixes the sparsity at 0.5(.|\n)*'sensitivity' reaches less"):
        Recipe(pattern="2:4", sparsity=0.3)
    for allocation in ALLOCATIONS:
        with pytest.raises(PatternError, match=r"2:4 fixes the sparsity at 0\.5, but 0\.7"):
            Recipe(pattern="2:4", sparsity=0.7, allocation=allocation)


# What counts.


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(20, 20) for _ in range(3))
        self.third.weight = self.first.weight

    def forward(self, x):
        return self.third(self.second(self.first(x)).relu())


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_tied_weight_counts_once(allocation):
    found = allocate(Tied(), batches_of(), sparsity=0.5, allocation=allocation)
    assert [layer.name for layer in found.layers] == ["first", "second"]
    assert found.num_pruned == found.budget == 400
    assert found.layers[0].tied_to == ("third",)


@pytest.mark.parametrize("pattern", ["3:7", "block:8x3"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_dense_remainder_is_no_part_of_the_budget(allocation, pattern):
    model = blocks_of((24, 20), (60, 20))
    settings = {"pattern": pattern, "remainder": "dense", "method": "wanda"}
    settings |= {} if ":" in pattern[:2] else {"sparsity": 0.5}
    uniform = prune_(copy.deepcopy(model), batches_of(), **settings)
    found = allocate(model, batches_of(), **settings, allocation=allocation)
    assert found.num_pruned == uniform.num_pruned
    assert all(layer.weights < math.prod(layer.shape) for layer in found.layers)


class Experts(nn.Module):
    """A stack of matrices that a function multiplies, each with its own rows."""

    def __init__(self, number=3):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(number, 16, 20) * torch.arange(1.0, number + 1)[:, None, None])

    def forward(self, x):
        parts = x.chunk(len(self.gate_up_proj))
        return torch.cat([nn.functional.linear(part, w) for part, w in zip(parts, self.gate_up_proj, strict=True)])


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_matrix_of_a_stack_is_a_layer_of_its_own(allocation):
    model = nn.Sequential(nn.Linear(20, 20), Experts())
    rows = [torch.randn(240, 20) for _ in range(2)]
    found = allocate(model, rows, sparsity=0.5, method="wanda", allocation=allocation)
    assert [layer.name for layer in found.layers] == ["0", *(f"1.gate_up_proj.{number}" for number in range(3))]
    assert found.num_pruned == found.budget
    report = prune_(model, rows, sparsity=0.5, method="wanda", allocation=allocation)
    assert report.num_pruned == found.num_pruned


# Rounds.


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.8), ("block:2x4", 0.6), ("2:8", 0.5)])
@pytest.mark.parametrize("allocation", ["erk", "owl", "sensitivity"])
def test_shares_hold_in_every_round(allocation, pattern, sparsity):
    model = blocks_of((24, 40), (64, 40))
    rows = batches_of(40)
    settings = {"pattern": pattern, "sparsity": sparsity, "method": "wanda", "allocation": allocation}
    final = allocate(model, rows, **settings)
    seen = []

    def between(model, number):
        layers = [model.get_submodule(layer.name).weight for layer in final.layers]
        seen.append([float((weight == 0).double().mean()) for weight in layers])

    report = prune_(model, rows, **settings, rounds=3, between=between)
    assert {layer.name: layer.pruned for layer in report.layers} == {row.name: row.pruned for row in final.layers}
    for shares, whole in zip(seen, report.rounds, strict=False):
        for share, layer in zip(shares, final.layers, strict=True):
            expected = layer.pruned / math.prod(layer.shape) * whole / report.rounds[-1]
            assert share == pytest.approx(expected, abs=0.03)


# Looking changes nothing.


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_looking_changes_nothing(allocation):
    model = blocks_of((24, 20), (60, 20)).train()
    model[0][0].weight.data = model[0][0].weight.data.double().float()
    before = copy.deepcopy(model.state_dict())
    versions = [parameter.data_ptr() for parameter in model.parameters()]
    allocate(model, batches_of(), sparsity=0.6, method="sparsegpt", allocation=allocation)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert versions == [parameter.data_ptr() for parameter in model.parameters()]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.int32), before[name].view(torch.int32))


def test_an_error_while_a_layer_is_pruned_for_a_look_leaves_the_model_as_it_was():
    model = blocks_of((24, 20))
    before = copy.deepcopy(model.state_dict())
    rows = batches_of(number=2)

    def fails_when_pruned(module, batch):
        if int((module[0][0].weight == 0).sum()) > 10:
            raise KeyboardInterrupt
        return module(batch)

    with pytest.raises(KeyboardInterrupt):
        allocate(model, rows, sparsity=0.5, allocation="sensitivity", forward=fails_when_pruned)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_report_has_a_table_a_picture_and_json():
    import json

    found = allocate(blocks_of((24, 20), (60, 20)), batches_of(), sparsity=0.5, allocation="sensitivity")
    assert "█" in repr(found)
    assert "to the weight" in str(found)
    assert all(row[found.table.columns.index(column)] for row in found.table.rows for column in found.table.columns)
    table = json.loads(found.to_json())
    assert table["totals"] == {"weights": 3360, "pruned": 1680, "budget": 1680}
    assert table["layers"][0]["name"] == "0.0"
    assert "| 0.0 |" in found.to_markdown()
    assert "0.0" in found.to_html()
    assert all(layer.error is not None and layer.effect is not None for layer in found.layers)
    other = allocate(blocks_of((24, 20), (60, 20)), sparsity=0.5, method="magnitude", allocation="erk")
    assert all(layer.error is None for layer in other.layers)


@pytest.mark.parametrize("part", [0.0, 0.004, 0.5, 0.999, 1.0])
def test_a_bar_is_as_long_as_its_part(part):
    text = secateur.reports.bar(part)
    full, rest = text.count("█"), [c for c in text if c != "█"]
    assert len(rest) <= 1
    assert full + (("▏▎▍▌▋▊▉".index(rest[0]) + 1) / 8 if rest else 0) == pytest.approx(20 * part, abs=1 / 16)


# An allocation of one's own.


def by_norm(layers, target):
    """Prune the layer with smaller inputs fully, the other not at all; both have the same size."""
    assert target.sparsity == 0.5
    least = min(candidate.measured for candidate in layers)
    return [float(candidate.measured == least) for candidate in layers]


def norms(layers, target):
    return [float(candidate.statistics.require("input_norm").sum()) for candidate in layers]


@pytest.fixture
def by_norm_allocation(monkeypatch):
    found = Allocation(by_norm, norms, frozenset({"input_norm"}))
    monkeypatch.setitem(_allocation.ALLOCATIONS, "by_norm", found)


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
    report = prune_(Two(), [torch.randn(20, 8)], sparsity=0.5, method=method, allocation="by_norm")
    assert {layer.name: layer.sparsity for layer in report.layers} == {"blocks.0.0": 1.0, "blocks.1.0": 0.0}
    assert report.sparsity == 0.5
    assert report.recipe["allocation"] == "by_norm"


@pytest.mark.parametrize(
    ("allocation", "method", "needs"),
    [
        ("by_norm", "magnitude", "input_norm"),
        ("owl", "magnitude", "input_norm"),
        ("sensitivity", "magnitude", "gram"),
    ],
)
@pytest.mark.usefixtures("by_norm_allocation")
def test_an_allocation_that_reads_statistics_needs_batches(allocation, method, needs):
    with pytest.raises(RecipeError, match=rf"allocation '{allocation}' needs calibration inputs \({needs}\)"):
        prune_(Two(), sparsity=0.5, method=method, allocation=allocation)


@pytest.mark.parametrize("allocation", ["global", "erk", "lamp", "alpha"])
def test_the_others_need_none_where_the_method_needs_none(allocation):
    assert prune_(blocks_of((24, 20)), sparsity=0.5, method="magnitude", allocation=allocation).sparsity == 0.5


@pytest.mark.parametrize(
    ("share", "error", "message"),
    [
        (0.2, RecipeError, "'wrong' prunes 26 weights, but the budget is 64"),
        (1.5, PatternError, r"between 0 and 1, got 1\.5"),
        (float("nan"), PatternError, "between 0 and 1"),
    ],
)
def test_an_allocation_that_breaks_the_budget_changes_nothing(monkeypatch, share, error, message):
    wrong = Allocation(lambda layers, target: [share for _ in layers])
    monkeypatch.setitem(_allocation.ALLOCATIONS, "wrong", wrong)
    model = Two()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        prune_(model, sparsity=0.5, method="magnitude", allocation="wrong")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Whole units.


@pytest.mark.parametrize("seed", range(20))
def test_whole_steps_are_exact_within_bounds_and_near_whatever_the_sizes(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    sizes = [[1], [7, 11], [64, 48, 128], [6, 10, 15], [1, 1000]][seed % 5]
    steps, start, shares = [], [], []
    for _ in range(8):
        weights, number = sizes[draw(0, len(sizes))], draw(8, 300)
        low, high = sorted((draw(0, number), draw(0, number)))
        steps.append(Steps(weights, low, high, number))
        start.append(draw(low, high + 1))
        shares.append(draw(0, 1000) / 1000)
    total = sum(step.weights * count for step, count in zip(steps, start, strict=True))
    limits = [(step.low / max(step.number, 1), step.high / step.number) for step in steps]

    def family(number):
        return torch.tensor([min(max(s + number, a), b) for s, (a, b) in zip(shares, limits, strict=True)]).numpy()

    wanted = meet(family, [step.total for step in steps], total, (0.0, 1.0))
    found = whole_steps(wanted, steps, start)
    assert sum(step.weights * count for step, count in zip(steps, found, strict=True)) == total
    assert all(step.low <= count <= step.high for step, count in zip(steps, found, strict=True))
    if len(sizes) == 1:
        assert all(abs(s * step.number - c) < 1 + 1e-6 for s, step, c in zip(wanted, steps, found, strict=True))


def test_a_report_is_frozen():
    found = allocate(blocks_of((24, 20)), sparsity=0.5, method="magnitude")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.budget = 1


def test_nm_of_the_pattern_alone_is_as_uniform():
    for allocation in ALLOCATIONS:
        found = allocate(blocks_of((24, 20)), batches_of(), pattern=NM(2, 4), allocation=allocation)
        assert set(found.shares.values()) == {0.5}
