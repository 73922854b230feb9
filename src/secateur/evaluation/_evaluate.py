"""Say how good a model is, in one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur._checks import instance, one_of
from secateur._errors import RecipeError, StatisticsError
from secateur._types import Progress
from secateur.calibration import is_sentence_transformer, longest_window
from secateur.evaluation._batches import measure_batches
from secateur.evaluation._data_file import DataFile, read_data
from secateur.evaluation._inputs import Inputs, Reading
from secateur.evaluation._measure import measure, run_dense
from secateur.evaluation._metrics import METRICS
from secateur.evaluation._pooling import Pooling
from secateur.evaluation._run import is_language_model
from secateur.reports import EvaluationReport, Figure, versions


def evaluate(
    model: nn.Module,
    data: Any,
    metric: str | Callable[[nn.Module, Any], float] | None = None,
    dense: nn.Module | None = None,
    *,
    tokenizer: Any = None,
    pooling: Pooling | None = None,
    sequence_length: int | None = None,
    progress: Progress = lambda description, done, total: None,
) -> EvaluationReport:
    """Measure how good a model is, on files or batches. The model is not changed.

    What is measured follows from the fields of a file:

    ============================= ============================================================
    plain text                    perplexity of a causal language model; of others the mean
                                  cosine of the states of tokens and of the embeddings of
                                  sentences to the dense model's, and ``rank``
    sentence1, sentence2, score   ``spearman``: 100 times Spearman's rank correlation between
                                  the cosines of the embeddings of both sentences and the score
    text, label                   accuracy of a model with a head for classification
    ============================= ============================================================

    ``rank`` is 100 times Spearman's rank correlation between the dense and the tested model's cosines over all pairs of
    the sentences of the file, of at most 1,000, evenly spread.

    Args:
        model: of transformers or sentence-transformers for files; any module for batches.
        data: the path of a file (plain text, JSON lines, CSV with a header), or several; or batches that the model
            takes. For accuracy batches are mappings with ``labels``, or pairs of an input and its labels.
        metric: one of ``perplexity``, ``similarity``, ``embedding_similarity``, ``rank``, ``spearman``, ``accuracy``,
            or a function that is called with the model and the data, one file at a time, and returns a number; None
            for all that a file gives, and for what fits batches best.
        dense: the dense model, to compare with.
        tokenizer: of transformers, for files.
        pooling: how the states of tokens become the embedding of a sentence; None for their mean, and for what a
            SentenceTransformer does. A causal language model with a pooling is measured as an encoder.
        sequence_length: the most tokens of an input; None for the most that the model takes, at most 2048.
        progress: called with a description, and how many batches of how many are done.

    Returns:
        The figures, each beside that of the dense model.

    Raises:
        RecipeError: a metric that the data does not give.
        StatisticsError: data that cannot be read, with the line; or that does not fit the model.

    Example:
        >>> import torch, secateur
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2, bias=False))
        >>> _ = torch.nn.init.eye_(model[0].weight)
        >>> batches = [(torch.eye(4)[:3], torch.tensor([0, 1, 1]))]
        >>> secateur.evaluate(model, batches)["accuracy"]
        0.6666666666666666
    """
    began = time.perf_counter()
    instance("model", model, nn.Module)
    files = _files(data)
    figures: list[Figure] = []
    notes: list[str] = []
    if callable(metric):
        figures = [_own(metric, model, dense, place) for place in (files if files is not None else [data])]
    elif files is None:
        batches = list(_batches(data))
        figures = [measure_batches(model, batches, metric, dense, pooling or Pooling(), progress)]
    else:
        wanted = None if metric is None else [one_of("metric", metric, METRICS)]
        reading = _reading(model, tokenizer, pooling, sequence_length)
        read = [place if isinstance(place, DataFile) else read_data(place) for place in files]
        for inputs in [Inputs.of(file, reading, dense is not None, wanted) for file in read]:
            before = None if dense is None else run_dense(inputs, dense, progress)
            measured = measure(inputs, model, before, progress)
            figures += measured.figures
            notes += measured.notes
    return EvaluationReport(
        tuple(figures),
        type(model).__name__,
        "" if dense is None else type(dense).__name__,
        time.perf_counter() - began,
        tuple(notes),
        versions(),
    )


def _files(data: Any) -> list[Any] | None:
    """The files that were given; None for batches."""
    if isinstance(data, str | Path | DataFile):
        return [data]
    if isinstance(data, list | tuple) and data and all(isinstance(entry, str | Path | DataFile) for entry in data):
        return list(data)
    return None


def _batches(data: Any) -> Iterable[Any]:
    if not isinstance(data, Iterable) or hasattr(data, "shape") or hasattr(data, "keys"):
        raise TypeError(
            f"data must be a path, several, or an iterable of batches, got one {type(data).__name__}; wrap a batch in "
            "a list"
        )
    batches = list(data)
    if not batches:
        raise StatisticsError("data is empty: there is nothing to measure on.")
    return batches


def _own(metric: Callable[[nn.Module, Any], float], model: nn.Module, dense: nn.Module | None, data: Any) -> Figure:
    """The figure that a function of the user gives."""
    name = getattr(metric, "__name__", type(metric).__name__)
    values = []
    for part in (model, dense):
        if part is not None:
            found = metric(part, data)
            try:
                values.append(float(found.detach() if isinstance(found, Tensor) else found))
            except (TypeError, ValueError):
                raise TypeError(f"metric must return a number, got {type(found).__name__}") from None
    file = Path(data).name if isinstance(data, str | Path) else ""
    return Figure(name, values[0], values[1] if dense is not None else None, file=file)


def _reading(model: nn.Module, tokenizer: Any, pooling: Pooling | None, length: int | None) -> Reading:
    """How a model reads the text of a file."""
    sentences = is_sentence_transformer(model)
    if tokenizer is None and sentences:
        tokenizer = model.tokenizer
    if tokenizer is None:
        raise RecipeError(
            "a file has text, and there is nothing that makes tokens of it. Give tokenizer=, such as "
            "transformers.AutoTokenizer.from_pretrained(...)."
        )
    config = getattr(model, "config", None)
    limits = {
        "model_max_length": getattr(tokenizer, "model_max_length", None),
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
    }
    own = getattr(model, "max_seq_length", None) if sentences else None
    longest = longest_window(type(model).__name__, {**limits, "max_seq_length": own})
    if length is not None and not 16 <= length <= longest:
        raise RecipeError(f"sequence_length must be between 16 and the {longest} tokens of the model, got {length}.")
    causal = is_language_model(type(model).__name__) and pooling is None
    return Reading(tokenizer, length or longest, causal, pooling or Pooling())
