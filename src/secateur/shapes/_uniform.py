"""Can a config say how large a shrunk model is? Then it is an ordinary model, which every library loads.

No setting is known by its name. Those are tried whose values fit to the sizes that changed, and a model is built from
each config, without memory for its values, to see whether it has the shapes of the shrunk one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from typing import Any, TypeAlias

from torch import nn

from secateur.huggingface import skeleton
from secateur.shapes._facts import Facts
from secateur.shapes._resize import settings_of

Path: TypeAlias = tuple[str | int, ...]
Changes: TypeAlias = Mapping[Path, Any]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

_MOST_BUILDS = 400
_HEAD_SIZE = "head_dim"  # a setting that many classes read although their configs need not have it
# The size of a head does not change, but half of it gives the same shapes as half of the heads.
_HEAD_SIZES = re.compile(r"head_dim|head_size|dim_head|d_head|d_kv|kv_channels|rank")
_NO_SIZES = re.compile(r"_token_id|^_|version|dtype|seed|index$")
_ABSENT = object()


@dataclass(frozen=True)
class Uniform:
    """A config for a shrunk model, or why there is none.

    Args:
        config: of transformers, from which the model's class makes a model of the shrunk sizes; None if there is none.
        changes: its settings that differ from the original's, as a table that is nested as the config is.
        reason: why there is none.
    """

    config: Any = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""


def original_config(model: nn.Module, facts: Facts) -> Any:
    """Return the config that a model had before it was shrunk.

    Args:
        model: of transformers, shrunk.
        facts: how it differs from the original.
    """
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config(), config.get_text_config(decoder=True)):  # type: ignore[union-attr, operator]
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    for name, (before, _) in facts.config.items():
        holder, key = settings_of(config, name)
        setattr(holder, key, list(before) if isinstance(before, tuple) else before)
    return config


def find_uniform(model: nn.Module, facts: Facts) -> Uniform:
    """Look for a config from which the class of a shrunk model makes one of exactly its sizes and settings.

    Args:
        model: of transformers, shrunk.
        facts: how it differs from the original.
    """
    return _Search(model, facts).result()


class _Search:
    def __init__(self, model: nn.Module, facts: Facts) -> None:
        self._model, self._facts = model, facts
        self._config = original_config(model, facts)
        self._table: dict[str, Any] = self._config.to_dict()
        self._wanted = _shapes(model)
        self._original = skeleton(type(model), self._made({}))
        self._builds = 0
        # Pairs of an old and a new size, the most frequent ones first.
        counts: dict[tuple[int, int], int] = {}
        for name, shape in facts.shapes.items():
            for pair in zip(facts.original_shapes[name], shape, strict=True):
                if pair[0] != pair[1]:
                    counts[pair] = counts.get(pair, 0) + 1
        self._pairs = sorted(counts, key=lambda pair: -counts[pair])
        self._ratios = list(dict.fromkeys(Fraction(new, old) for old, new in self._pairs))

    def result(self) -> Uniform:
        if reason := self._differing_blocks():
            return Uniform(reason=reason)
        changes: dict[Path, Any] = {}
        distance = self._distance(self._original)
        while distance:
            better = self._better(changes, distance)
            if better is None:
                return Uniform(reason=self._first_difference(changes))
            changes, distance = better
        config = self._made(changes)
        if reason := self._other_settings(skeleton(type(self._model), config)):
            return Uniform(reason=reason)
        return Uniform(config, difference(self._table, config.to_dict()))

    def _better(self, changes: dict[Path, Any], distance: int) -> tuple[dict[Path, Any], int] | None:
        """The first changes that bring the config's model nearer to the shrunk one."""
        settled = set(changes)
        single = [change for change in self._candidates() if not settled & change.keys()]
        for change in chain(single, self._with_head_sizes(single)):
            tried = {**changes, **change}
            found = self._tried(tried)
            if found is not None and found < distance:
                return tried, found
        return None

    def _tried(self, changes: Changes) -> int | None:
        """How far the model of a config is from the shrunk one; None if there is no such model."""
        if self._builds >= _MOST_BUILDS:
            return None
        self._builds += 1
        try:
            return self._distance(skeleton(type(self._model), self._made(changes)))
        except Exception:  # a config that transformers makes no model of
            return None

    def _made(self, changes: Changes) -> Any:
        table = copy.deepcopy(self._table)
        for path, value in changes.items():
            _put(table, path, value)
        config = type(self._config).from_dict(table)
        config._attn_implementation = self._config._attn_implementation
        return config

    def _distance(self, model: nn.Module) -> int:
        found = _shapes(model)
        differing = sum(
            sum(a != b for a, b in zip(found[name], shape, strict=True)) if len(found[name]) == len(shape) else 1
            for name, shape in self._wanted.items()
            if name in found
        )
        return differing + len(found.keys() ^ self._wanted.keys())

    def _candidates(self) -> Iterator[dict[Path, Any]]:
        """Changes of one setting, or of those that belong together; the likeliest first."""
        entries = [(path, value) for path, value in _entries(self._table) if not _NO_SIZES.search(_key(path))]
        numbers = [(path, value) for path, value in entries if type(value) is int and value > 0]
        for name, kept in self._facts.blocks.items():
            count = self._facts.original_blocks[name]
            for path, value in numbers:
                if value == count:
                    yield from self._fewer_blocks(path, count, kept)
        numbers.sort(key=lambda entry: bool(_HEAD_SIZES.search(_key(entry[0]))))
        for old, new in self._pairs:
            yield from ({path: new} for path, value in numbers if value == old)
        yield from (
            {path: int(value * ratio)}
            for path, value in numbers
            for ratio in self._ratios
            if (value * ratio).denominator == 1
        )
        yield from ({path: new} for path, value in entries if value is None for _, new in self._pairs)

    def _fewer_blocks(self, path: Path, count: int, kept: tuple[int, ...]) -> Iterator[dict[Path, Any]]:
        """Changes that say how many blocks there are, and drop what lists in the same config say of those that went."""
        fewer: dict[Path, Any] = {path: len(kept)}
        holder = _at(self._table, path[:-1])
        together = dict(fewer)
        for key, value in holder.items() if isinstance(holder, Mapping) else ():
            if not isinstance(value, list) or key == "architectures":
                continue
            if len(value) == count:
                together[*path[:-1], key] = [value[index] for index in kept]
            elif value and key.endswith("layers") and all(type(entry) is int and 0 <= entry < count for entry in value):
                together[*path[:-1], key] = [kept.index(entry) for entry in value if entry in kept]
        if together != fewer:
            yield together
        yield fewer

    def _with_head_sizes(self, changes: Iterable[dict[Path, Any]]) -> Iterator[dict[Path, Any]]:
        """Changes that also say how large a head is, where else this would follow from how many there are."""
        for change in changes:
            for path, value in change.items():
                old = _at(self._table, path)
                holder = _at(self._table, path[:-1])
                if type(old) is not int or type(value) is not int or not isinstance(holder, Mapping):
                    continue
                if holder.get(_HEAD_SIZE) is not None:
                    continue
                sizes = [n for n in holder.values() if type(n) is int and n > old and n % old == 0]
                for size in dict.fromkeys(n // old for n in sizes):
                    yield {**change, (*path[:-1], _HEAD_SIZE): size}

    def _differing_blocks(self) -> str:
        """Why no config can help if blocks that were alike differ in size now."""
        lengths = {len(value) for _, value in _lists(self._table)}
        seen: dict[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]] = {}
        families: dict[str, set[str]] = {}
        for name in self._wanted:
            families.setdefault(_family(name), set()).add(name)
        for name, shape in self._wanted.items():
            family = _family(name)
            if family == name or len(families[family]) in lengths:
                continue
            original = self._facts.original_shapes.get(name, shape)
            other, found = seen.setdefault((family, original), (name, shape))
            if found != shape:
                return f"{other} is {list(found)} and {name} is {list(shape)}, for which the config has one setting"
        return ""

    def _first_difference(self, changes: Changes) -> str:
        found = _shapes(skeleton(type(self._model), self._made(changes)))
        for name, shape in self._wanted.items():
            if found.get(name) != shape:
                made = list(found[name]) if name in found else "missing"
                return f"no setting of the config makes {name} {list(shape)}; it would be {made}"
        extra = next(name for name in found if name not in self._wanted)
        return f"no setting of the config leaves out {extra}"

    def _other_settings(self, made: nn.Module) -> str:
        """Why a model of the right shapes would compute something else: numbers that its modules have."""
        for path, module in made.named_modules():
            ours = self._model.get_submodule(path)
            if type(ours) is not type(module):
                return f"{path} is a {type(ours).__name__}, and would be a {type(module).__name__}"
            old_path = self._facts.original_name(path)
            old = vars(self._original.get_submodule(old_path))
            changed = self._facts.attributes.get(path, {})
            for key, value in vars(module).items():
                if key.startswith("_") or key == "training" or not _is_plain(value):
                    continue
                mine = vars(ours).get(key, _ABSENT)
                if mine is _ABSENT or _same(mine, value):
                    continue
                if key in changed:
                    return f"{path}.{key} is {mine!r:.100}, and would be {value!r:.100}"
                if not _same(value, old.get(key)) and not self._follows(value, mine, old.get(key), path, old_path):
                    return f"{path}.{key} is {mine!r:.100}, and would be {value!r:.100}"
        return ""

    def _follows(self, made: Any, ours: Any, old: Any, path: str, old_path: str) -> bool:
        """Whether a number that nothing reads is only as it was, where a new model would have the new size or place."""
        if type(made) is not int or type(old) is not int or ours != old or old <= 0:
            return False
        moved = str(made) in path.split(".") and str(old) in old_path.split(".")
        return moved or Fraction(made, old) in self._ratios


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    found = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name: tuple(tensor.shape) for name, tensor in found}


def _family(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def _entries(table: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """All numbers and empty settings of a config, those in lists and in configs inside of it too."""
    for key, value in table.items():
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            yield from _entries(value, (*path, key))
        elif isinstance(value, list):
            yield from (((*path, key, index), entry) for index, entry in enumerate(value[:1000]))
        else:
            yield (*path, key), value


def _lists(table: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _lists(value)
        elif isinstance(value, list) and value and all(type(entry) is int for entry in value):
            yield key, value


def _key(path: Path) -> str:
    return next(part for part in reversed(path) if isinstance(part, str))


def _at(table: Any, path: Path) -> Any:
    for part in path:
        table = table[part] if isinstance(part, int) or part in table else None
    return table


def _put(table: Any, path: Path, value: Any) -> None:
    _at(table, path[:-1])[path[-1]] = value


def difference(old: Mapping[str, Any], new: Mapping[str, Any], but: Container[str] = ()) -> dict[str, Any]:
    """Return the entries of a config that another one has otherwise, but for some keys, in its parts too."""
    found: dict[str, Any] = {}
    for key, value in new.items():
        if key in but:
            continue
        if isinstance(value, Mapping) and isinstance(old.get(key), Mapping):
            if inner := difference(old[key], value, but):
                found[key] = inner
        elif key not in old or old[key] != value:
            found[key] = value
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return list(one) == list(other)
    return bool(one == other) and type(one) is type(other)
