"""How a loss changes when the inputs of a layer are scaled, feature by feature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur._types import Weight
from secateur.calibration._backward import Loss, each_gradient, no_gradient
from secateur.calibration._batches import Forward, call_model, quiet
from secateur.layers import Layer


def gather_gradients(
    model: nn.Module,
    batches: Sequence[Any],
    layers: Iterable[Layer],
    loss: Loss,
    forward: Forward = call_model,
    on_batch: Callable[[int], None] = lambda done: None,
    given: Sequence[Any] | None = None,
) -> dict[str, Tensor]:
    r"""Return the derivative of each batch's loss by a factor on each input feature of each layer, at one.

    A factor on input j of a layer is one on column j of its weight, so that the derivative is
    ``sum_i W_ij dL/dW_ij``, in each layer kind. The gradient of a weight is read as soon as it is there, and freed.

    Cost: one forward and one backward pass for each batch, with the memory of one.

    Args:
        model: any module; weights, their gradients and ``requires_grad`` are afterwards as before.
        batches: what :func:`load_batches` returned.
        layers: that read the features.
        loss: of what the model returned for a batch, and of the batch: a scalar that depends on the weights.
        forward: how to call the model on a batch.
        on_batch: called after each batch with the number of batches done.
        given: the batches for the loss, where those to call the model with lack something, such as labels.

    Returns:
        By layer name, float64 ``[batches, in]``, which is the statistic ``input_gradients``. In a grouped convolution,
        a feature is the same column of all groups.

    Raises:
        StatisticsError: a loss that is no finite scalar, or that depends on no weight of a layer in any batch.

    Example:
        >>> import torch
        >>> from secateur.calibration import gather_gradients
        >>> from secateur.layers import select_layers
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        >>> _ = torch.nn.init.constant_(model[0].weight, 3.0)
        >>> layers, _ = select_layers(model, include=["0"])
        >>> gather_gradients(model, [torch.tensor([[1.0, 2.0]])], layers, lambda output, batch: output.sum())
        {'0': tensor([[3., 6.]], dtype=torch.float64)}
    """
    layers = list(layers)
    found = {
        layer.name: torch.zeros(
            len(batches), layer.matrix().shape[1], dtype=torch.float64, device=layer.parameter.device
        )
        for layer in layers
    }
    reached: set[str] = set()

    def read(index: int, layer: Layer, gradient: Weight) -> None:
        found[layer.name][index] += (layer.matrix().double() * gradient.double()).sum(0)
        reached.add(layer.name)

    with quiet(model):
        each_gradient(model, batches, layers, loss, forward, read, on_batch, given)
    for layer in layers:
        if layer.name not in reached:
            raise no_gradient(layer, len(batches))
    return found
