"""Pruning that rounds as well: what is kept lies on the grid that packing stores, and others make up for the error."""

import json
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from cases import PATTERNS
from safetensors.torch import load_file
from tiny import with_tokenizer
from torch import nn
from typer.testing import CliRunner

from secateur import (
    NM,
    Block,
    LayerProblem,
    LayerStatistics,
    Magnitude,
    Recipe,
    RecipeError,
    Refit,
    Select,
    Solver,
    SparseGPT,
    Unstructured,
    Wanda,
    prune_,
    verify,
)
from secateur.cli import app
from secateur.formats import GRIDS, Bitmask
from secateur.solvers import ROUNDINGS, parse_method, with_rounding
from secateur.solvers._round import descend

SOLVERS = [
    SparseGPT(rounding="int8"),
    SparseGPT(block_size=8, rounding="int4"),
    Refit(Select(Wanda()), rounding="int8"),
    Refit(SparseGPT(), rounding="int4"),
]
all_solvers = pytest.mark.parametrize("solver", SOLVERS, ids=repr)
all_patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
all_roundings = pytest.mark.parametrize("rounding", ROUNDINGS)
ROWS, COLUMNS, DEAD = 6, 20, 3


def problem_of(pattern, sparsity=0.45, rows=ROWS, columns=COLUMNS, groups=1, dtype=torch.float32, seed=0):
    """Correlated inputs of different sizes, one of them never active."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, columns, columns, generator=generator, dtype=torch.float64)
    sizes = torch.randn(columns, generator=generator, dtype=torch.float64).exp()
    inputs = torch.randn(groups, 3 * columns, columns, generator=generator, dtype=torch.float64) @ mixing * sizes
    inputs[..., DEAD] = 0
    gram = (inputs.mT @ inputs).to(dtype)
    statistics = LayerStatistics(3 * columns, gram.diagonal(dim1=1, dim2=2).sqrt(), gram)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype)
    return LayerProblem(weight, statistics, pattern, sparsity if pattern.sparsity is None else None)


def cost(problem, weight, damping=0.01):
    hessian = reference.damped(problem.statistics.gram[0].double().numpy(), damping)
    return reference.objective(problem.weight.double().numpy(), weight.double().numpy(), hessian)


def to_nearest(weight, rounding):
    """What packing makes of a weight that was not rounded."""
    grid = GRIDS[rounding]
    scales = grid.scales(weight)
    return grid.codes(weight, scales) * grid.spread(scales, weight.shape[1])


def steps_of(weight, rounding):
    """The step of each weight's grid, as the solvers choose it: a row's largest weight is a bfloat16 number."""
    grid = GRIDS[rounding]
    near = weight if grid.group else weight.abs().amax(1, keepdim=True).bfloat16().to(weight)
    return grid.spread(grid.scales(near), weight.shape[1]).expand_as(weight)


# Laws of all that round


@all_patterns
@all_solvers
def test_the_contract_is_kept_and_packing_loses_nothing(solver, pattern):
    for sparsity in (0.0, 0.29, 0.55, 1.0):
        problem = problem_of(pattern, sparsity, columns=140)
        solution = solver.solve(problem)
        verify(problem, solution)
        plain = with_rounding(solver, None).solve(problem)
        assert torch.equal(solution.mask, plain.mask)
        assert torch.equal(to_nearest(solution.weight, solver.rounding), solution.weight)
        assert solution.weight.unique().numel() <= ROWS * 3 * (2 * GRIDS[solver.rounding].limit + 1)


@all_roundings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stored_model_is_packed_without_loss(rounding, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(136, 24), nn.ReLU(), nn.Linear(24, 8)).to(dtype)
    prune_(model, [torch.randn(300, 136, dtype=dtype)], sparsity=0.5, method="sparsegpt", rounding=rounding)
    for layer in (model[0], model[2]):
        weight = layer.weight.detach()
        assert float((weight == 0).float().mean()) > 0.45
        # int8 gives back the very weights; the scales of int4 have more bits than bfloat16.
        allowed = {"int8": 0.0, "int4": {torch.float32: 0.0, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]}
        packed = to_nearest(weight, rounding).to(dtype)
        torch.testing.assert_close(packed, weight, rtol=allowed[rounding], atol=0)
        if rounding == "int8":
            assert torch.equal(
                Bitmask.from_dense(weight, weight != 0, value_dtype=torch.int8).to_dense().to(dtype), weight
            )


@all_solvers
def test_rounding_what_is_rounded_changes_nothing(solver):
    problem = problem_of(Unstructured(), 0.0, columns=140)
    once = solver.solve(problem).weight
    assert torch.equal(solver.solve(replace(problem, weight=once)).weight, once)


@all_solvers
def test_zeros_stay_zero_where_nothing_is_pruned(solver):
    """So that a pruned model can be rounded after it was recovered."""
    problem = problem_of(Unstructured(), 0.5, columns=140)
    pruned = with_rounding(solver, None).solve(problem)
    recovered = pruned.weight * (1 + 0.1 * torch.rand(ROWS, 140, generator=torch.Generator().manual_seed(0)))
    solution = solver.solve(replace(problem, weight=recovered, sparsity=0.0))
    assert not solution.weight[~pruned.mask].any()
    assert int(solution.weight.count_nonzero()) > 0.3 * ROWS * 140
    assert torch.equal(to_nearest(solution.weight, solver.rounding), solution.weight)


@all_solvers
def test_groups_are_rounded_as_layers_of_their_own(solver):
    problem = problem_of(NM(2, 4), groups=3, dtype=torch.float64)
    solution = solver.solve(problem)
    for group, gram in enumerate(problem.statistics.gram):
        rows = slice(2 * group, 2 * group + 2)
        statistics = LayerStatistics(60, gram.diagonal().sqrt(), gram)
        alone = solver.solve(replace(problem, weight=problem.weight[rows], statistics=statistics))
        torch.testing.assert_close(solution.weight[rows], alone.weight)


@all_solvers
def test_the_smallest_layers_are_rounded(solver):
    for shape in ((1, 1), (1, 20), (6, 1), (0, 20), (6, 0), (0, 0)):
        if shape[1] <= DEAD:
            gram = torch.ones(shape[1], shape[1])
            problem = LayerProblem(
                torch.randn(shape), LayerStatistics(5, gram.diagonal().sqrt(), gram), Unstructured(), 0.5
            )
        else:
            problem = problem_of(Unstructured(), 0.5, *shape)
        verify(problem, solver.solve(problem))


# The arithmetic


@all_roundings
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(2, 4)], ids=str)
@pytest.mark.parametrize("columns", [20, 300])
def test_the_sweep_is_that_of_the_paper(rounding, pattern, columns):
    problem = problem_of(pattern, columns=columns, dtype=torch.float64)
    plain, solution = SparseGPT().solve(problem), SparseGPT(rounding=rounding).solve(problem)
    hessian = reference.damped(problem.statistics.gram[0].numpy(), 0.01)
    steps = steps_of(plain.weight, rounding).double().numpy()
    expected = reference.round_by_columns(
        plain.weight.numpy(), plain.mask.numpy(), hessian, steps, GRIDS[rounding].limit
    )
    if rounding == "int8":  # the largest weight of a row keeps its place, so its errors differ from there on
        far = np.abs(solution.weight.numpy() - expected) / steps
        assert np.median(far) < 0.5
        largest = plain.weight.abs().argmax(1)
        codes = solution.weight.numpy() / steps
        np.testing.assert_allclose(np.abs(codes[range(ROWS), largest]), 127, rtol=1e-6)
    else:
        np.testing.assert_allclose(solution.weight.numpy(), expected, rtol=1e-6, atol=1e-9)


@all_roundings
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_refit_ends_where_no_weight_gains_by_another_place(rounding, sparsity, monkeypatch):
    monkeypatch.setattr("secateur.solvers._refit._SWEEPS", 100)
    problem = problem_of(Unstructured("row"), sparsity, columns=150, rows=2, dtype=torch.float64)
    inner = Select(Wanda())
    near = Refit(inner).solve(problem)
    solution = Refit(inner, rounding=rounding).solve(problem)
    steps, limit = steps_of(near.weight, rounding).double(), GRIDS[rounding].limit
    held = near.weight.abs().argmax(1) if rounding == "int8" else torch.tensor([-1, -1])
    hessian = torch.from_numpy(reference.damped(problem.statistics.gram[0].numpy(), 0.01))
    slope = (problem.weight - solution.weight) @ hessian
    for direction in (-1, 1):
        moved = steps * direction
        gain = 2 * moved * slope - moved**2 * hessian.diagonal()  # what the cost falls by
        free = solution.mask & ((solution.weight + moved).abs() <= steps * (limit + 0.5))
        free &= torch.arange(150) != held[:, None]
        assert float(gain[free].max()) <= 1e-9 * cost(problem, near.weight * 0)


@all_roundings
def test_weights_that_move_far_land_on_the_grid_to_the_bit(rounding):
    problem = problem_of(Unstructured(), 0.0, rows=60, columns=140)
    near = problem.weight
    start = -SparseGPT(rounding=rounding).solve(problem).weight
    gram = torch.from_numpy(reference.damped(problem.statistics.gram[0].double().numpy(), 0.01)).float()[None]
    costs = [cost(problem, start)]
    for sweeps in (1, 2, 5):
        found = descend(start, near, near, gram, rounding, sweeps)
        assert torch.equal(to_nearest(found, rounding), found)
        costs.append(cost(problem, found))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.01 * costs[0]


@pytest.mark.parametrize(
    ("method", "rounding", "sparsity", "share"),
    [
        ("sparsegpt", "int4", 0.0, 0.75),
        ("sparsegpt", "int8", 0.0, 0.75),
        ("sparsegpt", "int4", 0.5, 0.95),
        ("wanda+refit", "int4", 0.0, 0.5),
        ("wanda+refit", "int4", 0.5, 0.85),
        ("wanda+refit", "int8", 0.5, 0.999),
        ("sparsegpt+refit", "int4", 0.5, 0.85),
    ],
)
def test_rounding_together_costs_less_than_one_after_the_other(method, rounding, sparsity, share):
    solver = parse_method(method)
    for seed in range(3):
        problem = problem_of(Unstructured(), sparsity, rows=32, columns=128, seed=seed)
        together = with_rounding(solver, rounding).solve(problem).weight
        after = to_nearest(solver.solve(problem).weight, rounding)
        assert cost(problem, together) < share * cost(problem, after)


def test_a_hand_made_case():
    # The first two inputs are nearly equal, so that only the sum of their weights matters, 6.8 steps.
    gram = torch.eye(9)
    gram[:2, :2] = torch.tensor([[1.0, 1.0], [1.0, 1.0025]])
    weight = torch.tensor([[3.4, 3.4, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]])
    problem = LayerProblem(weight, LayerStatistics(9, gram=gram), Unstructured(), 0.0)
    nearest = to_nearest(weight, "int4")[0]
    found = SparseGPT(damping=0.0, rounding="int4").solve(problem).weight[0]
    step = nearest[8] / 7
    assert (nearest / step).round().tolist() == [3, 3, 1, 2, 3, 4, 5, 6, 7]
    assert (found / step).round().tolist() == [3, 4, 1, 2, 3, 4, 5, 6, 7]


# Recipes


def test_a_recipe_sets_what_its_method_rounds_to():
    recipe = Recipe(sparsity=0.5, method="wanda+refit", rounding="int4")
    assert recipe.method == Refit(Select(Wanda()), rounding="int4")
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert Recipe(sparsity=0.5, method=SparseGPT(rounding="int8")).rounding == "int8"
    inner = Recipe(sparsity=0.5, method=Refit(SparseGPT(rounding="int8"), rounding="int8"), rounding="int4").method
    assert inner == Refit(SparseGPT(), rounding="int4")
    assert "rounding" not in Recipe(sparsity=0.5, method="sparsegpt").to_toml()
    assert Recipe.from_toml('sparsity = 0.5\nmethod = "sparsegpt"\nrounding = "int4"').rounding == "int4"


class Own(Solver):
    needs = frozenset()

    def solve(self, problem):
        return Select(Magnitude()).solve(problem)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "wanda", "rounding": "int8"}, r"wanda does not.\nUse 'sparsegpt', or add '\+refit'"),
        ({"method": Own(), "rounding": "int8"}, "needs a method that makes up"),
        ({"method": "sparsegpt", "rounding": "int5"}, "unknown rounding 'int5'; did you mean 'int"),
    ],
)
def test_what_cannot_round_says_so(settings, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(sparsity=0.5, **settings)


def test_a_refit_around_what_rounds_must_round_as_well():
    with pytest.raises(RecipeError, match=r"off that grid.\nGive rounding='int4' to Refit"):
        Refit(SparseGPT(rounding="int4"))


@all_roundings
def test_a_weight_beyond_the_largest_scale_is_refused(rounding):
    problem = problem_of(Unstructured(), 0.0)
    problem = replace(problem, weight=problem.weight * 1e6)
    if rounding == "int8":
        verify(problem, SparseGPT(rounding=rounding).solve(problem))
    else:
        with pytest.raises(ValueError, match="float16"):
            SparseGPT(rounding=rounding).solve(problem)


def test_only_the_last_round_rounds():
    torch.manual_seed(0)
    model, batches, seen = nn.Sequential(nn.Linear(20, 6)), [torch.randn(60, 20)], []
    report = prune_(
        model,
        batches,
        sparsity=0.6,
        method="sparsegpt",
        rounding="int4",
        rounds=3,
        between=lambda changed, number: seen.append(changed[0].weight.detach().clone()),
    )
    assert len(seen) == 2
    for weight in seen:
        assert not torch.equal(to_nearest(weight, "int4"), weight)
    assert torch.equal(to_nearest(model[0].weight.detach(), "int4"), model[0].weight)
    assert report.recipe["method"]["rounding"] == "int4"
    assert report.layers[0].relative_error > 0
    report.verify(model)


def test_the_command_rounds(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=2048
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("def add(a, b):\n    return a + b\n" * 40)
    arguments = ["prune", with_tokenizer(tmp_path / "model"), "--output", tmp_path / "out", "--sparsity", "0"]
    arguments += ["--method", "sparsegpt", "--rounding", "int4", "--calibration", text, "--samples", "2"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--sequence-length", "16", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["recipe"]["method"]["rounding"] == "int4"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for layer in report["layers"]:
        weight = stored[f"{layer['name']}.weight"]
        assert torch.equal(to_nearest(weight, "int4"), weight)
        assert 0 < layer["relative_error"] < 0.3
