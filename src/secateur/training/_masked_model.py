"""A model whose weights are being made sparse: what every object that trains one holds and shares."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from secateur._checks import instance
from secateur._errors import PatternError, RecipeError
from secateur._types import Mask
from secateur.layers import Layer, check_model, reshard, sharded_modules
from secateur.patterns import SparsityPattern
from secateur.reports import LayerReport, Report, SkippedLayer, StoredMasks, empty_rows, thumbnail, versions
from secateur.training._weights import TrainedWeight
from secateur.zeros import considered_of, parameter_names, stored_masks, weigh_skipped, weights_of

STATE_VERSION = 1

W = TypeVar("W", bound=TrainedWeight)


class MaskedModel(Generic[W]):
    """The weights of a model that are being made sparse, until the one report about them.

    Args:
        model: that holds the weights.
        weights: by the name of their layer.
        skipped: the other layers, with reasons.
        closed: what the error says once there is a report.

    Attributes:
        weights: by the name of their layer.
        report: of :meth:`close`; None before.
    """

    def __init__(
        self, model: nn.Module, weights: Mapping[str, W], skipped: Iterable[SkippedLayer], *, closed: str
    ) -> None:
        self.weights = dict(weights)
        self.report: Report | None = None
        self._skipped = tuple(skipped)
        self._closed = closed
        self._model = model
        self._sharded = sharded_modules(model)

    @property
    def masks(self) -> dict[str, Mask]:
        """The hard masks, ``[out, in]`` bool, True = kept, by layer name: copies."""
        return {name: weight.hard_mask() for name, weight in self.weights.items()}

    @property
    def parameter_masks(self) -> StoredMasks:
        """The hard masks in the shape of their parameters, by the names of these; of the report once there is one."""
        if self.report is not None:
            return self.report.masks
        return stored_masks((weight.layer, weight.hard_mask()) for weight in self.weights.values())

    def make_ready(self) -> None:
        """Prepare for work on the weights, which must come after this.

        After a forward pass without a backward FSDP leaves weights whole for the next; changes to those get lost.

        Raises:
            RecipeError: there is a report already.
        """
        self.must_be_open()
        reshard(self._sharded)

    def must_be_open(self) -> None:
        """Raise if there is a report already."""
        if self.report is not None:
            raise RecipeError(self._closed)

    @contextmanager
    def timed(self, weights: Iterable[W] | None = None) -> Iterator[None]:
        """Count the time of what is done inside among the seconds of these weights, or of all, by their size."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        weights = list(self.weights.values() if weights is None else weights)
        total = sum(weight.layer.parameter.numel() for weight in weights)
        for weight in weights:
            weight.seconds += seconds * weight.layer.parameter.numel() / total if total else 0.0

    @property
    def seconds(self) -> float:
        """Spent on all weights."""
        return sum(weight.seconds for weight in self.weights.values())

    def describe(self, layers: Iterable[LayerReport], recipe: Mapping[str, Any], seconds: float) -> Report:
        """Return a report about the layers, and about those that were left alone."""
        layers = tuple(layers)
        return Report(
            layers=layers,
            skipped=weigh_skipped(self._model, self._skipped, considered_of(layers)),
            recipe=dict(recipe),
            versions=versions(),
            seconds=seconds,
            whole=weights_of(self._model),
            stored_masks=self.parameter_masks,
        )

    def close(self, report: Report) -> Report:
        """Release all weights and keep the report: from now on :meth:`must_be_open` raises."""
        self.release()
        self.report = report
        return report

    def release(self) -> None:
        """Remove what was added to the parameters; their values stay."""
        for weight in self.weights.values():
            weight.release()

    def check_state(self, state: object, owner: str, key: str) -> None:
        """Raise unless a state was saved by an object of that class and a version that is known.

        Args:
            state: of any type.
            owner: name of the class.
            key: that its states have.
        """
        if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION or key not in state:
            raise RecipeError(f"this is not the state of a {owner}, or one of another version of secateur.")

    def check_names(self, names: Iterable[str]) -> None:
        """Raise unless these are the names of the layers, in order."""
        names = list(names)
        if names != list(self.weights):
            raise RecipeError(f"the state holds the layers {listed(names)}, but this model has {listed(self.weights)}.")


def check_trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise unless these are a model and an optimizer; then give up the whole copies of weights that FSDP holds."""
    check_model(model)
    instance("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
    reshard(sharded_modules(model))


def trainable(layers: Iterable[Layer], skipped: Iterable[SkippedLayer]) -> tuple[list[Layer], list[SkippedLayer]]:
    """Return the layers whose weights train, and all others with reasons: frozen ones stay as they are.

    Args:
        layers: that were selected.
        skipped: those that were not.

    Raises:
        RecipeError: all are frozen.
    """
    layers = list(layers)
    frozen = [layer for layer in layers if not layer.parameter.requires_grad]
    if len(frozen) == len(layers):
        raise RecipeError(
            f"{listed(layer.name for layer in frozen)}: no weight takes a gradient, so none can train.\n"
            "Unfreeze some, or select other layers."
        )
    reasons = [
        SkippedLayer(layer.name, type(layer.modules[0]).__name__, "frozen: it takes no gradient") for layer in frozen
    ]
    return [layer for layer in layers if layer.parameter.requires_grad], [*skipped, *reasons]


def check_optimizer(optimizer: torch.optim.Optimizer, layers: Sequence[Layer]) -> None:
    """Raise unless the optimizer holds every layer's weight.

    Raises:
        RecipeError: naming the first layer for which it is not so.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in layers:
        if id(layer.parameter) not in held:
            raise RecipeError(
                f"{layer.title}: its weight is not among the optimizer's {len(held)} parameters.\n"
                "Make the optimizer from the parameters of this very model, or exclude the layer."
            )


def report_layer(
    weight: TrainedWeight,
    mask: Mask,
    *,
    pattern: SparsityPattern,
    asked: float,
    count: int,
    notes: Sequence[str] = (),
) -> LayerReport:
    """Check a weight that is at its final mask, and describe it.

    Args:
        weight: that the mask was applied to.
        mask: ``[out, in]``.
        pattern: under which the mask must be legal.
        asked: the sparsity that was asked for.
        count: weights that the mask must prune.
        notes: for the report.

    Raises:
        PatternError: the mask breaks its pattern or count, or a pruned weight is not zero.
    """
    pattern.check(mask)
    matrix = weight.matrix()
    pruned = mask.numel() - int(mask.count_nonzero())
    if pruned != count or matrix.masked_select(~mask).count_nonzero():
        raise PatternError(f"{pruned} weights are pruned and not all of them zero, but {count} were asked for.")
    return LayerReport(
        name=weight.layer.name,
        shape=(matrix.shape[0], matrix.shape[1]),
        pattern=str(pattern),
        asked=asked,
        sparsity=pruned / max(1, mask.numel()),
        pruned=pruned,
        zeros=matrix.numel() - int(matrix.count_nonzero()),
        relative_error=None,
        tokens=None,
        dead_inputs=None,
        seconds=weight.seconds,
        tied_to=weight.layer.tied_to,
        notes=tuple(notes),
        thumbnail=thumbnail(mask),
        parameters=parameter_names(weight.layer),
        empty_rows=empty_rows(matrix),
    )


def listed(names: Iterable[str]) -> str:
    """Return layer names for a message, at most ten."""
    names = [name or "(the model itself)" for name in names]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
