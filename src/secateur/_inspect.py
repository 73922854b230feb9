"""Look at the zeros of weights on disk: how many, and which patterns they already satisfy. One tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secateur._errors import FormatError
from secateur._io import find_shards, open_safetensors
from secateur._pattern import NM, Block, Column, Row, SparsityPattern

_GROUPS = (2, 4, 8, 16)
_WIDTHS = (2, 4, 8, 16, 32)
_TILES = ((32, 32), (16, 16), (8, 8), (4, 4), (1, 16), (16, 1), (1, 8), (8, 1), (1, 4), (4, 1))


@dataclass(frozen=True)
class TensorSummary:
    """The zeros of one stored tensor.

    Args:
        name: as stored.
        shape: as stored.
        dtype: as stored, in safetensors' spelling (``"F32"``, ``"BF16"``).
        sparsity: fraction of zeros.
        patterns: those that the zeros satisfy: for ``n:m``, no group of m keeps more than n; for blocks, rows and
            columns, every zero lies in one that is zero as a whole. Empty for a tensor without zeros or with less than
            two dimensions. Others than matrices are read as ``[out, rest]``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sparsity: float
    patterns: tuple[SparsityPattern, ...]


def inspect(path: str | Path) -> Iterator[TensorSummary]:
    """Yield a summary of every floating-point tensor in a safetensors file or model directory.

    Only one tensor is in memory at a time.

    Raises:
        FormatError: no such file, or not safetensors.
    """
    path = Path(path)
    if not path.exists():
        raise FormatError(f"{path} does not exist. Give a .safetensors file or a model directory.")
    files = [path / shard for shard in find_shards(path)] if path.is_dir() else [path]
    for file_path in files:
        with open_safetensors(file_path) as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor: Tensor = file.get_tensor(name)
                if tensor.is_floating_point() and tensor.numel():
                    yield summarize(name, tensor, file.get_slice(name).get_dtype())


def summarize(name: str, tensor: Tensor, dtype: str) -> TensorSummary:
    """Return the summary of one tensor."""
    zero = tensor == 0 if tensor.element_size() > 1 else tensor.float() == 0
    zeros = int(zero.count_nonzero())
    patterns = satisfied(zero.flatten(1)) if tensor.ndim > 1 else ()
    return TensorSummary(name, tuple(tensor.shape), dtype, zeros / tensor.numel(), patterns)


def satisfied(zero: Tensor) -> tuple[SparsityPattern, ...]:
    """Return the patterns that the zeros of a matrix (``[out, in]`` bool, True = zero) satisfy, N:M first."""
    found: list[SparsityPattern] = []
    zeros, (rows, columns) = int(zero.count_nonzero()), zero.shape
    if not zeros:
        return ()
    counts = {1: zero.view(torch.uint8)}  # zeros in groups of so many columns
    for m in _WIDTHS:
        if columns % m == 0:
            pairs = counts[m // 2].unflatten(1, (-1, 2))
            counts[m] = pairs[..., 0] + pairs[..., 1]
    for m in _GROUPS:
        if m in counts:
            n = m - int(counts[m].min())
            # 4:8 says nothing new where 2:4 holds already.
            implied = any(isinstance(p, NM) and m % p.m == 0 and p.n * (m // p.m) <= n for p in found)
            if n < m and not implied:
                found.append(NM(n, m))
    for height, width in _TILES:
        if rows % height == 0 and width in counts:
            tiles = (counts[width] == width).unflatten(0, (-1, height)).all(1)
            implied = any(isinstance(p, Block) and p.height % height == 0 and p.width % width == 0 for p in found)
            if int(tiles.count_nonzero()) * height * width == zeros and not implied:
                found.append(Block(height, width))
    if int(zero.all(1).count_nonzero()) * columns == zeros:
        found.append(Row())
    if int(zero.all(0).count_nonzero()) * rows == zeros:
        found.append(Column())
    return tuple(found)
