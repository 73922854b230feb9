"""Does a config describe a model of about the size of the stored weights? Asked before it is built."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur._errors import FormatError

_REPEATED = re.compile(r"(layer|depth|expert|block)s?$")  # what is built one by one, with stored tensors of its own
_COUNTED = re.compile(r"^(num|n)_(?!param)")  # what is built in a loop, perhaps

# Below these, a wrong count costs seconds at most. Layers may share their weights, and heads may be missing.
_FEW_REPEATED = 1_000
_FEW_COUNTED = 1 << 20
_SMALL = 100_000_000  # numbers in the parameters and buffers of a model
_FACTOR = 2  # a checkpoint may lack a head, and buffers are computed

_CORRECT = "Correct the config, or complete the weights."


def check_counts(path: Path, config: Mapping[str, Any], shapes: Sequence[Sequence[int]]) -> None:
    """Raise if a config counts more layers, experts or other parts than the weights can have.

    Args:
        path: of the model directory, for errors.
        config: contents of ``config.json``.
        shapes: of all stored tensors.

    Raises:
        FormatError: naming the entry.
    """
    most = max(len(shapes), max((max(shape, default=0) for shape in shapes), default=0))
    for name, number in _integers(config):
        key = name.rpartition(".")[2]
        few = _FEW_REPEATED if _REPEATED.search(key) else _FEW_COUNTED if _COUNTED.match(key) else math.inf
        if number > max(few, most):
            raise FormatError(
                f"{path}: the config has {name} = {number:,}, but there are {len(shapes):,} tensors of weights, none "
                f"with a side above {most:,}. {_CORRECT}"
            )


def check_size(path: Path, build: Callable[[], nn.Module], shapes: Sequence[Sequence[int]]) -> None:
    """Raise if a model is far larger than the weights that are stored for it. It is built without memory for values.

    Args:
        path: of the model directory, for errors.
        build: makes the model.
        shapes: of all stored tensors.

    Raises:
        FormatError: with both sizes.
    """
    with torch.device("meta"):
        model = build()
    built = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    stored = sum(math.prod(shape) for shape in shapes)
    if built > _FACTOR * stored + _SMALL:
        raise FormatError(
            f"{path}: the config describes a model of {built:,} numbers, but the weights have {stored:,}. {_CORRECT}"
        )


def _integers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """All integers in a table, with the names of the entries that hold them."""
    waiting = [(name, value)]
    while waiting:  # no recursion: the table is as deep as somebody made it
        name, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(f"{name}.{key}" if name else str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(name, inner) for inner in value]
        elif isinstance(value, int):
            yield name, value
