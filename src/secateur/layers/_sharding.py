"""What pruning has to do to an optimizer: forget the past of weights that are no longer there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur._types import Mask


def local_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor (a DTensor) that this process holds; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def sharded_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of ``whole``, cut as ``parameter`` is; all of it where the parameter is not sharded."""
    if not hasattr(parameter, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Every process has the whole, so nothing needs to be sent.
    sharded: Any = parameter
    return distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None).to_local()


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
