"""Products in 8 bits: every kernel against whole numbers, exactly, and against float32."""

import pytest
import torch

from secateur import KernelError, PackedLinear, kernels
from secateur.formats import Bitmask
from secateur.kernels import Int8PanelLayout

ISAS = [*kernels.isas(), "reference"]
LAYOUTS = {"panels": Int8PanelLayout.pack}


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
        for batch in (0, 1, 2, 3, 5, 7, 12, 33, 140):
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
    y = kernels.linear(x, LAYOUTS[layout](weight))
    exact = x @ weight.T
    assert 1e-4 < (y - exact).norm() / exact.norm() < 0.015


def test_a_packed_layer_runs_in_eight_bits():
    torch.manual_seed(0)
    weight = torch.randn(32, 48)
    for dtype in (torch.int8, torch.float32):
        layer = PackedLinear(Bitmask.from_dense(weight, value_dtype=dtype), plan="int8-panels")
        x = torch.randn(5, 48)
        assert torch.equal(layer(x), kernels.linear(x, Int8PanelLayout.pack(weight)))


def test_too_many_columns_are_refused():
    with pytest.raises(KernelError, match="65,537 inputs"):
        Int8PanelLayout.pack(torch.ones(1, 65537))


def test_routes_in_eight_bits_are_candidates_only_when_asked_for():
    packed = Bitmask.from_dense(torch.eye(64))
    assert all(route.precision == "exact" for route in kernels.candidates(packed))
    assert all(route.precision == "int8" for route in kernels.candidates(packed, precision="int8"))
