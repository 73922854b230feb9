"""Prune all layers of a model to their sparsity, stage by stage: one round, of one or several."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from secateur._errors import RecipeError, SolverError, naming
from secateur._types import Progress
from secateur.calibration import (
    GRADIENTS,
    Forward,
    LayerStatistics,
    Loss,
    Need,
    Padding,
    add_gradients,
    evenly,
    gather,
    padding_by_stage,
    quiet,
    replayed,
)
from secateur.layers import NEVER_REACHED, Layer, Observed
from secateur.patterns import SparsityPattern
from secateur.pruning._damping import solve_with_best
from secateur.pruning._figures import layer_report
from secateur.pruning._recipe import Recipe
from secateur.pruning._rounds import Done, after, as_before
from secateur.reports import SkippedLayer, few_tokens_note
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
        held_out: numbers of the batches that nothing is learned from.
        loss: for methods that need one.
        given: the batches for the loss: with what the model does not take, such as labels.
    """

    batches: list[Any]
    observed: Observed
    paddings: Sequence[Padding]
    forward: Forward
    held_out: tuple[int, ...] = ()
    loss: Loss | None = None
    given: Sequence[Any] | None = None

    @property
    def learned(self) -> tuple[int, ...]:
        """Numbers of the batches that are learned from."""
        return tuple(number for number in range(len(self.batches)) if number not in set(self.held_out))

    def with_gradients(
        self,
        gathered: dict[str, LayerStatistics],
        needs: frozenset[Need],
        model: nn.Module,
        layers: Sequence[Layer],
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> dict[str, LayerStatistics]:
        """Return statistics with those of gradients among the needs, if there are any, and the model as it is now."""
        wanted = needs & GRADIENTS
        if not wanted:
            return gathered
        assert self.loss is not None
        batches = [self.batches[number] for number in self.learned]
        given = None if self.given is None else [self.given[number] for number in self.learned]
        return add_gradients(gathered, wanted, model, batches, layers, self.loss, self.forward, on_batch, given)


def held_out_batches(share: float, total: int) -> tuple[int, ...]:
    """Return the numbers of the batches that nothing is learned from: spread evenly, and the same every time.

    Args:
        share: of the batches, in [0, 1).
        total: how many there are.

    Raises:
        RecipeError: there is one batch, which cannot be parted.
    """
    if not share:
        return ()
    if total < 2:
        raise RecipeError(
            f"held_out={share:g} holds out some of the batches, and there is {total}: at least two are needed, one to "
            "learn from and one to measure on.\nGive more batches, or cut this one into several."
        )
    return evenly(min(max(1, round(share * total)), total - 1), total)


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
    shares: Mapping[str, float],
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
        shares: sparsity of each layer after the round, by name.
        calibration: None for methods that need none.
        before: what rounds before this one did, by the name of the layer.
        progress: called with a description, the layers done and the number of layers.
    """
    total = float(len(layers))
    done: dict[str, Done] = {}
    skipped: list[SkippedLayer] = []

    def finish(
        layer: Layer, share: float, statistics: LayerStatistics | None, held_out: LayerStatistics | None = None
    ) -> None:
        with naming(layer.title):
            done[layer.name] = _prune_layer_(
                layer, patterns[layer.name], share, statistics, held_out, recipe, before.get(layer.name)
            )

    if calibration is None:
        for layer in layers:
            finish(layer, shares[layer.name], None)
            progress(layer.name, len(done), total)
        return Round(done)

    needs: frozenset[Need] = recipe.method.needs | (frozenset({"gram"}) if recipe.measure_error else frozenset())
    loaded, observed, run = calibration.batches, calibration.observed, calibration.forward
    learned, measured = calibration.learned, calibration.held_out
    paddings = [found.fresh() for found in calibration.paddings]
    with quiet(model):
        source = replayed(model, loaded, layers, run, recipe.sequential)
        runs = len(loaded) + (len(learned) if needs & GRADIENTS else 0)
        for index, stage in enumerate(source.stages):
            # Half of a stage's share of the work is calibrating it, half is solving its layers.
            start, size = len(done), len(stage.layers)

            def on_batch(count: int, name: str = stage.name, start: int = start, size: int = size) -> None:
                progress(f"calibrating {name}".strip(), start + size / 2 * count / runs, total)

            def on_held_out(count: int, on_batch: Callable[[int], None] = on_batch) -> None:
                on_batch(len(learned) + count)

            def on_gradient(count: int, on_batch: Callable[[int], None] = on_batch) -> None:
                on_batch(len(loaded) + count)

            gathered = gather(source, index, needs - GRADIENTS, on_batch, observed, recipe.strict, paddings, learned)
            held_out = (
                gather(source, index, {"gram"}, on_held_out, observed, False, paddings, measured, pooled=False)
                if measured
                else {}
            )
            gathered = calibration.with_gradients(gathered, needs, model, stage.layers, on_gradient)
            for layer in stage.layers:
                measure = held_out.pop(layer.name, None)
                if layer.name in gathered:
                    finish(layer, shares[layer.name], gathered.pop(layer.name), measure)
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
    held_out: LayerStatistics | None,
    recipe: Recipe,
    before: Done | None,
) -> Done:
    """Solve a layer, check the solution, write it to the model, and return its report and its mask."""
    began = time.perf_counter()
    weight = layer.matrix()
    measured = held_out is not None or (statistics is not None and statistics.gram is not None)
    # Of several rounds, the error is that of all: it is measured from the weight before the first one.
    first = weight.clone() if recipe.rounds > 1 and before is None and measured else None
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True).contiguous()
    problem = LayerProblem(weight, statistics, pattern, sparsity, None if before is None else before.pruned(layer))
    dense = first if before is None else before.dense
    goal = weight if before is None or dense is None else dense.to(weight)
    if recipe.damping is None:
        solution = recipe.method.solve(problem)
    else:
        solution = solve_with_best(recipe.method, problem, goal, held_out)
    verify(problem, solution)
    overflowing = int((~solution.weight.to(layer.parameter.dtype).isfinite()).sum())
    if overflowing:
        raise SolverError(f"{overflowing} new weights are beyond the range of {layer.parameter.dtype}.")
    solution = replace(solution, notes=(*solution.notes, *_notes(recipe, problem)))
    layer.write_(solution.weight)
    mask = packed_mask(layer, solution.mask)
    reported = replace(problem, weight=goal)
    report = layer_report(layer, reported, solution, time.perf_counter() - began, held_out)
    return Done(report if before is None else after(before.report, report), mask, dense)


def _notes(recipe: Recipe, problem: LayerProblem) -> tuple[str, ...]:
    """What a user should know of the statistics of a layer."""
    statistics, inputs = problem.statistics, problem.weight.shape[1]
    if statistics is None:
        return ()
    gradients = [found for found in (statistics.gradient, statistics.gradient_squares) if found is not None]
    notes = []
    if statistics.own_tokens is not None:
        pooled = f"calibrated on all inputs of its stack: only {statistics.own_tokens} reached it"
        notes.append(f"{pooled}, and its gradient is of those alone" if gradients else pooled)
    if "gram" in recipe.method.needs and statistics.tokens < inputs:
        notes.append(few_tokens_note(statistics.tokens, inputs))
    if gradients and not any(found.any() for found in gradients):
        notes.append("the gradient of the loss is zero for all of its weights, so that their place decides")
    return tuple(notes)
