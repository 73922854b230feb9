"""The weights inside ``nn.MultiheadAttention``: query, key and value, in one parameter or in three."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from secateur.layers._kind import LayerKind, as_it_is


def attention_kinds(module: Any) -> Iterator[LayerKind]:
    """Yield the kinds of the query, key and value weights of an ``nn.MultiheadAttention``.

    Each is a layer of its own, with inputs of its own. The output projection is a layer anyway, ``out_proj``. None of
    them is called: the function that multiplies them shows their inputs.
    """
    size = module.embed_dim
    for index, letter in enumerate("qkv"):
        if module.in_proj_weight is None:  # key or value have sizes of their own
            name = f"{letter}_proj_weight"
            yield LayerKind(as_it_is, as_it_is, parameter=name, name=name)
        else:
            name, part = f"in_proj_weight.{letter}", slice(index * size, (index + 1) * size)
            yield LayerKind(as_it_is, as_it_is, parameter="in_proj_weight", name=name, part=part)
