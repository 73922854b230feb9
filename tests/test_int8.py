"""Products in 8 bits: every kernel against whole numbers, exactly, and against float32."""

from functools import partial

import pytest
import torch

import secateur
from secateur import KernelError, PackedLinear, kernels
from secateur.formats import Bitmask, ColumnPacked, RowPacked, pack
from secateur.kernels import (
    Int8BitmaskLayout,
    Int8ColumnRoute,
    Int8PanelLayout,
    Int8RowRoute,
    Int8TileLayout,
    Int8TileRoute,
    RoutePlan,
)

ISAS = [*kernels.isas(), "reference"]
TILES = [(1, 4), (4, 4), (4, 1)]


def half_packed(weight):
    return Int8BitmaskLayout.pack(weight, torch.rand(weight.shape) < 0.5)


LAYOUTS = {"panels": Int8PanelLayout.pack, "bitmask": Int8BitmaskLayout.pack, "half": half_packed} | {
    f"tiles:{height}x{width}": partial(Int8TileLayout.pack, height=height, width=width) for height, width in TILES
}


def exactly(x, layout):
    """The definition, one output at a time, in Python's whole numbers and float32."""
    codes = (layout.to_dense().double() / layout.scale.double()[:, None]).round().long()
    y = torch.empty(len(x), len(codes))
    for b, row in enumerate(x.float()):
        if not row.isfinite().all():
            y[b] = torch.nan
            continue
        low, high = row.min().clamp(max=0), row.max().clamp(min=0)
        scale = (high / 255 - low / 255).clamp(min=torch.finfo(torch.float32).tiny)
        inverse = 1 / scale
        zero = int((-low * inverse).round().clamp(max=255))
        rounded = [min(max(int(value) + zero, 0), 255) for value in (row * inverse).round()]
        for r, weight in enumerate(codes.tolist()):
            whole = sum((u - zero) * w for u, w in zip(rounded, weight, strict=True))
            y[b, r] = torch.tensor(whole, dtype=torch.float32) * (scale * layout.scale[r])
    return y


def run(isa, x, layout, bias=None):
    if isa == "reference":
        with kernels.use("reference"):
            return kernels.linear(x, layout, bias)
    with kernels.use("native", isa=isa):
        return kernels.linear(x, layout, bias)


def with_outliers(x):
    x[..., ::7] *= 1000
    return x


INPUTS = {
    "normal": lambda x: x,
    "outliers": with_outliers,
    "constant": lambda x: torch.full_like(x, 0.7),
    "negative": lambda x: -x.abs(),
    "positive": lambda x: x.abs() + 1,
    "zero": torch.zeros_like,
    "tiny": lambda x: x * 1e-41,
    "huge": lambda x: x.sign() * 3e38,
    "one": lambda x: torch.zeros_like(x).index_fill_(-1, torch.tensor([0]), 1.0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_products_are_exact(layout, inputs):
    torch.manual_seed(0)
    for rows, columns in [(1, 1), (5, 3), (17, 70), (70, 33)]:
        packed = LAYOUTS[layout](torch.randn(rows, columns))
        x = INPUTS[inputs](torch.randn(9, columns))
        wanted = exactly(x, packed)
        for isa in ISAS:
            assert torch.equal(run(isa, x, packed), wanted), isa


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_product_saturates(layout):
    """The largest bytes and codes: an instruction that adds pairs of products in 16 bits would be wrong."""
    x = torch.ones(5, 64)
    x[:, 1] = 0
    for sign in (1, -1):
        packed = LAYOUTS[layout](torch.full((20, 64), 0.5) * sign)
        for isa in ISAS:
            assert torch.equal(run(isa, x, packed), exactly(x, packed)), isa


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_batch_and_the_bias(layout):
    torch.manual_seed(0)
    packed, bias = LAYOUTS[layout](torch.randn(70, 90)), torch.randn(70)
    x = torch.randn(140, 90)
    wanted = run("reference", x, packed)
    for isa in kernels.isas():
        for batch in (0, 1, 2, 3, 5, 7, 9, 12, 18, 33, 64, 128, 140):
            assert torch.equal(run(isa, x[:batch], packed), wanted[:batch]), (isa, batch)
            torch.testing.assert_close(run(isa, x[:batch], packed, bias), wanted[:batch] + bias, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_that_is_not_finite_is_nan_alone(layout):
    packed = LAYOUTS[layout](torch.randn(20, 40))
    x = torch.randn(4, 40)
    wanted = run("reference", x, packed)
    x[1, 3], x[2, 39] = torch.inf, torch.nan
    for isa in ISAS:
        y = run(isa, x, packed)
        assert y[1:3].isnan().all()
        assert torch.equal(y[[0, 3]], wanted[[0, 3]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_error_is_that_of_eight_bits(layout):
    torch.manual_seed(0)
    weight, x = torch.randn(200, 300), torch.randn(50, 300)
    packed = LAYOUTS[layout](weight)
    y = kernels.linear(x, packed)
    exact = x @ (weight * (packed.to_dense() != 0)).T
    assert 1e-4 < (y - exact).norm() / exact.norm() < 0.015


def with_tiles(rows, columns, tile, share):
    """A weight that keeps a share of its tiles, the last of which may be cut off."""
    kept = torch.rand(-(-rows // tile[0]), -(-columns // tile[1])) < share
    mask = kept.repeat_interleave(tile[0], 0)[:rows].repeat_interleave(tile[1], 1)[:, :columns]
    return torch.randn(rows, columns) * mask, mask, kept


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_kept_tiles_are_those_of_the_weight(tile, share):
    """Sizes that tiles do not divide, rows without a tile, and so many columns that there are sections of them."""
    torch.manual_seed(0)
    for rows, columns, batches in [(3, 5, (1, 9)), (70, 90, (1, 2, 4, 20, 130)), (90, 2500, (1, 4, 40))]:
        weight, mask, kept = with_tiles(rows, columns, tile, share)
        packed = Int8TileLayout.pack(weight, mask, height=tile[0], width=tile[1])
        dense = Int8PanelLayout.pack(weight, mask)
        assert torch.equal(packed.to_dense(), dense.to_dense())
        assert torch.equal(packed.sums, dense.sums)
        stored = kept.sum() if tile != (4, 1) else ((kept.sum(1) + 3) // 4).sum()
        assert packed.first_tiles[-1] == stored
        for batch in batches:
            x = torch.randn(batch, columns)
            wanted = run("reference", x, dense)
            for isa in ISAS:
                assert torch.equal(run(isa, x, packed), wanted), (isa, batch, rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_the_number_of_threads(layout):
    torch.manual_seed(0)
    packed, threads = LAYOUTS[layout](torch.randn(150, 260)), torch.get_num_threads()
    try:
        for batch in (1, 3, 40, 128, 300, 600):
            x = torch.randn(batch, 260)
            wanted = run("reference", x, packed)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                for isa in kernels.isas():
                    assert torch.equal(run(isa, x, packed), wanted), (isa, batch, count)
    finally:
        torch.set_num_threads(threads)


def test_tiles_of_another_size_are_refused():
    with pytest.raises(KernelError, match="tiles of 2x4"):
        Int8TileLayout.pack(torch.ones(4, 4), height=2, width=4)
    assert kernels.Int8TileRoute.read("int8-tiles:1x1") is None


@pytest.mark.parametrize(
    ("pattern", "routes"),
    [
        ("block:1x4", ["int8-tiles:1x4"]),
        ("block:1x16", ["int8-tiles:1x4"]),
        ("block:4x1", ["int8-tiles:4x1"]),
        ("block:8x2", ["int8-tiles:4x1"]),
        ("block:8x8", ["int8-tiles:4x4"]),
        ("block:2x2", []),
        ("unstructured", []),
        ("row", ["rows:int8-panels"]),
        ("column", ["columns:int8-panels"]),
    ],
)
def test_routes_of_tiles_are_candidates_for_blocks_of_them(pattern, routes):
    weight = torch.randn(32, 64)
    parsed = secateur.SparsityPattern.parse(pattern)
    packed = pack(weight.masked_fill(~parsed.mask(weight.abs(), 0.5), 0), None, (parsed,))
    found = [str(route) for route in kernels.candidates(packed, precision="int8")]
    assert [name for name in found if name not in ("int8-panels", "int8-bitmask")] == routes
    for name in found:
        assert str(RoutePlan.parse(name)) == name
        x = torch.randn(5, 64)
        y = kernels.linear(x, packed, plan=name)
        assert (y - x @ packed.to_dense().T).norm() < 0.02 * y.norm()


def test_few_weights_without_a_pattern_are_run_as_tiles():
    weight = torch.randn(64, 64) * (torch.rand(64, 64) < 0.08)
    assert Int8TileRoute(1, 4) in kernels.candidates(Bitmask.from_dense(weight), precision="int8")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_rows_and_columns_run_in_eight_bits_as_what_is_kept(dtype):
    """The inputs of columns that are left out do not count for the scale of a row."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(20, 30), torch.randn(20), torch.randn(7, 30)
    rows, columns = torch.arange(0, 20, 3), torch.arange(0, 30, 4)
    by_row = torch.zeros_like(weight).index_copy_(0, rows, weight[rows])
    by_column = torch.zeros_like(weight).index_copy_(1, columns, weight[:, columns])
    x[:, 1] = 1000
    packed = RowPacked.from_dense(by_row, value_dtype=dtype)
    y = kernels.linear(x, packed, bias, plan=str(Int8RowRoute()))
    wanted = bias.expand(7, -1).clone()
    wanted[:, rows] = kernels.linear(x, Int8PanelLayout.pack(weight[rows]), bias[rows])
    assert torch.equal(y, wanted)
    packed = ColumnPacked.from_dense(by_column, value_dtype=dtype)
    y = kernels.linear(x, packed, bias, plan=str(Int8ColumnRoute()))
    assert torch.equal(y, kernels.linear(x[:, columns], Int8PanelLayout.pack(weight[:, columns]), bias))
    with pytest.raises(KernelError, match="stored as rows"):
        kernels.linear(x, packed, plan=str(Int8RowRoute()))


@pytest.mark.parametrize("route", ["int8-panels", "int8-bitmask"])
def test_a_packed_layer_runs_in_eight_bits(route):
    torch.manual_seed(0)
    weight, mask = torch.randn(32, 48), torch.rand(32, 48) < 0.5
    for dtype in (torch.int8, torch.float32):
        layer = PackedLinear(Bitmask.from_dense(weight, mask, value_dtype=dtype), plan=route)
        x = torch.randn(5, 48)
        assert torch.equal(layer(x), kernels.linear(x, Int8PanelLayout.pack(weight, mask)))


def test_a_bitmask_shares_its_codes_with_its_kernel():
    weight, mask = torch.randn(128, 512), torch.rand(128, 512) < 0.5
    for dtype, route in ((torch.int8, "int8-bitmask"), ("int4", "int4-bitmask")):
        layer = PackedLinear(Bitmask.from_dense(weight, mask, value_dtype=dtype), plan=route)
        layer(torch.ones(1, 512))
        beside = layer.packed.bitmask.nbytes + layer.packed.row_offsets.nbytes + layer.packed.scales.nbytes
        assert layer.runtime_nbytes < beside + 4 * 128 + 100


def test_too_many_columns_are_refused():
    with pytest.raises(KernelError, match="65,537 inputs"):
        Int8PanelLayout.pack(torch.ones(1, 65537))


def test_routes_in_eight_bits_are_candidates_only_when_asked_for():
    packed = Bitmask.from_dense(torch.eye(64))
    assert all(route.precision == "exact" for route in kernels.candidates(packed))
    assert all(route.precision == "int8" for route in kernels.candidates(packed, precision="int8"))
