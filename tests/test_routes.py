"""Routes, plans and backends: their texts, which backend runs which route and why, and products of formats."""

import pytest
import torch
from cases import FORMATS, PACKED_PATTERNS
from torch import nn

import secateur
from secateur import FormatError, KernelError, PackedLinear, kernels
from secateur.formats import INT4, VALUE_DTYPES, Bitmask, DensePacked, pack
from secateur.kernels import (
    PRECISIONS,
    BitmaskRoute,
    ColumnRoute,
    DenseRoute,
    GroupRoute,
    PanelRoute,
    PrepackedBfloat16Route,
    PrepackedRoute,
    RoutePlan,
    RowRoute,
    TileRoute,
    candidates,
    default_plan,
    usable_plan,
)
from secateur.kernels._backends import BACKENDS, explain_route
from secateur.kernels._table import ROUTES, read_route
from secateur.nn import PackedConv2d

PATTERNS = [*(pattern for pattern in PACKED_PATTERNS if pattern not in ("3:8", "block:16x1")), "dense"]
# The relative error of one product of random numbers, by the arithmetic of the route.
ERRORS = {"exact": 1e-6, "bfloat16": 0.01, "int8": 0.03}
CPU = torch.device("cpu")


def pruned(pattern, rows=32, columns=64, sparsity=0.5):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    parsed = secateur.SparsityPattern.parse(pattern)
    return weight.masked_fill(~parsed.mask(weight.abs(), sparsity if parsed.sparsity is None else None), 0)


def packed(pattern, dtype=None):
    if pattern == "dense":
        return DensePacked.from_dense(pruned("unstructured", sparsity=0.0), value_dtype=dtype)
    return pack(pruned(pattern), dtype, (secateur.SparsityPattern.parse(pattern),))


def every_route():
    stored = [packed(pattern, dtype) for pattern in PATTERNS for dtype in VALUE_DTYPES]
    stored += [packed(pattern, INT4) for pattern in ("unstructured", "dense")]
    return {route for weight in stored for route in candidates(weight, (), PRECISIONS)}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setattr("secateur.kernels._plan.has_kernels", lambda: True)  # or their reference


def test_every_class_of_routes_is_a_candidate_somewhere():
    assert {type(route) for route in every_route()} == set(ROUTES)


def test_text_and_route_are_inverse():
    for route in every_route():
        assert read_route(str(route)) == route
        assert RoutePlan.parse(str(route)) == RoutePlan((route,))


def test_routes_are_values():
    assert GroupRoute(2, 4) == GroupRoute(2, 4) != GroupRoute(1, 4)
    assert len({TileRoute(4, 4), TileRoute(4, 4), TileRoute(4, 8)}) == 2
    assert [str(route) for route in (PanelRoute(), RowRoute(PrepackedRoute()), ColumnRoute())] == [
        "panels:128x256",
        "rows:prepacked",
        "columns",
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lanes:2:4", "groups:2:4"),
        ("strips:4x4", "tiles:4x4"),
        ("rows@4 rows:strips", "rows@4 rows:tiles"),
        ("columns:strips", "columns:tiles"),
    ],
)
def test_plans_of_version_0_1_are_read(old, new):
    assert str(RoutePlan.parse(old)) == new


def test_names_of_version_0_1_warn():
    for old, new in (("LaneLayout", "GroupLayout"), ("StripLayout", "TileLayout")):
        with pytest.warns(DeprecationWarning, match=new):
            assert getattr(kernels, old) is getattr(kernels, new)
    plan = RoutePlan.parse("bitmask@2 panels:128x256")
    with pytest.warns(DeprecationWarning, match="routes"):
        assert plan.ways == ("bitmask", "panels:128x256")
    with pytest.warns(DeprecationWarning, match="route"):
        assert plan.way(3) == "panels:128x256"
    with pytest.raises(AttributeError, match="nothing"):
        kernels.nothing


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_candidate_can_be_read_from_a_file(pattern, monkeypatch):
    monkeypatch.setattr("secateur.kernels._backends.multiplies_bfloat16", lambda device: True)
    for weight in (packed(pattern, dtype) for dtype in VALUE_DTYPES):
        for route in candidates(weight, (), PRECISIONS):
            assert usable_plan(weight, str(route)) == RoutePlan((route,))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_default_plan_takes_candidates(pattern, precision, monkeypatch):
    monkeypatch.setattr("secateur.kernels._backends.multiplies_bfloat16", lambda device: True)
    for weight in (packed(pattern, dtype) for dtype in VALUE_DTYPES):
        found = candidates(weight, (), precision)
        assert all(route.precision == precision for route in found)
        assert set(default_plan(weight, precision).routes) <= set(found or candidates(weight))


def test_candidates_of_several_precisions_are_those_of_each():
    weight = packed("unstructured", torch.int8)
    each = [route for precision in PRECISIONS for route in candidates(weight, (), precision)]
    assert set(candidates(weight, (), PRECISIONS)) == set(each)
    assert len(each) == len(set(each))
    assert not candidates(weight, (), ())


@pytest.mark.parametrize(
    ("plan", "precision"),
    [("bitmask@2 panels:128x256", "exact"), ("bitmask@2 prepacked-bfloat16", "bfloat16"), ("dense", "exact")],
)
def test_the_precision_of_a_plan_is_that_of_its_least_exact_route(plan, precision):
    assert RoutePlan.parse(plan).precision == precision


def test_without_instructions_for_bfloat16_no_plan_has_its_route(monkeypatch):
    monkeypatch.setattr("secateur.kernels._backends.multiplies_bfloat16", lambda device: False)
    weight, route = packed("dense", torch.bfloat16), PrepackedBfloat16Route()
    assert not kernels.can_run(weight, route, torch.ones(1, 64))
    layer = PackedLinear(weight, plan=str(route))
    assert "no instructions for bfloat16" in dict(kernels.explain(torch.ones(1, 64), layer))["onednn"]
    assert default_plan(weight, "bfloat16") == default_plan(weight)
    assert usable_plan(weight, "prepacked-bfloat16") == default_plan(weight)  # a file of another machine


def test_a_plan_of_another_machine_keeps_its_arithmetic(monkeypatch):
    monkeypatch.setattr("secateur.kernels._backends.multiplies_bfloat16", lambda device: True)
    weight = packed("2:4", torch.bfloat16)
    assert usable_plan(weight, "dense@2 prepacked-bfloat16", same_machine=False) == default_plan(weight, "bfloat16")
    assert usable_plan(weight, "dense@2 prepacked", same_machine=False) == default_plan(weight)
    assert usable_plan(weight, "nonsense", same_machine=False) == default_plan(weight)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_backend_runs_every_route_or_says_why_not(pattern):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    weights = [packed(pattern, dtype) for dtype in VALUE_DTYPES]
    for weight, route in ((made, route) for made in weights for route in candidates(made, (), PRECISIONS)):
        expected = x.double() @ weight.to_dense().double().T
        found = explain_route(weight, route, CPU, torch.float32)
        assert [backend for backend, _ in found] == list(BACKENDS)
        if all(reason for _, reason in found):
            with pytest.raises(KernelError, match="no backend runs"):
                kernels.prepare(weight, route, CPU, torch.float32)
            continue
        y = kernels.prepare(weight, route, CPU, torch.float32).run(x, None)
        assert (y - expected).norm() <= ERRORS[route.precision] * expected.norm()


def test_prepacked_weights_need_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "without oneDNN" in kernels.available()["onednn"]
    with pytest.raises(KernelError, match="onednn: this PyTorch was built without oneDNN"):
        kernels.prepare(packed("unstructured"), PrepackedRoute(), CPU, torch.float32)


@pytest.mark.parametrize(("format_type", "pattern", "shape"), FORMATS, ids=str)
def test_linear_multiplies_a_format_as_a_layer_does(format_type, pattern, shape):
    dense = pruned(str(pattern), *shape)
    weight = format_type.from_dense(dense, pattern=pattern)
    x, bias = torch.randn(2, 3, shape[1]), torch.randn(shape[0])
    layer = PackedLinear(weight, bias)
    torch.testing.assert_close(kernels.linear(x, weight, bias), layer(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernels.linear(x, weight, bias, plan="dense"), x @ dense.T + bias, rtol=1e-4, atol=1e-4)
    x.requires_grad_()
    kernels.linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)


def test_linear_refuses_a_plan_of_a_layout_and_other_types():
    layout = kernels.BitmaskLayout.pack(pruned("unstructured"))
    with pytest.raises(TypeError, match="takes no plan"):
        kernels.linear(torch.ones(1, 64), layout, plan="bitmask")
    with pytest.raises(TypeError, match="must be a layout"):
        kernels.linear(torch.ones(1, 64), torch.ones(32, 64))
    with pytest.raises(KernelError, match="takes 64 features"):
        kernels.linear(torch.ones(1, 63), packed("unstructured"))


def test_explain_takes_layers_formats_and_models():
    weight = packed("unstructured")
    layer = PackedLinear(weight, plan="bitmask@2 dense")
    model = nn.Sequential(
        layer, nn.ReLU(), PackedConv2d(PackedLinear(packed("row").__class__.from_dense(torch.eye(4))))
    )
    one, many = torch.ones(1, 64), torch.ones(3, 64)
    ours = dict(kernels.explain(one, layer))
    assert ours["reference"] == "ok: bitmask"
    assert ours["native"] in ("ok: bitmask", f"{kernels.available()['native']}")
    assert dict(kernels.explain(many, layer))["reference"] == "ok: dense"
    assert "the route dense has no native kernel" in dict(kernels.explain(many, layer))["native"]
    assert dict(kernels.explain(one, weight))["reference"] == "ok: bitmask"
    assert kernels.explain(one, model)["0"] == kernels.explain(one, layer)
    assert set(kernels.explain(one, model)) == {"0", "2"}
    with kernels.use("reference"):
        assert dict(kernels.explain(one, layer))["native"] == "use('reference') is in force"
    with pytest.raises(TypeError, match="has no packed layers"):
        kernels.explain(one, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="got str"):
        kernels.explain(one, "a layer")


def test_use_applies_to_layers_that_ran_before():
    layer = PackedLinear(packed("unstructured"), plan="bitmask")
    x = torch.randn(2, 64)
    expected = layer(x)
    with kernels.use("reference"):
        by_reference = layer(x)
        assert layer.runtime_nbytes > 0
    torch.testing.assert_close(by_reference, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x), expected)


def test_on_other_devices_the_weight_is_dense():
    plan = RoutePlan((BitmaskRoute(),))
    assert kernels._operator.route_for(plan, torch.ones(1, 4, device="meta")) == DenseRoute()


# Weights that are all zeros, and weights without rows or columns


EMPTY = [(f, p, size) for f, p, (rows, columns) in FORMATS for size in ((rows, columns), (0, columns), (rows, 0))]


@pytest.mark.parametrize(("format_type", "pattern", "shape"), EMPTY, ids=str)
def test_a_weight_of_zeros_runs_by_every_route_and_backend(format_type, pattern, shape):
    bias = torch.arange(1.0, shape[0] + 1)
    routes = {*every_route(), *map(GroupRoute, (1, 1, 2, 7), (1, 3, 5, 16)), TileRoute(1, 1), TileRoute(16, 1)}
    ran = set()
    for dtype in VALUE_DTYPES:
        stored = format_type.from_dense(torch.zeros(shape), None, pattern, dtype)
        for route in (route for route in routes if route.why_not(stored) is None):
            if not kernels.can_run(stored, route, torch.ones(1, shape[1])):
                continue  # such as bfloat16 without instructions for it
            for backend in ("native", "reference"):
                if kernels.available()[backend] != "ok":
                    continue
                with kernels.use(backend):
                    for rows in (0, 1, 3):
                        y = kernels.linear(torch.ones(rows, shape[1]), stored, bias, str(route))
                        assert torch.equal(y, bias.expand(rows, -1))
                    assert not kernels.linear(torch.ones(2, shape[1]).bfloat16(), stored, None, str(route)).any()
            ran.add(type(route))
    assert {DenseRoute, PrepackedRoute, BitmaskRoute} <= ran


# Inputs that cannot be multiplied are refused in the same words, whatever runs the weight


UNUSABLE = {
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "complex": lambda x: x.to(torch.complex64),
    "integer": lambda x: x.to(torch.int64),
    "bool": lambda x: x > 0,
    "list": lambda x: x.tolist(),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.filterwarnings("ignore:.*prototype stage:UserWarning", "ignore:.*Sparse CSR.*:UserWarning")
@pytest.mark.parametrize("kind", UNUSABLE)
def test_inputs_that_cannot_be_multiplied_are_refused_alike(kind):
    x = torch.ones(3, 64)
    bad, pixels = UNUSABLE[kind](x), UNUSABLE[kind](torch.ones(2, 64, 3, 3))
    said = set()
    for pattern in PATTERNS:
        stored = packed(pattern)
        for route in candidates(stored):
            for backend in ("native", "reference"):
                if kernels.available()[backend] != "ok":
                    continue
                layer = PackedLinear(stored, plan=RoutePlan((route,)))
                with kernels.use(backend):
                    for warm in (False, True):
                        if warm:
                            layer(x)  # what is known of an earlier input is not taken for this one
                        with pytest.raises(KernelError if kind == "meta" else TypeError) as caught:
                            layer(bad)
                        said.add(str(caught.value))
                        with pytest.raises(type(caught.value)) as caught:
                            PackedConv2d(layer)(pixels)
                        said.add(str(caught.value))
    (message,) = said
    assert any(advice in message for advice in ("to_dense", "Convert", "Move", "must be a tensor"))


@pytest.mark.parametrize("kind", ["float8", "complex", "integer", "bool"])
def test_inputs_of_other_dtypes_are_refused_under_autocast_too(kind):
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="must be floating point, got"):
        PackedLinear(packed("unstructured"))(UNUSABLE[kind](torch.ones(2, 64)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int64])
def test_biases_of_other_dtypes_are_refused_alike(dtype):
    bias, x = torch.ones(32).to(dtype), torch.ones(2, 64)
    layout = kernels.BitmaskLayout.pack(pruned("unstructured"))
    for call in (
        lambda: PackedLinear(packed("unstructured"), bias),
        lambda: kernels.linear(x, packed("unstructured"), bias),
        lambda: kernels.linear(x, layout, bias),
    ):
        with pytest.raises(TypeError, match="the bias of a packed weight must be floating point"):
            call()


@pytest.mark.parametrize("dtype", [None, torch.int8])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_packed_layer_on_meta_has_shapes_and_no_values(pattern, dtype):
    layer = PackedLinear(packed(pattern, dtype)).to("meta")
    for x in (torch.empty(2, 3, 64, device="meta"), torch.empty(2, 64, device="meta", requires_grad=True)):
        y = layer(x)
        assert (y.device.type, y.shape) == ("meta", (*x.shape[:-1], 32))
        if x.requires_grad:
            y.sum().backward()
            assert x.grad.shape == x.shape
    assert (layer.weight.shape, layer.weight.device.type) == ((32, 64), "meta")
    assert layer.to_linear().weight.is_meta
    assert "PackedLinear" in repr(layer)
    with pytest.raises(KernelError, match=r"input is on cpu, but the packed weight is on meta.*load them first"):
        layer(torch.ones(2, 64))
    for call in (lambda: layer.packed.convert(Bitmask), lambda: layer.packed.error(torch.ones(32, 64))):
        with pytest.raises(FormatError, match="on the meta device, without values"):
            call()
    model = nn.Sequential(layer)
    (skipped,) = secateur.pack_(model).skipped
    assert "meta device" in skipped.reason
    assert secateur.unpack_(model) == ["0"]


def test_weights_that_cannot_be_packed_are_refused_alike():
    weight = pruned("2:4")
    for bad, error, match in (
        (weight.to("meta"), FormatError, "on the meta device"),
        (weight.to_sparse(), TypeError, "must be a dense tensor, got one of layout"),
        (weight.to(torch.complex64), TypeError, "floating-point tensor, got complex64"),
        (weight.to(torch.float8_e5m2), FormatError, "float8_e5m2"),
    ):
        for call in (
            lambda bad: pack(bad, torch.bfloat16),
            lambda bad: Bitmask.from_dense(bad, value_dtype=torch.bfloat16),
            kernels.BitmaskLayout.pack,
        ):
            with pytest.raises(error, match=match):
                call(bad)
