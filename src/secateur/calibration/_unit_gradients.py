"""How a loss changes when the inputs of a layer are scaled, feature by feature."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from secateur._errors import StatisticsError
from secateur.calibration._batches import Forward, call_model, quiet
from secateur.layers import Layer

Loss: TypeAlias = Callable[[Any, Any], Tensor]  # of what the model returned and of the batch: a scalar


def gather_gradients(
    model: nn.Module,
    batches: Sequence[Any],
    layers: Iterable[Layer],
    loss: Loss,
    forward: Forward = call_model,
    on_batch: Callable[[int], None] = lambda done: None,
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
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    reached: set[str] = set()
    with quiet(model), _only(model, layers) as gradients:
        for index, batch in enumerate(batches):
            sums = {
                layer.name: torch.zeros(layer.matrix().shape[1], dtype=torch.float64, device=layer.parameter.device)
                for layer in layers
            }

            def read(layer: Layer, gradient: Tensor, sums: dict[str, Tensor] = sums) -> None:
                products = layer.matrix().double() * layer.to_matrix(gradient).double()
                sums[layer.name] += products.sum(0)
                reached.add(layer.name)

            gradients.read = read
            with torch.enable_grad():
                value = _checked(loss(forward(model, copy.deepcopy(batch)), batch), index)
                value.backward()
            for name, total in sums.items():
                if not total.isfinite().all():
                    raise StatisticsError(
                        f"{name or '(the model itself)'}: the gradients of batch {index} are NaN or infinite.\n"
                        "Check the loss, or calibrate in float32."
                    )
                found[name].append(total)
            on_batch(index + 1)
    for layer in layers:
        if layer.name not in reached:
            raise StatisticsError(
                f"{layer.title}: the loss does not depend on its weight in any of {len(batches)} batches.\n"
                "Give a loss that depends on it, batches that use it, or exclude it."
            )
    return {name: torch.stack(sums) for name, sums in found.items()}


class _Reader:
    """What is called with each gradient."""

    read: Callable[[Layer, Tensor], None]


@contextmanager
def _only(model: nn.Module, layers: Sequence[Layer]) -> Iterator[_Reader]:
    """Compute gradients of the weights of some layers only, and hand each out instead of keeping it."""
    reader = _Reader()
    by_parameter: dict[int, list[Layer]] = {}
    for layer in layers:
        by_parameter.setdefault(id(layer.parameter), []).append(layer)
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    handles = []

    def hand_out(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        for layer in by_parameter[id(parameter)]:
            with torch.no_grad():
                reader.read(layer, gradient)

    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in by_parameter)
            if id(parameter) in by_parameter:
                handles.append(parameter.register_post_accumulate_grad_hook(hand_out))
        yield reader
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _checked(value: object, index: int) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise StatisticsError(f"the loss of batch {index} must be a scalar tensor, got {what}.")
    if not value.requires_grad:
        raise StatisticsError(
            f"the loss of batch {index} does not depend on the weights of the layers.\n"
            "Compute it from what the model returned, without detach() or item()."
        )
    if not value.isfinite().all():
        raise StatisticsError(f"the loss of batch {index} is {value.item():g}, so nothing can be learned from it.")
    return value
