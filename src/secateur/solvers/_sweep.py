"""Sweep over the columns of a weight: what those before leave for those still to come to make up for."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur._types import Weight

BLOCK = 128  # columns that are swept before those after them are updated by a matrix product
PANEL = 32  # the same within a block


def to_columns(rows: Weight, groups: int) -> Tensor:
    """From ``[out, in]`` to ``[groups, in, out / groups]``, with the weights of a column side by side."""
    return rows.reshape(groups, rows.shape[0] // groups, rows.shape[1]).transpose(1, 2).contiguous()


def to_rows(columns: Tensor) -> Tensor:
    """From ``[groups, in, out / groups]`` back to ``[out, in]``."""
    return columns.transpose(1, 2).reshape(columns.shape[0] * columns.shape[2], columns.shape[1])


def open_block(dense: Tensor, removed: Tensor, factor: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The block of U for columns [start, stop), and their values if they were free.

    Args:
        dense: ``[groups, in, rows]``, what is to be approximated.
        removed: the same less the result, for the columns before the block.
        factor: R, upper triangular, with ``H = R R^T`` and ``U = R^-1``.
        start, stop: the columns of the block.
    """
    unit = torch.eye(stop - start).to(dense)
    inverse = torch.linalg.solve_triangular(factor[:, start:stop, start:stop], unit, upper=True)
    carried = factor[:, :start, start:stop].transpose(1, 2) @ removed[:, :start]
    return inverse, dense[:, start:stop] + inverse.transpose(1, 2) @ carried


def compensate(current: Tensor, error: Tensor, inverse: Tensor, since: int, begin: int, end: int) -> None:
    """Move columns [begin, end) of the block by the errors that columns [since, begin) made."""
    if begin > since:
        current[:, begin:end].baddbmm_(
            inverse[:, since:begin, begin:end].transpose(1, 2), error[:, since:begin], alpha=-1
        )
