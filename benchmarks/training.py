"""Which way of sparse training loses least? Six methods, seven targets, two small networks on scikit-learn's digits.

The ramp of gradual magnitude and the penalties were chosen on the validation split with other seeds; all other
methods run with their defaults, and the learning rate was not tuned. The test split is for the table only. Every
method gets the same steps, batches and learning-rate curve. The output layer is left dense, as everywhere in
secateur; of the second network the first convolution too, with nine inputs.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import time
from typing import Any

import torch
from _timing import describe
from torch import Tensor, nn

import secateur
from secateur.training import SET, SRSTE, Gate, GradualMagnitude, RigL, Static

STEPS = 1000
BATCH = 64
LEARNING_RATE = 3e-3
SEEDS = 5
TARGETS: tuple[tuple[str, float | None], ...] = (
    ("unstructured", 0.90),
    ("unstructured", 0.95),
    ("unstructured", 0.98),
    ("unstructured", 0.99),
    ("2:4", None),
    ("block:4x4", 0.90),
    ("row", 0.75),
)
METHODS: dict[str, Any] = {
    "one-shot + fine-tuning": Static(),
    "gradual magnitude": GradualMagnitude(),
    "SET": SET(initial="random"),
    "RigL": RigL(initial="random"),
    "SR-STE": SRSTE(),
    "sigmoid + penalty": None,
    "gate": Gate(),
}
NETWORKS = ("mlp", "cnn")


def network(name: str) -> nn.Sequential:
    if name == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
        )
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Train, validation and test split of the 1,797 images; the same for every seed."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1234))
    parts = dict(zip(("train", "validation", "test"), order.split([997, 400, 400]), strict=True))
    return {name: (images[part], labels[part]) for name, part in parts.items()}


def exclude(name: str) -> list[str]:
    """The layers that stay dense."""
    return ["5"] if name == "mlp" else ["0", "9"]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train one network; return accuracy on the split that was asked for, the sparsity, and the train/eval gap."""
    torch.set_num_threads(1)
    data = digits()
    images, labels = data["train"]
    torch.manual_seed(job["seed"])
    model = network(job["network"])
    steps = job.get("steps", STEPS)
    pattern, sparsity = job.get("target", (None, None))
    method, left = job.get("settings"), exclude(job["network"])
    penalty: float = job.get("penalty", 0.0)
    layers = {}
    if penalty:
        layers = secateur.sparsify_(model, exclude=left)
    thresholds = [parameter for name, parameter in model.named_parameters() if name.endswith("threshold")]
    others = [parameter for name, parameter in model.named_parameters() if not name.endswith("threshold")]
    groups = [{"params": others}] + ([{"params": thresholds, "weight_decay": 0.0}] if thresholds else [])
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    two_phases = isinstance(method, Static)
    settings: dict[str, Any] = {"method": method, "pattern": pattern, "sparsity": sparsity, "exclude": left}
    training = None
    if method is not None and not two_phases:
        training = secateur.SparseTraining(model, optimizer, steps=steps, seed=job["seed"], **settings)
    generator = torch.Generator().manual_seed(job["seed"])
    length = steps // 2 if two_phases else steps  # dense, then fine-tuning: the learning rate restarts
    began = time.perf_counter()
    for step in range(steps):
        if two_phases and step == length:
            training = secateur.SparseTraining(model, optimizer, steps=steps - length, **settings)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * (step % length) / length)) / 2
        batch = torch.randint(len(labels), (BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        for layer in layers.values():
            mask = torch.sigmoid((layer.weight.flatten(1).abs() - layer.threshold.unsqueeze(1)) * layer.temperature)
            loss = loss + penalty * mask.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if training is not None:
            training.step()
    seconds = time.perf_counter() - began
    images, labels = data[job["split"]]
    with torch.no_grad():
        in_training = model.train()(images)
    found = 0.0
    if training is not None:
        report = training.finalize()
        found = report.sparsity
        for entry in report.layers:
            expected = secateur.SparsityPattern.parse(entry.pattern).num_pruned(entry.shape, entry.asked)
            assert entry.pruned == expected, f"{entry.name}: {entry.pruned} weights pruned, not {expected}"
    elif layers:
        for layer in layers.values():
            layer.hard_prune()
        weights = sum(layer.weight.numel() for layer in layers.values())
        found = 1 - sum(layer.num_active() for layer in layers.values()) / weights
    with torch.no_grad():
        outputs = model.eval()(images)
    return {
        **{key: value for key, value in job.items() if key != "settings"},
        "accuracy": float((outputs.argmax(1) == labels).double().mean()) * 100,
        "gap": float((outputs - in_training).abs().max()),
        "found": found,
        "seconds": seconds,
    }


def title(target: tuple[str, float | None]) -> str:
    return target[0] if target[1] is None else f"{target[0]} {100 * target[1]:g} %"


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--first-seed", type=int, default=0, help="validation runs use other seeds than the table")
    arguments = parser.parse_args()
    print(describe(), file=sys.stderr)
    common = {"steps": arguments.steps, "split": arguments.split}
    jobs: list[dict[str, Any]] = []
    for name in arguments.networks:
        for seed in range(arguments.first_seed, arguments.first_seed + SEEDS):
            jobs.append({"network": name, "seed": seed, "name": "dense", **common})
            for target in TARGETS:
                for label, settings in METHODS.items():
                    job = {"network": name, "seed": seed, "name": label, "target": target, **common}
                    if label == "sigmoid + penalty":
                        job["penalty"] = PENALTIES.get((name, target[1]))
                        if target[0] != "unstructured":
                            continue
                    else:
                        job["settings"] = settings
                    jobs.append(job)
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        results = list(pool.imap_unordered(run, jobs, chunksize=4))
    report(results)
    print(json.dumps(results))


def report(results: list[dict[str, Any]]) -> None:
    """Print one table a network: mean accuracy and its standard error."""
    for name in dict.fromkeys(result["network"] for result in results):
        mine = [result for result in results if result["network"] == name]
        mean, error = mean_and_error([result["accuracy"] for result in mine if result["name"] == "dense"])
        print(f"\n{name}: dense {mean:.2f} ± {error:.2f}\n")
        print(f"| method | {' | '.join(title(target) for target in TARGETS)} |\n{'|---' * (len(TARGETS) + 1)}|")
        for label in METHODS:
            cells = []
            for target in TARGETS:
                runs = [result for result in mine if result["name"] == label and result["target"] == target]
                if not runs:
                    cells.append("")
                    continue
                mean, error = mean_and_error([result["accuracy"] for result in runs])
                cell = f"{mean:.2f} ± {error:.2f}"
                if label == "sigmoid + penalty":
                    cell += f" at {100 * statistics.mean(result['found'] for result in runs):.1f} %"
                cells.append(cell)
            print(f"| {label} | {' | '.join(cells)} |")
        exact = [result for result in mine if result["name"] not in ("dense", "sigmoid + penalty")]
        worst = max(result["gap"] for result in exact)
        print(f"\nlargest difference between training and evaluation outputs: {worst:g} ({len(exact)} runs)")
        soft = [result["gap"] for result in mine if result["name"] == "sigmoid + penalty"]
        if soft:
            print(f"the same for sigmoid + penalty: {max(soft):.3g}")


# Chosen on the validation split so that the hard rule comes closest to the target.
PENALTIES: dict[tuple[str, float | None], float] = {
    ("mlp", 0.90): 0.3,
    ("mlp", 0.95): 0.5,
    ("mlp", 0.98): 1.7,
    ("mlp", 0.99): 4.0,
    ("cnn", 0.90): 0.4,
    ("cnn", 0.95): 0.7,
    ("cnn", 0.98): 1.2,
    ("cnn", 0.99): 1.5,
}


if __name__ == "__main__":
    main()
