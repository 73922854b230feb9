"""Where the parameters of a model lie in its checkpoint: under other names, several in one tensor, or cut into many."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile

import torch
from torch import Tensor, nn

from secateur.files import ModelDirectory


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of a checkpoint that hold changed parameters of a model, by stored name, with the model's values.

    transformers renames, joins and cuts tensors while it loads them: it stacks the experts of a layer, or cuts a fused
    projection into three. It can turn this around, which ``save_pretrained`` does. Here its word is not taken for it:
    a tensor belongs to a parameter only if the reverse of the freshly loaded values is the stored tensor, bit for bit.

    A parameter counts as changed when it was written to after this object was made. All other tensors are not among
    these, so that they are copied as they are.

    Args:
        model: as it was loaded from the directory, before any weight changed.
        directory: of the model.
        parameters: qualified names of the parameters that may change.
    """

    def __init__(self, model: nn.Module, directory: ModelDirectory, parameters: Iterable[str]) -> None:
        self._model = model
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._groups: dict[str, list[str]] = {}
        for name in self._parameters:
            self._groups.setdefault(_neighbourhood(name), []).append(name)
        self._versions = {name: parameter._version for name, parameter in self._parameters.items()}
        # Of a stored tensor: the group, its name when reversed, and the parameters that it holds.
        self._places: dict[str, tuple[str, str, tuple[str, ...]]] = {}
        self._group, self._reversed = "", dict[str, Tensor]()
        dtypes: dict[int, dict[torch.dtype, None]] = {}
        found: Counter[str] = Counter()  # weights of each parameter that were found
        names = list(parameters)
        wanted = {id(self._parameters[name]) for name in names}
        for group, members in self._groups.items():
            # A tied parameter may be stored under some or all of its names.
            changing = [name for name in members if id(self._parameters[name]) in wanted]
            for made, counts in self._sources(group, changing).items() if changing else ():
                tensor = self._in_group(group).get(made)
                stored = None if tensor is None else directory.find(made, tensor)
                if stored is None or stored in self._places:
                    continue
                self._places[stored] = (group, made, tuple(counts))
                found.update(counts)
                for name in counts:
                    dtypes.setdefault(id(self._parameters[name]), {})[directory.dtype(stored)] = None
        self._whole = {
            id(self._parameters[name]) for name, count in found.items() if count == self._parameters[name].numel()
        }
        self.lost = tuple(name for name in names if id(self._parameters[name]) not in self._whole)
        self._dtypes = {name: tuple(dtypes.get(id(self._parameters[name]), ())) for name in names}
        self._group, self._reversed = "", {}

    @property
    def unwritable(self) -> tuple[str, ...]:
        """Names of parameters that were changed, but are not known to be in the checkpoint."""
        names = dict(self._model.named_parameters())  # each once
        return tuple(name for name in names if self._changed(name) and id(self._parameters[name]) not in self._whole)

    @torch.no_grad()
    def round_(self) -> None:
        """Give the changed parameters the precision that they will have on disk."""
        for name, dtypes in self._dtypes.items():
            if self._changed(name):
                for dtype in dtypes:
                    self._parameters[name].copy_(self._parameters[name].to(dtype))
        self._group, self._reversed = "", {}

    def __getitem__(self, stored: str) -> Tensor:
        if stored not in self:
            raise KeyError(stored)
        group, made, _ = self._places[stored]
        return self._in_group(group)[made]

    def __contains__(self, stored: object) -> bool:
        return stored in self._places and any(map(self._changed, self._places[stored][2]))

    def __iter__(self) -> Iterator[str]:
        return filter(self.__contains__, self._places)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _changed(self, name: str) -> bool:
        return self._parameters[name]._version != self._versions[name]  # PyTorch counts the changes of a tensor

    def _in_group(self, group: str) -> dict[str, Tensor]:
        """The parameters of a group as they are stored. Only the last group is kept: its tensors may be copies."""
        if self._group != group or not self._reversed:
            tensors = {name: self._parameters[name].detach() for name in self._groups[group]}
            self._group, self._reversed = group, _reverse(self._model, tensors)
        return self._reversed

    def _sources(self, group: str, changing: list[str]) -> dict[str, dict[str, int]]:
        """For each tensor that the reverse gives: how many weights of which parameters among some are in it."""
        # The reverse only moves weights. So it is applied to tensors that hold one number each, another for every
        # parameter. The steps are large, so that arithmetic, if there is some, gives no other parameter's number.
        numbers = {name: 7919 * (index + 1) for index, name in enumerate(self._groups[group])}
        marks = {
            name: torch.tensor(number, dtype=torch.int32).expand(self._parameters[name].shape)
            for name, number in numbers.items()
        }
        found: dict[str, dict[str, int]] = {}
        for made, mark in _reverse(self._model, marks).items():
            if not mark.numel() or mark.dtype != torch.int32:
                continue
            low, high = (int(end) for end in mark.aminmax())
            among = [name for name in changing if low <= numbers[name] <= high]
            if low == high:
                counts = {name: mark.numel() for name in among}
            else:
                counts = {name: int((mark == numbers[name]).count_nonzero()) for name in among}
            if any(counts.values()):
                found[made] = {name: count for name, count in counts.items() if count}
        return found


def _reverse(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters in the form in which the checkpoint of a model stores them, as far as transformers knows it."""
    revert = importlib.import_module("transformers.core_model_loading").revert_weight_conversion
    try:
        made: dict[str, Tensor] = revert(model, dict(tensors))
    except Exception:  # a conversion that has no reverse: then what has the same values is found, and nothing else
        return tensors
    return made


def _neighbourhood(name: str) -> str:
    """The repeated block that a parameter belongs to: what is stored together is not spread over several of them."""
    parts = name.split(".")
    block = list(takewhile(lambda part: not part.isdigit(), parts))
    return ".".join(parts[: len(block) + 1]) if len(block) < len(parts) else ""
