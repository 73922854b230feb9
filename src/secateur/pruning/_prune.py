"""Prune a model after training, layer by layer, in one call."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from secateur._checks import settings
from secateur._types import Progress
from secateur.calibration import Forward, Loss, PaddingSource
from secateur.layers import check_model, select_layers
from secateur.patterns import Remainder, SparsityPattern
from secateur.pruning._allot import share_out
from secateur.pruning._one_round import Round, prune_round_
from secateur.pruning._prepare import prepare
from secateur.pruning._reach import observe_all
from secateur.pruning._recipe import Recipe
from secateur.pruning._rounds import (
    Between,
    check_between,
    check_same_layers,
    gains,
    go_between_,
    in_round,
    patterns_at,
    sparsities,
)
from secateur.reports import Report, StoredMasks, versions
from secateur.solvers import Importance, Solver, with_rounding
from secateur.zeros import considered_of, weigh_skipped, weights_of


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
    rounds: int | None = None,
    rounding: str | None = None,
    held_out: float | None = None,
    damping: float | str | None = None,
    sparsity_bounds: tuple[float, float] | None = None,
    between: Between | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
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
        pattern, sparsity, method, allocation, include, exclude, sequential, measure_error, strict, remainder,
            held_out, damping, sparsity_bounds: see :class:`Recipe`.
        rounds: see :class:`Recipe`. The report is of the last one. With several rounds and an error to measure, a copy
            of the weights is kept meanwhile, so that the error is that of all rounds together.
        rounding: see :class:`Recipe`. The error in the report is that of pruning and rounding.
        between: ``between(model, round)`` is called after every round but the last, to train the model, for example;
            rounds are counted from 1. Pruned weights that it moves are set to zero again, with a warning and a note in
            the report.
        forward: ``forward(model, batch)`` runs the model, if its batches are none of the above.
        loss: ``loss(output, batch)`` returns a scalar tensor, for methods that learn from a loss (``"taylor"``,
            ``"fisher"``, ``"movement"``); others do not look at it. It gets what the model returned, and the batch as
            it was given, with its labels, on the model's device. Padding in it is the loss's own business.
        padding: which tokens are real, where the batch does not say so itself: a function that returns a bool tensor
            ``[batch, length]``, True = real, of a batch (on the model's device), or None if nothing is padded; or a
            dict of such functions, by glob of layer names. The report says for each stage what was left out.
        progress: called with a description, the layers done (fractional while calibrating) and the number of layers.

    Returns:
        The report: sparsity and error layer by layer, what was skipped and why, and how to repeat the run.

    Raises:
        RecipeError: settings that contradict each other, a glob that matches nothing, no layer to prune, no batches or
            no loss for a method that needs them, or a ``between`` that is never called or adds layers.
        PatternError: a pattern that does not fit a layer, which is named.
        StatisticsError: batches that are empty, not finite, or never reach a layer; a loss that is no finite scalar, or
            that does not depend on a layer.
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
        "rounds": rounds,
        "rounding": rounding,
        "held_out": held_out,
        "damping": damping,
        "sparsity_bounds": sparsity_bounds,
    }
    recipe = settings("recipe", recipe, Recipe, keywords)
    if between is not None:
        check_between(recipe)
    work = prepare(model, batches, recipe, forward, padding, loss)
    layers, skipped, patterns, calibration = work.layers, work.skipped, work.patterns, work.calibration
    unrounded = replace(recipe, method=with_rounding(recipe.method, None), rounding=None)
    tell = progress or (lambda description, done, total: None)
    sharing = share_out(model, recipe, layers, patterns, calibration, tell)
    known = {layer.name for layer in layers} | {entry.name for entry in skipped}
    last, reached, moved = Round({}), list[int](), dict[str, tuple[str, ...]]()
    targets = sparsities(recipe)
    for number, target in enumerate(targets, 1):
        current = patterns_at(sharing.fitted(patterns), target)
        if number == recipe.rounds or gains(layers, current, last.done, recipe.pattern.sparsity is not None):
            told = in_round(tell, number, recipe.rounds)
            now = recipe if number == recipe.rounds else unrounded
            shares = sharing.at(current, target, targets[-1])
            last = prune_round_(model, now, layers, current, shares, calibration, last.done, told)
        reached.append(sum(entry.report.pruned for entry in last.done.values()))
        if between is not None and number < recipe.rounds:
            for name, note in go_between_(model, between, number, last.done).items():
                moved[name] = (*moved.get(name, ()), note)
            if calibration is not None:
                calibration = replace(calibration, observed=observe_all(model, calibration.batches, recipe, forward))
            seen = None if calibration is None else calibration.observed
            layers, skipped = select_layers(model, recipe.include, recipe.exclude, seen)
            check_same_layers(layers, known, number)
            patterns = {layer.name: layer.fit(recipe.pattern) for layer in layers}

    notes = {name: (*sharing.notes.get(name, ()), *moved.get(name, ())) for name in last.done}
    reports = [replace(one.report, notes=(*one.report.notes, *notes[name])) for name, one in last.done.items()]
    weights = sum(report.num_weights for report in reports)
    skipped = [entry for entry in (*skipped, *last.skipped) if entry.name not in last.done]
    return Report(
        layers=tuple(reports),
        skipped=weigh_skipped(model, skipped, considered_of(reports)),
        recipe=recipe.to_dict(),
        versions=versions(),
        seconds=time.perf_counter() - began,
        calibration_hash=work.digest,
        whole=weights_of(model),
        calibration_mode=last.mode,
        stored_masks=StoredMasks(entry.mask for entry in last.done.values()),
        calibration={"ignored": work.ignored} if work.ignored else {},
        padding=last.padding,
        rounds=tuple(pruned / max(1, weights) for pruned in reached) if recipe.rounds > 1 else (),
    )
