"""How much faster is a packed layer than a dense one? Every kernel against three rivals, in turn, in one run.

Rivals: eager `F.linear`; the best dense weight that was packed beforehand (oneDNN's and MKL's, as torch.compile with
freezing uses); torch's CSR product `W @ x.T`. Rounds of their own choose our kernel and the packed rival; the numbers
come from later rounds, and are medians of the rival's time divided by ours in the same round, with the spread of the
first. `roofline` is the least time that memory or arithmetic allows, as measured before each case, divided by ours.

    python benchmarks/kernels.py [--shape 4096x4096] [--threads 1] [--isa avx2] [--only "2:4"] [--rounds 9] [--cpu-time]

--cpu-time counts the thread's own time, for one thread on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from _timing import describe
from torch import Tensor, nn

from secateur import kernels
from secateur.formats import ColumnPacked, RowPacked
from secateur.kernels import (
    BitmaskLayout,
    ColumnRoute,
    GroupLayout,
    Layout,
    PanelLayout,
    RowRoute,
    TileLayout,
    candidates,
)
from secateur.kernels._backends import backend_for

Run = Callable[[Tensor], Tensor]
CHOOSING = 3  # rounds
CPU = torch.device("cpu")
FLOAT, BFLOAT, INT8 = torch.float32, torch.bfloat16, torch.int8


@dataclass(frozen=True)
class Case:
    """A structure, its value type, and the targets by batch: times eager / prepacked / CSR."""

    structure: str
    sparsity: float
    targets: dict[int, tuple[float, ...]]
    dtype: torch.dtype = FLOAT


CASES = [
    Case("unstructured", 0.5, {1: (1.6, 1.6, 3.3)}),
    Case("unstructured", 0.7, {1: (2.2, 2.2, 3), 8: (3.2, 1.4, 1.8), 32: (3.0, 1.4, 2)}),
    Case("unstructured", 0.9, {1: (5, 5, 2.3), 8: (9, 3.5, 1.2), 32: (7.5, 3.8, 1.7), 128: (4.5, 3.3, 3.2)}),
    Case("unstructured", 0.95, {128: (7, 5, 2.7)}),
    Case("unstructured", 0.9, {1: (7,)}, BFLOAT),
    Case("unstructured", 0.9, {1: (8,)}, INT8),
    Case("2:4", 0.5, {1: (1.8,)}),
    Case("2:4", 0.5, {1: (3.2,)}, BFLOAT),
    Case("2:4", 0.5, {1: (5,)}, INT8),
    Case("block 4x4", 0.9, {1: (7,), 8: (12,), 32: (11,), 128: (6,)}),
    Case("block 32x32", 0.9, {1: (7.5,), 8: (15,), 32: (15,), 128: (9,)}),
    Case("row", 0.5, {1: (1.9,), 32: (1.9,)}),
    Case("row", 0.9, {1: (7,), 32: (7,)}),
    Case("column", 0.5, {1: (1.9,), 32: (1.9,)}),
    Case("column", 0.9, {1: (7,), 32: (7,)}),
]


@dataclass
class Prepared:
    """A pruned weight and every route to run it by."""

    weight: Tensor
    expected: Tensor  # what the routes should multiply by: the weight in its value type
    routes: dict[str, tuple[Run, int]] = field(default_factory=dict)  # name: how, bytes it reads

    def add(self, name: str, layout: Layout) -> None:
        self.expected = layout.to_dense()
        self.routes[name] = (partial(self._run(layout), bias=None), layout.nbytes)

    @staticmethod
    def _run(layout: Layout) -> Callable[..., Tensor]:
        """As a packed layer calls it."""
        backend = backend_for(layout, None, CPU, FLOAT)
        return backend.prepare(layout, None, FLOAT).run


def prepare(case: Case, rows: int, columns: int) -> Prepared:
    torch.manual_seed(0)
    dense = torch.randn(rows, columns) / columns**0.5
    keep = 1 - case.sparsity
    kind, _, size = case.structure.partition(" ")
    if kind in {"row", "column"}:
        return sliced(dense, kind, keep)
    if kind == "unstructured":
        mask = torch.rand(rows, columns) < keep
    elif kind == "block":
        height, width = map(int, size.split("x"))
        mask = (torch.rand(rows // height, columns // width) < keep).repeat_interleave(height, 0)
        mask = mask.repeat_interleave(width, 1)
    else:
        n, m = map(int, kind.split(":"))
        mask = torch.zeros(rows, columns // m, m, dtype=torch.bool)
        mask = mask.scatter_(-1, torch.rand(mask.shape).topk(n).indices, True).view(rows, columns)
    prepared = Prepared(dense.masked_fill(~mask, 0), dense)
    weight, dtype = prepared.weight, case.dtype
    if kind == "block":
        prepared.add("tiles", TileLayout.pack(weight, mask, height=height, width=width, value_dtype=dtype))
        return prepared
    if kind != "unstructured":
        prepared.add("groups", GroupLayout.pack(weight, mask, n=n, m=m, value_dtype=dtype))
    prepared.add("bitmask", BitmaskLayout.pack(weight, mask, value_dtype=dtype))
    for width, height in [(128, 256), (256, 128), (512, 128), (32768, 64)]:
        layout = PanelLayout.pack(weight, mask, height=height, width=width, value_dtype=dtype)
        prepared.add(f"panels {height}x{'all' if width > columns else width}", layout)
    return prepared


def sliced(dense: Tensor, kind: str, keep: float) -> Prepared:
    """Whole rows or columns: a smaller dense product, by torch, packed beforehand or by ours."""
    axis = 0 if kind == "row" else 1
    kept = torch.randperm(dense.shape[axis])[: round(dense.shape[axis] * keep)].sort().values
    weight = torch.zeros_like(dense).index_copy_(axis, kept, dense.index_select(axis, kept))
    packed = (RowPacked if kind == "row" else ColumnPacked).from_dense(weight)
    routes: dict[str, tuple[Run, int]] = {}
    for route in candidates(packed):
        if isinstance(route, RowRoute | ColumnRoute):
            prepared = kernels.prepare(packed, route, CPU, FLOAT)
            routes[str(route)] = (partial(prepared.run, bias=None), packed.values.nbytes)
    return Prepared(weight, weight, routes)


def rivals(weight: Tensor, batch: int) -> dict[str, Run]:
    """Dense as torch runs it, dense packed beforehand, and torch's CSR."""
    sparse = weight.to_sparse_csr()
    found: dict[str, Run] = {
        "eager": lambda x: nn.functional.linear(x, weight),
        "csr": lambda x: (sparse @ x.T).T,
    }
    if torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn._reorder_linear_weight(weight, batch)
        found["onednn"] = lambda x: torch.ops.mkldnn._linear_pointwise(x, onednn, None, "none", [], "")
    if torch.backends.mkl.is_available():
        mkl = torch.ops.mkl._mkl_reorder_linear_weight(weight, batch)
        found["mkl"] = lambda x: torch.ops.mkl._mkl_linear(x, mkl, weight, None, batch)
    return found


def check(run: Run, x: Tensor, weight: Tensor) -> None:
    exact = x.double() @ weight.double().T
    error = (run(x).double() - exact).abs().max() / exact.abs().max()
    assert error < 1e-5, f"relative error {error:.1e}"  # float32 sums of thousands of products, in any order


def limits(clock: Callable[[], float]) -> tuple[float, float]:
    """Bytes and multiply-adds a second that this machine reaches now, by the same clock."""
    stream, square = torch.ones(1 << 24), torch.randn(1024, 1024)
    read = min(seconds(stream.sum, clock) for _ in range(7))
    multiply = min(seconds(lambda: square @ square, clock) for _ in range(7))
    return stream.nbytes / read, 1024**3 / multiply


def seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    run()
    return clock() - began


def interleaved(
    runs: dict[str, Run], x: Tensor, rounds: int, clock: Callable[[], float]
) -> dict[str, tuple[float, list[float]]]:
    """Median and every time of each, all taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(partial(run, x), clock))
    return {name: (statistics.median(record), record) for name, record in times.items()}


def measure(case: Case, rows: int, columns: int, rounds: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    prepared = prepare(case, rows, columns)
    bandwidth, peak = limits(clock)
    nnz = int((prepared.weight != 0).sum())
    table = []
    for batch, target in case.targets.items():
        x = torch.randn(batch, columns)
        against = rivals(prepared.weight, batch)
        for run, _ in prepared.routes.values():
            check(run, x, prepared.expected)
        for run in against.values():
            check(run, x, prepared.weight)
        everyone = {**against, **{name: run for name, (run, _) in prepared.routes.items()}}
        trial = interleaved(everyone, x, CHOOSING, clock)
        best = min(prepared.routes, key=lambda name: trial[name][0])
        dense = min(({"onednn", "mkl"} & set(against)) or {"eager"}, key=lambda name: trial[name][0])
        times = {name: record for name, (_, record) in interleaved(everyone, x, rounds, clock).items()}
        ours = statistics.median(times[best])
        ratio = {
            label: [theirs / packed for theirs, packed in zip(times[name], times[best], strict=True)]
            for label, name in [("eager", "eager"), ("prepacked", dense), ("csr", "csr")]
        }
        reached = {label: statistics.median(record) for label, record in ratio.items()}
        least = max(prepared.routes[best][1] / bandwidth, nnz * batch / peak)
        table.append(
            {
                "structure": case.structure,
                "sparsity": case.sparsity,
                "values": str(case.dtype).removeprefix("torch."),
                "batch": batch,
                "kernel": best,
                "ms": ours * 1e3,
                **reached,
                "spread": [min(ratio["eager"]), max(ratio["eager"])],
                "roofline": least / ours,
                "target": target,
                "met": all(r >= t for r, t in zip(reached.values(), target, strict=False)),
            }
        )
    return table


def line(row: dict[str, Any]) -> str:
    """A row of the Markdown table."""
    low, high = row["spread"]
    target = " / ".join(f"{value:g}" for value in row["target"])
    return (
        f"| {row['structure']} {row['sparsity']:.0%} {row['values']} | {row['batch']} | {row['kernel']} "
        f"| {row['ms']:.2f} | "
        f"{row['eager']:.1f} / {row['prepacked']:.1f} / {row['csr']:.1f} | {low:.1f} to {high:.1f} | "
        f"{row['roofline']:.2f} | {target} | {'yes' if row['met'] else 'no'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096", help="outputs x inputs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", help="one of " + ", ".join(kernels.isas()))
    parser.add_argument("--only", default="", help="cases whose structure contains this")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time counts one thread's time: it needs --threads 1")
    torch.set_num_threads(options.threads)
    rows, columns = map(int, options.shape.split("x"))
    clock = time.thread_time if options.cpu_time else time.perf_counter
    isa = options.isa or kernels.isas()[0]
    os.environ["SECATEUR_ISA"] = isa
    print(f"{describe()}; kernels {isa}; {rows}x{columns}; {'processor' if options.cpu_time else 'wall'} time\n")
    print("| case | batch | kernel | ms | x eager / prepacked / CSR | spread | roofline | target | met |")
    print("|---|---|---|---|---|---|---|---|---|")
    table = []
    with torch.no_grad():
        for case in CASES:
            if options.only in case.structure:
                for row in measure(case, rows, columns, options.rounds, clock):
                    table.append(row)
                    print(line(row), flush=True)
    print()
    print(json.dumps({"benchmark": "kernels", "isa": isa, "threads": options.threads, "rows": table}))


if __name__ == "__main__":
    main()
