"""What the callbacks share: settings of a sparse training whose optimizer is still to come, and its state on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import FormatError, RecipeError
from secateur.files import open_safetensors, write_safetensors
from secateur.nn import sparse_layers, sparsify_
from secateur.patterns import SparsityPattern, check_sparsity
from secateur.schedules import Schedule
from secateur.training import MaskedWeight, Method, SparseTraining, parse_method

STATE_FILE = "sparse_training.safetensors"
_METADATA = "secateur.SparseTraining"


@dataclass(frozen=True)
class Settings:
    """The arguments of ``SparseTraining`` but for the model and the optimizer, checked as far as they can be without.

    Raises:
        RecipeError: an unknown method, or steps below one.
        PatternError: a text that names no pattern, or a sparsity outside [0, 1].
        TypeError: an argument of the wrong type.
    """

    method: Method | str
    pattern: SparsityPattern | str | None
    sparsity: float | None
    steps: int | None
    schedule: Schedule | str | None
    update_every: int | None
    include: Iterable[str]
    exclude: Iterable[str]
    seed: int

    def __post_init__(self) -> None:
        method = parse_method(self.method) if isinstance(self.method, str) else self.method
        if not isinstance(method, Method):
            raise TypeError(f"method must be a Method or its name, got {type(method).__name__}")
        pattern = SparsityPattern.parse(self.pattern) if isinstance(self.pattern, str) else self.pattern
        if not isinstance(pattern, SparsityPattern | None):
            raise TypeError(f"pattern must be a SparsityPattern or its text, got {type(pattern).__name__}")
        sparsity = self.sparsity
        if sparsity is None and isinstance(self.schedule, Schedule):
            sparsity = self.schedule.final
        if sparsity is not None:
            check_sparsity(sparsity)
        if self.steps is not None:
            if isinstance(self.steps, bool) or not isinstance(self.steps, int):
                raise TypeError(f"steps must be an int, got {type(self.steps).__name__}")
            if self.steps < 1:
                raise RecipeError(f"steps must be at least 1, got {self.steps}.")
        for name, value in {
            "method": method,
            "pattern": pattern,
            "sparsity": sparsity,
            "include": tuple(self.include),
            "exclude": tuple(self.exclude),
        }.items():
            object.__setattr__(self, name, value)

    def swap_(self, model: nn.Module) -> None:
        """Swap in the layers of a method that learns its mask, before anybody wraps the model or loads a checkpoint.

        Until the training begins they compute what the plain layers did. A model that has sparse layers is left alone.
        """
        assert isinstance(self.method, Method)
        if self.method.learns and not sparse_layers(model):
            pattern = self.pattern or "unstructured"
            made = sparsify_(model, pattern=pattern, sparsity=self.sparsity, include=self.include, exclude=self.exclude)
            for layer in made.values():
                layer.solve_threshold(0.0)

    def begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int,
        state: Mapping[str, Any] | None = None,
        source: str = "",
    ) -> SparseTraining:
        """Return the training, at its first step or where ``state`` left it.

        Args:
            model: with its sparse layers if the method needs them, and with its trained weights if there is a state.
            optimizer: of the weights, as PyTorch made it.
            steps: optimizer steps in all.
            state: what ``SparseTraining.state_dict`` returned.
            source: where the state comes from, for errors. Given, the weights are checked against the state.

        Raises:
            RecipeError: as for :class:`SparseTraining`, or the state is of another recipe or of other weights.
            FormatError: the state lacks something.
        """
        assert isinstance(self.method, Method)
        has_layers = self.method.learns and bool(sparse_layers(model))
        training = (SparseTraining if state is None else _Resumed)(
            model,
            optimizer,
            method=self.method,
            pattern=self.pattern,
            sparsity=self.sparsity,
            steps=steps,
            schedule=self.schedule,
            update_every=self.update_every,
            include=() if has_layers else self.include,
            exclude=() if has_layers else self.exclude,
            seed=self.seed,
        )
        if state is not None:
            restore(training, state, source=source, learned_are_loaded=has_layers)
        return training


class _Resumed(SparseTraining):
    """A training made on weights that are trained already.

    Made, a training puts the model and the optimizer at their first masks, which would be wrong here. So it waits until
    it has its state.
    """

    resumed = False

    def _update(self) -> None:
        if self.resumed:
            super()._update()


def restore(
    training: SparseTraining, state: Mapping[str, Any], *, source: str = "", learned_are_loaded: bool = True
) -> None:
    """Load a state that comes from a file and may not be what it should be.

    Args:
        training: made with the same settings.
        state: what ``state_dict`` returned.
        source: see :meth:`Settings.begin`.
        learned_are_loaded: the sparse layers have been loaded from the same checkpoint, their buffers included.
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
    training.load_state_dict(state)
    if isinstance(training, _Resumed):
        training.resumed = True
    if source:
        for name, weight in training._weights.items():
            if isinstance(weight, MaskedWeight):
                mask = weight.mask
                belongs = mask is None or not weight.matrix().masked_select(~mask).count_nonzero()
            else:
                before, after = own["weights"][name], weights[name]
                belongs = not learned_are_loaded or all(_same(before[key], after[key]) for key in ("mask", "threshold"))
            if not belongs:
                raise RecipeError(
                    f"{name}: the masks in {source} are not those of the weights that were loaded.\n"
                    "Resume from a checkpoint directory whose files were all written by the same run."
                )


def abandon(training: SparseTraining | None) -> None:
    """Take a training that was interrupted off the model: another one takes over."""
    for weight in () if training is None else training._weights.values():
        if isinstance(weight, MaskedWeight):
            weight.release()


def known_steps(steps: float) -> int:
    """Return the number of steps that a Trainer expects to make, or raise if it does not know."""
    if not math.isfinite(steps) or steps < 1:
        raise RecipeError(f"the Trainer expects {steps} optimizer steps. Tell the callback how many: steps=...")
    return int(steps)


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


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b.to(a.device))
