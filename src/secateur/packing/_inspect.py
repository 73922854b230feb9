"""Look at the zeros of stored weights, dense or packed: how many, which patterns they satisfy, in which format."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from secateur._errors import naming
from secateur._types import dtype_name
from secateur.files import TensorSummary, check_no_pickle, find_shards, inspect, read_header, summarize
from secateur.formats import INT4, Format
from secateur.packing._compressed_tensors import read_compressed_tensors
from secateur.packing._contents import Contents
from secateur.packing._file import DAMAGED, ENTRY, PackedFile, read_packed
from secateur.packing._model import FILE
from secateur.patterns import SparsityPattern, Unstructured, satisfied

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    INT4: "I4",
}
_LARGEST = 2**28  # weights: more are not made dense to look for patterns, because a few bytes may claim any shape


def inspect_stored(path: str | Path) -> Iterator[TensorSummary]:
    """Yield a summary of every tensor in a safetensors file or a model directory, whoever wrote it.

    Files of :func:`secateur.save` and sparse checkpoints of compressed-tensors are read as what they mean: one summary
    for each weight. They are checked and read whole. Of any other file, one tensor is in memory at a time.

    Raises:
        FormatError: no such file, a pickle, not safetensors, or damaged.
    """
    path = Path(path)
    if path.is_dir() and (path / FILE).is_file():
        path = path / FILE
    if path.is_file():
        check_no_pickle(path)
    if path.suffix == ".safetensors" and path.is_file() and ENTRY in read_header(path)[1]:
        yield from _summaries(path, read_packed(path))
    elif any(name.endswith(".compressed") for name in _names(path)):
        yield from _summaries(path, read_compressed_tensors(path))
    else:
        yield from inspect(path)


def _names(path: Path) -> set[str]:
    if path.is_dir():
        return {name for shard in find_shards(path) for name in read_header(path / shard)[0]}
    return read_header(path)[0] if path.suffix == ".safetensors" and path.is_file() else set()


def _summaries(path: Path, file: PackedFile) -> Iterator[TensorSummary]:
    with naming(path, DAMAGED):
        contents = Contents.of(file)
    for name, packed in contents.layers.items():
        if (shape := contents.sparse.get(name)) is not None:  # no packed layer, but stored without its zeros
            yield _summary(name, packed, shape)
        else:
            yield _summary(f"{name}.weight", packed, packed.shape)
    for name, tensor in contents.tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            yield summarize(name, tensor, _DTYPES.get(tensor.dtype, dtype_name(tensor.dtype)))


def _summary(name: str, packed: Format, shape: tuple[int, ...]) -> TensorSummary:
    stored = packed.tensors()
    total = math.prod(packed.shape)
    if packed.value_dtype == INT4:
        kept = int(packed.grouped()[0].count_nonzero())
    else:
        kept = sum(int(stored[part].count_nonzero()) for part in packed.value_names if part in stored)
    found: tuple[SparsityPattern, ...] = ()
    if 0 < total <= _LARGEST:
        dense: Tensor = packed.to_dense()
        found = satisfied(dense == 0)
    if packed.pattern not in found and not isinstance(packed.pattern, Unstructured):
        found = (packed.pattern, *found)
    sparsity = 1 - kept / total if total else 0.0
    summary = TensorSummary(name, shape, _DTYPES[packed.value_dtype], sparsity, found)
    return replace(summary, format=packed.name)
