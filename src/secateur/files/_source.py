"""The files beside the weights of a model directory: which of them are copied, and may they be?"""

from __future__ import annotations

import json
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from secateur._errors import FormatError
from secateur.files._claims import is_packed_claim, without_claims
from secateur.files._model_card import forget_how_to_load
from secateur.files._reading import read_json

# Weights in other formats would keep the dense model beside the sparse one, and some of them are pickles.
_OTHER_WEIGHTS = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".gguf"})

# Folders in which other libraries look for a model in the format of another engine: it would be the dense one.
_OTHER_ENGINES = frozenset({"onnx", "openvino"})

EXPORTED = "secateur.export.json"  # in the directory of a model for another engine, which has no weights of PyTorch

_MOST_FILES = 10_000
_MOST_BYTES = 1 << 30  # of all copied files together, unless the weights have more


def check_source(source: Path, weight_bytes: int) -> int:
    """Return how many bytes :func:`copy_all_but_weights` will copy, after checking that it can.

    A warning names the links that lead out of the directory, other than into a download cache of Hugging Face, because
    a copy of what they point to gets into the output.

    Args:
        source: model directory.
        weight_bytes: size of its weights. The other files may have as many, or 1 GiB.

    Raises:
        FormatError: a file or folder cannot be read, is no file at all, or is a link to nothing or to a directory; or
            the files are too many or too large.
    """
    total, count = 0, 0
    strangers: list[str] = []
    for path in files_of(source):
        count += 1
        if count > _MOST_FILES:
            raise FormatError(f"{source} has more than {_MOST_FILES:,} files. Give a directory with one model only.")
        relative = path.relative_to(source)
        if _is_weights(relative, ()):
            continue
        total += _status_of(path).st_size
        if path.is_symlink() and not _is_own(source, path):
            strangers.append(f"{relative} -> {os.path.realpath(path)}")
    if total > max(_MOST_BYTES, weight_bytes):
        raise FormatError(
            f"{source} has {total:,} bytes of files that are no weights, and they would be copied; at most "
            f"{max(_MOST_BYTES, weight_bytes):,} are. Move files that do not belong to the model elsewhere."
        )
    if strangers:
        more = f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""
        warnings.warn(
            f"{source} has links that lead out of it, and the output gets copies of what they point to: "
            f"{', '.join(strangers[:5])}{more}.\nReplace them by files if the output should not have these contents.",
            stacklevel=3,
        )
    return total


def copy_all_but_weights(source: Path, target: Path, shards: tuple[str, ...]) -> None:
    """Copy the config, tokenizer and other files of a model directory into another one.

    The copy of the config says nothing of quantized weights, because those that are written beside it are not. The
    copy of the model card does not say how to load packed weights.

    Args:
        source: the model, after :func:`check_source`.
        target: an existing directory.
        shards: files that hold its weights; files with the ending of a weights format are left out, too.

    Raises:
        FormatError: a file cannot be read, or is no regular one.
        OSError: its copy cannot be written.
    """
    for path in files_of(source):
        relative = path.relative_to(source)
        if not _is_weights(relative, shards):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            _copy(path, target / relative)
    if (target / "config.json").is_file():
        config = read_json(target / "config.json")
        if (plain := without_claims(config)) != config:
            (target / "config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        if is_packed_claim(config.get("quantization_config")):
            forget_how_to_load(target)


def files_of(source: Path) -> Iterator[Path]:
    """All files of a model directory in order, whatever they are. What is in ``.git`` belongs to no model."""

    def fail(error: OSError) -> NoReturn:
        raise FormatError(f"{error.filename} cannot be read: {error.strerror}. Check its permissions.")

    for folder, folders, names in os.walk(source, onerror=fail):
        folders[:] = sorted(name for name in folders if Path(folder, name) != source / ".git")
        for name in folders:
            if Path(folder, name).is_symlink():
                raise FormatError(
                    f"{Path(folder, name)} is a link to a directory. Copy the model without such links first."
                )
        yield from (Path(folder, name) for name in sorted(names) if Path(folder, name) != source / ".git")


def _status_of(path: Path) -> os.stat_result:
    """The status of a file that can be opened and read to its end."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"{path} is {_what(status.st_mode)}, not a file. Remove it from the model directory.")
        path.open("rb").close()
    except OSError as error:
        if path.is_symlink() and not path.exists():
            raise FormatError(f"{path} is a link to nothing. Complete the model directory first.") from None
        raise FormatError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from None
    return status


def _what(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a directory"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _copy(path: Path, target: Path) -> None:
    """Copy as many bytes as the file has now: one that grows, or is not what it was, must not fill the disk."""
    size = _status_of(path).st_size
    with path.open("rb") as read, target.open("wb") as written:
        while size > 0 and (part := read.read(min(size, 1 << 20))):
            written.write(part)
            size -= len(part)


def _is_own(source: Path, link: Path) -> bool:
    """Whether a link stays in the directory, or leads to the files of a download cache, as all of its links do."""
    where, root = Path(os.path.realpath(link)), Path(os.path.realpath(source))
    return where.is_relative_to(root) or (
        root.parent.name == "snapshots" and where.is_relative_to(root.parent.parent / "blobs")
    )


def _is_weights(relative: Path, shards: tuple[str, ...]) -> bool:
    # Below the top, safetensors belong to another module, such as a sentence encoder's 2_Dense.
    stale = len(relative.parts) == 1 and relative.suffix == ".safetensors"
    stale = stale or (len(relative.parts) > 1 and relative.parts[0] in _OTHER_ENGINES)
    return relative.as_posix() in shards or relative.suffix in _OTHER_WEIGHTS or stale
