"""A text as the batches that the model of a directory learns from again."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import RecipeError, StatisticsError
from secateur.calibration import call_model, quiet, read_text, split_sentences
from secateur.files import ModelDirectory
from secateur.huggingface import CalibrationText, TextReader, is_causal

MOST_TOKENS = 256  # of a window or a sentence, unless more are asked for
SENTENCES = 64  # of a step
STEP_TOKENS = 2048  # of a step of windows
_LEAST_BATCHES = 10  # of a short text, so that a tenth of them can be held out


@dataclass(frozen=True)
class LearningText:
    """What a model learns from, in a few words and as batches.

    Args:
        batches: what the model takes, in an order in which neighbours may be alike.
        provenance: what the report says of them.
    """

    batches: Sequence[Mapping[str, Tensor]]
    provenance: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        directory: ModelDirectory,
        calibration: Path | CalibrationText,
        *,
        is_embedder: bool,
        sequence_length: int | None,
        batch_size: int | None,
        seed: int,
    ) -> LearningText:
        """Read a text for a model.

        Causal language models learn from windows of running text, all others from sentences, in batches of equal
        length.

        Args:
            model: that will read it.
            directory: of the model, with its tokenizer.
            calibration: a file, of which all is taken, or as many samples of it as are asked for.
            is_embedder: whether a causal language model is one of sentences, too.
            sequence_length: most tokens of a window or sentence; None for what the model takes, at most 256.
            batch_size: rows of a batch; None for 64 sentences, or windows of 2,048 tokens together. Fewer where the
                text is short.
            seed: of the order, and of the draw where there is one.

        Raises:
            StatisticsError: there is too little text, or the model cannot run it.
            RecipeError: the model reads pairs of texts, or no texts of that length.
        """
        if getattr(model.config, "is_encoder_decoder", False):
            raise RecipeError(
                f"{directory.path} is an encoder-decoder model, which reads pairs of texts, and a text file has no "
                "pairs.\nRecover it in Python: secateur.recover_(model, teacher, batches), batches such as "
                "{'input_ids': ..., 'attention_mask': ..., 'labels': ...}."
            )
        path, samples, select = calibration, None, "random"
        if isinstance(calibration, CalibrationText):
            path, samples, seed, select = calibration.path, calibration.samples, calibration.seed, calibration.select
            sequence_length = sequence_length or calibration.sequence_length
        assert isinstance(path, Path)
        text = read_text(path)
        reader = TextReader(model, directory, sequence_length, most=MOST_TOKENS)
        if is_causal(directory) and not is_embedder:
            what, batches = "windows", _windows(reader, text, path, samples, batch_size, seed, select)
        else:
            if isinstance(calibration, CalibrationText):
                calibration.check_random()
            what, batches = "sentences", _sentences(reader, text, path, samples, batch_size, seed)
        _try(model, batches)
        rows = [len(batch["input_ids"]) for batch in batches]
        provenance = {"file": path.name, what: sum(rows), "sequence_length": reader.length, "batch_size": max(rows)}
        return cls(batches, {**provenance, "seed": seed} | ({} if select == "random" else {"select": select}))


def _windows(
    reader: TextReader, text: str, path: Path, samples: int | None, batch_size: int | None, seed: int, select: str
) -> list[dict[str, Tensor]]:
    cut = reader.windows(text, path)
    windows = list(cut.all()) if samples is None else cut.sample(samples, seed, select)
    if len(windows) > 1 and len(windows[-1]) < len(windows[0]):
        windows.pop()  # the rest of the text
    _check_enough(len(windows), f"windows of {reader.length} tokens", path)
    random.Random(seed).shuffle(windows)  # neighbours in a text are alike, and a batch should be like the text
    size = batch_size or _size(len(windows), max(1, STEP_TOKENS // reader.length))
    return [{"input_ids": torch.stack(windows[start : start + size])} for start in range(0, len(windows), size)]


def _sentences(
    reader: TextReader, text: str, path: Path, samples: int | None, batch_size: int | None, seed: int
) -> list[dict[str, Tensor]]:
    sentences = list(dict.fromkeys(split_sentences(text)))  # one that is there twice could be held out and learned
    if samples is not None:
        if samples > len(sentences):
            raise StatisticsError(
                f"{path} has {len(sentences):,} different sentences, and {samples:,} samples were asked for.\n"
                "Ask for fewer with --samples, or leave it out to take all."
            )
        sentences = random.Random(seed).sample(sentences, samples)
    _check_enough(len(sentences), "different sentences", path)
    return reader.padded(sentences, batch_size or _size(len(sentences), SENTENCES))


def _size(rows: int, usual: int) -> int:
    return min(usual, max(1, rows // _LEAST_BATCHES))


def _check_enough(rows: int, what: str, path: Path) -> None:
    if rows < 2:
        raise StatisticsError(
            f"{path} has {rows} {what}; at least 2 are needed, one to learn from and one to measure on.\n"
            "Give a longer text of the sort that the model was trained on: a megabyte is a good start."
        )


def _try(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Run the row with the highest token id, and the longest one: a step of the training would say less."""
    device = next(model.parameters()).device
    highest = max(batches, key=lambda batch: int(batch["input_ids"].max()))
    for batch in (highest, batches[-1]):
        ids = batch["input_ids"]
        row = int(ids.amax(1).argmax())
        try:
            with quiet(model):
                call_model(model, {name: tensor[row : row + 1].to(device) for name, tensor in batch.items()})
        except Exception as error:
            raise StatisticsError(
                f"the model fails on a text of {ids.shape[1]} tokens with ids up to {int(ids[row].max())}: {error}\n"
                "Give a shorter --sequence-length; check that the model reads text and that the tokenizer is its own."
            ) from None
