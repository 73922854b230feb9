"""Batches of items of mixed length: every item once, within the limits, and put back in order."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur import RecipeError, bucket

LENGTHS = st.lists(st.integers(1, 40), max_size=30)
LIMITS = st.one_of(
    st.fixed_dictionaries({"batch_size": st.integers(1, 9)}),
    st.fixed_dictionaries({"max_tokens": st.integers(52, 200)}),
    st.fixed_dictionaries({"batch_size": st.integers(1, 9), "max_tokens": st.integers(52, 200)}),
)
ROUNDING = st.fixed_dictionaries(
    {"multiple_of": st.integers(1, 13)}, optional={"max_length": st.integers(40, 60)}
)  # 40 rounded up to a multiple of 13 is 52


@given(LENGTHS, LIMITS, ROUNDING)
def test_every_item_is_in_one_batch_within_the_limits(lengths, limits, rounding):
    buckets = bucket(lengths, **limits, **rounding)
    assert sorted(buckets.order) == list(range(len(lengths)))
    multiple, longest = rounding["multiple_of"], rounding.get("max_length", 10**9)
    for indices, length in buckets:
        assert length == min(-(-max(lengths[index] for index in indices) // multiple) * multiple, longest)
        assert 0 < len(indices) <= limits.get("batch_size", 10**9)
        assert len(indices) * length <= limits.get("max_tokens", 10**9)
    assert buckets == bucket(torch.tensor(lengths, dtype=torch.long), **limits, **rounding)
    assert 0 <= buckets.padding < 1


@given(LENGTHS, LIMITS, ROUNDING)
def test_batches_are_full_and_sorted(lengths, limits, rounding):
    buckets = bucket(lengths, **limits, **rounding)
    assert [lengths[index] for index in buckets.order] == sorted(lengths, reverse=True)
    for length in {batch.length for batch in buckets}:  # few shapes: one for each length, and the last batch
        sizes = {len(batch.indices) for batch in buckets[:-1] if batch.length == length}
        most = [limits.get("batch_size", 10**9), limits.get("max_tokens", 10**9) // length]
        assert sizes <= {min(most)}
    equal = [index for index in buckets.order if lengths[index] == max(lengths)]
    assert equal == sorted(equal)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=10), st.integers(12, 30))
def test_no_cut_of_the_sorted_items_has_fewer_batches(lengths, most):
    """The slow truth: the fewest batches for the first items, from the fewest for fewer of them."""
    ordered = sorted(lengths, reverse=True)
    fewest = [0]
    for end in range(1, len(ordered) + 1):
        fits = [start for start in range(end) if (end - start) * ordered[start] <= most]
        fewest.append(1 + min(fewest[start] for start in fits))
    assert len(bucket(lengths, max_tokens=most)) == fewest[-1]


@given(LENGTHS, LIMITS)
def test_outputs_come_back_in_order(lengths, limits):
    buckets = bucket(lengths, **limits)
    assert [buckets.order[at] for at in buckets.inverse] == list(range(len(lengths)))
    rows = [torch.tensor([[index, lengths[index]] for index in indices]) for indices, _ in buckets]
    wanted = [[index, length] for index, length in enumerate(lengths)]
    for outputs in (rows, iter(rows), [row.numpy() for row in rows], [row.tolist() for row in rows]):
        found = buckets.restore(outputs)
        assert (found if isinstance(found, list) else found.tolist()) == wanted
    if lengths:
        assert isinstance(buckets.restore(rows), torch.Tensor)
        assert isinstance(buckets.restore([row.numpy() for row in rows]), np.ndarray)


def test_outputs_for_each_token_come_back_as_a_list():
    buckets = bucket([3, 1, 3, 2], 2)
    states = [torch.zeros(len(indices), length, 8) for indices, length in buckets]
    assert [len(entry) for entry in buckets.restore([list(output) for output in states])] == [3, 2, 3, 2]
    with pytest.raises(RecipeError, match=r"\(3, 8\), \(2, 8\).*list\(output\)"):
        buckets.restore(states)


def test_a_sequence_of_batches():
    buckets = bucket([1, 5, 2, 4], batch_size=2, multiple_of=4, max_length=5)
    assert list(buckets) == [((1, 3), 5), ((2, 0), 4)]
    assert (buckets[-1].length, len(buckets), buckets[:1]) == (4, 2, (((1, 3), 5),))
    assert list(reversed(buckets)) == [((2, 0), 4), ((1, 3), 5)]
    assert str(buckets) == "Buckets(4 items, 2 batches, 33.3% padding)"
    assert bucket([], 8).restore([]) == []
    assert bucket(np.array([2, 1], np.int32), 8) == bucket([np.int64(2), np.int32(1)], 8) == bucket((2, 1), 8)


WRONG = {
    "no limit": (lambda: bucket([1]), RecipeError, "Give batch_size=, max_tokens= or both"),
    "texts": (lambda: bucket(["a text"], 2), TypeError, "item 0 is a str.*number of tokens"),
    "one text": (lambda: bucket("a text", 2), TypeError, "got str"),
    "token ids": (lambda: bucket([[1, 2]], 2), TypeError, "item 0 is a list.*number of tokens"),
    "one number": (lambda: bucket(torch.tensor(3), 2), TypeError, "one number: 3"),
    "a matrix": (lambda: bucket(torch.ones(2, 2).long(), 2), TypeError, "item 0 is a list"),
    "floats": (lambda: bucket([1, 2.5], 2), TypeError, "item 1 must be an int"),
    "an empty item": (lambda: bucket([4, 0], 2), RecipeError, "item 1 must be at least 1"),
    "an item beyond the budget": (
        lambda: bucket([4, 9], max_tokens=10, multiple_of=6), RecipeError, "item 1 alone has 12 tokens.*max_tokens=12"
    ),
    "an item beyond the model": (lambda: bucket([4, 9], 2, max_length=8), RecipeError, "item 1 has 9.*truncation"),
    "a batch of nothing": (lambda: bucket([4], 0), RecipeError, "batch_size must be at least 1"),
    "no tokens": (lambda: bucket([4], max_tokens=0), RecipeError, "max_tokens must be at least 1"),
    "no multiple": (lambda: bucket([4], 1, multiple_of=0), RecipeError, "multiple_of must be at least 1"),
    "a share": (lambda: bucket([4], 1, multiple_of=1.5), TypeError, "multiple_of must be an int"),
    "too few outputs": (lambda: bucket([4, 3], 1).restore([[1]]), RecipeError, "1 batches, but there are 2"),
    "too many entries": (
        lambda: bucket([4, 3], 1).restore([[1], [2, 3]]), RecipeError, "batch 1 has 2 entries, but its batch has 1"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_mistakes(case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call()
