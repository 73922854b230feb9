"""The sizes that layers of PyTorch keep beside their tensors."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from secateur._errors import RecipeError
from secateur.layers import transposed_linear
from secateur.surgery._journal import Journal
from secateur.surgery._slices import Cut


def update_layer_sizes(module: nn.Module, cuts: Iterable[tuple[str, Cut]], journal: Journal) -> bool:
    """Make the sizes that a layer of a known class has for itself those of its tensors.

    Args:
        module: some of whose tensors were cut.
        cuts: of them, by the name of the parameter or buffer.
        journal: of what is changed.

    Returns:
        Whether the class is known. The sizes of others must be found by trying.

    Raises:
        RecipeError: a grouped layer would have groups of different sizes.
    """
    cuts = list(cuts)
    sizes = _sizes(module, cuts)
    if sizes is None:
        return False
    for name, value in sizes.items():
        if type(value) is list or getattr(module, name, None) != value:
            journal.set(vars(module), name, value)
    return True


def _sizes(module: nn.Module, cuts: list[tuple[str, Cut]]) -> dict[str, object] | None:
    weight = getattr(module, "weight", None)
    shape = () if weight is None else tuple(weight.shape)
    if isinstance(module, nn.Linear):
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(module, _ConvNd):
        return _conv_sizes(module, shape, cuts)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    if isinstance(module, _NormBase):
        held = next((t for t in (weight, module.running_mean) if t is not None), None)
        return {} if held is None else {"num_features": len(held)}
    if isinstance(module, nn.GroupNorm):
        return _group_norm_sizes(module, shape, cuts)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return {"normalized_shape": shape} if shape else {}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": shape[0]}
    if isinstance(module, nn.Bilinear):
        return {"out_features": shape[0], "in1_features": shape[1], "in2_features": shape[2]}
    if isinstance(module, nn.RNNBase):
        return _recurrent_sizes(module, cuts)
    transposed = transposed_linear()
    if transposed is not None and isinstance(module, transposed):
        return {"nx": shape[0], "nf": shape[1]}
    return None


def _recurrent_sizes(module: nn.RNNBase, cuts: list[tuple[str, Cut]]) -> dict[str, object]:
    """A recurrent layer can lose inputs. What it remembers goes round, and all parts of its matrices have its size."""
    for name, cut in cuts:
        if not (name.startswith("weight_ih_l0") and cut.dim == 1):
            raise RecipeError(
                f"{name} of a {type(module).__name__} would lose indices of dimension {cut.dim}, but only inputs can "
                "go: its state has one size in all of its tensors.\nExclude it."
            )
    names = [name for name in module._flat_weights_names if isinstance(name, str)]
    return {
        "input_size": module._parameters["weight_ih_l0"].shape[1],  # type: ignore[union-attr]
        "_flat_weights": [
            module._parameters[name] for name in names
        ],  # it computes with these, not with its parameters
    }


def _conv_sizes(module: _ConvNd, shape: tuple[int, ...], cuts: list[tuple[str, Cut]]) -> dict[str, object]:
    # A weight is [out, in / groups, *kernel], or [in, out / groups, *kernel] if the convolution is transposed.
    groups = module.groups
    for name, cut in cuts:
        if name == "weight" and cut.dim == 0 and groups > 1:
            groups = _groups_left(cut, groups)
    first, second = (
        ("in_channels", "out_channels") if isinstance(module, _ConvTransposeNd) else ("out_channels", "in_channels")
    )
    return {first: shape[0], second: shape[1] * groups, "groups": groups}


def _group_norm_sizes(module: nn.GroupNorm, shape: tuple[int, ...], cuts: list[tuple[str, Cut]]) -> dict[str, object]:
    groups = module.num_groups
    for name, cut in cuts:
        if name == "weight" and groups > 1:
            groups = _groups_left(cut, groups)
    return {"num_channels": shape[0], "num_groups": groups} if shape else {}


def _groups_left(cut: Cut, groups: int) -> int:
    """How many groups have indices left. Each must have the same number of them."""
    counts = np.bincount(cut.kept // (cut.old // groups), minlength=groups)
    if len(set(counts[counts > 0])) > 1:
        raise RecipeError(
            f"a layer with {groups} groups would have between {counts[counts > 0].min()} and {counts.max()} channels "
            "in a group, but all groups must have the same size.\nRemove whole groups, or as many channels of each."
        )
    return int((counts > 0).sum())
