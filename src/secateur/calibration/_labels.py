"""What stands at a padded position, element by element: labels, and what functions make of them.

A label has the shape of the tensor that it speaks of, and is mostly a view without memory of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

REAL, PADDED, NEUTRAL = 0, 1, 2  # in this order, so that a minimum says what several elements together stand for


CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
POOLS = frozenset({"avg_pool1d", "avg_pool2d", "max_pool1d", "max_pool2d"})


def neutral(tensor: Tensor) -> Tensor:
    """The label of a tensor that no input is behind."""
    return torch.full((), NEUTRAL, dtype=torch.uint8, device=tensor.device).expand(tensor.shape)


def together(padded: Tensor, dims: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """What all elements along some dimensions together stand for: padding only if none of them is real."""
    for dim in (dims,) if isinstance(dims, int) else dims:
        if padded.shape[dim] and not padded.stride(dim):
            padded = padded.narrow(dim, 0, 1)  # all alike
    if padded.numel():
        return padded.amin(dims, keepdim=keepdim)
    return padded.sum(dims, keepdim=keepdim).to(torch.uint8)


def expanded(padded: Tensor, output: Tensor) -> Tensor | None:
    """The label in the shape of an output, None if it does not fit. A dimension in which all are alike fits any."""
    if padded.ndim > output.ndim:
        return None
    if padded.ndim == output.ndim:
        for dim in range(padded.ndim):
            if padded.shape[dim] and not padded.stride(dim):
                padded = padded.narrow(dim, 0, 1)
    pairs = zip(reversed(padded.shape), reversed(output.shape), strict=False)
    return padded.expand(output.shape) if all(size in (1, wanted) for size, wanted in pairs) else None


def either_of(a: Tensor, b: Tensor) -> Tensor:
    """Union of two labels of one shape; memory is only taken for the dimensions in which one of them varies."""
    index = tuple(
        slice(0, 1) if not (stride_a or stride_b) else slice(None)
        for stride_a, stride_b in zip(a.stride(), b.stride(), strict=True)
    )
    a_part, b_part = a[index], b[index]
    either = torch.where(a_part == NEUTRAL, b_part, torch.where(b_part == NEUTRAL, a_part, a_part | b_part))
    return either.expand(a.shape)


def reduced(args: Any, kwargs: Any, padded: Tensor, output: Tensor) -> Tensor | None:
    """A sum over positions stands at a padded one only if all its parts do."""
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if isinstance(dims, int) and not isinstance(dims, bool):
        dims = (dims,)
    if not isinstance(dims, tuple | list) or not all(isinstance(dim, int) for dim in dims):
        return None
    return together(padded, tuple(dims), keepdim=output.ndim == padded.ndim)


def varies(name: str, padded: Tensor, args: Any, kwargs: Any) -> bool:
    """Whether elements along the dimension that a function sorts stand for different things."""
    numbers = [value for value in args[1:] if isinstance(value, int) and not isinstance(value, bool)]
    if name in ("topk", "kthvalue") and "k" not in kwargs:
        numbers = numbers[1:]
    dim = 0 if name == "msort" else kwargs.get("dim", numbers[0] if numbers else -1)
    return bool(padded.numel()) and not torch.equal(padded.amin(dim), padded.amax(dim))


def einsum_of(equation: str, place: int, padded: Tensor, output: Tensor) -> Tensor | None:
    """The label of a product, of which one operand has this label; None for an equation that is not plain."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or place >= len(terms) or len(set(terms[place])) != len(terms[place]):
        return None
    letters = terms[place]
    gone = tuple(number for number, letter in enumerate(letters) if letter not in right)
    label = together(padded, gone) if gone else padded
    kept = [letter for letter in letters if letter in right]
    label = label.permute([kept.index(letter) for letter in right if letter in kept])
    for number, letter in enumerate(right):
        if letter not in kept:
            label = label.unsqueeze(number)
    return expanded(label, output)


def framed(name: str, args: Any, kwargs: Any, padded: Tensor, output: Tensor) -> Tensor | None:
    """The label of what a convolution or a pooling function returns."""
    given = {"stride": None, "padding": 0, "dilation": 1}
    if name in CONVOLUTIONS:
        kernel = tuple(args[1].shape[2:]) if len(args) > 1 else tuple(kwargs["weight"].shape[2:])
        given["stride"] = 1
        names = ("stride", "padding", "dilation")
        values = dict(zip(names, args[3:6], strict=False))
    else:
        kernel = args[1] if len(args) > 1 else kwargs["kernel_size"]
        names = ("stride", "padding", "dilation" if name.startswith("max") else "ceil_mode")
        values = dict(zip(names, args[2:5], strict=False))
    values |= {key: value for key, value in kwargs.items() if key in given}
    space = int(name[-2])
    shape = _each(kernel, space)
    options = given | {key: value for key, value in values.items() if key in given and value is not None}
    label = frames(padded, shape, options["stride"] or shape, options["padding"], options["dilation"])
    return None if label is None else expanded(label, output)


def frames(padded: Tensor, kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> Tensor | None:
    """Which frames of a convolution are padding, ``[batch, 1, *frames]``, given inputs ``[batch, channels, *places]``.

    A frame is real if it would be there without the padding. A frame at every position stands at that position.
    """
    space = len(kernel)
    strides, dilations = _each(stride, space), _each(dilation, space)
    reach = [dilation * (size - 1) for size, dilation in zip(kernel, dilations, strict=True)]
    if padding == "same":
        pads = [(size + 1) // 2 for size in reach]
    else:
        pads = list(_each(0 if padding == "valid" else padding, space))
    label = (together(padded, -space - 1, keepdim=True) == PADDED).to(torch.uint8)
    for axis in range(-space, 0):
        length, pad = label.shape[axis], pads[axis]
        count = length if padding == "same" else (length + 2 * pad - reach[axis] - 1) // strides[axis] + 1
        if count < 1:
            return None
        if strides[axis] == 1 and pad:
            positions = torch.arange(count, device=label.device).clamp(max=length - 1)
            label = label.index_select(axis, positions)
            continue
        label = label.movedim(axis, -1)
        if pad:  # as at the true end of a sequence, a frame may reach that far beyond it
            edge = label.new_zeros(*label.shape[:-1], pad)
            real = torch.cat([edge, 1 - label, edge], -1)
            real = torch.cat([edge, real, edge], -1).unfold(-1, 2 * pad + 1, 1).amax(-1)
            label = 1 - real
        windows = label.unfold(-1, reach[axis] + 1, strides[axis])[..., :: dilations[axis]]
        label = windows.amax(-1).movedim(-1, axis)
    return label


def _each(value: Any, space: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, tuple | list | torch.Size) else (value,)
    return values * space if len(values) == 1 else values


def frames_of(padded: Tensor, module: nn.Module) -> Tensor | None:
    """Which of the rows that a convolution reads are padding, in one dimension and in their order."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    label = frames(padded, module.kernel_size, module.stride, module.padding, module.dilation)
    return None if label is None else label.reshape(-1)
