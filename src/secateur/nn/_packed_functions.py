"""Functions that multiply a packed weight, by its kernels."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the name that PyTorch's own documentation uses

from secateur.nn._packed_products import grouped_product, joined_product, stack_product
from secateur.nn._packed_tensor import PackedTensor, served
from secateur.nn._recurrent_steps import gru_step, lstm_step


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    served(isinstance(weight, PackedTensor) and not isinstance(input, PackedTensor))
    served(not weight.stacked and not weight.turned and not isinstance(bias, PackedTensor))
    return joined_product(weight.parts, input, bias, weight.along)


def _matmul(input: Any, other: Any) -> Tensor:
    served(not (isinstance(input, PackedTensor) and isinstance(other, PackedTensor)))
    if isinstance(other, PackedTensor):
        served(other.turned)
        return _times(other, input)
    served(not input.turned)
    if other.ndim == 1:
        served(not input.stacked)
        return joined_product(input.parts, other, None, input.along)
    return _times(input, other.mT).mT.contiguous()


def _times(weight: PackedTensor, x: Tensor) -> Tensor:
    """``x Wᵀ`` with the rules of matmul, for a weight with matrices ``[out, in]``."""
    if not weight.stacked:
        return joined_product(weight.parts, x, None, weight.along)
    count = len(weight.parts)
    served(x.ndim in (2, 3))
    if x.ndim == 2 or len(x) == 1:
        x = x.expand(count, *x.shape[-2:])
    served(len(x) == count)
    return stack_product(weight.parts, x)


def _right_matmul(other: Any, input: Any) -> Tensor:
    return _matmul(input, other)


def _bmm(input: Any, mat2: Any) -> Tensor:
    served(input.ndim == mat2.ndim == 3 and len(input) == len(mat2))
    return _matmul(input, mat2)


def _added(input: Any, one: Any, other: Any, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    served(not isinstance(input, PackedTensor))
    is_one_matrix = isinstance(other, PackedTensor) and other.turned and not other.stacked
    if is_one_matrix and not isinstance(one, PackedTensor) and input.shape == other.shape[1:] and beta == alpha == 1:
        return joined_product(other.parts, one, input, other.along)
    product = _matmul(one, other)
    product = product if alpha == 1 else alpha * product
    return product if beta == 0 else (input if beta == 1 else beta * input) + product


def _grouped(input: Any, mat2: Any, *, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    served(isinstance(mat2, PackedTensor) and not isinstance(input, PackedTensor) and bias is None)
    served(mat2.stacked and mat2.turned and out_dtype in (None, input.dtype))
    if input.ndim == 3:
        served(offs is None and len(input) == len(mat2.parts))
        return stack_product(mat2.parts, input)
    served(offs is not None and len(offs) == len(mat2.parts))
    return grouped_product(mat2.parts, input, offs)


def _einsum(*args: Any) -> Tensor:
    equation, *operands = args
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], tuple | list) else operands
    served(isinstance(equation, str) and len(operands) == 2)
    packed = [isinstance(operand, PackedTensor) for operand in operands]
    served(sum(packed) == 1)
    own = packed.index(True)
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    sides = inputs.split(",")
    served(arrow and "." not in equation and len(sides) == 2)
    weight, x, letters, others = operands[own], operands[1 - own], sides[own], sides[1 - own]
    served(all(len(set(side)) == len(side) for side in (letters, others, output)))
    served(len(letters) == weight.ndim and len(others) == x.ndim)
    to, of = (letters[-1], letters[-2]) if weight.turned else (letters[-2], letters[-1])
    served(of in others and of not in output and to in output and to not in others)
    stack = letters[0] if weight.stacked else ""
    rest = [letter for letter in others if letter not in (of, stack)]
    served(set(output) == {to, *rest, *stack})
    if not stack:
        y = _times(weight, x.permute([others.index(letter) for letter in (*rest, of)]))
    else:
        order = [others.index(letter) for letter in (*rest, of)]
        if stack in others:
            x = x.permute([others.index(stack), *order])
            served(len(x) == len(weight.parts))
        else:
            x = x.permute(order).expand(len(weight.parts), *(x.shape[place] for place in order))
        y = stack_product(weight.parts, x.reshape(len(x), -1, x.shape[-1])).view(*x.shape[:-1], -1)
    found = [*stack, *rest, to]
    return y.permute([found.index(letter) for letter in output])


def _attention(*args: Any, **kwargs: Any) -> Any:
    return _ATTENTION(*args, **kwargs)


def _gates(input: Any, state: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> tuple[Tensor, Tensor]:
    return F.linear(input, w_ih, b_ih), F.linear(state, w_hh, b_hh)


def _added_gates(*args: Any) -> Tensor:
    one, other = _gates(*args)
    return one + other


def _lstm_cell(input: Any, hx: Any, *weights: Any) -> tuple[Tensor, Tensor]:
    return lstm_step(_added_gates(input, hx[0], *weights), hx[1])


def _gru_cell(input: Any, hx: Any, *weights: Any) -> Tensor:
    return gru_step(*_gates(input, hx, *weights), hx)


def _tanh_cell(*args: Any) -> Tensor:
    return _added_gates(*args).tanh()


def _relu_cell(*args: Any) -> Tensor:
    return _added_gates(*args).relu()


# Attention in Python, with its products seen one by one: its first lines would hand it over to this file again.
_ATTENTION: Any = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.__dict__, "has_torch_function": lambda tensors: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)
_ATTENTION.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__


# By the function that was called.
PRODUCTS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.einsum: _einsum,
    F.multi_head_attention_forward: _attention,
    Tensor.__rmatmul__: _right_matmul,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.mv, Tensor.mv), _matmul),
    **dict.fromkeys((torch.bmm, Tensor.bmm), _bmm),
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), _added),
    **dict.fromkeys((F.grouped_mm, torch._grouped_mm), _grouped),
    torch.lstm_cell: _lstm_cell,
    torch.gru_cell: _gru_cell,
    torch.rnn_tanh_cell: _tanh_cell,
    torch.rnn_relu_cell: _relu_cell,
}
