"""Which blocks of a list go: those without which the model's outputs change least."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur._errors import StatisticsError
from secateur.calibration import Forward
from secateur.graph import Dimension, stream_in, stream_out, without
from secateur.solvers import influence
from secateur.surgery import outputs_of

_BATCHES = 4  # whose outputs are compared: each block that goes costs a forward pass of each for every block left
_ROUNDS = 8  # at most as many times are the blocks that are left compared again


def rank_blocks(
    model: nn.Module,
    dimension: Dimension,
    count: int,
    importance: str,
    batches: Sequence[Any],
    forward: Forward,
    tell: Callable[[str], None] = lambda name: None,
) -> NDArray[np.float64]:
    """Return a score for each block: higher stays.

    With ``"effect"``, the model runs without each block in turn, and the block goes whose absence changes the model's
    outputs least; then the others are compared again without it. Up to 8 rounds are made, so that several blocks go in
    one round of a long list. With ``"influence"``, blocks go that turn the residual stream least.

    Args:
        model: in the state of :func:`secateur.calibration.quiet`.
        dimension: of the blocks.
        count: of blocks that go.
        importance: ``"effect"`` or ``"influence"``.
        batches: of inputs; the first 4 are used.
        forward: how to call the model on a batch.
        tell: called with what is being done.

    References:
        Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024,
        arXiv:2403.03853; Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of
        Transformer Blocks", 2024, arXiv:2402.09025.
    """
    batches = batches[:_BATCHES]
    if importance == "influence":
        scores = _influences(model, dimension, batches, forward)
        scores[list(dimension.fixed)] = np.inf
        return scores
    scores = np.full(dimension.size, np.inf)
    dense = [_outputs(model, batch, forward) for batch in batches]
    gone: list[int] = []
    each = -(-count // _ROUNDS)
    while len(gone) < count:
        left = [block for block in range(dimension.size) if block not in gone and block not in dimension.fixed]
        effects = {}
        for block in left:
            tell(f"{dimension.name} without block {block}")
            with without(model, [(dimension, [*gone, block])]):
                effects[block] = sum(
                    _distance(_outputs(model, batch, forward), expected)
                    for batch, expected in zip(batches, dense, strict=True)
                )
        for block in sorted(left, key=lambda block: (effects[block], -block))[: min(each, count - len(gone))]:
            scores[block] = max(effects[block], max((scores[other] for other in gone), default=0.0))
            gone.append(block)
    return scores


def _outputs(model: nn.Module, batch: Any, forward: Forward) -> list[Tensor]:
    found = [tensor.detach() for _, tensor in outputs_of(forward(model, copy.deepcopy(batch)))]
    if not found:
        raise StatisticsError("the model returns no floating-point tensor, so that blocks cannot be compared.")
    return found


def _distance(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Squared difference of outputs as a part of their squared norm. Tensors of another shape are looks inside."""
    difference = norm = 0.0
    for one, other in zip(found, expected, strict=False):
        if one.shape == other.shape:
            finite = other.isfinite() & one.isfinite()
            difference += float(torch.where(finite, one.double() - other.double(), 0).square().sum())
            norm += float(torch.where(finite, other.double(), 0).square().sum())
    return difference / norm if norm else 0.0


def _influences(
    model: nn.Module, dimension: Dimension, batches: Sequence[Any], forward: Forward
) -> NDArray[np.float64]:
    blocks = list(model.get_submodule(dimension.name).children())
    total = np.zeros(dimension.size)
    hooks = []

    def note(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            out = stream_out(output)
            stream = stream_in(args, kwargs, out)
            if stream is not None and out is not None:
                total[number] += float(influence(stream, out).mean())

        return hook

    try:
        for number, block in enumerate(blocks):
            hooks.append(block.register_forward_hook(note(number), with_kwargs=True))
        for batch in batches:
            forward(model, copy.deepcopy(batch))
    finally:
        for handle in hooks:
            handle.remove()
    return total
