"""How fast this machine runs a pruned layer by every means there is."""

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

from secateur._errors import KernelError, SparsityError
from secateur._types import Weight
from secateur.files import ModelDirectory
from secateur.formats import encode, pack, stored_share
from secateur.huggingface import load_model
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

_TOLERANCE = {"ours bfloat16": 2e-2, "ours int8": 4e-2, "int8 dynamic dense": 8e-2}  # of the largest output
_EXACT = 1e-4
_CACHED = 64 << 20  # bytes; smaller weights would stay in a cache from call to call
_EVICTED = 48 << 20

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True)
class Result:
    """One contender on one layer at one batch.

    Args:
        layer: what it is, as text.
        rows: of the input.
        contender: one of ``CONTENDERS``.
        route: that won, for ours.
        ratio: time of eager ``F.linear`` in float32 over its own, median of pairs measured in turn; None where it
            cannot run.
        low: lower quartile of the pairs.
        high: upper quartile.
        seconds: median time of a call.
        dense_seconds: the same of ``F.linear``.
        error: largest difference from float32 outputs, over the largest of those.
        note: why it cannot run.
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
    """Return a random weight with the pattern's zeros.

    Raises:
        PatternError: the pattern does not fit the shape, or the sparsity the pattern.
    """
    pattern.validate(shape)
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return weight.masked_fill(~pattern.mask(weight.abs(), sparsity), 0)


def bench_directory(
    path: str | Path, batches: Sequence[int], timer: Timer = time.perf_counter, progress: Progress = lambda *_: None
) -> list[Result]:
    """Bench every kind of layer with zeros in a model directory: one for each shape, pattern and density.

    Raises:
        FormatError: it is no safetensors model directory.
        RecipeError: no layer has zeros.
    """
    model, _ = load_model(ModelDirectory.open(path), "cpu", with_head=True)
    layers, _ = select_layers(model)
    kinds: dict[str, tuple[str, Weight]] = {}
    for layer in layers:
        weight = layer.matrix().float()
        if bool((weight == 0).any()):
            packed = pack(weight)
            kinds.setdefault(
                f"{_size(weight.shape)} {packed.pattern} {1 - stored_share(packed):.0%}", (layer.title, weight)
            )
    if not kinds:
        raise SparsityError(f"{path}: no layer has zeros. Prune it first: secateur prune MODEL_DIR --output OUT.")
    found = []
    for number, (kind, (name, weight)) in enumerate(kinds.items()):
        progress(f"{name}, {kind}", number, len(kinds))
        found += bench_weight(weight, batches, f"{kind} ({name})", timer)
    return found


@torch.no_grad()
def bench_weight(
    weight: Weight, batches: Sequence[int], layer: str | None = None, timer: Timer = time.perf_counter
) -> list[Result]:
    """Bench one weight with every contender, after comparing what each computes with float32.

    Args:
        weight: ``[out, in]``, float32, with zeros.
        batches: input rows.
        layer: what to call it.
        timer: seconds from any origin.

    Raises:
        KernelError: a contender of ours computes something else.
    """
    packed = pack(weight)
    title = layer or f"{_size(weight.shape)} {packed.pattern} {1 - stored_share(packed):.0%}"
    notes: dict[str, str] = {}
    makers: dict[str | _Ours, Callable[[Tensor], Callable[[], Any]]] = {}
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
                makers[_Ours(name, route)] = partial(partial, packed_layer)
    evicting = torch.zeros(_EVICTED // 4) if weight.nbytes < _CACHED else None
    found = []
    for rows in sorted(set(batches)):
        x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows))
        calls: dict[str | _Ours, Callable[[], Any]] = {
            "dense": partial(F.linear, x, weight),
            **{name: make(x) for name, make in makers.items()},
        }
        errors = {name: _compare(name, call(), F.linear(x, weight)) for name, call in calls.items()}
        before = None if evicting is None else evicting.sum
        seconds = time_in_turn(calls, "dense", timer, before, keep=OTHERS)
        for contender in CONTENDERS:
            own = [name for name in seconds if _contender(name) == contender]
            if not own:
                found.append(Result(title, rows, contender, note=notes.get(contender, "no kernel runs here")))
                continue
            best = min(own, key=lambda name, of=seconds: median(of[name]))  # type: ignore[misc]
            low, ratio, high = ratios(seconds, "dense", best)
            taken = median(seconds[best]), median(seconds["dense"])
            by_route = str(best.route) if isinstance(best, _Ours) else ""
            found.append(Result(title, rows, contender, by_route, ratio, low, high, *taken, errors[best]))
    return found


@dataclass(frozen=True)
class _Ours:
    """One of our value types by one route."""

    contender: str
    route: Route


def _contender(name: str | _Ours) -> str:
    return name.contender if isinstance(name, _Ours) else name


def _compare(name: str | _Ours, y: Tensor, expected: Tensor) -> float:
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((y - expected).abs().max()) / largest if largest else 0.0
    if isinstance(name, _Ours) and error > _TOLERANCE.get(name.contender, _EXACT):
        raise KernelError(
            f"{name.contender} by {name.route} is off by {error:.2g} of the largest output. Please report this."
        )
    return error


def _prepacked(weight: Weight) -> Callable[[Tensor], Callable[[], Tensor]]:
    if (state := available()["onednn"]) != "ok":
        raise KernelError(state)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return lambda x: lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _csr(weight: Weight) -> Callable[[Tensor], Callable[[], Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that CSR is in beta
        sparse = weight.to_sparse_csr()
    return lambda x: lambda: (sparse @ x.T).T


def _int8_dynamic(weight: Weight) -> Callable[[Tensor], Callable[[], Tensor]]:
    _, scales = encode(weight, torch.int8)
    assert scales is not None
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that PyTorch will drop it: until then it is what others have
        codes = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(codes, None)
    return lambda x: lambda: torch.ops.quantized.linear_dynamic(x, packed, True)


def _size(shape: Sequence[int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def bench_dict(results: Sequence[Result]) -> dict[str, Any]:
    """Return results as JSON-ready dicts, with the machine."""
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
    """The ratio, the quartiles around it and, for ours, the route that won."""
    if result.ratio is None:
        return ""
    return f"{result.ratio:.2f} ({result.low:.2f}-{result.high:.2f})\n{result.route}".rstrip()


def bench_page(results: Sequence[Result]) -> str:
    """Return results as one HTML page, which loads nothing and needs no further library."""
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    lead = (f"{BENCH_UNIT} Longer bars are faster.", f"Measured on: {where}.")
    return tables_page("secateur bench", lead, (), bench_tables(results))
