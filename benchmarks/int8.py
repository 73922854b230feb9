"""How fast are products in 8 bits? Each kernel against torch's dynamic int8 and `F.linear`, in turn, in one run.

Targets: dense at least as fast as `torch.ao.nn.quantized.dynamic.Linear`; block:1x4 and 4x1 at 80 % 2.5 times dense
int8 and 8 times `F.linear`; block:4x4 at 90 % 4 times dense int8; 2:4 5 times `F.linear` at batch 1 and as fast as
dense int8 at 32. Each result is checked first, to the bit, against whole numbers. Times are medians of rounds in which
all take turns; ratios are medians over the rounds.

    python benchmarks/int8.py [--shape 4096x4096] [--threads 1] [--isa avx2] [--only 1x4] [--rounds 9] [--cpu-time]
                              [--encoder]

--encoder measures dense products of an encoder's shapes, 16 to 2048 rows. --cpu-time counts the thread's own time, for
one thread on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _timing import describe
from torch import Tensor, nn

from secateur import SparsityPattern, formats, kernels
from secateur.kernels import Int8PanelLayout

Run = Callable[[Tensor], Tensor]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A pattern, or dense, and its targets by batch: times torch's dynamic int8 / our dense int8 / `F.linear`."""

    pattern: str
    sparsity: float
    targets: dict[int, tuple[float | None, float | None, float | None]]


CASES = [
    Case("dense", 0.0, dict.fromkeys((1, 8, 32, 128), (1, None, None))),
    Case("block:1x4", 0.8, {1: (None, None, None), 8: (None, None, None)} | dict.fromkeys((32, 128), (None, 2.5, 8))),
    Case("block:4x1", 0.8, {1: (None, None, None), 8: (None, None, None)} | dict.fromkeys((32, 128), (None, 2.5, 8))),
    Case("block:4x4", 0.9, {1: (None, None, None)} | dict.fromkeys((8, 32, 128), (None, 4, None))),
    Case("2:4", 0.5, {1: (None, None, 5), 32: (None, 1, None)}),
]
ENCODER = ((384, 384), (1536, 384), (384, 1536))
ROWS = (16, 128, 512, 2048)


def pruned(case: Case, rows: int, columns: int) -> Tensor:
    torch.manual_seed(0)
    weight: Tensor = torch.randn(rows, columns) / columns**0.5
    if case.pattern == "dense":
        return weight
    pattern = SparsityPattern.parse(case.pattern)
    kept: Tensor = pattern.mask(weight.abs(), None if pattern.sparsity else case.sparsity)
    return weight.masked_fill(~kept, 0)


def dynamic(weight: Tensor) -> Run:
    """PyTorch's own: one scale for all weights, and one for all inputs, which are rounded at each call."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its deprecation
        layer: Run = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear})
    return layer


def routes(case: Case, weight: Tensor) -> dict[str, Run]:
    """Every route in 8 bits, as a packed layer calls it."""
    if case.pattern == "dense":
        packed: formats.Format = formats.Bitmask.from_dense(weight, value_dtype=torch.int8)
    else:
        packed = formats.pack(weight, torch.int8, (SparsityPattern.parse(case.pattern),))
    found = kernels.candidates(packed, precision="int8")
    return {
        str(route): partial(kernels.prepare(packed, route, CPU, torch.float32).run, bias=None)
        for route in found
        if case.pattern != "dense" or str(route) == "int8-panels"
    }


def measure(case: Case, weight: Tensor, batch: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    x = torch.randn(batch, weight.shape[1])
    ours, panels = routes(case, weight), Int8PanelLayout.pack(weight)
    wanted = panels.multiply(x, None)
    for name, run in ours.items():
        assert torch.equal(run(x), wanted), f"{name} differs from whole numbers"
    rivals: dict[str, Run] = {"torch int8": dynamic(weight), "F.linear": lambda x: nn.functional.linear(x, weight)}
    if "int8-panels" not in ours:
        rivals["int8-panels"] = partial(kernels.linear, packed=panels)
    times: dict[str, list[float]] = {name: [] for name in (*rivals, *ours)}
    repeat = max(1, min(50, int(2e8 / (weight.numel() * batch))))
    for _ in range(rounds + 1):
        for name, run in (rivals | ours).items():
            began = clock()
            for _ in range(repeat):
                run(x)
            times[name].append((clock() - began) / repeat)
    times = {name: record[1:] for name, record in times.items()}  # the first one warms up
    best = min(ours, key=lambda name: statistics.median(times[name]))

    def ratio(rival: str) -> float:
        return statistics.median(theirs / mine for theirs, mine in zip(times[rival], times[best], strict=True))

    reached = [ratio("torch int8"), ratio("int8-panels"), ratio("F.linear")]
    target = case.targets.get(batch, (1 if case.pattern == "dense" else None, None, None))
    return {
        "pattern": case.pattern,
        "sparsity": case.sparsity,
        "shape": list(weight.shape),
        "batch": batch,
        "route": best,
        "ms": {name: statistics.median(record) * 1e3 for name, record in times.items()},
        "times": reached,
        "target": target,
        "met": all(wanted is None or got >= wanted for got, wanted in zip(reached, target, strict=True)),
    }


def line(row: dict[str, Any]) -> str:
    """A row of the Markdown table."""
    target = " / ".join("" if value is None else f"{value:g}" for value in row["target"])
    reached = " / ".join(f"{value:.2f}" for value in row["times"])
    shape = "x".join(map(str, row["shape"]))
    return (
        f"| {row['pattern']} {row['sparsity']:.0%} | {shape} | {row['batch']} | {row['route']} "
        f"| {row['ms'][row['route']]:.3f} | {reached} | {target} | {'yes' if row['met'] else 'no'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096", help="outputs x inputs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", help="one of " + ", ".join(kernels.isas()))
    parser.add_argument("--only", default="", help="cases whose pattern contains this")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--encoder", action="store_true", help="dense products of an encoder's shapes")
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time counts one thread's time: it needs --threads 1")
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    isa = options.isa or kernels.isas()[0]
    os.environ["SECATEUR_ISA"] = isa
    rows, columns = map(int, options.shape.split("x"))
    work = [(case, (rows, columns), batch) for case in CASES if options.only in case.pattern for batch in case.targets]
    if options.encoder:
        work = [(CASES[0], shape, batch) for shape in ENCODER for batch in ROWS]
    print(f"{describe()}; kernels {isa}; {'processor' if options.cpu_time else 'wall'} time\n")
    print("| case | shape | batch | route | ms | x torch int8 / our dense int8 / F.linear | target | met |")
    print("|---|---|---|---|---|---|---|---|")
    table = []
    with torch.inference_mode():
        for case, shape, batch in work:
            table.append(measure(case, pruned(case, *shape), batch, options.rounds, clock))
            print(line(table[-1]), flush=True)
    print()
    print(json.dumps({"benchmark": "int8", "isa": isa, "threads": options.threads, "rows": table}))


if __name__ == "__main__":
    main()
