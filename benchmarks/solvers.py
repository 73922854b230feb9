"""How long do the solvers take, and how much do they lose? Beside straightforward forms of the published algorithms.

``python benchmarks/solvers.py 4096x4096 4096x11008 --rounds 3 --methods sparsegpt,admm,alps``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from _timing import describe, interleaved
from sparsegpt import make_layer, published, relative_error
from torch import Tensor

import secateur
from secateur.solvers import parse_method

TARGETS: list[tuple[str, secateur.SparsityPattern, float | None]] = [
    ("70 %", secateur.Unstructured("layer"), 0.7),
    ("2:4", secateur.NM(2, 4), None),
]


def keep(values: Tensor, pattern: secateur.SparsityPattern, sparsity: float) -> Tensor:
    """The mask of the largest values, by ``torch.topk``, as the published code has it."""
    if isinstance(pattern, secateur.NM):
        groups = values.abs().reshape(-1, pattern.m)
        drop = groups.topk(pattern.m - pattern.n, dim=1, largest=False).indices
        return torch.ones_like(groups, dtype=torch.bool).scatter_(1, drop, False).view_as(values)
    mask = torch.ones(values.numel(), dtype=torch.bool)
    mask[values.abs().flatten().topk(round(sparsity * values.numel()), largest=False).indices] = False
    return mask.view_as(values)


def fit(weight: Tensor, gram: Tensor, start: Tensor, mask: Tensor) -> Tensor:
    """Ten iterations of conjugate gradients, each row by itself; ALPS, algorithm 2."""
    solved, residual = start.clone(), ((weight - start) @ gram) * mask
    direction = residual / gram.diagonal()
    energy = (residual * direction).sum(1, keepdim=True)
    for _ in range(10):
        product = (direction @ gram) * mask
        step = energy / (direction * product).sum(1, keepdim=True).clamp(min=1e-30)
        solved = solved + step * direction
        residual = residual - step * product
        before, energy = energy, (residual**2 / gram.diagonal()).sum(1, keepdim=True)
        direction = residual / gram.diagonal() + energy / before.clamp(min=1e-30) * direction
    return solved


def admm(weight: Tensor, gram: Tensor, pattern: secateur.SparsityPattern, sparsity: float) -> Tensor:
    """arXiv:2401.02938: 20 turns, 15 of them with a mask of a sparsity that rises."""
    norm = gram.diagonal().sqrt() + 1e-8
    hessian = gram / norm / norm[:, None]
    hessian.diagonal().add_(0.1 * hessian.diagonal().mean())
    solved = weight * norm
    target = solved @ hessian
    hessian.diagonal().add_(1.0)
    inverse = torch.inverse(hessian)
    dual, mask = torch.zeros_like(solved), torch.ones_like(solved, dtype=torch.bool)
    for turn in range(20):
        if turn < 15:
            mask = rising(solved + dual, pattern, sparsity, (turn + 1) / 15)
        sparse = (solved + dual) * mask
        dual = dual + (solved - sparse)
        solved = (target + (sparse - dual)) @ inverse
    return (solved + dual) * mask / norm


def rising(values: Tensor, pattern: secateur.SparsityPattern, sparsity: float, progress: float) -> Tensor:
    """The mask at ``s - s (1 - progress)^3``; N:M prunes the smallest of what it would prune."""
    share = sparsity - sparsity * (1 - progress) ** 3
    if not isinstance(pattern, secateur.NM):
        return keep(values, pattern, share)
    protected = values.abs().masked_fill(keep(values, pattern, sparsity), torch.inf)
    return protected >= protected.flatten().kthvalue(min(values.numel(), int(share * values.numel()) + 1)).values


def alps(weight: Tensor, gram: Tensor, pattern: secateur.SparsityPattern, sparsity: float) -> Tensor:
    """arXiv:2406.07831, with the settings of its code, without the errors that it measures on the way."""
    gram = gram.clone()
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    norm = gram.diagonal().sqrt()
    hessian = gram / norm / norm[:, None]
    values, vectors = torch.linalg.eigh(hessian.double())
    dense, rho, changed = weight * norm, 0.1, False
    target = dense @ hessian

    def inverse() -> Tensor:
        found: Tensor = ((vectors / (values + rho)) @ vectors.T).to(weight.dtype)
        return found

    solve = inverse()
    first = support = keep(dense, pattern, sparsity)
    kept, sparse, dual, solved = int(first.sum()), dense * first, torch.zeros_like(dense), dense
    for turn in range(1, 301):
        solved = (target - dual + rho * sparse) @ solve
        mask = keep(solved + dual / rho, pattern, sparsity)
        sparse = (solved + dual / rho) * mask
        dual = dual + rho * (solved - sparse)
        if turn % 3:
            continue
        moved = int((mask != support).sum())
        support = mask
        if moved > 0.005 * kept:
            changed, rho = True, rho * (1.3 if moved > 0.1 * kept else 1.2)
        elif changed and not moved:
            break
        elif changed:
            rho *= 1.1
        else:
            rho /= 5
            if moved:
                sparse, dual = dense * first, torch.zeros_like(dense)
        if turn > 30 and moved < 0.0003 * kept:
            break
        solve = inverse()
    mask = keep(solved, pattern, sparsity)
    return fit(dense, hessian, solved * mask, mask) / norm


def refit(weight: Tensor, gram: Tensor, pattern: secateur.SparsityPattern, sparsity: float) -> Tensor:
    """SparseGPT's mask, then ALPS, algorithm 2."""
    start = sparsegpt(weight, gram, pattern, sparsity)
    damped = gram.clone()
    damped.diagonal().add_(0.01 * gram.diagonal().mean())
    return fit(weight, damped, start, start != 0)


def wanda(weight: Tensor, gram: Tensor, pattern: secateur.SparsityPattern, sparsity: float) -> Tensor:
    """The mask of Wanda's scores, then ALPS, algorithm 2: a refit without another solver's time."""
    mask = keep(weight * gram.diagonal().sqrt(), pattern, sparsity)
    damped = gram.clone()
    damped.diagonal().add_(0.01 * gram.diagonal().mean())
    return fit(weight, damped, weight * mask, mask)


def sparsegpt(weight: Tensor, gram: Tensor, pattern: secateur.SparsityPattern, sparsity: float) -> Tensor:
    n, m = (pattern.n, pattern.m) if isinstance(pattern, secateur.NM) else (0, 0)
    return published(weight, gram, sparsity, n, m)


PUBLISHED: dict[str, Callable[[Tensor, Tensor, secateur.SparsityPattern, float], Tensor]] = {
    "sparsegpt": sparsegpt,
    "sparsegpt+refit": refit,
    "wanda+refit": wanda,
    "wanda+swaps+refit": wanda,  # the published swaps, each one's best of all pairs, would take hours
    "admm": admm,
    "alps": alps,
}


def solve(
    method: str, weight: Tensor, gram: Tensor, pattern: secateur.SparsityPattern, sparsity: float | None
) -> Tensor:
    statistics = secateur.LayerStatistics(2 * len(gram), input_norm=gram.diagonal().sqrt(), gram=gram)
    problem = secateur.LayerProblem(weight, statistics, pattern, sparsity)
    solution = parse_method(method).solve(problem)
    secateur.verify(problem, solution)
    return solution.weight


def check(methods: list[str]) -> None:
    """In float64, on a small layer: no more is lost than by the published algorithm, and the zeros are as many."""
    for seed in range(2):
        torch.manual_seed(seed)
        weight, gram = (tensor.double() for tensor in make_layer(192, 256, 1024))
        for name, pattern, sparsity in TARGETS:
            share = pattern.resolve(sparsity)
            for method in methods:
                ours = solve(method, weight, gram, pattern, sparsity)
                theirs = PUBLISHED[method](weight, gram, pattern, share)
                assert int((theirs == 0).sum()) == int((ours == 0).sum()), (method, name)
                errors = [relative_error(weight, pruned, gram) for pruned in (ours, theirs)]
                assert errors[0] <= errors[1] * 1.001, (method, name, errors)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("sizes", nargs="*", default=["4096x4096", "4096x11008"], help="outputs x inputs")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--methods", default=",".join(PUBLISHED))
    options = arguments.parse_args()
    methods = options.methods.split(",")
    print(describe())
    check(methods)
    print("\n| method | size | target | seconds | published | ratio | error | published |")
    print("|---|---|---|---|---|---|---|---|")
    table = []
    for size in options.sizes:
        rows, columns = map(int, size.split("x"))
        torch.manual_seed(0)
        weight, gram = make_layer(rows, columns, 2 * columns)
        for name, pattern, sparsity in TARGETS:
            share = pattern.resolve(sparsity)
            for method in methods:
                results: list[Tensor] = [weight, weight]

                def ours(method: str = method, results: list[Tensor] = results) -> None:
                    results[0] = solve(method, weight, gram, pattern, sparsity)  # noqa: B023

                def theirs(method: str = method, results: list[Tensor] = results) -> None:
                    results[1] = PUBLISHED[method](weight, gram, pattern, share)  # noqa: B023

                (mine, other), spread = interleaved([ours, theirs], rounds=options.rounds)
                errors = [relative_error(weight, pruned, gram) for pruned in results]
                print(
                    f"| {method} | {size} | {name} | {mine:.2f} | {other:.2f} | {mine / other:.2f} "
                    f"(published takes {spread} x) | {errors[0]:.4f} | {errors[1]:.4f} |",
                    flush=True,
                )
                table.append(
                    {"method": method, "size": size, "target": name, "seconds": round(mine, 3)}
                    | {
                        "published": round(other, 3),
                        "error": round(errors[0], 5),
                        "published_error": round(errors[1], 5),
                    }
                )
    print(json.dumps(table))


if __name__ == "__main__":
    main()
