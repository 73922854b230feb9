"""Text as sentences, and sentences as padded batches."""

import pytest
import torch

from secateur import StatisticsError
from secateur.calibration import padded, split_sentences

CASES = {
    "two sentences": ("This is the first one. This is the second one.", 2),
    "marks with a space before them": ("This is the first one . This is the second one !", 2),
    "a quote closes": ('"This is the first one." Then there was silence.', 2),
    "an initial": ("The president, J. R. Smith, came to the town.", 1),
    "a title": ("Dr. Smith came to the town.", 1),
    "a number": ("It weighs 3.5 tons, or 3,500 kg.", 1),
    "a number in front": ("1. The first of all the items", 1),
    "lower case follows": ("It was late, i.e. after midnight, etc. and so on.", 1),
    "lower case of another script": ("Ήρθε στις 5 μ.μ. και έφυγε μετά από λίγο.", 1),
    "three dots": ("I wonder about it... Nobody knows.", 2),
    "Chinese": ("今天天气很好我们去公园。明天会下雨所以在家里。", 2),
    "lines": ("a line of text\nanother line of text\n", 2),
    "lines without letters": ("a line of text\n = = \n12 34\n\n", 1),
    "nothing": ("\n  \n", 0),
}


@pytest.mark.parametrize("case", CASES)
def test_text_is_cut_at_the_ends_of_sentences(case):
    text, count = CASES[case]
    found = split_sentences(text)
    assert len(found) == count, found
    assert all(sentence in text for sentence in found)


@pytest.mark.parametrize("case", [case for case in CASES if "without" not in case])
def test_no_letter_is_lost(case):
    text, _ = CASES[case]
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


class Characters:
    """A tokenizer of characters, with one token before each text and one after."""

    def __init__(self, pad=0, mask=True, special=True):
        self.pad_token_id, self.mask, self.special = pad, mask, special

    def __call__(self, texts, truncation, max_length, padding, verbose):
        assert truncation
        assert not padding
        room = max_length - 2 * self.special
        rows = [[ord(character) for character in text[:room] if character != "~"] for text in texts]
        rows = [[1, *row, 2] if self.special else row for row in rows]
        table = {"input_ids": rows, "token_type_ids": [[3] * len(row) for row in rows]}
        return {**table, "attention_mask": [[1] * len(row) for row in rows]} if self.mask else table


TEXTS = ["bbbb", "a", "cccccccccc", "dd", "ee"]


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("pad", [0, 7, None])
def test_batches_have_neighbours_in_length_and_a_mask(pad, mask):
    batches = padded(Characters(pad, mask), TEXTS, length=8, batch_size=2)
    assert [indices for indices, _ in batches] == [(1,), (3, 4), (2, 0)]
    for indices, batch in batches:
        real = batch["attention_mask"].bool()
        assert real.sum(1).tolist() == [min(len(TEXTS[index]) + 2, 8) for index in indices]
        assert int(real.sum(1).max()) == real.shape[1]  # no column is all padding
        assert (batch["input_ids"][~real] == (pad or 0)).all()
        assert (batch["token_type_ids"][~real] == 0).all()
        for index, row, kept in zip(indices, batch["input_ids"], real, strict=True):
            assert row[kept].tolist() == [1, *map(ord, TEXTS[index][:6]), 2]
        assert {tensor.dtype for tensor in batch.values()} == {torch.long}


@pytest.mark.parametrize(("texts", "message"), [([], "no text"), (["a", "~"], "'~' has no token")])
def test_texts_that_make_no_batch(texts, message):
    with pytest.raises(StatisticsError, match=message):
        padded(Characters(special=False), texts, 8, 2)
