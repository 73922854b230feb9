"""What the callbacks share: a sparse training that begins or goes on from a checkpoint, and its state on disk."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import FormatError, PatternError, RecipeError
from secateur._sharding import is_sharded
from secateur.files import open_safetensors, write_safetensors
from secateur.nn import MaskSettings, replaceable_layers, sparse_layers, sparsify_
from secateur.patterns import Unstructured
from secateur.reports import Report
from secateur.training import SparseTraining, TrainingSettings
from secateur.zeros import apply_masks_

STATE_FILE = "sparse_training.safetensors"
_METADATA = "secateur.SparseTraining"
_LOG = logging.getLogger("secateur")


def swap_(model: nn.Module, settings: TrainingSettings) -> dict[str, str]:
    """Swap in the layers of a method that learns its mask, before the model is wrapped or a checkpoint is loaded.

    Until the training begins they compute what the plain layers did. A model that has sparse layers is left as it is.

    Returns:
        Why other modules stay plain, by name, for :func:`finish`: the training itself only sees that they do.
    """
    if not settings.method.learns or sparse_layers(model):
        return {}
    _, skipped = replaceable_layers(model, settings.include, settings.exclude)
    masks = MaskSettings(pattern=settings.pattern or Unstructured(), sparsity=settings.sparsity)
    for layer in sparsify_(model, settings=masks, include=settings.include, exclude=settings.exclude).values():
        layer.solve_threshold(0.0)
    return {entry.name: entry.reason for entry in skipped}


def begin(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: TrainingSettings,
    *,
    state: Mapping[str, Any] | None = None,
    source: str = "",
) -> SparseTraining:
    """Return the training, at its first step or where ``state`` left it.

    Args:
        model: with its sparse layers if the method needs them, and with its trained weights if there is a state.
        optimizer: of the weights, as PyTorch made it.
        settings: with the number of steps.
        state: what ``SparseTraining.state_dict`` returned.
        source: where the state comes from, for errors. Given, the weights are checked against the state.

    Raises:
        RecipeError: as for :class:`SparseTraining`, or the state is of another recipe or of other weights.
        FormatError: the state lacks something.
    """
    has_layers = settings.method.learns and bool(sparse_layers(model))
    if has_layers:  # made for these settings: include and exclude have done their work
        settings = replace(settings, include=(), exclude=())
    training = SparseTraining.from_settings(model, optimizer, settings, to_resume=state is not None)
    if state is not None:
        restore(training, state, source=source, learned_are_loaded=has_layers)
    return training


def restore(
    training: SparseTraining, state: Mapping[str, Any], *, source: str = "", learned_are_loaded: bool = True
) -> None:
    """Load a state that comes from a file and may not be what it should be.

    Args:
        training: made with the same settings.
        state: what ``state_dict`` returned.
        source: see :func:`begin`.
        learned_are_loaded: the sparse layers have been loaded from the same checkpoint, their buffers included.

    Raises:
        RecipeError: the state is of another recipe or of other weights; nothing has changed.
        FormatError: the state lacks something; nothing has changed.
    """
    where = source or "the checkpoint"
    own = training.state_dict()
    weights = state.get("weights")
    if not isinstance(weights, Mapping) or not state.keys() >= own.keys():
        raise FormatError(f"{where}: the state of the sparse training is incomplete. Restore the checkpoint.")
    for name, expected in own["weights"].items():
        entry = weights.get(name, expected)  # other layers: load_state_dict says so, with all their names
        if not isinstance(entry, Mapping) or entry.keys() != expected.keys():
            raise FormatError(f"{where}: the state of layer {name!r} is incomplete. Restore the checkpoint.")
        mask = entry["mask"]
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
            raise FormatError(f"{where}: the mask of layer {name!r} is not a bool tensor. Restore the checkpoint.")
    if source and (learned_are_loaded or not training.method.learns):
        for name in training.layers_unlike(state):
            raise RecipeError(
                f"{name}: the masks in {source} are not those of the weights that were loaded.\n"
                "Resume from a checkpoint directory whose files were all written by the same run."
            )
    training.load_state_dict(state)


def known_steps(steps: float) -> int:
    """Return the number of steps that a Trainer expects to make, or raise if it does not know."""
    if not math.isfinite(steps) or steps < 1:
        raise RecipeError(f"the Trainer expects {steps} optimizer steps. Tell the callback how many: steps=...")
    return int(steps)


def finish(training: SparseTraining, reasons: Mapping[str, str]) -> Report:
    """Finalize a training, and return its report with the reasons that :func:`swap_` found."""
    report = training.finalize()
    skipped = (replace(entry, reason=reasons.get(entry.name, entry.reason)) for entry in report.skipped)
    return replace(report, skipped=tuple(skipped))


def tell(report: Report) -> None:
    """Log a report, and as warnings what the user should look at."""
    _LOG.info("%s", report)
    for warning in report.warnings:
        _LOG.warning("%s", warning)


def keep_zeros_(model: nn.Module, report: Report) -> None:
    """Set pruned weights to zero that something wrote to since the training was finalized, and warn of it."""
    if any(is_sharded(parameter) for parameter in model.parameters()):
        return  # processes may have parted, and to read the weights they would have to meet
    changed = {name: count for name, count in apply_masks_(model, report).items() if count}
    if changed:
        warnings.warn(
            f"{sum(changed.values()):,} pruned weights of {len(changed)} parameters, {next(iter(changed))!r} first, "
            "were changed after the sparse training ended, such as by the module's own on_train_end. They have been "
            "set to zero again.",
            stacklevel=2,
        )


def warn_of_lost_zeros(model: nn.Module, report: Report) -> None:
    """Warn if something wrote to pruned weights since the training was finalized."""
    if any(is_sharded(parameter) for parameter in model.parameters()):
        return
    try:
        report.verify(model)
    except PatternError as error:
        warnings.warn(str(error), stacklevel=2)


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a training: tensors, and everything else as JSON in the header; complete, or not at all.

    Raises:
        FormatError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}

    def without_tensors(value: Any, key: str) -> Any:
        if isinstance(value, Tensor):
            tensors[key] = value.detach().cpu().contiguous()
            return {"tensor": key}
        if isinstance(value, Mapping):
            return {"items": [[name, without_tensors(part, f"{key}/{name}")] for name, part in value.items()]}
        return {"value": value}

    header = json.dumps(without_tensors(state, "state"))
    write_safetensors(path, tensors, {_METADATA: header})


def read_state(path: Path) -> dict[str, Any]:
    """Read what :func:`write_state` wrote.

    Raises:
        FormatError: there is no such file, or it holds something else.
    """
    with open_safetensors(path) as file:
        header = (file.metadata() or {}).get(_METADATA)
        names = set(file.keys())

        def with_tensors(value: Any) -> Any:
            match value:
                case {"tensor": str(key)} if key in names:
                    return file.get_tensor(key)
                case {"items": list(items)}:
                    return {str(name): with_tensors(part) for name, part in items}
                case {"value": plain}:
                    return plain
            raise ValueError(value)

        try:
            state = with_tensors(json.loads(header or ""))
        except (ValueError, TypeError, RecursionError):
            state = None
    if not isinstance(state, dict):
        raise FormatError(f"{path} is not the state of a sparse training, or damaged. Restore the checkpoint.")
    return state
