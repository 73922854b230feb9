"""How the model in a directory reads the text that it is measured on. No weight is loaded."""

from __future__ import annotations

from pathlib import Path

from secateur._errors import FormatError, RecipeError
from secateur.evaluation import DataFile, Pooling, Reading, figures_of, read_data
from secateur.files import ModelDirectory, is_there, read_config
from secateur.huggingface._loading import is_causal, load_config, load_tokenizer
from secateur.huggingface._pooling import MODULES, pooling_of, sentence_length
from secateur.huggingface._text import window_length

# What of a text needs no embeddings of sentences.
_WITHOUT_POOLING = ("similarity",)


def is_measured_as_causal(directory: ModelDirectory) -> bool:
    """Return whether a directory is measured as a causal language model.

    One with a ``modules.json`` of sentence-transformers is an encoder of sentences, whatever class it is of.
    """
    return is_causal(directory) and not is_there(directory.path / MODULES)


def directory_figures(
    directory: ModelDirectory, file: DataFile | str | Path, has_dense: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the figures that a file gives for the model in a directory, and notes on what is left out.

    No model is loaded or run.

    Args:
        directory: of the model.
        file: to measure on.
        has_dense: whether there is a dense model to compare with.

    Raises:
        RecipeError: the file gives none, and why.
        StatisticsError: the file cannot be read.
        FormatError: the directory's ``modules.json`` is not what sentence-transformers writes.
    """
    data = file if isinstance(file, DataFile) else read_data(file)
    if directory.config.get("is_encoder_decoder") is True:
        raise RecipeError(
            f"{directory.path} is an encoder-decoder model, which reads pairs of texts, and is not measured on files.\n"
            "Measure it in Python: secateur.evaluate(model, data, metric=lambda model, data: ...)."
        )
    metrics = figures_of(data, is_measured_as_causal(directory), has_dense)
    if data.kind != "text" or metrics == ("perplexity",):
        return metrics, ()
    try:
        pooling_of(directory.path)
    except RecipeError as error:
        left_out = [name.replace("_", " ") for name in metrics if name not in _WITHOUT_POOLING]
        return _WITHOUT_POOLING, (f"{data.path.name}: no {' and no '.join(left_out)}: {error}",)
    return metrics, ()


def reading_of(directory: ModelDirectory, length: int | None = None, *, pools: bool = True) -> Reading:
    """Return how the model in a directory reads text: its tokenizer, length and pooling.

    Args:
        directory: of the model, dense, shrunk or packed.
        length: tokens in a window; None for the longest that the model takes, at most 2048.
        pools: whether embeddings of sentences are needed; if not, an unknown pooling is no mistake.

    Raises:
        RecipeError: the model takes no windows of that length, or its pooling is not known.
        FormatError: there is no tokenizer, or a file is not what it should be.
    """
    tokenizer = load_tokenizer(directory)
    try:
        config = load_config(directory.path)
    except ImportError:
        raise
    except Exception as error:  # whatever transformers makes of a config that it does not check
        raise FormatError(f"{directory.path} has a config that transformers cannot read: {error}") from None
    longest = window_length(directory, tokenizer, config, length)
    limit = sentence_length(directory.path)
    return Reading(
        tokenizer,
        longest,
        is_measured_as_causal(directory),
        (pooling_of(directory.path) if pools else None) or Pooling(),
        longest if limit is None else min(limit, longest),
    )


def directory_without_weights(path: str | Path) -> ModelDirectory:
    """Return a model directory of which only the config was read, for one whose weights may be packed.

    Raises:
        FormatError: it has no config.
    """
    path = Path(path)
    return ModelDirectory(path, read_config(path), (), {})
