"""Take units out of a model: smaller tensors, fewer blocks, and the numbers that say so. All of it or nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur._errors import RecipeError, naming
from secateur.calibration import Forward, call_model, quiet
from secateur.graph import Dimension, Graph, Removal, without
from secateur.layers import check_model
from secateur.shapes import Facts
from secateur.surgery._attributes import Change, Decisions, candidates_in, decide, plausible, sizes_of_units
from secateur.surgery._calls import Looks, first_call, tolerance_for
from secateur.surgery._depth import drop_blocks, drop_modules
from secateur.surgery._journal import Journal
from secateur.surgery._layer_sizes import update_layer_sizes
from secateur.surgery._record import recorded
from secateur.surgery._slices import Cut, Tensors

# Key/value heads go before query heads, and blocks last, because the others have the names of the whole model.
_ORDER = ("channels", "ffn", "heads", "query_heads", "experts", "hidden", "layers")


@dataclass(frozen=True)
class Undo:
    """What :func:`remove_` did to a model, and the way back.

    It keeps the tensors of the model before, so that the model can be compared with that. Forget it to free them.

    Args:
        model: that was changed.
        graph: of its units.
        removed: the dimensions that lost units, and which, in the order in which they did.
        scopes: by the name of a dimension, the qualified name of the smallest module around all places of its units.
        looks: what of the model's outputs may have another shape.
        modules: of the model before, by name.
        facts: how the model differs from the one before.
    """

    model: nn.Module
    graph: Graph
    removed: tuple[tuple[Dimension, tuple[int, ...]], ...]
    scopes: Mapping[str, str]
    looks: Looks
    modules: Mapping[str, nn.Module] = field(repr=False)
    facts: Facts = field(repr=False)
    _journal: Journal = field(repr=False)
    _before_blocks: int = 0

    def restore(self) -> None:
        """Put the model back as it was before."""
        self._journal.undo()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Make it for a while the model before, with removed blocks skipped and removed experts never chosen."""
        with self._journal.undone(), without(self.model, self.removed):
            yield

    @contextmanager
    def reference_of_blocks(self) -> Iterator[None]:
        """Make it for a while the model with all of its blocks, of which the removed ones are skipped."""
        blocks = [entry for entry in self.removed if entry[0].kind == "layers"]
        with self._journal.undone(self._before_blocks), without(self.model, blocks):
            yield

    @property
    def dropped(self) -> list[Dimension]:
        """The lists that lost blocks."""
        return [dimension for dimension, _ in self.removed if dimension.kind == "layers"]


def remove_(model: nn.Module, graph: Graph, removal: Removal, batch: Any, forward: Forward = call_model) -> Undo:
    """Take units out of a model, in place.

    The columns that read the units must be zero already, so that the function of the model does not change; that is not
    checked here but by :func:`prove`. Parameters become new ones of the same dtype, device and ``requires_grad``, with
    what is left of the gradient, and tied ones stay tied. An optimizer made before still holds the old ones.

    Args:
        model: to change, not inside of ``calibration.quiet``: configurations are replaced by copies as they are.
        graph: of the model's units.
        removal: which of them go.
        batch: of inputs of the model. Which sizes the code of a module keeps as numbers is found by running it on what
            it gets there.
        forward: how to call the model on the batch.

    Returns:
        What was done, with :meth:`Undo.restore`.

    Raises:
        RecipeError: units that do not exist or cannot go, or a module that does not work without them, by name. The
            model is then as it was.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from torch import nn
        >>> from secateur.graph import Dimension, Graph, Place, Removal
        >>> from secateur.surgery import remove_
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> each = np.arange(3)[:, None]
        >>> places = Place("0.weight", 0, each), Place("0.bias", 0, each), Place("2.weight", 1, each, is_input=True)
        >>> graph = Graph((Dimension("ffn", "ffn", 3, places),))
        >>> undo = remove_(model, graph, Removal({"ffn": (1,)}), torch.ones(1, 4))
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )
        >>> undo.restore()
        >>> model[0]
        Linear(in_features=4, out_features=3, bias=True)
    """
    check_model(model)
    removed = _checked(graph, removal)
    modules = dict(model.named_modules(remove_duplicate=False))
    journal = Journal()
    surgeon = _Surgeon(model, batch, forward, journal, Tensors(model, journal))
    try:
        for is_depth in (False, True):  # blocks last, and alone, so that they can be put back alone
            for dimension, units in removed:
                if (dimension.kind == "layers") == is_depth:
                    with naming(dimension.name or "(the model itself)"):
                        surgeon.remove(dimension, units)
            if not is_depth:
                surgeon.update_outer_counts(graph)
    except BaseException:
        journal.undo()
        raise
    looks = Looks(frozenset(surgeon.inner_sizes), lists=surgeon.before_blocks is not None)
    facts = recorded(model, modules, journal, surgeon.tensors)
    return Undo(model, graph, removed, surgeon.scopes, looks, modules, facts, journal, surgeon.before_blocks or 0)


def _checked(graph: Graph, removal: Removal) -> tuple[tuple[Dimension, tuple[int, ...]], ...]:
    """The dimensions that lose units, in the order in which they do."""
    found = []
    known = {dimension.name: dimension for dimension in graph.dimensions}
    for name, units in removal.units.items():
        if name not in known:
            raise RecipeError(f"the model has no units {name!r}. It has {', '.join(known) or 'none'}.")
        dimension = known[name]
        with naming(name or "(the model itself)"):
            chosen = tuple(sorted(set(units)))
            _check_units(dimension, chosen)
        if chosen:
            found.append((dimension, chosen))
    return tuple(sorted(found, key=lambda entry: _ORDER.index(entry[0].kind)))


def _check_units(dimension: Dimension, units: Sequence[int]) -> None:
    wrong = [unit for unit in units if not 0 <= unit < dimension.size]
    if wrong:
        raise RecipeError(f"unit {wrong[0]} does not exist; there are {dimension.size}, counted from 0.")
    stay = sorted(set(units) & set(dimension.fixed))
    if stay:
        reasons = [note for note in dimension.notes if note.startswith(f"block {stay[0]} ")]
        raise RecipeError(f"unit {stay[0]} cannot go{': ' + reasons[0] if reasons else ''}. Remove others.")
    left = dimension.size - len(units)
    if left < max(dimension.least, 1) and units:
        why = (
            " because a router chooses as many for a token"
            if dimension.kind == "experts" and dimension.least > 1
            else ""
        )
        raise RecipeError(
            f"{len(units)} of {dimension.size} units are to go, but at least {max(dimension.least, 1)} must stay{why}. "
            "Remove fewer."
        )
    if dimension.group_size:
        counts = np.bincount(
            np.array(units, dtype=np.int64) // dimension.group_size, minlength=dimension.size // dimension.group_size
        )
        if len(set(counts.tolist())) > 1:
            raise RecipeError(
                f"{counts.min()} to {counts.max()} units of each group of {dimension.group_size} are to go, but all "
                "groups must lose the same number, because the code counts them by one number. Remove as many of each."
            )


@dataclass
class _Surgeon:
    """Takes the units of one dimension after the other out of a model."""

    model: nn.Module
    batch: Any
    forward: Forward
    journal: Journal
    tensors: Tensors
    decisions: Decisions = field(default_factory=Decisions)
    scopes: dict[str, str] = field(default_factory=dict)
    inner_sizes: set[tuple[int, int]] = field(default_factory=set)
    changes: dict[str, Change] = field(default_factory=dict)  # by the name of a dimension
    before_blocks: int | None = None  # how many changes there were

    def remove(self, dimension: Dimension, units: Sequence[int]) -> None:
        """Remove units of one dimension."""
        if dimension.kind == "layers":
            if self.before_blocks is None:
                self.before_blocks = len(self.journal.changes)
            drop_blocks(self.model, dimension, units, self.journal)
            return
        alive = np.ones(dimension.size, dtype=bool)
        for place in dimension.places:
            if len(place.indices) != dimension.size:
                raise RecipeError(f"{place.tensor} has {len(place.indices)} of {dimension.size} units.")
            alive &= self.tensors.alive(place)
        going = np.zeros_like(alive)
        going[list(units)] = True
        size, kept = int(alive.sum()), int((alive & ~going).sum())
        scope = self.scopes[dimension.name] = _scope(dimension)
        mark = len(self.journal.changes)
        cuts = self._cut(dimension, np.flatnonzero(going))
        if kept == size:
            return
        listed = dimension.kind == "experts" and isinstance(self.model.get_submodule(dimension.name), nn.ModuleList)
        if listed:
            drop_modules(self.model.get_submodule(dimension.name), np.flatnonzero(~going).tolist(), self.journal)
        exact = self._update_layers(cuts)
        change = sizes_of_units(
            size,
            kept,
            dimension.kind,
            dimension.group_size,
            [place.indices[alive] for place in dimension.places],
            {cut.old: cut.new for cut in cuts},
        )
        if dimension.kind in ("heads", "query_heads", "experts"):  # as attention weights and router logits have them
            self.inner_sizes |= {(old, new) for old in change.scaled if (new := change.new(old, "scaled")) is not None}
        self.changes[dimension.name] = change
        module = self.model.get_submodule(scope)
        touched = {id(home.module) for cut in cuts for home in cut.homes}
        if listed:
            touched.add(id(self.model.get_submodule(dimension.name)))
        candidates = candidates_in(module, scope, touched, change, exact)
        if not candidates:
            return
        call, before = None, None
        if any((dimension.kind, candidate.key) not in self.decisions.known for candidate in candidates):
            with self.journal.undone(mark), without(self.model, [(dimension, units)]):
                call = first_call(self.model, scope, self.batch, self.forward)
                with quiet(call.module):
                    before = call.again()
        looks, tolerance = Looks(frozenset(self.inner_sizes)), 10 * tolerance_for(module.parameters())
        if dimension.kind == "hidden":  # norms change, so that it is enough if the code runs
            tolerance = np.inf
        decide(candidates, change, self.decisions, call, before, looks, tolerance, self.journal)

    def update_outer_counts(self, graph: Graph) -> None:
        """Correct what modules around the layers say of all of these, if all became alike."""
        scopes = [tuple(scope.split(".")) if scope else () for scope in self.scopes.values()]
        for kind in graph.kinds:
            names = [dimension.name for dimension in graph.of_kind(kind)]
            found = {(c.size, c.kept, c.scaled) for c in map(self.changes.get, names) if c is not None}
            if kind == "layers" or len(found) != 1 or not all(name in self.changes for name in names):
                continue
            change = self.changes[names[0]]
            for path, module in self.model.named_modules():
                parts = tuple(path.split(".")) if path else ()
                if not any(parts == scope[: len(parts)] and len(parts) < len(scope) for scope in scopes):
                    continue
                for attribute, value in list(vars(module).items()):
                    new = change.new(value, "scaled") if type(value) is int else None
                    if new is not None and plausible(kind, attribute) and not attribute.startswith("_"):
                        self.journal.set(vars(module), attribute, new)

    def _cut(self, dimension: Dimension, units: NDArray[np.int64]) -> list[Cut]:
        """Cut the units out of all tensors in which they lie."""
        removed: dict[tuple[int, int], tuple[str, list[NDArray[np.int64]]]] = {}
        for place in dimension.places:
            key = id(self.tensors.homes(place.tensor)), place.dim
            removed.setdefault(key, (place.tensor, []))[1].append(place.of(units))
        cuts = []
        for (_, dim), (name, indices) in removed.items():
            cut = self.tensors.cut(name, dim, np.concatenate(indices))
            if not cut.new:
                raise RecipeError(f"nothing would be left of {name}. Remove fewer units.")
            cuts.append(cut)
        return cuts

    def _update_layers(self, cuts: list[Cut]) -> set[int]:
        """Correct the sizes of the layers whose classes are known, and return the ids of these."""
        by_module: dict[int, tuple[nn.Module, str, list[tuple[str, Cut]]]] = {}
        for cut in cuts:
            for home in cut.homes:
                by_module.setdefault(id(home.module), (home.module, home.path, []))[2].append((home.name, cut))
        exact = set()
        for module, path, own in by_module.values():
            with naming(path or "(the model itself)"):
                if update_layer_sizes(module, own, self.journal):
                    exact.add(id(module))
        return exact


def _scope(dimension: Dimension) -> str:
    """The innermost module around all places of a dimension, by the names of their tensors."""
    owners = [place.tensor.split(".")[:-1] for place in dimension.places]
    if dimension.kind == "experts":
        owners += [name.split(".") for name in (dimension.name, *dimension.routers)]
    parts = [found[0] for found in itertools.takewhile(lambda found: len(set(found)) == 1, zip(*owners, strict=False))]
    return ".".join(parts)
