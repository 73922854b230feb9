"""Run a model with a loss, and hand out the gradients of some weights: none of them stays on the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from secateur._errors import StatisticsError
from secateur._types import Weight
from secateur.calibration._batches import Forward
from secateur.layers import Layer

Loss: TypeAlias = Callable[[Any, Any], Tensor]  # of what the model returned and of the batch: a scalar
Read: TypeAlias = Callable[[int, Layer, Weight], None]  # of a batch's index, a layer, and its gradient as [out, in]


def each_gradient(
    model: nn.Module,
    batches: Sequence[Any],
    layers: Sequence[Layer],
    loss: Loss,
    forward: Forward,
    read: Read,
    on_batch: Callable[[int], None],
    given: Sequence[Any] | None = None,
) -> None:
    """Call ``read`` with the gradient of every batch's loss by every layer's weight. The gradient is freed after that.

    Only the weights of the layers require gradients meanwhile, so that a forward pass keeps activations from the first
    of them on. A batch whose loss depends on none of them has no gradient.

    Args:
        model: in the state that :func:`quiet` establishes; ``requires_grad`` and ``.grad`` are afterwards as before.
        batches: to call the model with.
        layers: whose gradients are wanted.
        loss: of what the model returned for a batch, and of the batch.
        forward: how to call the model on a batch.
        read: called with the index of the batch, the layer, and the gradient as ``[out, in]``, in the weight's dtype.
        on_batch: called after each batch with the number of batches done.
        given: the batches for the loss, such as with their labels, where those to call the model with lack them.

    Raises:
        StatisticsError: a loss that is no finite scalar, or has no finite gradient, or that depends on none of the
            weights in any batch; or weights that were made in inference mode.
    """
    reached = 0
    with _only(model, layers) as reader, torch.inference_mode(mode=False), torch.enable_grad(), _can_go_back(model):
        for index, batch in enumerate(batches):
            reader.read = _checked_read(read, index)
            value = loss(forward(model, copy.deepcopy(batch)), batch if given is None else given[index])
            if _checked(value, index).requires_grad:
                try:
                    # Only these: a loss may have weights of its own, whose gradients are its owner's business. And so
                    # re-entrant checkpointing, in which a gradient arrives in parts, gives no gradient or an error.
                    value.backward(inputs=reader.parameters)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    raise StatisticsError(
                        f"the loss of batch {index} has no gradient: {error}\n"
                        "Give a loss, and run the model so, that PyTorch can differentiate."
                    ) from error
                reached += 1
            del value
            on_batch(index + 1)
    if not reached:
        raise StatisticsError(
            f"the loss does not depend on the weights of the layers in any of {len(batches)} batches.\n"
            "Compute it from what the model returned, without detach() or item()."
        )


def no_gradient(layer: Layer, batches: int) -> StatisticsError:
    """The error for a layer that no gradient reached."""
    return StatisticsError(
        f"{layer.title}: the loss does not depend on its weight in any of {batches} batches.\n"
        "Give a loss that depends on it, batches that use it, or exclude it. Re-entrant checkpointing hides it, too."
    )


class _Reader:
    """What is called with each gradient.

    Args:
        parameters: whose gradients are computed.
    """

    read: Callable[[Layer, Weight], None]

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters


def _checked_read(read: Read, index: int) -> Callable[[Layer, Weight], None]:
    def checked(layer: Layer, gradient: Weight) -> None:
        if not gradient.isfinite().all():
            raise StatisticsError(
                f"{layer.title}: the gradients of batch {index} are NaN or infinite.\n"
                "Check the loss, or calibrate in float32."
            )
        read(index, layer, gradient)

    return checked


@contextmanager
def _only(model: nn.Module, layers: Sequence[Layer]) -> Iterator[_Reader]:
    """Compute gradients of the weights of some layers only, and hand each out instead of keeping it."""
    by_parameter: dict[int, list[Layer]] = {}
    for layer in layers:
        by_parameter.setdefault(id(layer.parameter), []).append(layer)
        if layer.parameter.is_inference():
            raise StatisticsError(
                f"{layer.title}: its weight was made in torch.inference_mode, and has no gradients.\n"
                "Make or load the model outside of it."
            )
    reader = _Reader([members[0].parameter for members in by_parameter.values()])
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    handles = []

    def hand_out(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        for layer in by_parameter[id(parameter)]:
            with torch.no_grad():
                reader.read(layer, layer.to_matrix(gradient))

    try:
        for parameter, required, _ in before:
            wanted = id(parameter) in by_parameter
            if wanted:
                parameter.grad = None
                handles.append(_hooked(parameter, hand_out))
            if required != wanted:
                parameter.requires_grad_(wanted)
        yield reader
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required, gradient in before:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
            if id(parameter) in by_parameter:
                parameter.grad = gradient


def _hooked(parameter: Tensor, hook: Callable[[Tensor], None]) -> Any:
    parameter.requires_grad_(True)
    return parameter.register_post_accumulate_grad_hook(hook)


@contextmanager
def _can_go_back(model: nn.Module) -> Iterator[None]:
    """Recurrent layers in evaluation mode have a backward pass, which that of cuDNN refuses."""
    on_gpu = any(
        isinstance(module, nn.RNNBase) and any(parameter.is_cuda for parameter in module.parameters())
        for module in model.modules()
    )
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled and not on_gpu):
        yield


def _checked(value: object, index: int) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise StatisticsError(f"the loss of batch {index} must be a scalar tensor, got {what}.")
    if not value.isfinite().all():
        raise StatisticsError(f"the loss of batch {index} is {value.item():g}, so nothing can be learned from it.")
    return value
