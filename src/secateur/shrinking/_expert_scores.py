"""How much does each expert give to the tokens that are sent to it?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.calibration import Forward
from secateur.graph import Dimension


@torch.no_grad()
def score_experts(
    model: nn.Module, dimensions: Sequence[Dimension], batches: Sequence[Any], forward: Forward
) -> dict[str, NDArray[np.float64]]:
    """Return by dimension a score for each expert: the squared norm of what it adds to the outputs of its mixture.

    The module that holds the experts runs once more for each expert, on the same inputs, with a router weight of zero
    for all others: what it returns then is what that expert gives, weighted by the router.

    Args:
        model: in the state of :func:`secateur.calibration.quiet`.
        dimensions: of experts.
        batches: of inputs.
        forward: how to call the model on a batch.

    Reference:
        Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", 2025, arXiv:2510.13999.
        Differs from the paper: squared norms are summed over all tokens, not averaged over those that an expert gets.
    """
    scores = {dimension.name: np.zeros(dimension.size) for dimension in dimensions}
    hooks = []
    running: set[str] = set()

    def note(dimension: Dimension) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if dimension.name in running:
                return
            running.add(dimension.name)
            try:
                scores[dimension.name] += _given(module, dimension, args, kwargs)
            finally:
                running.discard(dimension.name)

        return hook

    try:
        for dimension in dimensions:
            holder = model.get_submodule(dimension.name)
            if isinstance(holder, nn.ModuleList):
                hooks += [
                    expert.register_forward_hook(_plain(scores[dimension.name], number))
                    for number, expert in enumerate(holder)
                ]
            else:
                hooks.append(holder.register_forward_hook(note(dimension), with_kwargs=True))
        for batch in batches:
            forward(model, copy.deepcopy(batch))
    finally:
        for handle in hooks:
            handle.remove()
    return scores


def _plain(total: NDArray[np.float64], number: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            total[number] += float(output.double().square().sum())

    return hook


def _given(module: nn.Module, dimension: Dimension, args: Any, kwargs: Any) -> NDArray[np.float64]:
    """The squared norm of what each expert gives, by running the module with the weights of the others at zero."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    index = next((leaf for leaf in leaves if not leaf.is_floating_point() and leaf.ndim == 2), None)
    weight = next(
        (leaf for leaf in leaves if index is not None and leaf.is_floating_point() and leaf.shape == index.shape), None
    )
    found = np.zeros(dimension.size)
    if index is None or weight is None:
        return _by_rows(module, dimension, leaves)
    for expert in torch.unique(index).tolist():
        if not 0 <= expert < dimension.size:
            continue
        own = torch.where(index == expert, weight, torch.zeros_like(weight))
        new_args, new_kwargs = (
            tuple(own if leaf is weight else leaf for leaf in args),
            {name: own if leaf is weight else leaf for name, leaf in kwargs.items()},
        )
        output = module(*new_args, **new_kwargs)
        output = output[0] if isinstance(output, tuple) else output
        found[expert] = float(output.double().square().sum())
    return found


def _by_rows(module: nn.Module, dimension: Dimension, leaves: Sequence[Tensor]) -> NDArray[np.float64]:
    """Where no router weights are passed on: the same, with a weight for every expert and token."""
    table = next((leaf for leaf in leaves if leaf.is_floating_point() and leaf.shape[-1] == dimension.size), None)
    if table is None:
        return np.zeros(dimension.size)
    return table.double().flatten(0, -2).square().sum(0).cpu().numpy()
