import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from secateur import RecipeError, StatisticsError
from secateur.calibration import Windows, batched, read_text
from secateur.calibration._diverse import most_diverse
from secateur.huggingface import CalibrationText


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


# Windows by what they hold


def slow_most_diverse(windows, count):
    """Greedy covering with exact fractions, every gain computed anew for every window that is taken."""
    windows = [window.tolist() for window in windows]
    often = Counter(token for window in windows for token in window)
    chosen = []
    while len(chosen) < count:
        covered, begun = set(), False
        while len(chosen) < count:
            gains = {
                place: sum(Fraction(1, often[token]) for token in set(window) - covered)
                for place, window in enumerate(windows)
                if place not in chosen
            }
            if begun and not any(gains.values()):
                break
            best = max(gains, key=lambda place: (gains[place], -place))
            chosen.append(best)
            covered |= set(windows[best])
            begun = True
    return sorted(chosen)


@pytest.mark.parametrize("vocabulary", [5, 40, 4000], ids=lambda size: f"{size} tokens")
@pytest.mark.parametrize("count", [1, 7, 30])
def test_the_most_diverse_windows_are_those_of_slow_greedy_covering(vocabulary, count):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        rank = torch.rand(30, 12, generator=generator, dtype=torch.float64)
        windows = list((vocabulary**rank).long() + 1000)  # few are frequent, and ids have gaps
        chosen = most_diverse(windows, count)
        assert chosen == slow_most_diverse(windows, count)
        assert len(set(chosen)) == count


def test_a_window_that_holds_what_another_one_held_already_is_not_taken():
    """Scored each by itself, the first two would win: both hold nothing but rare tokens, and the same ones."""
    windows = [torch.tensor(ids) for ids in ([1, 2, 3], [1, 2, 3], [7, 7, 8], [9, 9, 9], [9, 9, 9])]
    assert most_diverse(windows, 1) == [0]
    assert most_diverse(windows, 2) == [0, 2]
    assert most_diverse(windows, 3) == [0, 2, 3]
    assert most_diverse(windows, 4) == [0, 1, 2, 3]  # covering begins anew
    assert most_diverse(windows, 5) == list(range(5))


def varied(words=4000):
    """A text of numbers in words, most of them frequent."""
    generator = torch.Generator().manual_seed(0)
    return " ".join(map(str, (3000 ** torch.rand(words, generator=generator)).long().tolist()))


class Numbers(Letters):
    """A tokenizer to which each number is a token."""

    def __call__(self, text, add_special_tokens=True, return_attention_mask=True, verbose=True):
        return {"input_ids": [int(word) for word in text.split()]}


def test_diverse_samples_hold_more_different_tokens_and_are_full_windows_of_the_text():
    windows = Windows(Numbers(), varied(), 16)
    whole = [tuple(window.tolist()) for window in windows.all()]
    for seed in range(3):
        random, diverse = (windows.sample(12, seed, select) for select in ("random", "diverse"))
        assert len(torch.cat(diverse).unique()) > 1.1 * len(torch.cat(random).unique())
        places = [whole.index(tuple(window.tolist())) for window in diverse]
        assert places == sorted(set(places))
        assert len(places) == 12
        assert [w.tolist() for w in diverse] == [w.tolist() for w in windows.sample(12, seed, "diverse")]
    assert [w.tolist() for w in windows.sample(12, 0, "diverse")] != [w.tolist() for w in diverse]


def test_of_all_windows_the_seed_draws_nothing():
    windows = Windows(Numbers(), varied(), 16)
    ids = [[window.tolist() for window in windows.sample(40, seed, "diverse")] for seed in range(2)]
    assert ids[0] == ids[1]  # 250 windows are fewer than eight for each


def test_diverse_samples_of_a_long_text_come_from_pieces_of_it():
    tokenizer = Counting()
    long = " ".join(map(str, range(800_000)))
    drawn = letters(Windows(tokenizer, long, 64).sample(4, 0, "diverse"))
    assert tokenizer.given < 8 * 20_000
    assert len(set(drawn)) == 4
    assert all(len(window) == 64 and window in long for window in drawn)


def test_too_few_windows_and_unknown_ways_are_errors():
    windows = Windows(Letters(), TEXT, 4)
    assert len(windows.sample(6, 0, "diverse")) == 6
    with pytest.raises(StatisticsError, match="26 tokens make 6 windows of 4, but 7 were asked"):
        windows.sample(7, 0, "diverse")
    for make in (lambda: windows.sample(2, 0, "divers"), lambda: CalibrationText(Path("a.txt"), select="divers")):
        with pytest.raises(RecipeError, match="unknown selection of windows 'divers'; did you mean 'diverse'"):
            make()
