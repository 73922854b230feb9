"""Text for calibration and evaluation: read from a file, tokenised, cut into windows."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur._errors import StatisticsError


def read_text(path: str | Path) -> str:
    """Return the text in a file: plain, or JSON lines (``.jsonl``, ``.json``) with a ``text`` field in each.

    Raises:
        StatisticsError: no such file, not UTF-8, not JSON lines, or no text in it.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8-sig")  # a byte order mark is not text
    except OSError as error:
        raise StatisticsError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise StatisticsError(f"{path} is not UTF-8 text. Give plain text, or JSON lines with a text field.") from None
    if path.suffix in (".jsonl", ".json"):
        content = "\n\n".join(_text_fields(path, content))
    if not content.strip():
        raise StatisticsError(f"{path} holds no text. Give a file with text of the sort that the model was trained on.")
    return content


def _text_fields(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), 1):  # splitlines also cuts at characters that JSON may hold
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise StatisticsError(f"{path}, line {number}: not JSON: {error}.") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise StatisticsError(f'{path}, line {number}: expected an object with a "text" field, {{"text": "..."}}.')
        if not entry["text"].isascii() and any("\ud800" <= character <= "\udfff" for character in entry["text"]):
            raise StatisticsError(
                f"{path}, line {number}: the text has half of a surrogate pair, which is not a character."
            )
        yield entry["text"]


class Windows:
    """A text as token windows of one length, consecutive and without padding.

    Args:
        tokenizer: of the transformers library.
        text: to cut.
        length: tokens in a window, special tokens included.
        special_tokens: put the tokenizer's own around each window ([CLS] ... [SEP]), as encoders expect. Language
            models are calibrated and measured on running text without them.
        source: what an error message calls the text.

    Raises:
        StatisticsError: the text has fewer than two tokens, or windows have no room for any.
    """

    def __init__(
        self, tokenizer: Any, text: str, length: int, special_tokens: bool = False, source: str = "the text"
    ) -> None:
        prefix, suffix = _special_tokens(tokenizer) if special_tokens else ([], [])
        self._room = length - len(prefix) - len(suffix)
        if self._room < 2:
            raise StatisticsError(
                f"a sequence length of {length} leaves room for {self._room} tokens; use at least 16."
            )
        ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        if len(ids) < 2:
            raise StatisticsError(f"{source} has {len(ids)} tokens; give a longer one.")
        self._prefix, self._suffix = torch.tensor(prefix, dtype=torch.long), torch.tensor(suffix, dtype=torch.long)
        self._ids = torch.tensor(ids)
        self._source = source
        self.length = length

    @property
    def num_tokens(self) -> int:
        """Tokens of the text, special tokens not counted."""
        return len(self._ids)

    def all(self) -> Iterator[Tensor]:
        """Yield every window, ``[length]``, in order; the last may be shorter."""
        for part in self._ids.split(self._room):
            if len(part) > 1:
                yield torch.cat([self._prefix, part, self._suffix])

    def sample(self, count: int, seed: int) -> list[Tensor]:
        """Return ``count`` different full windows, drawn at random.

        Raises:
            StatisticsError: the text has too few, with what would fit.
        """
        available = len(self._ids) // self._room
        if available < count:
            shorter = len(self._ids) // count // 16 * 16
            fits = [f"--samples {available}"] * bool(available) + [f"--sequence-length {shorter}"] * bool(shorter)
            raise StatisticsError(
                f"{self._source} is too short: its {self.num_tokens:,} tokens make {available} windows of {self.length}"
                f", but {count} were asked.\nUse {' or '.join([*fits, 'a longer text'])}."
            )
        starts = sorted(random.Random(seed).sample(range(available), count))
        return [
            torch.cat([self._prefix, self._ids[start * self._room : (start + 1) * self._room], self._suffix])
            for start in starts
        ]


def batched(windows: list[Tensor], tokens: int = 4096) -> Iterator[Tensor]:
    """Stack neighbours of equal length into ``[batch, length]``, about ``tokens`` tokens at a time."""
    batch: list[Tensor] = []
    for window in windows:
        if batch and (len(window) != len(batch[0]) or (len(batch) + 1) * len(window) > tokens):
            yield torch.stack(batch)
            batch = []
        batch.append(window)
    if batch:
        yield torch.stack(batch)


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if bare and full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []
