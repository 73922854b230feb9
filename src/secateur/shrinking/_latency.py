"""How long does a forward pass take, before and after?"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

from secateur._types import dtype_name
from secateur.calibration import Forward, call_model
from secateur.reports import Latency
from secateur.shrinking._size import first_shape
from secateur.timing import describe_machine, ratios, time_in_turn


@torch.no_grad()
def compare_latency(before: nn.Module, after: nn.Module, batch: Any, forward: Forward = call_model) -> Latency:
    """Measure a forward pass of two models in turn, so that a disturbance affects both.

    Args:
        before: the dense model, in evaluation mode.
        after: the smaller one, on the same device.
        batch: on that device.
        forward: how to call a model on the batch.

    Example:
        >>> import torch
        >>> from secateur.shrinking import compare_latency
        >>> latency = compare_latency(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8), torch.randn(4, 64))
        >>> latency.shape, latency.after > 0
        ((4, 64), True)
    """
    first = next(before.parameters())

    def run(model: nn.Module) -> Callable[[], object]:
        def call() -> None:
            forward(model, batch)
            if first.is_cuda:
                torch.cuda.synchronize(first.device)

        return call

    times = time_in_turn({"before": run(before), "after": run(after)}, "before", keep=("after",))
    low, middle, high = ratios(times, "before", "after")
    machine = describe_machine("none")
    if first.is_cuda:
        machine["processor"] = torch.cuda.get_device_name(first.device)
    return Latency(
        shape=first_shape(batch),
        before=median(times["before"]),
        after=median(times["after"]),
        ratio=middle,
        low=low,
        high=high,
        dtype=dtype_name(first.dtype),
        machine=machine,
    )
