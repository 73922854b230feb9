"""Native operations of the differentiable mask. ``secateur.nn`` calls them, and checks the tensors before it does."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.kernels._load import load
from secateur.kernels._native_backend import SMALL


def gate(weights: Tensor, threshold: Tensor, temperature: float, isa: str, *, solved: bool, hard: bool) -> Tensor:
    """Return the weights times their mask. ``secateur.nn._gate`` has the formula."""
    native = load()
    assert not isinstance(native, str)
    out = torch.empty_like(weights)
    native.gate(isa, *_gate_arguments(weights, threshold, temperature, solved, hard), out.data_ptr())
    return out


def gate_backward(
    grads: Tensor,
    weights: Tensor,
    threshold: Tensor,
    temperature: float,
    isa: str,
    *,
    solved: bool,
    hard: bool,
    owned: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of the weights, and that of a learned threshold.

    The gradient of the weights is written over ``grads`` if ``owned``.
    """
    native = load()
    assert not isinstance(native, str)
    by_weights = grads if owned else torch.empty_like(grads)
    by_threshold = None if solved else torch.empty_like(threshold)
    native.gate_backward(
        isa,
        *_gate_arguments(weights, threshold, temperature, solved, hard),
        grads.data_ptr(),
        by_weights.data_ptr(),
        0 if by_threshold is None else by_threshold.data_ptr(),
    )
    return by_weights, by_threshold


def _gate_arguments(
    weights: Tensor, threshold: Tensor, temperature: float, solved: bool, hard: bool
) -> tuple[int | float, ...]:
    each = not solved and threshold.shape == weights.shape
    threads = torch.get_num_threads() if weights.numel() > SMALL else 1
    return weights.data_ptr(), threshold.data_ptr(), temperature, *weights.shape, each, solved, hard, threads


def unit_sums(a: Tensor, b: Tensor, height: int, width: int, isa: str) -> Tensor:
    """Return the sum of ``a * b`` over each unit, ``[rows / height, columns / width]``, for contiguous matrices."""
    native = load()
    assert not isinstance(native, str)
    out = a.new_empty(a.shape[0] // height, a.shape[1] // width)
    native.unit_sums(isa, *_unit_arguments(a, height, width), a.data_ptr(), b.data_ptr(), out.data_ptr())
    return out


def times_units(
    a: Tensor,
    by_a: Tensor,
    height: int,
    width: int,
    isa: str,
    *,
    plus: tuple[Tensor, Tensor] | None = None,
    owned: bool,
) -> Tensor:
    """Return ``a`` times one number for each unit. It is written over ``a`` if ``owned``.

    ``plus`` is a second matrix with its numbers, whose product is added.
    """
    native = load()
    assert not isinstance(native, str)
    out = a if owned else torch.empty_like(a)
    b, by_b = (0, 0) if plus is None else (tensor.data_ptr() for tensor in plus)
    native.times_units(isa, *_unit_arguments(a, height, width), a.data_ptr(), by_a.data_ptr(), b, by_b, out.data_ptr())
    return out


def _unit_arguments(matrix: Tensor, height: int, width: int) -> tuple[int, ...]:
    return *matrix.shape, height, width, torch.get_num_threads() if matrix.numel() > SMALL else 1
