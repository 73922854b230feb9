"""Read text as token windows that a model of a directory takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur._checks import one_of
from secateur._errors import RecipeError, StatisticsError
from secateur.calibration import SELECTIONS, Windows, longest_window, padded, quiet
from secateur.evaluation import device_of
from secateur.files import ModelDirectory
from secateur.huggingface._loading import is_causal, load_tokenizer


@dataclass(frozen=True)
class CalibrationText:
    """The text that a method is calibrated on.

    Args:
        path: plain text, or JSON lines with a ``text`` field.
        samples: windows taken from the text.
        sequence_length: tokens in a window; None for the longest that the model takes, at most 2048.
        seed: of the draw.
        select: ``"random"`` draws the windows; ``"diverse"`` draws eight times as many, and takes those of them that
            hold most different tokens, rare ones above all.

    Raises:
        RecipeError: no such way to select.
    """

    path: Path
    samples: int = 128
    sequence_length: int | None = None
    seed: int = 0
    select: str = "random"

    def __post_init__(self) -> None:
        one_of("selection of windows", self.select, SELECTIONS)

    def provenance(self, length: int) -> dict[str, Any]:
        """Return what the report says of the text, given the length of windows that was used."""
        table = {"file": self.path.name, "samples": self.samples, "sequence_length": length, "seed": self.seed}
        return table if self.select == "random" else {**table, "select": self.select}

    def check_random(self) -> None:
        """Check that nothing but chance is to select, for what reads sentences in place of windows.

        Raises:
            RecipeError: something else is.
        """
        if self.select != "random":
            raise RecipeError(
                f"select={self.select!r} takes windows of tokens by what they hold, but here sentences are read, which "
                "are drawn at random.\nLeave select out."
            )


class TextReader:
    """Cuts texts into windows for one model.

    Args:
        model: that will read them.
        directory: with its tokenizer.
        length: of the windows in tokens; None for the longest that the model takes, at most 2048.
        most: tokens of a window where no length is asked for; None for as many as the model takes.

    Raises:
        RecipeError: the model takes no windows of that length.
        FormatError: there is no tokenizer, or the directory limits the length to what is no number of tokens.
    """

    def __init__(
        self, model: nn.Module, directory: ModelDirectory, length: int | None, most: int | None = None
    ) -> None:
        self._model = model
        self._tokenizer = load_tokenizer(directory)
        self._special_tokens = not is_causal(directory)
        self.length = window_length(directory, self._tokenizer, model.config, length, most)

    def windows(self, text: str, source: Path) -> Windows:
        """Return a text as windows."""
        return Windows(self._tokenizer, text, self.length, self._special_tokens, source=str(source))

    def sample(self, text: str, calibration: CalibrationText) -> list[Tensor]:
        """Return as many windows of a text as are to be calibrated on.

        Raises:
            StatisticsError: the text has too few.
        """
        windows = self.windows(text, calibration.path)
        return windows.sample(calibration.samples, calibration.seed, calibration.select)

    def padded(self, texts: Sequence[str], batch_size: int) -> list[dict[str, Tensor]]:
        """Return texts as padded batches of neighbours in length, from short to long. What is too long is cut."""
        return [batch for _, batch in padded(self._tokenizer, texts, self.length, batch_size)]

    def tried(self, windows: list[Tensor]) -> list[Tensor]:
        """Return the windows after running the one with the highest token id.

        Raises:
            StatisticsError: the model does not take ids that high, or windows that long.
        """
        window = max(windows, key=lambda ids: int(ids.max()))
        try:
            with quiet(self._model):
                self._model(input_ids=window[None].to(device_of(self._model)))
        except Exception as error:
            raise StatisticsError(
                f"the model fails on a window of {len(window)} tokens with ids up to {int(window.max())}: {error}\n"
                "Give a shorter --sequence-length; check that the model reads text and that the tokenizer is its own."
            ) from None
        return windows


def window_length(
    directory: ModelDirectory, tokenizer: Any, config: Any, asked: int | None, most: int | None = None
) -> int:
    """Return the tokens in a window: what was asked for, or the most that the model takes, at most 2048.

    Args:
        directory: of the model, for errors.
        tokenizer: of the model.
        config: of transformers.
        asked: tokens, or None.
        most: where nothing is asked.

    Raises:
        RecipeError: the model takes no windows of that length.
        FormatError: the directory limits the length to what is no number of tokens.
    """
    limits = {"model_max_length": tokenizer.model_max_length}
    limits["max_position_embeddings"] = getattr(config, "max_position_embeddings", None)
    longest = longest_window(directory.path, limits)
    if asked is not None and asked > longest:
        raise RecipeError(f"--sequence-length {asked} is more than the {longest} tokens that the model takes.")
    return asked or min(longest, most or longest)
