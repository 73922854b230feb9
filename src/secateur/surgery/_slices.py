"""Cut units out of the parameters and buffers of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur._errors import RecipeError
from secateur.graph import Place
from secateur.layers import computed_by
from secateur.surgery._journal import Journal


@dataclass(frozen=True)
class Home:
    """Where a tensor lies in a model.

    Args:
        path: qualified name of the module.
        module: that has it.
        name: of the parameter or buffer in the module.
    """

    path: str
    module: nn.Module
    name: str

    @property
    def table(self) -> dict[str, Any]:
        """The parameters of the module, or its buffers."""
        return self.module._parameters if self.name in self.module._parameters else self.module._buffers

    @property
    def tensor(self) -> Tensor:
        """The tensor that is there now."""
        tensor: Tensor = self.table[self.name]
        return tensor


@dataclass(frozen=True)
class Cut:
    """One dimension of a tensor that became smaller.

    Args:
        homes: of the tensor; more than one if it is tied.
        dim: of the tensor.
        old: size before.
        kept: int64, which of the indices before are left.
    """

    homes: tuple[Home, ...]
    dim: int
    old: int
    kept: NDArray[np.int64]

    @property
    def new(self) -> int:
        """Size after."""
        return len(self.kept)


class Tensors:
    """The tensors of a model, of which some dimensions lose indices one after the other.

    Args:
        model: whose tensors they are.
        journal: of what is changed.
    """

    def __init__(self, model: nn.Module, journal: Journal) -> None:
        self._model = model
        self._journal = journal
        tied: dict[tuple[object, ...], list[Home]] = {}
        names: dict[str, tuple[object, ...]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if isinstance(tensor, Tensor):
                    key = names[f"{path}.{name}".lstrip(".")] = _memory(tensor)
                    known = tied.setdefault(key, [])
                    if all(home.module is not module or home.name != name for home in known):
                        known.append(Home(path, module, name))
        homes = {key: tuple(found) for key, found in tied.items()}
        self._homes = {name: homes[key] for name, key in names.items()}
        self._left: dict[tuple[int, int], NDArray[np.int64]] = {}  # original indices, by tensor and dimension
        self._shapes = {id(found): tuple(found[0].tensor.shape) for found in homes.values()}  # at first
        self._overlapping = _overlapping(homes.values())

    def homes(self, name: str) -> tuple[Home, ...]:
        """Return where a tensor lies.

        Raises:
            RecipeError: there is none of that name, or no indices can be taken out of it.
        """
        homes = self._homes.get(name)
        if homes is None:
            owner, _, last = name.rpartition(".")
            module = dict(self._model.named_modules()).get(owner)
            if module is not None and hasattr(module, last):
                raise RecipeError(f"{name}: it is computed by {computed_by(module, last)}.")
            raise RecipeError(f"{name}: the model has no tensor of that name.\nFind the units of this model again.")
        if type(homes[0].tensor) not in (nn.Parameter, Tensor):
            kind = type(homes[0].tensor).__name__
            raise RecipeError(
                f"{name}: it is a {kind}, of which nothing can be cut out.\nShrink the plain model first."
            )
        if id(homes) in self._overlapping:
            raise RecipeError(
                f"{name}: it shares a part of its memory with {self._overlapping[id(homes)]}, which cutting would undo."
                "\nGive each of them memory of its own: parameter.data = parameter.data.clone()."
            )
        return homes

    def left(self, name: str, dim: int) -> NDArray[np.int64]:
        """Return which of the original indices of a tensor's dimension are left."""
        homes = self.homes(name)
        size = homes[0].tensor.ndim
        if not 0 <= dim < size:
            raise RecipeError(
                f"{name}: units of its dimension {dim}, but it has {size}.\nFind the units of this model again."
            )
        return self._left.get((id(homes), dim), np.arange(homes[0].tensor.shape[dim]))

    def alive(self, place: Place) -> NDArray[np.bool_]:
        """Return which units of a place are still there, bool ``[units]``."""
        there = self.left(place.tensor, place.dim)
        size = self._shapes[id(self.homes(place.tensor))][place.dim]
        if not 0 <= place.indices.min(initial=0) <= place.indices.max(initial=0) < size:
            raise RecipeError(
                f"{place.tensor}: units between {place.indices.min()} and {place.indices.max()} of its dimension "
                f"{place.dim}, which has {size}.\nFind the units of this model again."
            )
        found = np.isin(place.indices, there).reshape(place.indices.shape)
        return np.asarray(found.all(axis=1))

    def kept(self, module: nn.Module, key: str) -> dict[int, tuple[int, ...]]:
        """Return which of the original indices of a tensor are left, by the dimensions that lost some."""
        for homes in self._homes.values():
            if any(home.module is module and home.name == key for home in homes):
                cut = {dim: left for (group, dim), left in self._left.items() if group == id(homes)}
                return {dim: tuple(left.tolist()) for dim, left in sorted(cut.items())}
        return {}

    def cut(self, name: str, dim: int, removed: NDArray[np.int64]) -> Cut:
        """Take indices, given as they were at first, out of one dimension of a tensor, wherever the tensor lies."""
        homes, there = self.homes(name), self.left(name, dim)
        kept = np.flatnonzero(~np.isin(there, removed))
        self._left[id(homes), dim] = there[kept]
        done: dict[int, Tensor] = {}
        old = homes[0].tensor.shape[dim]
        data: Tensor | None = None
        for home in homes:
            tensor = home.tensor
            if id(tensor) not in done:  # parameters that are different objects over one memory stay so
                data = _taken(tensor.detach(), dim, kept) if data is None else data
                done[id(tensor)] = _like(tensor, data, dim, kept)
            self._journal.set(home.table, home.name, done[id(tensor)])
        return Cut(homes, dim, old, kept)


def _taken(data: Tensor, dim: int, kept: NDArray[np.int64]) -> Tensor:
    taken = data.index_select(dim, torch.from_numpy(kept).to(data.device))
    if data.ndim == 4 and not data.is_contiguous() and data.is_contiguous(memory_format=torch.channels_last):
        return taken.contiguous(memory_format=torch.channels_last)
    return taken.contiguous()


def _like(tensor: Tensor, data: Tensor, dim: int, kept: NDArray[np.int64]) -> Tensor:
    """A parameter or buffer with new data, and the gradient and attributes of another."""
    if isinstance(tensor, nn.Parameter):
        made: Tensor = nn.Parameter(data, requires_grad=tensor.requires_grad)
    else:
        made = data.view_as(data).requires_grad_(tensor.requires_grad)
    made.__dict__.update(tensor.__dict__)
    if tensor.is_leaf and tensor.grad is not None:
        made.grad = _taken(tensor.grad, dim, kept)
    return made


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """What is equal for two tensors that are one."""
    if (
        tensor.layout != torch.strided
        or tensor.is_meta
        or not tensor.numel()
        or type(tensor) not in (nn.Parameter, Tensor)
    ):
        return ("object", id(tensor))
    place = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return (*place, tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _overlapping(tensors: Iterable[tuple[Home, ...]]) -> dict[int, str]:
    """Name another tensor that has a part of the same memory, by the id of the homes of a tensor."""
    spans = []
    for homes in tensors:
        tensor = homes[0].tensor
        if _memory(tensor)[0] == "object":
            continue
        reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        begin = tensor.data_ptr()
        spans.append((begin, begin + reach * tensor.element_size(), homes))
    spans.sort(key=lambda span: span[:2])
    found: dict[int, str] = {}
    furthest: tuple[int, tuple[Home, ...]] | None = None
    for begin, end, homes in spans:
        if furthest is not None and begin < furthest[0]:
            for one, other in ((homes, furthest[1]), (furthest[1], homes)):
                found.setdefault(id(one), f"{other[0].path}.{other[0].name}".lstrip("."))
        if furthest is None or end > furthest[0]:
            furthest = end, homes
    return found
