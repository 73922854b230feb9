"""Export a model directory: dense, pruned, shrunk or packed."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur._checks import one_of
from secateur._errors import FormatError, RecipeError
from secateur._types import Progress
from secateur.evaluation import Pooling
from secateur.exporting._calibration import sentences_of
from secateur.exporting._export import longest_text, plain
from secateur.exporting._function import ExportedFunction
from secateur.exporting._inputs import inputs_of
from secateur.exporting._settings import ExportSettings, Shapes
from secateur.exporting._write import Source, write_exported
from secateur.files import (
    INDEX,
    check_output,
    copy_all_but_weights,
    find_shards,
    forget_how_to_load,
    is_there,
    read_config,
    read_header,
    whole_directory,
)
from secateur.huggingface import CalibrationText, example_inputs, load_model, open_model, pooling_of
from secateur.packing import FILE, REPORT, load_directory
from secateur.packing import export_directory as write_dense
from secateur.reports import EXPORT_TARGETS, ExportReport

_MODULES = "modules.json"
_UNTRAINED = "pooler_output"  # of what a checkpoint often lacks the weights
_ROWS = 2


def export_directory(
    source: str | Path,
    output: str | Path,
    *,
    to: str = "dense",
    int8: bool = False,
    bfloat16: bool = False,
    packed: bool = False,
    calibration: CalibrationText | None = None,
    tolerance: float = 1e-4,
    shapes: Shapes | None = None,
    overwrite: bool = False,
    progress: Progress = lambda description, done, total: None,
) -> ExportReport | None:
    """Write the model in a directory for another engine, or a packed one with plain weights.

    All files beside the weights are copied: config, tokenizer, and those of sentence-transformers, whose pooling and
    normalisation become part of the exported model. No code in the directory is run.

    Args:
        source: model directory: dense, pruned, shrunk or packed.
        output: directory to make. It appears complete or not at all.
        to: ``"onnx"`` or ``"openvino"``; ``"dense"`` writes a packed model with plain weights, zeros included.
        calibration: text from which OpenVINO takes the ranges of numbers for 8 bits; None to find them in each call.
        int8, bfloat16, packed, tolerance, shapes: see :func:`secateur.export`.
        overwrite: replace an existing output directory.
        progress: called with a description, and how much of how much is done.

    Returns:
        What was written, how it compares with the model, and how fast it is; None for ``"dense"``.

    Raises:
        FormatError: the source is not a model directory, the exporter cannot follow the model, what it made is another
            function, or the output cannot be written. Nothing is written then.
        RecipeError: arguments that do not go together, or a model that cannot be exported, with the reason.
        ImportError: a package is missing; the message names the extra to install.
        KernelError: ``packed``, and the library that the engine needs was not built.
    """
    source, output = Path(source), Path(output)
    if one_of("format", to, ("dense", *EXPORT_TARGETS)) == "dense":
        given = {"int8": int8, "bfloat16": bfloat16, "packed": packed, "calibration": calibration is not None}
        if named := [name for name, on in given.items() if on]:
            raise RecipeError(
                f"{named[0]} is for an engine, and to='dense' writes plain weights.\nGive "
                "to='onnx' or to='openvino' (--to onnx, --to openvino)."
            )
        write_dense(source, output, overwrite=overwrite)
        return None
    began = time.perf_counter()
    settings = ExportSettings(to, int8, bfloat16, tolerance, shapes, packed)
    settings.check_calibration(calibration)
    settings.check_installed()
    if not (is_there(source) and source.is_dir()):
        what = "is a file, not a directory" if is_there(source) else "does not exist"
        raise FormatError(f"{source} {what}. Give the directory of a model.")
    if read_config(source).get("is_encoder_decoder") is True:
        raise RecipeError(
            f"{source} is an encoder-decoder model, of which a decoder would be a second exported model.\nExport its "
            "encoder in Python: secateur.export(model.get_encoder(), batch, OUT)."
        )
    shards = (FILE,) if is_there(source / FILE) else find_shards(source)
    nbytes = sum((source / shard).stat().st_size for shard in shards)
    check_output(source, output, overwrite, nbytes)
    progress("loading the model", 0, 1)
    function, notes = function_of(source)
    batches = None
    if calibration is not None:
        batches = sentences_of(function.model, source, calibration)
        count = sum(len(batch["input_ids"]) for batch in batches)
        notes += (f"ranges for 8 bits are from {count} sentences of {calibration.path.name}",)
    with whole_directory(output, overwrite=overwrite) as made:
        copy_all_but_weights(source, made, (*shards, INDEX, REPORT))
        forget_how_to_load(made)
        return write_exported(function, made, settings, Source(nbytes, notes, began, batches), progress)


def function_of(path: Path) -> tuple[ExportedFunction, tuple[str, ...]]:
    """Return the model in a directory as a function of tensors, and notes on what is left out of it.

    Raises:
        FormatError: the directory is not that of a model.
        RecipeError: the checkpoint lacks values that the model needs, or no example can be made up.
        ImportError: transformers is missing.
    """
    model, missing = _loaded(path)
    notes: list[str] = []
    pooling = None
    if is_there(path / _MODULES):  # the library runs the model without its head
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        missing = {name.removeprefix(prefix) for name in missing}
        model = getattr(model, "base_model", model)
        pooling = _pooling(path, notes)
    absent = sorted(name for name in missing if name in dict(model.named_parameters()))
    unused = [name for name in absent if name.startswith("pooler.") or ".pooler." in name]
    if needed := [name for name in absent if name not in unused]:
        raise RecipeError(
            f"{path} has no values for {', '.join(needed[:3])} of {type(model).__name__}, so that what it returns "
            "means nothing.\nGive a complete model, or correct the architectures in its config.json."
        )
    if unused and pooling is None:
        notes.append(f"{_UNTRAINED} is left out: the checkpoint has no values for {unused[0]}")
    plain(model)
    inputs = inputs_of(model, _example(model), None, longest_text(model))
    return ExportedFunction(model, inputs, pooling, (_UNTRAINED,) if unused else ()), tuple(notes)


def _loaded(path: Path) -> tuple[nn.Module, set[str]]:
    """The model in a directory, packed or not, and the names of the tensors that its file lacks."""
    if is_there(path / FILE) or _is_compressed(path):
        model, contents = load_directory(path, dense=True, into=None, dtype=torch.float32)
        return model, set(contents.absent)
    return load_model(open_model(path), "cpu", torch.float32, with_head=True)


def _is_compressed(path: Path) -> bool:
    """Whether compressed-tensors wrote the weights."""
    return any(name.endswith(".compressed") for shard in find_shards(path) for name in read_header(path / shard)[0])


def _pooling(path: Path, notes: list[str]) -> Pooling | None:
    try:
        return pooling_of(path)
    except RecipeError as error:
        notes.append(f"no embeddings of sentences: {str(error).partition(chr(10))[0]}")
        return None


def _example(model: nn.Module) -> Mapping[str, Tensor]:
    """Two texts, with all inputs that a tokenizer gives for the model, or two images."""
    example = {name: tensor.repeat(_ROWS, *[1] * (tensor.ndim - 1)) for name, tensor in example_inputs(model).items()}
    if "input_ids" not in example:
        return example
    ids = example["input_ids"]
    config: Any = model.config
    takes = inspect.signature(model.forward).parameters
    if "attention_mask" in takes:
        example["attention_mask"] = torch.ones_like(ids)
    if "token_type_ids" in takes and (getattr(config, "type_vocab_size", 0) or 0) > 1:
        example["token_type_ids"] = torch.zeros_like(ids)
    return example
