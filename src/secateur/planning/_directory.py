"""Plan for the model in a directory: its text, its inputs, and what is measured of it. Nothing is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from secateur._checks import one_of
from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.calibration import Padding, batched, call_model, split_sentences
from secateur.comparison import use_threads
from secateur.files import ModelDirectory, scratch_folder
from secateur.huggingface import (
    CalibrationText,
    TextReader,
    directory_figures,
    directory_without_weights,
    example_inputs,
    load_model,
    load_tokenizer,
    open_model,
)
from secateur.pipeline import input_of
from secateur.planning._candidates import candidates
from secateur.planning._means import Means
from secateur.planning._measured import Measured
from secateur.planning._plan import ALLOCATIONS, Inputs, measure, report_of
from secateur.planning._split import Split, split_text
from secateur.planning._target import MaxLoss, Target
from secateur.reports import PlanReport

_LENGTH = 128  # tokens in a window to learn from, where nobody asks for another number
_COMPARED = 16  # windows on which outputs are compared
_ROUND = 16  # lengths of texts, as multiples
_BATCHES = (1, 32)  # texts in an input, where no shapes are given


@dataclass(frozen=True)
class Request:
    """What a user asks for, checked before any work.

    Args:
        target: to reach.
        max_loss: that is allowed.
        means: that are allowed.
        shapes: of inputs; None for those of the text.
        uniform: parts of a kind are only made alike.
        threads: to compute with; None for PyTorch's number.
        samples: windows to learn from for scores and fits.
        sequence_length: tokens in a window; None for at most 128.
        seed: of the draw of windows.
        cache: file of measured times.
    """

    target: Target
    max_loss: MaxLoss
    means: Means
    shapes: tuple[tuple[int, int], ...] | None
    uniform: bool
    threads: int | None
    samples: int
    sequence_length: int | None
    seed: int
    cache: str | Path | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        target: str | None,
        max_loss: str | float | None,
        shapes: Iterable[Sequence[int]] | None,
        allow: Iterable[str] | None,
        engines: Iterable[str] | None,
        allocation: str | None,
        threads: int | None,
        samples: int,
        sequence_length: int | None,
        seed: int,
        cache: str | Path | None,
    ) -> Request:
        """Return a request.

        Raises:
            RecipeError: neither a target nor a limit of the loss, or what cannot be read.
        """
        aim, limit = Target.parse(target), MaxLoss.parse(max_loss)
        if not aim.text and not limit.text:
            raise RecipeError(
                "there is nothing to reach. Give a target such as '4x' (--target 4x), or how much may be lost, such as "
                "'1%' (--max-loss 1%), or both."
            )
        if allocation is not None:
            one_of("allocation", allocation, ALLOCATIONS)
        sizes = None if shapes is None else tuple((int(rows), int(length)) for rows, length in shapes)
        if sizes is not None and not sizes:
            raise RecipeError("shapes is empty. Give at least one, such as (1, 16), or leave it out.")
        means = Means.of(allow, engines)
        return cls(aim, limit, means, sizes, allocation == "uniform", threads, samples, sequence_length, seed, cache)


@dataclass(eq=False)
class Opened:
    """A model directory with the text that belongs to it, in memory.

    Args:
        directory: of the model.
        model: dense, in float32 on the CPU.
        inputs: to learn from, to compare outputs on, and to time.
        length: tokens in a window.
    """

    directory: ModelDirectory
    model: nn.Module
    inputs: Inputs
    length: int


def open_to_plan(source: Path, split: Split, request: Request, progress: Progress) -> Opened:
    """Load a model, and cut its text into windows.

    Raises:
        FormatError: the source is not a safetensors model directory.
        StatisticsError: the text has too few windows.
        RecipeError: a shape that the model does not take.
    """
    directory = open_model(source)
    if directory.config.get("is_encoder_decoder") is True:
        raise RecipeError(
            f"{source} is an encoder-decoder model, which reads pairs of texts, and a text file has no pairs.\nPlan it "
            "in Python: secateur.plan(model, batches, ...), with batches such as {'input_ids': ..., 'labels': ...}."
        )
    progress("loading the model", 0, 1)
    model, _ = load_model(directory, "cpu", torch.float32, with_head=True)
    model.eval()
    if "input_ids" not in example_inputs(model):
        raise RecipeError(f"{source} reads no text. Plan it in Python: secateur.plan(model, batches, ...).")
    reader = TextReader(model, directory, request.sequence_length, _LENGTH)
    drawn = CalibrationText(source, request.samples, reader.length, request.seed)
    learned = reader.tried(reader.sample(split.learn, drawn))
    compared = reader.sample(split.choose, replace(drawn, samples=_COMPARED))

    def batches(windows: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": ids} for ids in batched(windows)]

    shapes = request.shapes or _shapes_of(directory, split.learn, reader.length)
    timed: dict[tuple[int, ...], Any] = {shape: input_of(model, shape) for shape in shapes}
    few, known = batches(compared), batches(learned)
    paddings = [Padding.of(batch) for batch in known]
    inputs = Inputs(known, paddings, (few, [Padding.of(batch) for batch in few]), timed, call_model, None)
    return Opened(directory, model, inputs, reader.length)


def _shapes_of(directory: ModelDirectory, text: str, longest: int) -> tuple[tuple[int, int], ...]:
    """One text, and many, of the median length of the sentences of a text."""
    sentences = split_sentences(text)[:512]
    ids = load_tokenizer(directory)(sentences)["input_ids"]
    typical = max(1, round(median(map(len, ids)) / _ROUND)) * _ROUND
    return tuple((rows, min(typical, longest)) for rows in _BATCHES)


def measure_opened(opened: Opened, request: Request, threads: int, folder: Path, progress: Progress) -> Measured:
    """Measure all that a plan for a directory follows from."""
    return measure(
        opened.model, opened.inputs, request.means, threads, request.cache, folder, request.uniform, progress
    )


def check_evaluated(source: str | Path, evaluate: str | Path | None) -> None:
    """Raise unless a file gives a figure for the model in a directory, before any work.

    Raises:
        RecipeError: it gives none, and why.
        StatisticsError: it cannot be read.
        FormatError: the directory is not that of a model.
    """
    if evaluate is not None:
        directory_figures(directory_without_weights(source), Path(evaluate), True)


def plan_directory(
    source: str | Path,
    *,
    calibration: str | Path,
    target: str | None = None,
    max_loss: str | float | None = None,
    evaluate: str | Path | None = None,
    shapes: Iterable[Sequence[int]] | None = None,
    allow: Iterable[str] | None = None,
    engines: Iterable[str] | None = None,
    allocation: str | None = None,
    threads: int | None = None,
    samples: int = 128,
    sequence_length: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Progress = lambda description, done, total: None,
) -> PlanReport:
    """Say what could be made of the model in a directory to reach a target on this machine. Nothing is written.

    See :func:`secateur.plan` for what is measured, and :func:`optimize_directory` for what it leads to.

    Args:
        source: model directory with safetensors weights: an encoder or a causal language model.
        calibration: text: plain, or JSON lines. 70 percent of it are learned from, and 15 percent choose.
        target: such as ``"4x"``, ``"12ms"``, ``"20MB"``, ``"params=0.4"``, or several with commas.
        max_loss: how much may be lost, such as ``"1%"``. What is lost after training is not known before: a plan
            without a target shows the frontier only.
        evaluate: file that the result would be measured on; only checked here.
        shapes: texts and tokens in each at which time counts; None for one text and 32 of the usual length.
        allow, engines, allocation, threads, cache: see :func:`secateur.plan`.
        samples: windows of the text for scores and fits.
        sequence_length: tokens in a window; None for at most 128.
        seed: of the draw of windows.
        progress: called with a description, and how much of how much is done.

    Raises:
        RecipeError: a target that cannot be reached, with the best that can; a text that is too short.
        FormatError: the source is not a safetensors model directory.
        StatisticsError: the text cannot be read.
        ImportError: transformers is missing.
    """
    request = Request.of(
        target, max_loss, shapes, allow, engines, allocation, threads, samples, sequence_length, seed, cache
    )
    check_evaluated(source, evaluate)
    split = split_text(calibration)
    opened = open_to_plan(Path(source), split, request, progress)
    with use_threads(threads) as number, scratch_folder(None) as folder:
        measured = measure_opened(opened, request, number, folder, progress)
        found = candidates(measured, request.target, 1, progress)[0] if request.target.text else None
        return report_of(
            measured,
            request.target,
            request.max_loss,
            None if found is None else found.solution,
            None if found is None else found.timed,
            Path(source).name,
        )
