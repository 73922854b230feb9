"""The parameters of a model that a packed file has as stacks, and what takes their place."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from secateur._errors import FormatError, KernelError
from secateur.kernels import usable_plan
from secateur.nn import PackedLinear, PackedRecurrent, PackedStack
from secateur.packing._contents import Contents
from secateur.packing._file import DAMAGED

ADVICE = "Give the model that was saved."
InPlace: TypeAlias = list[tuple[nn.Parameter | PackedStack, nn.Parameter | PackedStack]]


def new_stacks(
    model: nn.Module, contents: Contents, dtype: torch.dtype | None, path: Path, *, same_machine: bool
) -> InPlace:
    """Return the parameters, or the stacks, that stacks of the file replace, after checking that they fit.

    Args:
        model: that has them. It is not changed.
        contents: of the file.
        dtype: of dense weights; None for their own.
        path: of the file, for messages.
        same_machine: whether the plans of the file were measured on a machine like this.

    Raises:
        FormatError: the model has no such parameter, or one of another shape.
    """
    found: InPlace = []
    made: dict[str, PackedStack] = {}
    layers: dict[str, PackedLinear] = {}
    for name, stack in contents.stacks.items():
        old, parts = _parameter(model, name, path), {}
        for part in stack.parts:
            where = f"{name}.{part}"
            entry, packed = contents.entries[where], contents.layers[contents.weights.get(where, where)]
            plan = usable_plan(packed, entry.plan, same_machine)
            parts[part] = layers[where] = PackedLinear(packed, None, plan, dtype or entry.dtype)
            if (first := layers.get(contents.weights.get(where, ""))) is not None:
                parts[part].share_(first)
        try:
            made[name] = new = PackedStack(parts, stacked=stack.stacked, transposed=stack.transposed)
        except KernelError as error:
            raise FormatError(f"{path}: {name:.200}: {error}\n{DAMAGED}") from None
        _check_shape(name, new, old, path)
        nn.Module.to(new, device_of(old.tensor() if isinstance(old, PackedStack) else old))
        found.append((old, new.train(model.training)))
    for name, of in contents.modules.items():
        if of in made:
            old = _parameter(model, name, path)
            _check_shape(name, made[of], old, path)
            found.append((old, made[of]))
    return found


def new_recurrent(model: nn.Module, contents: Contents) -> list[tuple[nn.Module, nn.Module]]:
    """Return the dense recurrent modules that have weights among the stacks, and what runs these.

    They share their parameters until the stacks are put in place.
    """
    owners = {id(owner): owner for name in contents.stacks for owner in [model.get_submodule(name.rpartition(".")[0])]}
    return [(owner, PackedRecurrent(owner)) for owner in owners.values() if isinstance(owner, nn.RNNBase)]


def flatten_again_(model: nn.Module) -> None:
    """Let dense recurrent modules use the parameters that they have: they keep a list of them."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


def device_of(tensor: Tensor) -> torch.device:
    """Return where the values for a tensor of the model belong: of one without values, on the CPU."""
    return torch.device("cpu") if tensor.is_meta else tensor.device


def module_at(model: nn.Module, name: str, path: Path) -> nn.Module:
    """Return the module of a name, or raise FormatError."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise FormatError(f"{path} has the layer {name:.200}, but the model has not.\n{ADVICE}") from None


def _parameter(model: nn.Module, name: str, path: Path) -> nn.Parameter | PackedStack:
    """A parameter of the model, or the stack that it was packed to."""
    where, _, key = name.rpartition(".")
    owner = module_at(model, where, path)
    old = owner._parameters.get(key, owner._modules.get(key))
    if isinstance(old, nn.Parameter | PackedStack):
        return old
    raise FormatError(f"{path} has the parameter {name:.200}, but the model has not.\n{ADVICE}")


def _check_shape(name: str, new: PackedStack, old: nn.Parameter | PackedStack, path: Path) -> None:
    if new.shape != old.shape:
        raise FormatError(
            f"{path}: {name:.200} has the shape {list(new.shape)}, but in the model it has {list(old.shape)}.\n{ADVICE}"
        )
    if isinstance(old, nn.Parameter) and (not old.is_floating_point() or old.element_size() == 1):
        raise FormatError(f"{path}: {name:.200} is {old.dtype} in the model, and no packed weight.\n{ADVICE}")
