"""Which units of which dimensions go: a value that can be written to a file and read back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from torch import nn

from secateur._checks import one_of
from secateur._errors import FormatError, RecipeError, naming
from secateur.files import is_there, parse_json, write_text
from secateur.graph._units import Dimension, Graph
from secateur.shapes import structure_hash

_FORMAT, _VERSION = "secateur removal", 1


@dataclass(frozen=True)
class Removal:
    """Units to remove, by dimension.

    Args:
        units: by the name of a dimension, the numbers of the units that go, ascending. For ``layers``, of blocks.
        model_hash: of the model that this was made for, as :func:`structure_hash` gives it; empty for any.
        model_name: the class of that model, for messages.

    Example:
        >>> from secateur.graph import Removal
        >>> removal = Removal({"encoder.layer": (2, 3)})
        >>> Removal.from_json(removal.to_json()) == removal
        True
    """

    units: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    model_hash: str = ""
    model_name: str = ""

    def to_json(self) -> str:
        """Return the removal as JSON text."""
        model = {"class": self.model_name, "hash": self.model_hash}
        lines = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(list(units))}" for name, units in self.units.items())
        return (
            f'{{\n "format": {json.dumps(_FORMAT)},\n "version": {_VERSION},\n "model": {json.dumps(model)},\n'
            f' "remove": {{\n  {lines}\n }}\n}}\n'
        )

    @classmethod
    def from_json(cls, text: str) -> Removal:
        """Return the removal that :meth:`to_json` wrote.

        Raises:
            FormatError: the text is no removal: not JSON, of another format or version, or with other values.
        """
        try:
            table = parse_json(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"not JSON: {error}. Give a file that secateur shrink --removal wrote.") from None
        if not isinstance(table, dict) or table.get("format") != _FORMAT:
            raise FormatError(
                f'no list of what to remove: it lacks "format": {json.dumps(_FORMAT)}. '
                "Give a file that secateur shrink --removal wrote."
            )
        if type(table.get("version")) is not int or table["version"] != _VERSION:
            raise FormatError(
                f"version {table.get('version')!r:.20} of the format, and this secateur reads version {_VERSION}. "
                "Write the file again with this secateur."
            )
        model, units = table.get("model"), table.get("remove")
        if not isinstance(model, dict) or not all(isinstance(model.get(key), str) for key in ("class", "hash")):
            raise FormatError('"model" should be an object with the texts "class" and "hash". Write the file again.')
        if not isinstance(units, dict):
            raise FormatError('"remove" should be an object: the name of a dimension, and its units that go.')
        return cls({name: _numbers(name, found) for name, found in units.items()}, model["hash"], model["class"])

    def save(self, path: str | Path) -> None:
        """Write the removal to a JSON file, which appears complete or not at all.

        Raises:
            FormatError: it cannot be written.
        """
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Removal:
        """Return the removal in a JSON file, which is not trusted: :meth:`check` says whether it fits a model.

        Raises:
            FormatError: it cannot be read, or is no such file.
        """
        path = Path(path)
        if not is_there(path) or path.is_dir():
            raise FormatError(f"{path} is no file. Give a file that secateur shrink --removal wrote.")
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise FormatError(f"{path} is not UTF-8 text. Give a file that secateur shrink --removal wrote.") from None
        with naming(path):
            return cls.from_json(text)

    def check(self, model: nn.Module, graph: Graph) -> None:
        """Raise unless these units can go from a model.

        Args:
            model: to remove them from.
            graph: what was found in it.

        Raises:
            RecipeError: the removal was made for another model; or a dimension that the model does not have, a unit
                that it does not have, all units of it, or not as many from each group as must go together.
        """
        if self.model_hash and (found := structure_hash(model)) != self.model_hash:
            raise RecipeError(
                f"the units to remove were chosen for another model: {self.model_name or 'a model'} with the hash "
                f"{self.model_hash[:12]}, and this is {type(model).__name__} with the hash {found[:12]} (of the names "
                "and shapes of its tensors).\nGive the model that they were chosen for, or choose them anew."
            )
        names = [dimension.name for dimension in graph.dimensions]
        for name, units in self.units.items():
            one_of("dimension", name, names) if names else _none(name)
            check_units(graph[name], units)


def check_units(dimension: Dimension, units: Sequence[int]) -> None:
    """Raise unless these units of a dimension can go.

    Raises:
        RecipeError: a unit that it does not have or that is listed twice, all units of it, or not as many from each
            group as must go together.
    """
    name, size, width = dimension.name or "(root)", dimension.size, dimension.group_size
    wrong = [unit for unit in units if not 0 <= unit < size]
    if wrong:
        raise RecipeError(
            f"{name} has {size} units ({dimension.kind}), counted from 0 to {size - 1}; "
            f"got {', '.join(map(str, wrong[:5]))}.\nGive numbers that it has."
        )
    if len(set(units)) != len(units):
        twice = next(unit for unit in units if list(units).count(unit) > 1)
        raise RecipeError(f"{name}: unit {twice} is listed twice. List each unit once.")
    if units and len(units) == size:
        raise RecipeError(f"{name}: all {size} units would go, and nothing passes without them. Keep at least one.")
    if width and len(units):
        counts = Counter(unit // width for unit in units)
        if len(counts) * width != size or len(set(counts.values())) != 1:
            raise RecipeError(
                f"{name}: the same number of units must go from each group of {width} in a row, which one key/value "
                f"head serves; got {', '.join(str(counts[group]) for group in range(size // width))}.\n"
                "Give as many of each group."
            )


def _numbers(name: str, found: object) -> tuple[int, ...]:
    """Units as a file lists them: different integers from 0 on, ascending."""
    units = found if isinstance(found, list) else [None]
    valid = all(type(unit) is int and unit >= 0 for unit in units)
    if not valid or any(right <= left for left, right in pairwise(units)):
        raise FormatError(
            f"{name!r}: {json.dumps(found):.60} should be a list of different numbers from 0 on, in ascending order. "
            "Write the file again."
        )
    return tuple(units)


def _none(name: str) -> None:
    raise RecipeError(f"unknown dimension {name!r}: nothing can be removed from this model.")
