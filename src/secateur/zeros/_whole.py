"""How large a whole model is, how much of it is zero, and how much each skipped module holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from secateur._sharding import full_tensor
from secateur.formats import Format
from secateur.nn import PackedMatrix
from secateur.reports import LayerReport, ModelWeights, SkippedLayer


@torch.no_grad()
def weights_of(model: nn.Module) -> ModelWeights:
    """Count all floating-point parameters of a model, each shared one once, packed layers as if they were dense.

    Of sharded weights all processes must call this.
    """
    weights = zeros = nbytes = without_values = 0
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        weights, nbytes = weights + parameter.numel(), nbytes + parameter.numel() * parameter.element_size()
        if parameter.is_meta:
            without_values += parameter.numel()
        else:
            zeros += _zeros(full_tensor(parameter.detach()))
    packed = [module for module in model.modules() if isinstance(module, PackedMatrix)]
    for inner in {id(found.values): found for found in packed}.values():
        rows, columns = inner.packed.shape
        size = rows * columns
        bias = 0 if inner.bias is None else inner.bias.numel()
        weights, nbytes = weights + size + bias, nbytes + (size + bias) * inner.weight_dtype.itemsize
        if inner.values.is_meta:
            without_values += size + bias
        else:
            zeros += _packed_zeros(inner.packed) + (0 if inner.bias is None else _zeros(inner.bias))
    return ModelWeights(weights, zeros, nbytes, without_values)


def _packed_zeros(packed: Format) -> int:
    """How many weights are zero: those that are not stored, and zeros among the stored ones."""
    stored = [tensor for name, tensor in packed.tensors().items() if name in packed.value_names]
    one_each = all(tensor.is_floating_point() or tensor.dtype == torch.int8 for tensor in stored)
    if not one_each or (packed.scales is not None and not bool(packed.scales.all())):
        return _zeros(packed.to_dense())
    return packed.shape[0] * packed.shape[1] - sum(int(tensor.count_nonzero()) for tensor in stored)


def _zeros(tensor: Tensor) -> int:
    if tensor.element_size() == 1:  # float8, which PyTorch does not compare
        tensor = tensor.to(torch.float32)
    return tensor.numel() - int(tensor.count_nonzero())


def considered_of(layers: Iterable[LayerReport]) -> dict[str, int]:
    """Return how many weights of each parameter were considered, by the name of the parameter."""
    considered: dict[str, int] = {}
    for layer in layers:
        name = layer.parameters[0]
        considered[name] = considered.get(name, 0) + layer.num_weights
    return considered


def weigh_skipped(
    model: nn.Module, skipped: Iterable[SkippedLayer], considered: Mapping[str, int]
) -> tuple[SkippedLayer, ...]:
    """Return skipped modules with the number of weights that each owns and that were left alone.

    Every parameter counts once, at the first module that has it.

    Args:
        model: that has the modules. The name of an entry may also be that of a parameter, or of a part of one.
        skipped: entries of the report.
        considered: by the name of a parameter, how many of its weights were not left alone.
    """
    left = {id(parameter): parameter.numel() for parameter in model.parameters() if parameter.is_floating_point()}
    by_name = dict(model.named_parameters(remove_duplicate=False))
    for name, count in considered.items():
        if (parameter := by_name.get(name)) is not None and id(parameter) in left:
            left[id(parameter)] -= count
    weighed = []
    for entry in skipped:
        weights = matrix_weights = 0
        for parameter, part in _owned(model, entry.name):
            taken = min(part, left.get(id(parameter), 0))
            if taken:
                left[id(parameter)] -= taken
                weights += taken
                matrix_weights += taken if parameter.ndim >= 2 else 0
        weighed.append(replace(entry, weights=weights, matrix_weights=matrix_weights))
    return tuple(weighed)


def _owned(model: nn.Module, name: str) -> list[tuple[nn.Parameter, int]]:
    """The parameters that a name stands for, each with how many of its weights."""
    module: nn.Module = model
    parts = name.split(".") if name else []
    while parts and isinstance(child := dict(module.named_children()).get(parts[0]), nn.Module):
        module, parts = child, parts[1:]
    if not parts:
        return [(parameter, parameter.numel()) for parameter in module.parameters(recurse=False)]
    parameter = module._parameters.get(parts[0])
    if parameter is None:
        return []
    is_index = len(parts) == 2 and parts[1].isdigit() and parameter.ndim > 2  # one matrix of a stack
    return [(parameter, parameter[0].numel() if is_index else parameter.numel())]
