import math

import numpy as np
import pytest
import reference
import torch

from secateur import LayerStatistics, StatisticsError
from secateur.calibration._gather import RowSums

BOTH = frozenset({"input_norm", "gram"})
ALL = BOTH | {"input_mean"}
NEEDS = [{"gram"}, {"input_norm"}, {"input_mean"}, BOTH, ALL]


def inputs(groups=1, tokens=20, size=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(groups, tokens, size, generator=generator, dtype=torch.float64).to(dtype)


def gather(*batches, needs=BOTH):
    sums = RowSums(needs)
    for batch in batches:
        sums.add(batch)
    return statistics_of(sums)


def statistics_of(sums):
    return LayerStatistics(sums.tokens, **sums.results())


@pytest.mark.parametrize("batches", [[20], [7, 13], [1] * 20, [0, 20, 0]], ids=str)
def test_batches_add_up_to_the_sum_over_tokens(batches):
    rows = inputs()
    statistics = gather(*rows.split(batches, dim=1), needs=ALL)
    assert statistics.tokens == 20
    torch.testing.assert_close(statistics.input_mean[0], torch.from_numpy(reference.input_means(rows[0].numpy())))
    torch.testing.assert_close(statistics.gram[0], torch.from_numpy(reference.gram(rows[0].numpy())))
    norm = torch.from_numpy(reference.input_norms(rows[0].numpy()))
    torch.testing.assert_close(statistics.input_norm[0].double(), norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("needs", [set(), *NEEDS], ids=sorted)
def test_only_what_was_asked_for_is_gathered(needs):
    statistics = gather(inputs(), needs=needs)
    assert {need for need in ALL if getattr(statistics, need) is not None} == needs


@pytest.mark.parametrize("needs", NEEDS, ids=sorted)
def test_parts_merge_into_the_whole_and_copies_stay_apart(needs):
    rows = inputs(groups=2)
    whole, empty, part = RowSums(needs), RowSums(needs), RowSums(needs)
    whole.add(rows[:, :7])
    part.add(rows[:, 7:])
    before = whole.copy()
    whole.merge(part)
    whole.merge(empty)
    empty.merge(part)
    for merged, expected in ((whole, rows), (before, rows[:, :7]), (part, rows[:, 7:]), (empty, rows[:, 7:])):
        got, truth = statistics_of(merged), gather(expected, needs=needs)
        assert got.tokens == truth.tokens
        for need in needs:
            torch.testing.assert_close(got.require(need), truth.require(need))


def test_norm_is_the_same_with_and_without_the_gram():
    torch.testing.assert_close(gather(inputs()).input_norm, gather(inputs(), needs={"input_norm"}).input_norm)


@pytest.mark.parametrize("needs", NEEDS, ids=sorted)
def test_groups_are_gathered_apart(needs):
    rows = inputs(groups=3)
    together = gather(*rows.split([6, 14], dim=1), needs=needs)
    assert together.tokens == 20
    for group in range(3):
        alone = gather(rows[group : group + 1], needs=needs)
        for need in needs:
            torch.testing.assert_close(together.require(need)[group], alone.require(need)[0])


@pytest.mark.parametrize("needs", NEEDS, ids=sorted)
@pytest.mark.parametrize(
    ("value", "dtype"), [(1000.0, torch.float16), (-60000.0, torch.float16), (1e15, torch.bfloat16)]
)
def test_half_precision_inputs_do_not_overflow(value, dtype, needs):
    """Sixty-four squares of 1000 are 6.4e7; float16 ends at 65504."""
    rows = torch.full((1, 64, 2), value, dtype=dtype)
    statistics = gather(rows, needs=needs)
    exact = rows[0, 0, 0].item()
    if "input_norm" in needs:
        assert statistics.input_norm.dtype == torch.float32
        torch.testing.assert_close(statistics.input_norm, torch.full((1, 2), 8 * abs(exact)))
    if "input_mean" in needs:
        assert statistics.input_mean.dtype == torch.float64
        torch.testing.assert_close(statistics.input_mean, torch.full((1, 2), exact, dtype=torch.float64))
    if "gram" in needs:
        assert statistics.gram.dtype == torch.float32
        torch.testing.assert_close(statistics.gram, torch.full((1, 2, 2), 64 * exact**2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_sums_do_not_stall(dtype):
    """A running sum in bfloat16 stops at 256, where adding 1 no longer changes it; in float16 at 2048."""
    statistics = gather(*[torch.ones(1, 1, 2, dtype=dtype)] * 3000, needs=ALL)
    assert (statistics.input_mean == 1).all()
    torch.testing.assert_close(statistics.input_norm, torch.full((1, 2), math.sqrt(3000)))
    torch.testing.assert_close(statistics.gram, torch.full((1, 2, 2), 3000.0))


def test_float64_inputs_keep_float64_grams():
    assert gather(inputs()).gram.dtype == torch.float64


@pytest.mark.parametrize("needs", [set(), BOTH], ids=sorted)
@pytest.mark.parametrize(
    ("bad", "dtype"),
    [(math.nan, torch.float16), (math.inf, torch.bfloat16), (-math.inf, torch.float32), (math.nan, torch.float64)],
    ids=str,
)
def test_inputs_that_are_not_finite_are_refused(bad, dtype, needs):
    rows = inputs(groups=2, dtype=dtype)
    rows[1, 19, 4] = rows[0, 3, 1] = bad
    with pytest.raises(StatisticsError, match="2 of 200 input values are NaN or infinite"):
        RowSums(needs).add(rows)


def test_a_refused_batch_leaves_no_trace():
    sums = RowSums(BOTH)
    sums.add(inputs())
    with pytest.raises(StatisticsError):
        sums.add(inputs().fill_(math.nan))
    after, without = statistics_of(sums), gather(inputs())
    assert after.tokens == without.tokens
    assert torch.equal(after.gram, without.gram)
    assert torch.equal(after.input_norm, without.input_norm)


def test_large_finite_inputs_are_not_called_infinite():
    """Squared, 1e25 leaves float32; the value itself and its norm do not."""
    statistics = gather(torch.full((1, 4, 3), 1e25), needs={"input_norm"})
    torch.testing.assert_close(statistics.input_norm, torch.full((1, 3), 2e25))


@pytest.mark.parametrize("batches", [[], [torch.ones(1, 0, 3)]], ids=["no batch", "no token"])
def test_statistics_of_nothing_are_refused(batches):
    with pytest.raises(StatisticsError, match="no calibration input ever reached it"):
        gather(*batches)


@pytest.mark.parametrize("needs", NEEDS, ids=sorted)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inputs_are_neither_changed_nor_differentiated(needs, dtype):
    rows = inputs(dtype=dtype).requires_grad_()
    before = rows.detach().clone()
    statistics = gather(rows, rows, needs=needs)
    assert torch.equal(rows, before)
    assert not any(statistics.require(need).requires_grad for need in needs)


@pytest.mark.parametrize("needs", NEEDS, ids=sorted)
def test_what_happens_to_inputs_afterwards_does_not_matter(needs):
    """Few rows wait for others before they are multiplied, and a model may write to its tensors meanwhile."""
    rows = inputs(tokens=2)
    expected = gather(rows.clone(), rows.clone(), needs=needs)
    sums = RowSums(needs)
    for _ in range(2):
        lent = rows.clone()
        sums.add(lent)
        lent.zero_()
    for need in needs:
        torch.testing.assert_close(statistics_of(sums).require(need), expected.require(need))


@pytest.mark.parametrize("size", [1, 7, 127, 128, 129, 300, 1100])
@pytest.mark.parametrize("tokens", [[3], [3, 2000, 1], [1200, 1300], [600, 600, 600]], ids=str)
def test_a_gram_in_stripes_is_whole_and_symmetric(size, tokens):
    rows = inputs(groups=2, tokens=sum(tokens), size=size)
    sums = RowSums({"gram"})
    for some in rows.split(tokens, dim=1):
        part = RowSums({"gram"})
        part.add(some)
        sums.merge(part)
    for _ in range(2):  # asking changes nothing
        gram = sums.results()["gram"]
        assert torch.equal(gram, gram.mT)
        torch.testing.assert_close(gram, rows.mT @ rows)
    sums.merge(part)
    torch.testing.assert_close(sums.results()["gram"], rows.mT @ rows + some.mT @ some)


@pytest.mark.parametrize("where", [0, -1])
def test_long_inputs_are_read_in_parts_and_refused_as_a_whole(where):
    rows = inputs(tokens=3000, size=400, dtype=torch.float32)
    whole = gather(rows, needs=ALL)
    torch.testing.assert_close(whole.input_norm, rows.double().norm(dim=1).float())
    torch.testing.assert_close(whole.input_mean, rows.double().mean(1))
    sums = RowSums(ALL)
    sums.add(rows)
    rows[0, where, where] = math.nan
    with pytest.raises(StatisticsError, match="1 of 1200000 input values"):
        sums.add(rows)
    assert statistics_of(sums).tokens == 3000
    assert torch.equal(statistics_of(sums).input_mean, whole.input_mean)


@pytest.mark.parametrize("groups", [1, 3])
def test_require_adds_the_group_dimension(groups):
    rows = inputs(groups=groups)
    statistics = gather(rows)
    assert statistics.require("gram").shape == (groups, 5, 5)
    assert statistics.require("input_norm").shape == (groups, 5)
    bare = LayerStatistics(20, input_norm=statistics.input_norm[0], gram=statistics.gram[0])
    assert torch.equal(bare.require("gram"), statistics.gram[:1])
    assert torch.equal(bare.require("input_norm"), statistics.input_norm[:1])


@pytest.mark.parametrize("need", [*sorted(ALL), "input_gradients"])
def test_a_statistic_that_was_not_gathered_is_named(need):
    with pytest.raises(StatisticsError, match=f"'{need}' was not gathered"):
        LayerStatistics(tokens=1).require(need)


def test_reference_gram_is_x_transposed_x():
    rows = inputs()[0].numpy()
    np.testing.assert_allclose(reference.gram(rows), rows.T @ rows, rtol=1e-12)
