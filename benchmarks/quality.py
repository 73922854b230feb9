"""Which method is best? Layer error on correlated inputs, and the demo model's perplexity over calibration seeds."""

from __future__ import annotations

import json
import statistics
import sys

import torch
from _timing import describe
from sparsegpt import make_layer, relative_error

import secateur
from secateur.demo import METHODS, TARGETS, DemoModel
from secateur.solvers import parse_method

SEEDS = (0, 1, 2)


def layer_errors() -> dict[str, dict[str, float]]:
    """Median relative error of each method on synthetic layers: low-rank mixing, noise, uneven scales, outliers."""
    print("Relative error of one layer, 384 x 512, correlated inputs; median of three layers\n")
    print("| method | 50 % | 60 % | 70 % | 2:4 |\n|---|---|---|---|---|")
    table: dict[str, dict[str, float]] = {}
    for method in METHODS:
        row = {}
        for pattern, sparsity in TARGETS:
            errors = []
            for seed in SEEDS:
                torch.manual_seed(seed)
                weight, gram = make_layer(384, 512, 4096)
                norm = gram.diagonal().sqrt()
                known = secateur.LayerStatistics(4096, input_norm=norm, gram=gram)
                problem = secateur.LayerProblem(weight, known, secateur.SparsityPattern.parse(pattern), sparsity)
                solution = parse_method(method).solve(problem)
                secateur.verify(problem, solution)
                errors.append(relative_error(weight, solution.weight, gram))
            row[pattern if sparsity is None else f"{sparsity:.0%}"] = round(statistics.median(errors), 4)
        table[method] = row
        print(f"| {method} | " + " | ".join(f"{value:.4f}" for value in row.values()) + " |")
    return table


def demo_perplexity() -> dict[str, dict[str, tuple[float, float, float]]]:
    """Perplexity of the pruned demo model: mean and standard deviation over calibration seeds, and mean layer error."""
    demo = DemoModel()
    before = demo.perplexity(demo.model)
    print(
        f"\nPerplexity of the demo model on held-out text, dense {before:.2f}; mean ± deviation of {len(SEEDS)} seeds"
    )
    print("(mean relative layer error)\n\n| method | 50 % | 60 % | 70 % | 2:4 |\n|---|---|---|---|---|")
    table: dict[str, dict[str, tuple[float, float, float]]] = {}
    for method in METHODS:
        row = {}
        for pattern, sparsity in TARGETS:
            recipe = secateur.Recipe(pattern=pattern, sparsity=sparsity, method=method)  # type: ignore[arg-type]
            runs = [demo.prune(recipe, demo.batches(seed), before)[0] for seed in SEEDS]
            assert all(run.error is not None for run in runs)
            row[pattern if sparsity is None else f"{sparsity:.0%}"] = (
                round(statistics.mean(run.after for run in runs), 3),
                round(statistics.stdev(run.after for run in runs), 3),
                round(statistics.mean(run.error or 0.0 for run in runs), 4),
            )
        table[method] = row
        cells = (f"{mean:.2f} ± {deviation:.2f} ({error:.3f})" for mean, deviation, error in row.values())
        print(f"| {method} | " + " | ".join(cells) + " |", flush=True)
    return table


def main() -> None:
    print(describe(), file=sys.stderr)
    print(json.dumps({"layer": layer_errors(), "demo": demo_perplexity()}))


if __name__ == "__main__":
    main()
