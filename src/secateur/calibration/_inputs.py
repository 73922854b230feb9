"""Statistics of the inputs that a layer reads."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur._errors import StatisticsError
from secateur.calibration._accumulators import Accumulator, Hook, Report
from secateur.calibration._statistics import Need
from secateur.layers import Layer


def _attach(layer: Layer, module: nn.Module, report: Report) -> RemovableHandle:
    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if layer.kind.call_rows is not None:
            rows = layer.kind.call_rows(module, args, kwargs)
            report(x if isinstance(x, Tensor) else rows[0], rows)
        elif layer.kind.input_rows is not None:
            report(x, layer.kind.input_rows(module, x))

    return module.register_forward_pre_hook(read, with_kwargs=True)


INPUTS = Hook(_attach)


_STRIPES = 8  # of columns: the more, the less is computed twice, and the smaller each product
_NARROW = 128  # columns of a stripe, at least


class Gram(Accumulator):
    """The raw sum ``X.T @ X`` over all tokens, ``[groups, in, in]``.

    The matrix is symmetric, so that about half of it is computed, in stripes, and the other half is copied at the end.
    Rows of a batch that has fewer tokens than features wait until there are more: their product would be larger than
    they are, and so would be the work of adding it up.
    """

    name: ClassVar[Need] = "gram"
    hook = INPUTS
    follows = None
    splits = False

    def __init__(self) -> None:
        self._sum: Tensor | None = None  # on and right of the diagonal blocks; what is left of them has no meaning
        self._waiting: list[Tensor] = []  # never written to, so that several sums may hold the same ones

    def add(self, rows: Tensor) -> None:
        if rows.shape[1] < rows.shape[2]:
            self._waiting.append(rows.clone())  # the model may write to its own tensor
            self._multiply_if_enough()
        else:
            self._multiply(rows)

    def merge(self, other: Gram) -> None:
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum.add_(other._sum)
        self._waiting += other._waiting
        self._multiply_if_enough()

    def result(self) -> Tensor:
        self._multiply_waiting()
        assert self._sum is not None
        _check_overflow(self._sum.diagonal(dim1=1, dim2=2))
        for start, stop in _stripes(self._sum.shape[2]):
            block = self._sum[:, start:stop, start:stop]  # its two halves were added in different orders
            block.copy_(block.triu() + block.triu(1).mT)
            self._sum[:, stop:, start:stop] = self._sum[:, start:stop, stop:].mT
        return self._sum

    def _multiply_if_enough(self) -> None:
        if self._waiting and sum(rows.shape[1] for rows in self._waiting) >= self._waiting[0].shape[2]:
            self._multiply_waiting()

    def _multiply_waiting(self) -> None:
        if self._waiting:
            self._multiply(torch.cat(self._waiting, 1) if len(self._waiting) > 1 else self._waiting[0])
            self._waiting = []

    def _multiply(self, rows: Tensor) -> None:
        if self._sum is None:
            self._sum = rows.new_zeros(rows.shape[0], rows.shape[2], rows.shape[2])
        for gram, group in zip(self._sum, rows, strict=True):  # mm is several times faster than bmm of one matrix
            for start, stop in _stripes(len(gram)):
                gram[start:stop, start:].addmm_(group[:, start:stop].T, group[:, start:])


def _stripes(columns: int) -> list[tuple[int, int]]:
    """The columns of each stripe of a Gram matrix, from the first to the last."""
    width = max(_NARROW, -(-columns // _STRIPES))
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def _norm_of_gram(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=1, dim2=2).double().sqrt().to(torch.float32)


class InputNorm(Accumulator):
    """The L2 norm of each input feature over all tokens, ``[groups, in]`` in float32."""

    name: ClassVar[Need] = "input_norm"
    hook = INPUTS
    follows = ("gram", _norm_of_gram)

    def __init__(self) -> None:
        self._squares: Tensor | None = None  # float64

    def add(self, rows: Tensor) -> None:
        squares = rows.double().square().sum(1)  # several times faster than vector_norm in float64
        self._squares = squares if self._squares is None else self._squares + squares

    def merge(self, other: InputNorm) -> None:
        if other._squares is not None:
            self._squares = other._squares.clone() if self._squares is None else self._squares.add_(other._squares)

    def result(self) -> Tensor:
        assert self._squares is not None
        _check_overflow(self._squares)
        return self._squares.sqrt().to(torch.float32)


class InputMean(Accumulator):
    """The mean of each input feature over all tokens, ``[groups, in]`` in float64.

    The square of a mean is subtracted from a mean of squares to get a variance, so it must not be rounded.
    """

    name: ClassVar[Need] = "input_mean"
    hook = INPUTS
    follows = None

    def __init__(self) -> None:
        self._sum: Tensor | None = None  # float64
        self._tokens = 0

    def add(self, rows: Tensor) -> None:
        total = rows.sum(1, dtype=torch.float64)
        self._sum = total if self._sum is None else self._sum + total
        self._tokens += rows.shape[1]

    def merge(self, other: InputMean) -> None:
        self._tokens += other._tokens
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum.add_(other._sum)

    def result(self) -> Tensor:
        assert self._sum is not None
        return self._sum / self._tokens


def _check_overflow(squares: Tensor) -> None:
    if not squares.isfinite().all():
        raise StatisticsError("its inputs are so large that their products overflow float32. Scale them down.")
