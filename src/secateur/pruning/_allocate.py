"""Say how zeros would be shared out, before a weight changes."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from torch import nn

from secateur._checks import settings
from secateur._types import Progress
from secateur.calibration import Forward, Loss, PaddingSource
from secateur.layers import check_model
from secateur.patterns import Remainder, SparsityPattern
from secateur.pruning._allot import share_out
from secateur.pruning._prepare import prepare
from secateur.pruning._recipe import Recipe
from secateur.pruning._sensitivity import Sensitivity
from secateur.reports import AllocatedLayer, AllocationReport
from secateur.solvers import Importance, Solver


def allocate(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    recipe: Recipe | None = None,
    *,
    pattern: SparsityPattern | str | None = None,
    sparsity: float | None = None,
    method: Solver | Importance | str | None = None,
    allocation: str | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    strict: bool | None = None,
    remainder: Remainder | None = None,
    sparsity_bounds: tuple[float, float] | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    padding: PaddingSource | None = None,
    progress: Progress | None = None,
) -> AllocationReport:
    r"""Return how zeros would be shared out among the layers. The model is not changed.

    :func:`prune_` with the same arguments prunes each layer to the share that is reported here. The total is always
    that of ``"uniform"``, to the weight: shares are rounded to whole units of the pattern that add up exactly.

    ================= ==========================================================================================
    ``"uniform"``     the same sparsity everywhere
    ``"erk"``         denser where a layer has few weights for its width; no data
    ``"lamp"``        one threshold on squared magnitudes, each over the sum of those that are not smaller; no data
    ``"alpha"``       denser where the spectrum of the weights has a heavy tail, by block; no data
    ``"owl"``         denser where many ``abs(w) * norm(x)`` are above five times their mean, by block
    ``"global"``      one threshold on the method's squared scores, each over their sum in the layer: the sum over
                      layers of relative squared errors is least, if inputs are uncorrelated
    ``"sensitivity"`` measured: the error of each layer at six sparsities, times what a unit of this error does to
                      the output of the model; the shares with the least sum, by dynamic programming
    ================= ==========================================================================================

    ``"sensitivity"`` solves each layer six times, and runs the model twice for each layer, in which only this one is
    pruned (once for all experts of a stack). It keeps the outputs of two batches and a few numbers for each layer; the
    statistics of one block are in memory at a time.

    A pattern that fixes its own sparsity (N:M) takes a lower ``sparsity`` here: some layers get the pattern, and the
    others stay dense. Their total is as near to the budget as whole layers allow, and the report has the difference.

    Args:
        model, batches, recipe: see :func:`prune_`.
        pattern, sparsity, method, allocation, include, exclude, strict, remainder, sparsity_bounds: see
            :class:`Recipe`.
        forward, loss, padding: see :func:`prune_`.
        progress: called with a description, the layers done and the number of layers.

    Returns:
        The shares, with a table and a picture.

    Raises:
        SparsityError: what :func:`prune_` raises before it changes weights.

    Example:
        >>> import torch, secateur
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> secateur.allocate(model, sparsity=0.5, method="magnitude", allocation="erk").shares
        {'0': 0.0, '2': 0.5625}
    """
    began = time.perf_counter()
    check_model(model)
    keywords = {
        "pattern": pattern,
        "sparsity": sparsity,
        "method": method,
        "allocation": allocation,
        "include": include,
        "exclude": exclude,
        "strict": strict,
        "remainder": remainder,
        "sparsity_bounds": sparsity_bounds,
    }
    recipe = settings("recipe", recipe, Recipe, keywords)
    work = prepare(model, batches, recipe, forward, padding, loss)
    tell = progress or (lambda description, done, total: None)
    sharing = share_out(model, recipe, work.layers, work.patterns, work.calibration, tell)
    allotted, patterns = sharing.allotted, sharing.fitted(work.patterns)
    rows = []
    for candidate in sharing.candidates:
        name, share = candidate.layer.name, allotted.shares[candidate.layer.name]
        known = candidate.measured if isinstance(candidate.measured, Sensitivity) else None
        rows.append(
            AllocatedLayer(
                name=name,
                shape=candidate.shape,
                pattern=str(candidate.pattern) if patterns[name] == work.patterns[name] else "dense",
                sparsity=share,
                weights=candidate.weights,
                pruned=allotted.pruned[name],
                error=None if known is None else known.relative_error(share),
                effect=None if known is None else known.loss(share),
                tied_to=candidate.layer.tied_to,
            )
        )
    return AllocationReport(
        layers=tuple(rows),
        recipe=recipe.to_dict(),
        sparsity=recipe.goal,
        budget=allotted.budget,
        seconds=time.perf_counter() - began,
        calibration_hash=work.digest,
        notes=allotted.notes,
    )
