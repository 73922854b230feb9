"""Which layers a sparse training works on: plain ones, or the sparse layers that the model has already."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from secateur._errors import RecipeError
from secateur.layers import FLATTENED, Layer, select_layers
from secateur.nn import SparseLayer, replaceable_layers, sparse_layers
from secateur.patterns import Column, SparsityPattern, with_channel_width
from secateur.reports import SkippedLayer
from secateur.training._masked_model import trainable
from secateur.training._settings import TrainingSettings


@dataclass(frozen=True)
class FoundLayers:
    """The layers of a model that a training makes sparse.

    Args:
        layers: each with one weight.
        skipped: the others, with reasons.
        sparse: for each layer its modules, if they are sparse layers already; else empty.
    """

    layers: list[Layer]
    skipped: list[SkippedLayer]
    sparse: list[tuple[SparseLayer, ...]]

    @property
    def budget(self) -> tuple[SparsityPattern, float] | None:
        """The pattern and the sparsity that the sparse layers were made for, if there are any: the same for all."""
        return _budget(self.sparse[0][0]) if self.sparse else None


def find_layers(model: nn.Module, settings: TrainingSettings) -> FoundLayers:
    """Return the layers to make sparse.

    Raises:
        RecipeError: there is none, or one that the method cannot work on.
    """
    method = settings.method
    if not method.learns:
        return FoundLayers(*trainable(*select_layers(model, settings.include, settings.exclude)), [])
    existing = sparse_layers(model)
    if existing:
        _check_existing(existing, settings)
        found = _existing_layers(model, existing)
    else:
        for layer in select_layers(model, settings.include, settings.exclude)[0]:
            if layer.is_sharded:
                raise RecipeError(
                    f"{layer.title}: its weight is sharded already, and {method.name} needs layers of its own.\n"
                    "Call secateur.sparsify_(model, pattern=..., sparsity=...) before fully_shard."
                )
        found = FoundLayers(*trainable(*replaceable_layers(model, settings.include, settings.exclude)), [])
    _check_readers(model, found.layers, method.name)
    return found


def _check_existing(existing: Mapping[str, SparseLayer], settings: TrainingSettings) -> None:
    """Raise unless the model's sparse layers have one pattern and one sparsity, and those that were asked for."""
    if "" in existing:
        raise RecipeError(
            "the model is itself a sparse layer, which cannot be made plain in place at the end.\n"
            "Put it into an nn.Sequential."
        )
    if settings.include or settings.exclude:
        raise RecipeError(
            f"the model has {len(existing)} sparse layers already, which are the ones to train; "
            "give include and exclude to sparsify_, not here."
        )
    pattern, sparsity = settings.pattern, settings.sparsity
    budgets: dict[tuple[SparsityPattern, float], str] = {}
    for name, module in existing.items():
        if module.pattern is None:
            raise RecipeError(
                f"{name}: it learns its threshold by gradient, without a pattern or budget.\n"
                "Train it by its own gradients alone, or make it with a pattern and a sparsity."
            )
        own, target = _budget(module)
        budgets[own, target] = name
        if (pattern is not None and pattern not in (own, module.pattern)) or (
            sparsity is not None and sparsity != target
        ):
            raise RecipeError(
                f"{name}: it was made for {own} at {target:g}, but {pattern or 'its pattern'} at "
                f"{'its sparsity' if sparsity is None else f'{sparsity:g}'} was asked. Leave both out here."
            )
    if len(budgets) > 1:
        lines = "\n".join(f"  {name}: {own} at {target:g}" for (own, target), name in budgets.items())
        raise RecipeError(
            "the model's sparse layers were made for different patterns or sparsities, but a training has one:\n"
            + lines
        )


def _check_readers(model: nn.Module, layers: list[Layer], method: str) -> None:
    """Raise if another module reads a weight: it would read the pruned weights too until the mask is final."""
    readers: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            readers.setdefault(id(parameter), []).append((name, module))
    for layer in layers:
        for name, module in readers[id(layer.parameter)]:
            if module not in layer.modules:
                raise RecipeError(
                    f"{layer.title}: {name!r} ({type(module).__name__}) reads the same weight, but would not see "
                    f"the mask that {method} learns.\n"
                    "Exclude the layer, or use a method that keeps plain layers, such as 'magnitude'."
                )


def _budget(module: SparseLayer) -> tuple[SparsityPattern, float]:
    """The pattern and sparsity that a sparse layer was asked for: ``Column()`` also where channels are wider."""
    assert module.pattern is not None
    assert module.target is not None
    asked = Column() if module.pattern == with_channel_width(Column(), math.prod(module.weight.shape[2:])) else None
    return asked or module.pattern, module.target


def _existing_layers(model: nn.Module, existing: Mapping[str, SparseLayer]) -> FoundLayers:
    """Sparse layers as layers, those that share a weight together."""
    shared: dict[int, list[str]] = {}
    for name, module in existing.items():
        shared.setdefault(id(module.weight), []).append(name)
    sparse = [tuple(existing[name] for name in names) for names in shared.values()]
    layers = [
        Layer(first, modules, FLATTENED, tuple(others))
        for (first, *others), modules in zip(shared.values(), sparse, strict=True)
    ]
    skipped = [
        SkippedLayer(name, type(module).__name__, "not a sparse layer")
        for name, module in model.named_modules()
        if name not in existing and any(True for _ in module.parameters(recurse=False))
    ]
    return FoundLayers(layers, skipped, sparse)
