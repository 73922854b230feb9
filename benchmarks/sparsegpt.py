"""How fast is SparseGPT? Against the published algorithm, on a 4096 x 4096 float32 layer."""

from __future__ import annotations

import json
import math

import torch
from _timing import describe, interleaved
from torch import Tensor

import secateur

SIZE = 4096
TOKENS = 8192


def published(weight: Tensor, gram: Tensor, sparsity: float, n: int = 0, m: int = 0, block: int = 128) -> Tensor:
    """The published algorithm, step by step: inverse, two factorisations, a column loop in blocks of 128.

    Only the count is mended: exactly the asked share of each block is pruned, not one more.
    """
    weight, gram = weight.clone(), gram.clone()
    columns = weight.shape[1]
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        current = weight[:, start:stop].clone()
        pruned, errors = torch.zeros_like(current), torch.zeros_like(current)
        here = inverse[start:stop, start:stop]
        drop = torch.zeros_like(current, dtype=torch.bool)
        if not m:
            scores = current**2 / here.diagonal() ** 2
            drop = scores <= scores.flatten().sort().values[round(scores.numel() * sparsity) - 1]
        for j in range(stop - start):
            if m and j % m == 0:
                scores = current[:, j : j + m] ** 2 / here.diagonal()[j : j + m] ** 2
                drop.scatter_(1, j + scores.topk(m - n, dim=1, largest=False).indices, True)
            column = current[:, j]
            kept = column.masked_fill(drop[:, j], 0)
            pruned[:, j] = kept
            error = (column - kept) / here[j, j]
            current[:, j:] -= error[:, None] @ here[j, j:][None]
            errors[:, j] = error
        weight[:, start:stop] = pruned
        weight[:, stop:] -= errors @ inverse[start:stop, stop:]
    return weight


def make_layer(out: int, columns: int, tokens: int) -> tuple[Tensor, Tensor]:
    """A weight, and the Gram matrix of correlated inputs with uneven scales."""
    mixing = torch.randn(columns // 4, columns) / math.sqrt(columns // 4)
    inputs = (torch.randn(tokens, columns // 4) @ mixing + 0.3 * torch.randn(tokens, columns)) * torch.randn(
        columns
    ).exp()
    return torch.randn(out, columns) / math.sqrt(columns), inputs.T @ inputs


def relative_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    change = weight - pruned
    return float((((change @ gram) * change).sum() / ((weight @ gram) * weight).sum()).sqrt())


def main() -> None:
    torch.manual_seed(0)
    print(describe())
    results = {}
    cases: list[tuple[str, secateur.SparsityPattern, float | None, int, int]] = [
        ("unstructured 50 %", secateur.Unstructured(), 0.5, 0, 0),
        ("2:4", secateur.NM(2, 4), None, 2, 4),
    ]
    # Correct first: in float64, where rounding decides no tie, masks and weights are the same.
    weight, gram = (tensor.double() for tensor in make_layer(384, 512, 2048))
    for name, pattern, sparsity, n, m in cases:
        problem = secateur.LayerProblem(weight, secateur.LayerStatistics(2048, gram=gram), pattern, sparsity)
        torch.testing.assert_close(
            secateur.SparseGPT().solve(problem).weight, published(weight, gram, sparsity or 0.5, n, m), msg=name
        )
    weight, gram = make_layer(SIZE, SIZE, TOKENS)
    for name, pattern, sparsity, n, m in cases:

        def ours(pattern: secateur.SparsityPattern = pattern, sparsity: float | None = sparsity) -> Tensor:
            statistics = secateur.LayerStatistics(TOKENS, gram=gram)
            return secateur.SparseGPT().solve(secateur.LayerProblem(weight, statistics, pattern, sparsity)).weight

        def theirs(n: int = n, m: int = m) -> Tensor:
            return published(weight, gram, 0.5, n, m)

        errors = [relative_error(weight, pruned, gram) for pruned in (ours(), theirs())]
        (mine, other), spread = interleaved([ours, theirs], rounds=5)
        results[name] = round(other / mine, 2)
        print(
            f"{name:20s} {mine:6.2f} s, published {other:6.2f} s: {other / mine:.2f} x faster ({spread}); "
            f"relative error {errors[0]:.5f}, published {errors[1]:.5f}"
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
