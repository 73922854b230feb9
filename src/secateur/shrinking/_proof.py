"""Prove that a smaller model computes what the model computed before, with its removed units switched off."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur._errors import SolverError
from secateur.calibration import Forward, call_model, quiet
from secateur.shrinking._calls import HALF, Call, Difference, difference, tolerance_for, whole_call
from secateur.shrinking._remove import Undo
from secateur.shrinking._units import Dimension

# How far the output of a whole model may be from its reference when all of its parts are proved to be right.
_ROUNDING = 0.1


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
        >>> from secateur.shrinking import Dimension, Graph, Place, Removal, prove, remove_
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> _ = model[2].weight.data[:, 1].zero_()
        >>> each = np.arange(3)[:, None]
        >>> places = Place("0.weight", 0, each), Place("0.bias", 0, each), Place("2.weight", 1, each, is_input=True)
        >>> graph = Graph((Dimension("ffn", "ffn", 3, places),))
        >>> undo = remove_(model, graph, Removal({"ffn": (1,)}), torch.ones(1, 4))
        >>> prove(undo, [torch.ones(1, 4)]).error < 1e-6
        True
    """
    model = undo.model
    allowed = tolerance_for(model.parameters())
    is_exact = all(dimension.kind != "hidden" for dimension, _ in undo.removed)
    by_blocks = is_exact and any(tensor.dtype in HALF for tensor in [*model.parameters(), *model.buffers()])
    worst, compared = 0.0, 0
    try:
        for batch in batches:
            whole = _whole(undo, undo.reference, batch, forward)
            if by_blocks or (is_exact and whole.error > allowed):
                # Sums in another order grow on the way through a deep model, or make a router choose otherwise. So the
                # parts are proved, each on the same inputs, and that they are put together in the right way.
                by_blocks = True
                found = _parts(undo, batch, forward)
                if undo.dropped:
                    found.append((undo.dropped, _whole(undo, undo.reference_of_blocks, batch, forward)))
                for dimensions, part in found:
                    if part.error > allowed:
                        raise _failed(dimensions, part, allowed)
                if whole.error > _ROUNDING or not found:
                    raise _failed([dimension for dimension, _ in undo.removed], whole, allowed)
                worst, compared = max([worst, *(part.error for _, part in found)]), compared + len(found)
            else:
                if math.isinf(whole.error):
                    raise _failed([dimension for dimension, _ in undo.removed], whole, allowed)
                worst, compared = max(worst, whole.error), compared + 1
    except BaseException:
        undo.restore()
        raise
    return Proof(worst, allowed, by_blocks, compared, is_exact)


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
    with reference(), quiet(undo.model):
        expected = forward(undo.model, copy.deepcopy(batch))
    with quiet(undo.model):
        try:
            found = forward(undo.model, copy.deepcopy(batch))
        except Exception as error:
            problem = Difference(math.inf, f"it does not run: {type(error).__name__}: {error}".splitlines()[0])
            raise _failed([dimension for dimension, _ in undo.removed], problem, 0.0) from error
    return difference(found, expected, undo.looks)


def _parts(undo: Undo, batch: Any, forward: Forward) -> list[tuple[list[Dimension], Difference]]:
    """Compare each part of the model that lost units with its reference, on the inputs that it has in the model."""
    found: list[tuple[list[Dimension], Difference]] = []
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
            with quiet(call.module):
                return difference(call.again(), expected, undo.looks)
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
    finally:
        for hook in hooks:
            hook.remove()
    return results
