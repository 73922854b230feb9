"""Does calibration text with more different tokens prune better? The demo model's perplexity, by windows and method."""

from __future__ import annotations

import copy
import statistics
import sys

import torch
from _timing import describe

import secateur
from secateur.demo import DemoModel

SEEDS = (0, 1, 2)
SAMPLES = (4, 8, 32)
METHODS = ("wanda", "sparsegpt")
SPARSITY = 0.6
SELECTIONS = ("random", "diverse")


def main() -> None:
    print(describe(), file=sys.stderr)
    demo = DemoModel()
    print(
        f"Perplexity on held-out text, dense {demo.perplexity(demo.model):.2f}, {SPARSITY:.0%} pruned, seeds {SEEDS}\n"
    )
    print(
        "| method | windows | different tokens, random | diverse | random | diverse | diverse / random, seed by seed |"
    )
    print(f"|{'---|' * 7}")
    for method in METHODS:
        for samples in SAMPLES:
            found: dict[str, list[float]] = {select: [] for select in SELECTIONS}
            tokens: dict[str, list[int]] = {select: [] for select in SELECTIONS}
            for seed in SEEDS:
                for select in SELECTIONS:
                    batches = demo.batches(seed, samples, select)
                    tokens[select].append(
                        torch.cat([batch["input_ids"].flatten() for batch in batches]).unique().numel()
                    )
                    model = copy.deepcopy(demo.model)
                    secateur.prune_(model, batches, sparsity=SPARSITY, method=method, measure_error=False)
                    found[select].append(demo.perplexity(model))
            counts = " | ".join(f"{statistics.mean(tokens[select]):.0f}" for select in SELECTIONS)
            means = " | ".join(
                f"{statistics.mean(found[select]):.2f} ({min(found[select]):.2f} to {max(found[select]):.2f})"
                for select in SELECTIONS
            )
            ratios = ", ".join(f"{b / a:.3f}" for a, b in zip(*found.values(), strict=True))
            print(f"| {method} | {samples} | {counts} | {means} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
