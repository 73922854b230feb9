"""Recover the model in a Hugging Face model directory, and write it into another one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.calibration import read_text
from secateur.evaluation import DenseQuality
from secateur.files import ModelDirectory, Work, check_output, hash_files, work_folder
from secateur.huggingface import (
    CalibrationText,
    StoredWeights,
    TextReader,
    is_causal,
    load_model,
    open_model,
    pooling_of,
    sentence_length,
    transformers_library,
)
from secateur.recovery._directory_match import check_models, check_tokenizers
from secateur.recovery._directory_text import LearningText
from secateur.recovery._directory_write import freeze_unstored_, round_as_stored_
from secateur.recovery._recover import recover_
from secateur.reports import PRUNING_REPORT, RecoveryReport, Stage, stages_to_json
from secateur.shrinking import stages_in


def recover_directory(
    source: str | Path,
    output: str | Path,
    *,
    dense: str | Path,
    calibration: str | Path | CalibrationText,
    method: str = "full",
    loss: str | Callable[[Any, Any, Any], torch.Tensor] = "auto",
    minutes: float | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    evaluate: Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    restart: bool = False,
    work: Path | None = None,
    keep_on_interrupt: bool = True,
    progress: Progress = lambda description, done, total: None,
) -> RecoveryReport:
    """Train the model in a directory to give again what the dense one gives, and write it into another directory.

    The output has the input's shards, dtypes, tokenizer and other files. Zeros stay zeros, also as they are stored, and
    a model that was shrunk keeps its sizes. ``secateur.json`` holds the reports of all that was done to the model.

    The run keeps its state in ``OUTPUT.work`` beside the output. The same call goes on where an earlier one was ended.

    Args:
        source: model directory with safetensors weights: pruned, shrunk, or both.
        output: directory to write; it appears complete or not at all.
        dense: directory of the model that it was made from.
        calibration: text to learn from: plain, or JSON lines with a ``text`` field. All of it is used, or of a
            :class:`CalibrationText` as many samples as it says.
        method, loss, minutes, steps, learning_rate: see :func:`recover_`.
        batch_size: rows of a step; None for 64 sentences, or windows of 2,048 tokens together.
        sequence_length: most tokens of a sentence or window; None for what the model takes, at most 256.
        seed: of all that is drawn at random.
        evaluate: text to measure on before and after: perplexity for causal language models, mean cosine similarity of
            the outputs to the dense model's for any other. It should not be the text to learn from.
        device: where to compute; None for a GPU if there is one.
        dtype: to compute in; None for float32. Weights are stored in the checkpoint's dtype, and measured as stored.
        overwrite: replace an existing output directory.
        restart: ignore what earlier runs left.
        work: folder for the run's state, which then stays; None for ``OUTPUT.work``, which is removed at the end.
        keep_on_interrupt: on Ctrl-C write the best state so far. The report says ``interrupted``.
        progress: called with a description, and how much of how much is done.

    Raises:
        FormatError: a directory is not a safetensors model directory, or the output cannot be written.
        RecipeError: the models do not correspond.
        SparsityError: its other children, for settings and texts that do not fit.
        ImportError: transformers is missing.
    """
    directory, original = open_model(source), open_model(dense)
    check_output(directory.path, Path(output), overwrite, directory.num_bytes)
    text = calibration if isinstance(calibration, CalibrationText) else Path(calibration)
    path = text.path if isinstance(text, CalibrationText) else text
    check_tokenizers(directory, original, read_text(path))
    heldout = None if evaluate is None else read_text(evaluate)
    pooling = pooling_of(directory.path)
    if pooling is not None:
        sequence_length = sequence_length or sentence_length(directory.path)

    progress("loading the models", 0, 2)
    dtype = dtype or torch.float32
    model, missing = load_model(directory, device, dtype, with_head=True)
    progress("loading the models", 1, 2)
    teacher, _ = load_model(original, device, dtype, with_head=True)
    check_models(directory, model, original, teacher)
    learning = LearningText.of(
        model,
        directory,
        text,
        is_embedder=pooling is not None,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
    )
    trainable = [name for name, _ in model.named_parameters() if name not in missing]
    stored = StoredWeights(model, directory, trainable)
    frozen = freeze_unstored_(model, teacher, stored, missing)
    quality = _Quality.of(model, teacher, directory, evaluate, heldout, progress)
    settings = {
        "method": method,
        "loss": loss if isinstance(loss, str) else "a function",
        "budget": f"{minutes} minutes" if steps is None else f"{steps} steps",
        "learning rate": str(learning_rate),
        "batches": str(dict(learning.provenance)),
        "seed": str(seed),
        "device and dtype": f"{next(model.parameters()).device} {dtype}",
    }
    stages = stages_in(directory.path)
    with _checkpoint(Path(output), work, restart, directory, original, path, settings) as folder:
        report = recover_(
            model,
            teacher,
            learning.batches,
            method=method,
            loss=loss,
            minutes=minutes,
            steps=steps,
            learning_rate=learning_rate,
            pooling=pooling,
            history=_since(stages, stages_in(original.path)),
            seed=seed,
            checkpoint=folder,
            keep_on_interrupt=keep_on_interrupt,
            progress=progress,
        )
        kept = round_as_stored_(model, stored, directory)
        notes = list(report.notes)
        if frozen:
            notes.append(
                f"{len(frozen)} parameters are stored in another form than the model uses them and did not learn: "
                f"{', '.join(frozen[:5])}"
            )
        if kept:
            notes.append(f"{kept} weights keep the value that they had, because the new one is stored as zero")
        report = replace(
            report,
            calibration=dict(learning.provenance),
            versions={**report.versions, "transformers": transformers_library().__version__},
            evaluation=None if quality is None else quality.compare(model, progress),
            notes=tuple(notes),
        )
        progress("writing", 0, 1)
        directory.write_pruned(
            output, stored, {PRUNING_REPORT: stages_to_json([*stages, report]) + "\n"}, overwrite=overwrite
        )
    return report
