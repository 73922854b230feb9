"""Model directories on disk: checked before they are read, never unpickled, and written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur._errors import FormatError
from secateur.files._claims import first_part, without_claims
from secateur.files._place import check_output
from secateur.files._safetensors import open_safetensors
from secateur.files._whole import whole_directory, write_safetensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Weights in other formats would keep the dense model beside the sparse one, and some of them are pickles.
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_OTHER_WEIGHTS = _PICKLES | {".h5", ".msgpack", ".onnx", ".gguf"}

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
        if not path.is_dir():
            what = "is a file, not a directory" if path.exists() else "does not exist"
            raise FormatError(f"{path} {what}.\nGive the directory of a model, with config.json and {SINGLE}.")
        if not (path / "config.json").is_file():
            raise FormatError(f"{path} is not a model directory: it has no config.json.")
        config = _read_json(path / "config.json")
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
        with whole_directory(output) as partial:
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


def copy_all_but_weights(source: Path, target: Path, shards: tuple[str, ...]) -> None:
    """Copy the config, tokenizer and other files of a model directory into another one.

    The copy of the config says nothing of quantized weights, because those that are written beside it are not.

    Args:
        source: the model.
        target: an existing directory.
        shards: files that hold its weights; files with the ending of a weights format are left out, too.
    """
    for entry in sorted(source.rglob("*")):
        relative = entry.relative_to(source)
        if entry.is_dir() or relative.parts[0] == ".git" or _is_weights(relative, shards):
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(entry, target / relative)
    if (target / "config.json").is_file():
        config = _read_json(target / "config.json")
        if (plain := without_claims(config)) != config:
            (target / "config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


def find_shards(path: Path) -> tuple[str, ...]:
    """Return the names of the safetensors files that make up the model in a directory.

    Raises:
        FormatError: there is none, only pickled weights, or an index that cannot be right.
    """
    if (path / INDEX).is_file():
        weight_map = _read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{path / INDEX} has no weight_map; it should map tensor names to file names.")
        for shard in weight_map.values():
            # A name with a path in it could make us read, and later write, outside of the directory.
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise FormatError(f"{path / INDEX} names the file {shard!r}; expected a plain .safetensors file name.")
            if not (path / shard).is_file():
                raise FormatError(f"{path} lacks {shard}, which its index names. Complete the directory first.")
        return tuple(dict.fromkeys(weight_map.values()))
    if (path / SINGLE).is_file():
        return (SINGLE,)
    packed = sorted(entry.name for entry in path.iterdir() if entry.name.endswith(".sparse.safetensors"))
    if packed:
        raise FormatError(
            f"{path} has packed weights ({packed[0]}), and dense ones are needed here.\n"
            "Write them dense first: secateur export DIRECTORY --output DENSE."
        )
    pickled = sorted(entry for entry in path.iterdir() if entry.suffix in _PICKLES)
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


def _is_weights(relative: Path, shards: tuple[str, ...]) -> bool:
    # Below the top, safetensors belong to another module, such as a sentence encoder's 2_Dense.
    stale = len(relative.parts) == 1 and relative.suffix == ".safetensors"
    return relative.as_posix() in shards or relative.suffix in _OTHER_WEIGHTS or stale


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not readable JSON: {error}.") from None
    if not isinstance(table, dict):
        raise FormatError(f"{path} should hold a JSON object, but holds a {type(table).__name__}.")
    return table
