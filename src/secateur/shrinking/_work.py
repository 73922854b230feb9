"""One run of shrinking: choose what goes, take over from it, cut it out, prove that nothing else changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur._checks import one_of
from secateur._errors import RecipeError, SolverError, SparsityError
from secateur._types import Progress, dtype_name
from secateur.calibration import (
    Forward,
    LayerStatistics,
    Need,
    Padding,
    PaddingSource,
    call_model,
    fit_arguments,
    gather_gradients,
    hash_batches,
    load_batches,
    observe,
    parameter_names,
    quiet,
    replayed,
)
from secateur.graph import Dimension, Graph, Removal, check_units, without
from secateur.layers import select_layers
from secateur.reports import ShrinkProof, ShrinkReport, ShrunkDimension, Stage, versions
from secateur.shapes import structure_hash
from secateur.shrinking._block_fit import BlockFit, fit_blocks_
from secateur.shrinking._block_scores import rank_blocks
from secateur.shrinking._choose import fraction_for, keep_fractions, kept_count, lowest, parameters_left
from secateur.shrinking._compensate import ConsumerError, fold_, mask_and_fit_
from secateur.shrinking._consumers import find_consumers
from secateur.shrinking._expert_scores import score_experts
from secateur.shrinking._grains import grains_of, step_of
from secateur.shrinking._macs import macs_left
from secateur.shrinking._method import Method
from secateur.shrinking._score import by_stage, score_units
from secateur.shrinking._size import model_size
from secateur.shrinking._zero_units import zero_units
from secateur.surgery import Proof, Saved, Undo, prove, remove_, zero_

_UNITS = ("ffn", "heads", "channels", "experts")  # what goes to reach a target: kinds that keep the function exact
_ROOM = 1 << 28  # numbers in the Gram matrices of all layers together
_PROVED = 4  # batches on which the smaller model is compared

Units = dict[str, tuple[int, ...]]


def load_inputs(model: nn.Module, batches: Iterable[Any], forward: Forward | None) -> tuple[list[Any], str, list[Any]]:
    """Return batches as a model takes them, what was left out of them, and the batches as they were given."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    given, ignored = load_batches(batches, device), ""
    loaded = given
    if forward is None:
        fitted = fit_arguments(model, given, device)
        loaded, ignored = fitted.batches, fitted.ignored
    return loaded, ignored, given


@dataclass(frozen=True)
class Inputs:
    """Batches, and how a model runs on them.

    Args:
        batches: as the model takes them.
        ignored: what was left out of them, or empty.
        forward: how to call the model on one.
        paddings: what is padding in each.
        given: the batches for a loss: as they were given, with what the model does not take.
    """

    batches: list[Any]
    ignored: str
    forward: Forward
    paddings: list[Padding]
    given: list[Any]

    @classmethod
    def of(
        cls, model: nn.Module, batches: Iterable[Any], forward: Forward | None, padding: PaddingSource | None
    ) -> Inputs:
        """Read the batches."""
        loaded, ignored, given = load_inputs(model, batches, forward)
        names = parameter_names(model) if forward is None else ()
        paddings = [Padding.of(batch, names, padding) for batch in loaded]
        return cls(loaded, ignored, forward or call_model, paddings, given)

    def fresh(self) -> list[Padding]:
        """Paddings that have seen nothing yet."""
        return [padding.fresh() for padding in self.paddings]


@dataclass(frozen=True)
class Settings:
    """How units are chosen.

    Args:
        method: importance and compensation.
        allocation: ``"uniform"`` or ``"global"``.
        round_to: multiple of sizes of neurons and channels.
        loss: for importances that need one.
        history: reports of what was done before.
        progress: called with what is being done.
    """

    method: Method
    allocation: str
    round_to: int
    loss: Callable[[Any, Any], Tensor] | None
    history: tuple[Stage, ...]
    progress: Progress

    def tell(self, description: str) -> Callable[[str], None]:
        """Return what says that something is done to a part of the model."""
        return lambda name: self.progress(f"{description} {name}".strip(), 0, 1)


class Shrinking:
    """One call of :func:`secateur.shrink_`.

    Args:
        model: to shrink.
        graph: what can go.
        inputs: batches.
        settings: how units are chosen.
    """

    def __init__(self, model: nn.Module, graph: Graph, inputs: Inputs, settings: Settings) -> None:
        self._began = time.perf_counter()
        self._model, self._inputs, self._settings = model, inputs, settings
        self._notes: list[str] = [f"left out of the batches: {inputs.ignored}"] if inputs.ignored else []
        self._hash = structure_hash(model)
        self._before = model_size(model, inputs.batches[0], inputs.forward)
        self._scores: dict[str, NDArray[np.float64]] = {}
        self._steps = {d.name: step for d in graph.dimensions if (step := step_of(model, d, settings.round_to)) > 1}
        self._blocks = {
            dimension.name: tuple(name for name, _ in model.get_submodule(dimension.name).named_children())
            for dimension in graph.of_kind("layers")
        }
        with quiet(model):
            self._observed = observe(model, inputs.batches[:1], inputs.forward)
        self._consumers = find_consumers(model, graph, self._observed)
        layers = select_layers(model, ("*",), (), self._observed)[0] if self._consumers.by_layer else []
        self._graph, self._grains = grains_of(graph, layers, self._consumers, settings.history)

    def run(
        self,
        keep: Mapping[str, float] | None,
        target: Mapping[str, float] | None,
        remove: Mapping[str, Sequence[int]] | Removal | None,
        zeros: bool,
    ) -> ShrinkReport:
        """Choose, take over, cut and prove."""
        inputs = self._inputs
        saved = Saved()
        constants: Mapping[str, Tensor] = {}
        undo: Undo | None = None
        try:
            if keep is not None:
                units = self._kept(keep, {} if remove is None else self._named(remove))
            elif remove is not None:
                units = self._named(remove)
            elif zeros:
                units, constants = self._zero()
            else:
                assert target is not None
                units = self._reached(target)
            units = {name: tuple(sorted(gone)) for name, gone in units.items() if len(gone)}
            fits = self._settings.method.refit and not zeros
            blocks, errors = self._take_over(saved, units, constants, fits=fits)
            undo = self._cut(units)
            self._settings.progress("proving", 0, 1)
            proof = prove(undo, inputs.batches[:_PROVED], inputs.forward) if units else None
            removed = units if remove is not None else None
            given = {"keep": keep, "target": target, "remove": removed, "zeros": zeros or None}
            asked = {name: value for name, value in given.items() if value is not None}
            return self._report(undo, proof, units, blocks, errors, asked)
        except BaseException:
            if undo is not None:
                undo.restore()
            saved.restore()
            raise

    def _cut(self, units: Units) -> Undo:
        """Take units out. What the code of the model makes of its smaller parts meanwhile is its own."""
        inputs, removal = self._inputs, Removal(units, self._hash)
        try:
            return remove_(self._model, self._graph, removal, inputs.batches[0], inputs.forward)
        except SparsityError:
            raise
        except Exception as error:
            raise SolverError(
                f"{', '.join(units)}: the model does not work without these units: {type(error).__name__}: {error}\n"
                "The model is as it was before. Remove others."
            ) from error

    def _named(self, remove: Mapping[str, Sequence[int]] | Removal) -> Units:
        """The units that a user names, by dimension."""
        if isinstance(remove, Removal):
            remove.check(self._model, self._graph)
            return dict(remove.units)
        units: Units = {}
        names = [dimension.name for dimension in self._graph.dimensions]
        for name, numbers in remove.items():
            same = [d.name for d in self._graph.dimensions if d.kind == name and name not in names]
            if len(same) > 1:
                raise RecipeError(
                    f"the model has {name} at {len(same)} places: {', '.join(same[:4])}.\nName the one that is meant."
                )
            one = same[0] if same else one_of("dimension", name, names)
            check_units(self._graph[one], tuple(numbers))
            units[one] = tuple(sorted(numbers))
        return units

    def _zero(self) -> tuple[Units, Mapping[str, Tensor]]:
        """The units that are zero already, and what they add to inputs."""
        with quiet(self._model):
            found = zero_units(
                self._model, self._graph, self._consumers, self._gathered({"gram", "input_mean"}, (), "looking at")
            )
        self._notes += found.notes
        if not found.units:
            self._notes.append("no unit was zero")
        return found.units, found.constants

    def _kept(self, keep: Mapping[str, float], named: Units) -> Units:
        """The units that go so that a fraction of each kind, or of each dimension that is named, stays.

        Args:
            keep: by kind or by the name of a dimension.
            named: units that go anyway.
        """
        names = {dimension.name for dimension in self._graph.dimensions}
        missing = [key for key in keep if key not in self._graph.kinds and key not in names]
        if missing:
            raise RecipeError(
                f"the model has no {missing[0]} that could go; it has {', '.join(self._graph.kinds) or 'nothing'}.\n"
                "secateur.shrinking.analyze(model, batches) has the names of its dimensions, and in boundaries what "
                "stands in the way."
            )
        if {"heads", "query_heads"} <= set(keep):
            raise RecipeError("keep has heads and query_heads, which are parts of each other. Give one of them.")
        units = self._kept_blocks(keep["layers"]) if "layers" in keep else named
        others = {kind: fraction for kind, fraction in keep.items() if kind != "layers"}
        if others:
            graph = self._without_blocks(units)
            asked = [found for found in graph.dimensions if {found.kind, found.name} & set(others)]
            if twice := [found.name for found in asked if found.name in units]:
                raise RecipeError(f"{twice[0]}: keep and remove both say which of its units go. Give one of them.")
            self._score(asked, units)
            units = units | self._fractions(graph, others)
        return units

    def _fractions(self, graph: Graph, keep: Mapping[str, float]) -> Units:
        found = self._settings
        return keep_fractions(
            graph, self._scores, keep, allocation=found.allocation, steps=self._steps, grains=self._grains
        )

    def _kept_blocks(self, fraction: float) -> Units:
        inputs, units = self._inputs, Units()
        for dimension in self._graph.of_kind("layers"):
            count = dimension.size - kept_count(dimension, fraction, 1, 1)
            if count:
                importance = self._settings.method.layers
                tell = self._settings.tell("comparing")
                with quiet(self._model):
                    scores = rank_blocks(
                        self._model, dimension, count, importance, inputs.batches, inputs.forward, tell
                    )
                self._scores[dimension.name] = scores
                units[dimension.name] = lowest(dimension, scores, count)
        return units

    def _without_blocks(self, units: Mapping[str, Sequence[int]]) -> Graph:
        """The graph without what lies in blocks that go."""
        gone = self._prefixes(units)
        if not gone:
            return self._graph

        def stays(dimension: Dimension) -> bool:
            owners = [place.tensor for place in dimension.places] or [f"{dimension.name}."]
            return not all(owner.startswith(gone) for owner in owners)

        return replace(self._graph, dimensions=tuple(filter(stays, self._graph.dimensions)))

    def _prefixes(self, units: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
        """How the names of tensors in blocks that go begin."""
        found: list[str] = []
        for name, blocks in self._blocks.items():
            found += [f"{name}.{blocks[unit]}.".lstrip(".") for unit in units.get(name, ())]
        return tuple(found)

    def _reached(self, target: Mapping[str, float]) -> Units:
        """The units that go so that a fraction of the whole model stays."""
        ((what, fraction),) = target.items()
        kinds = [kind for kind in _UNITS if kind in self._graph.kinds]
        if not kinds:
            raise RecipeError("nothing of the model can go. secateur.shrinking.analyze(model, batches) says why.")
        self._score([dimension for dimension in self._graph.dimensions if dimension.kind in kinds], {})

        def left(kept: float) -> float:
            units = self._fractions(self._graph, dict.fromkeys(kinds, kept))
            if what == "macs":
                return predicted(units)
            return parameters_left(self._model, self._graph, units) / max(self._before.parameters, 1)

        predicted = macs_left(self._model, self._graph, self._inputs.batches[0], self._inputs.forward, self._before)
        return self._fractions(self._graph, dict.fromkeys(kinds, fraction_for(left, fraction)))

    def _score(self, dimensions: Sequence[Dimension], blocks: Mapping[str, Sequence[int]]) -> None:
        """Score the units of dimensions on the dense model without some blocks."""
        model, inputs, importance = self._model, self._inputs, self._settings.method.scores
        experts = [dimension for dimension in dimensions if dimension.kind == "experts"]
        plain = [dimension for dimension in dimensions if dimension.kind != "experts"]
        for dimension in plain:
            if unknown := self._consumers.unknown.get(dimension.name):
                self._notes.append(f"{dimension.name}: its scores do not count {', '.join(unknown)}, which is no layer")
        with quiet(model), without(model, self._gone(blocks)):
            if experts:
                self._scores |= score_experts(model, experts, inputs.batches, inputs.forward)
            if plain:
                gathered = self._gathered(importance.needs, self._prefixes(blocks), "scoring")
                self._scores |= score_units(plain, self._consumers, importance, gathered, self._grains)
        for dimension in dimensions:
            if not self._scores[dimension.name].any():
                self._notes.append(
                    f"{dimension.name}: nothing is known of what its units give, so that the last ones go"
                )

    def _gone(self, units: Mapping[str, Sequence[int]]) -> list[tuple[Dimension, tuple[int, ...]]]:
        """Blocks and experts that go: zeros do not take them out of the model."""
        found = [(self._graph[name], tuple(numbers)) for name, numbers in units.items()]
        return [(dimension, numbers) for dimension, numbers in found if dimension.kind in ("layers", "experts")]

    def _gathered(
        self, needs: Iterable[Need], gone: tuple[str, ...], what: str, *, changes: bool = False
    ) -> Iterator[tuple[str, LayerStatistics | None]]:
        """The statistics of the layers that read units, without those in blocks that go."""
        model, inputs, needs = self._model, self._inputs, frozenset(needs)
        layers = [layer for layer in self._consumers.layers if not gone or not f"{layer.name}.".startswith(gone)]
        if not needs:
            yield from ((layer.name, None) for layer in layers)
        elif "input_gradients" in needs:
            assert self._settings.loss is not None
            loss, given = self._settings.loss, inputs.given
            found = gather_gradients(model, inputs.batches, layers, loss, inputs.forward, given=given)
            for layer in layers:
                gradients = found.get(layer.name)
                yield layer.name, None if gradients is None else LayerStatistics(0, input_gradients=gradients)
        elif layers:
            # A model that does not change is run once. Its statistics are kept together, if there is room for them.
            room = sum(layer.matrix().shape[1] ** 2 for layer in layers)
            source = replayed(model, inputs.batches, layers, inputs.forward, changes or room > _ROOM)
            yield from by_stage(source, needs, self._observed, inputs.fresh(), self._settings.tell(what))

    def _take_over(
        self, saved: Saved, units: Units, constants: Mapping[str, Tensor], *, fits: bool
    ) -> tuple[list[BlockFit], list[ConsumerError]]:
        """Take units out of the model by zeros, and let what stays take over."""
        model, inputs = self._model, self._inputs
        saved.keep_layers(self._consumers.layers)
        gone = self._gone(units)
        whole = {dimension.name for dimension, _ in gone}
        inner = {name: numbers for name, numbers in units.items() if name not in whole}
        blocks: list[BlockFit] = []
        errors: list[ConsumerError] = []
        with quiet(model):
            for dimension, numbers in gone:
                if dimension.kind == "layers" and fits:
                    saved.keep_module(model.get_submodule(dimension.name))
                    blocks += fit_blocks_(
                        model, dimension, numbers, inputs.batches, inputs.forward, tell=self._settings.tell("")
                    )
            with without(model, gone):
                fold_(self._consumers, constants)
                if inner:
                    gathered = self._gathered({"gram", "input_mean"}, self._prefixes(units), "fitting", changes=True)
                    errors = mask_and_fit_(self._consumers, inner, gathered if fits else ())
            for name, numbers in inner.items():
                zero_(model, self._graph[name], numbers, saved)
        return blocks, errors

    def _report(
        self,
        undo: Undo,
        proof: Proof | None,
        units: Units,
        blocks: Sequence[BlockFit],
        errors: Sequence[ConsumerError],
        asked: Mapping[str, Any],
    ) -> ShrinkReport:
        model, inputs, settings = self._model, self._inputs, self._settings
        by_layer = {error.layer: error for error in errors}
        stayed = self._without_blocks(units).dimensions
        dimensions = tuple(self._row(dimension, units, by_layer, blocks) for dimension in stayed)
        dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        uneven = _uneven(dimensions)
        note = "each part on the same inputs, in float32" if proof is not None and proof.by_blocks else ""
        if proof is not None and not proof.is_exact:
            note = (
                "without channels of the residual stream a model is another function: the error is shown, not limited"
            )
        scored = bool(self._scores)
        return ShrinkReport(
            dimensions=dimensions,
            boundaries=self._graph.boundaries,
            before=self._before,
            after=model_size(model, inputs.batches[0], inputs.forward),
            asked=asked,
            method=str(settings.method) if "zeros" not in asked and (scored or settings.method.refit) else "",
            allocation=settings.allocation if scored else "",
            round_to=settings.round_to,
            uniform=not uneven,
            uniform_reason=uneven,
            versions=versions(),
            seconds=time.perf_counter() - self._began,
            proof=None
            if proof is None
            else ShrinkProof(proof.error, proof.tolerance, "/".join(sorted(map(dtype_name, dtypes))), note),
            kept_blocks={found.name: found.kept for found in dimensions if found.kind == "layers"},
            original_sizes={dimension.name: dimension.size for dimension in self._graph.dimensions},
            model_name=type(model).__name__,
            model_hash=self._hash,
            facts=undo.facts.to_dict(),
            calibration_hash=hash_batches(inputs.batches),
            notes=tuple(dict.fromkeys(self._notes)),
        )

    def _row(
        self,
        dimension: Dimension,
        units: Units,
        errors: Mapping[str, ConsumerError],
        blocks: Sequence[BlockFit],
    ) -> ShrunkDimension:
        gone = units.get(dimension.name, ())
        notes = list(dimension.notes)
        score: float | None = None
        if gone and dimension.name in self._scores:
            scores = self._scores[dimension.name]
            finite = np.where(np.isfinite(scores), scores, np.max(scores[np.isfinite(scores)], initial=0.0))
            score = float(finite[list(gone)].sum() / finite.sum()) if finite.sum() > 0 else 0.0
        before: list[float] = []
        after: list[float] = []
        if gone and dimension.kind == "layers":
            for fit in blocks:
                notes += [f"blocks {', '.join(map(str, fit.gone))}: {fit.note}"] if fit.note else []
                before += [fit.without] if fit.without == fit.without else []
                after += [fit.with_fit] if fit.with_fit is not None else []
        elif gone:
            for consumer in self._consumers.of(dimension):
                error = errors.get(consumer.layer.name)
                if error is not None:
                    before += [error.without] if error.without is not None else []
                    after += [error.with_fit] if error.with_fit is not None else []
                    notes += [f"{error.layer}: {error.note}"] if error.note else []
        return ShrunkDimension(
            dimension.name,
            dimension.kind,
            dimension.size,
            dimension.size - len(gone),
            tuple(gone),
            score,
            _mean(before),
            _mean(after),
            tuple(dict.fromkeys(notes)),
        )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.sqrt(np.mean(np.square(values)))) if values else None


def _uneven(dimensions: Sequence[ShrunkDimension]) -> str:
    """Why an ordinary configuration cannot describe the sizes of a model, or ``""``."""
    for kind in {found.kind for found in dimensions} - {"layers"}:
        sizes: dict[int, set[int]] = {}
        for found in dimensions:
            if found.kind == kind:
                sizes.setdefault(found.before, set()).add(found.after)
        for before, after in sizes.items():
            if len(after) > 1:
                return f"{kind} of {before} have {min(after)} to {max(after)} now"
    return ""
