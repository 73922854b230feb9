"""Write a smaller model of transformers as a model directory."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from secateur._errors import FormatError
from secateur.files import (
    INDEX,
    SINGLE,
    ModelDirectory,
    check_output,
    copy_all_but_weights,
    whole_directory,
    without_claims,
)


def write_uniform(
    model: nn.Module,
    directory: ModelDirectory,
    output: Path,
    *,
    config: Mapping[str, Any],
    absent: Collection[str],
    extra: Mapping[str, str],
    overwrite: bool,
) -> None:
    """Write a model whose config describes it, with the other files of the directory that it came from.

    Args:
        model: with its tensors in the dtypes that are to be stored.
        directory: it was loaded from.
        output: directory to make. It appears complete or not at all.
        config: contents of ``config.json``.
        absent: names of tensors that the checkpoint had no values for. They are not stored.
        extra: further text files, by name.
        overwrite: replace an existing directory.

    Raises:
        FormatError: transformers cannot write the model, or the output cannot be written.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in absent}
    check_output(directory.path, output, overwrite, sum(tensor.nbytes for tensor in state.values()))
    with whole_directory(output, overwrite=overwrite) as made:
        weights = made / ".weights"
        try:
            model.save_pretrained(weights, state_dict=state)  # type: ignore[operator]
        except (OSError, SafetensorError):
            raise
        except Exception as error:  # transformers fails with any exception
            raise FormatError(f"{directory.path} cannot be written by transformers: {error}") from None
        for entry in sorted(weights.iterdir()):
            if entry.name in (SINGLE, INDEX) or "-of-" in entry.name:
                shutil.copymode(directory.path / directory.shards[0], entry)  # transformers makes it private
                entry.rename(made / entry.name)
        shutil.rmtree(weights)
        copy_all_but_weights(directory.path, made, (*directory.shards, INDEX))
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, text in extra.items():
            (made / name).write_text(text, encoding="utf-8")


def merged_config(directory: ModelDirectory, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a directory with changes, which may be nested, and nothing else changed."""

    def merge(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        merged = dict(table)
        for name, value in changes.items():
            old = merged.get(name)
            merged[name] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        return merged

    return merge(without_claims(directory.config), changes)


def stored_dtypes(model: nn.Module, directory: ModelDirectory) -> dict[str, torch.dtype]:
    """Return the dtype in which the checkpoint stores each floating-point tensor, by its name in the model.

    What has another name in the checkpoint gets the dtype of most.
    """
    dtypes = {name: directory.dtype(name) for name in directory.tensors}
    floating = Counter(dtype for dtype in dtypes.values() if dtype.is_floating_point)
    usual = floating.most_common(1)[0][0] if floating else torch.float32
    return {name: dtypes.get(name, usual) for name, tensor in _tensors(model).items() if tensor.is_floating_point()}


def stored_bytes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> int:
    """Return how many bytes the tensors of a model take on disk, each shared one counted once."""
    found = {id(t): t.numel() * dtypes.get(name, t.dtype).itemsize for name, t in _tensors(model).items()}
    return sum(found.values())


@torch.no_grad()
def round_(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give the tensors of a model the precision that they will have on disk, without changing their dtype."""
    for tensor, dtype in _with_dtypes(model, dtypes):
        tensor.copy_(tensor.to(dtype))


@torch.no_grad()
def convert_(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give the tensors of a model the dtype that they will have on disk. Tied ones stay tied."""
    for tensor, dtype in _with_dtypes(model, dtypes):
        tensor.data = tensor.data.to(dtype)


def _with_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> list[tuple[Tensor, torch.dtype]]:
    found = {id(tensor): (tensor, dtypes[name]) for name, tensor in _tensors(model).items() if name in dtypes}
    return list(found.values())


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict(keep_vars=True))
