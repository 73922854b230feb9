"""Give a model of the original sizes those of a shrunk one: all of them, or none.

Everything that can fail comes first. What then changes the model are assignments.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur._errors import FormatError
from secateur.reports import ShrinkReport
from secateur.shapes._facts import Facts, Setting

_ADVICE = "Give a model like the one that was shrunk, as it was before."
_facts: WeakKeyDictionary[nn.Module, Facts] = WeakKeyDictionary()


def remember_facts(model: nn.Module, facts: Facts) -> None:
    """Note how a model that is in memory was shrunk, for :func:`facts_of`. Nothing is left on the model.

    Args:
        model: that was shrunk. Facts that are known of it are joined with the new ones.
        facts: how it differs from what it was before.
    """
    _facts[model] = _facts[model].then(facts) if model in _facts else facts


def forget_facts(model: nn.Module) -> None:
    """Note that a model is as it was, if it was shrunk and put back."""
    _facts.pop(model, None)


def facts_of(model: nn.Module) -> Facts:
    """Return how a model in memory was shrunk; empty facts if nothing is known of it, such as of a copy."""
    return _facts.get(model, Facts())


def known_facts(model: nn.Module, history: Iterable[object] = ()) -> Facts:
    """Return how a model was shrunk: what the reports in its history say, or else what is known of it in memory.

    Args:
        model: that was shrunk, or was not.
        history: reports of what was done to it, in their order. Those that are not of shrinking do not count.

    Raises:
        FormatError: a report has facts that are not as they should be.
    """
    stages = [Facts.from_dict(report.facts) for report in history if isinstance(report, ShrinkReport) and report.facts]
    return reduce(Facts.then, stages) if stages else facts_of(model)


def structure_hash(model: nn.Module) -> str:
    """Return the SHA-256 of the names and shapes of all tensors that a model saves, as hexadecimal digits.

    Values and dtypes do not count, so that it is the same in half precision, and for the model without weights.
    """
    state = model.state_dict(keep_vars=True)
    shapes = sorted((name, list(tensor.shape)) for name, tensor in state.items() if isinstance(tensor, Tensor))
    return hashlib.sha256(json.dumps(shapes, separators=(",", ":")).encode()).hexdigest()


def resize_(model: nn.Module, facts: Facts) -> Callable[[], None]:
    """Give a model of the original sizes those of the shrunk one. Its values are then arbitrary where shapes changed.

    Blocks that went are dropped, tensors get new shapes, and attributes and settings of the config their new values.
    Dtype, device (``meta`` too), ``requires_grad`` and tied weights stay.

    Args:
        model: changed in place, or not at all if an error is raised.
        facts: how the shrunk model differs.

    Returns:
        A function that puts the model back as it was, with its values.

    Raises:
        FormatError: naming what does not fit.

    Example:
        >>> import torch
        >>> from secateur.shapes import Facts
        >>> from secateur.shapes import resize_
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> facts = Facts({"0.weight": (3, 8)}, {"0.weight": (4, 8)}, attributes={"0": {"out_features": 3}})
        >>> undo = resize_(model, facts)
        >>> model[0].weight.shape, model[0].out_features
        (torch.Size([3, 8]), 3)
    """
    lists = [(_blocks(model, name, facts.original_blocks[name]), kept) for name, kept in facts.blocks.items()]
    places = {name: _place(model, facts.original_name(name), name) for name in facts.shapes}
    attributes = [
        (module, name, _fitting(module, path, name, value))
        for path, table in facts.attributes.items()
        for module in (_module(model, facts.original_name(path), path),)
        for name, value in table.items()
    ]
    config, copies = _config_of(model, facts)
    settings = [_setting(config, name, before, after) for name, (before, after) in facts.config.items()]
    for name, (owner, key) in places.items():
        shape = _held(owner, key, name).shape
        if tuple(shape) != facts.original_shapes[name]:
            raise FormatError(
                f"{name} has the shape {list(shape)} in the model, but {list(facts.original_shapes[name])} in the one "
                f"that was shrunk. {_ADVICE}"
            )
    if facts.model_hash and (found := structure_hash(model)) != facts.model_hash.removeprefix("sha256:"):
        raise FormatError(
            f"the model was made smaller from another one: the names and shapes of its tensors have the hash "
            f"{found[:12]}..., not {facts.model_hash.removeprefix('sha256:')[:12]}.... {_ADVICE}"
        )
    made: dict[int, tuple[Tensor, Tensor, str]] = {}  # the old tensor stays alive, so that its id does
    for name, (owner, key) in places.items():
        old = _held(owner, key, name)
        if id(old) not in made:
            made[id(old)] = old, _resized(model, old, name, facts), name
        elif made[id(old)][1].shape != facts.shapes[name]:
            raise FormatError(f"{name} is one tensor with {made[id(old)][2]} in the model, but has another shape.")

    # From here on nothing fails.
    tables: list[dict[str, Any]] = []
    for module in model.modules():
        for register in (module._parameters, module._buffers):
            if any(held is not None and id(held) in made for held in register.values()):
                tables.append(cast(dict[str, Any], register))
    before = [(table, dict(table)) for table in tables]
    original = [(blocks, blocks._modules) for blocks, _ in lists]
    # Another model may have the same config, which stays as it is.
    configs = [
        (module, name, copies[id(value)])
        for module in model.modules()
        for name, value in vars(module).items()
        if id(value) in copies
    ]
    values = [(holder, name, getattr(holder, name)) for holder, name, _ in (*attributes, *configs)]

    def undo() -> None:
        for table, contents in before:
            table.clear()
            table.update(contents)
        for blocks, children in original:
            blocks._modules = children
        _flatten_again(model)
        for holder, name, value in values:
            setattr(holder, name, value)

    for table, contents in before:
        table.update((key, made[id(held)][1]) for key, held in contents.items() if id(held) in made)
    _flatten_again(model)
    for blocks, kept in lists:
        drop_blocks_(blocks, kept)
    for holder, name, value in (*settings, *attributes, *configs):
        setattr(holder, name, value)
    return undo


def _flatten_again(model: nn.Module) -> None:
    """Let recurrent layers compute with the parameters that they have now, of which they keep a list."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [module._parameters[name] for name in module._flat_weights_names]


def has_sizes(model: nn.Module, facts: Facts) -> bool:
    """Return whether a model has the sizes of the shrunk one already.

    Args:
        model: of the original or the shrunk sizes, or any other.
        facts: how the shrunk model differs from the original.
    """
    try:
        shapes = {name: _held(*_place(model, name, name), name).shape for name in facts.shapes}
        names = {name: facts.new_name(name) for name in facts.blocks}
        lists = {name: _module(model, new, name) for name, new in names.items() if new is not None}
    except FormatError:
        return False
    return all(tuple(shapes[name]) == shape for name, shape in facts.shapes.items()) and all(
        len(blocks._modules) == len(facts.blocks[name]) for name, blocks in lists.items()
    )


def drop_blocks_(blocks: nn.Module, kept: Sequence[int]) -> None:
    """Keep some blocks of a list, in their order. They are numbered anew, unless they have names of their own.

    Args:
        blocks: a ``ModuleList`` or ``Sequential``, or any module whose children are the blocks.
        kept: indices of those that stay, ascending.
    """
    blocks._modules = left_children(blocks, kept)


def left_children(blocks: nn.Module, kept: Sequence[int]) -> dict[str, nn.Module | None]:
    """Return some children of a list by their new names: numbered anew, unless they have names of their own."""
    children = list(blocks._modules.items())
    numbered = all(name == str(index) for index, (name, _) in enumerate(children))
    left = [children[index] for index in kept]
    return {str(number) if numbered else name: child for number, (name, child) in enumerate(left)}


def _blocks(model: nn.Module, name: str, count: int) -> nn.Module:
    blocks = _module(model, name, name)
    found = len(blocks._modules) if isinstance(blocks, nn.ModuleList | nn.Sequential) else None
    if found != count:
        what = f"is a {type(blocks).__name__}" if found is None else f"has {found} blocks"
        raise FormatError(f"{name} {what} in the model; expected a list of {count} blocks. {_ADVICE}")
    return blocks


def _module(model: nn.Module, original: str, name: str) -> nn.Module:
    try:
        return model.get_submodule(original)
    except AttributeError:
        raise FormatError(f"{name} is no module of the model ({original}). {_ADVICE}") from None


def _place(model: nn.Module, original: str, name: str) -> tuple[nn.Module, str]:
    path, _, key = original.rpartition(".")
    return _module(model, path, name), key


def _held(owner: nn.Module, key: str, name: str) -> Tensor:
    held: Tensor | None = owner._parameters.get(key)
    held = owner._buffers.get(key) if held is None else held
    if held is None:
        raise FormatError(f"{name} is neither a parameter nor a buffer of the model. {_ADVICE}")
    if is_lazy(held):
        raise FormatError(f"{name} of the model has no shape yet. Call the model once first.")
    return held


def _resized(model: nn.Module, old: Tensor, name: str, facts: Facts) -> Tensor:
    """A tensor of the new shape. What a model does not save is computed from what it is: part of the old one."""
    shape = facts.shapes[name]
    if name in facts.kept:
        new = old.detach()
        for dim, indices in facts.kept[name].items():
            new = new.index_select(dim, torch.tensor(indices, device=old.device))
        return new
    owner, key = _place(model, facts.original_name(name), name)
    if key in owner._non_persistent_buffers_set:
        raise FormatError(
            f"{name} is a buffer that the model does not save, and which of its entries stay is not known."
        )
    new = torch.empty(shape, dtype=old.dtype, device=old.device)
    if not isinstance(old, nn.Parameter):
        return new
    parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    parameter.__dict__.update(old.__dict__)
    return parameter


def _fitting(module: nn.Module, path: str, name: str, value: int | tuple[int, ...]) -> Any:
    """The value in the form of the attribute that the module has."""
    old = vars(module).get(name)
    new = (value,) if isinstance(value, int) else value
    held = old if isinstance(old, tuple | list) else (old,)
    whole = all(type(entry) is int for entry in held) and len(held) == len(new)
    if not whole or isinstance(old, tuple | list) == isinstance(value, int):
        raise FormatError(
            f"{path or 'the model'} has {name} = {old!r:.100}, for which {value!r:.100} cannot stand: expected "
            f"{'an integer' if isinstance(value, int) else f'{len(new)} integers'}. {_ADVICE}"
        )
    if any(a > b for a, b in zip(new, held, strict=True)):
        raise FormatError(
            f"{path or 'the model'} has {name} = {old!r:.100}, which cannot become {value!r:.100}: larger."
        )
    if isinstance(value, int):
        return value
    return torch.Size(value) if isinstance(old, torch.Size) else list(value) if isinstance(old, list) else value


def _config_of(model: nn.Module, facts: Facts) -> tuple[Any, dict[int, Any]]:
    """A copy of a model's config, and for each config in the old one its copy, by the id of the former."""
    config = getattr(model, "config", None)
    if not facts.config or not hasattr(config, "__dict__"):
        return config, {}
    memo: dict[int, Any] = {}
    made = copy.deepcopy(config, memo)
    held = [config, *(value for value in vars(config).values() if type(value).__module__ == type(config).__module__)]
    return made, {id(value): memo[id(value)] for value in held if id(value) in memo and hasattr(value, "__dict__")}


def _setting(config: Any, name: str, before: Setting, after: Setting) -> tuple[Any, str, Any]:
    holder, key = settings_of(config, name)
    held = getattr(holder, key, None)
    if _plain(held) != _plain(before):
        raise FormatError(
            f"the config has {name} = {held!r:.100}, but had {before!r:.100} when the model was shrunk. {_ADVICE}"
        )
    return holder, key, list(after) if isinstance(after, tuple) and not isinstance(held, tuple) else after


def settings_of(config: Any, name: str) -> tuple[Any, str]:
    """Return the config that has a setting, which may be inside of another one, and the name that it has there.

    Raises:
        FormatError: there is no such config.
    """
    *path, key = name.split(".")
    for part in path:
        config = vars(config).get(part) if hasattr(config, "__dict__") else None
    if not hasattr(config, key) or callable(getattr(config, key)):
        raise FormatError(f"the model has no setting {name} in its config. {_ADVICE}")
    return config, key


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value
