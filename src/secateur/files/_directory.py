"""Model directories on disk: checked before they are read, never unpickled, and written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur._errors import FormatError
from secateur.files._claims import first_part
from secateur.files._place import check_output
from secateur.files._reading import is_there, read_json, reading
from secateur.files._safetensors import open_safetensors
from secateur.files._source import EXPORTED, copy_all_but_weights
from secateur.files._whole import whole_directory, write_safetensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHRUNK = "model.shrunk.safetensors"  # of a model whose sizes no config can say: no other library looks for it
PACKED = "model.sparse.safetensors"  # with packed weights; the same holds
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class ModelDirectory:
    """A Hugging Face model directory with safetensors weights.

    Args:
        path: of the directory.
        config: contents of ``config.json``.
        shards: safetensors file names, in order.
        tensors: tensor name to the shard that holds it.
    """

    path: Path
    config: Mapping[str, Any]
    shards: tuple[str, ...]
    tensors: Mapping[str, str]

    @classmethod
    def open(cls, path: str | Path) -> ModelDirectory:
        """Return the directory at ``path`` after checking its config, index and the header of every shard.

        Raises:
            FormatError: naming what is missing or malformed, and what to do about it.
        """
        path = Path(path)
        if not (is_there(path) and path.is_dir()):
            what = "is a file, not a directory" if is_there(path) else "does not exist"
            raise FormatError(f"{path} {what}.\nGive the directory of a model, with config.json and {SINGLE}.")
        config = read_config(path)
        shards = find_shards(path)
        tensors: dict[str, str] = {}
        for shard in shards:
            with open_safetensors(path / shard) as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    if tensors.setdefault(name, shard) != shard:
                        raise FormatError(f"{path}: tensor {name!r} is in both {tensors[name]} and {shard}.")
        return cls(path, config, shards, tensors)

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        with open_safetensors(self.path / self.tensors[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    @property
    def widest_dtype(self) -> torch.dtype:
        """The dtype that holds all stored floating-point tensors, whatever the config says; else float32."""
        dtypes = {_DTYPES[name] for name in self.dtypes.values() if name in _DTYPES}
        return reduce(torch.promote_types, dtypes) if dtypes else torch.float32

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """The dtype of every stored tensor by its name, in safetensors' spelling."""
        found: dict[str, str] = {}
        for shard in self.shards:
            with open_safetensors(self.path / shard) as file:
                found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        return found

    @property
    def first_part(self) -> tuple[str, str] | None:
        """Name and dtype of the first stored tensor that is part of a packed or quantized weight, or None."""
        return first_part(self.dtypes.items())

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a stored tensor."""
        stored = _DTYPES.get(self.dtypes[name])
        return self.read(name).dtype if stored is None else stored

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every stored tensor."""
        found: dict[str, tuple[int, ...]] = {}
        for shard in self.shards:
            with open_safetensors(self.path / shard) as file:
                found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return found

    @property
    def num_bytes(self) -> int:
        """Size of the weights on disk."""
        return sum((self.path / shard).stat().st_size for shard in self.shards)

    def find(self, name: str, weight: Tensor) -> str | None:
        """Return the name under which the checkpoint stores a parameter, or None.

        A base model's parameters may have a prefix in the checkpoint, or lack one. Of names that end alike, the one
        whose values are equal bit for bit is the right one.

        Args:
            name: qualified name of the parameter in the model.
            weight: its value, as it was loaded.
        """
        shorter = [ending for ending in _endings(name) if ending in self.tensors]
        alike: dict[str, None] = dict.fromkeys([*self._longer_names.get(name, ()), *shorter])
        for stored in sorted(alike, key=lambda n: n != name):  # the same name first: others may be copies of it
            tensor = self.read(stored)
            if tensor.shape == weight.shape:
                loaded = weight.detach().cpu().to(tensor.dtype)
                if torch.equal(loaded, tensor) or torch.allclose(loaded, tensor, rtol=0, atol=0, equal_nan=True):
                    return stored
        return None

    @cached_property
    def _longer_names(self) -> dict[str, list[str]]:
        """The stored names that end with a name, which may itself be stored."""
        found: dict[str, list[str]] = {}
        for name in self.tensors:
            for ending in _endings(name):
                found.setdefault(ending, []).append(name)
        return found

    def write_pruned(
        self, output: str | Path, replaced: Mapping[str, Tensor], extra: Mapping[str, str], overwrite: bool = False
    ) -> None:
        """Write a copy of the directory with some tensors replaced: same shards, same dtypes, same other files.

        Args:
            output: directory to make. It appears complete or not at all.
            replaced: new values by stored name, in any dtype; they are stored in the old tensor's.
            extra: further text files by name; they replace those of the input.
            overwrite: replace an existing directory. It stays in place until the new one is complete.

        Raises:
            FormatError: the output exists, cannot be written, or the disk is full.
        """
        output = Path(output)
        check_output(self.path, output, overwrite, self.num_bytes)
        with whole_directory(output, overwrite=overwrite) as partial:
            copy_all_but_weights(self.path, partial, self.shards)
            for shard in self.shards:
                with open_safetensors(self.path / shard) as file:
                    metadata = file.metadata()
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                for name, old in tensors.items():  # in this order, because values may be made when they are asked for
                    if name in replaced:
                        tensors[name] = replaced[name].detach().cpu().to(old.dtype).contiguous()
                write_safetensors(partial / shard, tensors, metadata)
                shutil.copymode(self.path / shard, partial / shard)
            for name, text in extra.items():
                (partial / name).write_text(text, encoding="utf-8")


def find_shards(path: Path) -> tuple[str, ...]:
    """Return the names of the safetensors files that make up the model in a directory.

    Raises:
        FormatError: there is none, only pickled weights, or an index that cannot be right.
    """
    if is_there(path / INDEX):
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{path / INDEX} has no weight_map; it should map tensor names to file names.")
        for shard in weight_map.values():
            # A name with a path in it could make us read, and later write, outside of the directory.
            plain = isinstance(shard, str) and Path(shard).name == shard and "\0" not in shard
            if not plain or not shard.endswith(".safetensors"):
                raise FormatError(f"{path / INDEX} names the file {shard!r}; expected a plain .safetensors file name.")
            if not is_there(path / shard):
                raise FormatError(f"{path} lacks {shard}, which its index names. Complete the directory first.")
        return tuple(dict.fromkeys(weight_map.values()))
    if is_there(path / SINGLE):
        return (SINGLE,)
    if is_there(path / SHRUNK):
        return (SHRUNK,)
    if is_there(path / EXPORTED):
        raise FormatError(
            f"{path} has a model that was exported for another engine ({EXPORTED}), and no weights that can be changed "
            "or exported again.\nGive the directory that it was exported from."
        )
    with reading(path):
        entries = sorted(path.iterdir())
    packed = [entry.name for entry in entries if entry.name.endswith(".sparse.safetensors")]
    if packed:
        raise FormatError(
            f"{path} has packed weights ({packed[0]}), and dense ones are needed here.\n"
            "Write them dense first: secateur export DIRECTORY --output DENSE."
        )
    pickled = [entry for entry in entries if entry.suffix in _PICKLES]
    if pickled:
        raise FormatError(
            f"{path} has its weights as {pickled[0].name}, a pickle, which can run any code when it is loaded; "
            "secateur reads safetensors only.\nIf you trust it, convert it once: load the model with transformers "
            "(from_pretrained) and save it again with model.save_pretrained(NEW_DIRECTORY)."
        )
    raise FormatError(f"{path} has no weights: neither {SINGLE} nor {INDEX}.")


def _endings(name: str) -> list[str]:
    """The name, and all that remains of it without its first parts."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def check_no_pickle(path: Path) -> None:
    """Raise if a file of weights is a pickle, by its name or its first bytes.

    Raises:
        FormatError: it is one, which is said instead of an error of the reader of safetensors.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return  # the reader says why
    # torch.save writes a zip archive, and wrote a bare pickle. Safetensors have the length of their header, then "{".
    begins_like_one = start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"
    if start[8:] != b"{" and (path.suffix in _PICKLES or begins_like_one):
        raise FormatError(
            f"{path} is a pickle, as torch.save writes it, which can run any code when it is loaded; secateur reads "
            "safetensors only.\nIf you trust the file, convert it once in Python: "
            f"safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), 'model.safetensors')."
        )


def read_config(path: Path) -> dict[str, Any]:
    """Return what ``config.json`` of a model directory holds.


    Raises:
        FormatError: it is missing, cannot be read, or is no JSON object.
    """
    if not is_there(path / "config.json"):
        raise FormatError(f"{path} is not a model directory: it has no config.json.")
    return read_json(path / "config.json")
