"""The gradient of a loss by the weights of a stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import StatisticsError
from secateur._types import Weight
from secateur.calibration._backward import Loss, each_gradient, no_gradient
from secateur.calibration._batches import Forward, call_model
from secateur.calibration._statistics import LayerStatistics, Need
from secateur.layers import Layer

GRADIENTS: frozenset[Need] = frozenset({"gradient", "gradient_squares"})


def add_gradients(
    gathered: Mapping[str, LayerStatistics],
    needs: Iterable[Need],
    model: nn.Module,
    batches: Sequence[Any],
    layers: Iterable[Layer],
    loss: Loss,
    forward: Forward = call_model,
    on_batch: Callable[[int], None] = lambda done: None,
    given: Sequence[Any] | None = None,
) -> dict[str, LayerStatistics]:
    """Return the statistics of a stage's layers with the gradients of the loss by their weights.

    The model is run as it is now: for a stage, the stages before it are pruned already, and those after it are not.

    Cost: for each batch one forward pass of the whole model, and one backward pass from its end to the first of the
    layers. Memory: the activations of one batch from there on, one float32 tensor for each weight and statistic, and
    one gradient more. So a model of n stages costs n forward passes, and n backward passes of half its length.

    Args:
        gathered: the statistics of the inputs, by layer name. Only layers in it are looked at.
        needs: which gradients.
        model: in the state that :func:`quiet` establishes. ``requires_grad`` and ``.grad`` are afterwards as before.
        batches: to call the model with.
        layers: of the stage.
        loss: of what the model returned for a batch, and of the batch: a scalar that depends on the weights.
        forward: how to call the model on a batch.
        on_batch: called after each batch with the number of batches done.
        given: the batches for the loss, where those to call the model with lack something, such as labels.

    Returns:
        By layer name. One of a stack that no input of its own reached, such as an expert, is left out: there is no
        gradient to tell its weights apart.

    Raises:
        StatisticsError: a loss that is no finite scalar, or that does not depend on the weight of a layer.
    """
    needs = frozenset(needs)
    if not needs:
        return dict(gathered)
    layers = [layer for layer in layers if layer.name in gathered and gathered[layer.name].own_tokens != 0]
    if not layers:
        return {}
    sums: dict[str, dict[Need, Tensor]] = {}

    def read(index: int, layer: Layer, gradient: Weight) -> None:
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if layer.name not in sums:
            sums[layer.name] = {need: torch.zeros_like(wide) for need in needs}
        found = sums[layer.name]
        if "gradient" in found:
            found["gradient"] += wide
        if "gradient_squares" in found:
            found["gradient_squares"].addcmul_(wide, wide)

    each_gradient(model, batches, layers, loss, forward, read, on_batch, given)
    for layer in layers:
        if layer.name not in sums:
            raise no_gradient(layer, len(batches))
        for total in sums[layer.name].values():
            if not total.div_(len(batches)).isfinite().all():
                raise StatisticsError(
                    f"{layer.title}: the squares or the sum of its gradients are beyond the range of {total.dtype}.\n"
                    "Scale the loss down."
                )
    return {layer.name: gathered[layer.name].with_gradients(**sums.pop(layer.name)) for layer in layers}
