"""Look at the zeros of weights on disk: how many, and which patterns they already satisfy. One tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from secateur._errors import FormatError
from secateur.files._directory import find_shards
from secateur.files._reading import is_there
from secateur.files._safetensors import open_safetensors
from secateur.patterns import SparsityPattern, satisfied

_UNREADABLE = {"F6_E2M3", "F6_E3M2"}


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
        FormatError: no such file, not safetensors, or a tensor of a dtype that PyTorch lacks.
    """
    path = Path(path)
    if not is_there(path):
        raise FormatError(f"{path} does not exist. Give a .safetensors file or a model directory.")
    files = [path / shard for shard in find_shards(path)] if path.is_dir() else [path]
    for file_path in files:
        with open_safetensors(file_path) as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                dtype = file.get_slice(name).get_dtype()
                if dtype in _UNREADABLE:
                    raise FormatError(
                        f"{file_path}: {name} has the dtype {dtype}, which PyTorch lacks. Its zeros cannot be counted."
                    )
                tensor: Tensor = file.get_tensor(name)
                if tensor.is_floating_point() and tensor.numel():
                    yield summarize(name, tensor, dtype)


def summarize(name: str, tensor: Tensor, dtype: str) -> TensorSummary:
    """Return the summary of one tensor."""
    if tensor.dtype == torch.float4_e2m1fn_x2:  # two numbers in a byte, of which PyTorch computes nothing
        halves = tensor.view(torch.uint8)
        zero = torch.stack([halves & 0b0111 == 0, halves & 0b0111_0000 == 0], -1).flatten(-2)  # but for the signs
    else:
        zero = tensor == 0 if tensor.element_size() > 1 else tensor.float() == 0
    zeros = int(zero.count_nonzero())
    patterns = satisfied(zero.flatten(1)) if zero.ndim > 1 else ()
    return TensorSummary(name, tuple(zero.shape), dtype, zeros / zero.numel(), patterns)
