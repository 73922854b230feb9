"""How far does the output of a model move when some of its weights are changed? Asked on a few batches."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur._errors import StatisticsError
from secateur._types import Weight
from secateur.calibration import Forward, Padding
from secateur.layers import Layer

BATCHES = 2  # on which the model is run once for each layer
_MOST_NUMBERS = 1 << 25  # of the dense output of a batch that are kept, in whole rows spread evenly


class OutputEffect:
    """Measures the effect of weights on the output, relative to the model as it is when this is made.

    For an output with logits it is the mean divergence (Kullback-Leibler) of the changed model's distribution from that
    of the dense one; for any other the squared error of the output, relative to its square. Padding does not count.

    Args:
        model: in the state that :func:`quiet` establishes.
        batches: to choose a few from, spread evenly.
        paddings: of each batch.
        forward: how to call the model on a batch.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], paddings: Sequence[Padding], forward: Forward) -> None:
        self._model, self._forward = model, forward
        chosen = sorted({round(i * (len(batches) - 1) / max(BATCHES - 1, 1)) for i in range(BATCHES)})
        self._batches = [batches[number] for number in chosen]
        self._rows: list[Tensor | None] = []
        self._dense: list[Tensor] = []
        for number in chosen:
            rows, output, self._has_logits = self._run_dense(batches[number], paddings[number].fresh())
            self._rows.append(rows)
            self._dense.append(output)

    def __call__(self, changes: Sequence[tuple[Layer, Weight]]) -> float:
        """Return how far the output moves with some weights changed. The model is as before on every exit."""
        before = [layer.matrix().clone() for layer, _ in changes]
        try:
            for layer, weight in changes:
                layer.write_(weight)
            return self.of(self._model)
        finally:
            for (layer, _), weight in zip(changes, before, strict=True):
                layer.write_(weight)

    def of(self, model: nn.Module) -> float:
        """Return how far the output of another model is from that of the dense one: of the same in an engine."""
        return sum(
            self._distance(self._run(batch, rows, model), dense)
            for batch, rows, dense in zip(self._batches, self._rows, self._dense, strict=True)
        ) / len(self._batches)

    def _run_dense(self, batch: Any, padding: Padding) -> tuple[Tensor | None, Tensor, bool]:
        """Which rows of the output count, these rows, and whether they are logits."""
        real = None
        with padding.following():
            found, has_logits = _output(self._forward(self._model, copy.deepcopy(batch)))
            if found.ndim > 2:
                with suppress(StatisticsError):  # of an output that is no longer one row for each token
                    real = padding.kept("", found)
        flat = found.reshape(-1, found.shape[-1]) if found.ndim else found.reshape(1, 1)
        rows = None if real is None or real.numel() != len(flat) else real.flatten().nonzero().flatten()
        number = len(flat) if rows is None else len(rows)
        if number * flat.shape[1] > _MOST_NUMBERS:
            most = max(1, _MOST_NUMBERS // flat.shape[1])
            evenly = torch.linspace(0, number - 1, most, device=flat.device).round().long()
            rows = evenly if rows is None else rows[evenly]
        kept = (flat if rows is None else flat[rows]).float()
        return rows, torch.log_softmax(kept, -1) if has_logits else kept.clone(), has_logits

    def _run(self, batch: Any, rows: Tensor | None, model: nn.Module) -> Tensor:
        found, _ = _output(self._forward(model, copy.deepcopy(batch)))
        flat = found.reshape(-1, found.shape[-1]) if found.ndim else found.reshape(1, 1)
        return (flat if rows is None else flat[rows]).float()

    def _distance(self, found: Tensor, dense: Tensor) -> float:
        if self._has_logits:
            logs = torch.log_softmax(found, -1)
            moved = float(torch.where(dense > -torch.inf, dense.exp() * (dense - logs), 0.0).sum(-1).double().mean())
        else:
            square = float(dense.square().sum(dtype=torch.float64))
            moved = float((found - dense).square().sum(dtype=torch.float64)) / square if square else 0.0
        return max(moved, 0.0)


def _output(output: Any) -> tuple[Tensor, bool]:
    """The tensor of an output that counts, and whether it is logits.

    Raises:
        StatisticsError: there is none.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.ndim and logits.shape[-1] > 1:
        return logits, True
    for name in ("sentence_embedding", "last_hidden_state"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found, False
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not leaves:
        raise StatisticsError(
            f"the model returned {type(output).__name__} without a floating-point tensor, and the allocation "
            "'sensitivity' compares outputs.\nPass forward=, a function that returns what is to be compared."
        )
    return leaves[0], False
