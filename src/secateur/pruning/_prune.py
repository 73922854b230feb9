"""Prune a model after training, layer by layer, in one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import RecipeError, SolverError, SparsityError
from secateur._types import Weight
from secateur.calibration import (
    Calibration,
    Forward,
    LayerStatistics,
    Need,
    call_model,
    hash_batches,
    load_batches,
    quiet,
)
from secateur.layers import Layer, select_layers
from secateur.patterns import SparsityPattern
from secateur.pruning._recipe import Recipe
from secateur.reports import LayerReport, Report, SkippedLayer, histogram, thumbnail, versions
from secateur.solvers import Importance, LayerProblem, Solver, verify


def prune_(
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
    sequential: bool | None = None,
    measure_error: bool | None = None,
    forward: Forward | None = None,
    progress: Callable[[str, float, float], None] | None = None,
) -> Report:
    """Prune a model in place and report what was done.

    Linear and convolution layers are pruned one by one, block by block: each repeated block is calibrated on the
    outputs of the blocks before it as they are after pruning. Weights keep their dtype and device; statistics and
    solvers work in float32 or better. Nothing else about the model changes, and no hook or flag is left behind. All
    that can be checked is checked before the first weight changes; an error or interrupt after that leaves the layers
    done so far pruned.

    Args:
        model: any module. Layers are found by class; see :func:`register_layer` for your own.
        batches: calibration inputs, read once: tensors (``model(batch)``), tuples or lists (``model(*batch)``), dicts
            or ``BatchEncoding`` (``model(**batch)``). Tokens whose ``attention_mask`` is 0 do not count. A few thousand
            to a few hundred thousand tokens are usual. None for methods that need none (magnitude, random).
        recipe: all of the following settings as one value, in their place.
        pattern, sparsity, method, allocation, include, exclude, sequential, measure_error: see :class:`Recipe`.
        forward: ``forward(model, batch)`` runs the model, if its batches are none of the above.
        progress: called with a description, the layers done (fractional while calibrating) and the number of layers.

    Returns:
        The report: sparsity and error layer by layer, what was skipped and why, and how to repeat the run.

    Raises:
        RecipeError: settings that contradict each other, a glob that matches nothing, no layer to prune, or no batches
            for a method that needs them.
        PatternError: a pattern that does not fit a layer, which is named.
        StatisticsError: batches that are empty, not finite, or never reach a layer.
        SolverError: a layer that the method cannot solve.

    Example:
        >>> import torch, secateur
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> report = secateur.prune_(model, [torch.randn(32, 8)], pattern="2:4", method="wanda")
        >>> report.sparsity, int((model[0].weight == 0).sum())
        (0.5, 64)
    """
    began = time.perf_counter()
    settings = {
        "pattern": pattern,
        "sparsity": sparsity,
        "method": method,
        "allocation": allocation,
        "include": include,
        "exclude": exclude,
        "sequential": sequential,
        "measure_error": measure_error,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    if recipe is not None and given:
        raise RecipeError(f"pass either a recipe or settings, not both; got a recipe and {', '.join(given)}.")
    if isinstance(batches, Recipe) or not isinstance(recipe, Recipe | None):
        raise TypeError("recipe must be a Recipe: prune_(model, batches, Recipe(...)), or give pattern= and method=")
    recipe = recipe if recipe is not None else Recipe(**given)  # type: ignore[arg-type]
    needs: frozenset[Need] = recipe.method.needs
    if needs and batches is None:
        raise RecipeError(
            f"{recipe.method} needs calibration inputs ({', '.join(sorted(needs))}).\n"
            "Pass batches, or use method='magnitude', which needs none."
        )

    layers, skipped = select_layers(model, recipe.include, recipe.exclude)
    patterns = {layer.name: layer.fit(recipe.pattern) for layer in layers}
    total = float(len(layers))
    tell = progress or (lambda description, done, total: None)
    reports: list[LayerReport] = []
    digest = None

    def finish(layer: Layer, statistics: LayerStatistics | None) -> None:
        try:
            reports.append(_prune_layer_(layer, statistics, patterns[layer.name], recipe))
        except SparsityError as error:
            raise type(error)(f"{layer.title}: {error}") from None

    if batches is None:
        for layer in layers:
            finish(layer, None)
            tell(layer.name, len(reports), total)
    else:
        loaded = load_batches(batches, layers[0].parameter.device)
        digest = hash_batches(loaded)
        if recipe.measure_error:
            needs = needs | {"gram"}
        with quiet(model):
            calibration = Calibration(model, loaded, layers, forward or call_model, recipe.sequential)
            for index, stage in enumerate(calibration.stages):
                # Half of a stage's share of the work is calibrating it, half is solving its layers.
                done, size = len(reports), len(stage.layers)

                def on_batch(count: int, name: str = stage.name, done: int = done, size: int = size) -> None:
                    tell(f"calibrating {name}".strip(), done + size / 2 * count / len(loaded), total)

                gathered = calibration.gather(index, needs, on_batch)
                for layer in stage.layers:
                    finish(layer, gathered.pop(layer.name))
                    tell(layer.name, done + size / 2 + (len(reports) - done) / 2, total)

    return Report(
        layers=tuple(reports),
        skipped=tuple(SkippedLayer(entry.name, entry.kind, entry.reason) for entry in skipped),
        recipe=recipe.to_dict(),
        versions=versions(),
        seconds=time.perf_counter() - began,
        calibration_hash=digest,
    )


def _prune_layer_(
    layer: Layer, statistics: LayerStatistics | None, pattern: SparsityPattern, recipe: Recipe
) -> LayerReport:
    began = time.perf_counter()
    dense = layer.matrix()
    dense = dense.to(torch.promote_types(dense.dtype, torch.float32), copy=True).contiguous()
    problem = LayerProblem(dense, statistics, pattern, recipe.sparsity)
    solution = recipe.method.solve(problem)
    verify(problem, solution)
    overflowing = int((~solution.weight.to(layer.parameter.dtype).isfinite()).sum())
    if overflowing:
        raise SolverError(f"{overflowing} new weights are beyond the range of {layer.parameter.dtype}.")
    layer.write_(solution.weight)
    seconds = time.perf_counter() - began
    stored = layer.matrix()
    pruned = int((~solution.mask).count_nonzero())
    return LayerReport(
        name=layer.name,
        shape=(dense.shape[0], dense.shape[1]),
        pattern=str(solution.pattern or pattern),
        asked=pattern.resolve(recipe.sparsity),
        sparsity=pruned / max(1, dense.numel()),
        pruned=pruned,
        zeros=stored.numel() - int(stored.count_nonzero()),
        relative_error=_relative_error(dense, stored.to(dense), statistics),
        tokens=None if statistics is None else statistics.tokens,
        dead_inputs=_dead_inputs(statistics),
        seconds=seconds,
        tied_to=layer.tied_to,
        notes=solution.notes,
        histogram=histogram(solution.scores, solution.mask),
        thumbnail=thumbnail(solution.mask),
    )


def _relative_error(dense: Weight, stored: Weight, statistics: LayerStatistics | None) -> float | None:
    """``norm((W - V) X) / norm(W X)`` from the Gram matrix; None where it was not gathered or W X is zero."""
    if statistics is None or statistics.gram is None:
        return None
    gram = statistics.require("gram").to(dense)
    shape = (len(gram), -1, dense.shape[1])
    dense, change = dense.reshape(shape), (dense - stored).reshape(shape)
    output = float(((dense @ gram) * dense).sum(dtype=torch.float64))
    error = float(((change @ gram) * change).sum(dtype=torch.float64))
    return (max(error, 0.0) / output) ** 0.5 if output > 0 else None


def _dead_inputs(statistics: LayerStatistics | None) -> int | None:
    if statistics is None:
        return None
    energy: Tensor | None = statistics.input_norm
    if statistics.gram is not None:
        energy = statistics.require("gram").diagonal(dim1=1, dim2=2)
    return None if energy is None else int((energy == 0).sum())
