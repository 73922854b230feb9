"""Put the contents of a packed file into a model: all of them, or nothing if they do not fit the model.

Everything that can fail comes first: checks, and making all new tensors and layers. What then changes the model are
assignments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur._errors import FormatError
from secateur._types import dtype_name
from secateur.formats import Format
from secateur.kernels import usable_plan
from secateur.layers import swap_modules_
from secateur.nn import (
    Packed,
    PackedAs,
    PackedStack,
    linear_of,
    packed_recurrents,
    put_in_place_,
    shape_as_matrix,
)
from secateur.packing._contents import DENSE_DTYPES, Contents, in_dtype
from secateur.packing._fill_stacks import (
    ADVICE,
    device_of,
    flatten_again_,
    module_at,
    new_recurrent,
    new_stacks,
)
from secateur.packing._measure import machine
from secateur.packing._pack import unpack_


@dataclass(frozen=True, eq=False)
class _WithoutZeros:
    """A dense tensor that the file has without its zeros. It is made only after its shape was found in the model."""

    packed: Format
    shape: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        return self.packed.to_dense().to(self.dtype).view(self.shape)


_Stored: TypeAlias = Tensor | _WithoutZeros


def fill_(model: nn.Module, contents: Contents, dense: bool, dtype: torch.dtype | None, path: Path) -> None:
    """Put layers and tensors into a model, after checking that they fit.

    Args:
        model: changed in place, or not at all if an error is raised.
        contents: of the file.
        dense: make all layers dense.
        dtype: floating-point dtype of all tensors that are not packed weights; None for their own.
        path: of the file, for messages.

    Raises:
        FormatError: the contents do not fit the model.
    """
    state = _state_of(model, path)
    tensors: dict[str, _Stored] = dict(contents.tensors)
    for name, shape in contents.sparse.items():
        tensors[name] = _WithoutZeros(contents.layers[name], shape, dtype or contents.layers[name].dense_dtype)
    # With other threads or versions a plan that was measured is still better than the default one.
    here = machine()
    same_machine = all(contents.machine.get(key) == here[key] for key in ("processor", "kernels"))
    swaps = _new_layers(model, contents, tensors, state, dtype, path, same_machine=same_machine)
    in_place = new_stacks(model, contents, dtype, path, same_machine=same_machine)
    replaced = {id(old) for old, _ in (*swaps, *in_place)}
    covered = {
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in replaced
        for key in module.state_dict()
    }
    covered |= {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in replaced}
    wanted = {name: tensor for name, tensor in state.items() if name not in covered}
    tensors.update((name, tensors[first]) for name, first in contents.tied.items() if first in tensors)
    _tie(tensors, wanted)
    _check(tensors, wanted, contents.absent, path)
    for module, new in swaps:
        first_tensor = next(iter(module.state_dict().values()), None)
        new.to("cpu" if first_tensor is None else device_of(first_tensor)).train(module.training)
    if dense:
        made = nn.ModuleList(new for _, new in swaps)
        unpack_(made)
        swaps = [(module, new) for (module, _), new in zip(swaps, made, strict=True)]
        whole = {id(new): nn.Parameter(new.to_dense()) for _, new in in_place if isinstance(new, PackedStack)}
        in_place = [(old, whole[id(new)]) for old, new in in_place]
    recurrent = [] if dense else new_recurrent(model, contents)
    values = _new_values({name: tensors[name] for name in wanted.keys() & tensors.keys()}, wanted, dtype)

    # From here on nothing fails.
    swap_modules_(model, [*swaps, *recurrent])
    put_in_place_(model, in_place)
    for name, value in values.items():
        owner, key = _owner(model, name)
        (owner._parameters if key in owner._parameters else owner._buffers)[key] = value  # type: ignore[assignment]
    flatten_again_(model)
    if dense:
        swap_modules_(model, [(module, module.to_dense()) for module in packed_recurrents(model).values()])


def _state_of(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The parameters and buffers that a model saves, as they are, so that tied ones are the same objects."""
    state = dict(model.state_dict(keep_vars=True))
    for name, value in state.items():
        if isinstance(value, Tensor) and is_lazy(value):
            raise FormatError(f"{path}: {name} of the model has no shape yet. Call the model once, then load.")
        try:
            owner, key = _owner(model, name)
            held = key in owner._parameters or owner._buffers.get(key) is not None
        except AttributeError:
            held = False
        if not held or not isinstance(value, Tensor):
            raise FormatError(
                f"{path}: {name} in the state of the model is neither a parameter nor a buffer, but extra state or "
                "made by a hook, which a packed file cannot fill.\nRemove it first, and load it by yourself."
            )
    return state


def _new_layers(
    model: nn.Module,
    contents: Contents,
    tensors: dict[str, _Stored],
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    path: Path,
    *,
    same_machine: bool,
) -> list[tuple[nn.Module, nn.Module]]:
    """The modules to replace, with the packed layers. Their biases leave ``tensors``; dense weights are added there."""
    swaps: list[tuple[nn.Module, nn.Module]] = []
    made: dict[str, Packed] = {}
    in_stacks = contents.stacked_layers
    for name, entry in contents.entries.items():
        if name in in_stacks:
            continue
        packed = contents.layers[contents.weights.get(name, name)]
        module = module_at(model, name, path)
        own = PackedAs.of(module)
        is_other = not entry.packed_as.embedding and (own is None or own.embedding)
        if is_other and f"{name}.weight" in state:  # such as an embedding that compressed-tensors stored as sparse
            tensors[f"{name}.weight"] = _WithoutZeros(packed, packed.shape, dtype or entry.dtype)
            continue
        bias = tensors.pop(f"{name}.bias", None)
        held = _check_layer(name, module, entry.packed_as, packed.shape, bias is not None, path)
        if bias is not None and held is not None:
            _check_one(f"{name}.bias", bias, held, path)
        made_bias = None if bias is None else _made(bias, dtype)
        plan = usable_plan(packed, entry.plan, same_machine)
        made[name] = entry.packed_as.build(packed, made_bias, plan, dtype or entry.dtype)
        if name in contents.weights and (first := made.get(contents.weights[name])) is not None:
            linear_of(made[name]).share_(linear_of(first))
        swaps.append((module, made[name]))
    for name, of in contents.modules.items():
        if of in made:  # else it is dense in the model
            module, inner = module_at(model, name, path), linear_of(made[of])
            _check_layer(name, module, contents.entries[of].packed_as, inner.packed.shape, inner.bias is not None, path)
            swaps.append((module, made[of]))
    if any(module is model for module, _ in swaps):
        raise FormatError(f"{path} has a layer without a name, which cannot be put into a model.\n{ADVICE}")
    return swaps


def _check_layer(
    name: str, module: nn.Module, packed_as: PackedAs, shape: tuple[int, int], has_bias: bool, path: Path
) -> Tensor | None:
    """Raise unless a module of the model is what was packed. Return its bias."""
    if PackedAs.of(module) != packed_as or shape_as_matrix(module) != shape:
        kind = "an embedding" if packed_as.embedding else "a convolution" if packed_as.stride else "a linear layer"
        raise FormatError(
            f"{path}: layer {name:.200} is {kind} of {shape[0]}x{shape[1]}, but in the model it is {module!r:.200}.\n"
            f"{ADVICE}"
        )
    held = linear_of(module) if isinstance(module, Packed) else module
    bias = getattr(held, "bias", None)
    if has_bias != (bias is not None):
        raise FormatError(
            f"{path}: layer {name:.200} has {'a' if has_bias else 'no'} bias, unlike the layer of the model.\n{ADVICE}"
        )
    return bias


def _tie(tensors: dict[str, _Stored], wanted: Mapping[str, Tensor]) -> None:
    """Add the tensors that are missing but that the model ties to one that is not."""
    # Tied tensors are one object, or share their memory. On the meta device no tensor has any.
    first: dict[int, str] = {}
    for name, tensor in wanted.items():
        if name in tensors and tensor.numel():
            first.setdefault(id(tensor) if tensor.is_meta else tensor.data_ptr(), name)
    for name, tensor in wanted.items():
        place = id(tensor) if tensor.is_meta else tensor.data_ptr()
        if name not in tensors and tensor.numel() and (other := first.get(place)) is not None:
            tensors[name] = tensors[other]


def _check(tensors: Mapping[str, _Stored], wanted: Mapping[str, Tensor], absent: tuple[str, ...], path: Path) -> None:
    """Raise unless the file has what the model wants: the same names, shapes and kinds of numbers."""
    missing = sorted(wanted.keys() - tensors.keys() - set(absent))
    extra = sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        what = f"lacks {missing[:5]}" if missing else f"has {extra[:5]!s:.500}"
        raise FormatError(
            f"{path} {what}, which the model {'has' if missing else 'has not'} "
            f"({len(missing)} missing, {len(extra)} unknown).\n{ADVICE}"
        )
    for name in sorted(wanted.keys() & tensors.keys()):
        _check_one(name, tensors[name], wanted[name], path)


def _check_one(name: str, stored: _Stored, wanted: Tensor, path: Path) -> None:
    if tuple(stored.shape) != tuple(wanted.shape):
        raise FormatError(
            f"{path}: {name} has the shape {list(stored.shape)}, but in the model it has {list(wanted.shape)}.\n"
            f"{ADVICE}"
        )
    # A model computes alike in any of these; float8, integers, bools and complex numbers mean something else each.
    if stored.dtype != wanted.dtype and not {stored.dtype, wanted.dtype} <= DENSE_DTYPES:
        raise FormatError(
            f"{path}: {name} is {dtype_name(stored.dtype)}, but in the model it is {dtype_name(wanted.dtype)}, and "
            f"one cannot stand for the other.\n{ADVICE}"
        )


def _made(stored: _Stored, dtype: torch.dtype | None) -> Tensor:
    return in_dtype(stored if isinstance(stored, Tensor) else stored.make(), dtype)


def _new_values(
    tensors: Mapping[str, _Stored], wanted: Mapping[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The new parameters and buffers by name. A stored tensor with two names becomes one parameter."""
    whole: dict[int, Tensor] = {}
    parameters: dict[int, nn.Parameter] = {}
    values: dict[str, Tensor] = {}
    for name, stored in tensors.items():
        if id(stored) not in whole:
            whole[id(stored)] = _made(stored, dtype)
        old = wanted[name]
        value = whole[id(stored)].to(device_of(old))
        if isinstance(old, nn.Parameter):
            value = parameters.setdefault(id(stored), nn.Parameter(value, requires_grad=old.requires_grad))
        values[name] = value
    return values


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter or buffer, and its name there."""
    where, _, key = name.rpartition(".")
    return model.get_submodule(where), key
