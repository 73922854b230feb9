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


class Gram(Accumulator):
    """The raw sum ``X.T @ X`` over all tokens, ``[groups, in, in]``."""

    name: ClassVar[Need] = "gram"
    hook = INPUTS
    follows = None

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        if self._sum is None:
            self._sum = rows.new_zeros(rows.shape[0], rows.shape[2], rows.shape[2])
        for gram, group in zip(self._sum, rows, strict=True):  # mm is several times faster than bmm of one matrix
            gram.addmm_(group.T, group)

    def merge(self, other: Gram) -> None:
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum.add_(other._sum)

    def result(self) -> Tensor:
        assert self._sum is not None
        _check_overflow(self._sum.diagonal(dim1=1, dim2=2))
        return self._sum


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
        squares = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
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
