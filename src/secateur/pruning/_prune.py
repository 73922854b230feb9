"""Prune a model after training, layer by layer, in one call."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from secateur._checks import settings
from secateur._errors import RecipeError, SolverError, naming
from secateur._types import Progress
from secateur.calibration import (
    Forward,
    LayerStatistics,
    Need,
    Padding,
    PaddingSource,
    call_model,
    check_padding,
    gather,
    hash_batches,
    padding_by_stage,
    parameter_names,
    quiet,
    replayed,
)
from secateur.layers import NEVER_REACHED, Layer, check_model, select_layers
from secateur.patterns import Remainder, SparsityPattern
from secateur.pruning._allocation import ALLOCATIONS, Candidate, allocate
from secateur.pruning._figures import layer_report
from secateur.pruning._reach import read_inputs, tell_unreached
from secateur.pruning._recipe import Recipe
from secateur.reports import LayerReport, PackedMask, Report, SkippedLayer, StoredMasks, versions
from secateur.solvers import Importance, LayerProblem, Solver, verify
from secateur.zeros import considered_of, packed_mask, weigh_skipped, weights_of


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
    strict: bool | None = None,
    remainder: Remainder | None = None,
    forward: Forward | None = None,
    padding: PaddingSource | None = None,
    progress: Progress | None = None,
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
            or ``BatchEncoding`` (``model(**batch)``); numpy arrays count as tensors. A label beside the inputs, as a
            ``DataLoader`` gives it, is left out where the model takes one input. A ``SentenceTransformer`` also takes
            texts. Padding does not count where a mask in the batch says what it is: ``attention_mask``,
            ``decoder_attention_mask`` or others, ``labels != -100`` for a decoder. A few thousand
            to a few hundred thousand tokens are usual. None for methods that need none (magnitude, random).
        recipe: all of the following settings as one value, in their place.
        pattern, sparsity, method, allocation, include, exclude, sequential, measure_error, strict, remainder: see
            :class:`Recipe`.
        forward: ``forward(model, batch)`` runs the model, if its batches are none of the above.
        padding: which tokens are real, where the batch does not say so itself: a function that returns a bool tensor
            ``[batch, length]``, True = real, of a batch (on the model's device), or None if nothing is padded; or a
            dict of such functions, by glob of layer names. The report says for each stage what was left out.
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
    check_model(model)
    if isinstance(batches, Recipe):
        raise TypeError("batches must be calibration inputs, got a Recipe; pass recipe=Recipe(...)")
    keywords = {
        "pattern": pattern,
        "sparsity": sparsity,
        "method": method,
        "allocation": allocation,
        "include": include,
        "exclude": exclude,
        "sequential": sequential,
        "measure_error": measure_error,
        "strict": strict,
        "remainder": remainder,
    }
    recipe = settings("recipe", recipe, Recipe, keywords)
    needs: frozenset[Need] = recipe.method.needs
    if needs and batches is None:
        raise RecipeError(
            f"{recipe.method} needs calibration inputs ({', '.join(sorted(needs))}).\n"
            "Pass batches, or use method='magnitude', which needs none."
        )
    dense_needs = ALLOCATIONS[recipe.allocation].needs
    if dense_needs and batches is None:
        raise RecipeError(
            f"the allocation {recipe.allocation!r} needs calibration inputs ({', '.join(sorted(dense_needs))}).\n"
            "Pass batches, or use allocation='uniform', which needs none."
        )

    inputs = None if batches is None else read_inputs(model, batches, recipe, forward)
    observed = None if inputs is None else inputs.observed
    layers, skipped = select_layers(model, recipe.include, recipe.exclude, observed)
    tell_unreached(layers, skipped, recipe.strict)
    check_padding(padding, [layer.name for layer in layers])
    patterns = {layer.name: layer.fit(recipe.pattern) for layer in layers}
    total = float(len(layers))
    tell = progress or (lambda description, done, total: None)
    reports: list[LayerReport] = []
    masks: list[PackedMask] = []
    digest, mode = None, ""
    padded: dict[str, str] = {}

    def finish(layer: Layer, sparsity: float, statistics: LayerStatistics | None) -> None:
        with naming(layer.title):
            report, mask = _prune_layer_(layer, patterns[layer.name], sparsity, statistics, recipe.method)
        reports.append(report)
        masks.append(mask)

    def candidates(statistics: Mapping[str, LayerStatistics]) -> list[Candidate]:
        return [Candidate(layer, patterns[layer.name], statistics.get(layer.name)) for layer in layers]

    if inputs is None:
        shares = allocate(candidates({}), recipe.allocation, recipe.sparsity)
        for layer in layers:
            finish(layer, shares[layer.name], None)
            tell(layer.name, len(reports), total)
    else:
        run, loaded = forward or call_model, inputs.batches
        digest = hash_batches(loaded)
        if recipe.measure_error:
            needs = needs | {"gram"}
        names = parameter_names(model) if forward is None else ()
        paddings = [Padding.of(batch, names, padding) for batch in loaded]
        with quiet(model):
            whole = replayed(model, loaded, layers, run, sequential=False)
            dense = {}
            if dense_needs:
                fresh = [found.fresh() for found in paddings]
                dense = gather(whole, 0, dense_needs, observed=observed, strict=recipe.strict, paddings=fresh)
            shares = allocate(candidates(dense), recipe.allocation, recipe.sparsity)
            del dense  # statistics of all layers at once, which the stages do not need
            source = replayed(model, loaded, layers, run, recipe.sequential)
            for index, stage in enumerate(source.stages):
                # Half of a stage's share of the work is calibrating it, half is solving its layers.
                done, size = len(reports), len(stage.layers)

                def on_batch(count: int, name: str = stage.name, done: int = done, size: int = size) -> None:
                    tell(f"calibrating {name}".strip(), done + size / 2 * count / len(loaded), total)

                gathered = gather(source, index, needs, on_batch, observed, recipe.strict, paddings)
                for layer in stage.layers:
                    if layer.name not in gathered:  # such as an expert, after the layers before it were pruned
                        skipped.append(SkippedLayer(layer.name, type(layer.modules[0]).__name__, NEVER_REACHED))
                        continue
                    finish(layer, shares[layer.name], gathered.pop(layer.name))
                    tell(layer.name, done + size / 2 + (len(reports) - done) / 2, total)
        mode = source.mode
        members = [(stage.name, [layer.name for layer in stage.layers]) for stage in source.stages]
        padded = padding_by_stage(members, paddings)

    return Report(
        layers=tuple(reports),
        skipped=weigh_skipped(model, skipped, considered_of(reports)),
        recipe=recipe.to_dict(),
        versions=versions(),
        seconds=time.perf_counter() - began,
        calibration_hash=digest,
        whole=weights_of(model),
        calibration_mode=mode,
        stored_masks=StoredMasks(masks),
        calibration={"ignored": inputs.ignored} if inputs is not None and inputs.ignored else {},
        padding=padded,
    )


def _prune_layer_(
    layer: Layer, pattern: SparsityPattern, sparsity: float, statistics: LayerStatistics | None, method: Solver
) -> tuple[LayerReport, PackedMask]:
    """Solve a layer, check the solution, write it to the model, and return its report and its mask."""
    began = time.perf_counter()
    dense = layer.matrix()
    dense = dense.to(torch.promote_types(dense.dtype, torch.float32), copy=True).contiguous()
    problem = LayerProblem(dense, statistics, pattern, sparsity)
    solution = method.solve(problem)
    verify(problem, solution)
    overflowing = int((~solution.weight.to(layer.parameter.dtype).isfinite()).sum())
    if overflowing:
        raise SolverError(f"{overflowing} new weights are beyond the range of {layer.parameter.dtype}.")
    if statistics is not None and statistics.own_tokens is not None:
        note = f"calibrated on all inputs of its stack: only {statistics.own_tokens} reached it"
        solution = replace(solution, notes=(*solution.notes, note))
    layer.write_(solution.weight)
    mask = packed_mask(layer, solution.mask)
    return layer_report(layer, problem, solution, seconds=time.perf_counter() - began), mask
