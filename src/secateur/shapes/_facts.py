"""What was done to a model that became smaller: enough to give another one of the original sizes the same shape.

A value that JSON can hold. It is read from files that nobody vouches for, so that everything in it is checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, TypeAlias

from secateur._errors import FormatError

Shape: TypeAlias = tuple[int, ...]
Scalar: TypeAlias = int | float | str | None  # bool is an int
Setting: TypeAlias = Scalar | tuple[Scalar, ...]

_MOST = 2**31 - 1  # of a size, and of an attribute
_MAX_ELEMENTS = 1 << 48
_MAX_DIMENSIONS = 64
_MAX_NAME = 1000  # characters
_MAX_ENTRIES = 1_000_000
_HASH = re.compile(r"(sha256:)?[0-9a-f]{64}|")
_FILE_KEYS = frozenset({"version"})
VERSION = 1


@dataclass(frozen=True)
class Facts:
    """How a shrunk model differs from the one that it was made from.

    Tensors and modules have the names that they have in the shrunk model, in which the blocks that stayed are numbered
    anew. Lists of blocks have the names that they have in the original one.

    Args:
        shapes: of each parameter and buffer whose shape changed, by name.
        original_shapes: what they were, by the same names.
        blocks: for each list of blocks that lost some, the indices of those that stayed, ascending.
        original_blocks: how many each of these lists had.
        attributes: integers, or tuples of them, that the modules' code reads, by the name of the module and that of the
            attribute. Each is at most what it was.
        config: settings of the model's ``config`` before and after, by name, with dots for a config inside of another.
        kept: for buffers that the model does not save, the indices that stayed, by dimension.
        model_hash: :func:`structure_hash` of the original model; empty to not compare it.

    Example:
        >>> from secateur.shapes import Facts
        >>> facts = Facts(
        ...     shapes={"0.weight": (3, 8)}, original_shapes={"0.weight": (4, 8)}, attributes={"0": {"out_features": 3}}
        ... )
        >>> Facts.from_dict(facts.to_dict()) == facts
        True
    """

    shapes: Mapping[str, Shape] = field(default_factory=dict)
    original_shapes: Mapping[str, Shape] = field(default_factory=dict)
    blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    original_blocks: Mapping[str, int] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, int | tuple[int, ...]]] = field(default_factory=dict)
    config: Mapping[str, tuple[Setting, Setting]] = field(default_factory=dict)
    kept: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    model_hash: str = ""

    def __bool__(self) -> bool:
        return any((self.shapes, self.blocks, self.attributes, self.config))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {
            "version": VERSION,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "original_shapes": {name: list(shape) for name, shape in self.original_shapes.items()},
            "blocks": {name: list(indices) for name, indices in self.blocks.items()},
            "original_blocks": dict(self.original_blocks),
            "attributes": {
                module: {name: _listed(value) for name, value in table.items()}
                for module, table in self.attributes.items()
            },
            "config": {name: [_listed(value) for value in pair] for name, pair in self.config.items()},
            "kept": {
                name: {str(dim): list(indices) for dim, indices in table.items()} for name, table in self.kept.items()
            },
            "model_hash": self.model_hash,
        }

    @classmethod
    def from_dict(cls, table: object) -> Facts:
        """Return the value that :meth:`to_dict` gave, after checking all of it.

        Raises:
            FormatError: naming the entry that is not as it should be.
        """
        if not isinstance(table, Mapping):
            raise FormatError(f"the sizes of a shrunk model should be a table, but are a {type(table).__name__}.")
        if type(version := table.get("version")) is not int or version < 1:
            raise FormatError(
                f"the sizes of a shrunk model have the version {version!r:.40}; expected a number from 1."
            )
        if version > VERSION:
            raise FormatError(
                f"the sizes of a shrunk model have the version {version!r:.40}, but this secateur reads up to "
                f"{VERSION}.\nUpdate it: pip install --upgrade secateur."
            )
        names = {entry.name for entry in fields(cls)}
        if unknown := sorted(map(repr, table.keys() - names - _FILE_KEYS)):
            raise FormatError(f"the sizes of a shrunk model have the unknown entry {unknown[0]:.100}.")
        if missing := sorted(names - table.keys()):
            raise FormatError(f"the sizes of a shrunk model lack the entry {missing[0]!r}.")
        shapes, originals = (
            {_name(name, what): _shape(shape, f"{what} of {name!r:.200}") for name, shape in _table(table, what)}
            for what in ("shapes", "original_shapes")
        )
        if shapes.keys() != originals.keys():
            odd = sorted(shapes.keys() ^ originals.keys())[0]
            raise FormatError(f"{odd!r:.200} should be in both shapes and original_shapes, but is in one only.")
        for name, shape in shapes.items():
            if len(shape) != len(originals[name]) or any(a > b for a, b in zip(shape, originals[name], strict=True)):
                raise FormatError(
                    f"{name:.200} has the shape {list(shape)} and had {list(originals[name])}; expected as many "
                    "dimensions, none larger than before."
                )
        blocks = {_name(n, "blocks", ""): _indices(v, f"blocks of {n!r:.200}") for n, v in _table(table, "blocks")}
        counts = {_name(n, "original_blocks", ""): _size(v, n) for n, v in _table(table, "original_blocks")}
        if blocks.keys() != counts.keys():
            odd = sorted(blocks.keys() ^ counts.keys())[0]
            raise FormatError(f"{odd!r:.200} should be in both blocks and original_blocks, but is in one only.")
        for name, indices in blocks.items():
            if indices[-1] >= counts[name]:
                raise FormatError(f"{name:.200} keeps block {indices[-1]}, but had only {counts[name]}.")
        model_hash = table["model_hash"]
        if not isinstance(model_hash, str) or not _HASH.fullmatch(model_hash):
            raise FormatError(f"model_hash is {model_hash!r:.100}; expected 64 hexadecimal digits.")
        return cls(
            shapes=shapes,
            original_shapes=originals,
            blocks=blocks,
            original_blocks=counts,
            attributes={_name(n, "attributes", ""): _attributes(n, v) for n, v in _table(table, "attributes")},
            config={_settings_name(n): _change(n, v) for n, v in _table(table, "config")},
            kept={_name(n, "kept"): _kept(n, v, shapes, originals) for n, v in _table(table, "kept")},
            model_hash=model_hash,
        )

    def original_name(self, name: str) -> str:
        """Return the name that a tensor or module of the shrunk model had in the original one.

        Raises:
            FormatError: it is in a block that the shrunk model does not have.
        """
        parts = name.split(".")
        for end in range(len(parts)):  # outer lists first, since the names of inner ones are those of the original
            indices = self.blocks.get(".".join(parts[:end]))
            if indices is not None and parts[end].isdecimal():
                if int(parts[end]) >= len(indices):
                    raise FormatError(f"{name:.200} is in block {parts[end]}, of which only {len(indices)} stayed.")
                parts[end] = str(indices[int(parts[end])])
        return ".".join(parts)

    def new_name(self, name: str) -> str | None:
        """Return the name that a tensor or module of the original model has in the shrunk one; None if it went."""
        # Lists are named as they were, so that outer names are only changed once all lists were looked at.
        parts = name.split(".")
        made = list(parts)
        for end in range(len(parts)):
            indices = self.blocks.get(".".join(parts[:end]))
            if indices is not None and parts[end].isdecimal():
                if int(parts[end]) not in indices:
                    return None
                made[end] = str(indices.index(int(parts[end])))
        return ".".join(made)

    def then(self, later: Facts) -> Facts:
        """Return both in one, if a shrunk model was shrunk again.

        Args:
            later: how the model differs now from the one that these facts are of.
        """
        shapes, originals = dict[str, Shape](), dict[str, Shape]()
        attributes, kept = dict[str, dict[str, int | tuple[int, ...]]](), dict[str, dict[int, tuple[int, ...]]]()
        for name, shape in self.shapes.items():
            if (new := later.new_name(name)) is not None:
                shapes[new], originals[new] = shape, self.original_shapes[name]
        for name, shape in later.shapes.items():
            shapes[name] = shape
            originals.setdefault(name, later.original_shapes[name])
        for module, table in self.attributes.items():
            if (new := later.new_name(module)) is not None:
                attributes[new] = dict(table)
        for module, table in later.attributes.items():
            attributes[module] = {**attributes.get(module, {}), **table}
        for name, entries_of in self.kept.items():
            if (new := later.new_name(name)) is not None:
                kept[new] = dict(entries_of)
        for name, entries_of in later.kept.items():
            mine = kept.setdefault(name, {})
            for dim, entries in entries_of.items():
                mine[dim] = tuple(mine[dim][entry] for entry in entries) if dim in mine else entries
        blocks, counts = dict(self.blocks), dict(self.original_blocks)
        for name, indices in later.blocks.items():
            old = self.original_name(name)
            blocks[old] = tuple(self.blocks[old][index] for index in indices) if old in self.blocks else indices
            counts.setdefault(old, later.original_blocks[name])
        for name in list(blocks):
            if self._lost(name, later):
                del blocks[name], counts[name]
        config = dict(self.config)
        for name, (before, after) in later.config.items():
            config[name] = (config[name][0] if name in config else before, after)
        return Facts(shapes, originals, blocks, counts, attributes, config, kept, self.model_hash)

    def _lost(self, blocks: str, later: Facts) -> bool:
        """Whether a list of blocks, by its original name, went with the block that it was in."""
        here = self.new_name(blocks)
        return here is None or later.new_name(here) is None

    def within(self, prefix: str) -> Facts:
        """Return the facts of one module of the model, as if it had been shrunk alone.

        Args:
            prefix: name of the module.
        """
        start = f"{prefix}."

        def inside(table: Mapping[str, Any]) -> dict[str, Any]:
            found = {name[len(start) :]: value for name, value in table.items() if name.startswith(start)}
            return found | ({"": table[prefix]} if prefix in table else {})

        return replace(self, **{name: inside(getattr(self, name)) for name in _NAMED}, model_hash="")

    def under(self, prefix: str) -> Facts:
        """Return the facts of a model that has the shrunk one as a module, and is otherwise as it was.

        Args:
            prefix: name of the module.
        """
        added = {
            name: {f"{prefix}.{key}" if key else prefix: value for key, value in getattr(self, name).items()}
            for name in _NAMED
        }
        return replace(self, **added, model_hash="")


_NAMED = ("shapes", "original_shapes", "blocks", "original_blocks", "attributes", "kept")


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _table(table: Mapping[str, Any], key: str) -> Iterable[tuple[Any, Any]]:
    found = table[key]
    if not isinstance(found, Mapping):
        raise FormatError(f"{key} should be a table, but is a {type(found).__name__}.")
    if len(found) > _MAX_ENTRIES:
        raise FormatError(f"{key} has {len(found):,} entries; at most {_MAX_ENTRIES:,} are read.")
    return found.items()


def _name(name: object, what: str, *others: str) -> str:
    """A qualified name of a tensor or module."""
    if not isinstance(name, str) or len(name) > _MAX_NAME or (name not in others and not all(name.split("."))):
        raise FormatError(f"{name!r:.100} in {what} is no name of a part of a model.")
    return name


def _size(value: object, what: object, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= _MOST:
        raise FormatError(f"{what!s:.300} is {value!r:.100}; expected an integer from {least} to {_MOST}.")
    return value


def _shape(value: object, what: str) -> Shape:
    if not isinstance(value, list | tuple) or not 0 < len(value) <= _MAX_DIMENSIONS:
        raise FormatError(f"{what} should be a list of 1 to {_MAX_DIMENSIONS} sizes, but is {value!r:.100}.")
    elements = 1
    for size in value:
        elements *= _size(size, what)
        if elements > _MAX_ELEMENTS:
            raise FormatError(f"{what} has more than {_MAX_ELEMENTS:,} elements.")
    return tuple(value)


def _indices(value: object, what: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not 0 < len(value) <= _MAX_ENTRIES:
        raise FormatError(f"{what} should be a list of indices, but is {value!r:.100}.")
    found = tuple(_size(index, what, 0) for index in value)
    if any(a >= b for a, b in pairwise(found)):
        raise FormatError(f"{what} should ascend, but they are {value!r:.100}.")
    return found


def _attributes(module: str, table: object) -> dict[str, int | tuple[int, ...]]:
    if not isinstance(table, Mapping):
        raise FormatError(f"attributes of {module!r:.200} should be a table, but are a {type(table).__name__}.")
    found: dict[str, int | tuple[int, ...]] = {}
    for name, value in table.items():
        # Such names are Python's own, or those of PyTorch's registers.
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("__") or len(name) > _MAX_NAME:
            raise FormatError(f"{name!r:.100} is no name of an attribute of {module!r:.200}.")
        what = f"attribute {name} of {module!r:.200}"
        if isinstance(value, list | tuple):
            if not 0 < len(value) <= _MAX_DIMENSIONS:
                raise FormatError(f"{what} should have 1 to {_MAX_DIMENSIONS} integers, but is {value!r:.100}.")
            found[name] = tuple(_size(entry, what, 0) for entry in value)
        else:
            found[name] = _size(value, what, 0)
    return found


def _settings_name(name: object) -> str:
    if not isinstance(name, str) or len(name) > _MAX_NAME or not all(p.isidentifier() for p in name.split(".")):
        raise FormatError(f"{name!r:.100} is no name of a setting of a config.")
    if any(part.startswith("_") for part in name.split(".")):
        raise FormatError(f"{name:.100} is no setting of a config that may be changed.")
    return name


def _change(name: object, pair: object) -> tuple[Setting, Setting]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise FormatError(f"config {name!r:.100} should have its values before and after, but has {pair!r:.100}.")
    before, after = pair
    return _setting(name, before), _setting(name, after)


def _setting(name: object, value: object) -> Setting:
    if isinstance(value, list | tuple):
        if len(value) > _MAX_ENTRIES:
            raise FormatError(f"config {name!r:.100} has {len(value):,} entries; at most {_MAX_ENTRIES:,} are read.")
        return tuple(_scalar(name, entry) for entry in value)
    return _scalar(name, value)


def _scalar(name: object, value: object) -> Scalar:
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, str) and len(value) <= _MAX_NAME:
        return value
    return _size(value, f"config {name!r:.100}", -_MOST)


def _kept(
    name: str, table: object, shapes: Mapping[str, Shape], originals: Mapping[str, Shape]
) -> dict[int, tuple[int, ...]]:
    if not isinstance(table, Mapping) or name not in shapes:
        raise FormatError(f"kept of {name!r:.200} should be a table of indices of a buffer with another shape.")
    found = {}
    for dim, indices in table.items():
        if not str(dim).isdecimal() or len(str(dim)) > 2 or int(dim) >= len(shapes[name]):
            raise FormatError(
                f"kept of {name!r:.200} has {dim!r:.40}; expected one of its {len(shapes[name])} dimensions."
            )
        entries = _indices(indices, f"kept of {name!r:.200}")
        if len(entries) != shapes[name][int(dim)] or entries[-1] >= originals[name][int(dim)]:
            raise FormatError(
                f"kept of {name!r:.200} has {len(entries)} indices up to {entries[-1]} in dimension {dim}; expected "
                f"{shapes[name][int(dim)]} of {originals[name][int(dim)]}."
            )
        found[int(dim)] = entries
    changed = [a != b for a, b in zip(shapes[name], originals[name], strict=True)]
    if any(differs and dim not in found for dim, differs in enumerate(changed)):
        raise FormatError(f"kept of {name!r:.200} lacks a dimension that became smaller.")
    return found
