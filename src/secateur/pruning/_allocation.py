"""Share out the zeros of a model among its layers: one sparsity for each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from secateur._errors import RecipeError
from secateur.calibration import LayerStatistics, Need
from secateur.layers import Layer
from secateur.patterns import SparsityPattern


@dataclass(frozen=True)
class Candidate:
    """A layer that gets a share.

    Args:
        layer: to prune.
        pattern: the recipe's, as it applies to this layer.
        statistics: of the layer in the dense model, with what the allocation needs; None if it needs nothing.
    """

    layer: Layer
    pattern: SparsityPattern
    statistics: LayerStatistics | None = None

    def num_pruned(self, sparsity: float | None) -> int:
        """Return how many weights of the layer are pruned at a sparsity."""
        return self.pattern.num_pruned(self.layer.matrix().shape, sparsity)


@dataclass(frozen=True)
class Allocation:
    """How the zeros are shared out.

    Args:
        shares: from the layers and the recipe's sparsity (None for a pattern that fixes its own) to the sparsity of
            each layer, by name.
        needs: the statistics of the dense model that it reads.
    """

    shares: Callable[[Sequence[Candidate], float | None], dict[str, float]]
    needs: frozenset[Need] = frozenset()


def _uniform(layers: Sequence[Candidate], sparsity: float | None) -> dict[str, float]:
    """Every layer gets the recipe's sparsity: the budget equation holds layer by layer."""
    return {candidate.layer.name: candidate.pattern.resolve(sparsity) for candidate in layers}


ALLOCATIONS: dict[str, Allocation] = {"uniform": Allocation(_uniform)}


def allocate(layers: Sequence[Candidate], allocation: str, sparsity: float | None) -> dict[str, float]:
    r"""Return the sparsity of each layer, by name.

    With :math:`p_l(s)` the number of weights that layer l's pattern prunes at sparsity s
    (:meth:`SparsityPattern.num_pruned`), every allocation keeps the budget

    .. math:: \sum_l p_l(s_l) = \sum_l p_l(s),

    where s is the sparsity of the whole and :math:`s_l` the result. The equation is checked in whole weights.

    Args:
        layers: the layers to prune, with the statistics that the allocation needs.
        allocation: its name in the table.
        sparsity: of the whole; None for a pattern that fixes its own.

    Raises:
        PatternError: a sparsity that is outside [0, 1] or not the pattern's own.
        RecipeError: the allocation does not keep the budget.
    """
    shares = ALLOCATIONS[allocation].shares(layers, sparsity)
    budget = sum(candidate.num_pruned(sparsity) for candidate in layers)
    pruned = sum(candidate.num_pruned(shares[candidate.layer.name]) for candidate in layers)
    if pruned != budget:
        raise RecipeError(f"the allocation {allocation!r} prunes {pruned} weights, but the budget is {budget}.")
    return shares
