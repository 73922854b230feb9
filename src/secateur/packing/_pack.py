"""Pack the layers of a model that get faster, and unpack them again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur._checks import settings as settings_from
from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.calibration import Forward, call_model, load_batches, observe, quiet
from secateur.layers import Reading, check_model, swap_modules_
from secateur.nn import (
    Packed,
    linear_of,
    packed_layers,
    packed_recurrents,
    packed_stacks,
    put_in_place_,
)
from secateur.packing._attention import as_dense, losing_attention
from secateur.packing._changes import Given, find_changes
from secateur.packing._embeddings import embedding_jobs, is_for_embeddings, pack_embeddings, rounds_embeddings
from secateur.packing._history import History, patterns_in, readings_in
from secateur.packing._images import is_convolution, sizes_in
from secateur.packing._jobs import find_jobs, with_sizes
from secateur.packing._measure import cache_at, machine
from secateur.packing._promise import Kept, Pairs, keep_promise
from secateur.packing._settings import PackSettings
from secateur.packing._untested import untested
from secateur.reports import PackReport
from secateur.zeros import weigh_skipped, weights_of

_COLD = 32 << 20  # bytes of all weights; with more, no weight stays in a cache until the next call of its layer


def pack_(
    model: nn.Module,
    settings: PackSettings | None = None,
    *,
    batches: Iterable[Any] | None = None,
    batch_sizes: Sequence[int] | None = None,
    value_dtype: torch.dtype | str | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    memory: float | None = None,
    precision: str | None = None,
    tolerance: float | None = None,
    cache: str | Path | None = None,
    history: History = (),
    forward: Forward = call_model,
    timer: Callable[[], float] = time.perf_counter,
    progress: Progress = lambda description, done, total: None,
) -> PackReport:
    """Replace the layers of a pruned model, in place, by packed ones that are smaller and faster on this machine.

    Every route that can run a layer is measured at every batch size, and compared with the dense layer. Layers of the
    same shape, pattern, density and value dtype are measured once. A layer is packed only if it gets faster at one
    batch size and slower at none, by more than noise. Otherwise it stays dense, and the report says why. Output
    heads, and layers that share their weight with an embedding, are not packed unless ``include`` names them. Layers
    that are already packed are measured again, and packed again if ``value_dtype`` differs.

    A layer that is faster alone may still make the model slower. With ``batches`` the whole model is timed before and
    after, and layers that do not pay are taken back. A measurement takes about a second. Values are exact unless
    ``value_dtype`` asks for fewer bits, and products are unless ``precision`` does. With a ``tolerance`` the fastest
    arithmetic is chosen for each layer that keeps the error of its outputs within the tolerance; then layers are made
    exact again until the outputs of the whole model keep within it, too.

    Args:
        model: any module on the CPU, except a bare layer.
        settings: all settings as one value, instead of the following ones.
        batches: inputs as for :func:`prune_`. The whole model is timed with one of each shape, dense and packed in
            turn. Layers are taken back until it is faster with one input and slower with none. With a ``precision``, a
            ``tolerance`` or a ``value_dtype`` the report has the errors of outputs on them. The batches also show
            which weights functions multiply. This is needed only for weights that are found in no other way: parameters
            of modules that are no known kind of layer, without a report in ``history`` that has them.
        batch_sizes, value_dtype, include, exclude, memory, precision, tolerance: see :class:`PackSettings`.
        cache: a JSON file of measurements, to read and to add to; None keeps them only while the process runs.
        history: reports of how the layers were pruned, whose patterns are used. The patterns of other layers are found
            from their zeros.
        forward: how to call the model on one of the ``batches``.
        timer: returns seconds since any fixed time.
        progress: called with a description, how much is done, and how much there is in total.

    Returns:
        A frozen report: for each layer its routes, ratios with their spread, bytes and error, or why it stays dense.

    Raises:
        RecipeError: no layer to pack, a setting that is out of range, settings that exclude each other, a tolerance
            without batches, or a glob that matches nothing.
        FormatError: the cache is not an autotune cache, or its contents are invalid.
        TypeError: a setting of another type.

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
        "precision": precision,
        "tolerance": tolerance,
    }
    made = settings_from("settings", settings, PackSettings, keywords)
    known = cache_at(cache)
    check_model(model)
    loaded = None if batches is None else load_batches(batches, torch.device("cpu"))
    read = {**readings_in(history, model), **({} if loaded is None else _read(model, loaded, forward))}
    embeddings, left = embedding_jobs(model, made.include, made.exclude) if rounds_embeddings(made) else ([], [])
    try:
        jobs, skipped = find_jobs(model, made, patterns_in(history), read)
    except RecipeError:
        if not is_for_embeddings(made.include, embeddings):
            raise
        jobs, skipped = [], []
    if loaded is not None and any(is_convolution(module) for module in model.modules()):
        jobs = with_sizes(jobs, sizes_in(model, loaded, forward))
    cold = sum(job.dense_bytes for job in jobs) > _COLD
    given = Given(loaded, forward)
    changes, remarks = find_changes(model, jobs, given, made, cold, known, timer, progress)
    rows = [change.row for change in changes]
    pairs = [pair for change in changes for pair in change.pairs]
    losing = losing_attention(model, {id(old): new for old, new in pairs}, made.batch_sizes, timer)
    if losing:
        pairs = [(old, new) for old, new in pairs if id(old) not in losing]
        reasons = {name: losing[id(part)] for name, part in _named_parts(model) if id(part) in losing}
        rows = [as_dense(row, reasons[row.name]) if row.name in reasons else row for row in rows]
    tables = pack_embeddings(embeddings, left, _modules(pairs), skipped)
    known.save()  # which may fail, and then the model is as it was
    kept = Kept(rows, pairs)
    if loaded is not None:
        own = [change.job for change in changes]
        kept = keep_promise(model, own, rows, [*pairs, *tables.swaps], loaded, forward, timer, progress)
        stored = {id(old) for old, _ in tables.swaps}
        kept = replace(kept, pairs=[(old, new) for old, new in kept.pairs if id(old) not in stored])
        tables = pack_embeddings(embeddings, left, _modules(kept.pairs), skipped)  # a table goes with its output layer
    kept = replace(kept, rows=[*kept.rows, *tables.rows], pairs=[*kept.pairs, *tables.swaps])
    reduced = any(row.packed and (row.precision != "exact" or row.error > 0) for row in kept.rows)
    output_error = given.error(model, kept.pairs) if reduced else None
    put_in_place_(model, kept.pairs)
    found = sum(job.pattern_was_found for job in jobs)
    notes = [f"the patterns of {found} layers were found from their zeros"] if found else []
    notes += [*remarks, *untested(jobs)]
    return PackReport(
        layers=tuple(kept.rows),
        skipped=weigh_skipped(model, tables.skipped, {}),
        machine=machine(),
        memory=made.memory,
        seconds=time.perf_counter() - began,
        notes=(*notes, *kept.notes),
        whole=weights_of(model),
        output_error=output_error,
        times=kept.times,
    )


def _named_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    """Yield the modules and the parameters of a model, each with its qualified name."""
    yield from model.named_modules()
    yield from model.named_parameters()


def _modules(pairs: Pairs) -> dict[int, nn.Module]:
    """What replaces modules, by the id of each."""
    return {id(old): new for old, new in pairs if isinstance(new, nn.Module)}


def _read(model: nn.Module, loaded: list[Any], forward: Forward) -> Mapping[int, Reading]:
    """How functions multiply parameters, by their id."""
    with quiet(model), torch.no_grad():
        return observe(model, loaded, forward).read


def unpack_(model: nn.Module) -> list[str]:
    """Replace the packed layers of a model, in place, by dense ones with the same weight, zeros included.

    The weights are exact. int8 values are multiplied by their scales, and stay rounded.

    Returns:
        The qualified names of the layers, and of the parameters, that were replaced.

    Raises:
        RecipeError: the model is itself a packed layer.

    Example:
        >>> import torch, secateur
        >>> linear = torch.nn.Linear(8, 4)
        >>> model = torch.nn.Sequential(secateur.PackedLinear.from_linear(linear))
        >>> secateur.unpack_(model), torch.equal(model[0].weight, linear.weight)
        (['0'], True)
    """
    if isinstance(model, Packed):
        raise RecipeError("the model is a bare layer, which cannot be replaced in place. Call its to_dense().")
    found = packed_layers(model)
    dense: dict[int, nn.Module] = {}
    weights: dict[tuple[int, torch.dtype], nn.Parameter] = {}
    for module in found.values():
        if id(module) in dense:
            continue
        made: Any = module.to_dense()
        inner = linear_of(module)
        key = id(inner.values), inner.weight_dtype
        made.weight = weights.setdefault(key, made.weight)  # shared ones stay shared
        dense[id(module)] = made
    recurrent = packed_recurrents(model)
    whole = {id(module): module.to_dense() for module in recurrent.values()}
    swap_modules_(model, [(module, dense[id(module)]) for module in found.values()])
    swap_modules_(model, [(module, whole[id(module)]) for module in recurrent.values()])
    stacks = packed_stacks(model)
    different = {id(stack): stack for stack in stacks.values()}
    put_in_place_(model, [(stack, nn.Parameter(stack.to_dense())) for stack in different.values()])
    return [*found, *recurrent, *stacks]
