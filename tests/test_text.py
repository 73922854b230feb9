import json
from pathlib import Path

import pytest
import torch

from secateur import StatisticsError
from secateur.calibration import Windows, batched, read_text


class Letters:
    """A tokenizer with a token a letter, and 1 ... 2 around each text."""

    def __call__(self, text, add_special_tokens=True, return_attention_mask=True, verbose=True):
        ids = [ord(letter) for letter in text]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


TEXT = "abcdefghijklmnopqrstuvwxyz"


def letters(windows):
    return ["".join(chr(token) for token in window.tolist()) for window in windows]


def test_all_windows_cover_the_text_once():
    assert "".join(letters(Windows(Letters(), TEXT, 4).all())) == TEXT
    assert [len(window) for window in Windows(Letters(), TEXT, 4).all()] == [4] * 6 + [2]


def test_a_last_window_of_one_token_predicts_nothing_and_is_dropped():
    assert letters(Windows(Letters(), TEXT, 5).all()) == ["abcde", "fghij", "klmno", "pqrst", "uvwxy"]


def test_special_tokens_surround_each_window():
    windows = list(Windows(Letters(), TEXT, 6, special_tokens=True).all())
    assert all(window[0] == 1 and window[-1] == 2 for window in windows)
    assert "".join(letters(window[1:-1] for window in windows)) == TEXT


def test_samples_are_different_full_windows_decided_by_the_seed():
    windows = Windows(Letters(), TEXT, 4)
    drawn = letters(windows.sample(5, seed=0))
    assert len(set(drawn)) == 5
    assert all(len(window) == 4 and window in TEXT for window in drawn)
    assert drawn == letters(windows.sample(5, seed=0))
    assert any(drawn != letters(windows.sample(5, seed=seed)) for seed in range(1, 4))


def test_too_short_a_text_says_what_would_fit():
    long = TEXT * 20  # 520 letters
    with pytest.raises(StatisticsError, match=r"520 tokens make 5 windows of 100.*8 were asked") as error:
        Windows(Letters(), long, 100, source="notes.txt").sample(8, 0)
    assert "notes.txt" in str(error.value)
    assert "--samples 5" in str(error.value)
    assert "--sequence-length 64" in str(error.value)
    assert len(Windows(Letters(), long, 64).sample(8, 0)) == 8  # the advice works
    assert len(Windows(Letters(), long, 100).sample(5, 0)) == 5
    with pytest.raises(StatisticsError, match=r"Use --samples 32 or a longer text"):
        Windows(Letters(), long, 16).sample(40, 0)


def test_json_lines_end_at_newlines_only_and_may_start_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False), encoding="utf-8-sig")
    assert read_text(path) == "a\u2028b\x85c"


def test_no_room_and_no_tokens():
    with pytest.raises(StatisticsError, match="leaves room for 1"):
        Windows(Letters(), TEXT, 3, special_tokens=True)
    with pytest.raises(StatisticsError, match="1 tokens"):
        Windows(Letters(), "a", 16)


def test_batches_hold_equal_lengths_and_keep_order():
    windows = [torch.full((length,), index) for index, length in enumerate([4, 4, 4, 2, 2, 4])]
    batches = list(batched(windows, tokens=8))
    assert [tuple(batch.shape) for batch in batches] == [(2, 4), (1, 4), (2, 2), (1, 4)]
    assert [int(row[0]) for batch in batches for row in batch] == list(range(6))


def test_plain_text_and_json_lines(tmp_path):
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("one\ntwo", encoding="utf-8")
    lines.write_text('{"text": "one"}\n\n{"text": "two", "id": 3}\n', encoding="utf-8")
    assert read_text(plain) == "one\ntwo"
    assert read_text(lines) == "one\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"  \n ", "holds no text"),
        ("a.txt", b"\xff\xfe\xff", "not UTF-8"),
        ("a.jsonl", b'{"text": "ok"}\n{"txt": "no"}', "line 2"),
        ("a.jsonl", b'{"text": 3}', "line 1"),
        ("a.jsonl", b"plain", "line 1: not JSON"),
        ("a.jsonl", json.dumps({"text": " "}).encode(), "holds no text"),
        ("a.jsonl", json.dumps({"text": "a \ud800 b"}).encode(), "line 1: the text has half of a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
    ],
)
def test_unusable_text_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(StatisticsError, match=message) as error:
        read_text(path)
    assert str(path) in str(error.value)


def test_missing_text(tmp_path):
    with pytest.raises(StatisticsError, match="cannot be read"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(StatisticsError, match="cannot be read"):
        read_text(tmp_path)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device")
def test_a_text_without_an_end():
    with pytest.raises(StatisticsError, match="is a device"):
        read_text("/dev/zero")


class Counting(Letters):
    """A tokenizer that counts the letters that it is given."""

    given = 0

    def __call__(self, text, **options):
        self.given += len(text)
        return super().__call__(text, **options)


@pytest.mark.parametrize("separator", [" ", ""])
def test_of_a_long_text_only_pieces_are_tokenised_for_a_few_samples(separator):
    tokenizer = Counting()
    long = separator.join(map(str, range(800_000)))  # one line of 5 million letters, no two windows alike
    windows = Windows(tokenizer, long, 64)
    drawn = letters(windows.sample(4, seed=0))
    assert tokenizer.given < 20_000
    assert len(set(drawn)) == 4
    assert all(len(window) == 64 and window in long for window in drawn)
    assert drawn == letters(Windows(Counting(), long, 64).sample(4, seed=0))
    assert tokenizer.given < 20_000
    assert windows.num_tokens == len(long)  # who asks for all of it gets it


class Words(Letters):
    """A tokenizer to which a word of any length is one token."""

    def __call__(self, text, add_special_tokens=True, return_attention_mask=True, verbose=True):
        return {"input_ids": [len(word) for word in text.split()]}


def test_a_long_text_of_very_long_tokens_is_tokenised_whole():
    long = " ".join("x" * (1000 + number) for number in range(5000))
    (window,) = Windows(Words(), long, 64).sample(1, seed=0)
    assert window.tolist() == list(range(int(window[0]), int(window[0]) + 64))


def test_too_short_a_long_text_is_still_said():
    with pytest.raises(StatisticsError, match="2 tokens make 0 windows"):
        Windows(Words(), "x" * 3_000_000 + " " + "y" * 3_000_000, 64).sample(1, seed=0)
