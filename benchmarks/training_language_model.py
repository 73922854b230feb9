"""Sparse training of the demo language model beside the best one-shot pruning, on the same text.

Every method reads `calibration.txt` and nothing else: one-shot methods as calibration, training methods as training
text, with the dense model's predictions as targets (on so little text, the text itself makes any model worse).
Settings were chosen on the second part of the held-out text; perplexity is measured on the first, as in the demo.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from importlib.resources import as_file, files
from typing import Any

import torch
from _timing import describe
from torch import Tensor, nn

import secateur
from secateur.calibration import Windows, batched, read_text
from secateur.demo import HELDOUT_WINDOWS, LENGTH, DemoModel
from secateur.evaluation import perplexity
from secateur.files import ModelDirectory
from secateur.huggingface import load_tokenizer
from secateur.training import SET, SRSTE, Gate, GradualMagnitude, RigL, Static

STEPS = 150
BATCH = 8
LEARNING_RATE = 1e-3
TARGETS: tuple[tuple[str, float | None], ...] = (
    ("unstructured", 0.70),
    ("2:4", None),
    ("unstructured", 0.90),
    ("unstructured", 0.95),
    ("unstructured", 0.98),
    ("unstructured", 0.99),
    ("block:4x4", 0.70),
    ("row", 0.25),
)
METHODS: dict[str, Any] = {
    "one-shot + fine-tuning": Static(),
    "gradual magnitude": GradualMagnitude(),
    "SET": SET(),
    "RigL": RigL(),
    "SR-STE": SRSTE(),
    "gate": Gate(temperature=(16, 100), ramp=(0, 0.2), freeze=0.6),
}
ONE_SHOT = "sparsegpt+refit"


class Text:
    """The demo's texts as windows of token ids."""

    def __init__(self) -> None:
        with as_file(files("secateur.demo") / "model") as path:
            tokenizer = load_tokenizer(ModelDirectory.open(path))
            training = Windows(tokenizer, read_text(path / "calibration.txt"), LENGTH)
            heldout = list(Windows(tokenizer, read_text(path / "heldout.txt"), LENGTH).all())
        self.training = torch.stack([window for window in training.all() if len(window) == LENGTH])
        self.predictions: Tensor | None = None  # of the dense model: log-probabilities
        self.test = list(batched(heldout[:HELDOUT_WINDOWS]))
        self.validation = list(batched(heldout[HELDOUT_WINDOWS : 2 * HELDOUT_WINDOWS]))


@torch.no_grad()
def predict(model: nn.Module, text: Text) -> Tensor:
    """The dense model's log-probabilities on the training text, in half precision."""
    return torch.cat([model(input_ids=ids).logits.float().log_softmax(-1).half() for ids in text.training.split(8)])


def train(
    model: nn.Module, text: Text, method: Any, target: tuple[str, float | None], steps: int, rate: float, seed: int
) -> tuple[secateur.Report | None, float]:
    """Train a model in place under a method; return its report and the seconds of a step."""
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    training = None
    if method is not None:
        pattern, sparsity = target
        training = secateur.SparseTraining(
            model, optimizer, method=method, pattern=pattern, sparsity=sparsity, steps=steps, seed=seed
        )
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    warm_up = max(1, steps // 20)
    began = time.perf_counter()
    for step in range(steps):
        progress = max(0, step - warm_up) / max(1, steps - warm_up)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warm_up) * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)
        if len(order) < BATCH:
            order = torch.randperm(len(text.training), generator=generator).tolist()
        chosen = [order.pop() for _ in range(BATCH)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=text.training[chosen]).logits
        assert text.predictions is not None
        wanted = text.predictions[chosen].float()
        logs = logits.float().log_softmax(-1)
        loss = nn.functional.kl_div(logs, wanted, log_target=True, reduction="sum") / logs[..., 0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if training is not None:
            training.step()
    seconds = (time.perf_counter() - began) / steps
    report = None if training is None else training.finalize()
    model.eval()
    return report, seconds


def title(target: tuple[str, float | None]) -> str:
    return target[0] if target[1] is None else f"{target[0]} {100 * target[1]:g} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=[*METHODS, "one-shot"])
    parser.add_argument("--targets", nargs="+", type=int, default=list(range(len(TARGETS))), help="numbers of columns")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    arguments = parser.parse_args()
    print(describe(), file=sys.stderr)
    demo, text = DemoModel(), Text()
    heldout: list[Tensor] = getattr(text, arguments.split)
    text.predictions = predict(demo.model, text)
    before = perplexity(demo.model, heldout)[0]
    print(f"perplexity on held-out text, dense {before:.3f}; {text.training.numel():,} training tokens")
    results: list[dict[str, Any]] = []

    def record(label: str, target: tuple[str, float | None], values: list[float], seconds: float) -> None:
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        mean = statistics.mean(values)
        print(f"{title(target):20} {label:24} {mean:8.3f}{spread}  {seconds:.2f} s a step", flush=True)
        results.append({"target": title(target), "method": label, "perplexity": values, "seconds": seconds})

    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    for target in (TARGETS[index] for index in arguments.targets):
        pattern, sparsity = target
        if "one-shot" in arguments.methods:
            model = copy.deepcopy(demo.model)
            batches = [{"input_ids": ids} for ids in text.training.split(16)]
            secateur.prune_(model, batches, pattern=pattern, sparsity=sparsity, method=ONE_SHOT, measure_error=False)
            record(ONE_SHOT, target, [perplexity(model, heldout)[0]], 0.0)
            values, seconds = [], 0.0
            for seed in seeds:
                tuned = copy.deepcopy(model)
                _, seconds = train(tuned, text, Static(), target, arguments.steps, arguments.rate, seed)
                values.append(perplexity(tuned, heldout)[0])
            record(f"{ONE_SHOT}, tuned", target, values, seconds)
        for label, method in METHODS.items():
            if label not in arguments.methods:
                continue
            values, seconds = [], 0.0
            for seed in seeds:
                model = copy.deepcopy(demo.model)
                report, seconds = train(model, text, method, target, arguments.steps, arguments.rate, seed)
                assert report is not None
                for layer in report.layers:
                    assert layer.pruned == secateur.SparsityPattern.parse(pattern).num_pruned(layer.shape, sparsity)
                values.append(perplexity(model, heldout)[0])
            record(label, target, values, seconds)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
