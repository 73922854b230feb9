"""Measure what an allocation needs to know, block by block, and share out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from secateur._errors import naming
from secateur._types import Progress
from secateur.calibration import GRADIENTS, gather, quiet, replayed
from secateur.layers import Layer
from secateur.patterns import SparsityPattern, Unstructured, with_scope
from secateur.pruning._allocation import (
    ALLOCATIONS,
    Allotted,
    Candidate,
    Target,
    allocate,
    bounds_of,
    is_settled,
    needs_of,
)
from secateur.pruning._effect import OutputEffect
from secateur.pruning._one_round import Calibration
from secateur.pruning._recipe import Recipe
from secateur.solvers import scope_of


@dataclass(frozen=True)
class Sharing:
    """What each layer gets, and from what that follows.

    Args:
        candidates: the layers, with what was measured of them.
        allotted: their shares.
    """

    candidates: tuple[Candidate, ...]
    allotted: Allotted

    @property
    def notes(self) -> dict[str, tuple[str, ...]]:
        """By its name, for a layer that stays dense although others are pruned."""
        stay = [name for name, count in self.allotted.pruned.items() if not count] if self.allotted.notes else []
        return dict.fromkeys(stay, tuple(f"stays dense: {note}" for note in self.allotted.notes))

    def fitted(self, patterns: Mapping[str, SparsityPattern]) -> dict[str, SparsityPattern]:
        """Return the pattern of each layer: none for one that stays dense where N:M fixes what the others lose."""
        return {
            name: Unstructured() if pattern.sparsity and not self.allotted.shares[name] else pattern
            for name, pattern in patterns.items()
        }

    def at(self, patterns: Mapping[str, SparsityPattern], sparsity: float, last: float) -> dict[str, float]:
        """Return the share of each layer in a round: the same part of its last one as the whole's of its last one.

        Args:
            patterns: of each layer in the round.
            sparsity: of the whole after the round.
            last: the same after the last round.
        """
        return {
            name: pattern.resolve(None) if pattern.sparsity is not None else _part(share, sparsity, last)
            for name, pattern in patterns.items()
            for share in (self.allotted.shares[name],)
        }


def _part(share: float, sparsity: float, last: float) -> float:
    if sparsity == last:
        return share
    return sparsity if share == last else share * sparsity / last


def share_out(
    model: nn.Module,
    recipe: Recipe,
    layers: Sequence[Layer],
    patterns: Mapping[str, SparsityPattern],
    calibration: Calibration | None,
    progress: Progress,
) -> Sharing:
    """Return the share of each layer. The model is as before.

    Statistics are gathered block by block, and only what the allocation makes of them is kept.

    Args:
        model: dense.
        recipe: which allocation, and what the whole is to lose.
        layers: to prune.
        patterns: of each, by name.
        calibration: None for an allocation that needs none.
        progress: called with a description, the layers done and the number of layers.
    """
    bounds = bounds_of(recipe.allocation, recipe.goal, recipe.sparsity_bounds)
    target = Target(recipe.goal, bounds, recipe.method)
    scope = scope_of(recipe.method)
    candidates = [Candidate(layer, with_scope(patterns[layer.name], scope)) for layer in layers]
    allocation = ALLOCATIONS[recipe.allocation]
    if allocation.measure is None or is_settled(recipe.allocation, target):
        return Sharing(tuple(candidates), allocate(candidates, recipe.allocation, target))
    measured: list[Candidate] = []

    def measure(part: Sequence[Candidate]) -> None:
        assert allocation.measure is not None
        found = allocation.measure(part, target)
        measured.extend(replace(one, statistics=None, measured=value) for one, value in zip(part, found, strict=True))

    needs = needs_of(recipe.allocation, recipe.method)
    if calibration is None or not (needs or allocation.needs_output):
        measure(candidates)
    else:
        by_name = {candidate.layer.name: candidate for candidate in candidates}
        paddings = [found.fresh() for found in calibration.paddings]
        with quiet(model):
            if allocation.needs_output:
                learned = calibration.learned
                batches, padded = ([part[n] for n in learned] for part in (calibration.batches, calibration.paddings))
                effect = OutputEffect(model, batches, padded, calibration.forward)
                target = replace(target, effect=effect)
            source = replayed(model, calibration.batches, layers, calibration.forward)
            for index, stage in enumerate(source.stages):
                progress(f"sharing out: {stage.name}".rstrip(": "), len(measured), len(layers))
                statistics = gather(
                    source,
                    index,
                    needs - GRADIENTS,
                    observed=calibration.observed,
                    strict=False,
                    paddings=paddings,
                    numbers=calibration.learned,
                )
                statistics = calibration.with_gradients(statistics, needs, model, stage.layers)
                part = [replace(by_name[layer.name], statistics=statistics.get(layer.name)) for layer in stage.layers]
                with naming(f"allocation {recipe.allocation!r}"):
                    measure(part)
        # In the order of the layers, whatever that of the blocks is.
        found = {candidate.layer.name: candidate for candidate in measured}
        measured = [found[layer.name] for layer in layers]
    return Sharing(tuple(measured), allocate(measured, recipe.allocation, target))
