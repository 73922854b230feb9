"""Masks of a model's parameters: from the masks of its layers, or from its zeros."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from secateur._sharding import full_tensor
from secateur._types import Mask
from secateur.layers import Layer, select_layers
from secateur.reports import PackedMask, StoredMasks


def masks(model: nn.Module, *, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> dict[str, Mask]:
    """Return masks that are read from the zeros of a model: every weight that is zero now counts as pruned.

    For a model whose report has no masks any more, because it was read from a file. Give them to
    :func:`apply_masks_` to put the zeros back into a copy.

    Args:
        model: any module, dense; call ``unpack_`` on a packed one first.
        include: glob patterns on qualified names of layers. By default all layers that :func:`prune_` would prune.
        exclude: glob patterns that win over ``include``.

    Returns:
        Masks by the qualified name of their parameter, as in a ``state_dict``: bool, in its shape and on its device,
        True = kept. A layer without zeros has a mask that prunes nothing.

    Raises:
        RecipeError: no layer is left, or a glob that matches nothing.

    Example:
        >>> import torch, secateur
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> _ = secateur.prune_(model, pattern="2:4", method="magnitude")
        >>> {name: int((~mask).sum()) for name, mask in secateur.masks(model).items()}
        {'0.weight': 16}
    """
    found: dict[str, Mask] = {}
    for layer in select_layers(model, include, exclude)[0]:
        mask = found.setdefault(layer.parameter_name, torch.ones_like(full_tensor(layer.parameter), dtype=torch.bool))
        layer.part(mask).copy_(layer.from_matrix(layer.matrix().ne(0)))
    return found


def parameter_names(layer: Layer) -> tuple[str, ...]:
    """Return the qualified names of a layer's parameter, under each module that uses it."""
    ending = layer.kind.name
    owners = (name.removesuffix(ending).rstrip(".") if ending else name for name in layer.tied_to)
    return layer.parameter_name, *(f"{owner}.{layer.kind.parameter}".lstrip(".") for owner in owners)


def packed_mask(layer: Layer, mask: Mask) -> PackedMask:
    """Return the mask ``[out, in]`` of a layer, packed, as a part of the mask of its parameter."""
    own, shape = layer.from_matrix(mask), layer.parameter.shape
    return PackedMask.of(parameter_names(layer), own, shape, layer.kind.part)


def stored_masks(pairs: Iterable[tuple[Layer, Tensor]]) -> StoredMasks:
    """Return the masks ``[out, in]`` of layers as a report keeps them."""
    return StoredMasks(packed_mask(layer, mask) for layer, mask in pairs)
