"""Model directories on disk: checked before they are read, never unpickled, and written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur._errors import FormatError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Weights in other formats would keep the dense model beside the sparse one, and some of them are pickles.
_OTHER_WEIGHTS = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".gguf"})


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
        """The dtype that holds all stored floating-point tensors, whatever the config says; float32 without any."""
        dtypes: set[torch.dtype] = set()
        for shard in self.shards:
            with open_safetensors(self.path / shard) as file:
                stored = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            dtypes |= {_DTYPES[name] for name in stored if name in _DTYPES}
        return reduce(torch.promote_types, dtypes) if dtypes else torch.float32

    @property
    def num_bytes(self) -> int:
        """Size of the weights on disk."""
        return sum((self.path / shard).stat().st_size for shard in self.shards)

    def find(self, name: str, weight: Tensor) -> str | None:
        """Return the name under which the checkpoint stores a parameter, or None.

        A base model's parameters may bear a prefix in the checkpoint, or lack one; values decide, bit for bit.

        Args:
            name: qualified name of the parameter in the model.
            weight: its value, as it was loaded.
        """
        alike = [n for n in self.tensors if n == name or n.endswith(f".{name}") or name.endswith(f".{n}")]
        for stored in sorted(alike, key=lambda n: n != name):  # the very name first: others may be copies of it
            tensor = self.read(stored)
            if tensor.shape == weight.shape:
                loaded = weight.detach().cpu().to(tensor.dtype)
                if bool(((loaded == tensor) | (loaded.isnan() & tensor.isnan())).all()):
                    return stored
        return None

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
                for name in tensors.keys() & replaced.keys():
                    tensors[name] = replaced[name].detach().cpu().to(tensors[name].dtype).contiguous()
                save_file(tensors, partial / shard, metadata=metadata)
                shutil.copymode(self.path / shard, partial / shard)  # save_file makes it private
            for name, text in extra.items():
                (partial / name).write_text(text, encoding="utf-8")


def copy_all_but_weights(source: Path, target: Path, shards: tuple[str, ...]) -> None:
    """Copy the config, tokenizer and other files of a model directory into another one.

    Args:
        source: the model.
        target: an existing directory.
        shards: files that hold its weights, besides those that their ending gives away.
    """
    for entry in sorted(source.rglob("*")):
        relative = entry.relative_to(source)
        if entry.is_dir() or relative.parts[0] == ".git" or _is_weights(relative, shards):
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(entry, target / relative)


def find_shards(path: Path) -> tuple[str, ...]:
    """Names of the safetensors files that make up the model in a directory.

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
    pickled = sorted(entry.name for entry in path.iterdir() if entry.suffix in {".bin", ".pt", ".pth"})
    if pickled:
        raise FormatError(
            f"{path} has its weights as {pickled[0]}, a pickle, which can run any code when it is loaded; secateur "
            "reads safetensors only.\nIf you trust the file, convert it once: load the model with transformers "
            "(from_pretrained) and save it again with model.save_pretrained(NEW_DIRECTORY)."
        )
    raise FormatError(f"{path} has no weights: neither {SINGLE} nor {INDEX}.")


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading tensor by tensor.

    Raises:
        FormatError: the file is missing, truncated or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is not a readable safetensors file: {error}.") from None


def check_output(source: Path, output: Path, overwrite: bool, num_bytes: int) -> None:
    """Raise unless ``output`` may be written: worth asking before hours of work.

    Raises:
        FormatError: it exists and ``overwrite`` is off, is the source, is no directory, or does not fit on the disk.
    """
    existing = check_place(output)
    for entry in source.rglob("*"):
        if not entry.exists():
            raise FormatError(f"{entry} is a link to nothing. Complete the model directory first.")
        if entry.is_symlink() and entry.is_dir():
            raise FormatError(f"{entry} is a link to a directory. Copy the model without such links first.")
    if output.resolve() != source.resolve() and output.resolve().is_relative_to(source.resolve()):
        raise FormatError(f"{output} is inside the model that is read. Give an output directory outside of it.")
    if output.exists():
        if not output.is_dir():
            raise FormatError(f"{output} is a file. Give another output directory.")
        if output.resolve() == source.resolve() or source.resolve().is_relative_to(output.resolve()):
            raise FormatError(f"{output} holds the model that is read. Give another output directory.")
        if not overwrite:
            raise FormatError(f"{output} already exists. Give another output directory, or --overwrite to replace it.")
        if any(output.iterdir()) and not (output / "config.json").is_file():
            raise FormatError(
                f"{output} holds something else than a model, which --overwrite would delete. "
                "Give another output directory."
            )
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise FormatError(f"{output} needs {num_bytes:,} bytes, but the disk has {free:,} left. Free some space first.")


def check_place(path: Path) -> Path:
    """Return the nearest existing directory above a path to write; worth asking before hours of work, too.

    Raises:
        FormatError: nothing can be made there.
    """
    parent = path.absolute().parent
    try:
        path.exists()  # raises for a name that is too long
        existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    except OSError as error:
        raise FormatError(f"{path} cannot be made: {error.strerror}.") from None
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise FormatError(f"{path} cannot be made: {existing} is not a directory that you may write to.")
    return existing


@contextmanager
def whole_directory(output: Path) -> Iterator[Path]:
    """A directory beside ``output`` to fill; it takes the place of ``output`` if the block ends well, else it goes.

    Raises:
        FormatError: the disk is full or refuses.
    """
    partial: Path | None = None
    try:
        output = output.resolve()  # what a link points to is replaced, not the link
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
        partial.chmod(0o777 & ~umask())
        yield partial
        _sync(partial)
        _replace(partial, output)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        advice = "The disk is full: free some space and run again." if full else "Check the path and its permissions."
        raise FormatError(f"{output} could not be written: {error}.\n{advice} Nothing was left behind.") from None
    finally:
        if partial is not None and partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file: complete, or not at all.

    Raises:
        FormatError: it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise FormatError(f"{path} could not be written: {error}.") from None
    finally:
        partial.unlink(missing_ok=True)


def _replace(partial: Path, output: Path) -> None:
    if not output.exists():
        partial.rename(output)
        return
    # A directory cannot be renamed over another: step the old one aside, and back if the new one cannot take its place.
    old = partial.with_suffix(".old")
    try:
        output.rename(old)
        partial.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Flush every file to the disk, so that a later rename never points at files that a crash emptied."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
