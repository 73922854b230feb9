"""What does it cost to gather the statistics of a layer's inputs? Against sums written down as their formulas."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from _timing import describe
from torch import Tensor

from secateur.calibration._gather import RowSums

FEATURES, TOKENS, BATCHES, REPEATS = 4096, 2048, 2, 5
NEEDS = (("input_norm",), ("input_norm", "input_mean"), ("gram",), ("gram", "input_norm", "input_mean"))


def plain(batches: list[Tensor], needs: tuple[str, ...]) -> dict[str, Tensor]:
    """Each statistic by a pass of its own over each batch."""
    found: dict[str, Tensor] = {}
    for given in batches:
        if not given.isfinite().all():
            raise ValueError("not finite")
        rows = given.float()
        new = {}
        if "gram" in needs:
            new["gram"] = rows.T @ rows
        if "input_norm" in needs:
            new["input_norm"] = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float64).square()
        if "input_mean" in needs:
            new["input_mean"] = rows.sum(0, dtype=torch.float64)
        for name, value in new.items():
            found[name] = value if name not in found else found[name] + value
    if "input_norm" in found:
        found["input_norm"] = found["input_norm"].sqrt().float()
    if "input_mean" in found:
        found["input_mean"] /= sum(len(rows) for rows in batches)
    return found


def ours(batches: list[Tensor], needs: tuple[str, ...]) -> dict[str, Tensor]:
    sums = RowSums(needs)  # type: ignore[arg-type]
    for rows in batches:
        part = RowSums(needs)  # type: ignore[arg-type]
        part.add(rows[None])
        sums.merge(part)
    return {name: value[0] for name, value in sums.results().items()}


def seconds(way: Callable[..., object], batches: list[Tensor], needs: tuple[str, ...]) -> float:
    began = time.perf_counter()
    way(batches, needs)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--features", type=int, default=FEATURES)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--batches", type=int, default=BATCHES)
    asked = parser.parse_args()
    print(describe(), file=sys.stderr)
    print(f"{asked.batches} batches of {asked.tokens} tokens, {asked.features} features; ms, best of {REPEATS}\n")
    print("| inputs | statistics | one by one | together | ratio |\n|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        batches = [torch.randn(asked.tokens, asked.features).to(dtype) for _ in range(asked.batches)]
        for needs in NEEDS:
            expected, found = plain(batches, needs), ours(batches, needs)
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-3 * float(value.abs().max()))
            del expected, found
            both = [[seconds(way, batches, needs) for way in (plain, ours)] for _ in range(REPEATS)]
            slow, fast = (min(times) for times in zip(*both, strict=True))
            print(
                f"| {str(dtype).removeprefix('torch.')} | {', '.join(needs)} | {1e3 * slow:.0f} | {1e3 * fast:.0f} "
                f"| {fast / slow:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
