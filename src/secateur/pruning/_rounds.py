"""Prune in several rounds: how sparse each is, what stays pruned, and what may happen to the model in between."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor, nn

from secateur._errors import RecipeError, naming
from secateur._types import Progress, Weight
from secateur.layers import Layer
from secateur.patterns import SparsityPattern, at_partial_sparsity
from secateur.pruning._recipe import Recipe
from secateur.reports import LayerReport, PackedMask, StoredMasks
from secateur.schedules import Cubic
from secateur.zeros import apply_masks_

Between: TypeAlias = Callable[[nn.Module, int], object]


@dataclass(frozen=True)
class Done:
    """What a round did to one layer.

    Args:
        report: of the layer.
        mask: of its weight.
        dense: the weight ``[out, in]`` before the first round; None where nobody needs it.
    """

    report: LayerReport
    mask: PackedMask
    dense: Weight | None = None

    def pruned(self, layer: Layer) -> Tensor:
        """Return which weights are pruned, bool ``[out, in]``, True = pruned, on the layer's device."""
        return ~layer.to_matrix(self.mask.mask()).to(layer.parameter.device)


def sparsities(recipe: Recipe) -> tuple[float, ...]:
    """Return the sparsity after each round: of all layers, or of those that get a pattern that fixes its own."""
    fixed = recipe.pattern.sparsity
    schedule = Cubic(recipe.goal if fixed is None else fixed, begin=0, end=recipe.rounds)
    return tuple(schedule(number) for number in range(1, recipe.rounds + 1))


def check_between(recipe: Recipe) -> None:
    """Check that there is something between two rounds.

    Raises:
        RecipeError: there is only one round.
    """
    if recipe.rounds == 1:
        raise RecipeError(
            "between is called between two rounds, and there is only one, so it would never be called.\n"
            "Pass rounds=4, for example, or leave between out."
        )


def patterns_at(patterns: Mapping[str, SparsityPattern], sparsity: float) -> dict[str, SparsityPattern]:
    """Return the pattern of each layer in a round that ends at a sparsity: N:M keeps more than n until the last."""
    return {name: at_partial_sparsity(pattern, sparsity)[0] for name, pattern in patterns.items()}


def gains(
    layers: Sequence[Layer],
    patterns: Mapping[str, SparsityPattern],
    done: Mapping[str, Done],
    fixed: bool,
) -> bool:
    """Return whether a round prunes anything. Under N:M there are fewer steps than there may be rounds.

    Args:
        layers: to prune.
        patterns: of each in the round.
        done: in the rounds before.
        fixed: whether the pattern fixes its own sparsity. Then a layer without it stays dense.
    """

    def more(layer: Layer) -> bool:
        pattern, before = patterns[layer.name], done.get(layer.name)
        if pattern.sparsity is None:
            return not fixed
        return pattern.num_pruned(layer.matrix().shape) > (before.report.pruned if before else 0)

    return any(map(more, layers))


def in_round(progress: Progress, number: int, rounds: int) -> Progress:
    """Return what tells the progress of one round as a part of that of all."""
    if rounds == 1:
        return progress

    def tell(description: str, done: float, total: float) -> None:
        progress(f"round {number} of {rounds}: {description}", (number - 1) * total + done, rounds * total)

    return tell


def go_between_(model: nn.Module, between: Between, number: int, done: Mapping[str, Done]) -> dict[str, str]:
    """Call what the caller does between two rounds, and put back the zeros that it moved.

    Args:
        model: after the round.
        between: called with the model and the number of the round.
        number: of the round.
        done: what has been done to each layer so far.

    Returns:
        By the name of a layer, a note for the report: how many of its pruned weights had moved.

    Raises:
        SparsityError: a weight is gone, or has another shape.
    """
    between(model, number)
    with naming(f"after between(model, {number})"):
        moved = apply_masks_(model, StoredMasks(entry.mask for entry in done.values()))
    notes = {
        name: f"{moved[parameter]:,} pruned weights moved between rounds {number} and {number + 1}, and are zero again"
        for name, entry in done.items()
        if moved.get(parameter := entry.report.parameters[0])
    }
    if notes:
        warnings.warn(
            f"{sum(moved.values()):,} pruned weights in {len(notes)} layers were not zero any more after "
            f"between(model, {number}). They are zero again, but what was learned may rest on them.\n"
            "Train with something that holds zeros: secateur.recover_, or SparseTraining with method='static'.",
            stacklevel=3,
        )
    return notes


def check_same_layers(layers: Sequence[Layer], known: Collection[str], number: int) -> None:
    """Check that a model has no other layers than before, after something happened to it.

    Raises:
        RecipeError: it has.
    """
    if others := [layer.name for layer in layers if layer.name not in known]:
        raise RecipeError(
            f"after between(model, {number}) the model has {len(others)} layers that it did not have before, such as "
            f"{others[0]!r}, so pruning cannot go on.\nMerge adapters, leave no other layers behind, or exclude them."
        )


def after(before: LayerReport, now: LayerReport) -> LayerReport:
    """Return the report of a round with the time of the rounds before it, and what they wanted known."""
    earlier = (note if note.startswith(_EARLIER) else f"{_EARLIER}{note}" for note in before.notes)
    new = tuple(note for note in dict.fromkeys(earlier) if note.removeprefix(_EARLIER) not in now.notes)
    return replace(now, seconds=before.seconds + now.seconds, notes=(*now.notes, *new))


def as_before(entry: Done) -> Done:
    """Return what was done to a layer that a later round could not calibrate: its own report says so."""
    note = "no input reached it in a later round, so that it was not pruned further"
    notes = dict.fromkeys((*entry.report.notes, note))
    return replace(entry, report=replace(entry.report, notes=tuple(notes)))


_EARLIER = "in an earlier round: "
