"""What a journal of changes says about the shapes, blocks and numbers of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from secateur.shapes import Facts, structure_hash
from secateur.surgery._journal import Journal
from secateur.surgery._slices import Tensors


def recorded(model: nn.Module, before: Mapping[str, nn.Module], journal: Journal, tensors: Tensors) -> Facts:
    """Return how a model differs from what it was before.

    Args:
        model: after the changes.
        before: its modules by the names that they had.
        journal: of the changes.
        tensors: which of their indices are left.
    """
    first: dict[tuple[int, str], Any] = {}
    for change in journal.changes:
        first.setdefault((id(change.table), change.key), change.old)
    found: dict[str, dict[str, Any]] = {
        name: {} for name in ("shapes", "original_shapes", "blocks", "original_blocks", "attributes", "config", "kept")
    }
    for path, module in before.items():
        old = first.get((id(vars(module)), "_modules"))
        if old is not None:
            there = {id(child) for child in module._modules.values()}
            children = list(old.values())
            found["blocks"][path] = tuple(index for index, child in enumerate(children) if id(child) in there)
            found["original_blocks"][path] = len(children)
    for path, module in model.named_modules(remove_duplicate=False):
        _add_tensors(found, path, module, first, tensors)
        for name, value in vars(module).items():
            old = first.get((id(vars(module)), name))
            if _is_sizes(value) and _is_sizes(old) and value != old:
                found["attributes"].setdefault(path, {})[name] = value if type(value) is int else tuple(value)
    old, new = first.get((id(vars(model)), "config")), vars(model).get("config")
    if old is not None:
        found["config"] = dict(_settings(old, new, ""))
    with journal.undone():
        return Facts(**found, model_hash=structure_hash(model))


def _add_tensors(
    found: dict[str, dict[str, Any]], path: str, module: nn.Module, first: dict[tuple[int, str], Any], tensors: Tensors
) -> None:
    tables: list[dict[str, Any]] = [module._parameters, module._buffers]
    for table in tables:
        for key, tensor in table.items():
            old = first.get((id(table), key))
            if isinstance(old, Tensor):
                name = f"{path}.{key}".lstrip(".")
                found["shapes"][name], found["original_shapes"][name] = tuple(tensor.shape), tuple(old.shape)
                if key in module._non_persistent_buffers_set:
                    found["kept"][name] = tensors.kept(module, key)


def _is_sizes(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(type(item) is int for item in value)
    return type(value) is int


def _settings(old: Any, new: Any, prefix: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The settings of a configuration that differ, also of configurations inside of it."""
    for name, before in vars(old).items():
        after = vars(new).get(name)
        if name.startswith("_") or type(before) is not type(after):
            continue
        if hasattr(before, "to_dict") and hasattr(before, "__dict__"):
            yield from _settings(before, after, f"{prefix}{name}.")
        elif isinstance(before, int | list | tuple) and before != after:
            yield f"{prefix}{name}", (_flat(before), _flat(after))


def _flat(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
