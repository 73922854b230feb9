"""Check the settings and the inputs of a run, and find the layers, before any weight changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur._errors import RecipeError
from secateur.calibration import (
    GRADIENTS,
    Forward,
    Loss,
    Padding,
    PaddingSource,
    call_model,
    check_padding,
    hash_batches,
    parameter_names,
)
from secateur.layers import Layer, select_layers
from secateur.patterns import SparsityPattern
from secateur.pruning._allocation import ALLOCATIONS, needs_of
from secateur.pruning._one_round import Calibration, held_out_batches
from secateur.pruning._reach import read_inputs, tell_unreached
from secateur.pruning._recipe import Recipe
from secateur.reports import SkippedLayer
from secateur.solvers import method_name


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Args:
        layers: to prune.
        skipped: what is left alone, and why.
        patterns: of each layer, by name.
        calibration: what is learned from; None without batches.
        digest: SHA-256 of the batches; None without any.
        ignored: what was left out of the batches; empty if nothing was.
    """

    layers: list[Layer]
    skipped: list[SkippedLayer]
    patterns: dict[str, SparsityPattern]
    calibration: Calibration | None
    digest: str | None
    ignored: str = ""


def needs_text(recipe: Recipe) -> bool:
    """Return whether a recipe needs calibration inputs."""
    allocation = ALLOCATIONS[recipe.allocation]
    return bool(recipe.method.needs or needs_of(recipe.allocation, recipe.method) or allocation.needs_output)


def prepare(
    model: nn.Module,
    batches: Iterable[Any] | None,
    recipe: Recipe,
    forward: Forward | None,
    padding: PaddingSource | None,
    loss: Loss | None,
) -> Work:
    """Return the layers to prune and what is learned from. The model is not changed.

    Args:
        model, batches, forward, padding, loss: see :func:`secateur.prune_`.
        recipe: how to prune.

    Raises:
        SparsityError: what :func:`secateur.prune_` raises before it changes weights.
    """
    needs = recipe.method.needs
    if needs and batches is None:
        raise RecipeError(
            f"{recipe.method} needs calibration inputs ({', '.join(sorted(needs))}).\n"
            "Pass batches, or use method='magnitude', which needs none."
        )
    if needs_text(recipe) and batches is None:
        dense_needs = needs_of(recipe.allocation, recipe.method)
        raise RecipeError(
            f"the allocation {recipe.allocation!r} needs calibration inputs ({', '.join(sorted(dense_needs))}).\n"
            "Pass batches, or use allocation='uniform', which needs none."
        )
    if recipe.held_out and batches is None:
        raise RecipeError(
            f"held_out={recipe.held_out:g} holds out some of the batches to measure on, and there are none.\n"
            "Pass batches, or leave held_out out."
        )
    _check_loss(loss, recipe)
    inputs = None if batches is None else read_inputs(model, batches, recipe, forward)
    layers, skipped = select_layers(model, recipe.include, recipe.exclude, None if inputs is None else inputs.observed)
    tell_unreached(layers, skipped, recipe.strict)
    check_padding(padding, [layer.name for layer in layers])
    patterns = {layer.name: layer.fit(recipe.pattern) for layer in layers}
    if inputs is None:
        return Work(layers, skipped, patterns, None, None)
    digest = hash_batches(inputs.batches)
    names = parameter_names(model) if forward is None else ()
    paddings = [Padding.of(batch, names, padding) for batch in inputs.batches]
    held_out = held_out_batches(recipe.held_out, len(inputs.batches))
    run = forward or call_model
    calibration = Calibration(inputs.batches, inputs.observed, paddings, run, held_out, loss, inputs.given)
    return Work(layers, skipped, patterns, calibration, digest, inputs.ignored)


def _check_loss(loss: object, recipe: Recipe) -> None:
    """Raise unless there is a loss where one is needed, and it can be called."""
    if loss is not None and not callable(loss):
        raise TypeError(
            f"loss must be a function of the model's output and the batch, got {type(loss).__name__}. For a model that "
            "computes its own: loss=lambda output, batch: output.loss"
        )
    learns = [
        what
        for what, needs in (
            (f"method {method_name(recipe.method)!r}", recipe.method.needs),
            (f"the allocation {recipe.allocation!r}", needs_of(recipe.allocation, recipe.method)),
        )
        if needs & GRADIENTS
    ]
    if learns and loss is None:
        raise RecipeError(
            f"{learns[0]} learns from the gradient of a loss, and there is none.\n"
            "Pass loss=, a function of the model's output and a batch that returns a scalar tensor."
        )
