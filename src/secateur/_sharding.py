"""Weights that are sharded over processes (DTensor, FSDP): the whole weight, and the part of one process."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def is_sharded(tensor: object) -> bool:
    """Return whether a tensor is sharded over processes (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that is sharded over processes (a DTensor); any other tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor (a DTensor) that this process holds; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def sharded_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's part of ``whole``, sharded like ``parameter``; all of it if that is not sharded."""
    if not is_sharded(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Every process has the whole tensor. Without src_data_rank=None it would be sent from one process to all others.
    sharded: Any = parameter
    return distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None).to_local()


def write_whole_(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded. Every process writes its own part."""
    local_part(target).copy_(sharded_like(whole.to(target.dtype), target))


def sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules of a model to which ``fully_shard`` was applied."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # if it was not imported, no module is sharded
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def reshard(modules: Iterable[Any]) -> None:
    """Free the whole weights that FSDP keeps after a forward pass without a backward pass.

    Otherwise a change of the weights would be made to these copies, and lost.
    """
    for module in modules:
        module.reshard()
