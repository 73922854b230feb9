"""The inputs of a model that is exported: their names, which of their sizes may be any, and others of their kind."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur._checks import known_keys
from secateur._errors import RecipeError
from secateur.reports import ExportedInput

BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past", "total"
OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")  # [batch, sequence]
_DEFAULTS = {"attention_mask": "ones", "token_type_ids": "zeros", "position_ids": "positions"}
_SMALLEST = 2  # of a size that may be any: the exporter takes a 1 for a size that is always 1


@dataclass(frozen=True)
class Inputs:
    """Inputs of a model, in order.

    Args:
        tensors: an example, by name. Sizes that may be any are at least 2.
        sizes: by the name of an input, the names of its sizes that may be any, by dimension.
        positional: how many of the first ones are given by position.
        constants: other arguments by name, which are not tensors and are part of the exported model.
        defaults: how inputs that are left out are made, by name; see ``ExportedInput``.
        longest: tokens that the model takes; None for any number.
    """

    tensors: Mapping[str, Tensor]
    sizes: Mapping[str, Mapping[int, str]]
    positional: int = 0
    constants: Mapping[str, Any] | None = None
    defaults: Mapping[str, str] | None = None
    longest: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    @property
    def reads_tokens(self) -> bool:
        """Whether the inputs are texts, any number of them and of any length."""
        return SEQUENCE in self.sizes.get("input_ids", {}).values()

    def call(self, model: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """Run the model on inputs in order."""
        named = dict(zip(self.names[self.positional :], tensors[self.positional :], strict=True))
        return model(*tensors[: self.positional], **named, **(self.constants or {}))

    def described(self) -> tuple[ExportedInput, ...]:
        """The inputs as a report has them."""
        defaults = self.defaults or {}
        return tuple(
            ExportedInput(
                name,
                str(tensor.dtype).removeprefix("torch."),
                tuple(self.sizes.get(name, {}).get(place, size) for place, size in enumerate(tensor.shape)),
                defaults.get(name, ""),
            )
            for name, tensor in self.tensors.items()
        )

    def resized(self, wanted: Mapping[str, int], *, padded: bool = False, seed: int = 0) -> dict[str, Tensor]:
        """Return inputs of other sizes, with values drawn from those of the example.

        Args:
            wanted: sizes by name; others stay as in the example.
            padded: whether the last third of tokens of all texts but the first is padding.
            seed: of the draw.
        """
        generator = torch.Generator().manual_seed(seed)
        found = {}
        for name, tensor in self.tensors.items():
            sizes = self.sizes.get(name, {})
            shape = [wanted.get(sizes.get(place, ""), size) for place, size in enumerate(tensor.shape)]
            if tensor.is_floating_point() or name == "input_ids":
                drawn = torch.randint(max(1, tensor.numel()), shape, generator=generator)
                found[name] = tensor.reshape(-1)[drawn] if tensor.numel() else tensor.new_zeros(shape)
            else:
                found[name] = _tiled(tensor, shape)
        if PAST in wanted and "position_ids" in found:
            found["position_ids"] = found["position_ids"] - found["position_ids"][:, :1] + wanted[PAST]
        mask = found.get("attention_mask")
        if padded and mask is not None and mask.ndim == 2 and mask.shape[1] > 2:
            mask[1:, -(mask.shape[1] // 3) :] = 0
        return found

    def shape_text(self, tensors: Mapping[str, Tensor]) -> str:
        """Return the shape of the first input as text, such as ``"3x7"``."""
        return "x".join(map(str, tensors[self.names[0]].shape))


def inputs_of(
    model: nn.Module, batch: object, dynamic: Mapping[str, Mapping[int, str]] | None, longest: int | None
) -> Inputs:
    """Return the inputs in one batch, named as the model's ``forward`` names them.

    Args:
        model: that takes the batch.
        batch: a tensor, a sequence of tensors, or a mapping of arguments by name.
        dynamic: sizes that may be any; None for the first of each input, and for texts the second.
        longest: tokens that the model takes.

    Raises:
        RecipeError: an argument that no exported model can have, or ``dynamic`` that does not fit.
        TypeError: a batch that is none.
    """
    constants: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        tensors = {str(name): value for name, value in batch.items() if isinstance(value, Tensor)}
        constants = {str(name): value for name, value in batch.items() if not isinstance(value, Tensor)}
        positional = 0
    else:
        values = [batch] if isinstance(batch, Tensor) else batch
        if not isinstance(values, tuple | list) or not all(isinstance(value, Tensor) for value in values):
            raise TypeError(
                "batch must be one example input: a tensor, a tuple of tensors, or a mapping of arguments by name; got "
                f"{type(batch).__name__}"
            )
        names = _positions(model)
        tensors = {next(names): value for value in values}
        positional = len(tensors)
    for name, value in constants.items():
        if value is not None and not isinstance(value, bool | int | float | str):
            raise RecipeError(
                f"input {name} is a {type(value).__name__}, and an exported model takes tensors.\nGive a module whose "
                "forward takes tensors, with a few lines that call this one."
            )
    if not tensors:
        raise RecipeError("batch has no tensor. Give one example input of the model.")
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
    sizes = _default_sizes(tensors) if dynamic is None else _checked_sizes(tensors, dynamic)
    found = Inputs(tensors, sizes, positional, constants, None, longest)
    if found.reads_tokens:
        found = replace(found, defaults={name: kind for name, kind in _DEFAULTS.items() if name in tensors})
    return replace(found, tensors=_enlarged(found))


def _positions(model: nn.Module) -> Iterator[str]:
    """Names of the arguments of a model by position, without end."""
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind in by_position:
            yield parameter.name
    number = 0
    while True:
        yield f"input.{number}"
        number += 1


def _default_sizes(tensors: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """The first size of each input, where it is that of the first one; and of texts the second, too."""
    first = next(iter(tensors.values()))
    rows = first.shape[0] if first.ndim else None
    ids = tensors.get("input_ids")
    found = {}
    for name, tensor in tensors.items():
        named = {0: BATCH} if tensor.ndim and tensor.shape[0] == rows else {}
        if ids is not None and ids.ndim == 2 and name in OF_TOKENS and tensor.shape == ids.shape:
            named[1] = SEQUENCE
        found[name] = named
    return found


def _checked_sizes(tensors: Mapping[str, Tensor], dynamic: object) -> dict[str, dict[int, str]]:
    if not isinstance(dynamic, Mapping):
        raise TypeError(
            "dynamic must map the names of inputs to the names of their sizes by dimension, such as "
            f"{{'x': {{0: 'batch'}}}}, got {type(dynamic).__name__}"
        )
    known_keys("input", dynamic, list(tensors))
    found: dict[str, dict[int, str]] = {}
    for name, named in dynamic.items():
        for place, size in named.items():
            if not isinstance(place, int) or not 0 <= place < tensors[name].ndim or not isinstance(size, str):
                raise RecipeError(
                    f"dynamic says {place!r}: {size!r} of the input {name}, whose shape is "
                    f"{list(tensors[name].shape)}. Give a dimension from 0 and a name of its size."
                )
        found[name] = dict(named)
    return found


def _enlarged(inputs: Inputs) -> Mapping[str, Tensor]:
    small = {
        size
        for name, sizes in inputs.sizes.items()
        for place, size in sizes.items()
        if inputs.tensors[name].shape[place] < _SMALLEST
    }
    return inputs.resized(dict.fromkeys(small, _SMALLEST)) if small else inputs.tensors


def _tiled(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    for place, size in enumerate(shape):
        times = -(-size // max(1, tensor.shape[place]))
        repeats = [times if index == place else 1 for index in range(tensor.ndim)]
        tensor = tensor.repeat(repeats).narrow(place, 0, size) if tensor.ndim else tensor
    return tensor.contiguous().clone()
