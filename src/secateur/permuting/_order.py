"""Give the units of a model another order in all tensors where they lie, and take it back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur._errors import RecipeError
from secateur.layers import is_sharded
from secateur.permuting._shared import Part


class Orders:
    """Changes the order of units in the tensors of a model, in place, and remembers how.

    To take it back is to apply the inverse orders, last first. So no copy of a tensor is kept.

    Args:
        model: to change.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
            model.named_buffers(remove_duplicate=False)
        )
        self._done: list[tuple[Tensor, int, Tensor]] = []

    def apply(self, parts: Sequence[Part], orders: Sequence[NDArray[np.int64]]) -> None:
        """Give each part an order ``[size]``: the unit at each place.

        Raises:
            RecipeError: a tensor that cannot be changed.
        """
        changes: dict[tuple[object, ...], tuple[Tensor, int, NDArray[np.int64]]] = {}
        for part, order in zip(parts, orders, strict=True):
            for place in part.places:
                tensor = self._tensors[place.tensor]
                if is_sharded(tensor) or type(tensor) not in (nn.Parameter, Tensor):
                    raise RecipeError(
                        f"{place.tensor}: it is a {type(tensor).__name__}, whose entries cannot change places.\n"
                        "Reorder the plain model first."
                    )
                memory = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), place.dim
                size = tensor.shape[place.dim]
                _, _, index = changes.setdefault(memory, (tensor, place.dim, np.arange(size)))
                index[place.indices] = place.indices[order]
        for tensor, dim, index in changes.values():
            if not np.array_equal(index, np.arange(len(index))):
                moved = torch.from_numpy(index).to(tensor.device)
                self._done.append((tensor, dim, moved))
                _move_(tensor, dim, moved)

    def undo(self) -> None:
        """Put everything back."""
        while self._done:
            tensor, dim, index = self._done.pop()
            _move_(tensor, dim, index.argsort())


@torch.no_grad()
def _move_(tensor: Tensor, dim: int, index: Tensor) -> None:
    tensor.copy_(tensor.index_select(dim, index))
    if tensor.is_leaf and tensor.grad is not None:
        tensor.grad.copy_(tensor.grad.index_select(dim, index))
