"""The kernels of the native module: which instruction set runs, and the call with checked addresses."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from secateur._errors import KernelError
from secateur.formats import VALUE_TYPES
from secateur.kernels._layout import Layout
from secateur.kernels._load import load

ISAS = ("avx512", "avx2", "generic")  # widest first

SMALL = 32768  # multiplications, or weights of a mask, below which a second thread costs more than it saves


def isas() -> list[str]:
    """Instruction sets this machine can run, best first."""
    native = load()
    return [] if isinstance(native, str) else [isa for isa in ISAS if native.has(isa)]


@cache
def default_isa() -> str:
    """The best instruction set, or the one SECATEUR_ISA names: read once, which takes longer than a small product."""
    named = os.environ.get("SECATEUR_ISA")
    if not named:
        return isas()[0]
    if named not in isas():
        raise KernelError(
            f"SECATEUR_ISA is {named!r}, but this machine and build run {', '.join(isas()) or 'none'}. "
            "Unset it, or name one of those."
        )
    return named


class Bound:
    """A layout's kernel with everything that does not change between calls: a small product takes no longer than these.

    Args:
        packed: the weight, on the processor. Its tensors must not move or change while this is used.
        isa: one of :func:`isas`.
    """

    def __init__(self, packed: Layout, isa: str) -> None:
        native = load()
        assert not isinstance(native, str)
        values, scale = packed.values, packed.scale
        self._packed = packed  # keeps the memory
        self._kernel, self._isa = getattr(native, packed.kernel), isa
        self._rows, self._size = packed.shape[0], values.numel()
        self._scale, self._values = 0 if scale is None else scale.data_ptr(), values.data_ptr()
        self._shape, self._type = packed.shape, VALUE_TYPES[values.dtype].code
        self._arguments = packed.arguments()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + b for x [batch, in] and b [out], float32 and contiguous, on the processor."""
        batch = x.shape[0]
        y = x.new_empty((batch, self._rows))
        if not (batch and self._rows):
            return y
        self._kernel(
            self._isa,
            x.data_ptr(),
            y.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            self._scale,
            self._values,
            batch,
            *self._shape,
            self._type,
            torch.get_num_threads() if self._size * batch > SMALL else 1,
            *self._arguments,
        )
        return y
