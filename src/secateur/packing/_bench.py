"""How fast this machine runs a pruned layer, with secateur and with its alternatives."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the name that PyTorch's own documentation uses

from secateur._errors import KernelError, RecipeError
from secateur._types import Progress, Weight
from secateur.formats import Format, encode, pack, stored_share
from secateur.huggingface import load_model, open_model
from secateur.kernels import DenseRoute, PrepackedRoute, Route, RoutePlan, available, can_run, candidates
from secateur.layers import select_layers
from secateur.nn import PackedLinear
from secateur.packing._measure import machine
from secateur.patterns import SparsityPattern, satisfied
from secateur.reports import Table, TableColumn, bars, tables_page
from secateur.timing import Timer, ratios, time_in_turn

OURS = {"ours": torch.float32, "ours bfloat16": torch.bfloat16, "ours int8": torch.int8}
OTHERS = ("prepacked dense", "torch CSR", "int8 dynamic dense")
CONTENDERS = (*OTHERS, *OURS)
BENCH_UNIT = (
    "Speed as a multiple of eager F.linear in float32: medians of calls measured in turn, quartiles in brackets, "
    "and the route that was fastest."
)

_TOLERANCE = {"ours bfloat16": 2e-2, "ours int8": 4e-2, "int8 dynamic dense": 8e-2}  # error over the largest output
_EXACT = 1e-4  # the same for float32
# In a large model a layer finds its weight in memory, not in a cache. So a weight of fewer bytes than _CACHED is
# removed from the caches before each call, by reading _EVICTED bytes of something else.
_CACHED = 64 << 20
_EVICTED = 48 << 20


@dataclass(frozen=True)
class Result:
    """One contender on one layer at one batch.

    Args:
        layer: a description of the layer.
        rows: input rows.
        contender: one of ``CONTENDERS``.
        route: the fastest route, for contenders of secateur.
        ratio: time of eager ``F.linear`` in float32 over the contender's time: the median over rounds. None where the
            contender cannot run.
        low: lower quartile of the ratios.
        high: upper quartile of the ratios.
        seconds: median time of a call.
        dense_seconds: median time of ``F.linear``.
        error: largest difference from the float32 outputs, over the largest of these.
        note: why the contender cannot run.
    """

    layer: str
    rows: int
    contender: str
    route: str = ""
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    seconds: float | None = None
    dense_seconds: float | None = None
    error: float | None = None
    note: str = ""


def made_weight(shape: tuple[int, int], pattern: SparsityPattern, sparsity: float | None, seed: int = 0) -> Weight:
    """Return a random weight that is pruned to a pattern.

    Raises:
        PatternError: the pattern does not fit the shape, or the sparsity does not fit the pattern.
    """
    pattern.validate(shape)
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return weight.masked_fill(~pattern.mask(weight.abs(), sparsity), 0)


def bench_directory(
    path: str | Path, batches: Sequence[int], timer: Timer = time.perf_counter, progress: Progress = lambda *_: None
) -> list[Result]:
    """Measure the pruned layers of a model directory: one layer for each shape, pattern and density.

    Raises:
        FormatError: not a model directory with safetensors files.
        RecipeError: no layer has zeros.
    """
    model, _ = load_model(open_model(path), "cpu", with_head=True)
    layers, _ = select_layers(model)
    examples: dict[str, tuple[str, Weight]] = {}  # the first layer of each shape, pattern and density
    for layer in layers:
        weight = layer.matrix().float()
        if bool((weight == 0).any()):
            examples.setdefault(_description(pack(weight)), (layer.title, weight))
    if not examples:
        raise RecipeError(f"{path}: no layer has zeros. Prune it first: secateur prune MODEL_DIR --output OUT.")
    found = []
    for number, (description, (name, weight)) in enumerate(examples.items()):
        progress(f"{name}, {description}", number, len(examples))
        found += bench_weight(weight, batches, f"{description} ({name})", timer)
    return found


@torch.no_grad()
def bench_weight(
    weight: Weight, batches: Sequence[int], layer: str | None = None, timer: Timer = time.perf_counter
) -> list[Result]:
    """Measure one weight with every contender, after comparing the outputs of each with those of float32.

    Args:
        weight: ``[out, in]``, float32, with zeros.
        batches: input rows at which to measure.
        layer: a description of the layer; None to make one.
        timer: returns seconds since any fixed time.

    Raises:
        KernelError: a contender of secateur has wrong outputs.
    """
    title = layer or _description(pack(weight))
    notes: dict[str, str] = {}
    makers: dict[str | _ByRoute, Callable[[Tensor], Callable[[], Any]]] = {}
    for name, make in (("prepacked dense", _prepacked), ("torch CSR", _csr), ("int8 dynamic dense", _int8_dynamic)):
        try:
            makers[name] = make(weight)
        except (RuntimeError, NotImplementedError, AttributeError, KernelError) as error:
            notes[name] = str(error).partition("\n")[0][:200]
    for name, dtype in OURS.items():
        made = pack(weight, dtype)
        for route in candidates(made, satisfied(weight == 0)):
            if route not in (DenseRoute(), PrepackedRoute()) and can_run(made, route, weight):
                packed_layer = PackedLinear(made, None, RoutePlan((route,)), torch.float32)
                makers[_ByRoute(name, route)] = partial(partial, packed_layer)
    evicting = torch.zeros(_EVICTED // 4) if weight.nbytes < _CACHED else None
    found = []
    for rows in sorted(set(batches)):
        x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows))
        calls: dict[str | _ByRoute, Callable[[], Any]] = {
            "dense": partial(F.linear, x, weight),
            **{name: make(x) for name, make in makers.items()},
        }
        errors = {name: _compare(name, call(), F.linear(x, weight)) for name, call in calls.items()}
        before = None if evicting is None else evicting.sum
        seconds = time_in_turn(calls, "dense", timer, before, keep=OTHERS)
        for contender in CONTENDERS:
            own = [name for name in seconds if _contender(name) == contender]
            if not own:
                note = notes.get(contender, "no kernel runs on this machine")
                found.append(Result(title, rows, contender, note=note))
                continue
            best = min(own, key=lambda name, of=seconds: median(of[name]))  # type: ignore[misc]
            low, ratio, high = ratios(seconds, "dense", best)
            taken = median(seconds[best]), median(seconds["dense"])
            by_route = str(best.route) if isinstance(best, _ByRoute) else ""
            found.append(Result(title, rows, contender, by_route, ratio, low, high, *taken, errors[best]))
    return found


@dataclass(frozen=True)
class _ByRoute:
    """A contender of secateur by one route."""

    contender: str
    route: Route


def _contender(name: str | _ByRoute) -> str:
    return name.contender if isinstance(name, _ByRoute) else name


def _compare(name: str | _ByRoute, y: Tensor, expected: Tensor) -> float:
    """The largest error over the largest output. Raise if it is too large for a contender of secateur."""
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((y - expected).abs().max()) / largest if largest else 0.0
    if isinstance(name, _ByRoute) and error > (limit := _TOLERANCE.get(name.contender, _EXACT)):
        raise KernelError(
            f"{name.contender} by the route {name.route} is off by {error:.2g} of the largest output; expected "
            f"up to {limit:g}. This is a defect of secateur: please report it."
        )
    return error


def _prepacked(weight: Weight) -> Callable[[Tensor], Callable[[], Tensor]]:
    if (state := available()["onednn"]) != "ok":
        raise KernelError(state)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return lambda x: lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _csr(weight: Weight) -> Callable[[Tensor], Callable[[], Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # says that CSR is in beta
        sparse = weight.to_sparse_csr()
    return lambda x: lambda: (sparse @ x.T).T


def _int8_dynamic(weight: Weight) -> Callable[[Tensor], Callable[[], Tensor]]:
    _, scales = encode(weight, torch.int8)
    assert scales is not None
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():
        # The warning says that PyTorch will remove it. PyTorch has no other int8 layer.
        warnings.simplefilter("ignore", UserWarning)
        codes = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(codes, None)
    return lambda x: lambda: torch.ops.quantized.linear_dynamic(x, packed, True)


def _description(packed: Format) -> str:
    rows, columns = packed.shape
    return f"{rows}x{columns} {packed.pattern} {1 - stored_share(packed):.0%}"


def bench_dict(results: Sequence[Result]) -> dict[str, Any]:
    """Return results and the machine as JSON can hold them."""
    return {"machine": machine(), "results": [asdict(result) for result in results]}


def bench_tables(results: Sequence[Result]) -> list[Table]:
    """Return a table for each layer: a row for each batch, a column for each contender."""
    tables = []
    for layer in dict.fromkeys(result.layer for result in results):
        own = [result for result in results if result.layer == layer]
        by_cell = {(result.rows, result.contender): result for result in own}
        batches = list(dict.fromkeys(result.rows for result in own))
        contenders = list(dict.fromkeys(result.contender for result in own))
        longest = max([1.0, *(result.ratio for result in own if result.ratio is not None)])
        columns = [TableColumn("batch"), TableColumn("F.linear", is_number=True)]
        for contender in contenders:
            ratios = [by_cell[rows, contender].ratio for rows in batches]
            columns.append(TableColumn(contender, is_number=True, bars=bars(ratios, longest)))
        lines = []
        for rows in batches:
            cells = [by_cell[rows, contender] for contender in contenders]
            dense = next((cell.dense_seconds for cell in cells if cell.dense_seconds is not None), None)
            dense_time = "" if dense is None else f"{1000 * dense:.3f} ms"
            lines.append((str(rows), dense_time, *map(_speed, cells)))
        notes = dict.fromkeys(f"{result.contender}: {result.note}" for result in own if result.note)
        tables.append(Table(layer, tuple(columns), tuple(lines), tuple(notes)))
    return tables


def _speed(result: Result) -> str:
    """The ratio, its quartiles, and the fastest route for contenders of secateur."""
    if result.ratio is None:
        return ""
    return f"{result.ratio:.2f} ({result.low:.2f}-{result.high:.2f})\n{result.route}".rstrip()


def bench_page(results: Sequence[Result]) -> str:
    """Return results as one HTML page that loads no other file."""
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    lead = (f"{BENCH_UNIT} Longer bars are faster.", f"Measured on: {where}.")
    return tables_page("secateur bench", lead, (), bench_tables(results))
