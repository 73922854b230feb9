"""A packed weight as a tensor, without what functions do with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from secateur.nn._packed_products import Part


class PackedTensor(Tensor):
    """A weight that is stored without its zeros, as a tensor: for its arguments see :class:`PackedWeight`."""

    parts: tuple[Part, ...]
    stacked: bool
    turned: bool
    along: int
    _seen: tuple[torch.dtype, torch.device, torch.Size]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of the weight."""
        return self._seen[0]  # without the detour over __torch_function__: models ask for it at every call

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the packed weight is."""
        return self._seen[1]

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The shape of the dense weight."""
        return self._seen[2]

    @property
    def ndim(self) -> int:  # type: ignore[override]
        """2, or 3 for a stack."""
        return len(self._seen[2])

    @staticmethod
    def __new__(
        cls,
        parts: Sequence[Part],
        stacked: bool = False,
        turned: bool = False,
        along: int = 0,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Return the tensor."""
        first = parts[0]
        rows, columns = first.matrix_shape
        if not stacked and len(parts) > 1:
            side_by_side = sum(part.matrix_shape[along] for part in parts)
            rows, columns = (side_by_side, columns) if along == 0 else (rows, side_by_side)
        shape, strides = ((columns, rows), (1, columns)) if turned else ((rows, columns), (columns, 1))
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            (len(parts), *shape) if stacked else shape,
            strides=(rows * columns, *strides) if stacked else strides,
            dtype=first.weight_dtype if dtype is None else dtype,
            device=first.weight_device,
        )
        made.parts, made.stacked, made.turned, made.along = tuple(parts), stacked, turned, along
        plain: Any = super(PackedTensor, made)
        with torch._C.DisableTorchFunctionSubclass():
            made._seen = plain.dtype, plain.device, plain.shape
        return made  # type: ignore[no-any-return]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """``__new__`` does all."""

    def unpack(self) -> Tensor:
        """Return the dense weight, in a new tensor."""
        matrices = [part.matrix().to(self.dtype) for part in self.parts]
        if self.stacked:
            whole = torch.stack(matrices)
        else:
            whole = torch.cat(matrices, self.along) if len(matrices) > 1 else matrices[0]
        return whole.transpose(-2, -1) if self.turned else whole

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """Return the dense weight for NumPy."""
        return self.unpack().numpy() if dtype is None else self.unpack().numpy().astype(dtype)

    def like(self, **changes: Any) -> Self:
        """Return a tensor of the same matrices with other arguments."""
        given = {"parts": self.parts, "stacked": self.stacked, "turned": self.turned, "along": self.along}
        return type(self)(**(given | {"dtype": self.dtype} | changes))


def unpacked(value: Any) -> Any:
    """Return a value with the packed weights in it, in lists, tuples and dicts, too, replaced by dense ones."""
    if isinstance(value, PackedTensor):
        return value.unpack()
    if type(value) in (list, tuple):
        return type(value)(unpacked(one) for one in value)
    if type(value) is dict:
        return {key: unpacked(one) for key, one in value.items()}
    return value


class NotServed(Exception):  # noqa: N818  no error: the dense weight serves
    """No packed kernel computes this."""


def served(condition: Any) -> None:
    if not condition:
        raise NotServed
