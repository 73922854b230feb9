"""Functions that turn a packed weight or take whole matrices out of it, without unpacking it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from secateur._errors import KernelError
from secateur.formats import UNSCALED_DTYPES
from secateur.nn._packed_tensor import NotServed, PackedTensor, served


def _turned(weight: PackedTensor) -> PackedTensor:
    return weight.like(turned=not weight.turned)


def _matrix_turned(weight: PackedTensor) -> PackedTensor:
    served(not weight.stacked)
    return _turned(weight)


def _transposed(weight: PackedTensor, one: Any, other: Any) -> PackedTensor:
    served(type(one) is int and type(other) is int)
    return _permuted(weight, *_exchanged(weight.ndim, one, other))


def _exchanged(ndim: int, one: int, other: int) -> list[int]:
    order = list(range(ndim))
    order[one], order[other] = order[other], order[one]
    return order


def _permuted(weight: PackedTensor, *order: Any) -> PackedTensor:
    order = tuple(order[0]) if len(order) == 1 and isinstance(order[0], tuple | list) else order
    wanted = [place % weight.ndim for place in order]
    if wanted == list(range(weight.ndim)):
        return weight
    served(wanted == _exchanged(weight.ndim, -2, -1))
    return _turned(weight)


def _same(weight: PackedTensor, *_: Any, **__: Any) -> PackedTensor:
    return weight


def _frozen(weight: PackedTensor, requires_grad: bool = True) -> PackedTensor:
    if requires_grad:
        raise KernelError(
            "a packed weight is frozen, and got requires_grad_(True). Train the dense layer: secateur.unpack_(model), "
            "or take a dense copy with .clone()."
        )
    return weight


def _cast(weight: PackedTensor, dtype: torch.dtype) -> PackedTensor:
    if dtype == weight.dtype:
        return weight
    served(dtype in UNSCALED_DTYPES)  # not float64: kernels compute in float32
    return weight.like(dtype=dtype)


def _to(weight: PackedTensor, *args: Any, **kwargs: Any) -> PackedTensor:
    served(not kwargs.get("copy", False))
    kwargs = {key: value for key, value in kwargs.items() if key in ("device", "dtype")}
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype)
    try:
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
    except (TypeError, RuntimeError):
        raise NotServed from None
    served(layout is None and device in (None, weight.device))
    return _same(weight) if dtype is None else _cast(weight, dtype)


def _type(weight: PackedTensor, dtype: Any = None, **_: Any) -> PackedTensor:
    served(isinstance(dtype, torch.dtype))
    return _cast(weight, dtype)


def _caster(dtype: torch.dtype) -> Callable[..., PackedTensor]:
    return lambda weight, **_: _cast(weight, dtype)


def _item(weight: PackedTensor, index: Any) -> PackedTensor:
    """Whole matrices of a stack, or whole parts of rows."""
    if not weight.stacked:
        served(isinstance(index, slice))
        return _side_by_side(weight, *_bounds(index, len(weight)))
    if isinstance(index, tuple) and len(index) == 1:
        (index,) = index
    count = len(weight.parts)
    if isinstance(index, slice):
        chosen = range(count)[index]
        served(len(chosen))
        return weight.like(parts=[weight.parts[place] for place in chosen])
    if isinstance(index, list):
        index = torch.tensor(index)
    if isinstance(index, Tensor):
        served(not index.is_floating_point() and index.dtype not in (torch.bool, torch.uint8) and index.ndim < 2)
        index = index.tolist()
    if isinstance(index, list):
        served(index and all(-count <= place < count for place in index))
        return weight.like(parts=[weight.parts[place] for place in index])
    served(hasattr(index, "__index__") and not isinstance(index, bool) and -count <= index.__index__() < count)
    return weight.like(parts=[weight.parts[index.__index__()]], stacked=False)


def _bounds(index: slice, length: int) -> tuple[int, int]:
    begin, end, step = index.indices(length)
    served(step == 1)
    return begin, end


def _side_by_side(weight: PackedTensor, begin: int, end: int) -> PackedTensor:
    """The parts from one place to another of the first dimension."""
    served(len(weight.parts) == 1 or weight.along == weight.turned)
    offset, chosen, size = 0, [], 0
    for part in weight.parts:
        length = part.matrix_shape[weight.turned]
        if begin <= offset and offset + length <= end:
            chosen.append(part)
            size += length
        offset += length
    served(chosen and size == end - begin)
    return weight.like(parts=chosen)


def _viewed(weight: PackedTensor, *shape: Any) -> PackedTensor:
    """Matrices of one shape that are side by side as a stack, and back."""
    shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    served(all(type(size) is int for size in shape))
    first = weight.parts[0].matrix_shape
    matrix = (first[1], first[0]) if weight.turned else first
    stack, joined = (len(weight.parts), *matrix), (len(weight.parts) * matrix[0], matrix[1])
    served(all(part.matrix_shape == first for part in weight.parts))
    served(weight.stacked or len(weight.parts) == 1 or weight.along == weight.turned)
    for wanted, stacked in ((stack, True), (joined, False)):
        if len(shape) == len(wanted) and all(size in (-1, own) for size, own in zip(shape, wanted, strict=True)):
            served(shape.count(-1) < 2)
            return weight.like(stacked=stacked, along=int(weight.turned))
    raise NotServed


def _squeezed(weight: PackedTensor, dim: Any) -> PackedTensor:
    served(weight.stacked and dim in (0, -3))
    return _same(weight) if len(weight.parts) > 1 else weight.like(stacked=False)


def _unsqueezed(weight: PackedTensor, dim: Any) -> PackedTensor:
    served(not weight.stacked and dim in (0, -3) and len(weight.parts) == 1)
    return weight.like(stacked=True)


def _selected(weight: PackedTensor, dim: Any, index: Any) -> PackedTensor:
    served(weight.stacked and dim in (0, -3))
    return _item(weight, index)


def _unbound(weight: PackedTensor, dim: int = 0) -> tuple[PackedTensor, ...]:
    served(weight.stacked and dim in (0, -3))
    return tuple(weight.like(parts=[part], stacked=False) for part in weight.parts)


def _iterated(weight: PackedTensor) -> Any:
    return iter(_unbound(weight))


def _narrowed(weight: PackedTensor, dim: Any, start: Any, length: Any) -> PackedTensor:
    return _pieces(weight, [(int(start), int(start) + int(length))], dim)[0]


def _split(weight: PackedTensor, sizes: Any, dim: int = 0) -> tuple[PackedTensor, ...]:
    if type(sizes) is int:
        served(sizes > 0)
        places = [*range(0, len(weight), sizes), len(weight)]
    else:
        places = [0]
        for size in sizes:
            places.append(places[-1] + size)
        served(places[-1] == len(weight))
    return _pieces(weight, list(pairwise(places)), dim)


def _chunked(weight: PackedTensor, chunks: Any, dim: int = 0) -> tuple[PackedTensor, ...]:
    served(type(chunks) is int and chunks > 0)
    return _split(weight, -(-len(weight) // chunks), dim)


def _pieces(weight: PackedTensor, bounds: list[tuple[int, int]], dim: int) -> tuple[PackedTensor, ...]:
    served(type(dim) is int and dim % weight.ndim == 0)
    return tuple(_item(weight, slice(begin, end)) for begin, end in bounds)


def getters(*names: str) -> list[Any]:
    """Return what Python calls for attributes of a tensor."""
    return [getattr(Tensor, name).__get__ for name in names]


# By the function that was called.
VIEWS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(getters("mT", "mH"), _turned),
    **dict.fromkeys((*getters("T", "H"), torch.t, Tensor.t), _matrix_turned),
    **dict.fromkeys((torch.adjoint, Tensor.adjoint), _turned),
    **dict.fromkeys((torch.transpose, Tensor.transpose, torch.swapaxes, Tensor.swapaxes), _transposed),
    **dict.fromkeys((torch.swapdims, Tensor.swapdims), _transposed),
    **dict.fromkeys((torch.permute, Tensor.permute), _permuted),
    **dict.fromkeys((torch.detach, Tensor.detach, Tensor.detach_, Tensor.contiguous, *getters("data")), _same),
    Tensor.requires_grad_: _frozen,
    Tensor.to: _to,
    Tensor.type: _type,
    Tensor.float: _caster(torch.float32),
    Tensor.half: _caster(torch.float16),
    Tensor.bfloat16: _caster(torch.bfloat16),
    Tensor.__getitem__: _item,
    Tensor.__iter__: _iterated,
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape), _viewed),
    **dict.fromkeys((torch.squeeze, Tensor.squeeze), _squeezed),
    **dict.fromkeys((torch.unsqueeze, Tensor.unsqueeze), _unsqueezed),
    **dict.fromkeys((torch.select, Tensor.select, torch.index_select, Tensor.index_select), _selected),
    **dict.fromkeys((torch.unbind, Tensor.unbind), _unbound),
    **dict.fromkeys((torch.narrow, Tensor.narrow), _narrowed),
    **dict.fromkeys((torch.split, Tensor.split), _split),
    **dict.fromkeys((torch.chunk, Tensor.chunk), _chunked),
}
