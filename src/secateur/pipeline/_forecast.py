"""What a pipeline would do, as far as that can be known without doing it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur._errors import SparsityError
from secateur._types import Progress
from secateur.calibration import read_text
from secateur.files import ModelDirectory
from secateur.huggingface import example_inputs, is_causal, load_model, open_model
from secateur.layers import select_layers
from secateur.pipeline._figures import input_of
from secateur.pipeline._recipe import PipelineRecipe, StageRecipe
from secateur.pipeline._run import evaluations_of
from secateur.pipeline._stages import recipe_of
from secateur.shapes import stored_bytes, stored_dtypes
from secateur.shrinking import shrink_


@dataclass(frozen=True)
class StageForecast:
    """What one stage would do.

    Args:
        number: from 1.
        run: its kind.
        parameters: of the model afterwards.
        nbytes: of the dense weights afterwards; a packed model may have fewer.
        layers: names and shapes of the layers that it works on, where that is known.
        lines: what else is known.
        refused: why it cannot be done; empty if nothing is known against it.
    """

    number: int
    run: str
    parameters: int
    nbytes: int
    layers: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    refused: str = ""

    def __str__(self) -> str:
        what = f"{self.number}. {self.run}: {self.parameters:,} parameters, {self.nbytes:,} bytes"
        lines = [f"refused: {self.refused}"] if self.refused else list(self.lines)
        if self.layers:
            lines.append(f"{len(self.layers)} layers: {', '.join(self.layers)}")
        return "\n".join([what, *(f"   {line}" for line in lines)])


@dataclass(frozen=True)
class Forecast:
    """What :meth:`Pipeline.run` would do.

    Args:
        model: directory of the dense model.
        stages: in order. After one that is refused, the others are not looked at.
        refused: why the recipe cannot be run on the model at all; empty if nothing is known against it.
    """

    model: str
    stages: tuple[StageForecast, ...]
    refused: tuple[str, ...] = ()

    @property
    def can_run(self) -> bool:
        """Whether nothing is known that would be refused."""
        return not self.refused and not any(stage.refused for stage in self.stages)

    def __str__(self) -> str:
        end = "nothing was written; nothing is known that would be refused" if self.can_run else "this would be refused"
        return "\n".join([*map(str, self.stages), *(f"refused: {text}" for text in self.refused), end])

    def to_json(self) -> str:
        """Return the forecast as JSON text."""
        return json.dumps({**asdict(self), "can_run": self.can_run})


def forecast(recipe: PipelineRecipe, source: Path, progress: Progress) -> Forecast:
    """Return what a recipe would do to the model in a directory. The model is loaded; nothing is written."""
    directory = open_model(source)
    progress("loading the model", 0, 1)
    model, _ = load_model(directory, "cpu", torch.float32, with_head=True)
    refused = [
        *_refusals(lambda: evaluations_of(recipe, source, None)),
        *(text for shape in recipe.shapes for text in _refusals(partial(input_of, model, shape))),
    ]
    stages: list[StageForecast] = []
    for stage in recipe.stages:
        progress(f"looking at {stage.title}", stage.number - 1, len(recipe.stages))
        stages.append(_stage(stage, model, directory))
        if stages[-1].refused:
            break
    return Forecast(str(source), tuple(stages), tuple(refused))


def _refusals(look: Callable[[], object]) -> list[str]:
    try:
        look()
    except SparsityError as error:
        return [str(error)]
    return []


def _stage(stage: StageRecipe, model: nn.Module, directory: ModelDirectory) -> StageForecast:
    layers: tuple[str, ...] = ()
    lines: list[str] = []
    refused = ""
    try:
        if stage.calibration is not None:
            read_text(stage.calibration.path)
            lines.append(f"learns from {stage.calibration.path}")
        if stage.run in _LOOK:
            layers, found = _LOOK[stage.run](stage.settings, model, directory)
            lines += found
    except SparsityError as error:
        refused = str(error)
    if stage.kind.form:
        lines.append(_FORMS[stage.kind.form])
    lines += [f"gate: {gate}" for gate in stage.gates]
    size = stored_bytes(model, stored_dtypes(model, directory))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return StageForecast(stage.number, stage.run, parameters, size, layers, tuple(lines), refused)


_FORMS = {
    "packed": "packing measures which layers get smaller and faster; the others stay as they are",
    "exported": "what is exported is compared with PyTorch; if it differs, the run stops and nothing is written",
}
_Seen = tuple[tuple[str, ...], list[str]]


def _look_at_pruning(settings: Mapping[str, Any], model: nn.Module, directory: ModelDirectory) -> _Seen:
    recipe = recipe_of(settings)
    base = getattr(model, "base_model", model)
    pruned = model if is_causal(directory) or not isinstance(base, nn.Module) else base  # as prune_directory loads it
    layers, _ = select_layers(pruned, recipe.include, recipe.exclude)
    count = gone = 0
    for layer in layers:
        shape = layer.matrix().shape
        count, gone = count + shape.numel(), gone + recipe.pattern.num_pruned(shape, recipe.sparsity)
    named = tuple(f"{layer.name} {' x '.join(map(str, layer.matrix().shape))}" for layer in layers)
    return named, [f"prunes {gone:,} of {count:,} weights to {recipe.pattern}"]


def _look_at_shrinking(settings: Mapping[str, Any], model: nn.Module, directory: ModelDirectory) -> _Seen:
    if settings.get("zeros"):
        return (), ["what goes depends on the zeros that there will be, so sizes below are those of before"]
    asked = {key: value for key, value in settings.items() if key != "method"}
    # Sizes follow from what is asked for. Which units go is not looked at, so that no text is needed.
    report = shrink_(model, [example_inputs(model)], method="magnitude", **asked)
    named = tuple(f"{found.name} {found.before:,} -> {found.after:,}" for found in report.dimensions if found.removed)
    return named, [report.first_line]


_LOOK: Mapping[str, Callable[[Mapping[str, Any], nn.Module, ModelDirectory], _Seen]] = {
    "prune": _look_at_pruning,
    "shrink": _look_at_shrinking,
}
