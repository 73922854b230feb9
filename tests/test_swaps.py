import itertools
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from cases import PATTERNS

from secateur import (
    NM,
    Block,
    Column,
    LayerProblem,
    LayerStatistics,
    Magnitude,
    Random,
    RecipeError,
    Refit,
    Row,
    Select,
    SparseGPT,
    Swaps,
    Unstructured,
    Wanda,
    verify,
)
from secateur.solvers import parse_method

all_patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
INNER = pytest.mark.parametrize("inner", [Select(Wanda()), Select(Random()), SparseGPT(block_size=8)], ids=repr)


def problem_of(pattern, sparsity=0.5, rows=6, columns=20, seed=0, groups=1, dtype=torch.float64):
    """Inputs that are alike in pairs, so that which of two is kept matters little, and which pairs are kept a lot."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(groups, 80, columns, generator=generator, dtype=torch.float64)
    inputs = (
        inputs
        + 1.5 * inputs.roll(1, 2)
        + inputs[..., :3] @ torch.randn(3, columns, generator=generator, dtype=torch.float64)
    )
    gram = inputs.mT @ inputs
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    statistics = LayerStatistics(80, gram.diagonal(dim1=1, dim2=2).sqrt().to(dtype), gram.to(dtype))
    return LayerProblem(weight.to(dtype), statistics, pattern, sparsity if pattern.sparsity is None else None)


def errors(problem, weight, damping=0.01):
    """Of each row, by the reference."""
    share = len(weight) // len(problem.statistics.gram)
    hessians = [reference.damped(gram.double().numpy(), damping) for gram in problem.statistics.gram]
    lost = (problem.weight - weight).double().numpy()
    return np.array([row @ hessians[i // share] @ row for i, row in enumerate(lost)])


def values_after(problem, weight, gone, back):
    """The weight after a swap of two units, the second at the values that are best while all others stay."""
    after = weight.double().numpy().copy()
    share = len(weight) // len(problem.statistics.gram)
    for i, j in gone:
        after[i, j] = 0
    for i in sorted({i for i, _ in back}):
        hessian = reference.damped(problem.statistics.gram[i // share].double().numpy(), 0.01)
        columns = [j for k, j in back if k == i]
        slope = (problem.weight[i].double().numpy() - after[i]) @ hessian
        after[i, columns] += np.linalg.solve(hessian[np.ix_(columns, columns)], slope[columns])
    return torch.from_numpy(after)


def swaps_of(problem, solution):
    """All swaps that keep the counts: of two units of a competition that have the same rows."""
    pattern = solution.pattern or problem.pattern
    for units in reference.competitions(pattern, *problem.weight.shape):
        for gone, back in itertools.permutations(units, 2):
            same_rows = {i for i, _ in gone} == {i for i, _ in back}
            if same_rows and solution.mask[gone[0]] and not solution.mask[back[0]]:
                yield gone, back


@all_patterns
@INNER
def test_the_error_falls_and_the_count_stays(inner, pattern):
    for dtype, seed in itertools.product((torch.float32, torch.float64), range(3)):
        problem = problem_of(pattern, seed=seed, dtype=dtype)
        before, after = inner.solve(problem), Swaps(inner).solve(problem)
        verify(problem, after)
        assert after.mask.sum() == before.mask.sum()
        assert errors(problem, after.weight).sum() <= errors(problem, before.weight).sum() * (1 + 1e-5)


@pytest.mark.parametrize(
    "pattern",
    [Unstructured("layer"), Unstructured("row"), NM(2, 4), NM(3, 10), Block(1, 2), Block(3, 2), Column(), Column(4)],
    ids=str,
)
@INNER
def test_no_single_swap_would_lower_the_error(inner, pattern):
    """Brute force over all swaps, each with its error computed anew."""
    problem = problem_of(pattern, columns=12 if pattern != NM(3, 10) else 20)
    # After the last round no fit follows, so that the values are those that the swaps were made with.
    solution = Swaps(inner, candidates=20).solve(problem)
    now = errors(problem, solution.weight).sum()
    swaps = list(swaps_of(problem, solution))
    assert swaps
    for gone, back in swaps:
        assert errors(problem, values_after(problem, solution.weight, gone, back)).sum() >= now * (1 - 1e-9)


@pytest.mark.parametrize("pattern", [Unstructured("row"), NM(2, 4), Block(2, 2), Column(2)], ids=str)
def test_the_swap_that_is_made_is_the_best_and_costs_what_it_says(pattern):
    """One unit is wrong: what the swap leaves is the least of all swaps' recomputed errors."""
    improved = 0
    for seed in range(8):
        problem, inner = problem_of(pattern, 0.25, rows=4, columns=8, seed=seed), Select(Random(seed))
        start = Refit(inner).solve(problem)
        now = errors(problem, start.weight).sum()
        best = min(
            errors(problem, values_after(problem, start.weight, *swap)).sum() for swap in swaps_of(problem, start)
        )
        after = errors(problem, Swaps(inner, rounds=1).solve(problem).weight).sum()
        assert after <= min(best, now) * (1 + 1e-9)
        improved += bool(after < now * (1 - 1e-6))
        assert (after < now * (1 - 1e-6)) == (best < now * (1 - 1e-6))
    assert improved > 0


@pytest.mark.parametrize("candidates", [1, 2, 5])
@all_patterns
def test_few_candidates_lower_the_error_too(pattern, candidates):
    problem = problem_of(pattern)
    inner = Select(Random())
    solution = Swaps(inner, candidates=candidates).solve(problem)
    verify(problem, solution)
    assert errors(problem, solution.weight).sum() <= errors(problem, inner.solve(problem).weight).sum() * (1 + 1e-9)


@pytest.mark.parametrize("pattern", [Unstructured("row"), NM(2, 4), Block(2, 2), Block(4, 2), Column(), Row()], ids=str)
def test_groups_have_inputs_of_their_own(pattern):
    better = 0
    for seed in range(6):
        problem, inner = problem_of(pattern, rows=8, groups=4, seed=seed), Select(Random(seed))
        solution = Swaps(inner).solve(problem)
        verify(problem, solution)
        assert solution.notes == ()
        before, after = errors(problem, Refit(inner).solve(problem).weight), errors(problem, solution.weight)
        assert after.sum() <= before.sum() * (1 + 1e-9)
        better += bool(after.sum() < 0.999 * before.sum())
    assert better > 0


def test_a_unit_in_parts_of_two_groups_is_said_and_left():
    problem = problem_of(Block(2, 2), rows=6, groups=2)
    solution = Swaps(Select(Magnitude())).solve(problem)
    verify(problem, solution)
    assert solution.notes == ("no swaps: units of block:2x2 cross the groups of the layer",)


@pytest.mark.parametrize("pattern", [Unstructured("layer"), NM(2, 4), Block(2, 2), Column(), Row()], ids=str)
def test_what_an_earlier_round_pruned_stays_pruned(pattern):
    problem = problem_of(pattern, 0.25)
    first = Select(Magnitude()).solve(replace(problem, pattern=NM(3, 4) if isinstance(pattern, NM) else pattern))
    later = replace(problem, weight=first.weight, pruned=~first.mask, sparsity=None if pattern.sparsity else 0.6)
    solution = Swaps(Select(Magnitude())).solve(later)
    verify(later, solution)


def test_rows_are_kept_by_their_exact_cost():
    problem = problem_of(Row())
    solution = Swaps(Select(Random())).solve(problem)
    costs = errors(problem, torch.zeros_like(problem.weight))
    assert set(solution.mask[:, 0].nonzero().flatten().tolist()) == reference.best(costs.tolist(), 3)
    assert torch.equal(solution.weight[solution.mask], problem.weight[solution.mask])


@pytest.mark.parametrize("pattern", [Unstructured("row"), NM(2, 4)], ids=str)
def test_dead_inputs_are_given_up_for_live_ones(pattern):
    problem = problem_of(pattern, 0.5)
    gram = problem.statistics.gram.clone()
    dead = [0, 1, 6, 7, 9, 13, 14, 19]
    gram[:, dead], gram[:, :, dead] = 0, 0
    problem = replace(problem, statistics=replace(problem.statistics, gram=gram))
    problem.weight[:, dead] *= 100
    mask = Swaps(Select(Magnitude())).solve(problem).mask
    assert Select(Magnitude()).solve(problem).mask[:, dead].any()
    assert not mask[:, dead].any()


@pytest.mark.parametrize("pattern", [Unstructured("row"), NM(2, 4), NM(4, 8)], ids=str)
@pytest.mark.parametrize("head", ["wanda", "sparsegpt"])
def test_a_refit_is_better_on_a_mask_of_swaps(head, pattern):
    problem = problem_of(pattern, 0.6, rows=16, columns=64)
    plain, swapped = (
        errors(problem, parse_method(text).solve(problem).weight).sum()
        for text in (f"{head}+refit", f"{head}+swaps+refit")
    )
    assert swapped < 0.93 * plain


def test_swaps_of_a_rounded_weight_are_refused():
    with pytest.raises(RecipeError, match=r"rounds to int8.*\n.*'\+refit' after '\+swaps'"):
        Swaps(SparseGPT(rounding="int8"))


@pytest.mark.parametrize("settings", [{"rounds": 0}, {"candidates": 0}, {"damping": -1}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(RecipeError, match=f"{next(iter(settings))} must be at least"):
        Swaps(SparseGPT(), **settings)
