"""Does it pay to prune and round together? The demo model's perplexity, with weights in 8 and 4 bits."""

from __future__ import annotations

import copy
import json
import statistics
import sys
from typing import Any

import torch
from _timing import describe
from torch import nn

import secateur
from secateur.demo import DemoModel
from secateur.formats import GRIDS
from secateur.solvers import ROUNDINGS

SEEDS = (0,)
CASES = (
    (0.5, "sparsegpt"),
    (0.5, "sparsegpt+refit"),
    (0.0, "sparsegpt+refit"),
    (0.0, "sparsegpt"),  # GPTQ
    (0.7, "sparsegpt+refit"),
    (0.7, "sparsegpt"),
    (0.5, "wanda+refit"),
)


@torch.no_grad()
def round_to_nearest_(model: nn.Module, names: list[str], rounding: str) -> None:
    """What packing does with weights that no method has rounded."""
    grid = GRIDS[rounding]
    for name in names:
        weight = model.get_parameter(f"{name}.weight")
        scales = grid.scales(weight)
        weight.copy_(grid.codes(weight, scales) * grid.spread(scales, weight.shape[1]))


def main() -> None:
    print(describe(), file=sys.stderr)
    demo = DemoModel()
    print(f"Perplexity on held-out text, dense {demo.perplexity(demo.model):.3f}; calibration seeds {SEEDS}\n")
    ways = [f"{rounding} {how}" for rounding in ROUNDINGS for how in ("after", "together")]
    print(f"| method | sparsity | float | {' | '.join(ways)} |\n|{'---|' * (3 + len(ways))}")
    results = {}
    for sparsity, method in CASES:
        found: dict[str, list[float]] = {way: [] for way in ("float", *ways)}
        for seed in SEEDS:
            batches = demo.batches(seed)
            pruned = copy.deepcopy(demo.model)
            settings: dict[str, Any] = {"sparsity": sparsity, "method": method, "measure_error": False}
            names = [layer.name for layer in secateur.prune_(pruned, batches, **settings).layers]
            found["float"].append(demo.perplexity(pruned))
            for rounding in ROUNDINGS:
                after, together = copy.deepcopy(pruned), copy.deepcopy(demo.model)
                round_to_nearest_(after, names, rounding)
                found[f"{rounding} after"].append(demo.perplexity(after))
                secateur.prune_(together, batches, **settings, rounding=rounding)
                packed = copy.deepcopy(together)
                round_to_nearest_(packed, names, rounding)  # loses nothing
                for one, other in zip(together.parameters(), packed.parameters(), strict=True):
                    assert torch.equal(one, other)
                found[f"{rounding} together"].append(demo.perplexity(together))
        row = {way: round(statistics.mean(values), 3) for way, values in found.items()}
        results[f"{method} {sparsity}"] = row
        print(f"| {method} | {sparsity:.0%} | {' | '.join(f'{value:.3f}' for value in row.values())} |", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
