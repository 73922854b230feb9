"""The kinds of layers: how the weight of a module is read as ``[out, in]``, and its inputs as rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from secateur._checks import instance
from secateur._types import Weight


@dataclass(frozen=True)
class LayerKind:
    """How the modules of one class are read as linear maps of rows.

    Args:
        to_matrix: given the module and its parameter, returns the matrix ``[out, in]``: a view where possible.
        from_matrix: given the module and a matrix ``[out, in]``, returns it in the shape of the parameter.
        input_rows: given the module and its first positional input, ``[..., features]``, returns
            ``[groups, tokens, in]``: one row for each position of the input's leading dimensions, in their order.
        parameter: name of the attribute that is the weight.
        channel_width: given the module, returns how many adjacent columns read one input channel: the kernel positions
            of a convolution.
    """

    to_matrix: Callable[[nn.Module, Tensor], Weight]
    from_matrix: Callable[[nn.Module, Weight], Tensor]
    input_rows: Callable[[nn.Module, Tensor], Tensor]
    parameter: str = "weight"
    channel_width: Callable[[nn.Module], int] = lambda module: 1


def _flat_rows(module: nn.Module, x: Tensor) -> Tensor:
    return x.reshape(1, -1, x.shape[-1])


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


_LINEAR = LayerKind(
    to_matrix=lambda module, weight: weight,
    from_matrix=lambda module, matrix: matrix,
    input_rows=_flat_rows,
)
_TRANSPOSED = LayerKind(
    to_matrix=lambda module, weight: weight.T,
    from_matrix=lambda module, matrix: matrix.T,
    input_rows=_flat_rows,
)
FLATTENED = LayerKind(
    to_matrix=lambda module, weight: weight.flatten(1),
    from_matrix=lambda module, matrix: matrix.view_as(module.weight),  # type: ignore[arg-type]
    input_rows=_unfolded_rows,
    channel_width=lambda module: module.weight[0, 0].numel(),  # type: ignore[index]
)
_KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: _LINEAR,
    nn.Conv1d: FLATTENED,
    nn.Conv2d: FLATTENED,
    nn.Conv3d: FLATTENED,
}


def register_layer(module_type: type[nn.Module], kind: LayerKind) -> None:
    """Make the modules of a class and of its subclasses prunable. Registering a class again replaces its kind.

    Args:
        module_type: a subclass of ``nn.Module`` with one weight that acts linearly on rows.
        kind: how to read it.

    Raises:
        TypeError: not a module class, or not a ``LayerKind``.

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
    _KINDS[module_type] = instance("kind", kind, LayerKind)


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return the kind that is registered for the module's class or else for its nearest base class, or None."""
    transposed = transposed_linear()
    fallback = _TRANSPOSED if transposed is not None and isinstance(module, transposed) else None
    return next((_KINDS[base] for base in type(module).__mro__ if base in _KINDS), fallback)


def transposed_linear() -> type[nn.Module] | None:
    """Return transformers' ``Conv1D``, a linear layer whose weight is ``[in, out]``; None if no model can have one."""
    # A model can only have such a layer if transformers was imported. secateur itself does not import it for this.
    transformers = sys.modules.get("transformers.pytorch_utils")
    return None if transformers is None else transformers.Conv1D
