"""The two ways of a masked fit, each against exact least squares; the laws of the solver are in test_solvers.py."""

import numpy as np
import pytest
import reference
import torch

from secateur import NM, Block, Column, LayerProblem, LayerStatistics, Refit, Select, SolverError, Unstructured, Wanda
from secateur.solvers import _least_squares
from secateur.solvers._least_squares import fit
from secateur.solvers._preconditioner import Preconditioner

PATTERNS = [Unstructured("layer"), Unstructured("row"), NM(2, 4), Block(4, 4), Column()]
WAYS = {"iterated": {"_SMALL": 0, "_DIRECT": 1e9}, "factorised": {"_SMALL": 1e12}}


def problem_of(pattern, dtype, groups=1, rows=24, columns=160, seed=0):
    """Few strong directions and features of very different sizes, as in a language model."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = 0.4 * normal(groups, 400, 12) @ normal(groups, 12, columns) + normal(groups, 400, columns)
    inputs *= (0.7 * normal(columns)).exp()
    gram = (inputs.mT @ inputs).to(dtype)
    statistics = LayerStatistics(400, gram.diagonal(dim1=1, dim2=2).sqrt(), gram)
    sparsity = 0.6 if pattern.sparsity is None else None
    return LayerProblem(normal(rows, columns).to(dtype), statistics, pattern, sparsity)


def error(problem, weight):
    share = len(weight) // len(problem.statistics.gram)
    hessians = [reference.damped(gram.double().numpy(), 0.01) for gram in problem.statistics.gram]
    lost = (problem.weight.double() - torch.as_tensor(weight).double()).numpy()
    return sum(row @ hessians[i // share] @ row for i, row in enumerate(lost))


def exact(problem, mask):
    share = len(mask) // len(problem.statistics.gram)
    weight = problem.weight.double().numpy()
    parts = [slice(i, i + share) for i in range(0, len(mask), share)]
    hessians = [reference.damped(gram.double().numpy(), 0.01) for gram in problem.statistics.gram]
    solved = [
        reference.masked_least_squares(weight[part], hessian, mask.numpy()[part])
        for part, hessian in zip(parts, hessians, strict=True)
    ]
    return np.concatenate(solved)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_both_ways_are_within_a_percent_of_exact_least_squares(monkeypatch, dtype, pattern, groups, way):
    for name, value in WAYS[way].items():
        monkeypatch.setattr(_least_squares, name, value)
    problem = problem_of(pattern, dtype, groups)
    solution = Refit(Select(Wanda())).solve(problem)
    best = error(problem, exact(problem, solution.mask))
    assert error(problem, Select(Wanda()).solve(problem).weight) > 1.05 * best
    limit = 1.01 if way == "iterated" else 1.00001
    assert best * (1 - 1e-4) <= error(problem, solution.weight) <= limit * best


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_each_iteration_lowers_the_error(monkeypatch, pattern):
    for name, value in WAYS["iterated"].items():
        monkeypatch.setattr(_least_squares, name, value)
    problem = problem_of(pattern, torch.float64)
    errors = [error(problem, Select(Wanda()).solve(problem).weight)]
    for iterations in range(1, 6):
        errors.append(error(problem, Refit(Select(Wanda()), iterations).solve(problem).weight))
        assert errors[-1] <= errors[-2] * (1 + 1e-12)
    assert errors[1] < 0.9 * errors[0]


def test_rows_in_chunks_are_rows_alone(monkeypatch):
    problem = problem_of(Block(4, 4), torch.float64, groups=2)
    whole = Refit(Select(Wanda())).solve(problem).weight
    monkeypatch.setattr(_least_squares, "_ROWS", 160 * 4)
    monkeypatch.setattr(_least_squares, "_SYSTEM", 1)
    torch.testing.assert_close(Refit(Select(Wanda())).solve(problem).weight, whole)


@pytest.mark.parametrize("way", WAYS)
def test_a_solved_row_keeps_its_bits(monkeypatch, way):
    for name, value in WAYS[way].items():
        monkeypatch.setattr(_least_squares, name, value)
    problem = problem_of(Unstructured("row"), torch.float32)
    mask = Select(Wanda()).solve(problem).mask
    mask[3] = True
    start = problem.weight * mask
    start[3, 0] = -0.0
    dense = problem.weight.clone()
    dense[3, 0] = 0.0
    gram = torch.from_numpy(reference.damped(problem.statistics.gram[0].double().numpy(), 0.01)).float()[None]
    fitted = fit(dense, start, mask, gram, 10)
    assert torch.equal(fitted[3].view(torch.int32), start[3].view(torch.int32))
    assert not torch.equal(fitted[2], start[2])
    assert not fitted[~mask].any()


def test_values_that_are_not_finite_are_named():
    problem = problem_of(NM(2, 4), torch.float32)
    problem.statistics.gram[0, 0, 0] = torch.inf
    with pytest.raises(SolverError, match="values that are not finite"):
        Refit(Select(Wanda())).solve(problem)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4)], ids=str)
def test_strongly_correlated_inputs_of_few_tokens_do_not_diverge(monkeypatch, pattern):
    """A preconditioner that is not solved for each row's mask blew such layers up until they overflowed."""
    monkeypatch.setattr(_least_squares, "_SMALL", 0)
    monkeypatch.setattr(_least_squares, "_DIRECT", torch.inf)
    torch.manual_seed(0)
    x = torch.randn(64, 512).clamp(min=0) + 0.5  # inputs behind an activation: all of them point one way
    weight, gram = torch.randn(32, 512) / 512**0.5, (x.T @ x)[None]
    gram.diagonal(dim1=1, dim2=2).add_(0.01 * gram.diagonal(dim1=1, dim2=2).mean())
    mask = pattern.mask(weight.abs(), None if pattern.sparsity else 0.6)
    start = weight * mask
    errors = [
        torch.linalg.vecdot(weight - found, (weight - found) @ gram[0])
        for found in (start, fit(weight, start, mask, gram, 10))
    ]
    assert (errors[1] < 0.1 * errors[0]).all()


def unit_of(columns=100, seed=0):
    gram = torch.from_numpy(
        reference.damped(
            problem_of(NM(2, 4), torch.float64, columns=columns, seed=seed).statistics.gram[0].numpy(), 0.01
        )
    )
    scale = gram.diagonal().sqrt()
    return gram / scale / scale.unsqueeze(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_preconditioner_is_the_inverse_on_each_mask_of_strong_directions_and_a_diagonal(dtype):
    unit = unit_of()
    near = Preconditioner.of(unit.to(dtype))
    values, vectors = np.linalg.eigh(unit.numpy())
    strong = vectors[:, -10:] * np.sqrt(values[-10:])
    whole = strong @ strong.T + np.diag(1 - (strong**2).sum(1))
    kept = torch.rand(7, 100, generator=torch.Generator().manual_seed(1)) < 0.4
    kept[3] = False
    residual = torch.randn(7, 100, dtype=torch.float64) * kept
    found = near.within(kept)(residual.to(dtype)).double().numpy()
    for row in range(7):
        columns = kept[row].numpy()
        wanted = np.zeros(100)
        wanted[columns] = np.linalg.solve(whole[np.ix_(columns, columns)], residual[row].numpy()[columns])
        # Subspace iteration finds the directions to a few percent, which matters to no one.
        assert np.linalg.norm(found[row] - wanted) <= 0.1 * np.linalg.norm(wanted)
        assert not found[row][~columns].any()


def test_the_preconditioner_is_symmetric_and_positive_for_every_mask():
    near = Preconditioner.of(unit_of())
    for seed in range(5):
        kept = torch.rand(1, 100, generator=torch.Generator().manual_seed(seed)) < 0.2 * (seed + 1)
        matrix = near.within(kept.expand(100, -1))(torch.eye(100, dtype=torch.float64) * kept)
        torch.testing.assert_close(matrix, matrix.mT)
        inside = matrix[kept[0]][:, kept[0]]
        assert torch.linalg.eigvalsh(inside).min() > 0


@pytest.mark.parametrize("columns", [1, 2, 3, 9])
def test_few_inputs_have_a_preconditioner_too(columns):
    near = Preconditioner.of(torch.eye(columns))
    residual = torch.ones(2, columns)
    assert torch.isfinite(near.within(torch.ones(2, columns, dtype=torch.bool))(residual)).all()


def test_correlated_inputs_take_few_iterations_and_then_no_more(monkeypatch):
    """With the diagonal alone, ten iterations are several percent off here."""
    for name, value in WAYS["iterated"].items():
        monkeypatch.setattr(_least_squares, name, value)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(256, 256, generator=generator, dtype=torch.float64)).Q
    mixing *= torch.arange(1, 257, dtype=torch.float64).unsqueeze(1) ** -1.0
    inputs = torch.randn(1024, 256, generator=generator, dtype=torch.float64) @ mixing
    gram = (inputs.T @ inputs)[None]
    weight = torch.randn(64, 256, generator=generator, dtype=torch.float64)
    statistics = LayerStatistics(1024, gram.diagonal(dim1=1, dim2=2).sqrt(), gram)
    problem = LayerProblem(weight, statistics, Unstructured(), 0.7)
    mask = Select(Wanda()).solve(problem).mask
    best = error(problem, exact(problem, mask))
    assert error(problem, reference_gradients(problem, mask, 10)) > 1.05 * best
    solved = [error(problem, Refit(Select(Wanda()), iterations).solve(problem).weight) for iterations in (10, 40)]
    assert solved[0] == solved[1]
    assert best <= solved[0] <= 1.01 * best


def reference_gradients(problem, mask, iterations):
    """Conjugate gradients with the diagonal as preconditioner, row by row."""
    hessian = reference.damped(problem.statistics.gram[0].numpy(), 0.01)
    dense, rows = problem.weight.numpy(), []
    for row, kept in zip(dense, mask.numpy(), strict=True):
        solved = row * kept
        residual = ((row - solved) @ hessian) * kept
        direction = residual / np.diag(hessian)
        for _ in range(iterations):
            energy = residual @ (residual / np.diag(hessian))
            product = (direction @ hessian) * kept
            step = energy / (direction @ product)
            solved = solved + step * direction
            residual = residual - step * product
            close = residual / np.diag(hessian)
            direction = close + residual @ close / energy * direction
        rows.append(solved)
    return np.array(rows)
