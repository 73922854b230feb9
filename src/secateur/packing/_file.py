"""Packed weights in one safetensors file: written whole or not at all, and checked before anything uses them.

``docs/format.md`` is the specification. Nothing is unpickled. Files that compressed-tensors wrote as ``sparse-bitmask``
or ``sparse-24-bitmask`` are read too; its current versions no longer do.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur._errors import FormatError, PatternError
from secateur.files import check_place, find_shards, open_safetensors, parse_header, read_header, write_safetensors
from secateur.formats import FORMATS, VALUE_DTYPES, Bitmask, Format, NMPacked, check_shape, population
from secateur.patterns import NM, SparsityPattern

VERSION = 1
ENTRY = "secateur"  # the one entry of the safetensors metadata

# Loaders that find a file of such a name fill in what they miss at random, and say so only in a log.
_DENSE_NAMES = re.compile(
    r"(model|pytorch_model|adapter_model|diffusion_pytorch_model|open_clip_model|consolidated)"
    r"([.-]\d+(-of-\d+)?)?\.safetensors",
    re.IGNORECASE,
)
_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64}
    | {torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool}
    | {torch.complex64}
)
_DAMAGED = "The file is damaged, or was changed: copy it again, or make it again from the dense model."
_KEYS = {"version", "layers", "metadata", "checksum"}


@dataclass(frozen=True, eq=False, repr=False)
class PackedFile:
    """What a file of packed weights holds.

    Args:
        layers: packed weights by the name of their layer.
        tensors: all other tensors by name, such as biases and norms.
        metadata: whatever was given when the file was written; any JSON.
    """

    layers: Mapping[str, Format]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def write_packed(
    path: str | Path,
    layers: Mapping[str, Format],
    tensors: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write packed layers and other tensors to one safetensors file. An old file stays until the new one is complete.

    Args:
        path: ends in ``.safetensors``; not ``model.safetensors`` and its like, which would be taken for a dense model.
        layers: packed weights by the name of their layer; the tensor ``values`` of layer ``a.b`` is stored as
            ``a.b.values``.
        tensors: other tensors by name. Tensors that share memory are stored once each.
        metadata: any JSON, stored with the file.

    Raises:
        FormatError: a name that cannot be, two tensors of one name, a dtype that safetensors lacks, a place that cannot
            be written, a full disk.
        TypeError: metadata that is no JSON.

    Example:
        >>> import os, tempfile, torch
        >>> from secateur.formats import Bitmask
        >>> from secateur.packing import read_packed, write_packed
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "tiny.sparse.safetensors")
        ...     write_packed(path, {"up": Bitmask.from_dense(torch.eye(3))}, {"up.bias": torch.ones(3)}, {"by": "me"})
        ...     file = read_packed(path)
        >>> file.layers["up"], sorted(file.tensors), file.metadata
        (Bitmask(3x3, unstructured, float32, 39 bytes), ['up.bias'], {'by': 'me'})
    """
    path = Path(path)
    _check_name(path)
    stored: dict[str, Tensor] = {}
    for layer, packed in layers.items():
        _add(stored, {f"{layer}.{name}": tensor for name, tensor in packed.tensors().items()})
    for layer, packed in layers.items():
        for name in _own_names(layer, packed) & (tensors or {}).keys():
            raise FormatError(f"{path}: {name!r} is the name of a tensor of the packed layer {layer!r}. Rename one.")
    _add(stored, tensors or {})
    header: dict[str, Any] = {
        "version": VERSION,
        "layers": {
            layer: {"format": packed.name, "pattern": str(packed.pattern), "shape": list(packed.shape)}
            for layer, packed in layers.items()
        },
        "metadata": dict(metadata or {}),
    }
    try:
        header = json.loads(_canonical(header))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"metadata must be what JSON can hold, got {error}") from None
    header["checksum"] = _checksum(header, stored)
    free = shutil.disk_usage(check_place(path)).free
    if free < (size := sum(tensor.nbytes for tensor in stored.values())):
        raise FormatError(f"{path} needs {size:,} bytes, but the disk has {free:,} left. Free some space first.")
    write_safetensors(path, stored, {ENTRY: _canonical(header)})


def read_packed(path: str | Path) -> PackedFile:
    """Read a file of :func:`write_packed`, after checking all of it.

    Nothing larger than the file itself is allocated before the checks are done, and its tensors are copies: a later
    change of the file does not reach them.

    Raises:
        FormatError: naming what is wrong: no such file, not of secateur, of a later version, truncated, overlapping
            tensors, a checksum that differs, or a layer whose tensors cannot be (see :meth:`Format.from_tensors`).
    """
    path = Path(path)
    names, entries = read_header(path)
    if ENTRY not in entries:
        raise FormatError(
            f"{path} is a safetensors file, but not one of packed weights: its metadata has no {ENTRY!r} entry.\n"
            "Load a dense model with the library that saved it."
        )
    header = parse_header(path, entries[ENTRY])
    layers = _check_header(path, header)
    with open_safetensors(path) as file:
        stored = {name: file.get_tensor(name).clone() for name in sorted(names)}  # else a view into the file
    if header["checksum"] != (found := _checksum(header, stored)):
        raise FormatError(f"{path} has the checksum {found}, but {header['checksum']!r} was written. {_DAMAGED}")
    packed = {}
    for layer, (kind, shape, pattern) in layers.items():
        own = {name.removeprefix(f"{layer}."): stored.pop(name) for name in _own_names(layer, kind) & names}
        try:
            packed[layer] = kind.from_tensors(own, shape, pattern)
        except FormatError as error:
            raise FormatError(f"{path}: layer {layer}: {error}\n{_DAMAGED}") from None
    return PackedFile(packed, stored, header["metadata"])


def read_compressed_tensors(path: str | Path) -> PackedFile:
    """Read a checkpoint that compressed-tensors (up to 0.14) wrote as ``sparse-bitmask`` or ``sparse-24-bitmask``.

    Both ways of naming are understood: ``up.weight.compressed`` of early versions, ``up.compressed`` of later ones.
    Matrices become :class:`Bitmask` or :class:`NMPacked` layers, other compressed tensors are expanded. int8 values
    with a ``weight_scale`` for each row or tensor stay int8; float8 values are multiplied with theirs and take its
    dtype.

    Args:
        path: a safetensors file, or a model directory.

    Raises:
        FormatError: nothing compressed in it, further quantisation, or anything that cannot be, by name.

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
            raise FormatError(f"{path}: tensor {twice[0]!r} is in two files. {_DAMAGED}")
        with open_safetensors(shard) as file:
            stored.update((name, file.get_tensor(name).clone()) for name in sorted(names))
    prefixes = sorted(name.removesuffix(".compressed") for name in stored if name.endswith(".compressed"))
    if not prefixes:
        other = next((name for name in stored if name.endswith((".weight_packed", ".meta"))), None)
        what = f"{other!r} is of another format of compressed-tensors" if other else "no tensor is called *.compressed"
        raise FormatError(f"{path} has no sparse-bitmask weights: {what}.\nLoad it with transformers instead.")
    early = any(prefix.endswith(".weight") for prefix in prefixes)  # later versions drop that ending
    layers: dict[str, Format] = {}
    for prefix in prefixes:
        weight = prefix if early else f"{prefix}.weight"
        if weight in stored:
            raise FormatError(f"{path}: {weight!r} is there both dense and compressed. {_DAMAGED}")
        try:
            parts = {key: stored.pop(f"{prefix}.{key}", None) for key in _COMPRESSED}
            packed, shape = _decompress(weight, parts, stored)
        except FormatError as error:
            raise FormatError(f"{path}: {prefix}: {error}\n{_DAMAGED}") from None
        if len(shape) == 2 and weight.endswith(".weight"):
            layers[weight.removesuffix(".weight")] = packed
        else:
            stored[weight] = packed.to_dense().view(shape)
    if stray := next((name for name in stored if name.endswith((".bitmask", ".row_offsets"))), None):
        raise FormatError(f"{path}: {stray!r} belongs to no compressed tensor. {_DAMAGED}")
    return PackedFile(layers, stored)


_COMPRESSED = ("compressed", "bitmask", "shape", "row_offsets")


def _decompress(
    weight: str, parts: Mapping[str, Tensor | None], stored: dict[str, Tensor]
) -> tuple[Format, tuple[int, ...]]:
    """Pack one compressed tensor anew, as a matrix; takes its scale out of ``stored``. Returns its full shape too."""
    values, bitmask, size, offsets = (parts[key] for key in _COMPRESSED)
    if values is None or bitmask is None or size is None:
        raise FormatError(f"{[key for key in _COMPRESSED[:3] if parts[key] is None]} missing.")
    if size.dtype not in (torch.int64, torch.int32) or not 1 <= size.numel() <= 8:
        raise FormatError(f"shape should be a few int64 sizes, got {size.dtype} {list(size.shape)}.")
    shape = tuple(size.flatten().tolist())
    matrix = check_shape((_product(shape[:-1]) if min(shape) >= 0 else -1, shape[-1]))
    if bitmask.dtype != torch.uint8 or bitmask.numel() != matrix[0] * ((matrix[1] + 7) // 8):
        raise FormatError(f"bitmask should be uint8 for the shape {shape}, got {bitmask.dtype} {list(bitmask.shape)}.")
    by_group = offsets is None
    if by_group and (values.ndim != 2 or len(shape) != 2 or values.shape != (shape[0], shape[1] // 2)):
        raise FormatError(f"compressed should hold half of each row of {shape}, got {list(values.shape)}.")
    bitmask = bitmask.view(matrix[0], (matrix[1] + 7) // 8)
    if offsets is None or len(shape) > 2:  # of more than two dimensions its offsets mean nothing
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
    """Values that a format can hold, and for int8 the scale of each row."""
    if values.dtype in VALUE_DTYPES and values.dtype != torch.int8:
        return values, None
    if values.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise FormatError(f"compressed holds {values.dtype} values, which secateur cannot.")
    scale, zero = (stored.pop(f"{weight}_{key}", None) for key in ("scale", "zero_point"))
    if zero is not None and bool((zero.float() != 0).any()):
        raise FormatError("weight_zero_point is not 0; only symmetric quantisation can be read.")
    if scale is None:
        if values.dtype == torch.int8:
            raise FormatError("int8 values without weight_scale.")
        return values.to(torch.bfloat16), None  # exact
    if scale.numel() not in (1, rows) or scale.dtype not in VALUE_DTYPES[:3]:
        raise FormatError(
            f"weight_scale should be one float for the tensor or for each of {rows} rows, "
            f"got {scale.dtype} {list(scale.shape)}."
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


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _own_names(layer: str, kind: Format | type[Format]) -> set[str]:
    """All names that the tensors of a layer may have, the absent ones too."""
    return {f"{layer}.{name}" for name in kind.names}


def _add(stored: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Add tensors in the form in which safetensors takes them."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in stored.values()}
    for name, given in tensors.items():
        if not isinstance(name, str) or not name or name == "__metadata__":
            raise FormatError(f"{name!r} cannot be the name of a tensor in a safetensors file.")
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
        if given.layout != torch.strided or given.is_meta or given.dtype not in _DTYPES:
            raise FormatError(f"{name}: safetensors holds no {given.layout} tensor of {given.dtype} on {given.device}.")
        tensor = given.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()  # safetensors refuses shared memory
        seen.add(tensor.untyped_storage().data_ptr())
        stored[name] = tensor


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """BLAKE2b (16 bytes) of the header without its checksum, and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(_canonical({key: value for key, value in header.items() if key != "checksum"}).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(_canonical([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]).encode())
        if tensor.numel():  # torch views no empty tensor as bytes
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_header(
    path: Path, header: Mapping[str, Any]
) -> dict[str, tuple[type[Format], tuple[int, int], SparsityPattern]]:
    """Format, shape and pattern of each layer, from our entry of the header."""
    version = header.get("version")
    if type(version) is not int or version < 1:
        raise FormatError(f"{path} has the format version {version!r}; it should be a whole number. {_DAMAGED}")
    if version > VERSION:
        raise FormatError(
            f"{path} is of format version {version}, but this secateur reads up to {VERSION}.\n"
            "Update it: pip install --upgrade secateur."
        )
    if header.keys() != _KEYS or not all(isinstance(header[key], dict) for key in ("layers", "metadata")):
        raise FormatError(f"{path} has the header entries {sorted(header)}; expected {sorted(_KEYS)}. {_DAMAGED}")
    found = {}
    for layer, entry in header["layers"].items():
        if not isinstance(entry, dict) or entry.keys() != {"format", "pattern", "shape"}:
            raise FormatError(f"{path}: layer {layer}: needs format, pattern and shape, nothing else. {_DAMAGED}")
        if not isinstance(entry["format"], str) or entry["format"] not in FORMATS:
            known = ", ".join(FORMATS)
            raise FormatError(
                f"{path}: layer {layer}: there is no format {entry['format']!r:.40}, only {known}. {_DAMAGED}"
            )
        try:
            shape, text = entry["shape"], entry["pattern"]
            if not isinstance(shape, list) or not isinstance(text, str) or len(text) > 100:
                raise FormatError("the shape should be two integers (out, in), and the pattern a short text.")
            found[layer] = FORMATS[entry["format"]], check_shape(shape), SparsityPattern.parse(text)
        except (FormatError, PatternError) as error:
            raise FormatError(f"{path}: layer {layer}: {error}\n{_DAMAGED}") from None
    return found


def _check_name(path: Path) -> None:
    for name in {path.name, path.resolve().name}:  # what a link points to is replaced, not the link
        if _DENSE_NAMES.fullmatch(name):
            raise FormatError(
                f"{path}: other libraries take a file called {name} for a dense model, and fill in random weights "
                f"where they find none.\nCall it {Path(name).stem}.sparse.safetensors, for example."
            )
    if path.suffix != ".safetensors":
        raise FormatError(f"{path} should end in .safetensors, because it is written as a safetensors file.")
