"""Packed convolutions: every route and kernel against float64, gradients, compilers, files, and measurements."""

import copy
import itertools

import pytest
import torch
from fake_timing import kernels_win
from torch import nn
from torch.nn import functional as F  # noqa: N812

import secateur
from secateur import FormatError, KernelError, kernels
from secateur.formats import VALUE_DTYPES, pack
from secateur.kernels import Pair, RoutePlan, Window, candidates, in_channels_last
from secateur.nn import PackedAs, PackedConv1d, PackedConv2d, why_no_counterpart
from secateur.packing import _images


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pruned(layer, sparsity=0.7, pattern="unstructured"):
    parsed = secateur.SparsityPattern.parse(pattern)
    with torch.no_grad():
        matrix = layer.weight.flatten(1)
        layer.weight[:] = matrix.masked_fill(~parsed.mask(matrix.abs(), sparsity), 0).view_as(layer.weight)
    return layer.eval().requires_grad_(False)


def packed(layer, plan=None, pattern=None, dtype=None):
    patterns = None if pattern is None else (secateur.SparsityPattern.parse(pattern),)
    made = pack(layer.weight.detach().flatten(1), dtype, patterns)
    plan = plan if plan is None or isinstance(plan, RoutePlan) else RoutePlan.parse(str(plan))
    return PackedAs.of(layer).build(made, layer.bias, plan, layer.weight.dtype)


def exact(layer, x):
    """The convolution in float64."""
    call = F.conv2d if x.ndim == layer.weight.ndim == 4 else F.conv1d
    bias = None if layer.bias is None else layer.bias.double()
    return call(x.double(), layer.weight.double(), bias, layer.stride, layer.padding, layer.dilation)


MOVES = {  # keywords of the convolution, and height and width of the image
    "one position": ({"kernel_size": 1}, (6, 7)),
    "one position, stride": ({"kernel_size": 1, "stride": (2, 3)}, (9, 8)),
    "one position, padding": ({"kernel_size": 1, "padding": 1}, (3, 4)),
    "3x3": ({"kernel_size": 3, "padding": 1}, (14, 14)),
    "3x3, stride": ({"kernel_size": 3, "padding": 1, "stride": 2}, (15, 14)),
    "3x3, no padding": ({"kernel_size": 3}, (5, 40)),
    "3x3, dilation": ({"kernel_size": 3, "padding": "same", "dilation": 2}, (9, 9)),
    "7x7, stride": ({"kernel_size": 7, "padding": 3, "stride": 2}, (23, 23)),
    "even": ({"kernel_size": (2, 4), "padding": (1, 2)}, (6, 9)),
    "stride above kernel": ({"kernel_size": 2, "stride": 5}, (17, 18)),
    "one pixel": ({"kernel_size": 3, "padding": 1}, (1, 1)),
    "a row": ({"kernel_size": (1, 5), "padding": (0, 2)}, (1, 37)),
}


@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:4x1", "row", "column"])
@pytest.mark.parametrize("case", MOVES)
def test_every_route_convolves(case, pattern, turned):
    keywords, size = MOVES[case]
    layer = pruned(nn.Conv2d(6, 20, **keywords), pattern=pattern)
    x = torch.randn(2, 6, *size)
    x = x.contiguous(memory_format=torch.channels_last) if turned else x
    expected = exact(layer, x)
    weight = packed(layer, pattern=pattern).packed
    routes = candidates(weight, (secateur.SparsityPattern.parse(pattern),))
    assert len(routes) > 1
    for route in routes:
        if kernels.can_run(weight, route, x):
            y = packed(layer, route, pattern)(x)
            assert y.dtype == x.dtype
            assert y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last) == turned
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5, msg=str(route))


native = pytest.mark.skipif(not kernels.isas(), reason="native kernels cannot run here")


@native
@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("plan", ["panels:64x128", "panels:128x256", "tiles:4x1", "tiles:8x2"])
def test_every_number_of_pixels(isa, plan):
    """All sizes of slices, more than one image in a slice, and pixels left over."""
    pattern = "block:" + plan.removeprefix("tiles:") if plan.startswith("tiles") else "unstructured"
    pointwise = pruned(nn.Conv2d(8, 24, 1), pattern=pattern)
    window = pruned(nn.Conv2d(4, 16, (1, 4), padding=(0, 1), stride=(1, 2)), pattern=pattern)
    with kernels.use("native", isa=isa):
        one, other = packed(pointwise, plan, pattern), packed(window, plan, pattern)
        for images, pixels in itertools.product((1, 3), (1, 2, 5, 15, 16, 17, 31, 33, 49, 64, 97, 130, 196, 400)):
            x = torch.randn(images, 8, 1, pixels)
            torch.testing.assert_close(one(x).double(), exact(pointwise, x), rtol=1e-5, atol=1e-5)
            x = torch.randn(images, 4, 2, pixels + 2)
            torch.testing.assert_close(other(x).double(), exact(window, x), rtol=1e-5, atol=1e-5)


@native
@pytest.mark.parametrize("isa", kernels.isas())
@pytest.mark.parametrize("plan", ["panels:64x128", "tiles:4x1", "tiles:8x2"])
def test_results_do_not_depend_on_the_number_of_threads(plan, isa):
    """Slices end in the middle of what a kernel computes at once, and threads that run in any order share them."""
    pattern = "block:" + plan.removeprefix("tiles:") if plan.startswith("tiles") else "unstructured"
    layer = pruned(nn.Conv2d(32, 64, 3, padding=1), 0.5, pattern)
    before = torch.get_num_threads()
    try:
        with kernels.use("native", isa=isa):
            convolution = packed(layer, plan, pattern)
            for pixels in ((13, 16), (25, 32)):
                x = torch.randn(1, 32, *pixels)
                torch.set_num_threads(1)
                expected = convolution(x)
                for threads in (2, 3, 4, 5) * 8:
                    torch.set_num_threads(threads)
                    assert torch.equal(convolution(x), expected)
    finally:
        torch.set_num_threads(before)


@native
@pytest.mark.parametrize("plan", ["panels:64x128", "tiles:4x1"])
def test_many_images_are_padded_in_groups(plan):
    layer = pruned(nn.Conv2d(64, 8, 3, padding=1), 0.8, "block:4x1")
    x = torch.randn(7, 64, 64, 64)  # some of 2 MB each
    torch.testing.assert_close(packed(layer, plan, "block:4x1")(x).double(), exact(layer, x), rtol=1e-5, atol=1e-5)


@native
@pytest.mark.parametrize("isa", kernels.isas())
def test_no_number_of_one_image_reaches_another(isa):
    """An infinity stays where the kernel covers it, also beside the border of an image."""
    layer = pruned(nn.Conv2d(3, 8, 3, padding=1), 0.0)
    x = torch.zeros(3, 3, 7, 7)
    x[1, :, 0, 0] = float("inf")
    with kernels.use("native", isa=isa):
        y = packed(layer, "panels:64x128")(x)
    assert torch.equal(y.isfinite(), exact(layer, x).isfinite())


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_value_dtypes(dtype):
    layer = pruned(nn.Conv2d(6, 20, 3, padding=1))
    x = torch.randn(2, 6, 9, 9)
    made = packed(layer, "panels:64x128", dtype=dtype)
    dense = made.to_dense()
    torch.testing.assert_close(made(x).double(), exact(dense, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_inputs(dtype):
    layer = pruned(nn.Conv2d(6, 20, 3, padding=1))
    x = torch.randn(2, 6, 9, 9, dtype=dtype)
    y = packed(layer)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact(layer, x), rtol=2e-2, atol=2e-2)


def test_inputs_of_any_number_of_images():
    layer = pruned(nn.Conv2d(6, 8, 3, padding=1))
    x = torch.randn(2, 3, 6, 5, 5)
    made = packed(layer)
    assert torch.equal(made(x), made(x.flatten(0, 1)).unflatten(0, (2, 3)))
    assert torch.equal(made(x[0, 0]), made(x[0, :1])[0])
    assert made(x[0, :0]).shape == (0, 8, 5, 5)
    strided = torch.randn(2, 6, 10, 10)[:, :, ::2, ::2]
    torch.testing.assert_close(made(strided), layer(strided), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kernel", "padding", "stride", "dilation"), [(1, 0, 1, 1), (3, 1, 2, 1), (5, "same", 1, 2)])
def test_one_dimension(kernel, padding, stride, dilation):
    layer = pruned(nn.Conv1d(6, 9, kernel, stride, padding, dilation))
    x = torch.randn(2, 6, 31)
    made = packed(layer)
    assert isinstance(made, PackedConv1d)
    torch.testing.assert_close(made(x).double(), exact(layer, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(made(x[0]), made(x[:1])[0])
    dense = made.to_dense()
    assert torch.equal(dense.weight, layer.weight)
    torch.testing.assert_close(dense(x), layer(x))


# Gradients and compilers


def operator_arguments(x):
    layer = pruned(nn.Conv2d(3, 4, 3, padding=1, stride=2))
    made = packed(layer.to(x.dtype), "dense")
    weight = [getattr(made.linear, name) for name in made.linear.names]
    return x, weight, made.bias, made.linear._spec, made.window.numbers


@pytest.mark.parametrize("turned", [False, True])
def test_the_operator_is_one_for_compilers(turned):
    x = torch.randn(2, 3, 6, 5)
    x = x.contiguous(memory_format=torch.channels_last) if turned else x
    torch.library.opcheck(torch.ops.secateur.packed_convolution, operator_arguments(x.requires_grad_()))


def test_the_input_gets_its_gradient_and_that_of_the_gradient():
    layer = pruned(nn.Conv2d(3, 4, 3, padding=1, stride=2)).double()
    made = packed(layer, "dense", dtype=torch.float32)
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(made, x, eps=1e-3, atol=1e-5, rtol=1e-4)
    torch.autograd.gradgradcheck(made, x, eps=1e-3, atol=1e-5, rtol=1e-4)


def test_a_bias_can_learn():
    made = packed(pruned(nn.Conv2d(3, 4, 3)))
    made.bias.requires_grad_()
    made(torch.randn(1, 3, 5, 5)).sum().backward()
    assert torch.equal(made.bias.grad, torch.full((4,), 9.0))


def test_vmap_and_export():
    layer = pruned(nn.Conv2d(3, 4, 3, padding=1))
    made = packed(layer)
    x = torch.randn(2, 5, 3, 6, 6)
    torch.testing.assert_close(torch.func.vmap(made)(x), made(x), rtol=1e-6, atol=1e-6)
    exported = torch.export.export(made, (x[0],)).module()
    torch.testing.assert_close(exported(x[1]), layer(x[1]), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_in_one_graph():
    layer = pruned(nn.Conv2d(3, 4, 3, padding=1))
    model = nn.Sequential(packed(layer), nn.ReLU())
    x = torch.randn(2, 3, 6, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x).relu(), rtol=1e-5, atol=1e-5)


# Mistakes


def test_inputs_that_do_not_fit_are_refused():
    made = packed(pruned(nn.Conv2d(3, 4, 3)))
    for shape in ((2, 4, 5, 5), (2, 3, 2, 5)):
        with pytest.raises(KernelError, match=r"takes \[..., 3, height, width\].* 3x3 must fit"):
            made(torch.randn(shape))
    with pytest.raises(KernelError, match="height, width"):
        made(torch.randn(5, 5))
    with pytest.raises(TypeError, match="int64"):
        made(torch.ones(1, 3, 5, 5, dtype=torch.int64))


def test_a_kernel_that_does_not_divide_the_weight_is_refused():
    linear = secateur.PackedLinear.from_linear(nn.Linear(10, 4))
    with pytest.raises(KernelError, match="3x3 does not fit a weight of 10 columns"):
        PackedConv2d(linear, kernel_size=(3, 3))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), "4 groups"),
        (nn.Conv2d(4, 4, 2, padding="same"), "one side more"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "'circular'"),
        (nn.Conv3d(4, 4, 3), "Conv3d"),
        (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d"),
    ],
)
def test_convolutions_that_stay_dense(layer, reason):
    assert reason in why_no_counterpart(layer)
    assert PackedAs.of(layer) is None


# Packing and files


def test_a_file_has_how_the_kernel_moves(tmp_path):
    layer = pruned(nn.Conv2d(6, 8, (3, 1), padding=(1, 0), dilation=(1, 1), stride=2))
    model = nn.Sequential(packed(layer))
    secateur.save(model, path := tmp_path / "a.sparse.safetensors")
    other = nn.Sequential(nn.Conv2d(6, 8, (3, 1), padding=(1, 0), stride=2))
    secateur.load(path, into=other)
    x = torch.randn(1, 6, 7, 7)
    assert other[0].window == model[0].window == Window(Pair(3, 1), Pair(2, 2), Pair(1, 0))
    assert torch.equal(other(x), model(x))
    for wrong in (nn.Conv2d(6, 8, (3, 1), stride=2), nn.Conv2d(6, 8, (1, 3), padding=(0, 1), stride=2)):
        with pytest.raises(FormatError, match="is a convolution of 8x18"):
            secateur.load(path, into=nn.Sequential(wrong))


def test_convolutions_are_measured_at_the_sizes_of_their_inputs(monkeypatch):
    model = nn.Sequential(
        pruned(nn.Conv2d(3, 8, 3, padding=1, stride=2)), nn.ReLU(), pruned(nn.Conv2d(8, 8, 1)), nn.Flatten()
    )
    batches = [torch.randn(2, 3, 12, 16), torch.randn(2, 3, 12, 16), torch.randn(1, 3, 6, 6)]
    kernels_win(monkeypatch)
    report = secateur.pack_(copy.deepcopy(model), batches=batches)
    seen = [[choice.rows for choice in layer.choices] for layer in report.layers]
    assert seen == [[9, 96], [9, 96]]
    turned = [batches[0].contiguous(memory_format=torch.channels_last)]
    first, second = _images.sizes_in(model, turned, lambda model, x: model(x)).values()
    assert (first, second) == (((2, 12, 16, True),), ((2, 6, 8, True),))
    assert in_channels_last(_images.image_inputs(model[2], second)[0][1])


def test_without_batches_the_usual_sizes_are_measured():
    wide = nn.Conv2d(512, 512, 3, padding=1, device="meta")
    assert [pixels for pixels, _ in _images.image_inputs(nn.Conv2d(4, 4, 3, padding=1, stride=2))] == [
        *_images.PIXELS,
    ]
    assert len(_images.image_inputs(nn.Conv2d(4, 4, 3), [(1, 2, 2, False)])) == len(_images.PIXELS)  # too small
    assert [size[1] for size in _images._usual_sizes(wide)] == [7, 14]  # more would take seconds for each route
    sequence = _images.image_inputs(nn.Conv1d(4, 4, 5, stride=2))
    assert [x.shape[-1] for _, x in sequence] == [2 * (pixels - 1) + 5 for pixels in _images.PIXELS]
