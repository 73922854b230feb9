"""Look at the zeros of weights on disk: how many, and which patterns they already satisfy. One tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from secateur._errors import FormatError
from secateur.files._claims import is_part
from secateur.files._directory import check_no_pickle, find_shards
from secateur.files._safetensors import open_safetensors
from secateur.patterns import SparsityPattern, satisfied


@dataclass(frozen=True)
class TensorSummary:
    """The zeros of one stored tensor.

    Args:
        name: as stored.
        shape: as stored.
        dtype: as stored, in safetensors' spelling (``"F32"``, ``"BF16"``).
        sparsity: fraction of zeros; None where it cannot be told, because a tensor is a part of a quantized weight.
        patterns: those that the zeros satisfy: for ``n:m``, no group of m keeps more than n; for blocks, rows and
            columns, every zero lies in one that is zero as a whole. Empty for a tensor without zeros or with less than
            two dimensions. Others than matrices are read as ``[out, rest]``.
        format: how it is stored: ``"dense"``, ``"quantized"``, or the name of a format of packed weights.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sparsity: float | None
    patterns: tuple[SparsityPattern, ...]
    format: str = "dense"


def inspect(path: str | Path) -> Iterator[TensorSummary]:
    """Yield a summary of every floating-point tensor, and of every part of a quantized weight, that is stored.

    Only one tensor is in memory at a time.

    Args:
        path: a safetensors file, or a model directory with some.

    Raises:
        FormatError: no such file, a pickle, or not safetensors.
    """
    path = Path(path)
    if not path.exists():
        raise FormatError(f"{path} does not exist. Give a .safetensors file or a model directory.")
    files = [path / shard for shard in find_shards(path)] if path.is_dir() else [path]
    for file_path in files:
        check_no_pickle(file_path)
        with open_safetensors(file_path) as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                part = file.get_slice(name)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                # A zero of 8 bits is one whatever the scale, and smaller values are several in a byte.
                if is_part(name, dtype) and not dtype.startswith("F8"):
                    yield TensorSummary(name, shape, dtype, None, (), "quantized")
                    continue
                tensor: Tensor = file.get_tensor(name)
                if tensor.is_floating_point() and tensor.numel():
                    yield summarize(name, tensor, dtype)


def summarize(name: str, tensor: Tensor, dtype: str) -> TensorSummary:
    """Return the summary of one tensor."""
    zero = tensor == 0 if tensor.element_size() > 1 else tensor.float() == 0
    zeros = int(zero.count_nonzero())
    patterns = satisfied(zero.flatten(1)) if tensor.ndim > 1 else ()
    return TensorSummary(name, tuple(tensor.shape), dtype, zeros / tensor.numel(), patterns)
