"""How fast this machine runs a pruned layer by every means there is: a table, and a page with bars."""

from __future__ import annotations

import html
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
from secateur.timing import Timer, ratios, time_in_turn

OURS = {"ours": torch.float32, "ours bfloat16": torch.bfloat16, "ours int8": torch.int8}
OTHERS = ("prepacked dense", "torch CSR", "int8 dynamic dense")
CONTENDERS = (*OTHERS, *OURS)

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
        way: that won, for ours.
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
    way: str = ""
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


def bench_table(results: Sequence[Result]) -> dict[str, Any]:
    """Return results as JSON-ready dicts, with the machine."""
    return {"machine": machine(), "results": [asdict(result) for result in results]}


def bench_cell(result: Result) -> str:
    """Return a result as a few characters: the ratio and the quartiles around it."""
    if result.ratio is None:
        return "-"
    return f"{result.ratio:.2f} ({result.low:.2f}-{result.high:.2f})"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>secateur bench</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1c1d22; }}
h2 {{ font-size: 1.05rem; margin: 2rem 0 .4rem; }}
table {{ border-collapse: collapse; width: 100%; }}
td {{ padding: .15rem .5rem .15rem 0; white-space: nowrap; vertical-align: middle; }}
td.bar {{ width: 60%; }}
.bar div {{ height: .9rem; border-radius: 2px; background: #9aa3b2; min-width: 1px; }}
.bar div.ours {{ background: #2f7d5b; }}
.way, .machine {{ color: #6a6f7a; font-size: .85rem; }}
tr.first td {{ border-top: 1px solid #e3e5ea; padding-top: .5rem; }}
@media (prefers-color-scheme: dark) {{
  body {{ background: #16181d; color: #e6e8ec; }} tr.first td {{ border-color: #33363f; }}
}}
</style></head><body>
<h1>secateur bench</h1>
<p>Speed as a multiple of eager <code>F.linear</code> in float32: medians of calls measured in turn, quartiles in
brackets. Longer is faster.</p>
<p class="machine">{machine}</p>
{tables}
</body></html>
"""


def bench_page(results: Sequence[Result]) -> str:
    """Return results as one HTML page that loads nothing from anywhere."""
    tables = []
    for layer in dict.fromkeys(result.layer for result in results):
        own = [result for result in results if result.layer == layer]
        longest = max([1.0, *(result.ratio for result in own if result.ratio is not None)])
        lines = []
        for number, result in enumerate(own):
            first = number == 0 or own[number - 1].rows != result.rows
            width = 100 * (result.ratio or 0) / longest
            kind = "ours" if result.contender in OURS else ""
            bar = f'<div class="{kind}" style="width:{width:.1f}%"></div>' if result.ratio else ""
            text = html.escape(bench_cell(result) if result.ratio else result.note)
            lines.append(
                f"<tr{' class=first' if first else ''}><td>{f'batch {result.rows}' if first else ''}</td>"
                f'<td>{html.escape(result.contender)}</td><td class="bar">{bar}</td>'
                f'<td>{text} <span class="way">{html.escape(result.way)}</span></td></tr>'
            )
        tables.append(f"<h2>{html.escape(layer)}</h2>\n<table>\n" + "\n".join(lines) + "\n</table>")
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    return _PAGE.format(machine=html.escape(where), tables="\n".join(tables))
