"""What the buffers of a layer that learns its mask say: its stage, its mask, and states of earlier versions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur._types import Mask

# What the buffer `stage` says. Averages of these, as copies of averaged weights have them, lie in between.
SOFT, STRAIGHT_THROUGH, FROZEN = 0, 1, 2


class Masked(torch.autograd.Function):
    """The weight where the mask keeps it, zero elsewhere; even if what is stored there, or its gradient, is not finite.

    The result does not depend on the threshold, which gets no gradient. It is an input because DistributedDataParallel
    waits for every parameter until the backward pass has reached it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Mask, threshold: Tensor, straight_through: bool) -> Tensor:
        return torch.where(mask, weight, 0)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        _, mask, _, ctx.straight_through = inputs
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (mask,) = ctx.saved_tensors
        return grad if ctx.straight_through else torch.where(mask, grad, 0), None, None, None


def without_parameters(module: nn.Module) -> nn.Module:
    """A copy of a module that shares all but its parameters, which are None."""
    made = type(module).__new__(type(module))
    vars(made).update(vars(module))
    made._parameters = dict.fromkeys(module._parameters)
    return made


def marks(stage: Tensor, kept: Tensor) -> tuple[int, ...]:
    """Numbers that change if one of the tensors is exchanged or written to."""
    if stage.is_inference() or kept.is_inference():  # they have no version
        return id(stage), id(kept)
    return id(stage), stage._version, id(kept), kept._version


def as_now(state: dict[str, Any], prefix: str, shape: torch.Size, stage: int) -> dict[str, Any]:
    """Return the state of a layer with the keys of this version: up to 0.1.0 there was a ``mask`` if it was pruned.

    A mask of another shape, which is refused, does not change the stage.
    """
    state = dict(state)
    mask, weight = state.pop(prefix + "mask", None), state.get(prefix + "weight")
    kept, saved = state.get(prefix + "kept"), float(stage)
    if kept is None and mask is not None:
        kept, saved = mask.bfloat16(), saved or FROZEN
    elif kept is None and weight is not None:
        kept, saved = torch.zeros(shape, dtype=torch.bfloat16, device=weight.device), SOFT
    elif kept is None or kept.shape == shape:
        return state
    state[prefix + "kept"] = kept
    state[prefix + "stage"] = torch.tensor(float(saved if kept.shape == shape else stage), device=kept.device)
    return state
