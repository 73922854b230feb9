"""Packed weights in one safetensors file: written whole or not at all, and checked before they are used.

``docs/format.md`` is the specification. Nothing is unpickled.
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

from secateur._errors import FormatError, PatternError, naming
from secateur._types import dtype_name
from secateur.files import (
    MAX_NAME,
    check_file,
    open_safetensors,
    parse_header,
    parse_json,
    read_header,
    write_safetensors,
)
from secateur.formats import FORMATS, Format, check_shape
from secateur.patterns import SparsityPattern

VERSION = 1
ENTRY = "secateur"  # the one entry of the safetensors metadata

# Other libraries take a file with such a name for a dense model. They use random weights for those that they do not
# find there, and say so only in a log.
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
DAMAGED = "The file is damaged or was changed. Copy it again, or make it again from the dense model."
_KEYS = {"version", "layers", "metadata", "checksum"}


@dataclass(frozen=True, eq=False, repr=False)
class PackedFile:
    """The contents of a file of packed weights.

    Args:
        layers: packed weights by the name of their layer.
        tensors: all other tensors by name, such as biases and norms.
        metadata: the JSON object that was given when the file was written.
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
        path: ends in ``.safetensors``. ``model.safetensors`` and similar names are refused, because other libraries
            would take the file for a dense model.
        layers: packed weights by the name of their layer. The tensor ``values`` of layer ``a.b`` is stored as
            ``a.b.values``.
        tensors: other tensors by name. Each is stored, even if it shares memory with another.
        metadata: a JSON object to store in the file.

    Raises:
        FormatError: a name that is not allowed, two tensors with one name, a dtype that safetensors lacks, a place that
            cannot be written, or a full disk.
        TypeError: metadata that JSON cannot hold, or a tensor that is none.

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
        with naming(f"{path}: layer {layer}"):
            check_shape(packed.shape)
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
        header = parse_json(_canonical(header))  # as it will be read
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"metadata must be a JSON object: {error}") from None
    header["checksum"] = _checksum(header, stored)
    free = shutil.disk_usage(check_file(path)).free
    if free < (size := sum(tensor.nbytes for tensor in stored.values())):
        raise FormatError(f"{path} needs {size:,} bytes, but the disk has {free:,} left. Free some space first.")
    write_safetensors(path, stored, {ENTRY: _canonical(header)})


def read_packed(path: str | Path) -> PackedFile:
    """Read a file of :func:`write_packed`, after checking all of it.

    No more memory than the size of the file is allocated before the checks are done. The tensors are copies, so that a
    later change of the file does not change them.

    Raises:
        FormatError: the file is missing, not of secateur, of a later version, or truncated; tensors overlap; the
            checksum differs; or the tensors of a layer are invalid (see :meth:`Format.from_tensors`).
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
        stored = {name: file.get_tensor(name).clone() for name in sorted(names)}  # a copy, not a view of the file
    if header["checksum"] != (found := _checksum(header, stored)):
        raise FormatError(f"{path} has the checksum {found}, but its header says {header['checksum']!r:.80}. {DAMAGED}")
    packed = {}
    for layer, (format_type, shape, pattern) in layers.items():
        own = {name.removeprefix(f"{layer}."): stored.pop(name) for name in _own_names(layer, format_type) & names}
        with naming(f"{path}: layer {layer}", DAMAGED):
            packed[layer] = format_type.from_tensors(own, shape, pattern)
    return PackedFile(packed, stored, header["metadata"])


def _own_names(layer: str, format_type: Format | type[Format]) -> set[str]:
    """All names that the tensors of a layer in this format may have."""
    return {f"{layer}.{name}" for name in format_type.names}


def _add(stored: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Add tensors to those that are stored, in the form that safetensors takes."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in stored.values()}
    for name, given in tensors.items():
        if not isinstance(name, str) or not name or name == "__metadata__":
            raise FormatError(f"{name!r} cannot be the name of a tensor in a safetensors file.")
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
        if given.layout != torch.strided or given.is_meta or given.dtype not in _DTYPES:
            what = f"{given.layout} tensor of {dtype_name(given.dtype)} on {given.device}"
            raise FormatError(f"{name}: safetensors cannot store a {what}. Convert it or leave it out.")
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
        digest.update(_canonical([name, dtype_name(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():  # PyTorch cannot view an empty tensor as bytes
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_header(
    path: Path, header: Mapping[str, Any]
) -> dict[str, tuple[type[Format], tuple[int, int], SparsityPattern]]:
    """Format, shape and pattern of each layer, from the entry of secateur in the header."""
    version = header.get("version")
    if type(version) is not int or version < 1:
        raise FormatError(f"{path} has the format version {version!r:.40}; it should be a number above 0. {DAMAGED}")
    if version > VERSION:
        raise FormatError(
            f"{path} has the format version {version}, but this secateur reads up to {VERSION}.\n"
            "Update it: pip install --upgrade secateur."
        )
    if header.keys() != _KEYS or not all(isinstance(header[key], dict) for key in ("layers", "metadata")):
        raise FormatError(f"{path} has the header entries {sorted(header)}; expected {sorted(_KEYS)}. {DAMAGED}")
    found = {}
    for layer, entry in header["layers"].items():
        if len(layer) > MAX_NAME:
            raise FormatError(f"{path} has a layer with a name of {len(layer):,} characters. {DAMAGED}")
        with naming(f"{path}: layer {layer}", DAMAGED):
            found[layer] = _check_entry(entry)
    return found


def _check_entry(entry: Any) -> tuple[type[Format], tuple[int, int], SparsityPattern]:
    if not isinstance(entry, dict) or entry.keys() != {"format", "pattern", "shape"}:
        raise FormatError("its entry should have format, pattern and shape, and nothing else.")
    name, shape, text = entry["format"], entry["shape"], entry["pattern"]
    if not isinstance(name, str) or name not in FORMATS:
        raise FormatError(f"there is no format {name!r:.40}; valid are {', '.join(FORMATS)}.")
    if not isinstance(shape, list) or not isinstance(text, str) or len(text) > 100:
        raise FormatError("the shape should be two integers (out, in), and the pattern a str of up to 100 characters.")
    try:
        return FORMATS[name], check_shape(shape), SparsityPattern.parse(text)
    except PatternError as error:
        raise FormatError(str(error)) from None


def _check_name(path: Path) -> None:
    for name in {path.name, path.resolve().name}:  # if the path is a link, the file that it points to is replaced
        if _DENSE_NAMES.fullmatch(name):
            raise FormatError(
                f"{path}: other libraries take a file called {name} for a dense model, and use random weights where "
                f"they find none.\nCall it {Path(name).stem}.sparse.safetensors, for example."
            )
    if path.suffix != ".safetensors":
        raise FormatError(f"{path} should end in .safetensors, because it is a safetensors file.")
