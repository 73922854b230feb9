"""Which layers do the calibration inputs reach? Asked, and said, before any weight changes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur._errors import RecipeError, StatisticsError
from secateur.calibration import Forward, call_model, fit_arguments, load_batches, observe, quiet
from secateur.layers import NEVER_REACHED, Layer, Observed, globs_of, select_layers
from secateur.pruning._recipe import Recipe
from secateur.reports import SkippedLayer


@dataclass(frozen=True)
class Inputs:
    """Calibration inputs, and what a first forward pass on them showed.

    Args:
        batches: as the model takes them.
        observed: which layers they reach, and how weights are read.
        given: as they were given, with what the model does not take.
        ignored: what was left out of them, for the report; empty if nothing was.
    """

    batches: list[Any]
    observed: Observed
    given: list[Any]
    ignored: str = ""


def read_inputs(model: nn.Module, batches: Iterable[Any], recipe: Recipe, forward: Forward | None) -> Inputs:
    """Read the batches, run the model on as many as it takes to reach every layer, and return what that showed.

    Raises:
        RecipeError: weights without values.
        StatisticsError: batches that the model does not take.
    """
    if any(parameter.is_meta for parameter in model.parameters()):  # before a forward pass fails on it
        for layer in select_layers(model, recipe.include, recipe.exclude)[0]:
            layer.fit(recipe.pattern)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    loaded, ignored = load_batches(batches, device), ""
    given = loaded
    if forward is None:
        fitted = fit_arguments(model, loaded, device)
        loaded, ignored = fitted.batches, fitted.ignored
    return Inputs(loaded, observe_all(model, loaded, recipe, forward), given, ignored)


def observe_all(model: nn.Module, loaded: list[Any], recipe: Recipe, forward: Forward | None) -> Observed:
    """Run the model on as many batches as it takes to reach every layer, and return what that showed."""

    def is_enough(seen: Observed) -> bool:
        try:
            _, skipped = select_layers(model, recipe.include, recipe.exclude, seen)
        except RecipeError:  # no layer was reached, or the recipe is wrong, which is said later
            return False
        return not unreached(skipped)

    with quiet(model):
        return observe(model, loaded, forward or call_model, is_enough)


def unreached(skipped: Iterable[SkippedLayer]) -> list[str]:
    """Return the names of the layers that no input reached."""
    return [entry.name for entry in skipped if entry.reason == NEVER_REACHED]


def tell_unreached(layers: Sequence[Layer], skipped: Sequence[SkippedLayer], strict: bool) -> None:
    """Say which layers calibration says nothing of.

    Raises:
        StatisticsError: there are some, and ``strict`` asks for all.
    """
    names = unreached(skipped)
    if not names:
        return
    globs = globs_of(names, [layer.name for layer in layers])
    what = f"{len(names)} layer{'s' * (len(names) > 1)} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
    if strict:
        raise StatisticsError(
            f"no calibration input reached {what}, and strict asks for all.\n"
            f"Exclude them with exclude={globs!r}, or calibrate on batches that use them."
        )
    warnings.warn(
        f"no calibration input reached {what}, which stays dense. To say that it should: exclude={globs!r}.",
        stacklevel=4,  # who called prune_ or allocate
    )
