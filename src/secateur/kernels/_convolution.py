"""The operators of packed convolutions, as compilers and autograd see them. See ``_operator`` for those of products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from secateur.kernels._dispatch import may_skip_dispatcher
from secateur.kernels._operator import (
    PackedSpec,
    check_bias,
    check_dense,
    check_images,
    packed_dense,
    prepared_for_images,
    refuse_onnx_export,
)
from secateur.kernels._prepared import in_channels_last
from secateur.kernels._window import Window


def _run(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, spec: str, window: Sequence[int]) -> Tensor:
    if x.is_meta or weight[0].is_meta:
        return _run_fake(x, weight, bias, spec, window)
    moves = Window.of(window)
    prepared = prepared_for_images(x, weight, spec, moves)
    rows = PackedSpec.parse(spec).shape[0]
    check_bias(bias, rows, x.device)
    if prepared is None:
        y = x.new_zeros(len(x), rows, *moves.outputs(*x.shape[2:]))
        return y if bias is None else y + bias.to(x.dtype)[:, None, None]
    return prepared.convolve(x, bias, moves)


def _run_fake(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, spec: str, window: Sequence[int]) -> Tensor:
    refuse_onnx_export()
    outputs = check_images(x, weight, spec, Window.of(window))
    y = x.new_empty(len(x), PackedSpec.parse(spec).shape[0], *outputs)
    return y.contiguous(memory_format=torch.channels_last) if in_channels_last(x) else y


def _run_transposed(
    y: Tensor, weight: Sequence[Tensor], spec: str, window: Sequence[int], size: Sequence[int]
) -> Tensor:
    """The gradient of images of a size. The weight is made dense at each call, so that no copy stays in memory."""
    moves = Window.of(window)
    dense = packed_dense(weight, spec).to(y.dtype)
    dense = dense.view(len(dense), -1, *moves.kernel)
    shape = [len(y), dense.shape[1], *size]
    found: Tensor = conv2d_input(shape, dense, y, moves.stride, moves.padding, moves.dilation)
    return found.contiguous()


# The operator that compilers and autograd see.
@torch.library.custom_op("secateur::packed_convolution", mutates_args=())
def _packed_convolution(
    x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, spec: str, window: Sequence[int]
) -> Tensor:
    refuse_onnx_export()
    y = _run(x, weight, bias, spec, window)
    # PyTorch lets nothing change a view in place that is the result of an operator with a gradient of its own.
    return y.clone() if y._is_view() else y


@torch.library.custom_op("secateur::packed_convolution_transposed", mutates_args=())
def _packed_convolution_transposed(
    y: Tensor, weight: Sequence[Tensor], spec: str, window: Sequence[int], size: Sequence[int]
) -> Tensor:
    return _run_transposed(y, weight, spec, window, size)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1])
    ctx.spec, ctx.window, ctx.size = inputs[3], inputs[4], list(inputs[0].shape[2:])


def _input_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, list[None], None, None, None]:
    weight = list(ctx.saved_tensors)
    found = _packed_convolution_transposed(gradient, weight, ctx.spec, ctx.window, ctx.size)
    return found, [None] * len(weight), None, None, None


def _keep_transposed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1])
    ctx.spec, ctx.window = inputs[2], inputs[3]


def _gradient_of_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, list[None], None, None, None]:
    weight = list(ctx.saved_tensors)
    return _packed_convolution(gradient, weight, None, ctx.spec, ctx.window), [None] * len(weight), None, None, None


def _run_transposed_fake(
    y: Tensor, weight: Sequence[Tensor], spec: str, window: Sequence[int], size: Sequence[int]
) -> Tensor:
    channels = PackedSpec.parse(spec).shape[1] // Window.of(window).positions
    return y.new_empty(len(y), channels, *size)


_packed_convolution.register_fake(_run_fake)
_packed_convolution.register_autograd(_input_gradient, setup_context=_keep)
_packed_convolution_transposed.register_fake(_run_transposed_fake)
_packed_convolution_transposed.register_autograd(_gradient_of_gradient, setup_context=_keep_transposed)


def _vmap(info: Any, in_dims: Any, x: Tensor, weight: list[Tensor], *rest: Any) -> tuple[Tensor, int]:
    if any(dim is not None for dim in (*in_dims[1], *in_dims[2:3])):
        raise NotImplementedError("vmap maps over the inputs of a packed layer, not over its weights; unpack it first")
    transposed = isinstance(rest[0], str)
    operator: Any = _packed_convolution_transposed if transposed else _packed_convolution
    moved = x.movedim(in_dims[0], 0)
    return operator(moved.flatten(0, 1), weight, *rest).unflatten(0, moved.shape[:2]), 0


_packed_convolution.register_vmap(_vmap)
_packed_convolution_transposed.register_vmap(_vmap)


def packed_convolution(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, spec: str, window: Window) -> Tensor:
    """Return the convolution of images with a packed weight. Packed convolutions call this.

    Args:
        x: ``[images, channels, height, width]``, floating point.
        weight: the tensors of the format, in the order of the spec's names. Its columns are those of a flattened weight
            ``[out, channels, *kernel]``.
        bias: ``[out]`` or None.
        spec: a :class:`PackedSpec` as text.
        window: how the kernel moves.

    Returns:
        ``[images, out, down, across]``, in the dtype of x, and in the memory format of x.

    Raises:
        KernelError: x or the bias does not fit the weight or is on another device, or a route of the plan does not fit.
        FormatError: the tensors are not valid, for example after a change in place.
        TypeError: an x that is not a dense tensor of a dtype that is computed with.
    """
    check_dense(x)  # first: operators have no code for other layouts
    if not (x.requires_grad and torch.is_grad_enabled()) and may_skip_dispatcher(x):
        return _run(x, weight, bias, spec, window.numbers)
    y: Tensor = _packed_convolution(x, weight, bias, spec, window.numbers)
    return y
