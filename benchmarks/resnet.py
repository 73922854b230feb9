"""How much faster is a whole ResNet-50 when its pruned convolutions are packed, and its batch norms folded first?

Random weights: time does not depend on their values. The same images go to the dense model with its zeros, to the
packed one, and to the folded and packed one, in turn; medians. With --onnxruntime also to the dense model there.
Outputs are compared before anything is timed.

    python benchmarks/resnet.py [--sparsity 0.5 0.8 0.9] [--batches 1 8] [--pattern P] [--threads N] [--onnxruntime]
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _timing import describe, interleaved
from torch import Tensor, nn

import secateur

SIZE = 224


def resnet() -> nn.Module:
    """ResNet-50 with random weights, and batch norms whose statistics are not the initial ones."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model: nn.Module = ResNetForImageClassification(ResNetConfig()).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(images).logits
    return found


def in_onnxruntime(model: nn.Module, images: Tensor, folder: str) -> Callable[[Tensor], Any]:
    from secateur.exporting import open_exported

    secateur.export(model, {"pixel_values": images}, Path(folder) / "onnx", shapes=())
    opened = open_exported(Path(folder) / "onnx")
    return lambda x: torch.as_tensor(opened(pixel_values=x))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.9])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--onnxruntime", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(describe())
    print("| zeros | batch | way | milliseconds | times as fast as eager | largest error |\n|---|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(batch, 3, SIZE, SIZE, generator=generator) for batch in args.batches]
    for sparsity in args.sparsity:
        dense = resnet()
        secateur.prune_(dense, pattern=args.pattern, sparsity=sparsity, method="magnitude")
        packed, folded = copy.deepcopy(dense), copy.deepcopy(dense)
        secateur.pack_(packed, batches=images)
        secateur.fold_(folded)
        folded_only = copy.deepcopy(folded)
        report = secateur.pack_(folded, batches=images)
        ways: dict[str, Callable[[Tensor], Any]] = {
            "eager": partial(logits, dense),
            "folded": partial(logits, folded_only),
            "packed": partial(logits, packed),
            "folded and packed": partial(logits, folded),
        }
        with tempfile.TemporaryDirectory() as folder:
            if args.onnxruntime:
                ways["ONNX Runtime, dense"] = in_onnxruntime(dense, images[0], folder)
            for x in images:
                compare(sparsity, x, ways, args.rounds)
        kept = [layer.name for layer in report.layers if not layer.packed]
        print(f"dense in the folded model at {sparsity:.0%}: {', '.join(kept) or 'no convolution'}", flush=True)


def compare(sparsity: float, x: Tensor, ways: dict[str, Callable[[Tensor], Any]], rounds: int) -> None:
    """Print the rows of one batch."""
    expected = ways["eager"](x)
    scale = float(expected.abs().max())
    errors = {}
    for name, way in ways.items():
        errors[name] = float((way(x) - expected).abs().max()) / scale
        assert errors[name] < 1e-3, (name, errors[name])
    seconds, _ = interleaved([lambda way=way: way(x) for way in ways.values()], rounds)  # type: ignore[misc]
    for name, taken in zip(ways, seconds, strict=True):
        row = {"zeros": sparsity, "batch": len(x), "way": name, "seconds": taken, "ratio": seconds[0] / taken}
        figures = f"{taken * 1e3:.1f} | {seconds[0] / taken:.2f} | {errors[name]:.0e}"
        print(f"| {sparsity:.0%} | {len(x)} | {name} | {figures} |")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
