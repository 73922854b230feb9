"""Find the units of a model: run it once, follow the labels, and read off what can go together."""

from __future__ import annotations

import copy
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

from secateur._errors import RecipeError
from secateur.calibration import Forward, call_model, quiet
from secateur.graph._labels import Event
from secateur.graph._trace import Trace
from secateur.graph._units import Dimension, Graph, Kind, Place
from secateur.reports import Boundary


def find_units(model: nn.Module, batch: Any, forward: Forward = call_model, *, with_hidden: bool = False) -> Graph:
    """Return what can be removed inside of the layers of a model: channels, neurons, heads.

    The model runs once on a batch. It costs the memory of that forward pass, and of the labels of what is rearranged.

    Args:
        model: any module; unchanged.
        batch: one of the model's inputs.
        forward: how to call the model on a batch.
        with_hidden: look for channels of the residual stream, too. To remove one changes the norms of the others.

    Raises:
        RecipeError: the model cannot run the batch.
    """
    began = time.perf_counter()
    found = _traced(model, batch, forward, joins_norms=True)
    dimensions, boundaries = found.dimensions(), found.boundaries()
    if with_hidden:
        known = {(place.tensor, place.dim) for dimension in dimensions for place in dimension.places}
        for dimension in _traced(model, batch, forward, joins_norms=False).dimensions():
            places = {(place.tensor, place.dim) for place in dimension.places}
            if not places & known and dimension.kind != "heads":
                note = "not exact: norms are computed over fewer channels"
                name = dimension.name.removesuffix(dimension.kind).rstrip(".")
                renamed = f"{name}.hidden".lstrip(".")
                taken = sum(found.name.startswith(renamed) for found in dimensions if found.kind == "hidden")
                renamed += f"_{taken + 1}" * (taken > 0)
                dimensions.append(replace(dimension, name=renamed, kind="hidden", notes=(note,)))
        hidden = {(p.tensor, p.dim) for d in dimensions if d.kind == "hidden" for p in d.places}
        boundaries = [entry for entry in boundaries if (entry.tensor, entry.dim) not in hidden]
    return Graph(tuple(dimensions), tuple(boundaries), time.perf_counter() - began)


def _traced(model: nn.Module, batch: Any, forward: Forward, *, joins_norms: bool) -> _Found:
    trace = Trace(model, joins_norms=joins_norms)
    with quiet(model):
        batch = copy.deepcopy(batch)
        try:
            with trace.watching():
                outputs = forward(model, batch)
        except Exception as error:
            raise RecipeError(
                f"the model cannot run the example: {type(error).__name__}: {error}\n"
                "Give a batch as the model takes it, or forward=, a function of the model and a batch."
            ) from error
        trace.close(outputs)
    return _Found.of(model, trace)


@dataclass(frozen=True)
class _Found:
    """The atoms of a model, each with the smallest one that it goes together with."""

    names: tuple[str, ...]
    convolutions: frozenset[str]
    atoms: Mapping[str, tuple[NDArray[np.int64], ...]]
    roots: NDArray[np.int64]
    inputs: NDArray[np.bool_]
    attended: NDArray[np.bool_]
    events: tuple[Event, ...]
    fixed: frozenset[int]
    cut: Mapping[int, Event]
    rearranged: frozenset[int]

    @classmethod
    def of(cls, model: nn.Module, trace: Trace) -> _Found:
        roots = trace.ledger.roots()
        inputs, attended = trace.ledger.marked(roots)
        tensors = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        names = tuple(name for name in trace.atoms if name in tensors or name in buffers)
        modules = dict(model.named_modules(remove_duplicate=False))
        convolutions = frozenset(
            f"{name}.weight".lstrip(".") for name, module in modules.items() if isinstance(module, _ConvNd)
        )
        return cls(
            names,
            convolutions,
            trace.atoms,
            roots,
            inputs,
            attended,
            tuple(trace.ledger.events),
            trace.ledger.fixed_roots(roots),
            trace.ledger.cut_roots(roots),
            trace.ledger.rearranged_roots(roots),
        )

    def dimensions(self) -> list[Dimension]:
        """The dimensions of which units can go, in the order of the model's tensors."""
        members: defaultdict[int, list[tuple[str, int, NDArray[np.int64], bool]]] = defaultdict(list)
        whole: set[int] = set()
        for name in self.names:
            for dim, atoms in enumerate(self.atoms[name]):
                if len(atoms) < 2:
                    continue
                roots = self.roots[atoms]
                is_input = bool(self.inputs[atoms].any())
                order = np.argsort(roots, kind="stable")
                values, begins = np.unique(roots[order], return_index=True)
                if len(values) == 1:
                    whole.add(int(values[0]))
                for root, indices in zip(values.tolist(), np.split(order, begins[1:]), strict=True):
                    if root not in self.fixed:
                        members[root].append((name, dim, indices, is_input))
        families: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
        covered: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
        for root, places in members.items():
            signature = tuple((name, dim, len(indices), is_input) for name, dim, indices, is_input in places)
            if not any(is_input for *_, is_input in signature) or all(is_input for *_, is_input in signature):
                continue
            (covered if root in whole else families)[signature].append(root)
        made: list[tuple[Dimension, str]] = []
        for signature, members_of in families.items():
            dimension, owner = self._dimension(signature, [members[root] for root in members_of], members_of)
            if dimension.size > 1:
                made.append((dimension, owner))
            if (queries := _query_heads(dimension)) is not None:
                made.append((queries, owner))
        for signature, members_of in covered.items():
            dimension, owner = self._dimension(signature, [members[root] for root in members_of], members_of)
            if (queries := _query_heads(dimension)) is not None:
                made.append((queries, owner))
        return _named(made)

    def _dimension(self, signature: tuple[Any, ...], units: list[Any], roots: list[int]) -> tuple[Dimension, str]:
        order = sorted(range(len(units)), key=lambda unit: units[unit][0][2][0])
        places = tuple(
            Place(name, dim, np.stack([units[unit][place][2] for unit in order]), is_input)
            for place, (name, dim, _, is_input) in enumerate(signature)
        )
        kind = self._kind(signature, roots)
        owners = [name.rpartition(".")[0] for name, *_ in signature]
        where = _common(owners)
        first = next(owner for owner, (*_, is_input) in zip(owners, signature, strict=True) if not is_input)
        cut = next((self.cut[root] for root in roots if root in self.cut), None)
        is_doubtful = cut is not None or kind == "heads" or any(root in self.rearranged for root in roots)
        why = f"{cut.operation}: {cut.reason}" if cut else ""
        return Dimension(where, kind, len(units), places, cut=why, is_doubtful=is_doubtful), first

    def _kind(self, signature: tuple[Any, ...], roots: list[int]) -> Kind:
        if any(self.attended[root] for root in roots):
            return "heads"
        if any(name in self.convolutions for name, *_ in signature):
            return "channels"
        # A feed-forward reads one stream, and adds to the same one.
        read, written = set[int](), set[int]()
        for name, dim, _, is_input in signature:
            others = [atoms for place, atoms in enumerate(self.atoms[name]) if place != dim and len(atoms) > 1]
            if others:
                ends = {int(root) for root in np.unique(self.roots[others[-1]])}
                (written if is_input else read).update(ends)
        return "ffn" if len(read) == 1 and read == written else "channels"

    def boundaries(self) -> list[Boundary]:
        """Dimensions of parameters that cannot be made smaller, with the first operation that says so."""
        made = {(place.tensor, place.dim) for dimension in self.dimensions() for place in dimension.places}
        why: dict[int, Event] = {}
        for entry in self.events:
            for root in np.unique(self.roots[entry.atoms]).tolist():
                why.setdefault(root, entry)
        direct: dict[int, Event] = {}
        for entry in self.events:
            for atom in entry.atoms.tolist():
                direct.setdefault(atom, entry)
        found = []
        for name in self.names:
            for dim, atoms in enumerate(self.atoms[name]):
                if len(atoms) < 2 or (name, dim) in made:
                    continue
                root = int(self.roots[atoms[0]])
                event: Event | None = direct.get(int(atoms[0])) or why.get(root)
                if event is None:
                    reason = "it was not used in the forward pass" if root == int(atoms[0]) else "nothing reads it"
                    found.append(Boundary(name, dim, len(atoms), "", reason))
                else:
                    found.append(Boundary(name, dim, len(atoms), event.operation, event.reason))
        return found


def _common(owners: list[str]) -> str:
    """The innermost module that has all of some modules."""
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*(owner.split(".") for owner in owners), strict=False))
    return ".".join(parts[0] for parts in shared)


def _named(made: list[tuple[Dimension, str]]) -> list[Dimension]:
    """Give each dimension a name of its own: where it is and its kind, and if that is not enough, what makes it."""
    named: list[Dimension] = []
    counts = Counter((dimension.name, dimension.kind) for dimension, _ in made)
    taken: set[str] = set()
    for dimension, owner in made:
        where = dimension.name if counts[dimension.name, dimension.kind] == 1 else owner
        name = f"{where}.{dimension.kind}".lstrip(".")
        number = 2
        while name in taken:
            name = f"{where}.{dimension.kind}_{number}".lstrip(".")
            number += 1
        taken.add(name)
        named.append(replace(dimension, name=name))
    return named


def _query_heads(dimension: Dimension) -> Dimension | None:
    """The single query heads, where several of them read one key/value head."""
    if dimension.kind != "heads":
        return None
    width = min((place.width for place in dimension.places if place.width > 1), default=1)
    wide = [place for place in dimension.places if place.width > width]
    factors = {place.width / width for place in wide}
    if len(factors) != 1 or not min(factors).is_integer() or not any(place.is_input for place in wide):
        return None
    factor = int(min(factors))
    places = tuple(
        Place(place.tensor, place.dim, place.indices.reshape(-1, place.width // factor), place.is_input)
        for place in wide
    )
    size = dimension.size * factor
    return replace(dimension, kind="query_heads", size=size, places=places, group_size=factor)
