"""Measure the model in a directory on files: dense, pruned, shrunk or packed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from secateur._checks import one_of
from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.evaluation import METRICS, DenseOutcome, Inputs, measure, read_data, run_dense
from secateur.exporting import is_exported, open_exported
from secateur.files import is_there
from secateur.huggingface import (
    check_head,
    directory_figures,
    directory_without_weights,
    load_model,
    open_model,
    reading_of,
    transformers_library,
)
from secateur.packing import FILE, load
from secateur.reports import EvaluationReport, Figure, versions


class DirectoryEvaluation:
    """Files to measure on, read once, and what the dense model gives for them, to compare several models with.

    No model is kept. The dense model is loaded when the first figure needs it.

    Args:
        reference: directory whose tokenizer, pooling and length of inputs are used for all models; with ``dense`` the
            dense model itself.
        files: to measure on.
        has_dense: whether the model in ``reference`` is the dense one that others are compared with.
        metrics: to measure; None for all that the files give.
        sequence_length: tokens in a window; None for the longest that the model takes, at most 2048.
        device: where to compute; None for a GPU if there is one. Packed and exported models run on the CPU.
        dtype: to compute in; None for the checkpoint's on a GPU, and for float32 on a CPU.

    Raises:
        RecipeError: a file gives no figure for such a model, or no file a metric that was asked for.
        StatisticsError: a file cannot be read, with the line.
        FormatError: the directory is not that of a model.
    """

    def __init__(
        self,
        reference: str | Path,
        files: Iterable[str | Path],
        *,
        has_dense: bool,
        metrics: Sequence[str] | None = None,
        sequence_length: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        directory = directory_without_weights(reference)
        wanted = None if metrics is None else [one_of("metric", name, METRICS) for name in metrics]
        self._inputs: list[Inputs] = []
        self.notes: tuple[str, ...] = ()
        found: set[str] = set()
        for data in [read_data(file) for file in files]:
            gives, notes = directory_figures(directory, data, has_dense)
            asked = tuple(name for name in gives if wanted is None or name in wanted)
            found |= set(gives)
            if not asked:
                continue
            pools = data.kind != "text" or bool(set(asked) & {"rank", "embedding_similarity"})
            reading = reading_of(directory, sequence_length, pools=pools)
            self._inputs.append(Inputs.of(data, reading, has_dense, asked))
            self.notes += notes
        if absent := [name for name in wanted or () if name not in found]:
            raise RecipeError(
                f"no file gives {', '.join(absent)}; they give {', '.join(sorted(found))} for the model in "
                f"{reference}.\nGive a file with other fields, or ask for one of these."
            )
        if not self._inputs:
            raise RecipeError("there is no file to measure on. Give at least one, with --evaluate FILE.")
        self._dense: list[DenseOutcome] | None = None
        self._reference = Path(reference)
        self._has_dense = has_dense
        self._device, self._dtype = device, dtype

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the figures that are measured."""
        return tuple(dict.fromkeys(name for inputs in self._inputs for name in inputs.metrics))

    def dense_figures(self, progress: Progress = lambda what, done, total: None) -> dict[str, float]:
        """Return the figures of the dense model. The first call runs it, or that of :meth:`measure`."""
        if not self._has_dense:
            return {}
        return {name: value for outcome in self._run_dense(progress) for name, value in outcome.figures.items()}

    def measure(self, path: str | Path, progress: Progress = lambda what, done, total: None) -> EvaluationReport:
        """Return the figures of the model in a directory beside those of the dense one.

        Args:
            path: of a directory: dense, pruned, shrunk, packed or exported.
            progress: called with a description, and how much of how much is done.

        Raises:
            FormatError: the directory is not that of a model.
            SparsityError: its other children, for files that do not fit the model.
            ImportError: transformers is missing.
        """
        began = time.perf_counter()
        outcomes = self._run_dense(progress) if self._has_dense else [None] * len(self._inputs)
        progress("loading the model", 0, 1)
        model = load_to_measure(path, any(inputs.needs_head for inputs in self._inputs), self._device, self._dtype)
        figures: list[Figure] = []
        notes = list(self.notes)
        for inputs, dense in zip(self._inputs, outcomes, strict=True):
            measured = measure(inputs, model, dense, progress)
            figures += measured.figures
            notes += measured.notes
        return EvaluationReport(
            tuple(figures),
            Path(path).name,
            self._reference.name if self._has_dense else "",
            time.perf_counter() - began,
            tuple(notes),
            {**versions(), "transformers": transformers_library().__version__},
        )

    def _run_dense(self, progress: Progress) -> list[DenseOutcome]:
        if self._dense is None:
            progress("loading the dense model", 0, 1)
            model = load_to_measure(self._reference, any(i.needs_head for i in self._inputs), self._device, self._dtype)
            self._dense = [run_dense(inputs, model, progress) for inputs in self._inputs]
        return self._dense


def evaluate_directory(
    source: str | Path,
    files: Iterable[str | Path],
    dense: str | Path | None = None,
    *,
    metrics: Sequence[str] | None = None,
    sequence_length: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda description, done, total: None,
) -> EvaluationReport:
    """Measure the model in a directory on files, and compare it with the dense model. Nothing is written.

    What is measured follows from the fields of each file, see :func:`secateur.evaluate`.

    Args:
        source: model directory: dense, pruned, shrunk, packed or exported.
        files: plain text, JSON lines, or CSV with a header.
        dense: directory of the dense model, to compare with. Its tokenizer and pooling are used for both.
        metrics: to measure; None for all that the files give.
        sequence_length: tokens in a window; None for the longest that the model takes, at most 2048.
        device: where to compute; None for a GPU if there is one.
        dtype: to compute in; None for the checkpoint's on a GPU, and for float32 on a CPU.
        progress: called with a description, and how much of how much is done.

    Raises:
        FormatError: a directory is not that of a model.
        SparsityError: its other children, for files that cannot be read or do not fit the model.
        ImportError: transformers is missing.
    """
    reference = source if dense is None else dense
    evaluation = DirectoryEvaluation(
        reference,
        files,
        has_dense=dense is not None,
        metrics=metrics,
        sequence_length=sequence_length,
        device=device,
        dtype=dtype,
    )
    directory_without_weights(source)  # a mistake in its name is found before the dense model is run
    return evaluation.measure(source, progress)


def load_to_measure(
    path: str | Path, with_head: bool, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return the model in a directory: dense, pruned, shrunk, packed or exported.

    Args:
        path: of the directory.
        with_head: whether the head of its class is needed, with values of the checkpoint.
        device: where to compute; None for a GPU if there is one. Packed and exported models run on the CPU.
        dtype: to compute in; None for the checkpoint's on a GPU, and for float32 on a CPU.

    Raises:
        FormatError: the directory is not that of a model.
        RecipeError: the checkpoint lacks the values of the head.
        ImportError: transformers is missing.
    """
    path = Path(path)
    directory_without_weights(path)  # names what is missing
    if is_exported(path):
        engine = open_exported(path)
        if with_head and "logits" not in engine.outputs:
            raise RecipeError(
                f"{path} gives {', '.join(engine.outputs)}, and no scores of classes, which accuracy is measured by.\n"
                "Give a model with a trained head, or a file without labels."
            )
        return engine
    if is_there(path / FILE):
        return load(path)
    directory = open_model(path)
    if any(name.endswith(".compressed") for name in directory.tensors):  # of compressed-tensors
        return load(path)
    model, missing = load_model(directory, device, dtype, with_head=with_head)
    if with_head:
        check_head(directory, model, missing)
    return model
