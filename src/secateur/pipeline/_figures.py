"""Figures of the model in a directory that need no text: size, zeros, speed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.exporting import exported_bytes, is_exported, open_exported
from secateur.files import ModelDirectory
from secateur.huggingface import example_inputs, load_model, open_model
from secateur.layers import select_layers
from secateur.packing import FILE, load
from secateur.shrinking import compare_latency

Shape = tuple[int, int]

# What sparsity may differ from the one that was asked for, because whole weights are pruned: half a weight in each row.
ROUNDING = "rounding of sparsity"


def weight_bytes(path: Path) -> int:
    """Return the size of the weight files of a model directory."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def is_plain(path: Path) -> bool:
    """Return whether the model in a directory has plain weights: it is not packed, and not exported."""
    return not (path / FILE).exists() and not is_exported(path)


def dense_figures(path: Path, include: Collection[str] = (), exclude: Collection[str] = ()) -> dict[str, float]:
    """Return size and zeros of a model that is not packed.

    Args:
        path: of its directory.
        include: glob patterns of the layers that are considered; by default all that can be pruned.
        exclude: glob patterns of those that are not.

    Returns:
        ``bytes``, ``parameters``, ``sparsity_total``, and where there are layers to consider, ``sparsity`` and
        ``ROUNDING``.
    """
    directory = open_model(path)
    weights, zeros = _stored(directory)
    model, _ = load_model(directory, "cpu", torch.float32)
    figures = {"parameters": float(weights), "bytes": float(weight_bytes(path))}
    if weights:
        figures["sparsity_total"] = zeros / weights
    layers, _ = select_layers(model, include, exclude)
    matrices = [layer.matrix().detach() for layer in layers]
    if considered := sum(matrix.numel() for matrix in matrices):
        figures["sparsity"] = sum(_zeros(matrix) for matrix in matrices) / considered
        figures[ROUNDING] = sum(len(matrix) for matrix in matrices) / 2 / considered
    return figures


def stored_figures(path: Path, before: Mapping[str, float]) -> dict[str, float]:
    """Return the same of a packed or exported model, given those of the one before: only its size is another."""
    same = {name: before[name] for name in ("parameters", "sparsity", "sparsity_total", ROUNDING) if name in before}
    return {**same, "bytes": float(exported_bytes(path) if is_exported(path) else weight_bytes(path))}


def speedups(
    dense: Path, path: Path, shapes: Collection[Shape], device: str | None, progress: Progress
) -> dict[str, float]:
    """Return how many times as fast as the dense model in eager mode and float32 a model runs, by shape.

    Args:
        dense: directory of the dense model.
        path: directory of the other one.
        shapes: how many texts, and tokens in each.
        device: where to compute; packed and exported models run on the CPU, and then both do.
        progress: called with a description, and how much of how much is done.
    """
    where = device if is_plain(path) else "cpu"
    first = load_model(open_model(dense), where, torch.float32, with_head=True)[0]
    if is_plain(path):
        second = load_model(open_model(path), where, torch.float32, with_head=True)[0]
    else:
        second = open_exported(path) if is_exported(path) else load(path)
    found = {}
    for number, shape in enumerate(shapes):
        progress("measuring the time of a forward pass", number, len(shapes))
        found["x".join(map(str, shape))] = compare_latency(first, second, input_of(first, shape)).ratio
    return found


def input_of(model: nn.Module, shape: Shape) -> dict[str, Tensor]:
    """Return a made-up input of a shape.

    Raises:
        RecipeError: the model reads no texts, or none of that length.
    """
    rows, length = shape
    example = example_inputs(model)
    longest = getattr(model.config, "max_position_embeddings", None)
    if "input_ids" not in example:
        raise RecipeError(
            f"{type(model).__name__} reads {next(iter(example))}, and shapes are those of texts. Leave out shapes."
        )
    if isinstance(longest, int) and length > longest:
        raise RecipeError(f"the shape {rows}x{length} is longer than the {longest} tokens that the model takes.")
    return {name: _tiled(ids, rows, length) for name, ids in example.items()}


def _tiled(ids: Tensor, rows: int, length: int) -> Tensor:
    times = -(-length // ids.shape[1])
    return ids.repeat(rows, times)[:, :length].contiguous()


def _stored(directory: ModelDirectory) -> tuple[int, int]:
    """Floating-point weights in the files, and how many of them are zero; one tensor is in memory at a time."""
    weights = zeros = 0
    for name in directory.tensors:
        tensor = directory.read(name)
        if tensor.is_floating_point():
            weights, zeros = weights + tensor.numel(), zeros + _zeros(tensor)
    return weights, zeros


def _zeros(tensor: Tensor) -> int:
    return tensor.numel() - int(tensor.count_nonzero())
