"""Take blocks out of a list, and make what counts or numbers them fit."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.graph import Dimension
from secateur.shapes import left_children
from secateur.surgery._journal import Journal

# How a number of blocks is called, and what a number of them that means something else is called, such as
# `global_attn_every_n_layers`.
_COUNTS = re.compile(r"(.*_)?(layers?|blocks?|depth)(_(num|count))?")
_NO_COUNTS = re.compile(r"every|interval|period|freq|step|skip|start|first|last|max|min|window|per_|share|dense|next")


def drop_blocks(model: nn.Module, dimension: Dimension, removed: Sequence[int], journal: Journal) -> None:
    """Take blocks out of a list, number the others again, and correct the counts of the modules around them.

    Configurations are replaced by corrected copies, because another model may have the same one.

    Args:
        model: whose list it is.
        dimension: of kind ``"layers"``.
        removed: numbers of the blocks that go.
        journal: of what is changed.
    """
    blocks = [block for block in model.get_submodule(dimension.name)._modules.values() if block is not None]
    gone = set(removed)
    kept = [index for index in range(len(blocks)) if index not in gone]
    _renumber(blocks, kept, journal)
    drop_modules(model.get_submodule(dimension.name), kept, journal)
    path = dimension.name.split(".") if dimension.name else []
    owners = [model.get_submodule(".".join(path[:length])) for length in range(len(path))]
    edit = _Edit(len(blocks), kept, path)
    for owner in owners:
        for name, value in list(vars(owner).items()):
            if not name.startswith("_") and (new := edit.of(name, value)) is not None:
                journal.set(vars(owner), name, new)
    _replace_configs(model, owners, edit, journal)


def drop_modules(holder: nn.Module, kept: Sequence[int], journal: Journal) -> None:
    """Leave only some children of a list, numbered again unless they have names of their own."""
    # Another dictionary, because a loop may run over the old one.
    journal.set(vars(holder), "_modules", left_children(holder, kept))


def _renumber(blocks: list[nn.Module], kept: list[int], journal: Journal) -> None:
    """Give attributes that count up from block to block, such as ``layer_idx``, the new numbers."""
    offsets: dict[tuple[str, str], set[int]] = {}
    places: dict[tuple[str, str], list[tuple[int, dict[str, Any]]]] = {}
    for index, block in enumerate(blocks):
        for path, module in block.named_modules():
            for name, value in vars(module).items():
                if type(value) is int and not name.startswith("_"):
                    offsets.setdefault((path, name), set()).add(value - index)
                    places.setdefault((path, name), []).append((index, vars(module)))
    new = {old: index for index, old in enumerate(kept)}
    for key, found in offsets.items():
        if len(found) == 1 and len(places[key]) > 1:
            for index, table in places[key]:
                if index in new and new[index] != index:
                    journal.set(table, key[1], table[key[1]] - index + new[index])


@dataclass(frozen=True)
class _Edit:
    """What becomes of values that say how many blocks there are, or have one entry for each.

    Args:
        count: of blocks before.
        kept: which stay.
        path: of the list of blocks.
    """

    count: int
    kept: list[int]
    path: list[str]

    def of(self, name: str, value: Any) -> Any:
        """Return the new value of an attribute, or None if it has nothing to do with the blocks."""
        if not self._fits(name):
            return None
        if type(value) is int:
            is_count = value == self.count and _COUNTS.fullmatch(name) and not _NO_COUNTS.search(name)
            return len(self.kept) if is_count else None
        if type(value) in (list, tuple):
            is_of_blocks = re.search(r"layer|block", name) is not None
            if is_of_blocks and len(value) == self.count:
                return type(value)(value[index] for index in self.kept)
            if is_of_blocks and self._are_indices(value):
                return type(value)(self.kept.index(index) for index in value if index in self.kept)
            stage = next((int(part) for part in reversed(self.path) if part.isdigit()), None)
            if "depth" in name and stage is not None and stage < len(value) and value[stage] == self.count:
                return type(value)(len(self.kept) if index == stage else item for index, item in enumerate(value))
        return None

    def _are_indices(self, value: Sequence[Any]) -> bool:
        """Whether a list names some of the blocks, as the ones with cross attention."""
        numbers = all(type(item) is int and 0 <= item < self.count for item in value)
        return numbers and len(value) > 0 and list(value) == sorted(set(value))

    def _fits(self, name: str) -> bool:
        """Whether a name is not about the other half of an encoder and a decoder."""
        path = ".".join(self.path)
        return not any(half in name and half not in path and other in path for half, other in _HALVES)


_HALVES = (("encoder", "decoder"), ("decoder", "encoder"))


def _replace_configs(model: nn.Module, owners: list[nn.Module], edit: _Edit, journal: Journal) -> None:
    """Give all modules that share a configuration with the owners of the blocks a corrected copy of it."""
    found = {id(config): config for module in model.modules() for config in _configs(module)}
    touched = {id(config) for owner in owners for config in _configs(owner)}
    copies = dict(zip(found, copy.deepcopy(list(found.values())), strict=True))
    near = {id(config) for config in _configs(owners[-1])} if owners else set()
    changed = set()
    for key, made in copies.items():
        if key not in touched:
            continue
        for name, value in list(vars(made).items()):
            # In T5, `num_layers` is that of the encoder, but in the decoder's own configuration that of the decoder.
            other_half = (
                key not in near and "decoder" in edit.path and f"num_decoder_{name.removeprefix('num_')}" in vars(made)
            )
            new = None if other_half else edit.of(name, value)
            if new is not None:
                vars(made)[name] = new
                changed.add(key)
    if not changed:
        return
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if id(value) in copies:
                journal.set(vars(module), name, copies[id(value)])


def _configs(module: nn.Module) -> list[Any]:
    return [
        value
        for name, value in vars(module).items()
        if name.endswith("config")
        and not name.startswith("_")
        and name != "generation_config"
        and hasattr(value, "__dict__")
    ]
