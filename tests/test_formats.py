import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import FORMATS as CASES
from hypothesis import given
from hypothesis import strategies as st

from secateur import NM, Block, Column, FormatError, PatternError, RecipeError, Row, SparsityPattern, Unstructured
from secateur.formats import (
    FORMATS,
    VALUE_DTYPES,
    Bitmask,
    BlockPacked,
    ColumnPacked,
    DensePacked,
    Format,
    NMPacked,
    RowPacked,
    choose,
)

MAX_SIDE = 2**31 - 1  # indices are int32
FLOATS = [torch.float32, torch.bfloat16, torch.float16]

ONE_OF_EACH = [
    (Bitmask, Unstructured()),
    (NMPacked, NM(2, 4)),
    (BlockPacked, Block(2, 4)),
    (RowPacked, Row()),
    (ColumnPacked, Column()),
    (DensePacked, Unstructured()),
]


def random_bits(shape, dtype, seed):
    """Every bit pattern may come up: NaNs with payloads, infinities, subnormals, -0.0."""
    generator = torch.Generator().manual_seed(seed)
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    info = torch.iinfo(integer)
    bits = torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=torch.int64).to(integer)
    weight = bits.view(dtype)
    special = torch.tensor([-0.0, math.nan, math.inf, -math.inf, 0.0]).to(dtype)
    where = torch.rand(shape, generator=generator)
    return torch.where(where < 0.5, weight, special[(where * 10).long() % 5])


def random_mask(pattern, shape, seed, sparsity=0.5):
    scores = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return pattern.mask(scores, pattern.sparsity if pattern.sparsity is not None else sparsity)


def bits(tensor):
    tensor = tensor.contiguous()
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor


def same_bits(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(bits(left), bits(right))


def cleared(weight, mask):
    """The pruned weight, with +0.0 where the mask is False."""
    weight = weight.clone()
    weight[~mask] = 0.0
    return weight


def slow_dense(packed):
    """The weight by the words of docs/format.md, one element at a time."""
    rows, columns = packed.shape
    tensors = {name: tensor.tolist() for name, tensor in packed.tensors().items()}
    values, scales = tensors["values"], tensors.get("scales")
    dense = [[0.0] * columns for _ in range(rows)]
    match packed:
        case Bitmask():
            for i in range(rows):
                at = tensors["row_offsets"][i]
                for j in range(columns):
                    if tensors["bitmask"][i][j // 8] >> (j % 8) & 1:
                        dense[i][j] = values[at]
                        at += 1
        case NMPacked():
            n, m = packed.pattern.n, packed.pattern.m
            width = 2 if m <= 4 else 4
            for i in range(rows):
                stream = sum(byte << (8 * k) for k, byte in enumerate(tensors["indices"][i]))
                for k in range(columns // m * n):
                    dense[i][k // n * m + (stream >> (k * width)) % 2**width] = values[i][k]
                for k in range(columns % m):
                    dense[i][columns - columns % m + k] = tensors["right"][i][k]
        case BlockPacked():
            height, width = packed.pattern.height, packed.pattern.width
            ends = [*tensors["row_offsets"][1:], len(values)]
            for row, (start, end) in enumerate(zip(tensors["row_offsets"], ends, strict=False)):
                for k in range(start, end):
                    for i in range(height):
                        for j in range(width):
                            dense[row * height + i][tensors["block_columns"][k] * width + j] = values[k][i][j]
            for i, line in enumerate(tensors.get("right", [])):
                dense[i][columns - len(line) :] = line
            for i, line in enumerate(tensors.get("bottom", [])):
                dense[rows - rows % height + i] = line
        case RowPacked():
            for k, row in enumerate(tensors["rows"]):
                dense[row] = values[k]
            if scales is not None:
                scales = [dict(zip(tensors["rows"], scales, strict=True)).get(i, 1.0) for i in range(rows)]
        case ColumnPacked():
            for k, column in enumerate(tensors["columns"]):
                for i in range(rows):
                    dense[i][column] = values[i][k]
        case DensePacked():
            dense = values
    if scales is not None:
        dense = [[np.float32(code) * np.float32(scales[i]) for code in dense[i]] for i in range(rows)]
    dtype = torch.float32 if packed.value_dtype == torch.int8 else packed.value_dtype
    return torch.tensor(np.array(dense, dtype=np.float64).reshape(rows, columns)).to(dtype)


# The examples of the specification


def examples():
    text = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        if name := re.match(r"`(\w+)`", section):
            for number, block in enumerate(re.findall(r"^```json\n(.*?)^```", section, re.MULTILINE | re.DOTALL)):
                yield pytest.param(name[1], json.loads(block), id=f"{name[1]}-{number}")


def test_the_specification_has_an_example_of_every_format():
    assert {example.values[0] for example in examples()} == set(FORMATS)


@pytest.mark.parametrize(("name", "example"), list(examples()))
def test_the_examples_of_the_specification(name, example):
    pattern, weight = SparsityPattern.parse(example.pop("pattern")), torch.tensor(example.pop("weight"))
    weight = weight.float()
    assert weight.shape == (4, 8)
    wanted = {}
    for key, value in example.items():
        ((dtype, data),) = value.items()
        wanted[key] = torch.tensor(data, dtype=getattr(torch, dtype))
    packed = FORMATS[name].from_dense(weight, pattern=pattern, value_dtype=wanted["values"].dtype)
    found = packed.tensors()
    assert list(found) == list(wanted)
    for key, tensor in wanted.items():
        assert same_bits(found[key], tensor), (key, found[key])
    again = FORMATS[name].from_tensors(wanted, (4, 8), pattern)
    if "scales" not in wanted:
        assert torch.equal(again.to_dense(), weight)
    assert same_bits(again.to_dense(), slow_dense(again))


def test_golden_bytes():
    """The bytes themselves, of one weight in all formats: numpy and torch could agree on a wrong order."""
    weight = torch.tensor([[0.0, -2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.0]])
    data = {
        Bitmask: "000000c00000803f0000003f" + "060004" + "0000000000000000" + "0200000000000000" * 2,
        NMPacked: "000000c00000803f" + "00" * 8 + "000000000000003f" + "09" + "04" + "08",
        RowPacked: "00000000000000c00000803f00000000" + "00000000000000000000003f00000000" + "0000000002000000",
        ColumnPacked: "000000c00000803f" + "00" * 8 + "000000000000003f" + "0100000002000000",
        BlockPacked: "00000000000000c0" + "0000803f00000000" + "0000003f00000000" + "00000000" + "01000000" * 2
        + "0000000000000000" + "0200000000000000" * 2,
    }  # fmt: skip
    patterns = {NMPacked: NM(2, 4), BlockPacked: Block(1, 2)}
    for format_type, wanted in data.items():
        tensors = format_type.from_dense(weight, pattern=patterns.get(format_type)).tensors().values()
        assert b"".join(bytes(bits(tensor).tolist()) for tensor in tensors).hex() == wanted, format_type


# Round trips


@pytest.mark.parametrize(("format_type", "pattern", "shape"), CASES, ids=str)
def test_floats_come_back_bit_for_bit(format_type, pattern, shape):
    for dtype in FLOATS:
        weight, mask = random_bits(shape, dtype, 1), random_mask(pattern, shape, 2)
        before = weight.clone()
        packed = format_type.from_dense(weight, mask, pattern)
        assert same_bits(packed.to_dense(), cleared(weight, mask)), dtype
        assert same_bits(weight, before)
        assert packed.shape == shape
        assert packed.pattern == pattern
        assert packed.value_dtype == dtype
        again = format_type.from_tensors(packed.tensors(), shape, pattern)
        assert same_bits(again.to_dense(), cleared(weight, mask)), dtype
        assert again.error(weight, mask) == 0.0
        assert not (mask & ~packed.mask()).any()


@pytest.mark.parametrize(("format_type", "pattern", "shape"), CASES, ids=str)
def test_the_words_of_the_specification_give_the_same_weight(format_type, pattern, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    mask = random_mask(pattern, shape, 4)
    for dtype in VALUE_DTYPES:
        packed = format_type.from_dense(weight, mask, pattern, dtype)
        assert same_bits(packed.to_dense(), slow_dense(packed)), dtype


@st.composite
def problems(draw):
    format_type, pattern = draw(
        st.one_of(
            st.sampled_from([(Bitmask, Unstructured()), (DensePacked, Unstructured())]),
            st.integers(1, 16).flatmap(
                lambda m: st.tuples(
                    st.just(NMPacked),
                    st.builds(NM, st.integers(0, m), st.just(m), st.sampled_from(["error", "dense"])),
                )
            ),
            st.tuples(
                st.just(BlockPacked),
                st.builds(Block, st.integers(1, 5), st.integers(1, 5), st.sampled_from(["error", "dense"])),
            ),
            st.just((RowPacked, Row())),
            st.tuples(st.just(ColumnPacked), st.builds(Column, st.integers(1, 3))),
        )
    )
    height, width = pattern._tile()
    dense = getattr(pattern, "remainder", "error") == "dense"
    rows = height * draw(st.integers(0, 5)) + (draw(st.integers(0, height - 1)) if dense else 0)
    columns = width * draw(st.integers(0, 5)) + (draw(st.integers(0, width - 1)) if dense else 0)
    seed, dtype = draw(st.integers(0, 2**20)), draw(st.sampled_from(FLOATS))
    sparsity = draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
    weight = random_bits((rows, columns), dtype, seed)
    mask = random_mask(pattern, (rows, columns), seed + 1, sparsity)
    if draw(st.booleans()):  # a mask that keeps less than its pattern would
        mask &= torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.7
    if draw(st.booleans()):
        weight = weight.T.contiguous().T
    return format_type, pattern, weight, mask


@given(problems())
def test_round_trips(problem):
    format_type, pattern, weight, mask = problem
    packed = format_type.from_dense(weight, mask, pattern)
    again = format_type.from_tensors(packed.tensors(), tuple(weight.shape), pattern)
    assert same_bits(again.to_dense(), cleared(weight, mask))
    assert packed.nbytes == format_type.predicted_nbytes(mask, pattern, weight.dtype)
    assert all(tensor.is_contiguous() for tensor in packed.tensors().values())
    assert same_bits(packed.convert(Bitmask).to_dense(), cleared(weight, mask))
    finite = weight.nan_to_num(0, 1, -1)
    coded = format_type.from_dense(finite, mask, pattern, torch.int8)
    again = format_type.from_tensors(coded.tensors(), tuple(weight.shape), pattern)
    assert same_bits(again.to_dense(), coded.to_dense())
    assert coded.nbytes == format_type.predicted_nbytes(mask, pattern, torch.int8)
    assert not coded.to_dense()[~mask].any()
    assert same_bits(coded.convert(Bitmask).to_dense(), coded.to_dense())
    step = cleared(finite, mask).float().abs().amax(1, keepdim=True) / 127 if weight.numel() else weight.float()
    assert ((coded.to_dense() - cleared(finite, mask).float()).abs() <= step * 0.50001 + 2**-126).all()


@pytest.mark.parametrize(("format_type", "pattern"), ONE_OF_EACH, ids=str)
def test_empty_weights(format_type, pattern):
    for shape, dtype in itertools.product([(0, 8), (8, 0), (0, 0)], [torch.float32, torch.int8]):
        packed = format_type.from_dense(torch.zeros(shape), None, pattern, dtype)
        assert format_type.from_tensors(packed.tensors(), shape, pattern).to_dense().shape == shape
        assert packed.nbytes == format_type.predicted_nbytes(torch.zeros(shape).bool(), pattern, dtype)


@pytest.mark.parametrize(("format_type", "pattern"), ONE_OF_EACH, ids=str)
def test_without_a_mask_what_is_not_zero_is_kept(format_type, pattern):
    weight = torch.zeros(4, 8)
    weight[0, 1], weight[0, 2], weight[1, 0], weight[2, 5] = 2.0, math.nan, -0.0, -math.inf
    dense = format_type.from_dense(weight, pattern=pattern).to_dense()
    assert torch.equal(dense.isnan(), weight.isnan())
    assert torch.equal(dense.nan_to_num(), weight.nan_to_num())
    if format_type is Bitmask:
        assert not dense[1, 0].signbit()  # a pruned weight that multiplication left negative


def test_a_kept_zero_is_stored():
    mask = torch.tensor([[True, False, True]])
    packed = Bitmask.from_dense(torch.tensor([[-0.0, 5.0, 0.0]]), mask)
    assert packed.values.tolist() == [0.0, 0.0]
    assert packed.to_dense().signbit().tolist() == [[True, False, False]]
    assert torch.equal(packed.mask(), mask)


def test_what_the_mask_prunes_is_dropped_even_nan():
    weight = torch.full((4, 8), math.nan)
    for format_type, pattern in ONE_OF_EACH:
        assert not format_type.from_dense(weight, torch.zeros(4, 8).bool(), pattern).to_dense().any()


def test_gradients_and_strides_do_not_matter():
    weight = torch.nn.Parameter(torch.arange(32.0).view(8, 4)).T
    packed = Bitmask.from_dense(weight)
    assert not packed.values.requires_grad
    assert torch.equal(packed.to_dense(), weight.detach())


def test_formats_are_values_of_plain_tensors():
    for format_type in FORMATS.values():
        assert dataclasses.is_dataclass(format_type)
        assert not format_type.__subclasses__()
    with pytest.raises(TypeError, match="abstract"):
        Format((1, 1), Unstructured(), torch.ones(1), None)
    packed = Bitmask.from_dense(torch.ones(1000, 1000))
    assert repr(packed) == "Bitmask(1000x1000, unstructured, float32, 4,133,000 bytes)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed.values = packed.values


# Sizes


def test_sizes_are_what_the_specification_says():
    rows, columns = 256, 1024
    for bits_, dtype in ((32, torch.float32), (16, torch.bfloat16), (8, torch.int8)):
        scales = 32 * rows if dtype == torch.int8 else 0
        dense = rows * columns * bits_

        def share(format_type, pattern, sparsity=None, dtype=dtype, scales=scales, dense=dense):
            mask = random_mask(pattern, (rows, columns), 0, sparsity)
            return (8 * format_type.from_dense(torch.ones(rows, columns), mask, pattern, dtype).nbytes - scales) / dense

        assert share(Bitmask, Unstructured(), 0.75) == 0.25 + 1 / bits_ + 64 / (columns * bits_)
        assert share(NMPacked, NM(2, 4)) == 0.5 * (1 + 2 / bits_)
        assert share(NMPacked, NM(1, 4)) == 0.25 * (1 + 2 / bits_)
        assert share(NMPacked, NM(1, 16)) == 1 / 16 * (1 + 4 / bits_)
        assert share(BlockPacked, Block(4, 4), 0.75) == 0.25 * (1 + 32 / (16 * bits_)) + 64 / (4 * columns * bits_)
        assert share(DensePacked, Unstructured(), 0.75) == 1
        assert share(ColumnPacked, Column(), 0.75) == 0.25 * (1 + 32 / (rows * bits_))
        if dtype != torch.int8:  # only the stored rows have a scale
            assert share(RowPacked, Row(), 0.75) == 0.25 * (1 + 32 / (columns * bits_))


@pytest.mark.parametrize(
    ("pattern", "sparsity", "dtype", "wanted"),
    [
        (Unstructured(), 0.5, torch.float32, Bitmask),
        (Unstructured(), 0.0, torch.float32, None),
        (Unstructured(), 0.12, torch.int8, None),  # density + 1/8
        (Unstructured(), 0.25, torch.int8, Bitmask),
        (Unstructured(), 1.0, torch.int8, Bitmask),
        (NM(2, 4), None, torch.float32, NMPacked),
        (NM(1, 2), None, torch.float32, NMPacked),
        (NM(4, 8), None, torch.float32, Bitmask),
        (NM(1, 16), None, torch.bfloat16, NMPacked),
        (NM(8, 32), None, torch.float32, Bitmask),
        (NM(4, 4), None, torch.float32, None),
        (Block(4, 4), 0.9, torch.float32, BlockPacked),
        (Block(1, 1), 0.5, torch.float32, Bitmask),
        (Row(), 0.5, torch.bfloat16, RowPacked),
        (Column(), 0.5, torch.bfloat16, ColumnPacked),
    ],
    ids=str,
)
def test_choose(pattern, sparsity, dtype, wanted):
    mask = random_mask(pattern, (128, 512), 0, sparsity)
    assert choose(pattern, mask, dtype) is wanted


def test_choose_takes_the_smallest():
    for pattern in (NM(2, 4), NM(3, 7, "dense"), Block(1, 3, "dense"), Block(2, 2), Row(), Column(), Unstructured()):
        for density in (0.02, 0.5, 0.95):
            mask = (
                torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) < density
            )  # any, not the pattern's own
            sizes = {torch.Tensor: mask.numel() * 4}
            for format_type in FORMATS.values():
                try:
                    sizes[format_type] = format_type.from_dense(torch.ones(64, 64), mask, pattern).nbytes
                except PatternError:
                    assert format_type.predicted_nbytes(mask, pattern) is None
            best = choose(pattern, mask) or torch.Tensor
            assert sizes[best] == min(sizes.values())


# Fewer bits


def test_int8_rounds_to_the_nearest_code_of_the_row():
    weight = torch.tensor([[127.0, 63.4, -0.6, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0, 0.0], [1e-44, 0.0, 0.0, 0.0, 0.0]])
    packed = Bitmask.from_dense(weight, torch.ones(3, 5).bool(), value_dtype=torch.int8)
    assert packed.values.tolist() == [127, 63, -1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    assert packed.scales.tolist() == [1.0, 1.0, 2.0**-126]
    assert packed.to_dense()[0].tolist() == [127.0, 63.0, -1.0, 0.0, 2.0]


def test_the_error_is_reported():
    weight = torch.tensor([[127.0, 63.5, 0.0]])
    packed = Bitmask.from_dense(weight, value_dtype=torch.int8)
    assert packed.error(weight) == pytest.approx(0.5 / math.hypot(127, 63.5))
    assert Bitmask.from_dense(weight).error(weight) == 0.0
    pruned = weight.masked_fill(weight < 100, 0)
    mask = weight > 100
    assert Bitmask.from_dense(weight, mask, value_dtype=torch.int8).error(weight, mask) == 0.0
    assert Bitmask.from_dense(pruned, value_dtype=torch.int8).error(weight) == pytest.approx(0.4472136)
    assert Bitmask.from_dense(torch.zeros(2, 2)).error(torch.zeros(2, 2)) == 0.0
    infinite = torch.tensor([[math.inf, math.nan, 1.0]])
    assert Bitmask.from_dense(infinite).error(infinite) == 0.0


def test_int8_has_no_code_for_a_weight_that_is_not_finite():
    for bad in (math.nan, math.inf, -math.inf):
        weight = torch.ones(3, 4)
        weight[1, 2] = bad
        with pytest.raises(FormatError, match=r"at row 1, column 2 has no int8 code.*float32"):
            Bitmask.from_dense(weight, value_dtype=torch.int8)


def test_overflow_is_an_error_not_an_infinity():
    weight = torch.tensor([[1.0, 7e4]])
    with pytest.raises(FormatError, match=r"70000 at row 0, column 1 is beyond the range of float16"):
        Bitmask.from_dense(weight, value_dtype=torch.float16)
    assert Bitmask.from_dense(torch.tensor([[math.inf]]), value_dtype=torch.float16).values.isinf().all()
    with pytest.raises(FormatError, match="beyond the range of float32"):
        Bitmask.from_dense(torch.tensor([[1e300]], dtype=torch.float64), value_dtype=torch.float32)
    with pytest.raises(FormatError, match="beyond the range of float32"):
        Bitmask.from_dense(torch.tensor([[1e300]], dtype=torch.float64), value_dtype=torch.int8)


def test_float64_needs_a_decision():
    with pytest.raises(FormatError, match=r"the weight is float64.*value_dtype"):
        Bitmask.from_dense(torch.ones(2, 2).double())
    assert Bitmask.from_dense(torch.ones(2, 2).double(), value_dtype=torch.float32).value_dtype == torch.float32


def test_bfloat16_scales_widen_exactly_and_int8_survives_conversion():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = random_mask(NM(2, 4), (8, 16), 1)
    packed = Bitmask.from_dense(weight, mask, NM(2, 4), torch.int8)
    for format_type, pattern in (
        (NMPacked, NM(2, 4)),
        (BlockPacked, Block(2, 2)),
        (RowPacked, Row()),
        (ColumnPacked, None),
        (DensePacked, None),
    ):
        other = packed.convert(format_type, pattern)
        assert other.value_dtype == torch.int8
        codes, scales = other.unscaled()
        assert torch.equal(codes, packed.unscaled()[0])
        assert torch.equal(scales, packed.scales)
        assert torch.equal(other.to_dense(), packed.to_dense())
    with pytest.raises(PatternError, match="keep 2 weights, but 1:4 keeps at most 1"):
        packed.convert(NMPacked, NM(1, 4))


# Wrong arguments


def test_wrong_arguments():
    weight = torch.ones(4, 8)
    with pytest.raises(TypeError, match=r"floating-point tensor, got int64"):
        Bitmask.from_dense(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"floating-point tensor, got list"):
        Bitmask.from_dense([[1.0]])
    with pytest.raises(PatternError, match=r"matrix of shape \(out, in\), got shape \(2, 3, 1\)"):
        Bitmask.from_dense(torch.ones(2, 3, 1))
    with pytest.raises(PatternError, match=r"mask has shape \(8, 4\), but the weight has shape \(4, 8\)"):
        Bitmask.from_dense(weight, torch.ones(8, 4).bool())
    with pytest.raises(TypeError, match=r"bool tensor, got float32"):
        Bitmask.from_dense(weight, weight)
    with pytest.raises(PatternError, match=r"NMPacked holds weights pruned to the pattern NM, got None"):
        NMPacked.from_dense(weight)
    with pytest.raises(PatternError, match=r"pattern Block, got Row\(\)"):
        BlockPacked.from_dense(weight, pattern=Row())
    with pytest.raises(PatternError, match=r"up to 16 weights, got 2:32"):
        NMPacked.from_dense(torch.ones(1, 32), pattern=NM(2, 32))
    with pytest.raises(PatternError, match="multiple of 3"):
        NMPacked.from_dense(weight, pattern=NM(1, 3))
    with pytest.raises(PatternError, match=r"row 0, columns 0 to 3 keep 4 weights, but 2:4 keeps at most 2"):
        NMPacked.from_dense(weight, pattern=NM(2, 4))
    with pytest.raises(RecipeError, match="int16"):
        Bitmask.from_dense(weight, value_dtype=torch.int16)


# A file is not trusted: one test for each error


def parts(format_type):
    """Shape, pattern and the tensors of a small valid weight."""
    pattern = {NMPacked: NM(2, 5, "dense"), BlockPacked: Block(2, 2, "dense")}.get(format_type)
    shape = (5, 11)
    weight = torch.arange(1.0, 56.0).view(shape)
    if format_type in (Bitmask, NMPacked):
        mask = random_mask(pattern or Unstructured(), shape, 0)
    else:
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[0:2, 2:6], mask[3, 8] = True, True
    return shape, pattern, format_type.from_dense(weight, mask, pattern).tensors()


def rejects(format_type, match, shape=None, pattern=None, drop=(), **changed):
    size, valid, tensors = parts(format_type)
    format_type.from_tensors(tensors, size, valid)  # valid but for what is changed
    tensors = {name: tensor for name, tensor in tensors.items() if name not in drop}
    tensors |= {name: change(tensors.get(name)) for name, change in changed.items()}
    with pytest.raises(FormatError, match=match):
        format_type.from_tensors(tensors, shape or size, pattern or valid)


def put(index, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((-5, 11), "out of range"),
        ((5, MAX_SIDE + 1), "out of range"),
        ((2**20, 2**20), r"1048576x1048576 is out of range"),
        ((5,), "two integers"),
        ((5, 11, 1), "two integers"),
        ((5.0, 11), "two integers"),
        ((True, 11), "two integers"),
    ],
    ids=str,
)
def test_shapes_out_of_range(shape, match):
    rejects(Bitmask, match, shape=shape)


@pytest.mark.parametrize("format_type", FORMATS.values())
def test_tensors_that_do_not_fit_the_shape(format_type):
    wrong = r"should be \w+ \[|has bits|has the index|there are|needs the tensors"
    rejects(format_type, wrong, shape=(3, 11))
    rejects(format_type, wrong, shape=(5, 3))


@pytest.mark.parametrize("format_type", FORMATS.values())
def test_missing_and_unknown_tensors(format_type):
    rejects(format_type, r"\['values'\] are missing", drop=("values",))
    rejects(format_type, r"\['scales'\] are unknown", scales=lambda _: torch.ones(5))
    rejects(format_type, r"\['scales'\] are missing", values=lambda values: values.to(torch.int8))
    rejects(format_type, r"\['weird'\] are unknown", weird=lambda _: torch.ones(5))
    for name in parts(format_type)[2]:
        rejects(format_type, f"'{name}'.* are missing", drop=(name,))


@pytest.mark.parametrize("format_type", FORMATS.values())
def test_wrong_dtypes(format_type):
    for name, tensor in parts(format_type)[2].items():
        if tensor.dtype == torch.float32:
            rejects(format_type, r"float64", **{name: lambda tensor: tensor.double()})
        else:
            rejects(format_type, rf"{name} should be .*, got int16 \[", **{name: lambda tensor: tensor.to(torch.int16)})
    for name in parts(format_type)[2].keys() - {"values"}:
        rejects(format_type, rf"{name} should be \w+ \[", **{name: lambda tensor: tensor[None]})


def test_offsets_that_fall():
    rejects(Bitmask, r"row_offsets fall from 50 at row 1 to \d+ at row 2", row_offsets=put(1, 50))
    rejects(BlockPacked, r"row_offsets start at 2", row_offsets=put(0, 2))
    rejects(BlockPacked, r"row_offsets reach 4, but there are 3 tiles", row_offsets=put(1, 4))


def test_offsets_that_start_elsewhere():
    rejects(Bitmask, r"row_offsets start at 1", row_offsets=put(0, 1))
    rejects(Bitmask, r"row_offsets start at -9", row_offsets=put(0, -9))


def test_offsets_beyond_the_values():
    rejects(Bitmask, r"row_offsets reach 99, but there are 27 values", row_offsets=put(4, 99))


def test_offsets_that_disagree_with_the_mask():
    first = int(parts(Bitmask)[2]["row_offsets"][1])
    rejects(Bitmask, rf"start row 1 at value {first - 1}, but.* {first} weights", row_offsets=put(1, first - 1))


def test_a_mask_that_disagrees_with_the_number_of_values():
    rejects(Bitmask, r"bitmask marks 27 weights, but there are 28 values", values=lambda v: torch.cat([v, v[:1]]))
    rejects(Bitmask, r"bitmask marks 27 weights, but there are 26 values", values=lambda v: v[:-1])


def test_bits_beyond_the_last_column():
    rejects(Bitmask, r"bits set beyond the last of 11 columns", bitmask=lambda bitmask: bitmask | 0x80)


def test_unused_bits_of_positions():
    tensors = NMPacked.from_dense(torch.eye(3), pattern=NM(1, 3)).tensors()
    tensors["indices"] = tensors["indices"] | 0x40
    with pytest.raises(FormatError, match="indices has bits set beyond its last position"):
        NMPacked.from_tensors(tensors, (3, 3), NM(1, 3))


def test_positions_out_of_range():
    rejects(NMPacked, r"names position 7 of a group, but 2:5,remainder=dense has 5", indices=put((2, 0), 0x71))
    tensors = NMPacked.from_dense(torch.eye(3), pattern=NM(1, 3)).tensors()
    with pytest.raises(FormatError, match="names position 3 of a group, but 1:3 has 3"):
        NMPacked.from_tensors({**tensors, "indices": torch.full((3, 1), 3, dtype=torch.uint8)}, (3, 3), NM(1, 3))


def test_positions_that_do_not_ascend():
    rejects(NMPacked, r"indices of row 2, group 0 are \[1, 1\]; they should ascend", indices=put((2, 0), 0x11))
    rejects(NMPacked, r"indices of row 2, group 1 are \[3, 0\]", indices=put((2, 1), 0x03))


@pytest.mark.parametrize(
    ("format_type", "name", "count"),
    [(BlockPacked, "block_columns", 5), (RowPacked, "rows", 5), (ColumnPacked, "columns", 11)],
)
def test_indices_out_of_range(format_type, name, count):
    rejects(format_type, rf"{name} has the index {count}; it should be 0 to {count - 1}", **{name: put(-1, count)})
    rejects(format_type, rf"{name} has the index -1; it should be 0 to {count - 1}", **{name: put(0, -1)})


@pytest.mark.parametrize(
    ("format_type", "name"), [(BlockPacked, "block_columns"), (RowPacked, "rows"), (ColumnPacked, "columns")]
)
def test_indices_that_do_not_ascend(format_type, name):
    first = int(parts(format_type)[2][name][0])
    rejects(format_type, rf"{name} has {first} after {first}; it should ascend", **{name: put(1, first)})


def test_block_columns_begin_again_in_every_row_of_tiles():
    weight = torch.zeros(4, 4)
    weight[0, 2], weight[2, 0], weight[2, 3] = 1, 2, 3
    packed = BlockPacked.from_dense(weight, pattern=Block(2, 2))
    assert packed.block_columns.tolist() == [1, 0, 1]
    BlockPacked.from_tensors(packed.tensors(), (4, 4), Block(2, 2))
    with pytest.raises(FormatError, match="block_columns has 0 after 1"):
        BlockPacked.from_tensors({**packed.tensors(), "row_offsets": torch.tensor([0, 2])}, (4, 4), Block(2, 2))


def test_values_without_a_row():
    tensors = Bitmask.from_dense(torch.ones(0, 8)).tensors()
    with pytest.raises(FormatError, match="2 values, but no row has them"):
        Bitmask.from_tensors({**tensors, "values": torch.ones(2)}, (0, 8))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_scales_that_are_not_finite_or_negative(bad):
    tensors = Bitmask.from_dense(torch.ones(2, 2), value_dtype=torch.int8).tensors()
    Bitmask.from_tensors({**tensors, "scales": torch.zeros(2)}, (2, 2))
    with pytest.raises(FormatError, match="scales should be finite and not negative"):
        Bitmask.from_tensors({**tensors, "scales": torch.tensor([1.0, bad])}, (2, 2))
    with pytest.raises(FormatError, match=r"scales should be float32 \[2\], got float32 \[3\]"):
        Bitmask.from_tensors({**tensors, "scales": torch.ones(3)}, (2, 2))


def test_patterns_that_do_not_fit():
    rejects(NMPacked, "pattern NM, got Row", pattern=Row())
    rejects(NMPacked, "multiple of 4, got 11", pattern=NM(2, 4))
    rejects(NMPacked, "up to 16", pattern=NM(2, 32))
    rejects(BlockPacked, "multiple of 2, got 5", pattern=Block(2, 2))
    rejects(DensePacked, "pattern Unstructured, got Row", pattern=Row())


def test_a_tiny_file_cannot_claim_a_huge_weight():
    with pytest.raises(FormatError, match="out of range"):
        RowPacked.from_tensors({"values": torch.ones(0, MAX_SIDE), "rows": torch.ones(0).int()}, (MAX_SIDE, MAX_SIDE))
