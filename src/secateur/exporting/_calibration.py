"""Inputs from which an engine takes the ranges of numbers that it rounds to 8 bits."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur._errors import StatisticsError
from secateur.calibration import read_text, split_sentences
from secateur.exporting._inputs import Inputs
from secateur.exporting._opened import default_of
from secateur.files import ModelDirectory
from secateur.huggingface import CalibrationText, TextReader

_LONGEST = 256  # tokens of a sentence, unless more are asked for
_AT_ONCE = 32  # sentences


def named(inputs: Inputs, batches: Iterable[Any]) -> Iterator[dict[str, Tensor]]:
    """Yield batches as all inputs of an exported model by name.

    Args:
        inputs: of the model.
        batches: each as the model takes it. What may be left out gets its default, and what the model does not take is
            left out.

    Raises:
        StatisticsError: a batch lacks an input.
    """
    described = {entry.name: entry for entry in inputs.described()}
    for number, batch in enumerate(batches):
        if isinstance(batch, Mapping):
            given = {name: tensor for name, tensor in batch.items() if name in described}
        else:
            values = [batch] if isinstance(batch, Tensor) else list(batch)
            given = dict(zip(inputs.names, values, strict=False))
        missing = [name for name, entry in described.items() if name not in given and not entry.default]
        if missing:
            raise StatisticsError(
                f"calibration batch {number} lacks {', '.join(missing)}. Give batches as the model takes them."
            )
        defaults = {name: default_of(entry)(given) for name, entry in described.items() if name not in given}
        whole = {**given, **defaults}
        yield {name: whole[name].detach().cpu().to(tensor.dtype) for name, tensor in inputs.tensors.items()}


def sentences_of(model: nn.Module, path: Path, text: CalibrationText) -> list[dict[str, Tensor]]:
    """Return sentences of a text as padded batches.

    Args:
        model: of transformers, that reads them.
        path: of its directory, with its tokenizer.
        text: as many sentences of it are drawn as it asks for samples.

    Raises:
        StatisticsError: the text cannot be read, or has no sentence.
        RecipeError: the model takes no sentences of that length.
    """
    text.check_random()
    found = split_sentences(read_text(text.path))
    if not found:
        raise StatisticsError(f"{text.path} has no sentence. Give a text like those that the model will read.")
    drawn = random.Random(text.seed).sample(found, min(text.samples, len(found)))
    reader = TextReader(model, ModelDirectory(path, {}, (), {}), text.sequence_length, most=_LONGEST)
    return reader.padded(drawn, _AT_ONCE)
