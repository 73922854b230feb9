"""Packed weights as sparse tensors of PyTorch and sparse arrays of scipy, and back."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import FORMATS as CASES
from cases import PATTERNS
from hypothesis import given
from scipy import sparse
from test_formats import FLOATS, ONE_OF_EACH, bits, cleared, problems, random_bits, random_mask, same_bits

import secateur
from secateur import NM, Block, Column, FormatError, PatternError, RecipeError, Row, Unstructured
from secateur.formats import Bitmask, BlockPacked, NMPacked, RowPacked, from_scipy, from_torch, pack
from secateur.patterns import along_rows

SINGLE = [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc]
BLOCKED = [torch.sparse_bsr, torch.sparse_bsc]
SCIPY = ["coo", "csr", "csc", "bsr"]


def same(left, right):
    """Whether two packed weights are the same: their kind, and every bit of every tensor."""
    ours, theirs = left.tensors(), right.tensors()
    return (
        (type(left), left.shape, left.pattern) == (type(right), right.shape, right.pattern)
        and ours.keys() == theirs.keys()
        and all(same_bits(tensor, theirs[name]) for name, tensor in ours.items())
    )


def whole_tiles(packed):
    pattern = packed.pattern
    divides = isinstance(pattern, Block) and packed.shape[0] % pattern.height == packed.shape[1] % pattern.width == 0
    return isinstance(packed, BlockPacked) and divides


def check_lossless(packed):
    """The same weight comes back from every sparse layout that holds it, with the same mask, codes and scales."""
    layouts = [None, *SINGLE, *(BLOCKED if whole_tiles(packed) else [])]
    for layout in layouts:
        tensor = packed.to_torch(layout)
        again = from_torch(tensor, packed.pattern)
        assert same_bits(again.to_dense(), packed.to_dense()), layout
        assert torch.equal(again.mask(), packed.mask()), layout
        assert tensor.values().numel() == packed.mask().count_nonzero(), layout
        if packed.scales is None:
            assert same(again.convert(type(packed), packed.pattern), packed), layout
        else:
            codes = packed.to_torch(layout, value_dtype=torch.int8)
            again = from_torch(codes, packed.pattern, scales=packed.unscaled()[1])
            assert same(again.convert(type(packed), packed.pattern), packed), layout


@pytest.mark.parametrize(("format_type", "pattern", "shape"), CASES, ids=str)
def test_every_format_comes_back_from_every_layout(format_type, pattern, shape):
    for dtype in FLOATS:
        check_lossless(format_type.from_dense(random_bits(shape, dtype, 1), random_mask(pattern, shape, 2), pattern))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    check_lossless(format_type.from_dense(weight, random_mask(pattern, shape, 4), pattern, torch.int8))


@given(problems())
def test_any_weight_comes_back(problem):
    format_type, pattern, weight, mask = problem
    check_lossless(format_type.from_dense(weight, mask, pattern))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_pattern_is_packed_in_its_own_format(pattern):
    weight, mask = random_bits((6, 20), torch.float32, 5), random_mask(pattern, (6, 20), 6)
    tensor = Bitmask.from_dense(weight, mask, pattern).to_torch()
    for given_pattern in (pattern, str(pattern)):
        packed = from_torch(tensor, given_pattern)
        assert packed.pattern == along_rows(pattern, 6)
        assert torch.equal(packed.mask(), mask)
        assert same_bits(packed.to_dense(), cleared(weight, mask))
    assert same_bits(from_torch(tensor).to_dense(), cleared(weight, mask))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_scipy_holds_what_pytorch_holds(pattern):
    weight, mask = random_bits((6, 20), torch.float32, 7), random_mask(pattern, (6, 20), 8)
    packed = from_torch(Bitmask.from_dense(weight, mask, pattern).to_torch(), pattern)
    for name in [None, *SCIPY[: 4 if whole_tiles(packed) else 3]]:
        array = packed.to_scipy(name)
        assert array.format == (name or {"sparse_coo": "coo"}.get(str(packed.to_torch().layout), array.format))
        assert array.nnz == mask.count_nonzero()
        assert same(from_scipy(array, pattern), packed), name
        assert np.array_equal(array.toarray(), packed.to_dense().numpy(), equal_nan=True)


@pytest.mark.parametrize(("format_type", "pattern"), ONE_OF_EACH, ids=str)
def test_empty_weights(format_type, pattern):
    for shape, dtype in itertools.product([(0, 8), (8, 0), (0, 0)], [torch.float32, torch.int8]):
        packed = format_type.from_dense(torch.zeros(shape), None, pattern, dtype)
        check_lossless(packed)
        assert same_bits(from_scipy(packed.to_scipy(), pattern).to_dense(), packed.to_dense())


def test_the_natural_layouts():
    weight = torch.ones(8, 8)
    natural = {
        Unstructured(): torch.sparse_csr,
        NM(2, 4): torch.sparse_csr,
        Block(4, 2): torch.sparse_bsr,
        Block(3, 2, "dense"): torch.sparse_csr,
        Row(): torch.sparse_csr,
        Column(): torch.sparse_csc,
    }
    for pattern, layout in natural.items():
        packed = from_torch(pattern.mask(weight, pattern.sparsity or 0.5).float().to_sparse_csr(), pattern)
        assert packed.to_torch().layout == layout, pattern
        assert packed.to_scipy().format == str(layout)[-3:], pattern


def test_sparse_tensors_are_what_pytorch_allows():
    for (format_type, pattern), layout in itertools.product(ONE_OF_EACH, [*SINGLE, *BLOCKED]):
        packed = format_type.from_dense(torch.randn(8, 8), random_mask(pattern, (8, 8), 9), pattern)
        tensor = packed.to_torch(layout, blocksize=(2, 4) if layout in BLOCKED else None)
        if layout == torch.sparse_coo:
            again = torch.sparse_coo_tensor(tensor.indices(), tensor.values(), (8, 8), check_invariants=True)
        else:
            by_column = layout in (torch.sparse_csc, torch.sparse_bsc)
            parts = [
                getattr(tensor, name)()
                for name in (("ccol_indices", "row_indices") if by_column else ("crow_indices", "col_indices"))
            ]
            again = torch.sparse_compressed_tensor(
                *parts, tensor.values(), (8, 8), layout=layout, check_invariants=True
            )
        assert same_bits(again.to_dense(), packed.to_dense())


def test_blocks_of_another_pattern_keep_the_weight_and_may_be_cleaned():
    packed = NMPacked.from_dense(torch.randn(8, 8), random_mask(NM(2, 4), (8, 8), 1), NM(2, 4))
    for layout, size in itertools.product(BLOCKED, [(2, 4), (8, 1), (1, 8)]):
        tensor = packed.to_torch(layout, blocksize=size)
        blocks = from_torch(tensor)
        assert blocks.pattern == Block(*size)
        assert same_bits(blocks.to_dense(), packed.to_dense())
        assert same(from_torch(tensor, "2:4", keep_zeros=False), packed)
    assert same(from_scipy(packed.to_scipy("bsr", blocksize=(4, 2)), "2:4", keep_zeros=False), packed)


# What comes from elsewhere


@pytest.mark.parametrize("layout", [*SINGLE, *BLOCKED], ids=str)
def test_tensors_that_pytorch_made(layout):
    weight = torch.randn(6, 8).where(torch.rand(6, 8) < 0.4, 0)
    blocksize = (2, 4) if layout in BLOCKED else None
    tensor = weight.to_sparse(layout=layout, blocksize=blocksize)
    packed = from_torch(tensor)
    assert same_bits(packed.to_dense(), weight)
    assert packed.pattern == (Block(2, 4) if blocksize else packed.pattern)
    assert same_bits(from_torch(tensor.requires_grad_(), value_dtype="bfloat16").to_dense(), weight.bfloat16())


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_indices_of_both_sizes_in_any_order(index):
    starts, at = torch.tensor([0, 2, 3]).to(index), torch.tensor([3, 1, 0]).to(index)
    values, wanted = torch.tensor([1.0, 2.0, 3.0]), [[0.0, 2.0, 0.0, 1.0], [3.0, 0.0, 0.0, 0.0]]
    tensor = torch.sparse_csr_tensor(starts, at, values, (2, 4), check_invariants=False)
    assert from_torch(tensor).to_dense().tolist() == wanted
    array = sparse.csr_array((values.numpy(), at.numpy(), starts.numpy()), shape=(2, 4))
    assert from_scipy(array).to_dense().tolist() == wanted
    assert array.indices.tolist() == [3, 1, 0]  # is not sorted in place


def test_entries_of_one_place_are_added_up_and_a_sum_of_zero_is_kept():
    at, values = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 2]]), torch.tensor([1.5, 4.0, -1.5, -0.0])
    tensor = torch.sparse_coo_tensor(at, values, (2, 3), check_invariants=True)
    assert not tensor.is_coalesced()
    array = sparse.coo_array((values.numpy(), tuple(at.numpy())), shape=(2, 3))
    for packed in (from_torch(tensor), from_scipy(array)):
        assert packed.mask().tolist() == [[False, True, False], [True, False, True]]
        assert packed.to_dense().tolist() == [[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]]
        assert packed.to_dense()[1, 2].signbit()  # it was not added to anything
    assert not tensor.is_coalesced()
    blocks = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    array = sparse.bsr_array((blocks, [1, 1, 0], [0, 2, 3]), shape=(4, 4))
    assert np.array_equal(from_scipy(array).to_dense().numpy(), array.toarray())
    assert len(array.data) == 3


def test_stored_zeros_are_kept_unless_they_are_not_wanted():
    tensor = csr([0, 2, 3], [0, 2, 1], (0.0, 1.0, -0.0), (2, 3))
    for packed in (from_torch(tensor), from_scipy(from_torch(tensor).to_scipy())):
        assert packed.mask().int().tolist() == [[1, 0, 1], [0, 1, 0]]
        assert packed.to_dense().signbit().tolist() == [[False] * 3, [False, True, False]]
    assert from_torch(tensor, keep_zeros=False).mask().int().tolist() == [[0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("kind", ["matrix", "array"])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_arrays_that_scipy_made(kind, dtype):
    weight = np.array([[0, 1.5, 0, 0], [2, 0, 0, -1]], dtype)
    for name in SCIPY:
        matrix = getattr(sparse, f"{name}_{kind}")(weight)
        assert from_scipy(matrix, value_dtype=torch.float32).to_dense().tolist() == weight.tolist(), name


def test_values_may_become_wider_and_nothing_else():
    for dtype in FLOATS:
        packed = Bitmask.from_dense(
            random_bits((5, 19), dtype, 1).nan_to_num(), random_mask(Unstructured(), (5, 19), 2)
        )
        for wider in (torch.float32, torch.float64):
            for again in (
                from_torch(packed.to_torch(value_dtype=wider), value_dtype=dtype),
                from_scipy(packed.to_scipy(value_dtype=wider), value_dtype=dtype),
            ):
                assert same(again.convert(Bitmask), packed)
        for lossy in {torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.float8_e4m3fn} - {dtype}:
            with pytest.raises(RecipeError, match="would lose bits"):
                packed.to_torch(value_dtype=lossy)


def test_a_sparse_tensor_makes_a_layer_that_shares_nothing_with_it():
    for layout, (format_type, pattern) in itertools.product([None, *SINGLE], ONE_OF_EACH):
        packed = format_type.from_dense(torch.randn(8, 8), random_mask(pattern, (8, 8), 3), pattern)
        tensor = packed.to_torch(layout)
        again = from_torch(tensor, pattern)
        storages = [{each.untyped_storage().data_ptr() for each in one.tensors().values()} for one in (packed, again)]
        assert not storages[0] & storages[1]
        tensor.values().zero_()
        assert same(again.convert(format_type, pattern), packed)
        assert not any(each._is_view() and each._base.layout != torch.strided for each in again.tensors().values())
        x = torch.randn(3, 8)
        assert torch.allclose(secateur.PackedLinear(again)(x), x @ packed.to_dense().T, atol=1e-5)


def test_no_warning_reaches_the_user():
    code = """
import torch, warnings
warnings.simplefilter("error")
from secateur.formats import FORMATS, from_torch, pack
from secateur import Block
packed = FORMATS["block"].from_dense(torch.eye(4), pattern=Block(2, 2))
for layout in (torch.sparse_csr, torch.sparse_coo, torch.sparse_bsr, torch.sparse_csc, torch.sparse_bsc):
    assert from_torch(packed.to_torch(layout)).to_dense().equal(torch.eye(4))
at = torch.tensor([[0, 0], [1, 1]])
twice = torch.sparse_coo_tensor(at, torch.ones(2), (4, 4), check_invariants=False)
assert from_torch(twice).to_dense()[0, 1] == 2
assert not [f for f in warnings.filters if f[1] is not None and "beta" in f[1].pattern]
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert not run.stderr


# Mistakes


def csr(starts, at, values=(1.0, 2.0), size=(2, 4)):
    parts = torch.tensor(starts), torch.tensor(at), torch.tensor(values)
    return torch.sparse_csr_tensor(*parts, size=size, check_invariants=False)


def coo(at, values=(1.0, 2.0), size=(2, 4)):
    return torch.sparse_coo_tensor(torch.tensor(at), torch.tensor(values), size, check_invariants=False)


WRONG = {
    "a column beyond the last": (lambda: csr([0, 1, 2], [4, 0]), FormatError, r"indices have 4; .* 0 to 3"),
    "a negative column": (lambda: csr([0, 1, 2], [0, -1]), FormatError, r"indices have -1"),
    "a place twice": (lambda: csr([0, 2, 2], [1, 1]), FormatError, "two entries for one place"),
    "rows that fall": (lambda: csr([0, 2, 1], [0, 1]), FormatError, r"3 numbers that start at 0.*\[0, 2, 1\]"),
    "rows beyond the values": (lambda: csr([0, 1, 3], [0, 1]), FormatError, "end at 2"),
    "rows that start late": (lambda: csr([1, 1, 2], [0, 1]), FormatError, "start at 0"),
    "too few rows": (lambda: csr([0, 2], [0, 1]), FormatError, "3 numbers"),
    "a row of COO beyond the last": (lambda: coo([[0, 2], [0, 0]]), FormatError, "row indices have 2"),
    "a negative column of COO": (lambda: coo([[0, 1], [0, -1]]), FormatError, "column indices have -1"),
    "blocks that do not divide": (
        lambda: torch.sparse_bsr_tensor(
            torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1, 2, 3), size=(2, 4), check_invariants=False
        ),
        FormatError,
        "2x3 do not divide a weight of 2x4",
    ),
    "blocks that are numbers": (
        lambda: torch.sparse_bsr_tensor(
            torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), size=(2, 4), check_invariants=False
        ),
        FormatError,
        "values of 1 dimensions",
    ),
    "fewer values than indices": (lambda: csr([0, 1, 2], [0, 1], (1.0,)), FormatError, "1 values for 2 indices"),
    "three dimensions": (lambda: torch.ones(2, 2, 2).to_sparse(), FormatError, "got 3 dimensions"),
    "a batch": (lambda: torch.ones(2, 2, 2).to_sparse_csr(), FormatError, "got 3 dimensions"),
    "dense dimensions": (lambda: torch.ones(2, 2).to_sparse(1), FormatError, "hybrid"),
    "a tensor of entries": (
        lambda: torch.ones(2, 2, 2).to_sparse(layout=torch.sparse_csr, dense_dim=1), FormatError, "3 dimensions"
    ),
    "a dense tensor": (lambda: torch.ones(2, 4), TypeError, r"pack\(weight\)"),
    "no tensor": (lambda: [[1.0]], TypeError, "got list"),
    "whole numbers": (lambda: coo([[0, 1], [0, 1]], (1, 2)), TypeError, "got int64"),
    "float8": (lambda: csr([0, 1, 2], [0, 1]).to(torch.float8_e4m3fn), FormatError, "Multiply it by its scale"),
    "float64": (lambda: csr([0, 1, 2], [0, 1]).double(), FormatError, "Give one of these as value_dtype"),
    "codes without scales": (lambda: csr([0, 1, 2], [0, 1]).to(torch.int8), RecipeError, "Give scales="),
    "too many rows": (lambda: coo([[0, 1], [0, 1]], size=(2**40, 4)), FormatError, "out of range"),
    "too many weights": (lambda: coo([[0, 1], [0, 1]], size=(2**30, 2**30)), FormatError, "out of range"),
    "the meta device": (lambda: torch.ones(2, 4).to_sparse_csr().to("meta"), FormatError, "meta device"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_weight_is_refused(case):
    make, error, message = WRONG[case]
    try:
        tensor = make()
    except (RuntimeError, IndexError) as problem:
        pytest.fail(f"PyTorch makes no such tensor: {problem}")
    with pytest.raises(error, match=message):
        from_torch(tensor)


WRONG_SCIPY = {
    "a dense array": (lambda: np.ones((2, 2), "f4"), TypeError, "got ndarray"),
    "another format": (lambda: sparse.lil_array(np.ones((2, 2), "f4")), TypeError, r"got lil. Call .tocsr\(\)"),
    "float64": (lambda: sparse.csr_array(np.ones((2, 2))), FormatError, "Give one of these as value_dtype"),
    "complex numbers": (lambda: sparse.csr_array(np.ones((2, 2), "c8")), TypeError, "got complex64"),
    "bool": (lambda: sparse.csr_array(np.ones((2, 2), bool)), TypeError, "got bool"),
    "int32": (lambda: sparse.csr_array(np.ones((2, 2), "i4")), TypeError, "got int32"),
    "one dimension": (lambda: sparse.coo_array(np.ones(2, "f4")), FormatError, "got 1 dimensions"),
}


@pytest.mark.parametrize("case", WRONG_SCIPY)
def test_what_is_no_weight_of_scipy_is_refused(case):
    make, error, message = WRONG_SCIPY[case]
    with pytest.raises(error, match=message):
        from_scipy(make())


def test_arrays_of_scipy_may_have_room_to_spare():
    array = sparse.csr_array(np.eye(4, dtype="f4"))
    array.data, array.indices = np.append(array.data, [5, 5]).astype("f4"), np.append(array.indices, [9, 9])
    assert torch.equal(from_scipy(array).to_dense(), torch.eye(4))


def test_indices_of_scipy_are_checked():
    for field, value in (("indices", 7), ("indices", -1), ("indptr", 99)):
        array = sparse.csr_array(np.eye(4, dtype="f4"))
        getattr(array, field)[1] = value
        with pytest.raises(FormatError):
            from_scipy(array)


SETTINGS = {
    "no sparse layout": (lambda p: p.to_torch(torch.strided), RecipeError, "no sparse layout"),
    "a name for a layout": (lambda p: p.to_torch("csr"), TypeError, "torch.sparse_csr"),
    "no blocksize": (lambda p: p.to_torch(torch.sparse_bsr), RecipeError, "no blocksize"),
    "blocks that do not divide": (
        lambda p: p.to_torch(torch.sparse_bsr, blocksize=(4, 3)), RecipeError, "4x3 do not divide a weight of 8x8"
    ),
    "blocks of zero": (lambda p: p.to_torch(torch.sparse_bsr, blocksize=(0, 3)), RecipeError, "at least 1"),
    "blocks that are one number": (lambda p: p.to_torch(torch.sparse_bsr, blocksize=4), TypeError, "height, width"),
    "blocks for single entries": (lambda p: p.to_torch(blocksize=(4, 4)), RecipeError, "is for BSR"),
    "an unknown format": (lambda p: p.to_scipy("csrr"), RecipeError, "did you mean 'csr'"),
    "blocks by column of scipy": (lambda p: p.to_scipy("bsc"), RecipeError, "Valid are"),
    "scales of floats": (lambda p: from_torch(p.to_torch(), scales=torch.ones(8)), RecipeError, "Leave them out"),
    "a pattern that is broken": (lambda p: from_torch(p.to_torch(), "1:8"), PatternError, "keeps at most 1"),
    "a wide pattern that is broken": (
        lambda p: from_torch(pack(torch.ones(2, 32)).to_torch(), "4:32"), PatternError, "4:32"
    ),
    "a pattern that does not fit": (lambda p: from_torch(p.to_torch(), "2:3"), PatternError, "multiple of 3"),
    "a flag": (lambda p: from_torch(p.to_torch(), keep_zeros=1), TypeError, "keep_zeros"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_do_not_fit(case):
    call, error, message = SETTINGS[case]
    packed = Bitmask.from_dense(torch.randn(8, 8), random_mask(Unstructured(), (8, 8), 1))
    with pytest.raises(error, match=message):
        call(packed)


def test_scales_that_are_none():
    codes = RowPacked.from_dense(torch.ones(4, 4), value_dtype=torch.int8).to_torch(value_dtype=torch.int8)
    for scales, error in (
        (torch.ones(3), FormatError),
        (torch.ones(4).double(), FormatError),
        (torch.tensor([1, 1, 1, torch.nan]), FormatError),
        (-torch.ones(4), FormatError),
    ):
        with pytest.raises(error, match="scales"):
            from_torch(codes, scales=scales)
    twice = torch.tensor([[0, 0], [1, 1]]), torch.tensor([100, 100], dtype=torch.int8)
    with pytest.raises(FormatError, match="codes cannot be added up"):
        from_torch(torch.sparse_coo_tensor(*twice, (4, 4), check_invariants=True), scales=torch.ones(4))
    with pytest.raises(RecipeError, match="Leave value_dtype out"):
        from_torch(codes, scales=torch.ones(4), value_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_that_scipy_lacks_name_the_way_out(dtype):
    packed = Bitmask.from_dense(torch.eye(4, dtype=dtype))
    with pytest.raises(FormatError, match=r"value_dtype=torch.float32.*value_dtype=torch."):
        packed.to_scipy()
    assert same(from_scipy(packed.to_scipy(value_dtype=torch.float32), "unstructured", value_dtype=dtype), packed)


def test_codes_go_through_scipy():
    packed = Bitmask.from_dense(torch.randn(4, 9), random_mask(Unstructured(), (4, 9), 1), value_dtype=torch.int8)
    array = packed.to_scipy(value_dtype=torch.int8)
    assert array.dtype == np.int8
    assert same(from_scipy(array, "unstructured", scales=packed.unscaled()[1]), packed)


def test_without_scipy_the_message_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    packed = pack(torch.eye(4))
    for call in (packed.to_scipy, lambda: from_scipy(None)):
        with pytest.raises(ImportError, match="pip install scipy"):
            call()


def test_the_meta_device_has_no_entries():
    packed = Bitmask.from_dense(torch.eye(4))
    tensors = {name: tensor.to("meta") for name, tensor in packed.tensors().items()}
    with pytest.raises(FormatError, match="meta device"):
        Bitmask.assemble(tensors, (4, 4), packed.pattern).to_torch()
    assert bits(packed.values).numel()
