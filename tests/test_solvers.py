import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from cases import PATTERNS, SOLVERS
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur import (
    ADMM,
    ALPS,
    NM,
    RIA,
    Block,
    Column,
    Fisher,
    LayerProblem,
    LayerStatistics,
    Magnitude,
    Movement,
    PatternError,
    Random,
    RecipeError,
    Refit,
    Row,
    Select,
    Solution,
    SolverError,
    SparseGPT,
    StatisticsError,
    Taylor,
    TransposableNM,
    Unstructured,
    Wanda,
    verify,
)
from secateur.calibration import GRADIENTS

FROM_INPUTS = [solver for solver in SOLVERS if solver.needs and not solver.needs & GRADIENTS]
all_solvers = pytest.mark.parametrize("solver", SOLVERS, ids=repr)
# Mistakes are found by the same code for every importance and block size.
one_of_each_class = pytest.mark.parametrize("solver", [Select(Magnitude()), SparseGPT(), Refit(SparseGPT())], ids=repr)
# ADMM and ALPS are not: tests/test_admm_alps.py compares them with the published ones. tests/test_swaps.py has swaps.
as_published = pytest.mark.parametrize(
    "solver", [s for s in SOLVERS if not isinstance(s, ADMM | ALPS) and "Swaps" not in repr(s)], ids=repr
)
all_patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=str)

ROWS, COLUMNS, DEAD = 6, 20, 3


def inputs_of(tokens=64, columns=COLUMNS, seed=0):
    """Correlated, of very different sizes, and one feature that is never active."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    scales = torch.randn(columns, generator=generator, dtype=torch.float64).exp()
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing * scales
    if columns > DEAD:
        inputs[:, DEAD] = 0
    return inputs


def statistics_of(inputs):
    gram = inputs.mT @ inputs
    return LayerStatistics(inputs.shape[-2], gram.diagonal(dim1=-2, dim2=-1).sqrt(), gram)


def problem_of(pattern, sparsity=0.45, rows=ROWS, columns=COLUMNS, tokens=64, seed=0, dtype=torch.float64):
    statistics = statistics_of(inputs_of(tokens, columns, seed))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    gradient = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64)
    statistics = LayerStatistics(
        tokens,
        statistics.input_norm.to(dtype),
        statistics.gram.to(dtype),
        gradient=gradient.to(dtype),
        gradient_squares=gradient.square().to(dtype),
    )
    return LayerProblem(weight.to(dtype), statistics, pattern, sparsity if pattern.sparsity is None else None)


def sparsity_of(problem):
    return problem.pattern.sparsity if problem.sparsity is None else problem.sparsity


def truth(solver, problem):
    """Weight and mask by the reference; the refit of :class:`Refit` is exact here."""
    weight, gram = problem.weight.numpy(), problem.statistics.gram.numpy()
    match solver:
        case Select(importance):
            norms = problem.statistics.input_norm.numpy()
            scores = {
                Magnitude: lambda: reference.magnitude(weight),
                Wanda: lambda: reference.wanda(weight, norms),
                RIA: lambda: reference.ria(weight, norms),
                Taylor: lambda: reference.taylor(weight, problem.statistics.gradient.numpy()),
                Fisher: lambda: reference.fisher(weight, problem.statistics.gradient_squares.numpy()),
                Movement: lambda: reference.movement(weight, problem.statistics.gradient.numpy()),
                Random: lambda: importance.scores(problem.weight, None).double().numpy(),
            }[type(importance)]()
            pattern = problem.pattern
            if pattern == Unstructured() and isinstance(importance, Wanda | RIA):
                pattern = Unstructured("row")
            mask = reference.mask(pattern, scores, sparsity_of(problem))
            return weight * mask, mask
        case SparseGPT(block_size, damping):
            return reference.sparsegpt(weight, gram, problem.pattern, sparsity_of(problem), block_size, damping)
        case Refit(inner, _, damping):
            _, mask = truth(inner, problem)
            return reference.masked_least_squares(weight, reference.damped(gram, damping), mask), mask


def cost(problem, weight, damping=0.01):
    """What :class:`Refit` minimises."""
    hessian = reference.damped(problem.statistics.gram.double().numpy(), damping)
    return reference.objective(problem.weight.double().numpy(), weight.double().numpy(), hessian)


# Laws of every solver under every pattern


@all_patterns
@all_solvers
def test_verify_accepts_what_the_solver_returns(solver, pattern):
    for sparsity, dtype in itertools.product((0.0, 0.29, 0.55, 1.0), (torch.float32, torch.float64)):
        problem = problem_of(pattern, sparsity, dtype=dtype)
        solution = solver.solve(problem)
        verify(problem, solution)
        assert solution.weight.dtype == dtype
        assert solution.scores.shape == problem.weight.shape
        assert solution.scores.isfinite().all()
        is_tied = isinstance(pattern, TransposableNM)  # no single exchange of two weights is legal
        assert [note for note in solution.notes if not (is_tied and note.startswith("no swaps: a single one"))] == []


@all_patterns
@as_published
def test_solution_is_that_of_the_paper(solver, pattern):
    problem = problem_of(pattern)
    exact = replace(solver, iterations=200) if isinstance(solver, Refit) else solver
    weight, mask = truth(exact, problem)
    solution = exact.solve(problem)
    np.testing.assert_array_equal(solution.mask.numpy(), mask)
    np.testing.assert_allclose(solution.weight.numpy(), weight, rtol=1e-8, atol=1e-8)


# Columns are removed one by one, not in blocks: the brute force of many of them would take hours.
@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("row"), NM(2, 4), Block(4, 4)], ids=str)
def test_sparsegpt_is_that_of_the_paper_over_many_blocks_and_panels(pattern):
    problem = problem_of(pattern, 0.6, rows=8, columns=300, tokens=600)
    weight, mask = truth(SparseGPT(), problem)
    solution = SparseGPT().solve(problem)
    np.testing.assert_array_equal(solution.mask.numpy(), mask)
    np.testing.assert_allclose(solution.weight.numpy(), weight, rtol=1e-8, atol=1e-8)


@settings(max_examples=60)
@given(
    st.sampled_from([Unstructured("layer"), Unstructured("row"), Block(2, 3), Block(1, 5), Row(), Column(), Column(3)]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 50),
    st.floats(0, 1),
)
def test_shares_of_the_blocks_add_up_to_the_exact_count(pattern, tall, wide, block_size, sparsity):
    problem = problem_of(pattern, sparsity, rows=2 * tall, columns=15 * wide)
    solution = SparseGPT(block_size).solve(problem)
    verify(problem, solution)
    _, mask = truth(SparseGPT(block_size), problem)
    np.testing.assert_array_equal(solution.mask.numpy(), mask)


def no_change(pattern):
    return (NM(pattern.m, pattern.m, pattern.remainder), None) if isinstance(pattern, NM) else (pattern, 0.0)


@all_patterns
@all_solvers
def test_sparsity_zero_changes_nothing(solver, pattern):
    problem = problem_of(*no_change(pattern))
    problem.weight[0, :4] = torch.tensor([0.0, 1e-300, 1e100, -1e-310], dtype=torch.float64)
    assert torch.equal(solver.solve(problem).weight, problem.weight)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(4, 4)], ids=str)
@all_solvers
def test_sparsity_zero_keeps_even_the_sign_of_zero(solver, pattern):
    problem = problem_of(*no_change(pattern))
    problem.weight[2, 5] = -0.0
    assert torch.equal(solver.solve(problem).weight.view(torch.int64), problem.weight.view(torch.int64))


@all_patterns
@all_solvers
def test_sparsity_one_leaves_nothing(solver, pattern):
    pattern = NM(0, pattern.m) if isinstance(pattern, NM) else replace(pattern)
    problem = problem_of(pattern, 1.0, rows=8, columns=3 * 7 * 20, tokens=4)
    solution = solver.solve(problem)
    assert not solution.weight.any()
    assert not solution.mask.any()


@all_patterns
@all_solvers
def test_problem_is_left_as_it_was(solver, pattern):
    problem, twin = problem_of(pattern), problem_of(pattern)
    solution = solver.solve(problem)
    assert torch.equal(problem.weight, twin.weight)
    assert torch.equal(problem.statistics.gram, twin.statistics.gram)
    assert torch.equal(problem.statistics.input_norm, twin.statistics.input_norm)
    solution.weight.fill_(7)
    assert torch.equal(problem.weight, twin.weight)


@all_patterns
@all_solvers
def test_strides_of_the_weight_do_not_matter(solver, pattern):
    problem = problem_of(pattern)
    solution = solver.solve(problem)
    turned = solver.solve(replace(problem, weight=problem.weight.T.contiguous().T))
    assert torch.equal(turned.mask, solution.mask)
    torch.testing.assert_close(turned.weight, solution.weight)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 5), Unstructured("row")], ids=str)
@pytest.mark.parametrize("solver", [Select(Magnitude()), *FROM_INPUTS], ids=repr)
def test_groups_are_solved_as_layers_of_their_own(solver, pattern):
    """Rows of a grouped convolution see the inputs of their group only."""
    groups = [inputs_of(seed=seed) for seed in range(3)]
    statistics = statistics_of(torch.stack(groups))
    problem = replace(problem_of(pattern), statistics=statistics)
    solution = solver.solve(problem)
    verify(problem, solution)
    for group, inputs in enumerate(groups):
        rows = slice(2 * group, 2 * group + 2)
        alone = solver.solve(replace(problem, weight=problem.weight[rows], statistics=statistics_of(inputs)))
        assert torch.equal(solution.mask[rows], alone.mask)
        torch.testing.assert_close(solution.weight[rows], alone.weight)


@all_solvers
def test_smallest_layers_are_solved(solver):
    for shape in ((1, 1), (1, 20), (6, 1), (0, 20), (6, 0), (0, 0)):
        for pattern in (Unstructured(), Unstructured("row"), Row(), Column(), NM(1, 1)):
            problem = problem_of(pattern, 0.5, *shape)
            verify(problem, solver.solve(problem))


@pytest.mark.parametrize("pattern", [Unstructured("layer"), NM(2, 4), Column(4)], ids=str)
@pytest.mark.parametrize("solver", FROM_INPUTS, ids=repr)
def test_inputs_scaled_as_a_whole_change_nothing(solver, pattern):
    """Damping is relative, so any unit of the inputs gives the same layer."""
    problem = problem_of(pattern)
    solution = solver.solve(problem)
    for scale in (2.0**-40, 2.0**40):
        statistics = problem.statistics
        scaled = LayerStatistics(64, statistics.input_norm * scale, statistics.gram * scale**2)
        other = solver.solve(replace(problem, statistics=scaled))
        assert torch.equal(other.mask, solution.mask)
        torch.testing.assert_close(other.weight, solution.weight)


# Identities


@all_patterns
@pytest.mark.parametrize(("scale", "damping"), [(1.0, 0.0), (1e4, 0.01)])
def test_uncorrelated_inputs_turn_sparsegpt_into_magnitude(pattern, scale, damping):
    problem = problem_of(pattern)
    problem = replace(problem, statistics=LayerStatistics(64, gram=scale * torch.eye(COLUMNS, dtype=torch.float64)))
    magnitude = Select(Magnitude()).solve(problem)
    solution = SparseGPT(block_size=COLUMNS, damping=damping).solve(problem)
    assert torch.equal(solution.mask, magnitude.mask)
    torch.testing.assert_close(solution.weight, magnitude.weight, rtol=1e-12, atol=0)


@pytest.mark.parametrize("block_size", [1, 6, 19])
def test_uncorrelated_inputs_turn_sparsegpt_into_magnitude_of_each_block(block_size):
    problem = problem_of(Unstructured(), 0.5)
    problem = replace(problem, statistics=LayerStatistics(64, gram=torch.eye(COLUMNS, dtype=torch.float64)))
    mask = SparseGPT(block_size).solve(problem).mask
    for start in range(0, COLUMNS, block_size):  # half of 6 rows is whole in every block
        block = problem.weight[:, start : start + block_size]
        expected = reference.mask(Unstructured(), block.abs().numpy(), 0.5)
        np.testing.assert_array_equal(mask[:, start : start + block_size].numpy(), expected)


@all_patterns
def test_uncorrelated_inputs_leave_nothing_to_refit(pattern):
    problem = problem_of(pattern)
    statistics = LayerStatistics(64, torch.ones(COLUMNS), torch.eye(COLUMNS, dtype=torch.float64))
    problem = replace(problem, statistics=statistics)
    for inner in (Select(Magnitude()), Select(Wanda()), SparseGPT()):
        assert torch.equal(Refit(inner).solve(problem).weight, inner.solve(problem).weight)


@pytest.mark.parametrize("index", [0, 7, COLUMNS - 1])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_one_pruned_weight_is_optimal_brain_surgeon(index, damping):
    """The sweep has passed the columns before ``index``; all from there on move by the closed form."""
    inputs = inputs_of(seed=5)
    inputs[:, DEAD] = torch.linspace(-1, 1, 64)
    problem = LayerProblem(torch.ones(1, COLUMNS).double(), statistics_of(inputs), Unstructured(), 1 / COLUMNS)
    problem.weight[0, index] = 1e-9
    solution = SparseGPT(damping=damping).solve(problem)
    assert solution.mask.logical_not().nonzero().tolist() == [[0, index]]
    hessian = reference.damped(problem.statistics.gram.numpy(), damping)[index:, index:]
    expected = problem.weight[0].numpy().copy()
    expected[index:] = reference.optimal_brain_surgeon(expected[index:], hessian, 0)
    moved = solution.weight[0].numpy() - problem.weight[0].numpy()
    np.testing.assert_allclose(moved, expected - problem.weight[0].numpy(), rtol=1e-5, atol=1e-15)
    assert index == COLUMNS - 1 or np.abs(moved[index + 1 :]).max() > 0


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 10)], ids=str)
def test_groups_are_decided_one_after_the_other_whatever_the_block(pattern):
    problem = problem_of(pattern)
    solution = SparseGPT().solve(problem)
    assert torch.equal(pattern.mask(solution.scores), solution.mask)
    for block_size in (1, 3, 8, COLUMNS):
        other = SparseGPT(block_size).solve(problem)
        assert torch.equal(other.mask, solution.mask)
        torch.testing.assert_close(other.weight, solution.weight)


# Refit


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("inner", [Select(Magnitude()), SparseGPT(block_size=8)], ids=repr)
@pytest.mark.parametrize("pattern", [Unstructured("row"), NM(2, 4), Block(2, 4), Row(), Column()], ids=str)
def test_many_iterations_are_exact_least_squares(pattern, inner, damping):
    problem = problem_of(pattern)
    solution = Refit(inner, iterations=300, damping=damping).solve(problem)
    hessian = reference.damped(problem.statistics.gram.numpy(), damping)
    expected = reference.masked_least_squares(problem.weight.numpy(), hessian, solution.mask.numpy())
    np.testing.assert_allclose(solution.weight.numpy(), expected, rtol=1e-8, atol=1e-8)


def test_exact_least_squares_is_lstsq_on_the_inputs():
    """The reference against another one: no Gram matrix, no ridge."""
    inputs, problem = inputs_of(), problem_of(NM(2, 4))
    mask = Select(Wanda()).solve(problem).mask
    hessian = reference.damped(problem.statistics.gram.numpy(), 0.0)
    solved = reference.masked_least_squares(problem.weight.numpy(), hessian, mask.numpy())
    for i in range(ROWS):
        kept = mask[i] & (torch.arange(COLUMNS) != DEAD)
        target = inputs @ problem.weight[i]
        expected = torch.linalg.lstsq(inputs[:, kept], target[:, None]).solution[:, 0]
        np.testing.assert_allclose(solved[i][kept], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("inner", "damping"), [(Select(Magnitude()), 0.0), (Select(Random()), 0.01), (SparseGPT(), 1.0)], ids=repr
)
@all_patterns
def test_every_iteration_lowers_the_objective(inner, pattern, damping):
    problem = problem_of(pattern)
    mask = inner.solve(problem).mask
    costs = [cost(problem, inner.solve(problem).weight, damping)]
    for iterations in range(1, 15):
        costs.append(cost(problem, Refit(inner, iterations, damping).solve(problem).weight, damping))
        assert costs[-1] <= costs[-2] + 1e-9 * costs[0]
    partly_kept = (mask.any(1) & ~mask.all(1)).any()
    assert costs[-1] < costs[0] or not partly_kept  # a row that is pruned whole leaves nothing to make up for it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", [0, 3, 16, 26, 33])
def test_no_number_of_iterations_makes_it_worse(seed, dtype):
    """Once a row is solved, rounding errors are all that is left to divide by one another."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(10, 24, generator=generator, dtype=torch.float64)
    inputs *= (2 * torch.randn(24, generator=generator, dtype=torch.float64)).exp()
    weight = torch.randn(8, 24, generator=generator, dtype=torch.float64)
    exact = statistics_of(inputs)
    statistics = LayerStatistics(10, exact.input_norm.to(dtype), exact.gram.to(dtype))
    problem = LayerProblem(weight.to(dtype), statistics, NM(2, 4))
    inner = Select(Wanda())
    before = cost(problem, inner.solve(problem).weight)
    for iterations in (10, 30, 100, 300):
        assert cost(problem, Refit(inner, iterations).solve(problem).weight) <= before


def test_refit_keeps_mask_scores_and_notes_of_the_inner_solver():
    inner = SparseGPT(block_size=8)
    problem = problem_of(NM(2, 4))
    problem = replace(problem, statistics=LayerStatistics(64, gram=nearly_definite()))
    before, after = inner.solve(problem), Refit(inner, damping=1.0).solve(problem)
    assert torch.equal(before.mask, after.mask)
    assert torch.equal(before.scores, after.scores)
    assert before.notes == after.notes != ()


# Inputs that make trouble


@pytest.mark.parametrize("solver", [Select(Wanda()), Select(RIA()), SparseGPT(), Refit(SparseGPT())], ids=repr)
@pytest.mark.parametrize("pattern", [Unstructured("layer"), Unstructured("row"), Column(), NM(3, 4)], ids=str)
def test_dead_inputs_are_pruned_first(solver, pattern):
    dead = [1, 6, 11, 12, 19]  # one in every four
    inputs = inputs_of()
    inputs[:, DEAD] = inputs[:, 0].roll(1)
    inputs[:, dead] = 0
    problem = replace(problem_of(pattern, len(dead) / COLUMNS), statistics=statistics_of(inputs))
    problem.weight[:, dead] *= 1000
    solution = solver.solve(problem)
    assert not solution.mask[:, dead].any()
    alive = [j for j in range(COLUMNS) if j not in dead]
    if not isinstance(pattern, NM):  # nothing that mattered was lost, so nothing had to be made up for
        assert solution.mask[:, alive].all()
        assert torch.equal(solution.weight[:, alive], problem.weight[:, alive])


@all_patterns
@pytest.mark.parametrize("solver", [SparseGPT(), SparseGPT(block_size=8), Refit(Select(Wanda()))], ids=repr)
def test_fewer_tokens_than_inputs_are_enough(solver, pattern):
    problem = problem_of(pattern, tokens=5)
    exact = replace(solver, iterations=400) if isinstance(solver, Refit) else solver
    solution = exact.solve(problem)
    verify(problem, solution)
    weight, mask = truth(exact, problem)
    np.testing.assert_array_equal(solution.mask.numpy(), mask)
    np.testing.assert_allclose(solution.weight.numpy(), weight, rtol=1e-6, atol=1e-6)


def nearly_definite(lowest=-0.05):
    """A symmetric matrix with a mean diagonal of 1 and one eigenvalue of ``lowest``."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)).Q
    values = torch.full((COLUMNS,), (COLUMNS - lowest) / (COLUMNS - 1), dtype=torch.float64)
    values[0] = lowest
    gram = basis * values @ basis.T
    return (gram + gram.T) / 2


@pytest.mark.parametrize(
    ("damping", "lowest", "raised"), [(0.01, -0.05, 0.1), (0.01, -0.5, 1.0), (0.2, -0.5, 1.0), (0.0, -0.005, 0.01)]
)
def test_a_raised_damping_is_noted_and_used(damping, lowest, raised):
    problem = replace(problem_of(NM(2, 4)), statistics=LayerStatistics(64, gram=nearly_definite(lowest)))
    solution = SparseGPT(damping=damping).solve(problem)
    assert solution.notes == (f"damping raised from {damping:g} to {raised:g}",)
    plain = SparseGPT(damping=raised).solve(problem)
    assert plain.notes == ()
    assert torch.equal(solution.weight, plain.weight)
    weight, mask = truth(SparseGPT(damping=raised), problem)
    np.testing.assert_array_equal(solution.mask.numpy(), mask)
    np.testing.assert_allclose(solution.weight.numpy(), weight, rtol=1e-8, atol=1e-8)


HOPELESS = {
    "negative definite": -torch.eye(COLUMNS, dtype=torch.float64),
    "weakly negative definite": -0.5 * torch.eye(COLUMNS, dtype=torch.float64),
    "indefinite": nearly_definite(-3.0),
    "nan": torch.full((COLUMNS, COLUMNS), math.nan, dtype=torch.float64),
    "infinite": torch.full((COLUMNS, COLUMNS), math.inf, dtype=torch.float64),
}


@pytest.mark.parametrize("gram", HOPELESS.values(), ids=HOPELESS)
def test_a_hopeless_gram_is_an_error(gram):
    problem = replace(problem_of(NM(2, 4)), statistics=LayerStatistics(64, gram=gram))
    for damping in (0.0, 0.01, 1.0):
        with pytest.raises(SolverError, match="not positive definite, even with a damping of 1"):
            SparseGPT(damping=damping).solve(problem)


@pytest.mark.parametrize("gram", [HOPELESS["nan"], HOPELESS["infinite"]], ids=["nan", "infinite"])
def test_refit_to_nonsense_does_not_pass(gram):
    problem = replace(problem_of(NM(2, 4)), statistics=LayerStatistics(64, gram=gram))
    with pytest.raises(SolverError):
        verify(problem, Refit(Select(Magnitude())).solve(problem))


# Errors


def test_needs_are_those_of_the_parts():
    assert Select(Magnitude()).needs == frozenset()
    assert Select(Wanda()).needs == {"input_norm"}
    assert SparseGPT().needs == {"gram"}
    assert Refit(Select(Magnitude())).needs == {"gram"}
    assert Refit(Select(Wanda())).needs == {"input_norm", "gram"}


@pytest.mark.parametrize("solver", FROM_INPUTS, ids=repr)
def test_missing_statistics_are_named(solver):
    problem = problem_of(NM(2, 4))
    for need in solver.needs:
        with pytest.raises(StatisticsError, match=f"'{need}' was not gathered"):
            solver.solve(replace(problem, statistics=replace(problem.statistics, **{need: None})))
    with pytest.raises(StatisticsError, match="calibration inputs: pass batches"):
        solver.solve(replace(problem, statistics=None))


@pytest.mark.parametrize("solver", [SparseGPT(), Refit(Select(Magnitude()))], ids=repr)
def test_the_gram_of_another_layer_is_an_error(solver):
    for shape in ((16, 16), (20, 16), (4, 20, 20), (2, 10, 10)):
        with pytest.raises(StatisticsError, match="does not fit a weight"):
            solver.solve(replace(problem_of(NM(2, 4)), statistics=LayerStatistics(64, gram=torch.ones(shape))))


@one_of_each_class
def test_a_pattern_that_does_not_fit_is_an_error(solver):
    with pytest.raises(PatternError, match="2:4 needs an input size that is a multiple of 4, got 22"):
        solver.solve(problem_of(NM(2, 4), columns=22))


@one_of_each_class
def test_an_impossible_sparsity_is_an_error(solver):
    for sparsity in (1.5, -0.25, math.nan):
        with pytest.raises(PatternError, match=f"between 0 and 1, got {sparsity:g}"):
            solver.solve(problem_of(Unstructured(), sparsity))
    with pytest.raises(TypeError, match="sparsity must be a number"):
        solver.solve(problem_of(Unstructured(), "0.5"))
    with pytest.raises(PatternError, match="fits any sparsity: say which"):
        solver.solve(problem_of(Unstructured(), None))
    with pytest.raises(PatternError, match=r"2:4 fixes the sparsity at 0\.5, but 0\.7 was asked"):
        solver.solve(replace(problem_of(NM(2, 4)), sparsity=0.7))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseGPT(block_size=0), "block_size must be at least 1, got 0"),
        (lambda: SparseGPT(damping=-0.1), "damping must be at least 0, got -0.1"),
        (lambda: Refit(SparseGPT(), iterations=0), "iterations must be at least 1, got 0"),
        (lambda: Refit(SparseGPT(), damping=math.nan), "damping must be a number, got NaN"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseGPT(block_size=8.0), "block_size must be an int, got float"),
        (lambda: Refit(SparseGPT(), iterations=True), "iterations must be an int, got bool"),
        (lambda: Refit(SparseGPT(), damping="0.1"), "damping must be a number, got str"),
    ],
)
def test_settings_of_the_wrong_type_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


# verify


PLAIN = LayerProblem(torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]]), None, NM(2, 4))
KEPT = torch.tensor([[True, True, False, False], [False, False, True, True]])
GOOD = Solution(PLAIN.weight * KEPT, KEPT, PLAIN.weight)
FREE = replace(PLAIN, pattern=Unstructured("layer"), sparsity=0.5)
PER_ROW = replace(PLAIN, pattern=Unstructured("row"), sparsity=0.5)
UNEVEN = torch.tensor([[True, True, True, False], [False, False, False, True]])


def changed(tensor, place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


def test_verify_accepts_a_good_solution():
    verify(PLAIN, GOOD)
    verify(FREE, GOOD)
    verify(PLAIN, replace(GOOD, weight=changed(GOOD.weight, (0, 0), 0.0)))  # a kept weight may be zero


@pytest.mark.parametrize(
    ("problem", "solution", "message"),
    [
        (PLAIN, replace(GOOD, weight=GOOD.weight[:1]), r"returned a weight \(1, 4\) and a mask \(2, 4\) for a weight"),
        (PLAIN, replace(GOOD, mask=KEPT[:, :2]), r"and a mask \(2, 2\) for a weight \(2, 4\)"),
        (
            PLAIN,
            replace(GOOD, mask=KEPT.roll(1, 0).roll(1, 1) | KEPT),
            "broke the pattern: row 0, columns 0 to 3 keep 3",
        ),
        (PLAIN, replace(GOOD, mask=changed(KEPT, (1, 3), False)), "broke the pattern: row 1, columns 0 to 3 keep 1"),
        (FREE, replace(GOOD, mask=changed(KEPT, (0, 2), True)), "pruned 3 weights, but 4 were asked"),
        (FREE, replace(GOOD, mask=changed(KEPT, (0, 0), False)), "pruned 5 weights, but 4 were asked"),
        (PLAIN, replace(GOOD, weight=changed(GOOD.weight, (0, 0), math.nan)), "1 weights are no longer finite"),
        (PLAIN, replace(GOOD, weight=changed(GOOD.weight, (1, 3), -math.inf)), "1 weights are no longer finite"),
        (PLAIN, replace(GOOD, weight=changed(GOOD.weight, (1, 0), math.nan)), "1 weights are no longer finite"),
        (PLAIN, replace(GOOD, weight=changed(GOOD.weight, (1, 0), 1e-30)), "left pruned weights that are not zero"),
        (PLAIN, replace(GOOD, weight=PLAIN.weight), "left pruned weights that are not zero"),
        (PLAIN, replace(GOOD, pattern=Unstructured()), r"pruned under Unstructured\(\), but NM\(2, 4\) was asked"),
        (FREE, replace(GOOD, pattern=Unstructured("row")), r"pruned under .*'row'.*, but .*'layer'.* was asked"),
        (PER_ROW, replace(GOOD, mask=UNEVEN, weight=PLAIN.weight * UNEVEN), "row 0"),
    ],
)
def test_verify_names_what_is_broken(problem, solution, message):
    with pytest.raises(SolverError, match=message):
        verify(problem, solution)


def test_verify_wants_a_bool_mask():
    with pytest.raises(SolverError, match="must be a bool tensor"):
        verify(PLAIN, replace(GOOD, mask=KEPT.float()))


# What it is all for


@pytest.mark.parametrize(("pattern", "sparsity"), [(Unstructured(), 0.5), (NM(2, 4), None)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_better_methods_have_lower_output_error(pattern, sparsity, seed):
    """On inputs such as language models have: few directions, features of very different sizes, two outliers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = normal(1024, 24) @ normal(24, 96) / math.sqrt(24) + 0.3 * normal(1024, 96)
    inputs *= (0.7 * normal(96)).exp()
    inputs[:, [3, 17]] *= 8
    weight = normal(48, 96) * (0.3 * normal(48, 1)).exp()
    problem = LayerProblem(weight, statistics_of(inputs), pattern, sparsity)

    def error(solver):
        solution = solver.solve(problem)
        return (((weight - solution.weight) @ inputs.T).norm() / (weight @ inputs.T).norm()).item()

    magnitude, wanda, sparsegpt = map(error, (Select(Magnitude()), Select(Wanda()), SparseGPT()))
    assert magnitude > 1.3 * wanda
    assert wanda > 1.3 * sparsegpt
    assert sparsegpt > 1.2 * error(Refit(SparseGPT()))
    refitted = error(Refit(Select(Wanda())))
    assert sparsegpt > 1.2 * refitted
    assert math.isclose(refitted, error(Refit(Select(Wanda()), iterations=300)), rel_tol=0.05)
    assert error(Select(Random())) > magnitude
