"""Save a packed model and load it again: one safetensors file, or the directory of a transformers model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur._errors import FormatError, RecipeError, naming
from secateur._types import dtype_name
from secateur.files import (
    INDEX,
    PACKED,
    check_file,
    check_output,
    copy_all_but_weights,
    find_shards,
    is_there,
    packed_claim,
    read_config,
    read_header,
    say_how_to_load,
    whole_directory,
    with_claim,
    without_claims,
)
from secateur.huggingface import guard_, model_without_weights
from secateur.nn import packed_layers, packed_stacks
from secateur.packing._compressed_tensors import read_compressed_tensors
from secateur.packing._contents import Contents, take_apart
from secateur.packing._file import DAMAGED, PackedFile, read_packed, write_packed
from secateur.packing._fill import fill_
from secateur.packing._history import History, reports_in
from secateur.packing._pretrained import refused
from secateur.shapes import (
    config_before,
    has_sizes,
    is_saved_shrunk,
    known_facts,
    load_shrunk,
    remember_facts,
    resize_,
    save_shrunk,
    shrunk_without_weights,
)

FILE = PACKED
_REASON = (
    "The weights of this model are stored without their zeros and run packed, because it was pruned with\n"
    "[secateur](https://pypi.org/project/secateur/)."
)


def save(
    model: nn.Module,
    path: str | Path,
    *,
    source: str | Path | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    history: History = (),
) -> None:
    """Write a packed model without its zeros, in one file that is checked when it is read.

    A transformers model becomes a directory that :func:`load` reads: ``model.sparse.safetensors``, the config, and the
    tokenizer if there is one. Any other module becomes one ``.safetensors`` file. The file has no name that other
    libraries look for, because they would use random weights for those that they do not find. Nothing is pickled. A
    tensor that is shared in the model is stored once, and is shared again after :func:`load`.

    A file of a model that was shrunk has its sizes. A shrunk transformers model without packed layers becomes a
    directory that ``from_pretrained`` reads: an ordinary one if its config can say the sizes, else one that needs
    ``import secateur.huggingface`` first.

    Args:
        model: pruned, with or without layers that :func:`pack_` replaced. Dense weights are also stored without their
            zeros, where this is smaller. They are dense again after :func:`load`, but their zeros lose their sign.
        path: a file, which is replaced if it exists, if it ends in ``.safetensors``; else a directory to make.
        source: a model directory whose files, except weights, are copied: config, tokenizer and all others.
        tokenizer: any object with ``save_pretrained``; not needed with ``source``.
        dtype: a floating-point dtype in which to store all tensors that are not packed weights; None for their own.
        overwrite: replace an existing directory. It stays in place until the new one is complete.
        history: reports of how layers were pruned, whose patterns are used for dense weights. The patterns of other
            weights are found from their zeros. Also reports of how the model was shrunk, which a copy of a model, or
            one of another process, needs to be saved with its sizes.

    Raises:
        FormatError: the place cannot be written, or other libraries would take the file's name for a dense model.
        RecipeError: ``path`` is a directory, but the model is not one of transformers.

    Example:
        >>> import os, tempfile, torch, secateur
        >>> model = torch.nn.Sequential(secateur.PackedLinear.from_linear(torch.nn.Linear(8, 4)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "tiny.sparse.safetensors")
        ...     secateur.save(model, path)
        ...     again = secateur.load(path, into=torch.nn.Sequential(torch.nn.Linear(8, 4)))
        >>> x = torch.randn(2, 8)
        >>> type(again[0]).__name__, torch.equal(again(x), model(x))
        ('PackedLinear', True)
    """
    facts = known_facts(model, reports_in(history))
    if facts and Path(path).suffix != ".safetensors" and not packed_layers(model) and not packed_stacks(model):
        save_shrunk(model, facts, path, source=source, tokenizer=tokenizer, dtype=dtype, overwrite=overwrite)
        return
    save_with(model, path, source=source, tokenizer=tokenizer, dtype=dtype, overwrite=overwrite, history=history)


def save_with(
    model: nn.Module,
    path: str | Path,
    *,
    source: str | Path | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    history: History = (),
    absent: Iterable[str] = (),
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write a packed model as :func:`save` does, with two more options.

    Args:
        model, path, source, tokenizer, dtype, overwrite, history: see :func:`save`.
        absent: names of tensors that the checkpoint had no values for. They are not stored.
        extra: further text files of the directory, by name.
    """
    path = Path(path)
    facts = known_facts(model, reports_in(history))
    if path.suffix == ".safetensors":
        check_file(path)
        contents = replace(take_apart(model, dtype, absent, history), shrunk=facts)
        write_packed(path, contents.layers, contents.tensors, contents.metadata())
        return
    if source is None and not hasattr(model, "save_pretrained"):
        raise RecipeError(
            f"{path}: only a transformers model can be written as a directory, because that needs a config; got "
            f"{type(model).__name__}.\nGive a path that ends in .safetensors."
        )
    check_output(None if source is None else Path(source), path, overwrite, 0)
    contents = replace(take_apart(model, dtype, absent, history), shrunk=facts)
    size = sum(packed.nbytes for packed in contents.layers.values())
    size += sum(tensor.nbytes for tensor in contents.tensors.values())
    check_output(None if source is None else Path(source), path, overwrite, size)
    with whole_directory(path, overwrite=overwrite) as made:
        if source is not None:
            directory = Path(source)
            shards = (FILE,) if (directory / FILE).exists() else find_shards(directory)
            copy_all_but_weights(directory, made, (*shards, INDEX))
        else:
            model.config.save_pretrained(made)  # type: ignore[union-attr, operator]
            if getattr(model, "generation_config", None) is not None:
                model.generation_config.save_pretrained(made)  # type: ignore[union-attr, operator]
        table = config_before(model, facts, made if source is not None else None) if facts else read_config(made)
        _write_config(model, made, table, contents)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        for name, text in (extra or {}).items():
            (made / name).write_text(text, encoding="utf-8")
        say_how_to_load(made, _REASON, type(model).__name__)
        write_packed(made / FILE, contents.layers, contents.tensors, contents.metadata())


def _write_config(model: Any, made: Path, table: dict[str, Any], contents: Contents) -> None:
    """Write ``config.json`` with what transformers needs to know: that weights are packed, their class and dtype."""
    table = with_claim(without_claims(table), packed_claim())
    if not table.get("architectures"):
        table["architectures"] = [type(model).__name__]
    stored = {entry.dtype for entry in contents.entries.values()}
    stored |= {contents.layers[name].dense_dtype for name in contents.sparse}
    stored |= {tensor.dtype for tensor in contents.tensors.values() if tensor.is_floating_point()}
    names = [
        dtype_name(dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16) if dtype in stored
    ]
    if names and table.get("dtype", table.get("torch_dtype")) not in names:  # in which transformers loads it
        table.pop("torch_dtype", None)
        table["dtype"] = names[0]
    (made / "config.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def load(
    path: str | Path, *, dense: bool = False, into: nn.Module | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return a model that :func:`save` or ``secateur pack`` wrote, packed. All tensors are checked first.

    A directory becomes a transformers model in evaluation mode. Its class comes from the tables of transformers, and
    no code in the directory is run. For a file, give the module to put its tensors ``into``. If the routes were
    measured on a machine like this one, they are used. Otherwise each layer takes the route that its format was made
    for, until :func:`pack_` measures again.

    Directories that compressed-tensors up to 0.14 wrote as ``sparse-bitmask`` or ``sparse-24-bitmask`` are read, too.

    Args:
        path: a directory, or a ``.safetensors`` file.
        dense: return dense layers, with all their zeros, instead of packed ones.
        into: the module that was saved, dense or packed. Its layers and tensors are replaced: all of them, or none if
            an error is raised. For a model that was shrunk, one of the original sizes is made smaller first.
        dtype: floating-point dtype of all tensors that are not packed weights; None for those that were stored.

    Raises:
        FormatError: the file is missing or invalid, or has other tensors than the module.
        RecipeError: a file, but no module to put its tensors into.
        ImportError: a directory, but transformers is missing.

    Example:
        See :func:`save`.

        >>> import secateur
        >>> secateur.load("nowhere.safetensors", into=torch.nn.Identity())
        Traceback (most recent call last):
        secateur._errors.FormatError: nowhere.safetensors cannot be read: No such file or directory.
    """
    path = Path(path)
    if is_there(path) and path.is_dir():
        return load_directory(path, dense, into, dtype)[0]
    if into is None:
        if path.suffix != ".safetensors" and not path.exists():
            raise FormatError(
                f"{path} does not exist. Give a directory or a .safetensors file that secateur.save wrote."
            )
        raise RecipeError(f"{path} has only tensors. Give the module that they belong to with into=.")
    _fill_resized(into, _contents_of(path, read_packed(path)), dense, dtype, path)
    return into


def _fill_resized(model: nn.Module, contents: Contents, dense: bool, dtype: torch.dtype | None, path: Path) -> None:
    """Put contents into a model, which may be of the sizes that it had before it was shrunk."""
    if has_sizes(model, contents.shrunk):
        fill_(model, contents, dense, dtype, path)
        return
    with naming(path):
        undo = resize_(model, contents.shrunk)
    try:
        fill_(model, contents, dense, dtype, path)
    except BaseException:
        undo()
        raise
    remember_facts(model, contents.shrunk)


def _contents_of(path: Path, file: PackedFile) -> Contents:
    with naming(path, DAMAGED):
        return Contents.of(file)


def load_directory(
    path: Path, dense: bool, into: nn.Module | None, dtype: torch.dtype | None
) -> tuple[nn.Module, Contents]:
    """Return the model in a directory, and the contents of its file. For the arguments see :func:`load`."""
    if is_there(path / FILE):
        contents = _contents_of(path / FILE, read_packed(path / FILE))
    elif any(name.endswith(".compressed") for shard in find_shards(path) for name in read_header(path / shard)[0]):
        contents = Contents.of(read_compressed_tensors(path))
    elif into is None and not dense and is_saved_shrunk(path):
        return load_shrunk(path, dtype), Contents({}, {}, {})
    else:
        raise FormatError(
            f"{path} has a dense model, and no packed one ({FILE}).\nLoad it with transformers, or pack it first: "
            "secateur pack MODEL_DIR --output OUT."
        )
    # Tensors that the checkpoint lacks get the values that transformers would give them.
    model = into
    if model is None:
        shapes: list[tuple[int, ...]] = [packed.shape for packed in contents.layers.values()]
        shapes += [tuple(tensor.shape) for tensor in contents.tensors.values()]
        if contents.shrunk:
            model = shrunk_without_weights(path, contents.model, contents.shrunk, shapes)
        else:
            model = model_without_weights(path, contents.model, initialise=bool(contents.absent), shapes=shapes)
    _fill_resized(model, contents, dense, dtype, path)
    if into is not None:
        return model, contents
    if not dense:
        guard_(model, packed_claim(), refused(model))
    return model.eval(), contents
