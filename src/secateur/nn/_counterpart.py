"""Which packed layer replaces which module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from secateur.formats import Format
from secateur.kernels import RoutePlan, Window
from secateur.layers import kind_of, plain_class, transposed_linear
from secateur.nn._packed import PackedConv1D, PackedLinear
from secateur.nn._packed_conv import (
    PackedConv1d,
    PackedConv2d,
    PackedConvolution,
    numeric_padding,
    why_not_convolution,
    window_of,
)
from secateur.nn._packed_embedding import PackedEmbedding, why_not_embedding
from secateur.nn._packed_matrix import PackedMatrix
from secateur.nn._packed_stack import PackedStack

# Every layer that runs packed. ``isinstance`` takes it.
Packed: TypeAlias = PackedMatrix | PackedConvolution


@dataclass(frozen=True)
class PackedAs:
    """The class of the module that a packed layer replaces.

    Args:
        transposed: whether it is transformers' ``Conv1D``, a linear layer whose weight is ``[in, out]``.
        stride: stride of a convolution, one number for each dimension that it moves in; None for a linear layer.
        kernel_size: positions of its kernel; None for one in each dimension, like those that follow.
        padding: its padding; None for nothing.
        dilation: its dilation.
        embedding: whether it is an ``nn.Embedding``.
        padding_idx: the row of padding of an embedding, or None.
    """

    transposed: bool = False
    stride: tuple[int, ...] | None = None
    kernel_size: tuple[int, ...] | None = None
    padding: tuple[int, ...] | None = None
    dilation: tuple[int, ...] | None = None
    embedding: bool = False
    padding_idx: int | None = None

    @classmethod
    def of(cls, module: nn.Module) -> PackedAs | None:
        """Return what a module, dense or packed, is packed as; None if no packed layer can replace it."""
        if isinstance(module, PackedConvolution):
            return cls._convolution(module.stride, module.kernel_size, module.padding, module.dilation)
        if isinstance(module, PackedEmbedding):
            return cls(embedding=True, padding_idx=module.padding_idx)
        if isinstance(module, nn.Embedding):
            fits = why_not_embedding(module) is None
            return cls(embedding=True, padding_idx=module.padding_idx) if fits else None
        if isinstance(module, PackedMatrix):
            return cls(transposed=isinstance(module, PackedConv1D))
        plain = plain_class(module)
        if plain in (nn.Conv1d, nn.Conv2d):
            assert isinstance(module, nn.Conv1d | nn.Conv2d)
            if why_not_convolution(module) is not None:
                return None
            padding = numeric_padding(module)
            assert padding is not None
            return cls._convolution(tuple(module.stride), tuple(module.kernel_size), padding, tuple(module.dilation))
        if plain is nn.Linear:
            return cls()
        return cls(transposed=True) if plain is not None and plain is transposed_linear() else None

    @classmethod
    def _convolution(
        cls, stride: tuple[int, ...], kernel: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
    ) -> PackedAs:
        """What is as in a pointwise convolution is None. A dilation matters only between positions."""
        dilation = tuple(step if size > 1 else 1 for step, size in zip(dilation, kernel, strict=True))
        ones = (1,) * len(stride)
        return cls(
            stride=stride,
            kernel_size=None if kernel == ones else kernel,
            padding=padding if any(padding) else None,
            dilation=None if dilation == ones else dilation,
        )

    @property
    def window(self) -> Window:
        """How the kernel of a convolution moves; for a linear layer that of one position."""
        along = len(self.stride or ())
        sizes = (
            self.kernel_size or (1,) * along,
            self.stride or (),
            self.padding or (0,) * along,
            self.dilation or (1,) * along,
        )
        return window_of(*sizes)

    def build(self, packed: Format, bias: Tensor | None, plan: RoutePlan | None, dtype: torch.dtype) -> Packed:
        """Return the packed layer.

        Args:
            packed: the weight.
            bias: ``[out]``, or None.
            plan: which route to take for how many input rows; None for the route that the format was made for. A lookup
                has none.
            dtype: dtype of the dense weight.

        Raises:
            KernelError: an embedding of another format than whole rows of int8.
        """
        if self.embedding:
            return PackedEmbedding(packed, self.padding_idx, dtype)
        if self.transposed:
            return PackedConv1D(packed, bias, plan, dtype)
        linear = PackedLinear(packed, bias, plan, dtype)
        if self.stride is None:
            return linear
        window = self.window
        if len(self.stride) == 1:
            return PackedConv1d(linear, *((sizes.across,) for sizes in window.pairs))
        return PackedConv2d(linear, *window.pairs)


def why_no_counterpart(module: nn.Module) -> str | None:
    """Return the reason why no packed layer can replace a module, or None."""
    if PackedAs.of(module) is not None:
        return None
    if isinstance(module, nn.Conv1d | nn.Conv2d) and (reason := why_not_convolution(module)) is not None:
        return reason
    return f"a packed layer can replace only nn.Linear, nn.Conv1d and nn.Conv2d, not {type(module).__name__}"


def shape_as_matrix(module: nn.Module) -> tuple[int, int] | None:
    """Return ``(out, in)`` of a module that is packed or that a packed layer can replace; None of any other."""
    if isinstance(module, Packed):
        return module.packed.shape
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    kind = kind_of(module)
    if kind is None or PackedAs.of(module) is None:
        return None
    rows, columns = kind.to_matrix(module, getattr(module, kind.parameter)).shape
    return rows, columns


def linear_of(module: Packed) -> PackedMatrix:
    """Return the linear layer inside a packed convolution, or a packed linear layer itself."""
    return module.linear if isinstance(module, PackedConvolution) else module


def packed_layers(model: nn.Module) -> dict[str, Packed]:
    """Return the packed layers of a model by qualified name. A layer with several names is there under each.

    The matrices of a :class:`PackedStack` are no layers: only the whole stack can be replaced.
    """
    found: dict[str, Packed] = {}
    stacks: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        inside = name.rpartition(".")[0]
        if isinstance(module, PackedStack):
            stacks.add(name)
        elif inside in stacks:
            continue
        elif isinstance(module, Packed) and not isinstance(found.get(inside), PackedConvolution):
            found[name] = module
    return found
