"""Text as sentences, and sentences as padded batches: what encoders read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from secateur._errors import StatisticsError
from secateur.calibration._bucket import bucket

# A mark that ends a sentence, and quotes and brackets that close with it. Text that was cut into words has a space
# before the mark. The marks of Chinese and Japanese (full stop, exclamation and question mark) have no space after
# them.
_CLOSING = r"[\"'\u201d\u2019)\]]*"
# A single capital letter before a full stop is an initial.
_END = re.compile(rf"(?<!\b[A-Z])[.!?]{_CLOSING}\s+(?=[^\s.!?])|[\u3002\uff01\uff1f]{_CLOSING}\s*")
_LETTERS = 8  # a shorter piece, such as a number or a title, belongs to what follows


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text: its lines, cut where a mark ends a sentence. Lines without letters are left out.

    The rule is simple, and knows no abbreviations but short ones. It needs no model and no list of a language.

    Example:
        >>> from secateur.calibration import split_sentences
        >>> split_sentences("A first sentence. And a second one !\\nA line\\n = = \\n")
        ['A first sentence.', 'And a second one !', 'A line']
    """
    found: list[str] = []
    for line in text.splitlines():
        parts: list[str] = []
        for part in _cut(line.strip()):
            if parts and sum(map(str.isalnum, parts[-1])) < _LETTERS:
                parts[-1] = f"{parts[-1]} {part}"
            else:
                parts.append(part)
        found += [part for part in parts if any(map(str.isalpha, part))]
    return found


def _cut(line: str) -> list[str]:
    found = (match.end() for match in _END.finditer(line))
    ends = [0, *(end for end in found if not line[end : end + 1].islower()), len(line)]
    return [part for start, end in pairwise(ends) if (part := line[start:end].strip())]


def padded(
    tokenizer: Any, texts: Sequence[str], length: int, batch_size: int
) -> list[tuple[tuple[int, ...], dict[str, Tensor]]]:
    """Return texts as padded batches of neighbours in length, so that little of a batch is padding.

    Args:
        tokenizer: of transformers. Special tokens are added, and what is longer is cut.
        texts: not empty.
        length: the most tokens of a text, special ones counted.
        batch_size: texts in a batch.

    Returns:
        For each batch the indices of its texts, and what the model takes: ``input_ids`` and ``attention_mask``
        ``[batch, tokens]``, and what else the tokenizer gives. Batches go from short to long.

    Raises:
        StatisticsError: there are no texts, or one without a token.
    """
    if not texts:
        raise StatisticsError("there is no text to cut into batches.")
    given = tokenizer(list(texts), truncation=True, max_length=length, padding=False, verbose=False)
    sizes = [len(ids) for ids in given["input_ids"]]
    if 0 in sizes:
        raise StatisticsError(
            f"the text {texts[sizes.index(0)]!r:.60} has no token of the tokenizer, and a model cannot read that. "
            "Leave it out."
        )
    batches = []
    for chosen, longest in reversed(bucket(sizes, batch_size)):
        table: dict[str, Tensor] = {}
        for name in given:
            fill = _padding_id(tokenizer) if name == "input_ids" else 0
            rows = [list(given[name][index]) + [fill] * (longest - sizes[index]) for index in chosen]
            table[name] = torch.tensor(rows, dtype=torch.long)
        if "attention_mask" not in table:
            table["attention_mask"] = torch.tensor(
                [[1] * sizes[index] + [0] * (longest - sizes[index]) for index in chosen], dtype=torch.long
            )
        batches.append((chosen, table))
    return batches


def _padding_id(tokenizer: Any) -> int:
    """The token that fills up a batch; any will do for a tokenizer without one, because the mask hides it."""
    known = getattr(tokenizer, "pad_token_id", None)
    return known if isinstance(known, int) else 0
