"""What sparse training costs: a training step of one layer beside nn.Linear, memory it saves for backward, step()."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from _timing import describe
from torch import Tensor, nn

import secateur
from secateur.training import SET, SRSTE, Gate, GradualMagnitude, RigL, Static

SIZE, BATCH, ROUNDS = 1024, 256, 25


def layers() -> dict[str, nn.Module]:
    pruned = secateur.SparseLinear(SIZE, SIZE, pattern="2:4")
    pruned.hard_prune()
    return {
        "nn.Linear": nn.Linear(SIZE, SIZE),
        "SparseLinear": secateur.SparseLinear(SIZE, SIZE),
        "SparseLinear, hard forward": secateur.SparseLinear(SIZE, SIZE, hard=True),
        "SparseLinear.unstructured": secateur.SparseLinear.unstructured(SIZE, SIZE),
        "pattern unstructured 90 %": secateur.SparseLinear(SIZE, SIZE, pattern="unstructured", sparsity=0.9),
        "pattern 2:4": secateur.SparseLinear(SIZE, SIZE, pattern="2:4"),
        "pattern block:4x4 90 %": secateur.SparseLinear(SIZE, SIZE, pattern="block:4x4", sparsity=0.9),
        "pattern row 50 %": secateur.SparseLinear(SIZE, SIZE, pattern="row", sparsity=0.5),
        "after hard_prune": pruned,
    }


def check(layer: nn.Module, x: Tensor) -> None:
    """The layer computes what its effective weight says, before anything is timed."""
    if isinstance(layer, secateur.SparseLinear):
        weight = layer._effective().double()
        expected = x.double() @ weight.T + (0 if layer.bias is None else layer.bias.double())
        torch.testing.assert_close(layer(x).double(), expected, atol=1e-4, rtol=1e-4)


def train_step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    def step() -> None:
        layer(x).sum().backward()
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return step


def saved_weights(layer: nn.Module, x: Tensor) -> int:
    """Weight-sized tensors that are kept for the backward pass, in different memory."""
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() == SIZE * SIZE:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return len(seen)


def interleaved(steps: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def layer_costs() -> dict[str, float]:
    x = torch.randn(BATCH, SIZE, requires_grad=True)
    made = layers()
    for layer in made.values():
        check(layer, x)
    seconds = interleaved({name: train_step(layer, x) for name, layer in made.items()})
    print(f"A training step of a {SIZE} x {SIZE} layer at batch {BATCH}, float32, against nn.Linear in the same round;")
    print("median and quartiles of the ratio\n\n| layer | ms | ratio | weight-sized tensors saved |\n|---|---|---|---|")
    table = {}
    for name, layer in made.items():
        ratios = [own / dense for own, dense in zip(seconds[name], seconds["nn.Linear"], strict=True)]
        table[name] = statistics.median(ratios)
        milliseconds = 1e3 * statistics.median(seconds[name])
        print(f"| {name} | {milliseconds:.2f} | {quartiles(ratios)} | {saved_weights(layer, x)} |")
    return table


def step_costs() -> dict[str, dict[str, float]]:
    """``SparseTraining.step()`` on the same layer, as a part of its forward pass and of a dense training step."""
    x = torch.randn(BATCH, SIZE)
    dense = nn.Linear(SIZE, SIZE)
    methods: dict[str, Any] = {
        "gate": Gate(),
        "magnitude": GradualMagnitude(),
        "sr-ste": SRSTE(),
        "set": SET(),
        "rigl": RigL(),
        "static": Static(),
    }
    print("\n`SparseTraining.step()` of one such layer, all steps of a training of 200: mean, and the dearest tenth,")
    print("against a forward pass and a dense training step (forward, backward, AdamW) in the same rounds\n")
    print("| method | pattern | ms | / forward | / training step | dearest tenth / step |\n" + "|---" * 6 + "|")
    table: dict[str, dict[str, float]] = {}
    for name, method in methods.items():
        for pattern, sparsity in (("unstructured", 0.9), ("2:4", None), ("block:4x4", 0.9)):
            model = nn.Sequential(nn.Linear(SIZE, SIZE))
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
            plain = torch.optim.AdamW(dense.parameters(), lr=1e-3)
            training = secateur.SparseTraining(
                model, optimizer, method=method, pattern=pattern, sparsity=sparsity, steps=200
            )
            own, forward, full = [], [], []
            for _ in range(200):
                began = time.perf_counter()
                loss = dense(x).square().mean()
                forward.append(time.perf_counter() - began)
                loss.backward()
                plain.step()
                plain.zero_grad()
                full.append(time.perf_counter() - began)
                model(x).square().mean().backward()
                optimizer.step()
                began = time.perf_counter()
                training.step()
                own.append(time.perf_counter() - began)
                optimizer.zero_grad()
            training.finalize()
            dear = statistics.mean(sorted(own)[-20:])
            mean, one, step = statistics.mean(own), statistics.median(forward), statistics.median(full)
            table[f"{name} {pattern}"] = {"forward": mean / one, "step": mean / step}
            cells = f"{1e3 * mean:.2f} | {mean / one:.2f} | {mean / step:.2f} | {dear / step:.2f}"
            print(f"| {name} | {pattern} | {cells} |", flush=True)
    return table


def main() -> None:
    print(describe(), file=sys.stderr)
    print(json.dumps({"layer": layer_costs(), "step": step_costs()}))


if __name__ == "__main__":
    main()
