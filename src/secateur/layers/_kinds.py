"""The kinds of layers: how the weights of a module are read as ``[out, in]``, and its inputs as rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import Tensor, nn

from secateur._checks import instance
from secateur.layers._attention import attention_kinds
from secateur.layers._kind import LayerKind, as_it_is, flat_rows, turned
from secateur.layers._recurrent import cell_kinds, recurrent_kinds
from secateur.layers._stacks import stacked_kinds
from secateur.layers._transposed import TRANSPOSED_CONVOLUTION

KindsOf: TypeAlias = Callable[[Any], Iterable[LayerKind]]


def _unfolded_rows(module: nn.Module, x: Tensor) -> Tensor:
    """A convolution's input as ``[groups, positions, in / groups * kernel]``, in the order of its flattened weight."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    space = len(module.kernel_size)
    if x.ndim == space + 1:
        x = x.unsqueeze(0)
    reach = [dilation * (kernel - 1) for dilation, kernel in zip(module.dilation, module.kernel_size, strict=True)]
    padding: list[int] = []  # the last dimension first, as F.pad takes it
    for axis in reversed(range(space)):
        if isinstance(module.padding, str):
            total = reach[axis] if module.padding == "same" else 0
            padding += [total // 2, total - total // 2]  # PyTorch, too, adds an odd one at the end
        else:
            padding += [module.padding[axis]] * 2
    if any(padding):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = nn.functional.pad(x, padding, mode=mode)
    for axis in range(space):
        windows = x.unfold(2 + axis, reach[axis] + 1, module.stride[axis])
        x = windows[..., :: module.dilation[axis]]
    # [batch, in, *positions, *kernel] -> [groups, batch * positions, in / groups * kernel]
    x = x.unflatten(1, (module.groups, -1)).flatten(3, 2 + space).flatten(4)
    return x.permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)


_LINEAR = LayerKind(as_it_is, as_it_is, flat_rows)
_TRANSPOSED = LayerKind(turned, turned, flat_rows)
FLATTENED = LayerKind(
    to_matrix=lambda module, weight: weight.flatten(1),
    from_matrix=lambda module, matrix: matrix.view_as(module.weight),  # type: ignore[arg-type]
    input_rows=_unfolded_rows,
    channel_width=lambda module: module.weight[0, 0].numel(),  # type: ignore[index]
)
_KINDS: dict[type[nn.Module], LayerKind | KindsOf] = {
    nn.Linear: _LINEAR,
    nn.Conv1d: FLATTENED,
    nn.Conv2d: FLATTENED,
    nn.Conv3d: FLATTENED,
    nn.ConvTranspose1d: TRANSPOSED_CONVOLUTION,
    nn.ConvTranspose2d: TRANSPOSED_CONVOLUTION,
    nn.ConvTranspose3d: TRANSPOSED_CONVOLUTION,
    nn.MultiheadAttention: attention_kinds,
    nn.RNNBase: recurrent_kinds,
    nn.RNNCellBase: cell_kinds,
}


def register_layer(module_type: type[nn.Module], kind: LayerKind | KindsOf) -> None:
    """Make the modules of a class and of its subclasses prunable. Registering a class again replaces its kind.

    Args:
        module_type: a subclass of ``nn.Module`` with weights that act linearly on rows.
        kind: how to read its weight. For several weights in one module, a function from the module to their kinds, each
            with its own ``name``.

    Raises:
        TypeError: not a module class, or neither a ``LayerKind`` nor a function.

    Example:
        >>> import torch, secateur
        >>> class Scaled(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.kernel = torch.nn.Parameter(torch.ones(4, 2))  # [in, out]
        ...     def forward(self, x):
        ...         return 2 * x @ self.kernel
        >>> secateur.register_layer(Scaled, secateur.LayerKind(
        ...     to_matrix=lambda module, kernel: kernel.T,
        ...     from_matrix=lambda module, matrix: matrix.T,
        ...     input_rows=lambda module, x: x.reshape(1, -1, x.shape[-1]),
        ...     parameter="kernel",
        ... ))
        >>> model = torch.nn.Sequential(Scaled())
        >>> secateur.prune_(model, pattern="2:4", method="magnitude").sparsity
        0.5
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of nn.Module, got {module_type!r}")
    _KINDS[module_type] = kind if callable(kind) else instance("kind", kind, LayerKind, "a LayerKind or a function")


def registered_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class of the module, or else its nearest base class, that has a kind; None if there is none."""
    transposed = transposed_linear()
    return next((base for base in type(module).__mro__ if base in _KINDS or base is transposed), None)


def kinds_of(module: nn.Module) -> tuple[LayerKind, ...]:
    """Return how the weights of a module are read, each by its own kind: none for a module that is not known.

    They are those that are registered for the module's class, or else for its nearest base class. A module of no
    registered class may hold stacks of matrices, such as experts.
    """
    base = registered_class(module)
    if base is None:
        return stacked_kinds(module)
    kind = _KINDS.get(base, _TRANSPOSED)
    return (kind,) if isinstance(kind, LayerKind) else tuple(kind(module))


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return how the only weight of a module is read; None for a module that has none, or several."""
    kinds = kinds_of(module)
    return kinds[0] if len(kinds) == 1 and not kinds[0].name else None


def is_transposed_linear(module: nn.Module) -> bool:
    """Return whether a module is exactly transformers' ``Conv1D``, a linear layer with the weight as ``[in, out]``."""
    return type(module) is transposed_linear()


def transposed_linear() -> type[nn.Module] | None:
    """Return transformers' ``Conv1D``; None where transformers was not imported, and no model can have one."""
    transformers = sys.modules.get("transformers.pytorch_utils")  # secateur does not import it for this
    return None if transformers is None else transformers.Conv1D
