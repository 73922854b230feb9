"""Sparse checkpoints of compressed-tensors up to 0.14. Its later versions no longer read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from secateur._errors import FormatError, naming
from secateur._types import dtype_name
from secateur.files import find_shards, open_safetensors, read_header
from secateur.formats import (
    UNSCALED_DTYPES,
    Bitmask,
    Format,
    NMPacked,
    check_shape,
    check_sizes,
    population,
)
from secateur.packing._file import DAMAGED, PackedFile
from secateur.patterns import NM


def read_compressed_tensors(path: str | Path) -> PackedFile:
    """Read a checkpoint that compressed-tensors (up to 0.14) wrote as ``sparse-bitmask`` or ``sparse-24-bitmask``.

    Names of early versions (``up.weight.compressed``) and of later ones (``up.compressed``) are read. A matrix becomes
    a :class:`Bitmask` or :class:`NMPacked` layer, and any other compressed tensor a dense one. int8 values with a
    ``weight_scale`` for each row or tensor stay int8. float8 values are multiplied by their scale and get its dtype.

    Args:
        path: a safetensors file, or a model directory.

    Raises:
        FormatError: no tensor is compressed, values are quantised in another form, or a tensor is invalid. The message
            names the tensor.

    Reference:
        compressed-tensors, https://github.com/vllm-project/compressed-tensors, ``compressors/sparse_compressors``.
    """
    path = Path(path)
    if not path.exists():
        raise FormatError(f"{path} does not exist. Give a .safetensors file or a model directory.")
    stored: dict[str, Tensor] = {}
    for shard in [path / name for name in find_shards(path)] if path.is_dir() else [path]:
        names, _ = read_header(shard)
        if twice := sorted(names & stored.keys()):
            raise FormatError(f"{path}: tensor {twice[0]!r} is in two files. {DAMAGED}")
        with open_safetensors(shard) as file:
            stored.update((name, file.get_tensor(name).clone()) for name in sorted(names))
    prefixes = sorted(name.removesuffix(".compressed") for name in stored if name.endswith(".compressed"))
    if not prefixes:
        other = next((name for name in stored if name.endswith((".weight_packed", ".meta"))), None)
        what = f"{other!r} has another format of compressed-tensors" if other else "no tensor is called *.compressed"
        raise FormatError(f"{path} has no sparse-bitmask weights: {what}.\nLoad it with transformers instead.")
    early = any(prefix.endswith(".weight") for prefix in prefixes)  # later versions drop that ending
    layers: dict[str, Format] = {}
    for prefix in prefixes:
        weight = prefix if early else f"{prefix}.weight"
        if weight in stored:
            raise FormatError(f"{path}: {weight!r} is both dense and compressed. {DAMAGED}")
        parts = {key: stored.pop(f"{prefix}.{key}", None) for key in _COMPRESSED}
        with naming(f"{path}: {prefix}", DAMAGED):
            packed, shape = _decompress(weight, parts, stored)
        if len(shape) == 2 and weight.endswith(".weight"):
            layers[weight.removesuffix(".weight")] = packed
        else:
            stored[weight] = packed.to_dense().view(shape)
    if stray := next((name for name in stored if name.endswith((".bitmask", ".row_offsets"))), None):
        raise FormatError(f"{path}: {stray!r} has no compressed tensor. {DAMAGED}")
    return PackedFile(layers, stored)


_ZERO_DTYPES = frozenset({*UNSCALED_DTYPES, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32, torch.int64})
_COMPRESSED = ("compressed", "bitmask", "shape", "row_offsets")


def _decompress(
    weight: str, parts: Mapping[str, Tensor | None], stored: dict[str, Tensor]
) -> tuple[Format, tuple[int, ...]]:
    """Return one compressed tensor as a packed matrix, and its shape. Its scale is removed from ``stored``."""
    values, bitmask, size, offsets = (parts[key] for key in _COMPRESSED)
    if values is None or bitmask is None or size is None:
        raise FormatError(f"{[key for key in _COMPRESSED[:3] if parts[key] is None]} are missing.")
    if size.dtype not in (torch.int64, torch.int32) or not 1 <= size.numel() <= 8:
        raise FormatError(f"shape should be 1 to 8 int64 sizes, got {dtype_name(size.dtype)} {list(size.shape)}.")
    shape = check_sizes(size.flatten().tolist())
    matrix = check_shape((math.prod(shape[:-1]), shape[-1]))
    if bitmask.dtype != torch.uint8 or bitmask.numel() != matrix[0] * ((matrix[1] + 7) // 8):
        found = f"{dtype_name(bitmask.dtype)} {list(bitmask.shape)}"
        raise FormatError(f"bitmask should be uint8 and fit the shape {shape}, got {found}.")
    by_group = offsets is None
    if by_group and (values.ndim != 2 or len(shape) != 2 or values.shape != (shape[0], shape[1] // 2)):
        raise FormatError(f"compressed should hold half of each row of {shape}, got {list(values.shape)}.")
    bitmask = bitmask.view(matrix[0], (matrix[1] + 7) // 8)
    if offsets is None or len(shape) > 2:  # the offsets of tensors with more dimensions are wrong
        counts = _bit_counts(bitmask)
        offsets = counts.cumsum(0) - counts
    values, scales = _scaled(weight, values.flatten(), bitmask, matrix[0], stored)
    tensors = {"values": values, "bitmask": bitmask, "row_offsets": offsets.view(-1)}
    packed: Format = Bitmask.from_tensors(tensors | ({} if scales is None else {"scales": scales}), matrix)
    if by_group and shape[1] % 4 == 0:
        if not bool((packed.mask().view(matrix[0], -1, 4).sum(2) == 2).all()):
            raise FormatError("bitmask should mark exactly 2 of every 4 weights, but does not.")
        packed = packed.convert(NMPacked, NM(2, 4))
    return packed, shape


def _scaled(
    weight: str, values: Tensor, bitmask: Tensor, rows: int, stored: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Values that a format can hold, and the scale of each row for int8."""
    if values.dtype in UNSCALED_DTYPES:
        return values, None
    if values.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise FormatError(f"values are {dtype_name(values.dtype)}, which secateur cannot store.")
    scale, zero = (stored.pop(f"{weight}_{key}", None) for key in ("scale", "zero_point"))
    if zero is not None and (zero.dtype not in _ZERO_DTYPES or bool((zero.float() != 0).any())):
        raise FormatError("weight_zero_point is not 0; only symmetric quantisation can be read.")
    if scale is None:
        if values.dtype == torch.int8:
            raise FormatError("values are int8, but weight_scale is missing.")
        return values.to(torch.bfloat16), None  # exact
    if scale.numel() not in (1, rows) or scale.dtype not in UNSCALED_DTYPES:
        raise FormatError(
            f"weight_scale should be one float for the tensor or for each of {rows} rows, "
            f"got {dtype_name(scale.dtype)} {list(scale.shape)}."
        )
    by_row = scale.float().flatten().expand(rows).contiguous()
    if values.dtype == torch.int8:
        return values, by_row
    counts = _bit_counts(bitmask)
    if int(counts.sum()) != len(values):
        raise FormatError(f"bitmask marks {int(counts.sum())} weights, but there are {len(values)} values.")
    return (values.float() * by_row.repeat_interleave(counts)).to(scale.dtype), None


def _bit_counts(bitmask: Tensor) -> Tensor:
    return torch.from_numpy(population(bitmask.numpy()))
