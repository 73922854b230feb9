"""Text for calibration and evaluation: read from a file, tokenised, cut into windows."""

from __future__ import annotations

import json
import random
import re
import stat
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur._checks import one_of
from secateur._errors import FormatError, StatisticsError
from secateur.calibration._diverse import most_diverse

_LONGEST = 2048  # tokens in a window, where nobody asks for more


def read_text(path: str | Path) -> str:
    """Return the text in a file: plain, or JSON lines (``.jsonl``, ``.json``) with a ``text`` field in each.

    Raises:
        StatisticsError: no such file, not UTF-8, not JSON lines, or no text in it.
    """
    path = Path(path)
    content = read_file(path)
    if path.suffix in (".jsonl", ".json"):
        content = "\n\n".join(_text_fields(path, content))
    if not content.strip():
        raise StatisticsError(f"{path} holds no text. Give a file with text of the sort that the model was trained on.")
    return content


def read_file(path: Path) -> str:
    """Return the characters in a UTF-8 file, without a byte order mark.

    Raises:
        StatisticsError: no such file, or not UTF-8.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise StatisticsError(f"{path} is a device, which may have no end. Give a file.")
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is not text
    except OSError as error:
        raise StatisticsError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise StatisticsError(f"{path} is not UTF-8 text. Give plain text, or JSON lines with a text field.") from None


def json_lines(path: Path, content: str) -> Iterator[tuple[int, Any]]:
    """Yield the number of each line of a file, and the value that is in it.

    Args:
        path: of the file, for errors.
        content: of the file.

    Raises:
        StatisticsError: a line is not JSON.
    """
    for number, line in enumerate(content.split("\n"), 1):  # splitlines also cuts at characters that JSON may hold
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise StatisticsError(f"{path}, line {number}: not JSON: {error}.") from None


def _text_fields(path: Path, content: str) -> Iterator[str]:
    for number, entry in json_lines(path, content):
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise StatisticsError(f'{path}, line {number}: expected an object with a "text" field, {{"text": "..."}}.')
        if not entry["text"].isascii() and any("\ud800" <= character <= "\udfff" for character in entry["text"]):
            raise StatisticsError(
                f"{path}, line {number}: the text has half of a surrogate pair, which is not a character."
            )
        yield entry["text"]


SELECTIONS = ("random", "diverse")
_POOL = 8  # windows drawn for each that is taken
_WHOLE = 4_000_000  # characters; a text up to this length is always tokenised whole, in seconds
_PIECE = 32  # characters for each token that is needed; usual texts have 3 to 5


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
        self._prefix, self._suffix = torch.tensor(prefix, dtype=torch.long), torch.tensor(suffix, dtype=torch.long)
        self._tokenizer, self._text, self._source = tokenizer, text, source
        self.length = length
        if len(text) <= _WHOLE and len(self._ids) < 2:
            raise StatisticsError(f"{source} has {len(self._ids)} tokens; give a longer one.")

    @cached_property
    def _ids(self) -> Tensor:
        return self._tokens(self._text)

    def _tokens(self, text: str) -> Tensor:
        found = self._tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return torch.tensor(found["input_ids"], dtype=torch.long)

    @property
    def num_tokens(self) -> int:
        """Tokens of the text, special tokens not counted."""
        return len(self._ids)

    def all(self) -> Iterator[Tensor]:
        """Yield every window, ``[length]``, in order; the last may be shorter."""
        for part in self._ids.split(self._room):
            if len(part) > 1:
                yield torch.cat([self._prefix, part, self._suffix])

    def sample(self, count: int, seed: int, select: str = "random") -> list[Tensor]:
        """Return ``count`` different full windows, in the order of the text.

        ``"random"`` draws them. ``"diverse"`` draws eight times as many, or all where there are fewer, and takes those
        of them that hold most of their vocabulary, see :func:`most_diverse`.

        A long text of which only a small part is needed is not tokenised whole. It is cut into pieces of 32 characters
        for each token of a window, pieces are drawn, and each gives the window at its beginning.

        Raises:
            RecipeError: no such way to select.
            StatisticsError: the text has too few, with what would fit.
        """
        if one_of("selection of windows", select, SELECTIONS) == "random":
            return self._drawn(count, count, seed)
        drawn = self._drawn(count, _POOL * count, seed)
        return [drawn[place] for place in most_diverse(drawn, count)]

    def _drawn(self, count: int, most: int, seed: int) -> list[Tensor]:
        """Windows drawn at random: ``most`` of them, or all there are, if these are at least ``count``."""
        piece = _PIECE * self._room
        if len(self._text) > max(_WHOLE, 4 * most * piece):
            drawn = self._sample_pieces(most, seed, piece)
            if len(drawn) == most:
                return drawn  # else tokens are longer than that, and the whole text is tokenised
        available = len(self._ids) // self._room
        if available < count:
            shorter = len(self._ids) // count // 16 * 16
            fits = [f"--samples {available}"] * bool(available) + [f"--sequence-length {shorter}"] * bool(shorter)
            raise StatisticsError(
                f"{self._source} is too short: its {self.num_tokens:,} tokens make {available} windows of {self.length}"
                f", but {count} were asked.\nUse {' or '.join([*fits, 'a longer text'])}."
            )
        starts = sorted(random.Random(seed).sample(range(available), min(most, available)))
        return [
            torch.cat([self._prefix, self._ids[start * self._room : (start + 1) * self._room], self._suffix])
            for start in starts
        ]

    def _sample_pieces(self, count: int, seed: int, piece: int) -> list[Tensor]:
        starts = list(range(0, len(self._text) - piece + 1, piece))
        random.Random(seed).shuffle(starts)
        found: dict[int, Tensor] = {}
        for start in starts[: 2 * count]:
            words = self._text[start : start + piece]
            first = re.search(r"\s", words) if start else None  # the piece may begin within a word
            ids = self._tokens(words[first.start() :] if first else words)[: self._room]
            if len(ids) == self._room:
                found[start] = torch.cat([self._prefix, ids, self._suffix])
            if len(found) == count:
                break
        return [found[start] for start in sorted(found)]


def longest_window(where: object, limits: Mapping[str, Any]) -> int:
    """Return the most tokens in a window: the smallest of some limits, at most 2048.

    Args:
        where: the limits come from, for the error.
        limits: by their names; None and 0 are no limit.

    Raises:
        FormatError: a limit that is no number of tokens.
    """
    given = {name: value for name, value in limits.items() if value is not None and value != 0}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
            raise FormatError(
                f"{where}: {name} is {value!r:.40}; expected how many tokens the model takes. Correct it in "
                "tokenizer_config.json or config.json."
            )
    return int(min(_LONGEST, *given.values())) if given else _LONGEST


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
