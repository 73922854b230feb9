"""Which tensors of a batch say what is padding, and of which other tensors do they say it?"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from secateur._errors import StatisticsError

PaddingFunction: TypeAlias = Callable[[Any], Tensor | None]

EXAMPLE = "padding=lambda batch: batch['attention_mask'] != 0"

# A mask's name is that of its inputs and one of these words. In PyTorch's own layers True means padding.
_MASK = re.compile(
    r"^(?P<inputs>|.*?_)(?P<word>attention_mask|key_padding_mask|padding_mask|pad_mask|input_mask|mask)$"
)
_NO_MASK = re.compile(r"(global|cross)_att(entio)?n_mask$|head_mask$|(src|tgt|memory|loss|labels?)_mask$")
_DECODER = re.compile(r"^(decoder|tgt|target)_|^(tgt|target|trg)$|(^|_)labels$")
_IGNORED = -100  # the label of a token without a loss


@dataclass(frozen=True)
class Mask:
    """Which tokens are real.

    Args:
        name: of the tensor in the batch.
        real: bool ``[batch, length]``.
    """

    name: str
    real: Tensor

    @property
    def pads(self) -> bool:
        return not bool(self.real.all())


@dataclass(frozen=True)
class Input:
    """A tensor of the batch that is no mask, with the mask that belongs to it."""

    name: str
    tensor: Tensor
    mask: Mask | None

    def padded(self) -> Tensor:
        """Bool, in a shape that broadcasts to the tensor's: True at padded positions."""
        if self.mask is None:
            return torch.zeros((1,) * self.tensor.ndim, dtype=torch.bool, device=self.tensor.device)
        padded = ~self.mask.real.to(self.tensor.device)
        batch, length = padded.shape
        shape = self.tensor.shape
        if shape[:2] == (batch, length):
            return padded.reshape(batch, length, *[1] * (len(shape) - 2))
        if shape[:2] == (length, batch):
            return padded.T.reshape(length, batch, *[1] * (len(shape) - 2))
        return padded.reshape(batch, *[1] * (len(shape) - 2), length)


@dataclass(frozen=True)
class _Leaf:
    path: tuple[str, ...]
    name: str  # empty for a tensor that only has a position
    tensor: Tensor

    @property
    def title(self) -> str:
        return ".".join(self.path) if self.path else "the batch"


def parameter_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the arguments that ``model(*sequence)`` fills, in order."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in positional)


def find_inputs(
    batch: Any, names: Sequence[str] = (), given: Tensor | None = None, ask: bool = True
) -> tuple[list[Input], list[Mask]]:
    """The inputs of a batch, each with its mask, and all masks, those without inputs among them.

    Args:
        batch: tensors in any nesting of dicts, lists, tuples and dataclasses.
        names: what the entries of a sequence are called, as :func:`parameter_names` says.
        given: bool ``[batch, length]``: the only mask, in place of those in the batch.
        ask: False leaves out inputs to which several masks may belong.

    Raises:
        StatisticsError: ``ask``, and several masks that disagree may belong to an input.
    """
    leaves = list(_leaves(batch, names))
    if given is not None:
        mask = Mask("padding=", given)
        contents = [leaf for leaf in leaves if _mask_name(leaf.name) is None]
        return [Input(leaf.title, leaf.tensor, mask if _fits(mask, leaf) else None) for leaf in contents], [mask]
    named = {id(leaf): match for leaf in leaves if (match := _named_mask(leaf)) is not None}
    contents = [leaf for leaf in leaves if id(leaf) not in named]
    masks = [(leaf, Mask(leaf.title, _real(leaf, named[id(leaf)], contents))) for leaf in leaves if id(leaf) in named]
    for leaf in list(contents):
        if (unnamed := _unnamed_mask(leaf, contents)) is not None:
            masks.append((leaf, unnamed))
            contents.remove(leaf)
    inputs = []
    for leaf in contents:
        possible = _masks_of(leaf, contents, masks)
        if len({mask.real.cpu().numpy().tobytes() for mask in possible}) < 2:
            inputs.append(Input(leaf.title, leaf.tensor, possible[0] if possible else None))
        elif ask:
            both = " and ".join(mask.name for mask in possible)
            raise StatisticsError(
                f"{both} have the same shape {tuple(possible[0].real.shape)} but different values, so it is not known "
                f"which of them says what is padding in {leaf.title}.\nSay it with {EXAMPLE}, True for real tokens."
            )
    return inputs, [mask for _, mask in masks]


def _leaves(tree: Any, names: Sequence[str] = (), path: tuple[str, ...] = ()) -> Iterator[_Leaf]:
    if isinstance(tree, Tensor):
        name = path[-1] if path else (names[0] if names else "")
        yield _Leaf(path, "" if name.isdigit() else name, tree)
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (), (*path, str(key)))
    elif isinstance(tree, tuple | list):
        for number, value in enumerate(tree):
            yield from _leaves(value, (), (*path, names[number] if number < len(names) else str(number)))
    elif is_dataclass(tree) and not isinstance(tree, type):
        for field in fields(tree):
            yield from _leaves(getattr(tree, field.name), (), (*path, field.name))


def _mask_name(name: str) -> re.Match[str] | None:
    return None if _NO_MASK.search(name) else _MASK.match(name)


def _named_mask(leaf: _Leaf) -> re.Match[str] | None:
    return _mask_name(leaf.name) if leaf.tensor.ndim == 2 else None


def _real(leaf: _Leaf, match: re.Match[str], contents: list[_Leaf]) -> Tensor:
    """The tokens that a mask calls real, True = real."""
    mask = leaf.tensor
    if mask.is_floating_point() and bool((mask < 0).any()):
        return mask == 0  # it is added to scores: 0 for real tokens, a large negative number for padding
    word = match["word"]
    if word in ("key_padding_mask", "padding_mask", "pad_mask"):
        # PyTorch's layers call padding True. Some models call real tokens so; their padding is all the same value.
        ones = mask != 0
        if word == "key_padding_mask" or not (_is_constant(~ones, contents) and not _is_constant(ones, contents)):
            return ~ones
    return mask != 0


def _unnamed_mask(leaf: _Leaf, contents: list[_Leaf]) -> Mask | None:
    """A tensor without a name that can hardly be anything but a mask.

    It has zeros and ones, the ones side by side in each row, and its zeros stand where another tensor has one value.
    """
    tensor = leaf.tensor
    if leaf.name or tensor.ndim != 2 or tensor.shape[1] < 2 or tensor.is_complex():
        return None
    real = tensor != 0
    if bool(real.all()) or not bool(real.any(1).all()) or not bool((tensor == real.to(tensor.dtype)).all()):
        return None
    if bool((real.int().diff(dim=1) != 0).sum(1).gt(1).any()):
        return None
    others = [other for other in contents if other is not leaf]
    return Mask(leaf.title, real) if _is_constant(~real, others) else None


def _is_constant(where: Tensor, contents: list[_Leaf]) -> bool:
    """Whether a tensor of the same leading shape has one value at all these positions."""
    fitting = [leaf.tensor for leaf in contents if leaf.tensor.shape[:2] == where.shape]
    picked = [tensor[where.to(tensor.device)].flatten() for tensor in fitting]
    return any(len(values) > 0 and bool((values == values[0]).all()) for values in picked)


def _masks_of(leaf: _Leaf, contents: list[_Leaf], masks: list[tuple[_Leaf, Mask]]) -> list[Mask]:
    """The masks that may belong to an input: in the nearest container, by name, and of its shape."""
    fitting = [(other, mask) for other, mask in masks if _fits(mask, leaf)]
    for depth in range(len(leaf.path), 0, -1):
        container = leaf.path[: depth - 1]
        near = [(other, mask) for other, mask in fitting if other.path[: depth - 1] == container]
        if found := _by_name(leaf, contents, near):
            return found
    return _masks_of_labels(leaf, contents) if _DECODER.search(leaf.name) else []


def _by_name(leaf: _Leaf, contents: list[_Leaf], masks: list[tuple[_Leaf, Mask]]) -> list[Mask]:
    def inputs_of(other: _Leaf) -> str:
        match = _MASK.match(other.name)
        return match["inputs"] if match is not None else ""

    decoder = bool(_DECODER.search(leaf.name))
    decoders = any(_DECODER.search(other.name) for other in contents)
    # A decoder's inputs are never those that an encoder's mask speaks of, nor the other way round.
    side = [(inputs_of(other), mask) for other, mask in masks
            if bool(_DECODER.search(other.name)) == decoder or not (decoder or decoders)]  # fmt: skip
    if decoder and leaf.name.endswith("labels") and not leaf.name.startswith("decoder_"):
        return []  # what labels say themselves
    named = [(prefix, mask) for prefix, mask in side if prefix and f"{leaf.name}_".startswith(prefix)]
    if named:
        longest = max(len(prefix) for prefix, _ in named)
        return [mask for prefix, mask in named if len(prefix) == longest]
    return [mask for prefix, mask in side if not prefix] or [mask for _, mask in side]


def _masks_of_labels(leaf: _Leaf, contents: list[_Leaf]) -> list[Mask]:
    labels = [other for other in contents if other.name.endswith("labels") and not other.tensor.is_floating_point()]
    masks = [
        Mask(f"{other.title} != {_IGNORED}", other.tensor != _IGNORED) for other in labels if other.tensor.ndim == 2
    ]
    return [mask for mask in masks if _fits(mask, leaf)][:1]


def _fits(mask: Mask, leaf: _Leaf) -> bool:
    shape, (batch, length) = leaf.tensor.shape, mask.real.shape
    if len(shape) < 2:
        return False
    return shape[:2] in ((batch, length), (length, batch)) or (
        len(shape) > 2 and (shape[0], shape[-1]) == (batch, length)
    )
