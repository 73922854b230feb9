"""Two small measurements of benchmarks/shrink.py: the digits CNN, trained on, and a look at a model of 36 layers."""

from __future__ import annotations

import copy
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import _torch_pruning as other
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import digits, network

import secateur
from secateur.shrinking import analyze

SEEDS = 5
STEPS = 1000
EPOCHS = 5
BATCH = 64
KEEP = (0.5, 0.25)


def train(model: nn.Module, steps: int, rate: float, seed: int) -> None:
    """AdamW with a cosine, as in benchmarks/training.py."""
    images, labels = digits()["train"]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        batch = torch.randint(len(labels), (BATCH,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    images, labels = digits()["test"]
    return float((model(images).argmax(1) == labels).double().mean()) * 100


def cnn(methods: Sequence[str]) -> list[dict[str, Any]]:
    """Channels of the digits CNN go; then the same epochs of training for all. Means of five seeds."""
    images, labels = digits()["train"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:512].split(128)
    batches = [images[part] for part in order]
    torch.set_num_threads(1)  # as in benchmarks/training.py
    steps = EPOCHS * math.ceil(len(labels) / BATCH)
    found: defaultdict[tuple[str, float], list[tuple[float, float, float]]] = defaultdict(list)
    dense_accuracy: list[float] = []

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        number = next(number for number, given in enumerate(batches) if torch.equal(given, batch))
        return cross_entropy(output, labels[order[number]])

    for seed in range(SEEDS):
        torch.manual_seed(seed)
        dense = network("cnn")
        train(dense, STEPS, 3e-3, seed)
        dense_accuracy.append(accuracy(dense))

        def losses(model: nn.Module) -> Iterator[Tensor]:
            for batch in batches:
                yield loss(model(batch), batch)

        makers: dict[str, Callable[[float], nn.Module]] = {
            method: _ours(dense, batches, method, loss) for method in methods
        }
        if not other.missing():
            makers |= {f"Torch-Pruning, {name}": _theirs(dense, batches[0], name, losses) for name in other.IMPORTANCES}
        for name, make in makers.items():
            for keep in KEEP:
                model = make(keep)
                left = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in dense.parameters())
                at_once = accuracy(model)
                train(model, steps, 1e-3, seed)
                found[name, keep].append((left, at_once, accuracy(model)))
    print(f"\nDigits CNN, {SEEDS} seeds, dense {statistics.mean(dense_accuracy):.2f} %; {EPOCHS} epochs for all\n")
    print("| channels left | method | parameters | accuracy at once | after training |\n|---|---|---:|---:|---:|")
    rows = []
    for keep in KEEP:
        for (name, fraction), values in found.items():
            if fraction != keep:
                continue
            shares, firsts, lasts = (list(column) for column in zip(*values, strict=True))
            row = {
                "kept": keep,
                "method": name,
                "left": statistics.mean(shares),
                "at_once": statistics.mean(firsts),
                "at_once_error": statistics.stdev(firsts) / math.sqrt(SEEDS),
                "after": statistics.mean(lasts),
                "after_error": statistics.stdev(lasts) / math.sqrt(SEEDS),
            }
            rows.append(row)
            print(
                f"| {keep:.0%} | {name} | {row['left']:.1%} | {row['at_once']:.2f} ± {row['at_once_error']:.2f} | "
                f"{row['after']:.2f} ± {row['after_error']:.2f} |"
            )
    return rows


def _ours(dense: nn.Module, batches: Sequence[Tensor], method: str, loss: Any) -> Callable[[float], nn.Module]:
    def make(keep: float) -> nn.Module:
        model = copy.deepcopy(dense)
        report = secateur.shrink_(model, batches, keep={"channels": keep}, method=method, loss=loss)
        assert report.proof is not None
        assert report.proof.error < 1e-5
        return model

    return make


def _theirs(dense: nn.Module, batch: Tensor, importance: str, losses: Any) -> Callable[[float], nn.Module]:
    def make(keep: float) -> nn.Module:
        wishes = other.Wishes({}, 1 - keep, ignored=("9",), importance=importance)
        return other.shrink(dense, batch[:2], wishes, lambda output: [output], losses)[0]

    return make


def looking(layers: int) -> None:
    """Print seconds and the growth of this process's peak memory in MB: of a forward pass, then of looking."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    settings = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=2048, num_hidden_layers=layers, head_dim=16, **settings)).eval()
    batch = {"input_ids": torch.randint(0, 2048, (2, 64))}
    peaks, seconds = [_peak()], []

    def step(function: Callable[[], object]) -> None:
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
        peaks.append(_peak())

    with torch.no_grad():
        step(lambda: model(**batch))
    step(lambda: analyze(model, [batch]))
    batches = [{"input_ids": torch.randint(0, 2048, (8, 128))} for _ in range(4)]
    step(lambda: secateur.shrink_(model, batches, keep={"ffn": 0.5, "heads": 0.5}))
    grown = [peak - peaks[0] for peak in peaks[1:]]
    names = ("forward", "analyze", "shrink")
    print(
        json.dumps(
            {name: {"seconds": round(s, 2), "mb": round(g)} for name, s, g in zip(names, seconds, grown, strict=True)}
        )
    )


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory() -> dict[str, Any]:
    """Time and peak memory of looking at, and of shrinking, a model of 36 small layers, in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "36"]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    print("\nA Qwen3 of 36 layers, 128 wide: seconds, and peak memory over that of loading it\n")
    for name, figures in found.items():
        print(f"{name:10s} {figures['seconds']:6.2f} s {figures['mb']:6.0f} MB")
    assert found["analyze"]["seconds"] < 10
    return found


if __name__ == "__main__" and len(sys.argv) > 1:
    looking(int(sys.argv[1]))
