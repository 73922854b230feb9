"""Which weights a lottery ticket prunes: counts and masks of single layers, or of all layers together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from secateur._checks import one_of
from secateur._errors import PatternError, RecipeError, naming
from secateur._types import Mask
from secateur.patterns import (
    NM,
    SparsityPattern,
    Units,
    Unstructured,
    at_partial_sparsity,
    check_sparsity,
    keep_top,
    units_to_prune,
)
from secateur.training._masked_model import listed
from secateur.training._state import pattern_so_far
from secateur.training._weights import MaskedWeight

TicketScope: TypeAlias = Literal["global", "layer"]


@dataclass(frozen=True)
class Count:
    """A number of pruned weights or units that follows from the sparsity.

    Args:
        what: is counted.
        pruned: now.
        wanted: at the sparsity.
    """

    what: str
    pruned: int
    wanted: int


@dataclass(frozen=True)
class TicketMasks:
    """How the weights of a ticket are pruned under its pattern. Of the weights only the masks are read, and the values.

    Args:
        pattern: that was asked for; each weight has it as it fits its layer.
        weights: by the name of their layer.
        shapes: of the weights as ``[out, in]``.
    """

    pattern: SparsityPattern
    weights: Mapping[str, MaskedWeight]
    shapes: Mapping[str, torch.Size]

    @property
    def num_weights(self) -> int:
        """Weights of all layers."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that is pruned now."""
        return sum(weight.num_pruned for weight in self.weights.values()) / max(1, self.num_weights)

    def resolve(self, sparsity: float | None, scope: TicketScope) -> float:
        """Return the sparsity to prune to. Under N:M it may be less than that of the pattern.

        Raises:
            PatternError: an impossible sparsity, or a pattern that compares within rows under ``"global"``.
            RecipeError: an unknown scope, or less than is pruned already.
            TypeError: a sparsity that is not a number.
        """
        one_of("scope", scope, get_args(TicketScope))
        if scope == "global" and isinstance(self.pattern, Unstructured) and self.pattern.scope is not None:
            raise PatternError(
                f"{self.pattern} says itself what is compared with what, within a layer. Use scope='layer' with it."
            )
        if sparsity is not None:
            check_sparsity(sparsity)
        fixed = self.pattern.sparsity
        is_partial = sparsity is not None and fixed is not None and sparsity < fixed
        resolved = float(sparsity) if is_partial and sparsity is not None else self.pattern.resolve(sparsity)
        for count in self.counts(resolved, scope):
            if count.wanted < count.pruned:
                raise RecipeError(
                    f"sparsity {resolved:g} prunes {count.wanted} {count.what}, but {count.pruned} are pruned already "
                    "and a ticket brings none back.\nAsk for more, or call rewind() first: it removes the masks."
                )
        return resolved

    def counts(self, sparsity: float, scope: TicketScope) -> list[Count]:
        """Return what is pruned and what would be: units of all layers together, or the weights of each layer."""
        if self._all_together(scope):
            units = {name: self._units(name) for name in self.weights}
            pruned = sum(self.weights[name].num_pruned // of.size for name, of in units.items() if of.size)
            return [Count("units", pruned, units_to_prune(sum(_competing(of) for of in units.values()), sparsity))]
        counts = []
        for name, weight in self.weights.items():
            pattern, own = at_partial_sparsity(weight.pattern, sparsity)
            wanted = pattern.num_pruned(self.shapes[name], own)
            counts.append(Count(f"weights of {weight.layer.title}", weight.num_pruned, wanted))
        return counts

    def make(self, sparsity: float, scope: TicketScope) -> dict[str, Mask]:
        """Return a mask for each weight: the smallest magnitudes go, those that are pruned already first.

        Raises:
            RecipeError: weights that are not finite.
        """
        for weight in self.weights.values():
            if not (finite := weight.matrix().isfinite()).all():
                raise RecipeError(
                    f"{weight.layer.title}: {int((~finite).sum())} of its weights are NaN or infinite: the training "
                    "diverged.\nRewind, and train with a lower learning rate."
                )
        return self._global_masks(sparsity) if self._all_together(scope) else self._layer_masks(sparsity)

    def check(self, masks: Mapping[str, Mask]) -> None:
        """Raise unless these are masks of layers of this ticket, of the right shape and legal under its pattern.

        Raises:
            RecipeError: masks for unknown layers.
            PatternError: a mask of the wrong shape or one that its pattern forbids.
            TypeError: not a mapping of bool tensors.
        """
        if not isinstance(masks, Mapping):
            raise TypeError(f"masks must be a mapping from layer names to bool tensors, got {type(masks).__name__}")
        if unknown := [name for name in masks if name not in self.weights]:
            raise RecipeError(
                f"there are masks for {listed(unknown)}, but the ticket's layers are {listed(self.weights)}."
            )
        for name, mask in masks.items():
            weight = self.weights[name]
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                found = getattr(mask, "dtype", type(mask).__name__)
                raise TypeError(f"{weight.layer.title}: its mask must be a bool tensor, got {found}")
            if mask.shape != self.shapes[name]:
                raise PatternError(
                    f"{weight.layer.title}: its mask has shape {tuple(mask.shape)}, but the weight as [out, in] has "
                    f"{tuple(self.shapes[name])}."
                )
            with naming(weight.layer.title):
                pattern_so_far(weight.pattern, mask).check(mask)

    def _all_together(self, scope: TicketScope) -> bool:
        return scope == "global" and not isinstance(self.pattern, NM)

    def _units(self, name: str) -> Units:
        return self.weights[name].pattern.units(self.shapes[name])

    def _global_masks(self, sparsity: float) -> dict[str, Mask]:
        parts = {}
        for name, weight in self.weights.items():
            units = self._units(name)
            if not _competing(units):
                continue
            scores = units.scores(weight.magnitudes())[0]
            if units.size > 1:
                scores = (scores / units.size).sqrt()  # root mean square; of a unit of one weight, its magnitude
            if weight.mask is not None:
                kept = units.elements(units.crop(weight.mask))[0, :, 0]
                scores = scores.masked_fill(~kept, -1)  # below any other, so that they go first
            parts[name] = scores
        masks = {name: weight.hard_mask() for name, weight in self.weights.items()}
        if not parts:
            return masks
        device = next(iter(parts.values())).device
        scores = torch.cat([part.to(device) for part in parts.values()])
        keep = keep_top(scores[None], len(scores) - units_to_prune(len(scores), sparsity))
        for (name, part), kept in zip(parts.items(), keep.split([len(p) for p in parts.values()], dim=1), strict=True):
            masks[name] = self._units(name).mask(kept.to(part.device))
        return masks

    def _layer_masks(self, sparsity: float) -> dict[str, Mask]:
        masks = {}
        for name, weight in self.weights.items():
            pattern, own = at_partial_sparsity(weight.pattern, sparsity)
            masks[name] = pattern.mask(weight.magnitudes(), own)
        return masks


def _competing(units: Units) -> int:
    """How many units can be pruned; none where they have no weights."""
    return units.count if units.total * units.size else 0
