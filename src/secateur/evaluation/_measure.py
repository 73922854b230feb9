"""Measure a model on a file: what a dense model gave is kept, so that several models can be compared with it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import StatisticsError, naming
from secateur._types import Progress
from secateur.evaluation._data_file import DataFile
from secateur.evaluation._inputs import Inputs
from secateur.evaluation._metrics import METRICS
from secateur.evaluation._quality import perplexity
from secateur.evaluation._ranks import cosines, pair_cosines, spearman
from secateur.evaluation._run import (
    KeptTensors,
    as_float32,
    body_of,
    class_scores_of,
    embeddings_of,
    outputs_of,
    states_of,
)
from secateur.reports import Figure

_MOST_CLASSES = 1 << 31
_FEWEST = 3  # sentences, whose pairs have an order


@dataclass(frozen=True, eq=False)
class DenseOutcome:
    """What a dense model gave for a file. It holds no model.

    Args:
        figures: by the names of the metrics.
        states: of its tokens for each batch of windows, where similarity is measured.
        embeddings: of sentences, ``[sentences, width]``.
    """

    figures: Mapping[str, float]
    states: KeptTensors | None
    embeddings: Tensor | None


@dataclass(frozen=True)
class Measured:
    """The figures of a model on a file, and what could not be measured."""

    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()


def run_dense(inputs: Inputs, model: nn.Module, progress: Progress = lambda what, done, total: None) -> DenseOutcome:
    """Run the dense model and return what others are compared with. The model is not kept.

    Args:
        inputs: the file, as the model takes it.
        model: to run; with its head for accuracy.
        progress: called with a description, and how many batches of how many are done.

    Raises:
        StatisticsError: the model fails on the text, or does not give what is measured.
    """
    with naming(inputs.data.path):
        counted = _Counted(inputs, "measuring the dense model", progress)
        figures = {}
        states = None
        if "similarity" in inputs.metrics:
            states = KeptTensors()
            for output, _ in outputs_of(body_of(model), counted(inputs.windows)):
                states.append(states_of(output))
        embeddings = _embeddings(inputs, model, counted)
        for name in inputs.metrics:
            if (equal := METRICS[name].equal) is not None:
                figures[name] = equal
            else:
                figures[name] = _own(inputs, name, model, embeddings, counted)[0]
        return DenseOutcome(figures, states, embeddings)


def measure(
    inputs: Inputs,
    model: nn.Module,
    dense: DenseOutcome | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Measured:
    """Run a model and return its figures, beside those of the dense model.

    Args:
        inputs: the file, as the model takes it.
        model: to run; with its head for accuracy.
        dense: what :func:`run_dense` gave for the same inputs; None without a dense model.
        progress: called with a description, and how many batches of how many are done.

    Raises:
        StatisticsError: the model fails on the text, or does not give what is measured.
    """
    with naming(inputs.data.path):
        counted = _Counted(inputs, "measuring the model", progress)
        figures: list[Figure] = []
        notes: list[str] = []
        embeddings = _embeddings(inputs, model, counted)
        for name in inputs.metrics:
            try:
                if METRICS[name].equal is None:
                    value, count = _own(inputs, name, model, embeddings, counted)
                else:
                    value, count = _compared(inputs, name, model, embeddings, dense, counted)
            except IncomparableError as reason:
                notes.append(f"{inputs.data.path.name}: no {name.replace('_', ' ')}: {reason}")
                continue
            figures.append(_figure(inputs, name, value, count, dense))
        return Measured(tuple(figures), tuple(notes))


def _figure(inputs: Inputs, name: str, value: float, count: int, dense: DenseOutcome | None) -> Figure:
    metric, note = METRICS[name], []
    if name in ("rank", "embedding_similarity") and inputs.used[0] < inputs.used[1]:
        note.append(f"{inputs.used[0]:,} of {inputs.used[1]:,} sentences, evenly spread")
    if name == "rank":
        note.append(f"all {inputs.used[0] * (inputs.used[0] - 1) // 2:,} pairs of sentences")
    if math.isnan(value):
        note.append("not a number: the outputs are not finite, or all cosines are the same")
    before = None if dense is None else dense.figures.get(name)
    file = inputs.data.path.name
    return Figure(name, value, before, count, metric.unit, metric.higher_is_better, file, "; ".join(note))


def _embeddings(inputs: Inputs, model: nn.Module, counted: _Counted) -> Tensor | None:
    if inputs.needs_head or not inputs.sentences:
        return None
    found: Tensor | None = None
    batches = counted([batch for _, batch in inputs.sentences])
    outputs = outputs_of(body_of(model), batches)
    for (indices, _), (output, batch) in zip(inputs.sentences, outputs, strict=True):
        rows = embeddings_of(output, batch, inputs.pooling)
        found = torch.empty(inputs.used[0], rows.shape[1]) if found is None else found
        found[list(indices)] = rows
    return found


def _own(
    inputs: Inputs, name: str, model: nn.Module, embeddings: Tensor | None, counted: _Counted
) -> tuple[float, int]:
    """A figure that needs no other model, and what it was measured on."""
    if name == "perplexity":
        return perplexity(model, counted(inputs.windows))
    if name == "accuracy":
        return _accuracy(inputs, model, counted)
    assert embeddings is not None  # of pairs
    first, second = (torch.tensor(side) for side in zip(*inputs.pairs, strict=True))
    scores = torch.tensor(inputs.data.scores, dtype=torch.float64)
    return 100 * spearman(cosines(embeddings[first], embeddings[second]), scores), len(scores)


def _compared(
    inputs: Inputs,
    name: str,
    model: nn.Module,
    embeddings: Tensor | None,
    dense: DenseOutcome | None,
    counted: _Counted,
) -> tuple[float, int]:
    """A figure that says how close a model is to the dense one, and what it was measured on."""
    assert dense is not None  # kind_figures saw to it
    if name == "similarity":
        assert dense.states is not None
        return similarity(dense.states, outputs_of(body_of(model), counted(inputs.windows)))
    if embeddings is None or dense.embeddings is None:
        raise IncomparableError("the text has no sentence")
    if name == "rank":
        if len(embeddings) < _FEWEST:
            raise IncomparableError(f"it takes {_FEWEST} different sentences, and the text has {len(embeddings)}")
        return 100 * spearman(pair_cosines(dense.embeddings), pair_cosines(embeddings)), len(embeddings)
    check_shapes(dense.embeddings, embeddings)
    return float(cosines(dense.embeddings, embeddings).mean()), len(embeddings)


def _accuracy(inputs: Inputs, model: nn.Module, counted: _Counted) -> tuple[float, int]:
    labels = class_numbers(inputs.data, getattr(model, "config", None))
    right = 0
    for (indices, _), (output, _) in zip(
        inputs.sentences, outputs_of(model, counted([batch for _, batch in inputs.sentences])), strict=True
    ):
        scores = class_scores_of(output)
        expected = labels[list(indices)]
        if int(expected.max()) >= scores.shape[1]:
            place = next(i for i in indices if int(labels[i]) >= scores.shape[1])
            raise StatisticsError(
                f"line {inputs.data.lines[place]}: label {int(labels[place])}, but the model has {scores.shape[1]} "
                "classes, numbered from 0. Correct the label, or give the model that it belongs to."
            )
        right += int((scores.argmax(-1).cpu() == expected).sum())
    return right / len(labels), len(labels)


class IncomparableError(Exception):
    """Two models whose outputs cannot be compared, with the reason."""


class _Counted:
    """Batches that tell of their progress."""

    def __init__(self, inputs: Inputs, description: str, progress: Progress) -> None:
        self._description = f"{description} on {inputs.data.path.name}"
        self._progress = progress

    def __call__(self, batches: Sequence[Any]) -> Iterator[Any]:
        for index, batch in enumerate(batches):
            self._progress(self._description, index, len(batches))
            yield batch


def class_numbers(data: DataFile, config: Any) -> Tensor:
    """Return the labels of a file as numbers of classes, int64 ``[texts]``.

    Args:
        data: a file of labels.
        config: of the model, whose ``id2label`` has the names; None for a model without.

    Raises:
        StatisticsError: a label that is no class of the model, with its line.
    """
    known = getattr(config, "id2label", None)
    names = {str(name): int(number) for number, name in known.items()} if isinstance(known, Mapping) else {}
    found = []
    for label, line in zip(data.labels, data.lines, strict=True):
        number = names.get(label) if isinstance(label, str) else label
        if number is None and isinstance(label, str) and re.fullmatch(r"[0-9]{1,9}", label):
            number = int(label)  # a name that is a number goes before
        if number is None or not 0 <= number < _MOST_CLASSES or (names and number not in names.values()):
            classes = ", ".join(f"{number} = {name}" for name, number in list(names.items())[:10]) or "has no names"
            raise StatisticsError(
                f"line {line}: label {label!r:.60} is no class of the model ({classes}). Give the number or the name "
                "of a class, as id2label of the config has them."
            )
        found.append(number)
    return torch.tensor(found)


def similarity(dense: Iterable[Tensor], outputs: Iterable[tuple[Any, Any]]) -> tuple[float, int]:
    """Return the mean cosine of two models' outputs over rows, which are tokens where there are any, and their number.

    Args:
        dense: states of the dense model for each batch.
        outputs: what the other model returned, and the batch, whose ``attention_mask`` says what is padding.

    Raises:
        IncomparableError: the outputs have other shapes.
    """
    total, count = 0.0, 0
    for kept, (output, batch) in zip(dense, outputs, strict=True):
        before, after = kept, as_float32(states_of(output))
        check_shapes(before, after)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if after.ndim > 3:  # of images, say
            before, after = before.flatten(1), after.flatten(1)
        each = nn.functional.cosine_similarity(before, after, dim=-1)
        if mask is not None and mask.shape == each.shape:
            each = each[mask.cpu().bool()]
        total += float(each.sum(dtype=torch.float64))
        count += each.numel()
    return total / max(count, 1), count


def check_shapes(dense: Tensor, tensor: Tensor) -> None:
    """Raise :class:`IncomparableError` unless two outputs have the same shape."""
    if dense.shape != tensor.shape:
        raise IncomparableError(
            f"the dense model gives {list(dense.shape)}, this one {list(tensor.shape)}, and only outputs of the same "
            "shape are compared"
        )
