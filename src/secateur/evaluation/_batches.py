"""Measure a model on batches: for models that do not read text, and for users with their own loaders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur._checks import one_of
from secateur._errors import RecipeError, StatisticsError
from secateur._types import Progress
from secateur.calibration import fit_arguments
from secateur.evaluation._measure import IncomparableError, check_shapes, similarity
from secateur.evaluation._metrics import METRICS
from secateur.evaluation._pooling import Pooling
from secateur.evaluation._quality import perplexity
from secateur.evaluation._ranks import cosines, pair_cosines, spearman
from secateur.evaluation._run import class_scores_of, device_of, embeddings_of, is_language_model, outputs_of, states_of
from secateur.reports import Figure

_LABELS = ("labels", "label")
_OF_BATCHES = ("perplexity", "similarity", "embedding_similarity", "rank", "accuracy")


def measure_batches(
    model: nn.Module,
    batches: Sequence[Any],
    metric: str | None,
    dense: nn.Module | None,
    pooling: Pooling,
    progress: Progress,
) -> Figure:
    """Return a figure of a model on batches, beside that of the dense model.

    Args:
        model: to run.
        batches: what the model takes. For accuracy mappings with ``labels``, or pairs of an input and its labels.
        metric: its name; None for similarity with a dense model, else perplexity of a language model, else accuracy.
        dense: the dense model, or None.
        pooling: of outputs ``[batch, length, hidden]``, for the metrics that compare embeddings.
        progress: called with a description, and how many batches of how many are done.

    Raises:
        RecipeError: there is no such metric, or it needs a dense model.
        StatisticsError: a batch or an output that does not fit the metric.
    """
    name = _default(model, batches, dense) if metric is None else one_of("metric", metric, _OF_BATCHES)
    known = METRICS[name]
    if known.equal is not None and dense is None:
        raise RecipeError(f"{name} compares with the dense model, and there is none. Give it with dense=.")

    def figure(value: float, count: int, before: float | None, unit: str = known.unit) -> Figure:
        return Figure(name, value, before, count, unit, known.higher_is_better)

    if known.equal is None:
        own = perplexity if name == "perplexity" else _accuracy
        before = None if dense is None else own(dense, _counted(batches, "the dense model", progress))[0]
        value, count = own(model, _counted(batches, "the model", progress))
        return figure(value, count, before)
    assert dense is not None
    inputs = fit_arguments(model, list(batches), device_of(model)).batches
    others = outputs_of(dense, inputs)
    found = outputs_of(model, _counted(inputs, "both models", progress))
    try:
        if name == "similarity":
            value, count = similarity((states_of(output).detach().float().cpu() for output, _ in others), found)
            return figure(value, count, known.equal, "rows")
        first, second = (
            torch.cat([embeddings_of(output, batch, pooling) for output, batch in outputs])
            for outputs in (others, found)
        )
        if name == "rank":
            return figure(100 * spearman(pair_cosines(first), pair_cosines(second)), len(second), known.equal, "rows")
        check_shapes(first, second)
        return figure(float(cosines(first, second).mean()), len(second), known.equal, "rows")
    except IncomparableError as reason:
        raise StatisticsError(f"no {name}: {reason}.\nAsk for another metric, such as rank.") from None


def _default(model: nn.Module, batches: Sequence[Any], dense: nn.Module | None) -> str:
    if dense is not None:
        return "similarity"
    if is_language_model(type(model).__name__):
        return "perplexity"
    if batches and all(_label_of(batch) is not None for batch in batches):
        return "accuracy"
    raise RecipeError(
        "there is nothing to measure: the batches have no labels, the model is no language model, and there is no "
        "dense model to compare with.\nGive dense=, or a function: metric=lambda model, data: ..."
    )


def _label_of(batch: Any) -> Tensor | None:
    """The labels in a batch, or None."""
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in _LABELS if name in batch), None)
    else:
        found = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
    return found if isinstance(found, Tensor) and not found.is_floating_point() else None


def _accuracy(model: nn.Module, batches: Iterator[Any]) -> tuple[float, int]:
    right = count = 0
    labels: list[Tensor] = []

    def inputs() -> Iterator[Any]:
        for index, batch in enumerate(batches):
            label = _label_of(batch)
            if label is None:
                raise StatisticsError(
                    f"batch {index} has no labels: accuracy needs mappings with 'labels', or pairs of an input and its "
                    "labels, which are integers."
                )
            labels.append(label)
            rest = isinstance(batch, Mapping)
            yield {name: value for name, value in batch.items() if name not in _LABELS} if rest else batch[0]

    for output, _ in outputs_of(model, inputs()):
        scores, expected = class_scores_of(output).argmax(-1).cpu(), labels.pop().cpu()
        if scores.shape != expected.shape:
            raise StatisticsError(f"{list(expected.shape)} labels for {list(scores.shape)} predictions of the model.")
        right += int((scores == expected).sum())
        count += len(expected)
    return right / max(count, 1), count


def _counted(batches: Sequence[Any], what: str, progress: Progress) -> Iterator[Any]:
    for index, batch in enumerate(batches):
        progress(f"measuring {what}", index, len(batches))
        yield batch
