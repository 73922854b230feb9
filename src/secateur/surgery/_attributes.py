"""Find the sizes that a model's own code keeps as numbers: try which of them must change, and keep what gives the same.

A size such as ``num_heads`` or ``split_size`` is a number among others, and only the code knows what it is for. So the
numbers that are equal to a size that changed are candidates. The smallest module around all places of the units is run
on the inputs that it has in a forward pass, with some of them changed, until it returns what it did before.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from secateur._errors import RecipeError, SparsityError
from secateur.calibration import quiet
from secateur.graph import Kind
from secateur.surgery._calls import Call, Looks, difference
from secateur.surgery._journal import Journal

How: TypeAlias = Literal["scaled", "cut", "kept"]
Key: TypeAlias = tuple[str, str, int]  # class of a module, name of an attribute, index in it or -1
MOST_TRIES = 256

_NAMES: dict[Kind, str] = {
    "heads": r"head|split|inner|attn|attention|kv|query|key|value|proj|\bdim\b|_dim",
    "query_heads": r"head|split|inner|attn|attention|query|group|proj|\bdim\b|_dim",
    "ffn": r"intermediate|inner|ffn|mlp|feedforward|ff\b|expan|split|hidden_features|proj",
    "channels": r"channel|plane|feature|dim|filter|width|split|group|hidden",
    "experts": r"expert",
    "hidden": r"hidden|embed|d_model|dim$|channel|width|num_features",
    "layers": r"layer|depth|block",
}
# The size of one head, and how many query heads read one key/value head, stay as they are when whole heads go.
_NEVER: dict[Kind, str] = {
    "channels": r"image|patch|grid|window|kernel|position|head|layer",
    "hidden": r"image|patch|grid|window|kernel|position|head|layer|vocab|intermediate",
    "heads": r"(?<!all_)head_(dim|size)|size_per_head|group|hidden|embed|model|layer_(idx|id)",
    "query_heads": r"(?<!all_)head_(dim|size)|size_per_head|(kv|key|value)_?heads|hidden|embed|model|layer_(idx|id)",
}


@dataclass(frozen=True)
class Change:
    """How sizes change when units go.

    Args:
        kind: of the units.
        size: number of units before.
        kept: number after.
        scaled: sizes that become smaller in proportion: of the units, of runs of their indices, and of ratios of these.
        cut: sizes of tensors before and after.
    """

    kind: Kind
    size: int
    kept: int
    scaled: frozenset[int]
    cut: Mapping[int, int]

    def new(self, value: int, how: How) -> int | None:
        """Return what a size becomes, or None if it cannot change that way."""
        if how == "scaled" and value in self.scaled and value * self.kept % self.size == 0:
            return value * self.kept // self.size
        return self.cut.get(value) if how == "cut" else None


def sizes_of_units(
    size: int, kept: int, kind: Kind, group_size: int, places: Iterable[NDArray[np.int64]], cut: Mapping[int, int]
) -> Change:
    """Return how sizes change when units go.

    Args:
        size: number of units before.
        kept: number after.
        kind: of the units.
        group_size: units of a group, of which as many go as of any other; 0 without groups.
        places: indices of the units, int64 ``[units, width]`` each.
        cut: sizes of the dimensions that were cut, before and after.
    """
    runs = {length for indices in places if len(indices) for length in _runs(indices[0])}
    scaled = {size, *(size * run for run in runs)}
    scaled |= {size * (one // other) for one in runs for other in runs if one % other == 0}
    if group_size and size % group_size == 0 and (group_size * kept) % size == 0:
        scaled |= {group_size}
    return Change(kind, size, kept, frozenset(scaled - {0, 1}), dict(cut))


def _runs(indices: NDArray[np.int64]) -> list[int]:
    """Lengths of the runs of neighbours in one unit's indices."""
    ordered = np.sort(indices)
    edges = np.flatnonzero(np.diff(ordered) != 1) + 1
    return [len(part) for part in np.split(ordered, edges)]


@dataclass(frozen=True)
class Candidate:
    """A number of a module that may have to change.

    Args:
        key: of all candidates for which one decision is taken.
        path: qualified name of the module.
        module: that has it.
        name: of the attribute.
        index: in a tuple or list, or -1.
        value: now.
    """

    key: Key
    path: str
    module: nn.Module
    name: str
    index: int
    value: int

    def set(self, value: int, journal: Journal) -> None:
        """Give it another value."""
        made: Any = value
        if self.index >= 0:
            old = vars(self.module)[self.name]
            items = [value if index == self.index else item for index, item in enumerate(old)]
            made = torch.Size(items) if isinstance(old, torch.Size) else type(old)(items)
        journal.set(vars(self.module), self.name, made)


@dataclass
class Decisions:
    """What was found to change, by class and attribute, for the kinds of units. The next layer begins with that."""

    known: dict[tuple[Kind, Key], How] = field(default_factory=dict)


def plausible(kind: Kind, name: str) -> bool:
    """Whether an attribute of that name should change when units of a kind go."""
    name = name.lower()
    return bool(re.search(_NAMES[kind], name)) and not re.search(_NEVER.get(kind, "^$"), name)


def candidates_in(scope: nn.Module, path: str, touched: set[int], change: Change, exact: set[int]) -> list[Candidate]:
    """Return the numbers that may have to change.

    Args:
        scope: module around all places of the units.
        path: its qualified name.
        touched: ids of the modules whose tensors were cut.
        change: of the sizes.
        exact: ids of modules of which all sizes are known.
    """
    found = []
    for name, module in scope.named_modules():
        if id(module) in exact or not any(id(inner) in touched for inner in module.modules()):
            continue
        where = f"{path}.{name}".strip(".")
        for attribute, value in vars(module).items():
            if attribute.startswith("_") or attribute == "training":
                continue
            for index, number in _numbers(value):
                if number in change.scaled or number in change.cut:
                    key = (type(module).__qualname__, attribute, index)
                    found.append(Candidate(key, where, module, attribute, index, number))
    return found


def _numbers(value: object) -> Iterator[tuple[int, int]]:
    if type(value) is int:
        yield -1, value
    elif isinstance(value, tuple | list) and type(value) in (tuple, list, torch.Size):
        yield from ((index, item) for index, item in enumerate(value) if type(item) is int)


def decide(
    candidates: list[Candidate],
    change: Change,
    decisions: Decisions,
    call: Call | None,
    before: object,
    looks: Looks,
    tolerance: float,
    journal: Journal,
) -> None:
    """Change the candidates that must change, so that a module returns what it did before.

    Args:
        candidates: all numbers that may have to change.
        change: of the sizes.
        decisions: of earlier layers; the new ones are added.
        call: of the module, or None if all is decided already.
        before: what the module returned before.
        looks: which parts of its output may have other shapes.
        tolerance: how far the output may be from that.
        journal: of what is changed.

    Raises:
        RecipeError: no choice gives the same output.
    """
    keys = list(dict.fromkeys(candidate.key for candidate in candidates))
    by_key = {key: [c for c in candidates if c.key == key] for key in keys}
    if call is None:
        _apply({key: decisions.known[change.kind, key] for key in keys}, by_key, change, journal)
        return
    options = [_options(key, by_key[key], change, decisions) for key in keys]
    problem = ""
    tries = 0
    for tried in _nearest_first(options):
        mark = len(journal.changes)
        choice = dict(zip(keys, tried, strict=True))
        _apply(choice, by_key, change, journal)
        try:
            with quiet(call.module):
                found = difference(call.again(), before, looks)
        except SparsityError:
            raise
        except Exception as error:  # a wrong size is an error of any kind somewhere in the model
            gap, reason = np.inf, f"{type(error).__name__}: {error}".splitlines()[0][:200]
        else:
            gap, reason = found.error, found.reason or f"its output differs by {found.error:.1e}"
        if np.isfinite(gap) and gap <= tolerance:
            decisions.known |= {(change.kind, key): how for key, how in choice.items()}
            return
        problem = problem or reason
        journal.undo(mark)
        tries += 1
        if tries == MOST_TRIES:
            break
    names = ", ".join(f"{key[0]}.{key[1]}" for key in keys) or "no attribute"
    raise RecipeError(
        f"{call.path or 'the model'} does not work with {change.kept} of {change.size} units ({problem}). Its code "
        f"keeps sizes that were not found in {tries} tries of {names}.\nExclude this part of the model."
    )


def _apply(choice: Mapping[Key, How], by_key: Mapping[Key, list[Candidate]], change: Change, journal: Journal) -> None:
    for key, how in choice.items():
        for candidate in by_key[key]:
            new = None if how == "kept" else change.new(candidate.value, how)
            if new is not None:
                candidate.set(new, journal)


def _options(key: Key, candidates: list[Candidate], change: Change, decisions: Decisions) -> list[How]:
    """What may be done with a number, the most plausible first."""
    hows: list[How] = []
    for how in ("scaled", "cut"):
        news = {change.new(candidate.value, how) for candidate in candidates}
        if news != {None} and not any(news == {change.new(c.value, other) for c in candidates} for other in hows):
            hows.append(how)
    order: list[How] = [*hows, "kept"] if plausible(change.kind, key[1]) else ["kept", *hows]
    known = decisions.known.get((change.kind, key))
    return sorted(order, key=lambda how: how != known)


def _nearest_first(options: list[list[How]]) -> Iterator[tuple[How, ...]]:
    """All choices, those first that leave the fewest of the most plausible ones."""
    first = tuple(option[0] for option in options)
    for count in range(len(options) + 1):
        for places in itertools.combinations(range(len(options)), count):
            for others in itertools.product(*(options[place][1:] for place in places)):
                tried = list(first)
                for place, other in zip(places, others, strict=True):
                    tried[place] = other
                yield tuple(tried)
