"""Prove that a smaller model computes what the model computed before, with its removed units switched off."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from secateur._errors import SolverError, SparsityError
from secateur.calibration import Forward, call_model, quiet
from secateur.graph import Dimension, Removal
from secateur.surgery._calls import HALF, Call, Difference, difference, same_chance, tolerance_for, whole_call
from secateur.surgery._remove import Undo, remove_

# How far the output of a whole model may be from its reference when all of its parts are proved to be right.
_ROUNDING = 0.1
_FINITE = 1e300


@dataclass(frozen=True)
class Proof:
    """That a smaller model is the same function.

    Args:
        error: the largest difference from the reference, as a part of its norm.
        tolerance: that was allowed.
        by_blocks: whether that was measured for each part of the model alone, on the same inputs, in float32.
        compared: number of comparisons.
        is_exact: whether a difference is an error. Channels of the residual stream are not exact, since norms change.
    """

    error: float
    tolerance: float
    by_blocks: bool
    compared: int
    is_exact: bool = True


def prove(undo: Undo, batches: Iterable[Any], forward: Forward = call_model) -> Proof:
    """Prove that a model computes the same as before units were removed, and put it back if it does not.

    The reference is the model before, in which zero columns read the removed units, removed blocks are skipped and
    removed experts never chosen. A model of half precision is compared in float32, part by part: a part is the
    smallest module around all places of the units, and gets the inputs that it has in the model.

    Args:
        undo: what :func:`remove_` returned.
        batches: inputs of the model.
        forward: how to call the model on one of them.

    Returns:
        How large the difference was. At most 1e-10 is allowed for float64, else 1e-5.

    Raises:
        SolverError: the model is another function. It names the units with which that begins.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from torch import nn
        >>> from secateur.graph import Dimension, Graph, Place, Removal
        >>> from secateur.surgery import prove, remove_
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> _ = model[2].weight.data[:, 1].zero_()
        >>> each = np.arange(3)[:, None]
        >>> places = Place("0.weight", 0, each), Place("0.bias", 0, each), Place("2.weight", 1, each, is_input=True)
        >>> graph = Graph((Dimension("ffn", "ffn", 3, places),))
        >>> undo = remove_(model, graph, Removal({"ffn": (1,)}), torch.ones(1, 4))
        >>> prove(undo, [torch.ones(1, 4)]).error < 1e-6
        True
    """
    worst = Proof(0.0, tolerance_for(undo.model.parameters()), by_blocks=False, compared=0)
    try:
        for batch in batches:
            found, by_blocks, is_exact = _checked(undo, batch, forward)
            worst = Proof(
                max([worst.error, *(part.error for _, part in found)]),
                worst.tolerance,
                by_blocks or worst.by_blocks,
                worst.compared + len(found),
                is_exact,
            )
            for dimensions, part in found:
                if part.error > (worst.tolerance if is_exact else _FINITE):
                    raise _failed(_narrowed(undo, dimensions, batch, forward), part, worst.tolerance)
    except BaseException:
        undo.restore()
        raise
    return worst


_Found: TypeAlias = list[tuple[list[Dimension], Difference]]


def _checked(undo: Undo, batch: Any, forward: Forward) -> tuple[_Found, bool, bool]:
    """Compare a model with its reference: what was compared, whether in parts, and whether it must be equal."""
    everything = [dimension for dimension, _ in undo.removed]
    whole = _whole(undo, undo.reference, batch, forward)
    allowed = tolerance_for(undo.model.parameters())
    if any(dimension.kind == "hidden" for dimension in everything):
        return [(everything, whole)], False, False
    is_half = any(tensor.dtype in HALF for tensor in [*undo.model.parameters(), *undo.model.buffers()])
    if not is_half and whole.error <= allowed:
        return [(everything, whole)], False, True
    # Sums in another order grow on the way through a deep model, or make a router choose otherwise. So the parts are
    # proved, each on the same inputs, and that they are put together in the right way.
    found = _parts(undo, batch, forward)
    if undo.dropped:
        found.append((undo.dropped, _whole(undo, undo.reference_of_blocks, batch, forward)))
    if whole.error > _ROUNDING and all(part.error <= allowed for _, part in found):
        found.append((everything, whole))
    return found or [(everything, whole)], True, True


def _narrowed(undo: Undo, dimensions: list[Dimension], batch: Any, forward: Forward) -> list[Dimension]:
    """Put the model back, and return of several dimensions the one that is also wrong alone, or else all."""
    undo.restore()
    units = {dimension.name: units for dimension, units in undo.removed}
    for dimension in dimensions if len(dimensions) > 1 else ():
        try:
            alone = remove_(undo.model, undo.graph, Removal({dimension.name: units[dimension.name]}), batch, forward)
        except SparsityError:
            return [dimension]
        try:
            found, _, _ = _checked(alone, batch, forward)
        finally:
            alone.restore()
        if any(part.error > tolerance_for(undo.model.parameters()) for _, part in found):
            return [dimension]
    return dimensions


def _failed(dimensions: Iterable[Dimension], found: Difference, allowed: float) -> SolverError:
    names = ", ".join(dimension.name or "(the model itself)" for dimension in dimensions)
    what = found.reason or f"its output differs by {found.error:.1e}, at most {allowed:g} is allowed"
    return SolverError(
        f"{names}: without the removed units the model is another function than with them switched off: {what}.\n"
        "The model is as it was before. Exclude these units."
    )


def _whole(
    undo: Undo, reference: Callable[[], AbstractContextManager[None]], batch: Any, forward: Forward
) -> Difference:
    """Compare the output of the whole model with that of a reference."""
    with reference(), quiet(undo.model), same_chance():
        expected = forward(undo.model, copy.deepcopy(batch))
    try:
        with quiet(undo.model), same_chance():
            found = forward(undo.model, copy.deepcopy(batch))
    except Exception as error:  # code that needs the units fails in any way
        return _not_run(error)
    return difference(found, expected, undo.looks)


def _not_run(error: Exception) -> Difference:
    return Difference(math.inf, f"it fails with {type(error).__name__}: {error}".splitlines()[0][:300])


def _parts(undo: Undo, batch: Any, forward: Forward) -> _Found:
    """Compare each part of the model that lost units with its reference, on the inputs that it has in the model."""
    found: _Found = []
    waiting: dict[str, list[Dimension]] = {}
    for dimension, _ in undo.removed:
        if dimension.name in undo.scopes:
            waiting.setdefault(undo.scopes[dimension.name], []).append(dimension)
    while waiting:
        parts = _outermost(waiting)
        waiting = {}
        results = _compared(undo, list(parts), batch, forward)
        for path, dimensions in parts.items():
            if results[path]:
                found.append((dimensions, max(results[path], key=lambda result: result.error)))
            else:  # it is not called but used by the module around it
                waiting.setdefault(path.rpartition(".")[0], []).extend(dimensions)
    return found


def _outermost(scopes: dict[str, list[Dimension]]) -> dict[str, list[Dimension]]:
    """Join the scopes that lie in others to these."""
    joined: dict[str, list[Dimension]] = {}
    for path in sorted(scopes, key=len):
        outer = next((other for other in joined if path == other or not other or path.startswith(f"{other}.")), path)
        joined.setdefault(outer, []).extend(scopes[path])
    return joined


def _compared(undo: Undo, paths: list[str], batch: Any, forward: Forward) -> dict[str, list[Difference]]:
    """Compare modules with their references at each of their calls in a forward pass."""
    results: dict[str, list[Difference]] = {path: [] for path in paths}
    busy = False

    def compare(call: Call) -> Difference:
        nonlocal busy
        busy = True
        try:
            with undo.reference(), quiet(call.module):
                expected = call.again()
            try:
                with quiet(call.module):
                    output = call.again()
            except Exception as error:
                return _not_run(error)
            return difference(output, expected, undo.looks)
        finally:
            busy = False

    if "" in paths:  # there is nothing smaller to run in float32
        return {"": [compare(whole_call(undo.model, batch, forward))]}
    there = {id(module) for module in undo.model.modules()}
    hooks = []
    try:
        for path in paths:

            def note(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                if not busy:
                    results[path].append(compare(Call(path, module, *copy.deepcopy((args, kwargs)))))

            module = undo.modules[path]
            if id(module) in there:
                hooks.append(module.register_forward_pre_hook(note, with_kwargs=True, prepend=True))
            else:  # it lies in a block that has gone
                results[path].append(Difference(0.0))
        with quiet(undo.model):
            forward(undo.model, copy.deepcopy(batch))
    except Exception as error:
        if all(math.isfinite(result.error) for found in results.values() for result in found):  # it is in none of them
            results = {path: found or [_not_run(error)] for path, found in results.items()}
        results = {path: found or [Difference(0.0)] for path, found in results.items()}  # what was not reached
    finally:
        for hook in hooks:
            hook.remove()
    return results
