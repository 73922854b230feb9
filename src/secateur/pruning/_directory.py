"""Prune a Hugging Face model directory into another one."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from secateur._errors import FormatError, RecipeError
from secateur._types import Progress
from secateur.calibration import GRADIENTS, Loss, batched, read_text
from secateur.evaluation import DenseQuality, read_data
from secateur.files import ModelDirectory, check_output, without_claims
from secateur.huggingface import (
    CalibrationText,
    StoredWeights,
    TextReader,
    directory_figures,
    language_loss,
    load_body,
    open_model,
    reading_of,
    transformers_library,
)
from secateur.layers import select_layers
from secateur.pruning._allocate import allocate
from secateur.pruning._allocation import needs_of
from secateur.pruning._prepare import needs_text
from secateur.pruning._prune import prune_
from secateur.pruning._recipe import Recipe
from secateur.pruning._rounds import Between, check_between
from secateur.reports import PRUNING_REPORT, AllocationReport, Report, stages_from_json, stages_to_json
from secateur.solvers import method_name

Prepare: TypeAlias = Callable[[nn.Module, Sequence[Any], Recipe], str]

_BATCH = 4096  # tokens in a batch, at most
_NOT_STORED = "not in the checkpoint, so its values are not trained"


def prune_directory(
    source: str | Path,
    output: str | Path,
    recipe: Recipe,
    *,
    calibration: CalibrationText | None = None,
    evaluate: Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    rounds: int | None = None,
    between: Between | None = None,
    prepare: Prepare | None = None,
    progress: Progress = lambda description, done, total: None,
) -> Report:
    """Prune a Hugging Face model directory into another one that ``from_pretrained`` loads unchanged.

    The output has the input's shards, dtypes, tokenizer and other files; pruned weights are zeros in dense tensors.
    ``config.json`` gains a top-level ``"sparsity"`` key, and ``secateur.json`` holds the report. Tensors that are not
    pruned, those of heads that the base model lacks among them, are copied bit for bit.

    Args:
        source: model directory with safetensors weights.
        output: directory to write; it appears complete or not at all.
        recipe: how to prune.
        calibration: text for methods that need it.
        evaluate: file to measure on before and after: text for the perplexity of causal language models and the mean
            cosine similarity of the outputs of any other to the dense model's; or pairs, or labels, see ``evaluate``.
        device: where to compute; None for a GPU if there is one.
        dtype: to compute in; None for the checkpoint's on a GPU, and for float32 on a CPU, whose arithmetic in half
            precision is slow. Weights are stored in the checkpoint's dtype, and measured as stored.
        overwrite: replace an existing output directory.
        rounds: in place of the recipe's.
        between: called between two rounds, as by :func:`secateur.prune_`. All parameters that it changes are written.
        prepare: ``prepare(model, batches, recipe)`` changes the model before it is pruned, without changing what it
            computes, and says in a line what it did, which becomes a part of the report. All parameters that it changes
            are written. It needs the text.
        progress: called with a description, and how much of how much is done.

    Raises:
        FormatError: the source is not a safetensors model directory, or the output cannot be written.
        SparsityError: its other children, for recipes and texts that do not fit.
        ImportError: transformers is missing.
    """
    recipe = recipe if rounds is None else replace(recipe, rounds=rounds)
    if between is not None:
        check_between(recipe)
    if prepare is not None and calibration is None:
        raise RecipeError("to reorder a model it must run: give some text with --calibration TEXT_FILE.")
    changes_all = between is not None or prepare is not None
    directory = open_model(source)
    check_output(directory.path, Path(output), overwrite, directory.num_bytes)
    text = _text_for(recipe, calibration)
    loss = _loss_for(recipe, directory)
    heldout = None if evaluate is None else read_data(evaluate)

    progress("loading the model", 0, 1)
    whole, model, missing = load_body(directory, device, dtype, heldout is not None and heldout.kind == "labels")
    _check_reads_text(directory, model, text or heldout)
    if heldout is not None:
        directory_figures(directory, heldout, has_dense=True)
    recipe, stored = _match_checkpoint(model, directory, recipe, missing, everything=changes_all)
    buffers = _stored_buffers(model, directory) if changes_all else {}
    asked = None if calibration is None else calibration.sequence_length
    reader = TextReader(model, directory, asked) if text else None
    batches = _batches_of(reader, text, calibration, recipe)
    quality = None
    if heldout is not None:
        reading = reading_of(directory, asked, pools=heldout.kind == "pairs")
        quality = DenseQuality.of(whole, heldout, reading, progress)

    prepared = {} if prepare is None else {"prepared": prepare(model, batches or [], recipe)}
    report = prune_(model, batches, recipe, loss=loss, between=between, progress=progress)
    _check_writable(directory, stored.unwritable)
    now = dict(model.named_buffers())
    _check_writable(directory, [name for name, buffer in buffers.items() if not torch.equal(buffer, now[name])])
    stored.round_()

    reasons = {entry.name: _NOT_STORED for entry in report.skipped if f"{entry.name}.weight" in missing}
    report = replace(
        report,
        evaluation=None if quality is None else quality.compare(whole, progress)[0],
        calibration={}
        if calibration is None or reader is None
        else {**calibration.provenance(reader.length), **prepared},
        versions={**report.versions, "transformers": transformers_library().__version__},
        skipped=tuple(replace(entry, reason=reasons.get(entry.name, entry.reason)) for entry in report.skipped),
    )
    progress("writing", 0, 1)
    directory.write_pruned(
        output,
        stored,
        {
            "config.json": _config_with_sparsity(directory, report),
            PRUNING_REPORT: _stages(directory.path, report) + "\n",
        },
        overwrite,
    )
    return report


def allocate_directory(
    source: str | Path,
    recipe: Recipe,
    *,
    calibration: CalibrationText | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda description, done, total: None,
) -> AllocationReport:
    """Return how :func:`prune_directory` would share out zeros among the layers. Nothing is written.

    Args:
        source, recipe, calibration, device, dtype: see :func:`prune_directory`.
        progress: called with a description, and how much of how much is done.

    Raises:
        SparsityError: what :func:`prune_directory` raises before it changes weights.
        ImportError: transformers is missing.
    """
    directory = open_model(source)
    text = _text_for(recipe, calibration)
    loss = _loss_for(recipe, directory)
    progress("loading the model", 0, 1)
    _, model, missing = load_body(directory, device, dtype, False)
    _check_reads_text(directory, model, text)
    recipe, _ = _match_checkpoint(model, directory, recipe, missing, everything=False)
    reader = TextReader(model, directory, calibration.sequence_length) if text and calibration else None
    return allocate(model, _batches_of(reader, text, calibration, recipe), recipe, loss=loss, progress=progress)


def _text_for(recipe: Recipe, calibration: CalibrationText | None) -> str | None:
    """The text to learn from; None where there is none, and none is needed."""
    if needs_text(recipe) and calibration is None:
        raise RecipeError(
            "this method learns from text: give some with --calibration TEXT_FILE, or use --method magnitude."
            if recipe.method.needs
            else f"the allocation {recipe.allocation!r} learns from text: give some with --calibration TEXT_FILE, or "
            "use --allocation uniform."
        )
    if recipe.held_out and calibration is None:
        raise RecipeError(
            f"a share of {recipe.held_out:g} of the calibration text is to be held out, and there is none.\n"
            "Give some with --calibration TEXT_FILE, or leave --held-out out."
        )
    return None if calibration is None else read_text(calibration.path)


def _loss_for(recipe: Recipe, directory: ModelDirectory) -> Loss | None:
    """The loss of the next token, where a method or an allocation learns from a loss."""
    if not (recipe.method.needs | needs_of(recipe.allocation, recipe.method)) & GRADIENTS:
        return None
    return language_loss(directory, method_name(recipe.method), "--method sparsegpt", "secateur.prune_")


def _check_reads_text(directory: ModelDirectory, model: nn.Module, text: object) -> None:
    if text and getattr(model.config, "is_encoder_decoder", False):
        raise RecipeError(
            f"{directory.path} is an encoder-decoder model, which reads pairs of texts, and a text file has no pairs.\n"
            "Prune it without text (--method magnitude), or in Python: secateur.prune_(model, batches), batches such "
            "as {'input_ids': ..., 'attention_mask': ..., 'labels': ...}, then model.save_pretrained."
        )


def _batches_of(
    reader: TextReader | None, text: str | None, calibration: CalibrationText | None, recipe: Recipe
) -> list[dict[str, Tensor]] | None:
    """Windows of the text, as the model takes them."""
    if reader is None or text is None or calibration is None:
        return None
    windows = reader.sample(text, calibration)
    most = _part_of(windows, recipe.held_out) if recipe.held_out else _BATCH
    return [{"input_ids": ids} for ids in batched(reader.tried(windows), most)]


def _part_of(windows: list[Tensor], share: float) -> int:
    """How many tokens a batch may have so that some batches are that share of all windows."""
    total = sum(len(window) for window in windows)
    return max(1, min(_BATCH, int(total * min(share, 1 - share))))


def _stages(path: Path, report: Report) -> str:
    """The report, after those of earlier stages, if there is one beside pruning: pruning again replaces pruning."""
    try:
        before = stages_from_json((path / PRUNING_REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # there is none, or another tool wrote it
        before = ()
    has_others = any(not isinstance(stage, Report) for stage in before)
    return stages_to_json([*(before if has_others else ()), report])


def _config_with_sparsity(directory: ModelDirectory, report: Report) -> str:
    sparsity = {
        "method": "secateur",
        "recipe": report.recipe,
        "sparsity": report.sparsity,
        "layers": [layer.name for layer in report.layers],
    }
    return json.dumps({**without_claims(directory.config), "sparsity": sparsity}, indent=2) + "\n"


def _stored_buffers(model: nn.Module, directory: ModelDirectory) -> dict[str, Tensor]:
    """Copies of the buffers of a model that its directory stores, such as the statistics of batch norms."""
    return {name: buffer.clone() for name, buffer in model.named_buffers() if directory.find(name, buffer) is not None}


def _match_checkpoint(
    model: nn.Module, directory: ModelDirectory, recipe: Recipe, missing: set[str], everything: bool
) -> tuple[Recipe, StoredWeights]:
    """Find where the parameters to prune are stored, and leave out layers whose values are not in the checkpoint."""
    layers, _ = select_layers(model, recipe.include, recipe.exclude)
    untrained = tuple(layer.name for layer in layers if layer.parameter_name in missing)
    if untrained:
        recipe = replace(recipe, exclude=(*recipe.exclude, *untrained))
    # Which weights are layers may turn out only while the model runs, so that all that may be one are looked for.
    names = [
        name
        for name, parameter in model.named_parameters()
        if (everything or parameter.ndim > 1) and name not in missing
    ]
    stored = StoredWeights(model, directory, names)
    _check_writable(directory, set(stored.lost) & {layer.parameter_name for layer in layers})
    return recipe, stored


def _check_writable(directory: ModelDirectory, lost: Collection[str]) -> None:
    if lost:
        listed = ", ".join(sorted(lost)[:5])
        raise FormatError(
            f"{directory.path} stores {len(lost)} weights in another form than the model uses them ({listed}), or not "
            "at all, and transformers has no way back, so they cannot be written. Nothing was.\n"
            "Exclude them, or use secateur.prune_ in Python and model.save_pretrained."
        )
