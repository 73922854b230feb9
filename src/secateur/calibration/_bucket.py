"""Which texts of mixed length go into one batch, so that little of it is padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from secateur._checks import integer
from secateur._errors import RecipeError


class Bucket(NamedTuple):
    """The items of one batch.

    Args:
        indices: of the items in the given order, the longest first.
        length: tokens that each of them is padded to.
    """

    indices: tuple[int, ...]
    length: int


@dataclass(frozen=True)
class Buckets(Sequence[Bucket]):
    """Batches of items that are alike in length, from :func:`bucket`: a sequence, the batch of the longest items first.

    Args:
        lengths: of the items, in the given order.
        batches: the batches.
    """

    lengths: tuple[int, ...]
    batches: tuple[Bucket, ...]

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The indices of all items as the batches have them, one batch after the other."""
        return tuple(index for batch in self.batches for index in batch.indices)

    @cached_property
    def inverse(self) -> tuple[int, ...]:
        """Where each item is in :attr:`order`: ``[results[at] for at in buckets.inverse]`` is in the given order."""
        places = [0] * len(self.order)
        for at, index in enumerate(self.order):
            places[index] = at
        return tuple(places)

    @property
    def padding(self) -> float:
        """How much of all batches is padding, as a fraction of their tokens."""
        tokens = sum(len(batch.indices) * batch.length for batch in self.batches)
        return 1 - sum(self.lengths) / tokens if tokens else 0.0

    def restore(self, outputs: Iterable[Any]) -> Any:
        """Return what a model made of each batch in the given order of the items.

        Args:
            outputs: one for each batch, in the order of the batches, with one entry for each of its items: tensors
                ``[items, ...]`` or arrays of numpy, whose other sizes are equal, or lists.

        Returns:
            One tensor or array for all items; for lists, and where there are no batches, a list.

        Raises:
            RecipeError: not one output for each batch, not one entry for each item, or tensors of several shapes.
        """
        found = list(outputs)
        if len(found) != len(self.batches):
            raise RecipeError(
                f"got outputs of {len(found)} batches, but there are {len(self.batches)}. Give one for each, in order."
            )
        for at, (output, batch) in enumerate(zip(found, self.batches, strict=True)):
            if len(output) != len(batch.indices):
                raise RecipeError(
                    f"the output of batch {at} has {len(output)} entries, but its batch has {len(batch.indices)} "
                    "items. Give one entry for each item, without what fills the batch up."
                )
        kind = next((kind for kind in (Tensor, np.ndarray) if found and isinstance(found[0], kind)), None)
        if kind is None or not all(isinstance(output, kind) for output in found):
            entries = [entry for output in found for entry in output]
            return [entries[at] for at in self.inverse]
        if len(shapes := dict.fromkeys(tuple(output.shape[1:]) for output in found)) > 1:
            raise RecipeError(
                f"outputs of batches have entries of the shapes {', '.join(map(str, list(shapes)[:3]))}, which one "
                "tensor cannot hold. Give list(output) for each batch, and get a list."
            )
        places = list(self.inverse)
        return torch.cat(found)[places] if kind is Tensor else np.concatenate(found)[places]

    def __len__(self) -> int:
        return len(self.batches)

    @overload
    def __getitem__(self, index: int) -> Bucket: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Bucket]: ...
    def __getitem__(self, index: int | slice) -> Bucket | Sequence[Bucket]:
        return self.batches[index]

    def __iter__(self) -> Iterator[Bucket]:
        return iter(self.batches)

    def __repr__(self) -> str:
        return f"Buckets({len(self.lengths)} items, {len(self)} batches, {self.padding:.1%} padding)"


def bucket(
    lengths: Iterable[int],
    batch_size: int | None = None,
    *,
    max_tokens: int | None = None,
    multiple_of: int = 1,
    max_length: int | None = None,
) -> Buckets:
    """Put items of mixed length into batches of neighbours in length, so that little of a batch is padding.

    A batch is padded to its longest item, and a model computes on padding as on text. The items are sorted, the longest
    first and equal ones in the given order. Each batch takes as many of them as its limits allow: so there are as few
    batches as the limits allow, every batch but the last is full, and a lack of memory shows at the first one. Batches
    of one padded length have one number of items, but for the last: with ``multiple_of`` few shapes occur, which
    compilers and engines need.

    Args:
        lengths: tokens of each item, at least 1: ints, or a vector of PyTorch or numpy. For texts
            ``[len(ids) for ids in tokenizer(texts, truncation=True)["input_ids"]]``.
        batch_size: the most items in a batch; None for no limit but ``max_tokens``.
        max_tokens: the most tokens in a batch, padding counted: items times padded length. None for no limit but
            ``batch_size``.
        multiple_of: padded lengths are rounded up to a multiple of this.
        max_length: the most tokens that the model takes: no padded length is rounded up beyond it. None for no limit.

    Returns:
        The batches, a sequence of :class:`Bucket` (indices, length). Its ``restore`` puts outputs back in order.

    Raises:
        RecipeError: neither limit is given, an item does not fit within ``max_tokens`` or ``max_length``, or a number
            below 1.
        TypeError: lengths that are no ints, such as texts.

    Example:
        >>> import torch, secateur
        >>> texts = [[7, 7], [1, 2, 3, 4, 5], [8], [1, 2, 3, 4]]  # token ids
        >>> buckets = secateur.bucket(map(len, texts), max_tokens=10)
        >>> [(indices, length) for indices, length in buckets]
        [((1, 3), 5), ((0, 2), 2)]
        >>> sums = [torch.tensor([sum(texts[index]) for index in indices]) for indices, _ in buckets]
        >>> buckets.restore(sums)
        tensor([14, 15,  8, 10])
        >>> buckets
        Buckets(4 items, 2 batches, 14.3% padding)
    """
    given = tuple(_length(at, length) for at, length in enumerate(_plain(lengths)))
    if batch_size is None and max_tokens is None:
        raise RecipeError("a batch has no limit. Give batch_size=, max_tokens= or both.")
    most = len(given) if batch_size is None else integer("batch_size", batch_size, 1)
    multiple = integer("multiple_of", multiple_of, 1)
    longest = None if max_length is None else integer("max_length", max_length, 1)
    tokens = None if max_tokens is None else integer("max_tokens", max_tokens, 1)
    order = sorted(range(len(given)), key=lambda index: (-given[index], index))
    batches = []
    start = 0
    while start < len(order):
        first = order[start]
        length = -(-given[first] // multiple) * multiple
        if longest is not None:
            if given[first] > longest:
                raise RecipeError(
                    f"item {first} has {given[first]} tokens, but max_length is {longest}. Cut what is longer: "
                    f"tokenizer(texts, truncation=True, max_length={longest})."
                )
            length = min(length, longest)
        size = most if tokens is None else min(most, tokens // length)
        if not size:
            raise RecipeError(
                f"item {first} alone has {length} tokens in its batch, but max_tokens is {tokens}. Give at least "
                f"max_tokens={length}, or cut longer items."
            )
        batches.append(Bucket(tuple(order[start : start + size]), length))
        start += size
    return Buckets(given, tuple(batches))


def _plain(lengths: Any) -> list[Any]:
    """Lengths as a list: vectors of PyTorch and numpy as Python numbers."""
    if isinstance(lengths, str) or not isinstance(lengths, Iterable):
        raise TypeError(f"lengths must be ints, one for each item, got {type(lengths).__name__}")
    found = lengths.tolist() if hasattr(lengths, "tolist") else list(lengths)
    if not isinstance(found, list):
        raise TypeError(f"lengths must be a vector, got one number: {found}")
    return [length.item() if isinstance(length, np.integer) else length for length in found]


def _length(at: int, length: object) -> int:
    if isinstance(length, str | list | tuple):
        raise TypeError(
            f"lengths must be ints, and item {at} is a {type(length).__name__}. Give the number of tokens of each: "
            "[len(ids) for ids in tokenizer(texts, truncation=True)['input_ids']]"
        )
    return integer(f"the length of item {at}", length, 1)
