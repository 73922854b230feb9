"""How fast are exact masks? Against torch.topk on groups and a full torch.sort, on a 4096 x 4096 float32 score."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from _timing import describe, interleaved
from torch import Tensor

import secateur

SIZE = 4096


def topk_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """The usual way: top-k of each group, scattered into a mask."""
    groups = scores.view(-1, m)
    kept = groups.topk(n, dim=1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, True).view_as(scores)


def sort_mask(scores: Tensor, sparsity: float) -> Tensor:
    """The usual way: everything above an element of the sorted scores."""
    return scores > scores.flatten().sort().values[round(sparsity * scores.numel()) - 1]


def main() -> None:
    torch.manual_seed(0)
    # Distinct scores, so that the alternatives, which do not decide ties, have one right answer too.
    scores = torch.randperm(SIZE * SIZE).to(torch.float32).view(SIZE, SIZE)
    print(describe())
    results = {}
    cases: list[tuple[str, Callable[[], Tensor], Callable[[], Tensor]]] = [
        ("2:4 against topk + scatter", lambda: secateur.NM(2, 4).mask(scores), lambda: topk_mask(scores, 2, 4)),
        ("1:4 against topk + scatter", lambda: secateur.NM(1, 4).mask(scores), lambda: topk_mask(scores, 1, 4)),
        ("4:8 against topk + scatter", lambda: secateur.NM(4, 8).mask(scores), lambda: topk_mask(scores, 4, 8)),
        ("8:16 against topk + scatter", lambda: secateur.NM(8, 16).mask(scores), lambda: topk_mask(scores, 8, 16)),
        (
            "unstructured 50 % against sort",
            lambda: secateur.Unstructured().mask(scores, 0.5),
            lambda: sort_mask(scores, 0.5),
        ),
        (
            "unstructured 90 % against sort",
            lambda: secateur.Unstructured().mask(scores, 0.9),
            lambda: sort_mask(scores, 0.9),
        ),
    ]
    for name, ours, alternative in cases:
        mask = ours()
        assert torch.equal(mask, alternative()), name
        (mine, other), spread = interleaved([ours, alternative], rounds=7)
        results[name] = round(other / mine, 2)
        print(f"{name:32s} {mine * 1e3:8.1f} ms {other * 1e3:8.1f} ms  {other / mine:5.1f} x faster ({spread})")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
