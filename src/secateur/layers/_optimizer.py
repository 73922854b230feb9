"""What pruning has to do to an optimizer: forget the past of weights that are no longer there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur._types import Mask
from secateur.layers._sharding import local_part, sharded_like


@torch.no_grad()
def clear_state_(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, mask: Mask) -> None:
    """Zero the optimizer's momenta of a parameter where ``mask`` is False, as if those weights had never been trained.

    Args:
        optimizer: any; state tensors of the parameter's shape are taken as one number a weight.
        parameter: whose state to clear. If it is sharded, so is its state.
        mask: bool, in the shape of the whole parameter, True = leave as it is.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return
    forget = ~sharded_like(mask, parameter)
    for value in state.values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            local_part(value).masked_fill_(forget, 0)
