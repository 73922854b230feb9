"""Prune all layers of a model to their sparsity, stage by stage: one round, of one or several."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from secateur._errors import SolverError, naming
from secateur._types import Progress
from secateur.calibration import (
    GRADIENTS,
    Forward,
    LayerStatistics,
    Loss,
    Need,
    Padding,
    add_gradients,
    gather,
    padding_by_stage,
    quiet,
    replayed,
)
from secateur.layers import NEVER_REACHED, Layer, Observed
from secateur.patterns import SparsityPattern
from secateur.pruning._allocation import ALLOCATIONS, Candidate, allocate
from secateur.pruning._figures import layer_report
from secateur.pruning._recipe import Recipe
from secateur.pruning._rounds import Done, after, as_before
from secateur.reports import SkippedLayer
from secateur.solvers import LayerProblem, verify
from secateur.zeros import packed_mask


@dataclass(frozen=True)
class Calibration:
    """What a round learns from.

    Args:
        batches: as the model takes them.
        observed: which layers they reach, and how weights are read.
        paddings: of each batch.
        forward: how to call the model on a batch.
        loss: for methods that need one.
        given: the batches for the loss: with what the model does not take, such as labels.
    """

    batches: list[Any]
    observed: Observed
    paddings: Sequence[Padding]
    forward: Forward
    loss: Loss | None = None
    given: Sequence[Any] | None = None

    def with_gradients(
        self,
        gathered: dict[str, LayerStatistics],
        needs: frozenset[Need],
        model: nn.Module,
        layers: Sequence[Layer],
        on_batch: Callable[[int], None] = lambda done: None,
        done: int = 0,
    ) -> dict[str, LayerStatistics]:
        """Return statistics with those of gradients among the needs, if there are any, and the model as it is now."""
        if not needs & GRADIENTS:
            return gathered
        assert self.loss is not None

        def tell(count: int) -> None:
            on_batch(done + count)

        wanted = needs & GRADIENTS
        return add_gradients(gathered, wanted, model, self.batches, layers, self.loss, self.forward, tell, self.given)


@dataclass(frozen=True)
class Round:
    """What a round did.

    Args:
        done: to each layer, by name, in the order in which they were pruned.
        skipped: layers that no input reached once those before them were pruned.
        mode: how stages got their inputs; empty without calibration.
        padding: by the name of a stage, what was left out.
    """

    done: dict[str, Done]
    skipped: tuple[SkippedLayer, ...] = ()
    mode: str = ""
    padding: Mapping[str, str] = field(default_factory=dict)


def prune_round_(
    model: nn.Module,
    recipe: Recipe,
    layers: Sequence[Layer],
    patterns: Mapping[str, SparsityPattern],
    sparsity: float | None,
    calibration: Calibration | None,
    before: Mapping[str, Done],
    progress: Progress,
) -> Round:
    """Prune all layers once.

    Args:
        model: changed in place.
        recipe: for all but its pattern and sparsity.
        layers: to prune.
        patterns: of each layer, by name.
        sparsity: of the whole; None for a pattern that fixes its own.
        calibration: None for methods that need none.
        before: what rounds before this one did, by the name of the layer.
        progress: called with a description, the layers done and the number of layers.
    """
    total = float(len(layers))
    done: dict[str, Done] = {}
    skipped: list[SkippedLayer] = []

    def finish(layer: Layer, share: float, statistics: LayerStatistics | None) -> None:
        with naming(layer.title):
            done[layer.name] = _prune_layer_(
                layer, patterns[layer.name], share, statistics, recipe, before.get(layer.name)
            )

    def candidates(statistics: Mapping[str, LayerStatistics]) -> list[Candidate]:
        return [Candidate(layer, patterns[layer.name], statistics.get(layer.name)) for layer in layers]

    if calibration is None:
        shares = allocate(candidates({}), recipe.allocation, sparsity)
        for layer in layers:
            finish(layer, shares[layer.name], None)
            progress(layer.name, len(done), total)
        return Round(done)

    needs: frozenset[Need] = recipe.method.needs | (frozenset({"gram"}) if recipe.measure_error else frozenset())
    dense_needs = ALLOCATIONS[recipe.allocation].needs
    loaded, observed, run = calibration.batches, calibration.observed, calibration.forward
    paddings = [found.fresh() for found in calibration.paddings]
    with quiet(model):
        whole = replayed(model, loaded, layers, run, sequential=False)
        dense = {}
        if dense_needs:
            fresh = [found.fresh() for found in paddings]
            inputs = dense_needs - GRADIENTS
            dense = gather(whole, 0, inputs, observed=observed, strict=recipe.strict, paddings=fresh)
            dense = calibration.with_gradients(dense, dense_needs, model, layers)
        shares = allocate(candidates(dense), recipe.allocation, sparsity)
        del dense  # statistics of all layers at once, which the stages do not need
        source = replayed(model, loaded, layers, run, recipe.sequential)
        runs = len(loaded) * (2 if needs & GRADIENTS else 1)
        for index, stage in enumerate(source.stages):
            # Half of a stage's share of the work is calibrating it, half is solving its layers.
            start, size = len(done), len(stage.layers)

            def on_batch(count: int, name: str = stage.name, start: int = start, size: int = size) -> None:
                progress(f"calibrating {name}".strip(), start + size / 2 * count / runs, total)

            gathered = gather(source, index, needs - GRADIENTS, on_batch, observed, recipe.strict, paddings)
            gathered = calibration.with_gradients(gathered, needs, model, stage.layers, on_batch, len(loaded))
            for layer in stage.layers:
                if layer.name in gathered:
                    finish(layer, shares[layer.name], gathered.pop(layer.name))
                elif layer.name in before:
                    done[layer.name] = as_before(before[layer.name])
                else:  # such as an expert, after the layers before it were pruned
                    skipped.append(SkippedLayer(layer.name, type(layer.modules[0]).__name__, NEVER_REACHED))
                    continue
                progress(layer.name, start + size / 2 + (len(done) - start) / 2, total)
    # What no input reaches any more keeps its zeros.
    done |= {name: as_before(entry) for name, entry in before.items() if name not in done}
    members = [(stage.name, [layer.name for layer in stage.layers]) for stage in source.stages]
    return Round(done, tuple(skipped), source.mode, padding_by_stage(members, paddings))


def _prune_layer_(
    layer: Layer,
    pattern: SparsityPattern,
    sparsity: float,
    statistics: LayerStatistics | None,
    recipe: Recipe,
    before: Done | None,
) -> Done:
    """Solve a layer, check the solution, write it to the model, and return its report and its mask."""
    began = time.perf_counter()
    weight = layer.matrix()
    measured = statistics is not None and statistics.gram is not None
    # Of several rounds, the error is that of all: it is measured from the weight before the first one.
    first = weight.clone() if recipe.rounds > 1 and before is None and measured else None
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True).contiguous()
    problem = LayerProblem(weight, statistics, pattern, sparsity, None if before is None else before.pruned(layer))
    solution = recipe.method.solve(problem)
    verify(problem, solution)
    overflowing = int((~solution.weight.to(layer.parameter.dtype).isfinite()).sum())
    if overflowing:
        raise SolverError(f"{overflowing} new weights are beyond the range of {layer.parameter.dtype}.")
    solution = replace(solution, notes=(*solution.notes, *_notes(statistics)))
    layer.write_(solution.weight)
    mask = packed_mask(layer, solution.mask)
    dense = first if before is None else before.dense
    reported = problem if before is None or dense is None else replace(problem, weight=dense.to(weight))
    report = layer_report(layer, reported, solution, seconds=time.perf_counter() - began)
    return Done(report if before is None else after(before.report, report), mask, dense)


def _notes(statistics: LayerStatistics | None) -> list[str]:
    """What a user should know of the statistics of a layer."""
    if statistics is None:
        return []
    gradients = [found for found in (statistics.gradient, statistics.gradient_squares) if found is not None]
    notes = []
    if statistics.own_tokens is not None:
        pooled = f"calibrated on all inputs of its stack: only {statistics.own_tokens} reached it"
        notes.append(f"{pooled}, and its gradient is of those alone" if gradients else pooled)
    if gradients and not any(found.any() for found in gradients):
        notes.append("the gradient of the loss is zero for all of its weights, so that their place decides")
    return notes
