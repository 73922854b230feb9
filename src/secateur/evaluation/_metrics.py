"""Which figures a file gives, and in which direction they are better."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from secateur._errors import RecipeError
from secateur.evaluation._data_file import DataFile, Kind, read_data


@dataclass(frozen=True)
class Metric:
    """What a figure is.

    Args:
        higher_is_better: else lower is.
        unit: what it is measured on.
        equal: its value for a model that is equal to the dense one; None where that depends on the model.
    """

    higher_is_better: bool
    unit: str
    equal: float | None = None


METRICS = {
    "perplexity": Metric(False, "tokens"),
    "similarity": Metric(True, "tokens", 1.0),
    "embedding_similarity": Metric(True, "sentences", 1.0),
    "rank": Metric(True, "sentences", 100.0),
    "spearman": Metric(True, "pairs"),
    "accuracy": Metric(True, "texts"),
}


def figures_of(file: DataFile | str | Path, causal: bool, has_dense: bool) -> tuple[str, ...]:
    """Return the names of the figures that a file gives for a model, without running it.

    Args:
        file: to measure on.
        causal: whether the model is a causal language model that is no sentence encoder.
        has_dense: whether there is a dense model to compare with.

    Raises:
        RecipeError: the file gives none, and why.
        StatisticsError: the file cannot be read.

    Example:
        >>> from secateur.evaluation import DataFile, figures_of
        >>> figures_of(DataFile("text.txt", "text"), causal=False, has_dense=True)
        ('similarity', 'embedding_similarity', 'rank')
    """
    data = file if isinstance(file, DataFile) else read_data(file)
    return kind_figures(data.kind, causal, has_dense, str(data.path))


def kind_figures(kind: Kind, causal: bool, has_dense: bool, source: str) -> tuple[str, ...]:
    """Return what :func:`figures_of` does for a kind of file.

    Args:
        kind: of the file.
        causal, has_dense: see :func:`figures_of`.
        source: what an error calls the file.
    """
    if kind == "text" and causal:
        return ("perplexity",)
    if causal:
        needs = "an encoder of sentences" if kind == "pairs" else "a model with a head for classification"
        raise RecipeError(
            f"{source} has {kind}, which need {needs}, but this is a causal language model, whose figure is "
            "perplexity.\nGive plain text; or in Python a pooling, which makes it an encoder."
        )
    if kind == "text" and not has_dense:
        raise RecipeError(
            f"{source} is plain text, which says how close an encoder is to the dense model, and there is none to "
            "compare with.\nGive it with --dense DENSE_DIR, in Python dense=; or give a file of pairs or labels."
        )
    return {"text": ("similarity", "embedding_similarity", "rank"), "pairs": ("spearman",), "labels": ("accuracy",)}[
        kind
    ]
