"""Shrink a Hugging Face model directory into another one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.calibration import batched, read_text
from secateur.evaluation import DataFile, DenseQuality, read_data
from secateur.files import ModelDirectory, check_output
from secateur.graph import Removal
from secateur.huggingface import (
    CalibrationText,
    TextReader,
    check_head,
    directory_figures,
    example_inputs,
    language_loss,
    load_model,
    open_model,
    reading_of,
    transformers_library,
)
from secateur.reports import PRUNING_REPORT, ShrinkAnalysis, ShrinkReport, stages_to_json
from secateur.shapes import convert_, facts_of, find_uniform, round_, save_shrunk, stored_bytes, stored_dtypes
from secateur.shrinking._analysis import describe
from secateur.shrinking._history import pruned_before, stages_in
from secateur.shrinking._latency import compare_latency
from secateur.shrinking._request import check_request
from secateur.shrinking._shrink import analyze, shrink_

METHOD = "obs+refit"  # where there is text
METHOD_WITHOUT_TEXT = "magnitude"
_LATENCY_TOKENS = 128
_NO_TEXT = (
    "there was no text to learn from, so nothing makes up for the units that went; give some with --calibration to "
    "have the rest take over"
)


def shrink_directory(
    source: str | Path,
    output: str | Path,
    *,
    keep: Mapping[str, float] | None = None,
    target: Mapping[str, float] | None = None,
    remove: Mapping[str, Sequence[int]] | Removal | None = None,
    zeros: bool = False,
    method: str | None = None,
    allocation: str = "uniform",
    round_to: int = 1,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    calibration: CalibrationText | None = None,
    evaluate: Path | None = None,
    latency: bool = True,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress = lambda description, done, total: None,
) -> ShrinkReport:
    """Shrink a Hugging Face model directory into another one that holds the smaller model.

    If all blocks keep the same sizes, the output is an ordinary model directory, with the new sizes in ``config.json``.
    Otherwise its shapes are stored beside the weights, and ``secateur.load`` reads it; so does ``from_pretrained``
    after ``import secateur.huggingface``. In both, ``secateur.json`` holds the report.

    Args:
        source: model directory with safetensors weights.
        output: directory to write; it appears complete or not at all.
        keep, target, remove, zeros, allocation, round_to, include, exclude: see :func:`shrink_`.
        method: see :func:`shrink_`; None for ``"obs+refit"`` with text, and without text for ``"magnitude"``, which can
            only carry out ``remove`` and ``zeros``.
        calibration: text for methods that learn from text.
        evaluate: file to measure on before and after: text for the perplexity of causal language models and the mean
            cosine similarity of the outputs of any other to the dense model's; or pairs, or labels, see ``evaluate``.
        latency: measure a forward pass before and after. For that the dense model is loaded once more.
        device: where to compute; None for a GPU if there is one.
        dtype: to compute in; None for the checkpoint's on a GPU, and for float32 on a CPU. Weights are stored in the
            checkpoint's dtype, and measured as stored.
        overwrite: replace an existing output directory.
        progress: called with a description, and how much of how much is done.

    Raises:
        FormatError: the source is not a safetensors model directory, or the output cannot be written.
        SparsityError: its other children, for what cannot be removed and texts that do not fit.
        ImportError: transformers is missing.
    """
    asked = check_request(keep, target, remove, zeros, round_to)
    chosen = chosen_method(method, asked, calibration)
    directory = open_model(source)
    check_output(directory.path, Path(output), overwrite, directory.num_bytes)
    loss = None
    if chosen.startswith(("taylor", "fisher")):
        loss = language_loss(directory, chosen, "--method obs+refit", "secateur.shrink_")
    text = None if calibration is None else read_text(calibration.path)
    heldout = None if evaluate is None else read_data(evaluate)

    progress("loading the model", 0, 1)
    model, missing = load_model(directory, device, dtype, with_head=True)
    _check_reads_one_text(model, directory, text, heldout)
    inputs = _Inputs.of(model, directory, calibration, text)
    quality = None
    if heldout is not None:
        directory_figures(directory, heldout, has_dense=True)
        if heldout.kind == "labels":
            check_head(directory, model, missing)
        length = None if calibration is None else calibration.sequence_length
        quality = DenseQuality.of(
            model, heldout, reading_of(directory, length, pools=heldout.kind == "pairs"), progress
        )

    dtypes = stored_dtypes(model, directory)
    bytes_before = stored_bytes(model, dtypes)
    stages = stages_in(directory.path)
    report = shrink_(
        model,
        inputs.batches,
        keep=keep,
        target=target,
        remove=remove,
        zeros=zeros,
        method=chosen,
        allocation=allocation,
        round_to=round_to,
        include=include,
        exclude=exclude,
        history=pruned_before(stages, model),
        loss=loss,
        progress=progress,
    )
    dtypes = stored_dtypes(model, directory)
    round_(model, dtypes)
    evaluation, incomparable = (None, ()) if quality is None else quality.compare(model, progress)
    report = replace(
        report,
        before=replace(report.before, nbytes=bytes_before),
        after=replace(report.after, nbytes=stored_bytes(model, dtypes)),
        calibration={} if calibration is None else calibration.provenance(inputs.length),
        versions={**report.versions, "transformers": transformers_library().__version__},
        evaluation=evaluation,
        notes=(*report.notes, *incomparable, *((_NO_TEXT,) if calibration is None else ())),
    )
    if latency:
        progress("measuring the time of a forward pass", 0, 1)
        dense, _ = load_model(directory, device, dtype, with_head=True)
        report = replace(report, latency=compare_latency(dense, model, inputs.example))
        del dense
    progress("writing", 0, 1)
    convert_(model, dtypes)
    facts = facts_of(model)
    uniform = find_uniform(model, facts)
    report = replace(report, uniform=uniform.config is not None, uniform_reason=uniform.reason)
    extra = {PRUNING_REPORT: stages_to_json([*stages, report]) + "\n"}
    save_shrunk(
        model,
        facts,
        output,
        source=directory.path,
        overwrite=overwrite,
        absent=missing,
        extra=extra,
        uniform=uniform,
    )
    return report


def analyze_directory(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda description, done, total: None,
) -> ShrinkAnalysis:
    """Return what could be removed from the model in a directory. Nothing is written.

    The model is run once, on a made-up input.

    Args:
        source: model directory with safetensors weights.
        device: where to compute; None for a GPU if there is one.
        dtype: to compute in; None for the checkpoint's on a GPU, and for float32 on a CPU.
        progress: called with a description, and how much of how much is done.

    Raises:
        FormatError: the source is not a safetensors model directory.
        SparsityError: the model cannot run the input.
        ImportError: transformers is missing.
    """
    directory = open_model(source)
    progress("loading the model", 0, 1)
    model, _ = load_model(directory, device, dtype, with_head=True)
    example = example_inputs(model)
    progress("running the model", 0, 1)
    return describe(model, analyze(model, [example]), example)


def chosen_method(method: str | None, asked: str, calibration: CalibrationText | None) -> str:
    """The method to use. Without text, only one that learns nothing can be."""
    if calibration is not None:
        return method or METHOD
    if method is None and asked in ("remove", "zeros"):
        return METHOD_WITHOUT_TEXT
    if method is None or method != METHOD_WITHOUT_TEXT:
        raise RecipeError(
            f"the method {method or METHOD} learns from text: give some with --calibration TEXT_FILE, or use "
            f"--method {METHOD_WITHOUT_TEXT}."
        )
    return method


@dataclass(frozen=True)
class _Inputs:
    """What a model is run on.

    Args:
        batches: to learn from.
        example: one input, to measure time on.
        length: tokens in a window of text; 0 without text.
    """

    batches: Sequence[Mapping[str, Tensor]]
    example: Mapping[str, Tensor]
    length: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        directory: ModelDirectory,
        calibration: CalibrationText | None,
        text: str | None,
    ) -> _Inputs:
        """Return windows of the text, or a made-up input where there is none."""
        reader = None
        if text:
            reader = TextReader(model, directory, None if calibration is None else calibration.sequence_length)
        batches: list[Mapping[str, Tensor]]
        if reader is not None and text is not None and calibration is not None:
            windows = reader.sample(text, calibration)
            batches = [{"input_ids": ids} for ids in batched(reader.tried(windows))]
            first = windows[0][None, :_LATENCY_TOKENS]
            example = {"input_ids": first.to(next(model.parameters()).device)}
        else:
            example = example_inputs(model)
            batches = [example]
        return cls(batches, example, 0 if reader is None else reader.length)


def _check_reads_one_text(
    model: nn.Module, directory: ModelDirectory, text: str | None, heldout: DataFile | None
) -> None:
    """Raise if there is text for a model that reads pairs of texts."""
    if (text or heldout) and getattr(model.config, "is_encoder_decoder", False):
        raise RecipeError(
            f"{directory.path} is an encoder-decoder model, which reads pairs of texts, and a text file has no "
            f"pairs.\nShrink it without text (--method {METHOD_WITHOUT_TEXT}), or in Python: secateur.shrink_("
            "model, batches, ...), batches such as {'input_ids': ..., 'attention_mask': ..., 'labels': ...}."
        )
