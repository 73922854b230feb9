"""What ``from_pretrained`` makes of a directory with packed weights: the model that :func:`load` returns.

The file is read and checked as :func:`load` does it, and put into the skeleton that transformers has built.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import FormatError, naming
from secateur._types import dtype_name
from secateur.files import PACKED, SHRUNK, is_there, read_config
from secateur.huggingface import Changed, change_skeletons, check_size, model_class, skeleton
from secateur.nn import PackedStack, packed_layers, packed_stacks
from secateur.packing._contents import Contents
from secateur.packing._file import DAMAGED, read_packed
from secateur.packing._fill import fill_
from secateur.shapes import Facts, facts_of, prefix_of, remember_facts, resize_, resize_any_

_ADVICE = "Load the model by the class that was saved, or with secateur.load."


def refused(model: nn.Module) -> Callable[[], str | None]:
    """Return what tells whether ``save_pretrained`` may save a model, as :class:`Changed` has it."""
    return lambda: PACKED if packed_layers(model) or packed_stacks(model) else SHRUNK if facts_of(model) else None


def _change(model: nn.Module, settings: Mapping[str, Any], path: Path | None, dtype: torch.dtype) -> Changed:
    if path is None:
        raise FormatError("the config is that of packed weights, but there is no file with them. Give their directory.")
    with naming(path, DAMAGED):
        contents = Contents.of(read_packed(path))
    shapes: list[tuple[int, ...]] = [packed.shape for packed in contents.layers.values()]
    shapes += [tuple(tensor.shape) for tensor in contents.tensors.values()]
    saved = model if type(model).__name__ == contents.model else _saved_class(model, contents, path)
    if contents.shrunk:
        with naming(path):
            resize_(saved, contents.shrunk)
            facts = contents.shrunk if saved is model else resize_any_(model, contents.shrunk, prefix_of(saved))
    else:
        facts = Facts()
    check_size(path.parent, lambda: saved, shapes)
    before = dict(saved.named_modules(remove_duplicate=False))
    parameters = dict(saved.named_parameters(remove_duplicate=False))
    fill_(saved, contents, dense=False, dtype=_asked(dtype, path), path=path)
    modules = _made(saved, before)
    values = {
        name: tensor
        for name, tensor in saved.state_dict(keep_vars=True).items()
        if not tensor.is_meta and not name.startswith(tuple(f"{made}." for made in modules))
    }
    names = {name: name for name in (*modules, *values)}
    if saved is not model:
        names = _names(saved, model, names)
        for name, new in names.items():
            if name in modules:
                _place_module(model, new, modules[name], before.get(name, parameters.get(name)), path)
            else:
                _place_tensor(model, new, values[name], path)
    given: dict[str, dict[str, Tensor]] = {}
    for name, tensor in values.items():
        if name in names:
            given.setdefault(_stored(name, contents), {})[names[name]] = tensor

    def finish() -> None:
        if facts:
            remember_facts(model, facts)

    kept = list({id(modules[name]): modules[name] for name in names if name in modules}.values())
    return Changed(finish, refused(model), given, kept, _left_out(contents, given, modules, names))


def _asked(dtype: torch.dtype, path: Path) -> torch.dtype | None:
    """The dtype that was asked for; None for that of the config, because it stands for those that are stored."""
    config = read_config(path.parent) if is_there(path.parent / "config.json") else {}
    return None if dtype_name(dtype) == config.get("dtype", config.get("torch_dtype")) else dtype


def _saved_class(model: Any, contents: Contents, path: Path) -> nn.Module:
    """A model of the class that was saved, without memory for values. Its class comes from transformers' tables."""
    names = [contents.model, *(getattr(model.config, "architectures", None) or ())]
    config = copy.deepcopy(model.config)
    made_by: Any = next(filter(None, (model_class(config, name) for name in names)), None)
    if made_by is None:
        raise FormatError(
            f"{path} has a model of the class {contents.model!r:.100}, which transformers does not have for the model "
            f"type {config.model_type!r:.100}.\nLoad it by the class that was saved."
        )
    return skeleton(made_by, config)


def _made(model: nn.Module, before: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that are new in a model, by all names that they have, without those inside of them."""
    old = {id(module) for module in before.values()}
    made: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):  # a module comes before those inside of it
        if id(module) not in old and not name.startswith(tuple(f"{outer}." for outer in made)):
            made[name] = module
    return made


def _names(saved: nn.Module, model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """For each name in the saved class that has a place in another class, the name there."""
    there, here = (f"{prefix}." if (prefix := prefix_of(part)) else "" for part in (saved, model))
    places = dict(model.named_modules(remove_duplicate=False)).keys() | model.state_dict(keep_vars=True).keys()
    found = {}
    for name in names:
        if name.startswith(there):
            new = here + name[len(there) :]
        elif here:
            new = name  # heads may have parts in common
        else:
            continue
        if new in places:
            found[name] = new
    if not found:
        raise FormatError(f"{type(model).__name__} has no weight of a {type(saved).__name__}. {_ADVICE}")
    return found


def _place_module(model: nn.Module, name: str, module: nn.Module, old: object, path: Path) -> None:
    """Put a packed module in the place of the one that the saved class has under its name."""
    where, _, key = name.rpartition(".")
    owner = model.get_submodule(where)
    held = owner._parameters.get(key) if isinstance(module, PackedStack) else owner._modules.get(key)
    if held is None or _sizes(held) != _sizes(old):
        raise FormatError(
            f"{path}: {name:.200} has the sizes {_sizes(old)}, but in {type(model).__name__} it has "
            f"{_sizes(held)}.\n{_ADVICE}"
        )
    owner._parameters.pop(key, None)
    owner._modules[key] = module


def _place_tensor(model: nn.Module, name: str, tensor: Tensor, path: Path) -> None:
    where, _, key = name.rpartition(".")
    owner = model.get_submodule(where)
    table: dict[str, Any] = owner._parameters if key in owner._parameters else owner._buffers
    held = table.get(key)
    if held is None or held.shape != tensor.shape:
        raise FormatError(
            f"{path}: {name:.200} has the shape {_sizes(tensor)}, but in {type(model).__name__} it has "
            f"{_sizes(held)}.\n{_ADVICE}"
        )
    table[key] = tensor


def _sizes(held: object) -> Any:
    """The sizes of a tensor, or of each tensor of a module by name."""
    if isinstance(held, nn.Module):
        return {name: list(tensor.shape) for name, tensor in held.state_dict(keep_vars=True).items()}
    return list(held.shape) if isinstance(held, Tensor) else None


def _stored(name: str, contents: Contents) -> str:
    """The name of a stored tensor that has the values of a tensor of the model."""
    first = contents.tied.get(name, name)
    return _parts(first, contents)[0] if first in contents.sparse else first


def _parts(layer: str, contents: Contents) -> list[str]:
    return [f"{layer}.{key}" for key in contents.layers[layer].tensors()]


def _left_out(
    contents: Contents,
    given: Mapping[str, object],
    modules: Mapping[str, nn.Module],
    names: Mapping[str, str],
) -> list[str]:
    """Names of stored tensors that are nowhere in the model."""
    placed = tuple(f"{name}." for name in modules if name in names)
    lost = tuple(f"{name}." for name in modules if name not in names)
    found = [name for name in contents.tensors if name not in given and not name.startswith(placed)]
    for layer in contents.layers:
        parts = _parts(layer, contents)
        if parts[0] not in given and (layer in contents.sparse or f"{layer}.".startswith(lost)):
            found += parts
    return found


change_skeletons(PACKED, _change)
