"""How a weight is read as a linear map of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from secateur._types import Weight


@dataclass(frozen=True)
class LayerKind:
    """How one weight of the modules of a class is read as a linear map of rows.

    Args:
        to_matrix: given the module and its parameter (or the part that ``part`` names), returns the matrix
            ``[out, in]``: a view where possible.
        from_matrix: given the module and a matrix ``[out, in]``, returns it in the shape of the parameter or part.
        input_rows: given the module and its first positional input, ``[..., features]``, returns
            ``[groups, tokens, in]``: one row for each position of the input's leading dimensions, in their order. None:
            the module's own input says nothing; rows are seen where the weight is multiplied.
        parameter: name of the attribute that is the weight.
        channel_width: given the module, returns how many adjacent columns read one input channel: the kernel positions
            of a convolution.
        name: what the weight's name adds to that of the module; empty for the only weight of a module.
        part: index of the parameter's part that is the weight: a number, a slice, or None for the whole.
        call_rows: in place of ``input_rows`` where rows depend on more than the first input: given the module and the
            positional and the keyword arguments of its call, returns the rows.
    """

    to_matrix: Callable[[nn.Module, Tensor], Weight]
    from_matrix: Callable[[nn.Module, Weight], Tensor]
    input_rows: Callable[[nn.Module, Tensor], Tensor] | None = None
    parameter: str = "weight"
    channel_width: Callable[[nn.Module], int] = lambda module: 1
    name: str = ""
    part: int | slice | None = None
    call_rows: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Tensor] | None = None


def as_it_is(module: nn.Module, tensor: Tensor) -> Tensor:
    """Return the tensor: of a weight that is a matrix ``[out, in]`` already."""
    return tensor


def turned(module: nn.Module, tensor: Tensor) -> Tensor:
    """Return the transpose: of a weight that is a matrix ``[in, out]``."""
    return tensor.T


def flat_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Return inputs ``[..., features]`` as ``[1, positions, features]``."""
    return x.reshape(1, -1, x.shape[-1])
