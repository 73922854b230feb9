"""See which tensors functions multiply by which inputs, whatever module calls them.

A layer may be read without being called: ``F.linear(x, self.qkv.weight)``, one expert of a stack, the weights inside of
``nn.MultiheadAttention``. :class:`FunctionWatch` sees such calls of PyTorch's functions as pairs of a matrix and rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  the name that PyTorch's own documentation uses
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Product:
    """One product of a matrix and rows, as a function computes it.

    Args:
        function: its name.
        matrix: ``[out, in]``, or ``[matrices, out, in]``: a view of what the function was given.
        x: the inputs ``[..., in]``; for several matrices ``[matrices, ..., in]``, or the rows of all one after the
            other.
        ends: for rows one after the other, where those of each matrix end, ``[matrices]``; else None.
        is_shared: whether all matrices have the same inputs, ``[..., in]``.
    """

    function: str
    matrix: Tensor
    x: Tensor
    ends: Tensor | None = None
    is_shared: bool = False

    def inputs_of(self, index: int | None, real: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the inputs ``[..., in]`` of a matrix, and which of them are real: None if all are.

        Inputs of a batch of matrices that are zero as a whole do not count as real: they fill up the places of tokens
        that were routed elsewhere, and add nothing to any statistic.

        Args:
            index: of the matrix among several; None if it is the only one.
            real: bool, in the shape of the positions of ``x``; None if all are real.
        """
        if index is None:
            return self.x, real
        if self.ends is not None:
            rows = slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))
            return self.x[rows], None if real is None else real[rows]
        if self.is_shared:
            return self.x, real
        filled = self.x[index].any(dim=-1)
        return self.x[index], filled if real is None else filled & real[index]


OnProduct: TypeAlias = Callable[[Product], None]
_Handler: TypeAlias = Callable[..., Iterator[Product]]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Product]:
    yield Product("linear", weight, input)


def _matmul(input: Tensor, other: Tensor, **_: Any) -> Iterator[Product]:
    if other.ndim == 2 or (other.ndim == 3 and input.ndim in (2, 3)):
        yield Product("matmul", other.mT, input, is_shared=input.ndim == 2)
    if (input.ndim == 2 and other.ndim >= 2) or (input.ndim == 3 and other.ndim in (2, 3)):
        yield Product("matmul", input, other.mT, is_shared=other.ndim == 2)


def _added_matmul(input: Tensor, one: Tensor, other: Tensor, **_: Any) -> Iterator[Product]:
    return _matmul(one, other)


def _einsum(equation: Any, *operands: Any) -> Iterator[Product]:
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], tuple | list) else operands
    if not isinstance(equation, str) or "..." in equation or "->" not in equation or len(operands) != 2:
        return
    inputs, _, output = equation.replace(" ", "").partition("->")
    sides = inputs.split(",")
    if any(len(set(side)) != len(side) for side in (*sides, output)):
        return
    yield from _one_operand(sides[1], operands[1], sides[0], operands[0], output)
    yield from _one_operand(sides[0], operands[0], sides[1], operands[1], output)


def _one_operand(own: str, matrix: Tensor, others: str, x: Tensor, output: str) -> Iterator[Product]:
    """One operand of an einsum as a matrix, or as a stack of them, and the other one as its inputs."""
    contracted = [letter for letter in own if letter in others and letter not in output]
    stacked = [letter for letter in own if letter in others and letter in output]
    free = [letter for letter in own if letter not in others]
    if not contracted or not free or len(stacked) > 1 or len(own) != matrix.ndim or len(others) != x.ndim:
        return
    rest = [letter for letter in others if letter not in (*contracted, *stacked)]
    matrix = matrix.permute([own.index(letter) for letter in (*stacked, *free, *contracted)])
    x = x.permute([others.index(letter) for letter in (*stacked, *rest, *contracted)])
    if not stacked and len(free) == 2 and own[0] == free[0] and own[1] != free[1]:
        # The first letter counts matrices that all have the same inputs.
        yield Product("einsum", matrix.flatten(2), x.flatten(x.ndim - len(contracted)), is_shared=True)
        return
    first = len(stacked)
    # A copy where the letters are not in the order of the memory. It is no weight then, and not reported.
    matrix = matrix.flatten(first + len(free)).flatten(first, first + len(free) - 1)
    yield Product("einsum", matrix, x.flatten(x.ndim - len(contracted)))


def _grouped(input: Tensor, mat2: Tensor, *, offs: Tensor | None = None, **_: Any) -> Iterator[Product]:
    if input.ndim == 2 and mat2.ndim == 3 and offs is not None:
        yield Product("grouped_mm", mat2.mT, input, offs)
    elif input.ndim == 3 and mat2.ndim == 3:
        yield Product("grouped_mm", mat2.mT, input)


_HANDLERS: dict[Any, _Handler] = {
    F.linear: _linear,
    torch.einsum: _einsum,
    **dict.fromkeys((torch.matmul, Tensor.matmul, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), _matmul),
    **dict.fromkeys((torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm), _added_matmul),
    **dict.fromkeys((F.grouped_mm, torch._grouped_mm), _grouped),
}
# A function that gives the same values in another tensor: what multiplies that one multiplies the weight.
_COPIES = frozenset(
    {Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.contiguous, Tensor.clone}
)


class FunctionWatch(TorchFunctionMode):
    """Calls back with the products that PyTorch's functions compute while the mode is on.

    Args:
        on_product: called before the function runs.
        is_weight: whether a tensor is, or shares the memory of, a weight of interest. Only products of such a matrix
            are reported.
    """

    def __init__(self, on_product: OnProduct, is_weight: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self._on_product, self._is_weight = on_product, is_weight
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # by the id of a copy: the copy, and what it is of

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Report what the function multiplies, and call it."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._attention(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None:
            for product in handler(*args, **kwargs):
                original = self._original(product.matrix)
                if original is not None:
                    self._on_product(replace(product, matrix=original))
        result = func(*args, **kwargs)
        if func in _COPIES and isinstance(result, Tensor) and result is not args[0] and self._is_weight(args[0]):
            self._copies[result.untyped_storage().data_ptr()] = (result, args[0])
        return result

    def _original(self, matrix: Tensor) -> Tensor | None:
        """The part of a weight that a matrix is, or is a copy of; None if it is something else."""
        if self._is_weight(matrix):
            return matrix
        copy, weight = self._copies.get(matrix.untyped_storage().data_ptr(), (None, None))
        if copy is None or weight is None or copy.stride() != weight.stride():
            return None
        return weight.as_strided(matrix.shape, matrix.stride(), weight.storage_offset() + matrix.storage_offset())

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attention with its output projection apart: what reads the projection is what attention returns without."""
        names = list(inspect.signature(F.multi_head_attention_forward).parameters)[3:]
        given = dict(zip(names, args, strict=False)) | kwargs
        if given["in_proj_weight"] is not None and not given.get("use_separate_proj_weight"):
            parts = given["in_proj_weight"].chunk(3)
        else:
            parts = [given.get(f"{letter}_proj_weight") for letter in "qkv"]
        for x, weight in zip((query, key, value), parts, strict=True):
            if weight is not None and (original := self._original(weight)) is not None:
                self._on_product(Product("multi_head_attention_forward", original, x))
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        if (original := self._original(weight)) is None:
            return F.multi_head_attention_forward(query, key, value, **given)
        # Multiplied by one, its values stay what they are.
        one = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        given |= {"out_proj_weight": one, "out_proj_bias": None}
        x, scores = F.multi_head_attention_forward(query, key, value, **given)
        self._on_product(Product("multi_head_attention_forward", original, x))
        return F.linear(x, weight, bias), scores
