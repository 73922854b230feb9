"""Which packed layer replaces which module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.formats import Format
from secateur.kernels import RoutePlan
from secateur.layers import is_transposed_linear, kind_of
from secateur.nn._packed import PackedConv2d, PackedLinear


@dataclass(frozen=True)
class PackedAs:
    """The class of the module that a packed layer replaces.

    Args:
        transposed: whether it is transformers' ``Conv1D``, a linear layer whose weight is ``[in, out]``.
        stride: stride of a convolution with a 1x1 kernel; None for a linear layer.
    """

    transposed: bool = False
    stride: tuple[int, int] | None = None

    @classmethod
    def of(cls, module: nn.Module) -> PackedAs | None:
        """Return what a module, dense or packed, is packed as; None if no packed layer can replace it."""
        if isinstance(module, PackedConv2d):
            return cls(stride=module.stride)
        if isinstance(module, PackedLinear):
            return cls(transposed=module.transposed)
        if isinstance(module, nn.Conv2d):
            return cls(stride=(module.stride[0], module.stride[1])) if PackedConv2d.fits(module) else None
        if isinstance(module, nn.Linear):
            return cls()
        return cls(transposed=True) if is_transposed_linear(module) else None

    def build(
        self, packed: Format, bias: Tensor | None, plan: RoutePlan | None, dtype: torch.dtype
    ) -> PackedLinear | PackedConv2d:
        """Return the packed layer.

        Args:
            packed: the weight.
            bias: ``[out]``, or None.
            plan: which route to take for how many input rows; None for the route that the format was made for.
            dtype: dtype of the dense weight.
        """
        linear = PackedLinear(packed, bias, plan, dtype)
        linear.transposed = self.transposed
        return linear if self.stride is None else PackedConv2d(linear, self.stride)


def why_no_counterpart(module: nn.Module) -> str | None:
    """Return the reason why no packed layer can replace a module, or None."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and PackedAs.of(module) is None:
        return "a convolution with a kernel above 1x1, padding or groups: unfolding its input costs what the zeros save"
    if type(module) in (nn.Linear, nn.Conv2d) or is_transposed_linear(module):
        return None
    return f"a packed layer can replace only nn.Linear and 1x1 convolutions, not {type(module).__name__}"


def shape_as_matrix(module: nn.Module) -> tuple[int, int] | None:
    """Return ``(out, in)`` of a module that is packed or that a packed layer can replace; None of any other."""
    if isinstance(module, PackedLinear | PackedConv2d):
        return module.packed.shape
    kind = kind_of(module)
    if kind is None or PackedAs.of(module) is None:
        return None
    rows, columns = kind.to_matrix(module, getattr(module, kind.parameter)).shape
    return rows, columns


def linear_of(module: PackedLinear | PackedConv2d) -> PackedLinear:
    """Return the linear layer inside a packed convolution, or a packed linear layer itself."""
    return module.linear if isinstance(module, PackedConv2d) else module


def packed_layers(model: nn.Module) -> dict[str, PackedLinear | PackedConv2d]:
    """Return the packed layers of a model by qualified name. A layer with several names is there under each."""
    found: dict[str, PackedLinear | PackedConv2d] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        inside = name.rpartition(".")[0]
        if isinstance(module, PackedLinear | PackedConv2d) and not isinstance(found.get(inside), PackedConv2d):
            found[name] = module
    return found
