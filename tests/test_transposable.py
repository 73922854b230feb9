"""N:M along rows and along columns: the largest sum, exactly; a pattern like the others; packed along both."""

import itertools
import math

import numpy as np
import pytest
import reference
import torch
from cases import HEADS, loss_of
from hypothesis import given
from hypothesis import strategies as st

import secateur
from secateur import NM, PatternError, SparseLinear, SparsityPattern, TransposableNM
from secateur.formats import NMPacked, pack
from secateur.patterns import at_partial_sparsity, may_come_from, satisfied
from secateur.patterns._regular import _enumerated, _exchanged, _finite, _masks
from secateur.solvers import parse_method
from secateur.training import exchange


def random(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def total(scores, mask):
    return math.fsum(scores.double()[mask].tolist())


SMALL = [TransposableNM(n, m) for m in (1, 2, 3, 4) for n in range(m + 1)]


@st.composite
def problems(draw):
    pattern = draw(st.sampled_from(SMALL))
    remainder = draw(st.sampled_from(["error", "dense"]))
    pattern = TransposableNM(pattern.n, pattern.m, remainder)
    sizes = [pattern.m * draw(st.integers(0, 3)) for _ in range(2)]
    if remainder == "dense":
        sizes = [size + draw(st.integers(0, pattern.m - 1)) for size in sizes]
    levels = draw(st.sampled_from([1, 2, 4, 64]))
    low = draw(st.sampled_from([0, -levels // 2]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    scores = torch.randint(low, low + levels, sizes, generator=generator).to(dtype)
    return pattern, scores if draw(st.booleans()) else scores.T.contiguous().T


@given(problems())
def test_mask_is_the_best_of_all_masks(problem):
    pattern, scores = problem
    mask = pattern.mask(scores)
    pattern.check(mask)
    assert pattern.num_pruned(scores.shape) == int((~mask).sum())
    rows, columns = (size - size % pattern.m for size in scores.shape)
    assert mask[rows:].all()
    assert mask[:, columns:].all()
    core, found = scores[:rows, :columns].double(), mask[:rows, :columns]
    best = torch.from_numpy(
        reference.transposable_mask(torch.where(core < 0, core - 1e4, core).numpy(), pattern.n, pattern.m)
    )
    assert int((core[found] < 0).sum()) == int((core[best] < 0).sum())
    assert total(core, found) == total(core, best)


def test_there_are_ninety_masks_of_2_4():
    assert len(_masks(4, 2)) == 90


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4)])
def test_exchanges_along_cycles_find_what_comparing_all_finds(n, m):
    for levels in (2, 3, 10_000):
        generator = torch.Generator().manual_seed(levels)
        scores = torch.randint(levels, (200, m, m), generator=generator).double()
        scores[0, 0, 0] = math.inf
        scores[1] = -1
        wide = _finite(scores)
        found, best = _exchanged(wide, n), _enumerated(wide, n)
        assert (found.sum(1) == n).all()
        assert (found.sum(2) == n).all()
        torch.testing.assert_close((wide * found).sum((1, 2)), (wide * best).sum((1, 2)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(1, 5), (2, 6), (4, 8), (1, 8), (8, 16)])
def test_large_tiles_are_as_good_as_linear_programming(n, m):
    """The constraints are totally unimodular, so that the linear program has an integer solution."""
    optimize = pytest.importorskip("scipy.optimize")
    scores = random(2 * m, m, seed=m)
    mask = TransposableNM(n, m).mask(scores)
    sides = [np.kron(np.eye(m), np.ones(m)), np.kron(np.ones(m), np.eye(m))]
    for tile, kept in zip(scores.split(m), mask.split(m), strict=True):
        best = optimize.linprog(-tile.flatten().numpy(), A_eq=np.vstack(sides), b_eq=np.full(2 * m, n), bounds=(0, 1))
        assert math.isclose(-best.fun, total(tile, kept), rel_tol=1e-9)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("pattern", [TransposableNM(2, 4), TransposableNM(2, 6)], ids=str)
def test_scale_changes_nothing(pattern, scale):
    scores = random(12, 24)
    assert torch.equal(pattern.mask(scores * scale), pattern.mask(scores))


@pytest.mark.parametrize("pattern", [TransposableNM(2, 4), TransposableNM(3, 6)], ids=str)
def test_it_keeps_less_than_rows_alone_and_more_than_any_row_mask_that_happens_to_fit(pattern):
    scores = random(12, 12)
    mask, free = pattern.mask(scores), NM(pattern.n, pattern.m).mask(scores)
    assert total(scores, mask) < total(scores, free)
    assert total(scores, mask) == pytest.approx(total(scores, pattern.mask(scores.T).T))  # both sides are alike


@pytest.mark.parametrize("pattern", [TransposableNM(1, 4), TransposableNM(4, 8)], ids=str)
def test_what_an_earlier_round_pruned_stays_pruned(pattern):
    """A regular mask of more weights always has one of fewer inside."""
    scores = random(16, 16)
    early, sparsity = at_partial_sparsity(pattern, 0.25)
    assert type(early) is TransposableNM
    pruned = ~early.mask(scores, sparsity)
    problem = secateur.LayerProblem(random(16, 16, dtype=torch.float32), None, pattern, None, pruned)
    mask = pattern.mask(problem.ranked(random(16, 16, seed=1)))
    pattern.check(mask)
    assert not (mask & pruned).any()


@pytest.mark.parametrize("method", [*HEADS, "sparsegpt+refit"])
def test_every_method_prunes_to_it(method):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    pattern = TransposableNM(2, 4)
    report = secateur.prune_(model, [torch.randn(64, 16)], pattern="transposable:2:4", method=method, loss=loss_of)
    assert report.sparsity == 0.5
    assert [layer.pattern for layer in report.layers] == ["transposable:2:4"] * 2
    for layer in (model[0], model[2]):
        pattern.check(layer.weight != 0)
        NM(2, 4).check((layer.weight != 0).T)
    assert parse_method(method)


def test_a_weight_and_its_transpose_pack_as_plain_nm():
    weight = random(16, 32, dtype=torch.float32) + 0.1
    weight = weight * TransposableNM(2, 4).mask(weight)
    for matrix in (weight, weight.T.contiguous()):
        packed = NMPacked.from_dense(matrix, pattern=NM(2, 4))
        assert torch.equal(packed.to_dense(), matrix)


def test_it_is_found_in_zeros():
    weight = random(16, 16)
    for n, m in ((1, 2), (2, 4), (1, 4), (4, 8)):
        zero = ~TransposableNM(n, m).mask(weight)
        assert TransposableNM(n, m) in satisfied(zero)
        assert NM(n, m) not in satisfied(zero)
        assert may_come_from(zero, TransposableNM(n, m))
        only_rows = ~NM(n, m).mask(weight)
        assert NM(n, m) in satisfied(only_rows)
        assert TransposableNM(n, m) not in satisfied(only_rows)
        assert not may_come_from(only_rows, TransposableNM(n, m))


def test_check_names_a_column():
    mask = NM(1, 2).mask(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    with pytest.raises(PatternError, match=r"column 0, rows 0 to 1 keep 2 weights, but transposable:1:2 keeps exactly"):
        TransposableNM(1, 2).check(mask)
    with pytest.raises(PatternError, match="row 0, columns 0 to 1"):
        TransposableNM(1, 2).check(torch.ones(2, 2, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)], ids=str)
def test_both_sizes_must_be_multiples(shape):
    with pytest.raises(PatternError, match="multiple of 4"):
        TransposableNM(2, 4).mask(torch.ones(shape))
    TransposableNM(2, 4, "dense").mask(torch.ones(shape))


def test_values_differ_from_plain_nm():
    assert TransposableNM(2, 4) != NM(2, 4)
    assert SparsityPattern.parse("transposable:2:4") == TransposableNM(2, 4)
    assert len({TransposableNM(2, 4), NM(2, 4), TransposableNM(2, 4)}) == 2


GROUPWISE = {
    "gate": lambda pattern: SparseLinear(8, 8, pattern=pattern),
    "exchange": lambda pattern: exchange(
        pattern, pattern.mask(torch.ones(8, 8)), torch.ones(8, 8), torch.ones(8, 8), 0.5, regrow_dropped=False
    ),
}


@pytest.mark.parametrize("use", GROUPWISE.values(), ids=GROUPWISE)
def test_what_decides_each_group_alone_refuses_it_by_name(use):
    with pytest.raises(PatternError, match="ties rows and columns together"):
        use(TransposableNM(2, 4))
    use(NM(2, 4))


def test_every_mask_of_the_reference_is_legal():
    for n, m in itertools.product(range(4), (3,)):
        mask = torch.from_numpy(reference.transposable_mask(np.ones((m, m)), n, m))
        TransposableNM(n, m).check(mask)


@pytest.mark.parametrize("rows", [16, 18], ids=lambda rows: f"{rows} rows")
def test_it_is_stored_as_what_it_is_along_rows(rows):
    """So files have no new pattern, and what remains dense below is stored, too."""
    pattern = TransposableNM(2, 4, "dense")
    weight = random(rows, 32, dtype=torch.float32) + 0.1
    weight = weight * pattern.mask(weight)
    for patterns in (None, [pattern]):
        packed = pack(weight, patterns=patterns)
        assert "transposable" not in str(packed.pattern)
        assert torch.equal(packed.to_dense(), weight)
    assert isinstance(pack(weight), NMPacked) == (rows == 16)
