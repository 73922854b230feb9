"""Pack the layers of a model that gain by it, and unpack them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur._checks import settings as settings_from
from secateur._errors import RecipeError
from secateur.layers import swap_modules_
from secateur.nn import PackedConv2d, PackedLinear, linear_of, packed_layers
from secateur.packing._history import History, patterns_in
from secateur.packing._jobs import find_jobs
from secateur.packing._measure import cache_at, machine
from secateur.packing._settings import PackSettings
from secateur.reports import PackedLayer, PackReport

_COLD = 32 << 20  # bytes of weights beyond which a model's layers do not stay in a cache from call to call

Progress = Callable[[str, float, float], None]


def pack_(
    model: nn.Module,
    settings: PackSettings | None = None,
    *,
    batch_sizes: Sequence[int] | None = None,
    value_dtype: torch.dtype | str | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    memory: float | None = None,
    cache: str | Path | None = None,
    history: History = (),
    timer: Callable[[], float] = time.perf_counter,
    progress: Progress = lambda description, done, total: None,
) -> PackReport:
    """Replace the layers of a pruned model, in place, by packed ones that are smaller and faster on this machine.

    Each kind of layer (shape, pattern, density, value dtype) is measured with every kernel that can run it, against the
    dense layer as it is, at every batch size. A layer is packed only if it gets faster somewhere and slower nowhere,
    beyond noise; else it stays dense, and the report says why. Output heads and
    layers that share their weight with an embedding are left alone unless ``include`` names them. Packed layers in the
    model are measured again, and packed anew where ``value_dtype`` differs.

    It takes about a second for each kind of layer. Values are exact unless ``value_dtype`` asks for fewer bits.

    Args:
        model: any module but a bare layer; on the CPU.
        settings: all of the following settings as one value, in their place.
        batch_sizes, value_dtype, include, exclude, memory: see :class:`PackSettings`.
        cache: a JSON file of measurements, by machine, to read and to add to; None measures anew in each process.
        history: reports of how the layers were pruned, whose patterns are used. Patterns of other layers are found
            from their zeros.
        timer: seconds from any origin.
        progress: called with a description, and how much of how much is done.

    Returns:
        A frozen report: for each layer the winners, ratios with their spread, bytes, errors, and reasons.

    Raises:
        RecipeError: no layer to pack, batch sizes that are none, or a glob that matches nothing.
        FormatError: no such value dtype, or a cache that is none.

    Example:
        >>> import torch, secateur
        >>> model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10))
        >>> _ = secateur.prune_(model, pattern="block:16x16", sparsity=0.9, method="magnitude", include=["0"])
        >>> report = secateur.pack_(model, batch_sizes=[1])
        >>> [(layer.name, layer.pattern, layer.format) for layer in report.layers]
        [('0', 'block:16x16', 'block')]
        >>> [(skip.name, skip.reason) for skip in report.skipped]
        [('2', 'no zeros')]
    """
    began = time.perf_counter()
    keywords = {
        "batch_sizes": batch_sizes,
        "value_dtype": value_dtype,
        "include": include,
        "exclude": exclude,
        "memory": memory,
    }
    made = settings_from("settings", settings, PackSettings, keywords)
    known = cache_at(cache)
    jobs, skipped = find_jobs(model, made, patterns_in(history))
    cold = sum(job.dense_bytes for job in jobs) > _COLD
    rows: list[PackedLayer] = []
    swaps: list[tuple[nn.Module, nn.Module]] = []
    for index, job in enumerate(jobs):
        progress(f"packing {job.title}", index, len(jobs))
        decision = job.decide(made, cold, known, timer)
        if decision.plan is not None:
            swaps += job.packed_modules(decision.plan)
        elif isinstance(job.modules[0], PackedLinear | PackedConv2d):
            swaps += [(module, job.dense) for module in job.modules]
        rows.append(job.report(decision))
    swap_modules_(model, swaps)
    known.save()
    found = sum(job.pattern_was_found for job in jobs)
    notes = [f"the patterns of {found} layers were found from their zeros"] if found else []
    return PackReport(
        layers=tuple(rows),
        skipped=tuple(skipped),
        machine=machine(),
        memory=made.memory,
        seconds=time.perf_counter() - began,
        notes=tuple(notes),
    )


def unpack_(model: nn.Module) -> list[str]:
    """Replace a model's packed layers, in place, by plain ones with the same weight, zeros included.

    Exact, but for int8 values, which are multiplied by their scales and stay rounded.

    Returns:
        The qualified names of the layers that were replaced.

    Raises:
        RecipeError: the model is itself a packed layer; use its ``to_dense``.

    Example:
        >>> import torch, secateur
        >>> linear = torch.nn.Linear(8, 4)
        >>> model = torch.nn.Sequential(secateur.PackedLinear.from_linear(linear))
        >>> secateur.unpack_(model), torch.equal(model[0].weight, linear.weight)
        (['0'], True)
    """
    if isinstance(model, PackedLinear | PackedConv2d):
        raise RecipeError("a bare layer cannot be replaced in place; use its to_dense.")
    found = packed_layers(model)
    plain: dict[int, nn.Module] = {}
    weights: dict[tuple[int, torch.dtype], nn.Parameter] = {}
    for module in found.values():
        if id(module) in plain:
            continue
        made: Any = module.to_dense()
        inner = linear_of(module)
        key = id(inner.values), inner.weight_dtype
        made.weight = weights.setdefault(key, made.weight)  # tied ones stay tied
        plain[id(module)] = made
    swap_modules_(model, [(module, plain[id(module)]) for module in found.values()])
    return list(found)
