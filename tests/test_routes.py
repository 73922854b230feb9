"""Routes, plans and backends: their texts, which backend runs which route and why, and products of formats."""

import pytest
import torch
from cases import FORMATS, PACKED_PATTERNS
from torch import nn

import secateur
from secateur import KernelError, PackedLinear, kernels
from secateur.formats import VALUE_DTYPES, pack
from secateur.kernels import (
    BitmaskRoute,
    ColumnRoute,
    DenseRoute,
    GroupRoute,
    PanelRoute,
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

PATTERNS = [pattern for pattern in PACKED_PATTERNS if pattern not in ("3:8", "block:16x1")]
CPU = torch.device("cpu")


def pruned(pattern, rows=32, columns=64, sparsity=0.5):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    parsed = secateur.SparsityPattern.parse(pattern)
    return weight.masked_fill(~parsed.mask(weight.abs(), sparsity if parsed.sparsity is None else None), 0)


def packed(pattern, dtype=None):
    return pack(pruned(pattern), dtype, (secateur.SparsityPattern.parse(pattern),))


def every_route():
    return {route for pattern in PATTERNS for route in candidates(packed(pattern))}


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
def test_every_candidate_can_be_read_from_a_file(pattern):
    weight = packed(pattern)
    for route in candidates(weight):
        assert usable_plan(weight, str(route)) == RoutePlan((route,))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_default_plan_takes_candidates(pattern):
    weight = packed(pattern)
    assert set(default_plan(weight).routes) <= set(candidates(weight))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_backend_runs_every_route_or_says_why_not(pattern):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    weights = [packed(pattern, dtype) for dtype in VALUE_DTYPES]
    for weight, route in ((made, route) for made in weights for route in candidates(made)):
        expected = x.double() @ weight.to_dense().double().T
        found = explain_route(weight, route, CPU, torch.float32)
        assert [backend for backend, _ in found] == list(BACKENDS)
        if all(reason for _, reason in found):
            with pytest.raises(KernelError, match="no backend runs"):
                kernels.prepare(weight, route, CPU, torch.float32)
            continue
        y = kernels.prepare(weight, route, CPU, torch.float32).run(x, None)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


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
