import copy
import dataclasses
import itertools
import math
import pickle

import numpy as np
import pytest
import reference
import torch
from cases import PATTERNS
from hypothesis import given
from hypothesis import strategies as st

import secateur
from secateur import NM, Block, Column, PatternError, Row, SparsityPattern, TransposableNM, Unstructured
from secateur.patterns import with_channel_width, with_scope
from secateur.patterns._select import _keep_top_narrow, _keep_top_wide, kth_smallest

STRUCTURED = [
    NM(2, 4),
    TransposableNM(1, 2),
    TransposableNM(1, 3),
    NM(1, 2),
    NM(0, 2),
    NM(3, 3),
    Block(2, 3),
    Block(1, 2),
    Row(),
    Column(),
    Column(3),
]
EMPTY = [(0, 12), (12, 0), (0, 0)]


def a_sparsity(pattern, otherwise=0.5):
    return otherwise if pattern.sparsity is None else pattern.sparsity


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sizes(limit):
    return st.integers(1, limit)


remainders = st.sampled_from(["error", "dense"])
patterns = st.one_of(
    st.builds(Unstructured, st.sampled_from([None, "layer", "row"])),
    st.integers(1, 40).flatmap(lambda m: st.builds(NM, st.integers(0, m), st.just(m), remainders)),
    st.integers(1, 6).flatmap(lambda m: st.builds(TransposableNM, st.integers(0, m), st.just(m), remainders)),
    st.builds(Block, sizes(9), sizes(9), remainders),
    st.builds(Row),
    st.builds(Column, sizes(9)),
)


@st.composite
def problems(draw):
    """A pattern, a matrix of scores that fits it, and a sparsity. Scores are exact in every dtype, with many ties."""
    pattern = draw(patterns.filter(lambda one: not isinstance(one, TransposableNM)))  # see test_transposable.py
    height, width = {Block: lambda p: (p.height, p.width), NM: lambda p: (1, p.m), Column: lambda p: (1, p.width)}.get(
        type(pattern), lambda p: (1, 1)
    )(pattern)
    dense = getattr(pattern, "remainder", "error") == "dense"
    rows = height * draw(st.integers(0, 4)) + (draw(st.integers(0, height - 1)) if dense else 0)
    columns = width * draw(st.integers(0, 4)) + (draw(st.integers(0, width - 1)) if dense else 0)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    levels = draw(st.sampled_from([1, 2, 4, 64]))
    low = draw(st.sampled_from([0, -levels // 2]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    scores = torch.randint(low, low + levels, (rows, columns), generator=generator).to(dtype)
    match draw(st.sampled_from(["contiguous", "transposed", "strided"])):
        case "transposed":
            scores = scores.T.contiguous().T
        case "strided":
            holder = torch.full((2 * rows, 3 * columns), -math.inf, dtype=dtype)
            holder[::2, 1::3] = scores
            scores = holder[::2, 1::3]
    return pattern, scores, a_sparsity(pattern, draw(st.floats(0, 1)))


# Patterns are values


@given(patterns)
def test_parse_inverts_str(pattern):
    assert SparsityPattern.parse(str(pattern)) == pattern


@given(patterns)
def test_repr_evaluates_to_the_pattern(pattern):
    assert eval(repr(pattern), vars(secateur)) == pattern


@given(patterns)
def test_copies_are_equal(pattern):
    for twin in (copy.copy(pattern), copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
        assert twin == pattern
        assert hash(twin) == hash(pattern)
        assert type(twin) is type(pattern)


@given(patterns, patterns)
def test_equality_is_that_of_the_text(first, second):
    assert (first == second) == (str(first) == str(second)) == (repr(first) == repr(second))


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(2, 4), Row(), Column()], ids=str)
def test_patterns_are_frozen(pattern):
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.anything = 1


def test_every_pattern_is_an_attribute_of_the_base_class():
    for made in (Unstructured, NM, Block, Row, Column):
        assert getattr(SparsityPattern, made.__name__) is getattr(secateur, made.__name__) is made


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("unstructured", Unstructured()),
        ("unstructured,scope=row", Unstructured("row")),
        ("2:4", NM(2, 4)),
        ("transposable:2:4", TransposableNM(2, 4)),
        ("transposable:1:8,remainder=dense", TransposableNM(1, 8, "dense")),
        ("2:4,remainder=dense", NM(2, 4, "dense")),
        ("block:16x8", Block(16, 8)),
        ("row", Row()),
        ("column", Column()),
        ("column:9", Column(9)),
        (" Block:4X8 , Remainder = Dense ", Block(4, 8, "dense")),
    ],
)
def test_parse_reads_the_documented_names(text, pattern):
    assert SparsityPattern.parse(text) == pattern


@pytest.mark.parametrize(
    "text",
    [
        *("", "2", "2:", ":4", "2:4:8", "-2:4", "2.0:4", "block", "block:4", "block:4x", "columns", "unstructured:2"),
        *("2:4,", "2:4,dense", "2:4,remainder=", "2:4,remainder=dense,remainder=dense", "2:4,n=3", "2:4,scope=row"),
        *("row,scope=row", "column,width=2"),
    ],
)
def test_parse_refuses_a_text_that_names_no_pattern(text):
    with pytest.raises(PatternError, match="names no pattern"):
        SparsityPattern.parse(text)


@pytest.mark.parametrize(
    "text", ["5:4", "0:0", "block:0x4", "column:0", "unstructured,scope=global", "2:4,remainder=x"]
)
def test_parse_refuses_an_impossible_pattern(text):
    with pytest.raises(PatternError, match="got"):
        SparsityPattern.parse(text)


@given(st.text(alphabet="unstrcedblokmw:x,=0123456789 ", max_size=30) | st.text(max_size=8))
def test_parse_of_any_text_is_a_pattern_or_a_pattern_error(text):
    try:
        pattern = SparsityPattern.parse(text)
    except PatternError:
        return
    assert SparsityPattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize("text", [None, 4, (2, 4), NM(2, 4)], ids=repr)
def test_parse_takes_text_only(text):
    with pytest.raises(TypeError, match="must be a str"):
        SparsityPattern.parse(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: NM(5, 4),
        lambda: NM(-1, 4),
        lambda: NM(0, 0),
        lambda: NM(1, -4),
        lambda: NM(2, 4, remainder="drop"),
        lambda: Block(0, 4),
        lambda: Block(4, 0),
        lambda: Block(4, 4, remainder=None),
        lambda: Column(0),
        lambda: Unstructured("global"),
    ],
)
def test_impossible_patterns_cannot_be_made(make):
    with pytest.raises(PatternError, match="got"):
        make()


@pytest.mark.parametrize(
    "make",
    [lambda: NM(2.0, 4), lambda: NM(True, 4), lambda: NM("2", 4), lambda: Block(4, None), lambda: Column(1.0)],
)
def test_sizes_are_ints(make):
    with pytest.raises(TypeError, match="must be an int"):
        make()


@pytest.mark.parametrize(
    ("pattern", "width", "sparsity"),
    [
        (Unstructured("row"), 1, None),
        (NM(1, 4), 4, 0.75),
        (NM(0, 2), 2, 1.0),
        (NM(3, 3), 3, 0.0),
        (Block(2, 3), 3, None),
        (Row(), None, None),
        (Column(), 1, None),
        (Column(9), 9, None),
    ],
    ids=str,
)
def test_width_and_sparsity_follow_from_the_structure(pattern, width, sparsity):
    assert (pattern.width, pattern.sparsity) == (width, sparsity)


def test_scope_and_channel_width_fill_in_only_what_was_left_open():
    assert with_scope(Unstructured(), "row") == Unstructured("row")
    assert with_scope(Unstructured("layer"), "row") == Unstructured("layer")
    assert with_scope(NM(2, 4), "row") == NM(2, 4)
    assert with_channel_width(Column(), 9) == Column(9)
    assert with_channel_width(Column(3), 9) == Column(3)
    assert with_channel_width(Row(), 9) == Row()


# Masks


@given(problems())
def test_mask_is_the_slow_truth(problem):
    """Exact counts, stable ties, dense remainders, empty matrices, every dtype and layout: all in one comparison."""
    pattern, scores, sparsity = problem
    before = scores.clone()
    mask = pattern.mask(scores, sparsity)
    expected = reference.mask(pattern, scores.double().numpy(), sparsity)
    assert mask.dtype == torch.bool
    np.testing.assert_array_equal(mask.numpy(), expected)
    pattern.check(mask)
    assert pattern.num_pruned(scores.shape, sparsity) == (~expected).sum()
    assert torch.equal(scores, before)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(1, 2), Block(6, 1), Block(1, 6), Row(), Column()], ids=str)
def test_mask_owns_every_element(pattern):
    """In a broadcast view one write would change several elements."""
    mask = pattern.mask(random(6, 12), a_sparsity(pattern))
    assert mask.is_contiguous()
    before = mask.clone()
    mask[0, 0] = ~mask[0, 0]
    assert int((mask != before).sum()) == 1


@given(problems())
def test_number_of_units_is_counted_per_competition(problem):
    pattern, scores, _ = problem
    for units in reference.competitions(pattern, *scores.shape):
        assert pattern.num_units(scores.shape) == len(units)


@pytest.mark.parametrize("pattern", [NM(0, 3), NM(1, 2), NM(1, 4), NM(2, 4), NM(3, 4), NM(4, 8), NM(5, 5)], ids=str)
def test_nm_is_the_best_of_all_choices(pattern):
    for levels in (2, 5, 50):
        generator = torch.Generator().manual_seed(levels)
        scores = torch.randint(levels, (6, 4 * pattern.m), generator=generator).double()
        expected = reference.nm_mask(scores.numpy(), pattern.n, pattern.m)
        np.testing.assert_array_equal(pattern.mask(scores).numpy(), expected, err_msg=f"{levels} levels")


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("row"), Block(1, 1), Row(), Column()], ids=str)
def test_sparsity_zero_keeps_all_and_one_keeps_nothing(pattern):
    for shape in ((1, 1), (1, 12), (12, 1), (12, 12), *EMPTY):
        scores = random(*shape)
        assert pattern.mask(scores, 0).all(), shape
        assert not pattern.mask(scores, 1).any(), shape
        assert pattern.num_pruned(shape, 0) == 0
        assert pattern.num_pruned(shape, 1) == math.prod(shape)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Unstructured(), [[1, 1, 1, 1], [0, 0, 0, 0]]),
        (Unstructured("row"), [[1, 1, 0, 0], [1, 1, 0, 0]]),
        (NM(2, 4), [[1, 1, 0, 0], [1, 1, 0, 0]]),
        (NM(1, 2), [[1, 0, 1, 0], [1, 0, 1, 0]]),
        (Block(1, 2), [[1, 1, 1, 1], [0, 0, 0, 0]]),
        (Block(2, 2), [[1, 1, 0, 0], [1, 1, 0, 0]]),
        (Row(), [[1, 1, 1, 1], [0, 0, 0, 0]]),
        (Column(), [[1, 1, 0, 0], [1, 1, 0, 0]]),
    ],
    ids=str,
)
def test_of_equals_the_lower_index_is_kept(pattern, expected):
    for value in (0.0, 0.1, -0.1, math.inf):
        assert pattern.mask(torch.full((2, 4), value), 0.5).int().tolist() == expected, value


def test_negative_zero_ties_with_zero():
    assert NM(1, 2).mask(torch.tensor([[-0.0, 0.0, 0.0, -0.0]])).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("seed", range(8))
def test_identical_units_tie_however_long_they_are(seed):
    """A sum whose order of addition depends on the unit's place would rank equal units by rounding errors."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.rand(300, 1, generator=generator).expand(300, 100)
    expected = torch.arange(100) < 50
    for scores in (columns.contiguous(), columns.T.contiguous().T):
        assert torch.equal(Column().mask(scores, 0.5)[0], expected)
        assert torch.equal(Row().mask(scores.T, 0.5)[:, 0], expected)
        assert torch.equal(Block(300, 1).mask(scores, 0.5)[0], expected)


@pytest.mark.parametrize(("units", "sparsity", "pruned"), [(5, 0.5, 2), (7, 0.5, 4), (10, 0.29, 3), (3, 0.99, 3)])
def test_count_is_rounded_to_nearest_and_even(units, sparsity, pruned):
    """``int(sparsity * units)`` would prune 2, 3, 2 and 2."""
    for pattern, shape in [(Unstructured("row"), (1, units)), (Row(), (units, 2)), (Column(), (2, units))]:
        mask = pattern.mask(random(*shape), sparsity)
        assert int((~mask).sum()) == pruned * mask.numel() // units == pattern.num_pruned(shape, sparsity)


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("row"), Block(2, 3), Row(), Column()], ids=str)
def test_masks_of_rising_sparsity_are_nested(pattern):
    scores = torch.randint(4, (12, 12), generator=torch.Generator().manual_seed(0)).float()
    masks = [pattern.mask(scores, step / 20) for step in range(21)]
    for larger, smaller in itertools.pairwise(masks):
        assert not (smaller & ~larger).any()


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_block_of_one_masks_as_unstructured(sparsity):
    """Squares without their sign would turn the order of negative scores around."""
    scores = random(9, 11)
    assert torch.equal(Block(1, 1).mask(scores, sparsity), Unstructured().mask(scores, sparsity))


@pytest.mark.parametrize("pattern", [NM(2, 4, "dense"), Block(2, 4, "dense"), Block(3, 5, "dense")], ids=str)
def test_remainder_is_left_dense_and_out_of_the_competition(pattern):
    height, width = getattr(pattern, "height", 1), pattern.width
    for shape in ((7, 11), (1, 3), (2, 4), (7, 4), (2, 11)):
        rows, columns = shape[0] // height * height, shape[1] // width * width
        scores = random(*shape).abs()
        scores[rows:], scores[:, columns:] = 0, 0  # the lowest scores, which are kept nevertheless
        mask = pattern.mask(scores, 0.5)
        strict = dataclasses.replace(pattern, remainder="error")
        assert mask[rows:].all(), shape
        assert mask[:, columns:].all(), shape
        assert torch.equal(mask[:rows, :columns], strict.mask(scores[:rows, :columns], 0.5))
        assert pattern.num_pruned(shape, 0.5) == strict.num_pruned((rows, columns), 0.5) == int((~mask).sum())


@pytest.mark.parametrize(
    ("pattern", "scores", "kept"),
    [  # sums of squares 9 against 8; sums 3 against 4
        (Row(), [[3, 0], [2, 2]], [[1, 1], [0, 0]]),
        (Column(), [[2, 3], [2, 0]], [[0, 1], [0, 1]]),
        (Column(2), [[2, 2, 3, 0]], [[0, 0, 1, 1]]),
        (Block(1, 2), [[2, 2, 0, 3]], [[0, 0, 1, 1]]),
        (Block(2, 1), [[2, 0], [2, 3]], [[0, 1], [0, 1]]),
        # squares keep their sign: -9 + 1 against -1 - 1, where the sums tie and the squares without sign say otherwise
        (Row(), [[-3, 1], [-1, -1]], [[0, 0], [1, 1]]),
        (Block(1, 2), [[-3, 1, -1, -1]], [[0, 0, 1, 1]]),
    ],
    ids=repr,
)
def test_units_are_scored_by_the_sum_of_squares(pattern, scores, kept):
    assert pattern.mask(torch.tensor(scores, dtype=torch.float32), 0.5).int().tolist() == kept


@pytest.mark.parametrize("pattern", [Row(), Block(1, 2)], ids=str)
@pytest.mark.parametrize("scale", [1e38, 1e30, 1e-30, 1e-44])
def test_float32_squares_neither_overflow_nor_vanish(pattern, scale):
    """Squares of 2 against 2, times 1e76 or 1e-88: in float32 both are infinite, or zero, and the first would win."""
    scores = torch.tensor([[1.0, 1.0], [2.0, 0.0]]) * scale
    assert pattern.mask(scores, 0.5).tolist() == [[False, False], [True, True]]


def test_float64_squares_that_overflow_are_refused():
    """Squared, these are inf - inf; a mask made from NaN keeps any number of rows."""
    scores = torch.ones(40, 2, dtype=torch.float64)
    scores[::2] = torch.tensor([1e200, -1e200], dtype=torch.float64)
    with pytest.raises(PatternError, match="squares overflow"):
        Row().mask(scores, 0.5)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_infinite_scores_are_kept(pattern):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        scores = random(6, 20, dtype=dtype)
        scores[3, 7] = math.inf
        mask = pattern.mask(scores, a_sparsity(pattern))
        assert mask[3, 7], dtype
        if isinstance(pattern, TransposableNM):
            continue  # which keeps the largest sum, in which a number that large hides all others
        finite = scores.clone()
        finite[3, 7] = torch.finfo(dtype).max
        assert torch.equal(mask, pattern.mask(finite, a_sparsity(pattern))), dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_scores_that_are_nan_or_minus_infinity_are_refused(bad, dtype):
    for pattern in (Unstructured(), NM(1, 4), Row()):
        scores = random(12, 12, dtype=dtype)
        scores[0, 3] = scores[11, 11] = bad
        scores[6, 6] = math.inf
        with pytest.raises(PatternError, match="2 of 144 scores are NaN or -inf"):
            pattern.mask(scores, a_sparsity(pattern))


@pytest.mark.parametrize("scores", [torch.ones(4, 4, dtype=torch.int64), torch.ones(4, 4) > 0, [[1.0]], None], ids=repr)
def test_scores_are_floating_point_tensors(scores):
    with pytest.raises(TypeError, match="scores must be a floating-point tensor"):
        Unstructured().mask(scores, 0.5)


def test_masks_carry_no_gradient():
    assert not Row().mask(torch.rand(4, 4, requires_grad=True), 0.5).requires_grad


# The selection: one algorithm for few units and one for many, which must agree


@pytest.mark.parametrize("units", [2, 3, 8, 31, 32, 33])
def test_narrow_and_wide_selection_agree(units):
    for levels in (1, 3, 1000):
        generator = torch.Generator().manual_seed(units)
        scores = torch.randint(levels, (50, units), generator=generator).float()
        scores[::7, ::3] = math.inf
        for keep in range(1, units):
            narrow = _keep_top_narrow(scores, keep)
            assert torch.equal(narrow, _keep_top_wide(scores, keep)), (levels, keep)
            assert narrow.sum(1).eq(keep).all(), (levels, keep)


@pytest.mark.parametrize("width", [31, 32, 33, 34])
def test_patterns_are_exact_on_both_sides_of_the_switch(width):
    scores = torch.randint(3, (5, 2 * width), generator=torch.Generator().manual_seed(0)).double()
    for pattern in (NM(width // 3, width), Unstructured("row")):
        sparsity = a_sparsity(pattern)
        np.testing.assert_array_equal(
            pattern.mask(scores, sparsity).numpy(), reference.mask(pattern, scores.numpy(), sparsity)
        )


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(7, 32)], ids=str)
def test_many_groups_are_worked_on_in_chunks(pattern):
    rows = 2**20 // 320 + 3  # not a whole number of chunks
    scores = torch.randint(5, (rows, 320), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(pattern.mask(scores).view(-1), stable_top(scores.view(-1, pattern.m), pattern.n).view(-1))


def stable_top(scores, keep):
    order = np.argsort(-scores.numpy(), axis=-1, kind="stable")
    mask = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(mask, order[..., :keep], True, axis=-1)
    return torch.from_numpy(mask)


LONG = 2**18 + 11


def long():
    return random(LONG, dtype=torch.float32)


LONG_VECTORS = {
    "normal": long,
    "ascending": lambda: long().sort().values,
    "descending": lambda: long().sort(descending=True).values,
    "equal": lambda: torch.ones(LONG),
    "alternating": lambda: (torch.arange(LONG) % 2).to(torch.float32),
    "period of 48": lambda: (torch.arange(LONG) % 48).to(torch.float32),
    "one in three infinite": lambda: long().masked_fill(torch.arange(LONG) % 3 == 0, math.inf),
    "one outlier": lambda: torch.zeros(LONG).index_fill(0, torch.tensor([LONG - 1]), 1),
}


@pytest.mark.parametrize("make", LONG_VECTORS.values(), ids=LONG_VECTORS)
def test_selection_from_long_vectors_is_that_of_a_stable_sort(make):
    values = make()
    for keep in (1, LONG // 2, LONG - LONG // 50):
        mask = Unstructured().mask(values.view(1, -1), 1 - keep / LONG)
        assert torch.equal(mask[0], stable_top(values, keep))


@pytest.mark.parametrize("shape", [(1, 33), (5, 40), (1, LONG)], ids=str)
def test_kth_smallest_is_that_of_a_sort(shape):
    values = random(*shape, dtype=torch.float32)
    ordered = values.sort(dim=1).values
    for k in (1, 2, shape[1] // 3, shape[1] - 1, shape[1]):
        assert torch.equal(kth_smallest(values, k), ordered[:, k - 1 : k])


# check


@pytest.mark.parametrize("pattern", STRUCTURED, ids=str)
def test_check_refuses_every_legal_mask_with_one_weight_flipped(pattern):
    mask = pattern.mask(random(6, 12), a_sparsity(pattern)).contiguous()
    pattern.check(mask)
    for i in range(6):
        for j in range(12):
            mask[i, j] = ~mask[i, j]
            with pytest.raises(PatternError, match="keep"):
                pattern.check(mask)
            mask[i, j] = ~mask[i, j]


@pytest.mark.parametrize(
    ("pattern", "broken", "message"),
    [
        (NM(2, 4), [(1, 5), (1, 9), (2, 0)], "row 1, columns 4 to 7 keep 3 weights, but 2:4 keeps exactly 2."),
        (Block(2, 3), [(2, 4), (2, 7), (4, 0)], "the tile at row 2, column 3 keeps 5 of its 6 weights, but block:2x3 "),
        (Row(), [(3, 11), (4, 0)], "row 3 is kept in part, but row keeps all or none of a row."),
        (Column(), [(0, 7), (5, 2)], "input channel 2 is kept in part, but column keeps all or none of a channel."),
        (Column(3), [(0, 11), (5, 4)], "input channel 1 is kept in part, but column:3 keeps all or none of a channel."),
    ],
    ids=str,
)
def test_check_names_the_first_offending_group(pattern, broken, message):
    mask = torch.ones(6, 12, dtype=torch.bool)
    if isinstance(pattern, NM):
        mask = pattern.mask(-torch.arange(72.0).view(6, 12))  # keeps the first two of every four
        broken = [(i, 4 * (j // 4) + 2) for i, j in broken]
    for place in broken:
        mask[place] = ~mask[place]
    with pytest.raises(PatternError) as error:
        pattern.check(mask)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("pattern", [NM(2, 4, "dense"), Block(4, 4, "dense")], ids=str)
def test_check_wants_the_remainder_dense(pattern):
    mask = pattern.mask(random(8, 10), 0.5)
    pattern.check(mask)
    mask[3, 9] = False
    with pytest.raises(PatternError, match=r"weights beyond 8 rows and 8 columns.* must stay dense"):
        pattern.check(mask)


def test_check_wants_every_row_to_lose_the_same_number():
    mask = Unstructured("row").mask(random(5, 7), 0.5)
    Unstructured("row").check(mask)
    mask[3, int(mask[3].int().argmax())] = False
    with pytest.raises(PatternError, match="row 3"):
        Unstructured("row").check(mask)


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("layer"), Block(1, 1)], ids=str)
def test_any_mask_is_legal_without_structure(pattern):
    pattern.check(random(5, 7) > 0)


def test_check_accepts_an_empty_mask():
    for pattern, shape in itertools.product(PATTERNS, ((0, 20), (6, 0), (0, 0))):
        pattern.check(torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("mask", [torch.ones(4, 4), torch.ones(4, 4, dtype=torch.uint8), [[True]]], ids=repr)
def test_check_takes_bool_tensors_only(mask):
    with pytest.raises(TypeError, match="a mask must be a bool tensor"):
        Row().check(mask)


# Shapes and sparsities that do not fit


@pytest.mark.parametrize(
    ("pattern", "shape", "message"),
    [
        (
            NM(2, 4),
            (8, 1022),
            "2:4 needs an input size that is a multiple of 4, got 1022.\n"
            "Exclude the layer, or use '2:4,remainder=dense' (--remainder dense) "
            "to leave its last 2 columns dense.",
        ),
        (
            Block(4, 4),
            (7, 8),
            "block:4x4 needs an output size that is a multiple of 4, got 7.\n"
            "Exclude the layer, or use 'block:4x4,remainder=dense' (--remainder dense) "
            "to leave its last 3 rows dense.",
        ),
        (
            Block(4, 4),
            (8, 9),
            "block:4x4 needs an input size that is a multiple of 4, got 9.\n"
            "Exclude the layer, or use 'block:4x4,remainder=dense' (--remainder dense) "
            "to leave its last 1 column dense.",
        ),
        (Column(9), (4, 10), "column:9 needs an input size that is a multiple of 9, got 10.\nExclude the layer."),
        (Row(), (4,), "row needs a matrix of shape (out, in), got shape (4,)."),
        (Unstructured(), (2, 3, 4), "unstructured needs a matrix of shape (out, in), got shape (2, 3, 4)."),
        (NM(2, 4, "dense"), (), "2:4,remainder=dense needs a matrix of shape (out, in), got shape ()."),
    ],
    ids=str,
)
def test_a_shape_that_does_not_fit_is_named_with_the_way_out(pattern, shape, message):
    for attempt in (
        lambda: pattern.validate(shape),
        lambda: pattern.mask(torch.ones(shape), 0.5),
        lambda: pattern.check(torch.ones(shape, dtype=torch.bool)),
        lambda: pattern.num_pruned(shape, 0.5),
        lambda: pattern.num_units(shape),
    ):
        with pytest.raises(PatternError) as error:
            attempt()
        assert str(error.value) == message


SPARSITY_TAKERS = {
    "mask": lambda pattern, sparsity: pattern.mask(torch.ones(4, 12), sparsity),
    "mask of nothing": lambda pattern, sparsity: pattern.mask(torch.ones(0, 12), sparsity),
    "num_pruned": lambda pattern, sparsity: pattern.num_pruned((4, 12), sparsity),
    "num_pruned of nothing": lambda pattern, sparsity: pattern.num_pruned((0, 12), sparsity),
    "resolve": lambda pattern, sparsity: pattern.resolve(sparsity),
}
takers = pytest.mark.parametrize("take", SPARSITY_TAKERS.values(), ids=SPARSITY_TAKERS)


@takers
def test_sparsity_lies_between_zero_and_one(take):
    for sparsity in (-0.1, 1.1, -1, 2, 50, math.nan, math.inf, -math.inf):
        with pytest.raises(PatternError, match="sparsity is the fraction of zeros, between 0 and 1, got"):
            take(Row(), sparsity)
    with pytest.raises(PatternError, match="sparsity is the fraction of zeros, between 0 and 1, got"):
        take(NM(2, 4), -0.1)  # rather than that 2:4 fixes another one


@takers
def test_sparsity_is_a_number(take):
    for sparsity in (True, "0.5", [0.5], torch.tensor(0.5)):
        with pytest.raises(TypeError, match="sparsity must be a number"):
            take(Unstructured(), sparsity)


@takers
def test_sparsity_may_be_left_out_only_where_the_structure_fixes_it(take):
    take(NM(2, 4), None)
    for pattern in (Unstructured(), Block(2, 2), Row(), Column()):
        with pytest.raises(PatternError, match="fits any sparsity: say which"):
            take(pattern, None)


@takers
def test_nm_refuses_another_sparsity(take):
    for pattern, other in [(NM(2, 4), 0.6), (NM(1, 4), 0.25), (NM(0, 4), 0.999), (NM(4, 4), 0.5)]:
        with pytest.raises(PatternError, match=rf"{pattern} fixes the sparsity at .* but {other:g} was asked for"):
            take(pattern, other)


def test_percentages_are_recognised():
    with pytest.raises(PatternError, match=r"got 50\. Did you mean 0\.5\?"):
        Unstructured().mask(torch.ones(2, 2), 50)


def test_nm_takes_its_own_sparsity_however_it_was_computed():
    for m in (1, 2, 3, 7, 10, 31, 49):
        for n in range(m + 1):
            for sparsity in (None, 1 - n / m, (m - n) / m, 1.0 - n * (1.0 / m)):
                assert NM(n, m).mask(random(3, m), sparsity).sum(1).eq(n).all(), (n, m)
