"""Products by the native module: the instruction set, and the call, which passes addresses of checked tensors."""

from __future__ import annotations

import math
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from secateur._errors import KernelError
from secateur.formats import VALUE_TYPES
from secateur.kernels._layout import Layout
from secateur.kernels._load import load
from secateur.kernels._window import Window

# Multiplications, or weights of a mask, up to which one thread is used: starting a second one costs more than it saves
SMALL = 32768


def isas() -> list[str]:
    """Return the instruction sets that this build and this machine can run, widest first."""
    native = load()
    return [] if isinstance(native, str) else [isa for isa in native.isas() if native.has(isa)]


@cache
def default_isa() -> str:
    """Return the widest instruction set, or the one that SECATEUR_ISA names.

    The variable is read once, because reading it takes longer than a small product.

    Raises:
        KernelError: this machine or build cannot run the instruction set that the variable names.
    """
    named = os.environ.get("SECATEUR_ISA")
    if not named:
        return isas()[0]
    if named not in isas():
        raise KernelError(
            f"SECATEUR_ISA is {named!r}, but this machine and build can run {', '.join(isas()) or 'none'}. "
            "Unset it, or name one of these."
        )
    return named


@cache
def _weight_class(kernel: str) -> Any:
    """The native class for weights of a layout, such as ``Int8Panels`` for the kernel "int8_panels"."""
    native = load()
    assert not isinstance(native, str)
    return getattr(native, "".join(map(str.capitalize, kernel.split("_"))))


class Bound:
    """A weight that is ready to run. The native module keeps all arguments that do not change between calls.

    Passing all of them at each call would take as long as a small product.

    Args:
        packed: the weight, on the CPU. Its tensors must not be moved or changed while this object is used.
        isa: one of :func:`isas`.
    """

    def __init__(self, packed: Layout, isa: str) -> None:
        self._packed = packed  # keeps the tensors alive: the native object has only their addresses
        values, scale = packed.values, packed.scale
        weight = _weight_class(packed.kernel)(
            isa,
            values.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            *packed.shape,
            VALUE_TYPES[values.dtype].code,
            *packed.arguments(),
        )
        self._run: Any = weight.run
        self._convolve: Any = getattr(weight, "convolve", None)
        self._rows, self._size = packed.shape[0], values.numel()

    @property
    def takes_images(self) -> bool:
        """Whether there is a kernel for images as they lie in memory."""
        return self._convolve is not None

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + b for x ``[..., in]`` and b ``[out]``, float32, contiguous and on the CPU."""
        *rows, columns = x.shape
        batch = x.numel() // columns if columns else math.prod(rows)
        y = x.new_empty((*rows, self._rows))
        if not (batch and self._rows):
            return y
        threads = torch.get_num_threads() if self._size * batch > SMALL else 1
        self._run(x.data_ptr(), y.data_ptr(), 0 if bias is None else bias.data_ptr(), batch, threads)
        return y

    def convolve(self, x: Tensor, bias: Tensor | None, window: Window) -> Tensor:
        """Return the convolution of x ``[images, channels, height, width]`` plus b ``[out]``, as for a call."""
        images, _, height, width = x.shape
        down, across = window.outputs(height, width)
        y = x.new_empty((images, self._rows, down, across))
        if not y.numel():
            return y
        threads = torch.get_num_threads() if self._size * images * down * across > SMALL else 1
        sizes = (images, height, width, down, across, *window.numbers)
        self._convolve(x.data_ptr(), y.data_ptr(), 0 if bias is None else bias.data_ptr(), sizes, threads)
        return y
