"""Transposed convolutions as linear maps of rows."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from secateur._types import Weight
from secateur.layers._kind import LayerKind


def _to_matrix(module: Any, weight: Tensor) -> Weight:
    """``[in, out / groups, *kernel]`` as ``[out, in / groups * kernel]``."""
    parts = weight.view(module.groups, -1, *weight.shape[1:])
    return parts.transpose(1, 2).flatten(0, 1).flatten(1)


def _from_matrix(module: Any, matrix: Weight) -> Tensor:
    shape = module.weight.shape
    parts = matrix.view(module.groups, shape[1], shape[0] // module.groups, *shape[2:])
    return parts.transpose(1, 2).flatten(0, 1)


def _call_rows(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return one row for each position of the output, ``[groups, positions, in / groups * kernel]``.

    A transposed convolution is a convolution over its input with zeros between the values, by the kernel reversed.
    """
    given = dict(zip(("input", "output_size"), args, strict=False)) | kwargs
    x: Tensor = given["input"]
    space = len(module.kernel_size)
    if x.ndim == space + 1:
        x = x.unsqueeze(0)
    apart = x.new_zeros(*x.shape[:2], *((n - 1) * step + 1 for n, step in zip(x.shape[2:], module.stride, strict=True)))
    places = apart
    for axis, step in enumerate(module.stride):
        places = places.unfold(2 + axis, 1, step).squeeze(-1)
    places.copy_(x)
    padding: list[int] = []  # the last dimension first, as F.pad takes it; below zero where it crops
    for axis in reversed(range(space)):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1)
        more = module.output_padding[axis]
        if given.get("output_size") is not None:
            least = apart.shape[2 + axis] - 2 * module.padding[axis] + reach
            more = given["output_size"][axis - space] - least
        padding += [reach - module.padding[axis], reach - module.padding[axis] + more]
    x = nn.functional.pad(apart, padding)
    for axis in range(space):
        x = x.unfold(2 + axis, module.dilation[axis] * (module.kernel_size[axis] - 1) + 1, 1)
        x = x[..., :: module.dilation[axis]].flip(-1)
    # [batch, in, *positions, *kernel] -> [groups, batch * positions, in / groups * kernel]
    x = x.unflatten(1, (module.groups, -1)).flatten(3, 2 + space).flatten(4)
    return x.permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)


TRANSPOSED_CONVOLUTION = LayerKind(
    _to_matrix,
    _from_matrix,
    call_rows=_call_rows,
    channel_width=lambda module: math.prod(module.kernel_size),  # type: ignore[arg-type]
)
