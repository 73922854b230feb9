"""Several processes that train one model together (torchrun, accelerate): each runs its own batches of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn

from secateur._errors import RecipeError


def world() -> tuple[int, int]:
    """Return the number of this process, and how many there are; 0 and 1 without a process group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def mean_gradients_(parameters: Sequence[nn.Parameter]) -> None:
    """Give every process the mean of all gradients. A parameter without a gradient counts as zero."""
    _, size = world()
    if size == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)
        parameter.grad /= size


def total(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the sums of some numbers over all processes."""
    if world()[1] == 1:
        return list(values)
    summed = torch.tensor(values, dtype=torch.float64, device=_device(device))
    distributed.all_reduce(summed)
    return [float(value) for value in summed]


def agreed(value: float, device: torch.device) -> float:
    """Return the number that the first process has, so that all decide the same."""
    if world()[1] == 1:
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=_device(device))
    distributed.broadcast(shared, 0)
    return float(shared[0])


def check_same(digest: str, device: torch.device) -> None:
    """Raise unless all processes have the same batches.

    Raises:
        RecipeError: they differ.
    """
    rank, size = world()
    if size == 1:
        return
    own = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.int64, device=_device(device))
    first: Tensor = own.clone()
    distributed.broadcast(first, 0)
    different = total([float(not torch.equal(own, first))], device)[0]
    if different:
        raise RecipeError(
            f"{int(different)} of {size} processes have other batches than the first (this is process {rank}).\nGive "
            "all of them the same batches: each runs its own part of them. A DistributedSampler is not needed."
        )


def _device(device: torch.device) -> torch.device:
    return device if distributed.get_backend() == "nccl" else torch.device("cpu")
