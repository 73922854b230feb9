"""Model directories of shrunk models: ordinary ones where a config can say the sizes, else with the sizes beside it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from secateur._errors import FormatError, RecipeError
from secateur._types import dtype_name
from secateur.files import (
    INDEX,
    SHRUNK,
    SINGLE,
    check_output,
    copy_all_but_weights,
    find_shards,
    forget_how_to_load,
    is_shrunk_claim,
    is_there,
    read_config,
    say_how_to_load,
    whole_directory,
    with_claim,
    without_claims,
)
from secateur.huggingface import check_counts, load_model, model_class, open_model, skeleton, transformers_library
from secateur.shapes._claim import settings_for
from secateur.shapes._facts import Facts
from secateur.shapes._uniform import Uniform, difference, find_uniform, original_config

_MARK = "shrunk"  # of an ordinary config.json of ours
_WHOLE = "1000TB"  # of a file: all weights in one
_REASON = (
    "The layers of this model have different sizes, because it was made smaller with\n"
    "[secateur](https://pypi.org/project/secateur/), and `config.json` has one number for all of them."
)


def save_shrunk(
    model: nn.Module,
    facts: Facts,
    output: str | Path,
    *,
    source: str | Path | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    absent: Iterable[str] = (),
    extra: Mapping[str, str] | None = None,
    leave_out: Sequence[str] = (),
    uniform: Uniform | None = None,
) -> Uniform:
    """Write a shrunk transformers model as a directory.

    If its config can say the sizes, the directory is an ordinary one, which ``from_pretrained`` loads in a process
    without secateur. Else the config is that of the original model and says what was shrunk. The weights are then in
    ``model.shrunk.safetensors``, so that transformers finds none, rather than random ones, unless secateur is imported.

    Args:
        model: that was shrunk.
        facts: how it differs from the original.
        output: directory to make. It appears complete or not at all.
        source: a model directory whose files, except weights, are copied.
        tokenizer: any object with ``save_pretrained``; not needed with ``source``.
        dtype: a floating-point dtype in which to store all tensors; None for their own.
        overwrite: replace an existing directory. It stays in place until the new one is complete.
        absent: names of tensors that the checkpoint had no values for. They are not stored.
        extra: further text files of the directory, by name.
        leave_out: files of the source that are not copied; empty for its weights.
        uniform: what :func:`find_uniform` found, if it was called already.

    Returns:
        What the config says of the model, or why it cannot.

    Raises:
        FormatError: the output exists, cannot be written, or the disk is full.
        RecipeError: the model is not one of transformers.
    """
    output = Path(output)
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise RecipeError(
            f"{output}: only a transformers model can be written as a directory, because that needs a config; got "
            f"{type(model).__name__}.\nGive a path that ends in .safetensors."
        )
    origin = None if source is None else Path(source)
    check_output(origin, output, overwrite, 0)
    transformers_library()
    missing = set(absent)
    state = {
        name: tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
        if name not in missing
    }
    check_output(origin, output, overwrite, sum(tensor.nbytes for tensor in state.values()))
    uniform = find_uniform(model, facts) if uniform is None else uniform
    with whole_directory(output, overwrite=overwrite) as made:
        if origin is not None:
            copy_all_but_weights(origin, made, (*(leave_out or find_shards(origin)), INDEX))
        elif getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(made)  # type: ignore[union-attr, operator]
        table = _config_table(model, facts, uniform, made if origin is not None else None)
        table["architectures"] = [type(model).__name__]
        stored = {dtype_name(tensor.dtype) for tensor in state.values() if tensor.is_floating_point()}
        if table.get("dtype", table.get("torch_dtype")) not in stored:  # in which transformers loads it
            table.pop("torch_dtype", None)
            table["dtype"] = dtype_name(dtype or model.dtype)  # type: ignore[arg-type]
        (made / "config.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        for name, text in (extra or {}).items():
            (made / name).write_text(text, encoding="utf-8")
        _write_weights(model, state, made, is_ordinary=uniform.config is not None)
        if uniform.config is None:
            say_how_to_load(made, _REASON, type(model).__name__)
        else:
            forget_how_to_load(made)
    return uniform


def is_saved_shrunk(path: Path) -> bool:
    """Return whether :func:`save_shrunk` wrote a directory."""
    if not is_there(path / "config.json"):
        return False
    config = read_config(path)
    return is_shrunk_claim(config.get("quantization_config")) or isinstance(config.get(_MARK), Mapping)


def load_shrunk(path: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the model of a directory that :func:`save_shrunk` wrote, in evaluation mode.

    Its class comes from the tables of transformers, and no code in the directory is run.

    Args:
        path: of the directory.
        dtype: floating-point dtype of all tensors; None for those that were stored.

    Raises:
        FormatError: the directory is not what it should be.
        ImportError: transformers is missing.
    """
    directory = open_model(path)
    return load_model(directory, "cpu", dtype or directory.widest_dtype, with_head=True)[0]


def shrunk_without_weights(path: Path, name: str, facts: Facts, shapes: Sequence[Sequence[int]]) -> nn.Module:
    """Return a model with the config of a directory and the sizes of a shrunk one, with values that nobody trained.

    Args:
        path: of the directory; its config is that of the original model.
        name: of the class to prefer; else what the config names.
        facts: how the shrunk model differs.
        shapes: of the tensors that will be filled in. A config that counts far more parts is refused.

    Raises:
        FormatError: there is no config, or transformers makes no model of it, or the facts do not fit it.
        ImportError: transformers is missing.
    """
    if not is_there(path / "config.json"):
        raise FormatError(
            f"{path} is not a model directory: it has no config.json. Load its file into a module instead."
        )
    transformers = transformers_library()
    check_counts(path, read_config(path), shapes)
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        names = [name, *(getattr(config, "architectures", None) or ())]
        made_by: Any = next(filter(None, (model_class(config, known) for known in names)), None)
        if made_by is None:
            raise ValueError(f"transformers has no class {names} for the model type {config.model_type!r}")
        config.quantization_config = settings_for(skeleton(made_by, config), facts)
        model = made_by.from_pretrained(None, config=config, state_dict={})
        if is_there(path / "generation_config.json"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    except (ImportError, FormatError):
        raise
    except Exception as error:
        raise FormatError(f"{path} cannot be made into a model by transformers: {error}") from None
    return model  # type: ignore[no-any-return]


def _config_table(model: nn.Module, facts: Facts, uniform: Uniform, copied: Path | None) -> dict[str, Any]:
    """The contents of ``config.json``: those of the source, or of the model, and the new sizes."""
    if uniform.config is None:
        return with_claim(config_before(model, facts, copied), settings_for(model, facts))
    original = original_config(model, facts)
    table = _table(original, copied)
    _add(table, uniform.changes)
    # A setting that is not in the file may follow from one that has just changed.
    made = type(original).from_dict(copy.deepcopy(table)).to_dict()
    _add(table, difference(made, uniform.config.to_dict(), _FREE))
    found, wanted = (
        _shapes(skeleton(type(model), c)) for c in (type(original).from_dict(copy.deepcopy(table)), uniform.config)
    )
    if found != wanted:
        name = next(name for name in wanted if found.get(name) != wanted[name])
        raise FormatError(
            f"config.json would give {name} the shape {found.get(name)}, not {wanted[name]}.\n"
            "Save the model without source=, from the config that it has in memory."
        )
    return {**table, _MARK: {"method": "secateur"}}


def config_before(model: nn.Module, facts: Facts, copied: Path | None) -> dict[str, Any]:
    """Return the contents of ``config.json`` of the model as it was before it was shrunk.

    Args:
        model: of transformers, shrunk.
        facts: how it differs from the original.
        copied: a directory with a config that is kept as far as it is right; None if there is none.
    """
    original = original_config(model, facts)
    table = _table(original, copied)
    made = type(original).from_dict(copy.deepcopy(table)).to_dict()
    _add(table, difference(made, original.to_dict(), _FREE))
    return table


def _table(original: Any, copied: Path | None) -> dict[str, Any]:
    if copied is None:
        found: dict[str, Any] = json.loads(original.to_json_string(use_diff=True))
        return found
    table = read_config(copied)
    for key in ("quantization_config", _MARK):
        table.pop(key, None)
    return without_claims(table)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


_FREE = frozenset(
    {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "quantization_config", _MARK}
)


def _add(table: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(table.get(key), dict):
            _add(table[key], value)
        else:
            table[key] = value


def _write_weights(model: Any, state: dict[str, Any], made: Path, *, is_ordinary: bool) -> None:
    """Write the tensors as transformers stores those of the model's class."""
    weights = made / ".weights"
    held, architectures, dtype = vars(model).pop("hf_quantizer", None), model.config.architectures, model.config.dtype
    try:
        if is_ordinary:
            model.save_pretrained(weights, state_dict=state)
        else:
            model.save_pretrained(weights, state_dict=state, max_shard_size=_WHOLE)
    except (OSError, SafetensorError):
        raise
    except Exception as error:
        raise FormatError(f"{made} cannot be written by transformers: {error}") from None
    finally:
        model.config.architectures, model.config.dtype = architectures, dtype
        if held is not None:
            model.hf_quantizer = held
    if is_ordinary:
        for entry in sorted(weights.iterdir()):
            if entry.name in (SINGLE, INDEX) or "-of-" in entry.name:
                entry.rename(made / entry.name)
    else:
        (weights / SINGLE).rename(made / SHRUNK)
    shutil.rmtree(weights)
