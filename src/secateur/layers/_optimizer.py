"""What pruning does to an optimizer: the momenta of pruned weights become zero."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from secateur._sharding import local_part, sharded_like
from secateur._types import Mask


@torch.no_grad()
def clear_state_(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    mask: Mask,
    part: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Set the optimizer's momenta of a parameter to zero where ``mask`` is False.

    Otherwise the momentum of a weight from before pruning would move it when it grows again.

    Args:
        optimizer: any. A state tensor of the parameter's shape is taken to hold one number for each weight.
        parameter: the one whose state is cleared. If it is sharded, so is its state.
        mask: bool, in the shape of the whole parameter or of the part, True = leave the state unchanged.
        part: given a tensor of the parameter's shape, returns a view of the part that is pruned.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return
    forget = ~sharded_like(mask, parameter)
    for value in state.values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            part(local_part(value)).masked_fill_(forget, 0)
