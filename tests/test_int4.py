"""Values of 4 bits with a scale for each group: how they are stored, and every kernel against a slow product."""

import copy

import pytest
import torch
from torch import nn

import secateur
from secateur import NM, Block, FormatError, KernelError, PackedLinear, kernels
from secateur.formats import (
    GRIDS,
    INT4,
    Bitmask,
    BlockPacked,
    ColumnPacked,
    DensePacked,
    NMPacked,
    RowPacked,
    choose,
    int4_codes,
)
from secateur.kernels import Int4BitmaskLayout, Int4PanelLayout

ISAS = [*kernels.isas(), "reference"]
LAYOUTS = {"bitmask": Int4BitmaskLayout, "panels": Int4PanelLayout}
SHAPES = [(1, 1), (5, 3), (17, 70), (70, 129), (40, 640)]


def pruned(rows, columns, density=0.5):
    return torch.randn(rows, columns), torch.rand(rows, columns) < density


def run(isa, x, packed, bias=None, plan=None):
    if isa == "reference":
        with kernels.use("reference"):
            return kernels.linear(x, packed, bias, plan)
    with kernels.use("native", isa=isa):
        return kernels.linear(x, packed, bias, plan)


# Storage


@pytest.mark.parametrize("format_type", [Bitmask, DensePacked])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (5, 0)])
def test_what_is_stored_is_the_nearest_on_the_grid(format_type, shape):
    torch.manual_seed(0)
    weight, mask = pruned(*shape)
    packed = format_type.from_dense(weight, mask, value_dtype=INT4)
    codes, scales = int4_codes(weight.where(mask, 0))
    wanted = codes * GRIDS["int4"].spread(scales, shape[1])
    assert torch.equal(packed.to_dense(), wanted)
    assert packed.dense_dtype == torch.float32
    again = format_type.from_tensors(packed.tensors(), shape)
    assert torch.equal(again.to_dense(), wanted)
    assert torch.equal(again.grouped()[0], codes)
    assert format_type.predicted_nbytes(mask, None, INT4) == packed.nbytes
    if format_type is Bitmask:
        assert torch.equal(again.mask(), mask)


def test_half_of_the_weights_take_three_and_a_third_bits():
    weight, mask = pruned(256, 2048)
    packed = Bitmask.from_dense(weight, mask, value_dtype="int4")
    assert 3.2 < 8 * packed.nbytes / weight.numel() < 3.4
    assert str(packed).startswith("Bitmask(256x2048, unstructured, int4, ")
    whole = DensePacked.from_dense(weight, value_dtype="int4")
    assert 8 * whole.nbytes / weight.numel() == 4.25
    assert 0.05 < packed.error(weight, mask) < 0.12


def test_formats_convert_without_rounding_again():
    weight, mask = pruned(9, 100)
    packed = Bitmask.from_dense(weight, mask, value_dtype=INT4)
    whole = packed.convert(DensePacked)
    assert whole.value_dtype == INT4
    assert torch.equal(whole.to_dense(), packed.to_dense())
    assert torch.equal(packed.to_torch().to_dense(), packed.to_dense())


@pytest.mark.parametrize(
    ("format_type", "pattern"),
    [(NMPacked, NM(2, 4)), (BlockPacked, Block(4, 4)), (RowPacked, None), (ColumnPacked, None)],
)
def test_other_formats_refuse_them(format_type, pattern):
    weight = torch.ones(8, 8) if pattern is None else torch.zeros(8, 8)
    with pytest.raises(FormatError, match="cannot hold int4 values"):
        format_type.from_dense(weight, None, pattern, INT4)
    with pytest.raises(FormatError, match="cannot hold int4 values"):
        Bitmask.from_dense(weight, value_dtype=INT4).convert(format_type, pattern)
    assert format_type.predicted_nbytes(weight != 0, pattern, INT4) is None


def test_the_smallest_format_is_one_that_can_hold_them():
    assert choose(NM(2, 4), NM(2, 4).mask(torch.rand(64, 256)), INT4) is Bitmask
    assert choose(secateur.Unstructured(), torch.ones(64, 256, dtype=torch.bool), INT4) is None


def damaged(name):
    weight, mask = torch.randn(4, 70), torch.ones(4, 70, dtype=torch.bool)
    mask[0, :3] = False  # 61 and 6 weights: a half is not used
    tensors = {
        key: tensor.clone() for key, tensor in Bitmask.from_dense(weight, mask, value_dtype=INT4).tensors().items()
    }
    match name:
        case "a byte less":
            tensors["values"] = tensors["values"][:-1]
        case "a byte more":
            tensors["values"] = torch.cat([tensors["values"], torch.zeros(1, dtype=torch.uint8)])
        case "a half that is not used":
            tensors["values"][30] |= 16
        case "offsets":
            tensors["row_offsets"][2] += 1
        case "a scale for each row":
            tensors["scales"] = tensors["scales"][:, :1]
        case "float32 scales":
            tensors["scales"] = tensors["scales"].float()
        case "an infinite scale":
            tensors["scales"][1, 1] = torch.inf
        case "no scales":
            del tensors["scales"]
    return tensors


@pytest.mark.parametrize(
    ("name", "reason"),
    {
        "a byte less": "bytes of int4 values, but there are",
        "a byte more": "bytes of int4 values, but there are",
        "a half that is not used": "beyond the last weight of a group",
        "offsets": "row_offsets",
        "a scale for each row": r"scales should be float16 \[4, 2\]",
        "float32 scales": "scales should be float16",
        "an infinite scale": "scales should be finite",
        "no scales": "scales",
    }.items(),
)
def test_a_damaged_weight_is_refused(name, reason):
    with pytest.raises(FormatError, match=reason):
        Bitmask.from_tensors(damaged(name), (4, 70))


def test_a_whole_weight_with_an_odd_number_of_columns_ends_with_an_empty_half():
    tensors = DensePacked.from_dense(torch.ones(2, 3), value_dtype=INT4).tensors()
    assert tensors["values"].shape == (2, 2)
    tensors["values"][1, 1] |= 16
    with pytest.raises(FormatError, match="beyond the last column"):
        DensePacked.from_tensors(tensors, (2, 3))


def test_weights_without_a_code_are_refused_by_name():
    for bad, reason in ((torch.nan, "no int4 code"), (1e6, "beyond the range of the float16 scales")):
        weight = torch.ones(2, 4)
        weight[1, 2] = bad
        with pytest.raises(FormatError, match=f"row 1, column 2.*{reason}"):
            Bitmask.from_dense(weight, value_dtype=INT4)


# Products


def slow(x, dense):
    """The product with inputs that are rounded as for 8 bits, in float64, and the size of its terms."""
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    scale = (high / 255 - low / 255).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-low * (1 / scale)).round().clamp(max=255)
    rounded = ((x * (1 / scale)).round() + zero).clamp(0, 255).double()
    y = (rounded - zero) @ dense.double().T * scale.double()
    return y, (rounded + zero) @ dense.double().abs().T * scale.double() + 1e-30


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_stored_weights(layout, shape):
    torch.manual_seed(0)
    weight, mask = pruned(*shape)
    packed, bias = LAYOUTS[layout].pack(weight, mask), torch.randn(shape[0])
    codes, scales = int4_codes(weight.where(mask, 0))
    dense = codes * GRIDS["int4"].spread(scales, shape[1])
    assert torch.equal(packed.to_dense(), dense)
    x = torch.randn(37, shape[1])
    x[3] *= 1000
    x[4], x[5] = x[4].abs(), 0
    wanted, size = slow(x, dense)
    for isa in ISAS:
        for batch in (0, 1, 2, 3, 4, 6, 7, 17, 37):
            y = run(isa, x[:batch], packed)
            assert ((y - wanted[:batch]).abs() <= 1e-6 * size[:batch]).all(), (isa, batch)
        y = run(isa, x, packed, bias)
        assert ((y - wanted - bias).abs() <= 1e-6 * (size + 1)).all(), isa
        assert torch.equal(run(isa, torch.zeros(1, shape[1]), packed, bias)[0], bias), isa


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_largest_codes_do_not_saturate(layout):
    x = torch.ones(9, 640)
    x[:, 1] = 0
    packed = LAYOUTS[layout].pack(torch.full((20, 640), -7.0))
    for isa in ISAS:
        assert torch.allclose(run(isa, x, packed), torch.full((9, 20), -7.0 * 639), rtol=1e-6), isa


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_that_is_not_finite_is_nan_alone(layout):
    packed = LAYOUTS[layout].pack(torch.randn(20, 40))
    x = torch.randn(4, 40)
    wanted = run("reference", x, packed)
    x[1, 3], x[2, 39] = torch.inf, torch.nan
    for isa in ISAS:
        y = run(isa, x, packed)
        assert y[1:3].isnan().all()
        torch.testing.assert_close(y[[0, 3]], wanted[[0, 3]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format_type", [Bitmask, DensePacked])
def test_every_route_computes_with_what_is_stored(format_type):
    torch.manual_seed(0)
    weight, mask = pruned(48, 192)
    packed = format_type.from_dense(weight, mask, value_dtype=INT4)
    x = torch.randn(3, 192)
    wanted = x @ packed.to_dense().T
    exact, rounded = kernels.candidates(packed), kernels.candidates(packed, precision="int8")
    assert {"int4-panels", "int8-panels"} <= set(map(str, rounded))
    assert ("int4-bitmask" in map(str, rounded)) == (format_type is Bitmask)
    for route in (*exact, *rounded):
        y = kernels.linear(x, packed, plan=str(route))
        assert (y - wanted).norm() < (1e-6 if route.precision == "exact" else 1e-2) * wanted.norm(), route


def test_routes_of_four_bits_run_nothing_else():
    packed = Bitmask.from_dense(torch.eye(64), value_dtype=torch.int8)
    assert not any(str(route).startswith("int4") for route in kernels.candidates(packed, precision="int8"))
    with pytest.raises(KernelError, match="runs int4 values only"):
        kernels.linear(torch.ones(1, 64), packed, plan="int4-bitmask")


# Layers and models


def test_a_packed_layer_is_copied_moved_saved_and_loaded(tmp_path):
    weight, mask = pruned(32, 100)
    layer = PackedLinear(Bitmask.from_dense(weight, mask, value_dtype=INT4), torch.randn(32), plan="int4-bitmask")
    x = torch.randn(2, 100)
    wanted = layer(x)
    assert "values='int4'" in repr(layer)
    assert torch.equal(copy.deepcopy(layer)(x), wanted)
    assert torch.equal(copy.deepcopy(layer).double().float()(x), wanted)
    other = PackedLinear(Bitmask.from_dense(torch.randn(32, 100), mask.flip(0), value_dtype=INT4), torch.zeros(32))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.matrix(), layer.matrix())
    assert layer.to_linear().weight.dtype == torch.float32


@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_a_model_is_packed_with_them(tmp_path, precision):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(192, 320), nn.ReLU(), nn.Linear(320, 64))
    secateur.prune_(model, sparsity=0.5, method="magnitude")
    dense = copy.deepcopy(model)
    x = torch.randn(4, 192)
    secateur.pack_(model, value_dtype="int4", precision=precision, batch_sizes=[1])
    secateur.save(model, tmp_path / "packed.safetensors")
    again = secateur.load(tmp_path / "packed.safetensors", into=dense)
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-4)
