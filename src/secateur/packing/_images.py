"""The images that convolutions are measured with: their best route depends on how many pixels there are, and how."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur.calibration import Forward, quiet
from secateur.kernels import Pair, in_channels_last
from secateur.nn import PackedAs, PackedConvolution

# At how many output pixels a convolution is measured whose images are not known: those of 7 x 7 to 56 x 56.
PIXELS = (49, 196, 784, 3136)
_MOST_PRODUCTS = 1 << 30  # of a measurement: a convolution with this many weights has few pixels in every real model
_MOST_SIZES = 4  # of images that are measured for one layer

# Images, height and width of one input, and whether it is in channels_last; a height of 0 stands for a sequence.
Size: TypeAlias = tuple[int, int, int, bool]


def is_convolution(module: nn.Module) -> bool:
    """Return whether a module is measured with images or sequences."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | PackedConvolution)


def sizes_in(model: nn.Module, batches: Iterable[Any], forward: Forward) -> Mapping[int, tuple[Size, ...]]:
    """Return the sizes of the inputs of each convolution of a model, by the id of the module.

    Args:
        model: any.
        batches: inputs, which are not changed.
        forward: how to call the model on one of them.
    """
    found: dict[int, list[Size]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], is_sequence: bool) -> None:
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor):
            space = 1 if is_sequence else 2
            batch = math.prod(x.shape[: -space - 1])
            height = 0 if is_sequence else x.shape[-2]
            size = (batch, height, x.shape[-1], x.ndim == 4 and in_channels_last(x))
            sizes = found.setdefault(id(module), [])
            if size not in sizes and len(sizes) < _MOST_SIZES:
                sizes.append(size)

    with ExitStack() as hooks, quiet(model):
        for module in model.modules():
            if is_convolution(module):
                is_sequence = len(module.kernel_size) == 1  # type: ignore[arg-type]
                watch = partial(note, is_sequence=is_sequence)
                hooks.callback(module.register_forward_pre_hook(watch, with_kwargs=True).remove)
        for batch in _of_different_shapes(batches):
            forward(model, batch)
    return {key: tuple(sizes) for key, sizes in found.items()}


def _of_different_shapes(batches: Iterable[Any]) -> list[Any]:
    """One batch for each of the shapes that tensors in them have, and no more than are measured."""
    first: dict[tuple[Any, ...], Any] = {}
    for batch in batches:
        shapes = tuple(leaf.shape for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
        first.setdefault(shapes, batch)
    return list(first.values())[:_MOST_SIZES]


def image_inputs(dense: nn.Conv1d | nn.Conv2d, sizes: Sequence[Size] = ()) -> list[tuple[int, Tensor]]:
    """Return inputs to measure a convolution with, each with its number of output pixels, which increases.

    Args:
        dense: the dense layer.
        sizes: of its inputs in the model; none for square images of some usual sizes.
    """
    generator = torch.Generator().manual_seed(0)
    made: dict[int, Tensor] = {}
    for images, height, width, turned in sizes or _usual_sizes(dense):
        shape = (images, dense.in_channels, *((height,) if height else ()), width)
        pixels = images * math.prod(_outputs(dense, height, width))
        if pixels > 0:
            x = torch.randn(shape, generator=generator).to(dense.weight.dtype)
            made[pixels] = x.contiguous(memory_format=torch.channels_last) if turned else x
    return sorted(made.items()) or image_inputs(dense)  # no image in the model was large enough


def describe_images(dense: nn.Module, inputs: Sequence[tuple[int, Tensor]]) -> str:
    """Return what the time of a convolution depends on besides its weight: how its kernel moves, over which images."""
    packed_as = PackedAs.of(dense)
    assert packed_as is not None
    moves = (packed_as.kernel_size, packed_as.stride, packed_as.padding, packed_as.dilation)
    text = "/".join("-" if sizes is None else "x".join(map(str, sizes)) for sizes in moves)
    shapes = ",".join("x".join(map(str, (x.shape[0], *x.shape[2:]))) for _, x in inputs)
    turned = " channels_last" if any(x.ndim == 4 and in_channels_last(x) for _, x in inputs) else ""
    return f"{type(dense).__name__} {text} {shapes}{turned}"


def _usual_sizes(dense: nn.Conv1d | nn.Conv2d) -> list[Size]:
    weights = dense.weight.numel()
    fitting = [pixels for pixels in PIXELS if pixels * weights <= _MOST_PRODUCTS]
    window = _window(dense)
    sizes: list[Size] = []
    for pixels in fitting or PIXELS[:1]:
        if isinstance(dense, nn.Conv1d):
            sizes.append((1, 0, _input_size(pixels, 1, window), False))
        else:
            side = math.isqrt(pixels)
            sizes.append((1, _input_size(side, 0, window), _input_size(side, 1, window), False))
    return sizes


def _window(dense: nn.Conv1d | nn.Conv2d) -> Any:
    packed_as = PackedAs.of(dense)
    assert packed_as is not None
    return packed_as.window


def _input_size(outputs: int, axis: int, window: Any) -> int:
    """The smallest size whose convolution has so many outputs."""
    reach = window.dilation[axis] * (window.kernel[axis] - 1) + 1
    return max(1, int((outputs - 1) * window.stride[axis] + reach - 2 * window.padding[axis]))


def _outputs(dense: nn.Conv1d | nn.Conv2d, height: int, width: int) -> Pair:
    found: Pair = _window(dense).outputs(height or 1, width)
    return found if min(found) > 0 else Pair(0, 0)
