"""Put the contents of a packed file into a model: all of them, or nothing if they do not fit the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur._errors import FormatError
from secateur.formats import Format
from secateur.kernels import usable_plan
from secateur.layers import swap_modules_
from secateur.nn import Packed, PackedAs, linear_of, shape_as_matrix
from secateur.packing._contents import Contents
from secateur.packing._measure import machine
from secateur.packing._pack import unpack_


def fill_(model: nn.Module, contents: Contents, dense: bool, dtype: torch.dtype | None, path: Path) -> None:
    """Put layers and tensors into a model, after checking that they fit.

    Args:
        model: changed in place.
        contents: of the file.
        dense: make all layers dense.
        dtype: floating-point dtype of all tensors that are not packed weights; None for their own.
        path: of the file, for messages.

    Raises:
        FormatError: the contents do not fit the model.
    """
    # With other threads or versions a plan that was measured is still better than the default one.
    here = machine()
    same_machine = all(contents.machine.get(key) == here[key] for key in ("processor", "kernels"))
    tensors = dict(contents.tensors)
    whole: dict[
        int, tuple[Format, torch.dtype]
    ] = {}  # by the id of a tensor on the meta device, which has only its shape

    def stand_in(packed: Format, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = torch.empty(shape, dtype=dtype, device="meta")
        whole[id(made)] = packed, dtype
        return made

    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    for name, shape in contents.sparse.items():
        tensors[name] = stand_in(contents.layers[name], shape, dtype or contents.layers[name].dense_dtype)
    state = model.state_dict()
    swaps: list[tuple[nn.Module, nn.Module]] = []
    made: dict[str, Packed] = {}
    for name, entry in contents.entries.items():
        packed = contents.layers[contents.weights.get(name, name)]
        module = _module(model, name, path)
        own = PackedAs.of(module)
        if own is None and f"{name}.weight" in state:  # such as an embedding: compressed-tensors compresses them, too
            tensors[f"{name}.weight"] = stand_in(packed, packed.shape, dtype or entry.dtype)
            continue
        if own != entry.packed_as or shape_as_matrix(module) != packed.shape:
            raise FormatError(
                f"{path}: layer {name} is a {'convolution' if entry.packed_as.stride else 'linear layer'} of "
                f"{packed.shape[0]}x{packed.shape[1]}, but in the model it is {module!r:.200}.\n"
                "Give the model that was saved."
            )
        bias = tensors.pop(f"{name}.bias", None)
        held = linear_of(module) if isinstance(module, Packed) else module
        if (bias is None) != (held.bias is None):
            raise FormatError(
                f"{path}: layer {name} has {'no' if bias is None else 'a'} bias, unlike the layer of the model.\n"
                "Give the model that was saved."
            )
        plan = usable_plan(packed, entry.plan) if same_machine else None
        made[name] = entry.packed_as.build(packed, bias, plan, dtype or entry.dtype)
        if name in contents.weights and (first := made.get(contents.weights[name])) is not None:
            linear_of(made[name]).share_(linear_of(first))
        swaps.append((module, made[name]))
    swaps += [(_module(model, name, path), made[of]) for name, of in contents.modules.items() if of in made]
    replaced = {id(module) for module, _ in swaps}
    covered = {
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in replaced
        for key in module.state_dict()
    }
    wanted = {name: tensor for name, tensor in state.items() if name not in covered}
    tensors.update((name, tensors[first]) for name, first in contents.tied.items() if first in tensors)
    _tie(tensors, wanted)
    missing = sorted(wanted.keys() - tensors.keys() - set(contents.absent))
    extra = sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        what = f"lacks {missing[:5]}" if missing else f"has {extra[:5]}"
        raise FormatError(
            f"{path} {what}, which the model {'has' if missing else 'has not'} "
            f"({len(missing)} missing, {len(extra)} unknown).\nGive the model that was saved."
        )
    for name in wanted.keys() & tensors.keys():
        if wanted[name].shape != tensors[name].shape:
            raise FormatError(
                f"{path}: {name} has the shape {list(tensors[name].shape)}, but in the model it has "
                f"{list(wanted[name].shape)}.\nGive the model that was saved."
            )
    for module, new in swaps:
        first_tensor = next(iter(module.state_dict().values()), None)
        new.to("cpu" if first_tensor is None else _device(first_tensor)).train(module.training)
    swap_modules_(model, swaps)
    put: dict[int, nn.Parameter] = {}
    made_whole: dict[int, Tensor] = {}
    for name in wanted.keys() & tensors.keys():
        tensor = tensors[name]
        if id(tensor) in whole:
            packed, own_dtype = whole[id(tensor)]
            if id(tensor) not in made_whole:
                made_whole[id(tensor)] = packed.to_dense().to(own_dtype).view(tensor.shape)
            tensor = made_whole[id(tensor)]
        _put(model, name, tensor, put)
    if dense:
        unpack_(model)


def _tie(tensors: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Add the tensors that are missing but that the model ties to one that is not."""
    first: dict[int, str] = {}
    for name, tensor in wanted.items():
        if name in tensors and tensor.numel():
            first.setdefault(tensor.data_ptr(), name)
    for name, tensor in wanted.items():
        if name not in tensors and tensor.numel() and (other := first.get(tensor.data_ptr())) is not None:
            tensors[name] = tensors[other]


def _put(model: nn.Module, name: str, tensor: Tensor, put: dict[int, nn.Parameter]) -> None:
    """Replace a parameter or buffer. A tensor that is put under two names becomes one parameter."""
    where, _, key = name.rpartition(".")
    owner = model.get_submodule(where)
    old = owner._parameters.get(key)
    if old is not None:
        new = put.setdefault(id(tensor), nn.Parameter(tensor.to(_device(old)), requires_grad=old.requires_grad))
        owner._parameters[key] = new
    else:
        buffer = owner._buffers[key]
        owner._buffers[key] = tensor if buffer is None else tensor.to(_device(buffer))


def _device(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.is_meta else tensor.device  # a model without values gets them on the CPU


def _module(model: nn.Module, name: str, path: Path) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise FormatError(
            f"{path} has the layer {name}, but the model has not.\nGive the model that was saved."
        ) from None
