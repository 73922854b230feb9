"""What packing changes in a model: each layer's entry in the report, and what has to be replaced for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.calibration import Forward
from secateur.nn import PackedRecurrent
from secateur.packing._jobs import Job
from secateur.packing._measure import Measurement
from secateur.packing._output_error import Inputs, Pairs, inputs_of, layer_error, model_error, outputs_of
from secateur.packing._recurrent import RecurrentJob
from secateur.packing._settings import PackSettings
from secateur.packing._stacks import StackJob
from secateur.packing._tolerance import Chosen, choose_within, take_back
from secateur.reports import PackedLayer
from secateur.timing import MeasurementCache, Timer


@dataclass(frozen=True)
class Change:
    """What packing changes for one layer.

    Args:
        job: the layer, with its weight as it is to be stored.
        row: its entry in the report.
        pairs: what has to be replaced in the model, and by what.
    """

    job: Job | StackJob | RecurrentJob
    row: PackedLayer
    pairs: Pairs


@dataclass(frozen=True)
class Given:
    """The inputs of a model, if there are any.

    Args:
        batches: inputs of the model; None if none were given.
        forward: how to call the model on one of them.
    """

    batches: Sequence[Any] | None
    forward: Forward

    def error(self, model: nn.Module, pairs: Pairs, most: int | None = None) -> float | None:
        """Return the relative error of a model's outputs with some parts replaced; None without inputs.

        Args:
            model: without the replacements.
            pairs: what is to be replaced, and by what.
            most: how many of the batches are run; None for all.
        """
        return None if not self.batches else model_error(model, pairs, self.batches[:most], self.forward)

    def inputs(self, model: nn.Module, jobs: Sequence[Any]) -> Inputs:
        """Return the inputs of each layer, by the id of its job; none without inputs of the model."""
        modules = {id(job): job.modules for job in jobs if isinstance(job, Job)}
        return {} if not self.batches else inputs_of(model, modules, self.batches, self.forward)


def find_changes(
    model: nn.Module,
    jobs: Sequence[Job | StackJob | RecurrentJob],
    given: Given,
    settings: PackSettings,
    cold: bool,
    known: MeasurementCache[Measurement],
    timer: Timer,
    progress: Progress,
) -> tuple[list[Change], list[str]]:
    """Return what packing changes for each layer, and what is worth knowing about it.

    Args:
        model: as it is before packing. It is not changed, but for the plans of layers that are packed already.
        jobs: its layers.
        given: inputs of the model.
        settings: how to pack.
        cold: whether layers find their weights in memory and not in a cache.
        known: measurements of layers that run alike.
        timer: returns seconds since any fixed time.
        progress: called with a description, how much is done, and how much there is in total.

    Raises:
        RecipeError: a tolerance without inputs.
    """
    if settings.tolerance is not None and not given.batches:
        raise RecipeError(
            f"tolerance={settings.tolerance:g} was given, but no batches. The errors of layers are measured on inputs "
            "of the model. Give batches=, some inputs as for prune_; or, for a directory, a text for calibration."
        )
    inputs = given.inputs(model, jobs) if settings.is_asked or settings.stored is not None else {}
    changes: list[Change] = []
    chosen: dict[int, Chosen] = {}
    for number, job in enumerate(jobs):
        progress(f"packing {job.title}", number, len(jobs))
        if isinstance(job, StackJob):
            decisions = job.decide(settings, cold, known, timer)
            changes.append(Change(job, job.report(decisions), job.swaps(decisions)))
        elif isinstance(job, RecurrentJob):
            decision, replacement = job.decide(settings, cold, known, timer)
            is_packed = isinstance(job.module, PackedRecurrent)
            pairs = [(job.module, replacement or job.dense)] if replacement is not None or is_packed else []
            changes.append(Change(job, job.report(decision), pairs))
        elif settings.tolerance is not None:
            chosen[number] = one = choose_within(job, inputs.get(id(job), ()), settings, cold, known, timer)
            changes.append(Change(one.job, one.job.report(one.decision, one.error), ()))
        else:
            decision = job.decide(settings, cold, known, timer)
            error = None
            if decision.plan is not None and id(job) in inputs:
                own = inputs[id(job)]
                error = layer_error(job.built(decision.plan), own, outputs_of(job.dense, own))
            changes.append(Change(job, job.report(decision, error), job.pairs(decision)))
    if settings.tolerance is None:
        return changes, []
    return changes, _within(model, changes, chosen, given, settings.tolerance)


def _within(
    model: nn.Module, changes: list[Change], chosen: dict[int, Chosen], given: Given, tolerance: float
) -> list[str]:
    """Make layers exact again until the model's outputs keep within the tolerance; return what is worth knowing."""
    others = [pair for number, change in enumerate(changes) if number not in chosen for pair in change.pairs]
    options = list(chosen.values())

    def error(pairs: Pairs, most: int | None = None) -> float:
        found = given.error(model, [*others, *pairs], most)
        assert found is not None
        return found

    found, pairs, taken = take_back(options, tolerance, error, lambda own: error(own, 1))
    for number, one, own, index in zip(chosen, found, pairs, range(len(found)), strict=True):
        row = one.job.report(one.decision, one.error)
        if index in taken and one.decision.plan is None:
            why = f"taken back: with it alone in {changes[number].row.precision} the model's outputs have the error "
            row = replace(row, reason=f"{why}{taken[index]:.2g}; exact, {one.decision.reason}")
        changes[number] = Change(one.job, row, own)
    notes = []
    if taken:
        names = ", ".join(options[index].job.title for index in taken)
        notes.append(
            f"{len(taken)} layers were made more exact, because the error of the model's outputs was above the "
            f"tolerance of {tolerance:g}: {names}"
        )
    unseen = [one.job.title for one in options if one.error is None]
    if unseen:
        notes.append(f"no batch calls {len(unseen)} layers, so that they stay exact: {', '.join(unseen)}")
    return notes
