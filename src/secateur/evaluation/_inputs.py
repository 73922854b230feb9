"""A file as what a model takes: tokenized once for all models that are compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from secateur._errors import RecipeError, naming
from secateur.calibration import Windows, batched, padded, split_sentences
from secateur.evaluation._data_file import DataFile
from secateur.evaluation._metrics import kind_figures
from secateur.evaluation._pooling import Pooling

MAX_SENTENCES = 1000  # of a text for embeddings: all pairs of them are 499,500
_BATCH = 32

Padded: TypeAlias = Sequence[tuple[tuple[int, ...], Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Reading:
    """How a model reads text.

    Args:
        tokenizer: of transformers.
        length: the most tokens in a window of running text.
        causal: whether it is measured as a causal language model.
        pooling: of sentences.
        sentence_length: the most tokens of a sentence; None for ``length``.
    """

    tokenizer: Any
    length: int
    causal: bool
    pooling: Pooling = Pooling()  # noqa: RUF009 - it is frozen
    sentence_length: int | None = None


@dataclass(frozen=True)
class Inputs:
    """A file as what a model takes: tokenized once for all models that are compared.

    Args:
        data: the file.
        metrics: that are measured.
        pooling: of sentences.
        windows: running text as token ids, ``[batch, length]`` each; for perplexity and similarity.
        sentences: padded batches with the indices of their sentences.
        used: sentences, and of how many.
        pairs: for each pair of sentences the indices of both.
    """

    data: DataFile
    metrics: tuple[str, ...]
    pooling: Pooling
    windows: tuple[Tensor, ...] = ()
    sentences: Padded = ()
    used: tuple[int, int] = (0, 0)
    pairs: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, data: DataFile, reading: Reading, has_dense: bool, metrics: Iterable[str] | None = None) -> Inputs:
        """Return a file as what a model takes.

        Args:
            data: the file.
            reading: how the model reads.
            has_dense: whether there will be a dense model to compare with.
            metrics: to measure; None for all that the file gives.

        Raises:
            RecipeError: the file does not give such a figure.
            StatisticsError: there is too little text.
        """
        gives = kind_figures(data.kind, reading.causal, has_dense, str(data.path))
        wanted = gives if metrics is None else tuple(metrics)
        if absent := [name for name in wanted if name not in gives]:
            raise RecipeError(
                f"{data.path} has {data.kind}, which gives {', '.join(gives)} for this model, not {', '.join(absent)}."
                "\nAsk for one of these, or give another file."
            )
        length = reading.sentence_length or reading.length
        with naming(data.path):
            if data.kind == "text":
                return cls._of_text(data, reading, wanted, length)
            texts = list(dict.fromkeys((*data.texts, *data.others)))
            places = {text: index for index, text in enumerate(texts)}
            pairs = [(places[one], places[other]) for one, other in zip(data.texts, data.others, strict=False)]
            if data.kind == "labels":
                texts = list(data.texts)  # each has a label of its own, twice the same text, too
            batches = padded(reading.tokenizer, texts, length, _BATCH)
            return cls(data, wanted, reading.pooling, (), batches, (len(texts), len(texts)), tuple(pairs))

    @classmethod
    def _of_text(cls, data: DataFile, reading: Reading, wanted: tuple[str, ...], length: int) -> Inputs:
        windows: tuple[Tensor, ...] = ()
        if {"perplexity", "similarity"} & set(wanted):
            cut = Windows(reading.tokenizer, data.text, reading.length, not reading.causal)
            windows = tuple(batched(list(cut.all())))
        batches: Padded = ()
        used = (0, 0)
        if {"embedding_similarity", "rank"} & set(wanted):
            sentences = list(dict.fromkeys(split_sentences(data.text)))
            chosen = evenly(sentences, MAX_SENTENCES)
            used = (len(chosen), len(sentences))
            batches = padded(reading.tokenizer, chosen, length, _BATCH) if chosen else ()
        return cls(data, wanted, reading.pooling, windows, batches, used)

    @property
    def needs_head(self) -> bool:
        """Whether the model is run with its head, though it is no language model."""
        return "accuracy" in self.metrics


def evenly(items: Sequence[str], most: int) -> list[str]:
    """Return at most so many of the items, evenly spread, in order."""
    count = min(most, len(items))
    return [items[index * len(items) // count] for index in range(count)]
