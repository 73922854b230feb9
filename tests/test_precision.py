"""Packing in fewer bits: the arithmetic that is asked for, or the fastest one within a tolerance of errors."""

import copy

import pytest
import torch
from cases import PACKED_PATTERNS, PACKED_WITH_REMAINDER
from fake_timing import routes_take
from torch import nn
from torch.nn import functional

import secateur
from secateur import PackedLinear, RecipeError, kernels
from secateur.kernels import RoutePlan
from secateur.packing import Measurement, decide, read_packed
from secateur.packing._output_error import inputs_of, layer_error, model_error, outputs_of
from secateur.reports import PackReport

STORED = {"bfloat16": torch.bfloat16, "int8": torch.int8}
BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bfloat16 = pytest.mark.skipif(not BFLOAT16, reason="oneDNN has no bfloat16 on this machine")
EACH = [pytest.param("bfloat16", marks=needs_bfloat16), "int8"]
# Times of routes: the fewer bits, the faster.
FASTER = {"int8-panels": 0.1, "prepacked-bfloat16": 0.3, "prepacked": 0.6, "dense": 1.0}


@pytest.fixture(autouse=True)
def _times(monkeypatch):
    routes_take(monkeypatch, lambda name, index: FASTER.get(name, 5.0))
    monkeypatch.setattr("secateur.kernels._backends.multiplies_bfloat16", lambda device: BFLOAT16)


def whole(*layers):
    """A model without zeros."""
    torch.manual_seed(0)
    return nn.Sequential(*layers).eval()


def linears(model):
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def relative(y, expected):
    return float(((y.double() - expected.double()).norm() / expected.double().norm()).detach())


# Precisions


@pytest.mark.parametrize("precision", EACH)
def test_layers_without_zeros_are_packed_whole_when_a_precision_is_given(precision, tmp_path):
    model = whole(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32, bias=False))
    x, expected = torch.randn(5, 64), copy.deepcopy(model)
    report = secateur.pack_(model, precision=precision, batches=[x])
    wanted = ("dense", str(STORED[precision]).removeprefix("torch."), precision, 1.0)
    assert [(row.format, row.value_dtype, row.precision, row.density) for row in report.layers] == [wanted] * 2
    assert [layer.plan.precision for layer in linears(model)] == [precision] * 2
    assert {layer.values.dtype for layer in linears(model)} == {STORED[precision]}
    y = model(x)
    assert 1e-5 < relative(y, expected(x)) < 0.03
    assert report.output_error == pytest.approx(relative(y, expected(x)), rel=1e-3)
    assert report.layers[0].output_error == pytest.approx(relative(model[0](x), expected[0](x)), rel=1e-3)
    assert PackReport.from_json(report.to_json()) == report
    path = tmp_path / "m.sparse.safetensors"
    secateur.save(model, path)
    assert {packed.name for packed in read_packed(path).layers.values()} == {"dense"}
    again = secateur.load(path, into=copy.deepcopy(expected))
    assert torch.equal(again(x), y)
    unpacked = secateur.load(path, into=copy.deepcopy(expected), dense=True)
    assert torch.equal(unpacked[0].weight, model[0].to_linear().weight)
    assert secateur.unpack_(model) == ["0", "2"]
    assert torch.equal(model[0].weight, unpacked[0].weight)


@pytest.mark.parametrize("settings", [{}, {"precision": "exact"}, {"value_dtype": "int8"}])
def test_layers_without_zeros_are_left_alone_otherwise(settings):
    model = whole(nn.Linear(64, 48), nn.Linear(48, 32))
    with torch.no_grad():
        model[0].weight[:, :40] = 0
    before = model[1]
    report = secateur.pack_(model, **settings)
    assert model[1] is before
    assert [(skip.name, skip.reason) for skip in report.skipped] == [("1", "no zeros")]
    assert [row.precision for row in report.layers] == ["exact"]
    assert "layers with zeros" in str(report)


def test_a_few_accidental_zeros_do_not_make_a_weight_larger():
    model = whole(nn.Linear(64, 48))
    with torch.no_grad():
        model[0].weight[3, 5] = 0
    assert secateur.pack_(model, precision="int8").layers[0].format == "dense"


@pytest.mark.parametrize("pattern", [*PACKED_PATTERNS, PACKED_WITH_REMAINDER])
def test_eight_bits_are_all_that_a_layer_runs_in_if_that_is_asked_for(monkeypatch, pattern):
    """Also where exact routes are faster. There is no sparse route in bfloat16, so that exact ones may run there."""
    routes_take(monkeypatch, lambda name, index: 1.0 if name == "dense" else 0.5 if name.startswith("int8") else 0.1)
    model = whole(nn.Linear(80, 48))
    secateur.prune_(model, pattern=pattern, sparsity=None if ":" in pattern[:2] else 0.5, method="magnitude")
    other = copy.deepcopy(model)
    (row,) = secateur.pack_(model, precision="int8").layers
    assert (row.format, row.precision, row.value_dtype) == (secateur.formats.pack(other[0].weight).name, "int8", "int8")
    assert model[0].plan.precision == "int8"
    (row,) = secateur.pack_(other, precision="bfloat16").layers
    assert (row.precision, row.value_dtype) == ("exact", "bfloat16")


@needs_bfloat16
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_what_is_stored_may_differ_from_the_arithmetic(dtype):
    model = whole(nn.Linear(64, 48))
    secateur.pack_(model, precision="bfloat16", value_dtype=dtype)
    assert model[0].values.dtype == getattr(torch, dtype)
    assert model[0].plan.precision == "bfloat16"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"precision": "int8", "tolerance": 0.1}, r"precision='int8' and tolerance=0\.1 were given\. .*Leave one"),
        ({"precision": "exact", "tolerance": 0.1}, r"precision='exact' and tolerance=0\.1"),
        ({"precision": "int8", "value_dtype": "float32"}, r"precision='int8' and value_dtype='float32'.*8 bits"),
        ({"precision": "int8", "value_dtype": "bfloat16"}, r"value_dtype='bfloat16'.*Leave value_dtype out"),
        ({"precision": "int4"}, r"unknown precision 'int4'"),
        ({"tolerance": 0.0}, r"tolerance must be above 0 and at most 1, got 0"),
        ({"tolerance": 1.5}, r"tolerance must be above 0 and at most 1"),
        ({"tolerance": 0.1}, r"tolerance=0\.1 was given, but no batches\. .*Give batches="),
        ({"tolerance": 0.1, "batches": []}, r"."),
    ],
    ids=str,
)
def test_settings_that_exclude_each_other(settings, match):
    model = whole(nn.Linear(64, 48))
    before = model[0]
    with pytest.raises(secateur.SparsityError, match=match):
        secateur.pack_(model, **settings)
    assert model[0] is before


def test_the_type_of_a_tolerance_is_checked():
    with pytest.raises(TypeError, match="tolerance must be a number, got str"):
        secateur.PackSettings(tolerance="0.1")


@pytest.mark.parametrize("precision", EACH)
def test_packing_again_keeps_the_arithmetic(precision, tmp_path):
    """As after loading on another machine, where routes are measured anew."""
    model = whole(nn.Linear(64, 48), nn.Linear(48, 32))
    x = torch.randn(3, 64)
    secateur.pack_(model, precision=precision)
    y = model(x)
    report = secateur.pack_(model)
    assert [row.precision for row in report.layers] == [precision] * 2
    assert torch.equal(model(x), y)
    report = secateur.pack_(model, precision="exact")
    assert {row.precision for row in report.layers} == {"exact"}


@pytest.mark.parametrize("precision", EACH)
def test_matrices_that_functions_multiply_run_in_the_arithmetic_too(precision):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 2, batch_first=True).eval()
    model, x = nn.ModuleList([attention, nn.LSTM(16, 24, batch_first=True).eval()]), torch.randn(2, 7, 32)
    dense, sequence = copy.deepcopy(model), torch.randn(2, 5, 16)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("secateur.packing._pack.losing_attention", lambda *args: {})
        report = secateur.pack_(model, precision=precision)
    assert [row.precision for row in report.layers if row.packed] == [precision] * len(report.layers)
    assert {row.name for row in report.layers} == {"0.in_proj_weight", "0.out_proj", "1"}
    for got, wanted in ((model[0](x, x, x)[0], dense[0](x, x, x)[0]), (model[1](sequence)[0], dense[1](sequence)[0])):
        assert 1e-5 < relative(got, wanted) < 0.05


def test_pixels_run_in_eight_bits(tmp_path):
    model = whole(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 16, 1))
    x, dense = torch.randn(2, 16, 5, 5), copy.deepcopy(model)
    report = secateur.pack_(model, precision="int8", batches=[x])
    assert [row.precision for row in report.layers] == ["int8"] * 2
    assert report.output_error == pytest.approx(relative(model(x), dense(x)), rel=1e-3)


def test_a_route_that_this_machine_cannot_run_is_named(monkeypatch):
    monkeypatch.setattr("secateur.kernels._backends.multiplies_bfloat16", lambda device: False)
    model = whole(nn.Linear(64, 48))
    report = secateur.pack_(model, precision="bfloat16")
    (note,) = report.notes
    assert note.startswith("the route prepacked-bfloat16 is untested, no backend runs it here")
    assert "no instructions for bfloat16" in note
    assert report.layers[0].precision == "exact"
    assert not secateur.pack_(whole(nn.Linear(64, 48)), precision="int8").notes


def test_a_layer_that_no_route_of_the_arithmetic_runs_stays_dense(monkeypatch):
    monkeypatch.setattr("secateur.kernels._int8.MOST_COLUMNS", 63)
    model = whole(nn.Linear(64, 48))
    before = model[0]
    (row,) = secateur.pack_(model, precision="int8").layers
    assert model[0] is before
    assert row.reason == "no route of int8 arithmetic runs its weight on this machine"


def test_default_plans_of_loaded_layers_have_the_arithmetic_of_the_file(monkeypatch, tmp_path):
    model = whole(nn.Linear(64, 48))
    secateur.pack_(model, precision="int8")
    secateur.save(model, tmp_path / "m.sparse.safetensors")
    monkeypatch.setattr("secateur.packing._fill.machine", lambda: {"processor": "another", "kernels": "any"})
    again = secateur.load(tmp_path / "m.sparse.safetensors", into=whole(nn.Linear(64, 48)))
    assert again[0].plan.precision == "int8"


# Tolerances


@needs_bfloat16
@pytest.mark.parametrize(
    ("tolerance", "precision"), [(0.1, "int8"), (0.005, "bfloat16"), (0.001, "exact"), (1e-6, "exact")]
)
def test_the_fastest_arithmetic_within_the_tolerance_is_taken(tolerance, precision):
    model = whole(nn.Linear(64, 48), nn.Linear(48, 32))
    x, dense = torch.randn(50, 64), copy.deepcopy(model)
    report = secateur.pack_(model, tolerance=tolerance, batches=[x[:20], x[20:]])
    assert [row.precision for row in report.layers] == [precision] * 2
    assert all(row.packed and row.output_error <= tolerance for row in report.layers)
    assert relative(model(x), dense(x)) <= tolerance + 1e-6
    assert (report.output_error or 0.0) == pytest.approx(relative(model(x), dense(x)), rel=1e-3, abs=1e-6)


def test_the_fastest_of_what_is_allowed_need_not_be_that_of_fewest_bits(monkeypatch):
    routes_take(monkeypatch, lambda name, index: {"dense": 1.0, "prepacked": 0.2, "int8-panels": 0.4}.get(name, 5.0))
    model = whole(nn.Linear(64, 48))
    (row,) = secateur.pack_(model, tolerance=0.5, batches=[torch.randn(4, 64)]).layers
    assert {choice.route for choice in row.choices} == {"prepacked"}
    assert (row.precision, row.value_dtype, row.output_error) == ("exact", "float32", 0.0)


def test_of_ways_that_are_as_fast_the_most_exact_is_taken(monkeypatch):
    routes_take(monkeypatch, lambda name, index: {"dense": 1.0}.get(name, 0.25))
    (row,) = secateur.pack_(whole(nn.Linear(64, 48)), tolerance=0.5, batches=[torch.randn(4, 64)], memory=2).layers
    assert (row.precision, row.output_error) == ("exact", 0.0)


@needs_bfloat16
@pytest.mark.parametrize(("dtype", "precision"), [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("int8", "int8")])
def test_a_tolerance_leaves_what_is_stored_as_it_was_asked_for(dtype, precision):
    (row,) = secateur.pack_(
        whole(nn.Linear(64, 48)), tolerance=0.1, value_dtype=dtype, batches=[torch.randn(9, 64)]
    ).layers
    assert (row.value_dtype, row.precision) == (dtype, precision)


@needs_bfloat16
def test_rounded_products_are_stored_in_as_few_bits():
    """Products in bfloat16 are the same with float32 values, which would take twice the bytes."""
    (row,) = secateur.pack_(whole(nn.Linear(64, 48)), tolerance=0.005, batches=[torch.randn(9, 64)]).layers
    assert (row.value_dtype, row.precision) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize(
    ("precisions", "plan"),
    [
        (("exact",), "bitmask@5 dense"),
        (("int8",), "int8-panels"),
        (("exact", "bfloat16"), "bitmask@5 prepacked-bfloat16"),
        (("exact", "bfloat16", "int8"), "bitmask@5 int8-panels"),
        ((), None),
    ],
    ids=str,
)
def test_a_plan_has_only_routes_that_are_allowed(precisions, plan):
    times = {"dense": (1.0, 1.0), "bitmask": (0.4, 2.0), "prepacked-bfloat16": (1.0, 0.5), "int8-panels": (0.8, 0.2)}
    routes = {RoutePlan.parse(name).routes[0]: seconds for name, seconds in times.items()}
    seconds = {rows: {route: [own[i]] * 3 for route, own in routes.items()} for i, rows in enumerate((1, 32))}
    decision = decide(Measurement(seconds, dict.fromkeys(routes, 10)), 100, 1.0, precisions)
    assert decision.plan == (plan and RoutePlan.parse(plan))


class Difference(nn.Module):
    """Two layers that nearly cancel each other, so that small errors of each are large ones of the model."""

    def __init__(self, apart):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(32, 16)
        with torch.no_grad():
            self.second.weight.copy_(self.first.weight + apart * torch.randn(32, 64))
            self.second.bias.copy_(self.first.bias)

    def forward(self, x):
        return self.third(50 * (self.first(x) - self.second(x)))


@needs_bfloat16
@pytest.mark.parametrize(("tolerance", "precision"), [(0.175, "bfloat16"), (0.05, "exact")])
def test_layers_are_made_more_exact_until_the_model_keeps_within_the_tolerance(tolerance, precision):
    model, x = Difference(0.001).eval(), torch.randn(40, 64)
    dense = copy.deepcopy(model)
    report = secateur.pack_(model, tolerance=tolerance, batches=[x])
    rows = {row.name: row for row in report.layers}
    assert rows["first"].precision == precision
    assert rows["second"].precision in (precision, "exact")
    assert rows["third"].precision == "int8"
    assert all(row.packed and row.output_error <= tolerance for row in rows.values())
    assert report.output_error == pytest.approx(relative(model(x), dense(x)), rel=1e-3)
    assert report.output_error <= tolerance
    assert [note.startswith("2 layers were made more exact, because") for note in report.notes] == [True]
    assert {*report.notes[0].partition(": ")[2].split(", ")} == {"first", "second"}


def test_a_layer_that_only_pays_in_fewer_bits_is_dense_once_it_is_taken_back(monkeypatch):
    routes_take(monkeypatch, lambda name, index: {"dense": 1.0, "int8-panels": 0.3}.get(name, 5.0))
    model, x = Difference(0.001).eval(), torch.randn(40, 64)
    report = secateur.pack_(model, tolerance=0.02, batches=[x])
    taken = [row for row in report.layers if not row.packed]
    assert {row.name for row in taken} == {"first", "second"}
    assert all(row.reason.startswith("taken back: with it alone in int8") for row in taken)
    assert type(model.first) is type(model.second) is nn.Linear
    assert isinstance(model.third, PackedLinear)


def test_zeros_are_used_and_stay_exact_where_fewer_bits_do_not_fit(monkeypatch):
    routes_take(monkeypatch, lambda name, index: {"dense": 1.0, "bitmask": 0.2, "int8-panels": 0.5}.get(name, 5.0))
    model = whole(nn.Linear(64, 48))
    with torch.no_grad():
        model[0].weight[:, :50] *= torch.rand(48, 50) > 0.9
    x, dense = torch.randn(9, 64), copy.deepcopy(model)
    (row,) = secateur.pack_(model, tolerance=1e-5, batches=[x]).layers
    assert (row.format, row.precision, row.value_dtype) == ("bitmask", "exact", "float32")
    torch.testing.assert_close(model(x), dense(x))


class Reads(nn.Module):
    """Its second layer is never called: a function multiplies by its weight."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return functional.linear(self.called(x), self.read.weight, self.read.bias)


def test_a_layer_whose_inputs_are_not_seen_stays_exact_and_is_named():
    torch.manual_seed(0)
    model, x = Reads().eval(), torch.randn(6, 32)
    report = secateur.pack_(model, tolerance=0.1, batches=[x])
    rows = {row.name: row for row in report.layers}
    assert rows["called"].precision == "int8"
    assert rows["read"].precision == "exact"
    assert rows["read"].output_error is None
    assert "no batch calls 1 layers, so that they stay exact: read" in report.notes


def test_stacks_and_recurrent_modules_are_exact_with_a_tolerance():
    torch.manual_seed(0)
    model = nn.ModuleDict({"lstm": nn.LSTM(16, 24, batch_first=True), "inner": nn.Linear(24, 24)}).eval()
    with torch.no_grad():
        model["lstm"].weight_hh_l0[:, ::2] = 0

    def forward(model, x):
        return model["inner"](model["lstm"](x)[0])

    x = torch.randn(2, 5, 16)
    report = secateur.pack_(model, tolerance=0.2, batches=[x], forward=forward)
    rows = {row.name: row for row in report.layers}
    assert rows["lstm"].precision == "exact"
    assert rows["lstm"].value_dtype == "float32"
    assert rows["inner"].precision == "int8"


@needs_bfloat16
def test_a_packed_model_is_compared_with_what_it_was():
    model, x = whole(nn.Linear(64, 48)), torch.randn(20, 64)
    secateur.pack_(model, precision="bfloat16", value_dtype="int8")
    before = copy.deepcopy(model)
    report = secateur.pack_(model, tolerance=0.1, batches=[x])
    assert model[0].plan.precision == "int8"
    assert report.output_error == pytest.approx(relative(model(x), before(x)), rel=1e-3)


def test_tied_layers_share_one_weight_in_fewer_bits():
    torch.manual_seed(0)
    first, second = nn.Linear(32, 32), nn.Linear(32, 32)
    second.weight = first.weight
    model, x = nn.Sequential(first, nn.ReLU(), second).eval(), torch.randn(8, 32)
    dense = copy.deepcopy(model)
    (row,) = secateur.pack_(model, tolerance=0.1, batches=[x]).layers
    assert row.tied_to == ("2",)
    assert model[0].values is model[2].values
    assert relative(model(x), dense(x)) < 0.1


def test_the_model_is_as_it_was_if_something_fails(monkeypatch):
    def fails(*args):
        raise RuntimeError("here")

    monkeypatch.setattr("secateur.packing._tolerance.decide", fails)
    model = whole(nn.Linear(32, 32))
    before, hooks = model[0], dict(model[0]._forward_pre_hooks)
    with pytest.raises(RuntimeError, match="here"):
        secateur.pack_(model, tolerance=0.1, batches=[torch.randn(2, 32)])
    assert model[0] is before
    assert model[0]._forward_pre_hooks == hooks


# Errors


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = x + 1
        a = self.first(input=y)
        y.mul_(0)
        return a + self.second(y)


def test_inputs_are_kept_as_they_were_when_the_layer_read_them():
    model, x = InPlace().eval(), torch.randn(4, 8)
    found = inputs_of(model, {0: [model.first], 1: [model.second], 2: []}, [x, x], lambda model, x: model(x))
    assert found.keys() == {0, 1}
    assert [torch.equal(got, x + 1) for got in found[0]] == [True, True]
    assert not any(got.any() for got in found[1])
    assert not model.first._forward_pre_hooks


def test_inputs_are_kept_up_to_a_limit(monkeypatch):
    monkeypatch.setattr("secateur.packing._output_error._MOST_BYTES", 100)
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    found = inputs_of(model, {0: [model[0]]}, [x] * 5, lambda model, x: model(x))
    assert len(found[0]) == 2


class Plus(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return x + self.value


@pytest.mark.parametrize(
    ("x", "value", "wanted"),
    [
        ([3.0, 4.0], 0.5, 0.5 * 2**0.5 / 5),
        ([3.0, 4.0], 0.0, 0.0),
        ([0.0, 0.0], 0.0, 0.0),
        ([0.0, 0.0], 1.0, float("inf")),
        ([1.0, 1.0], float("inf"), float("inf")),
        ([1.0, 1.0], float("nan"), float("inf")),
        ([float("inf"), 4.0], 0.0, 0.0),
        ([float("-inf"), 4.0], 1.0, 0.25),
        ([float("nan"), 4.0], 1.0, 0.25),
    ],
    ids=str,
)
def test_relative_errors(x, value, wanted):
    inputs = [torch.tensor(x[:1]), torch.tensor(x[1:])]
    assert layer_error(Plus(value), inputs, outputs_of(Plus(0.0), inputs)) == pytest.approx(wanted)
    model = nn.ModuleDict({"a": Plus(0.0)})
    parts = list(model.named_children())

    def forward(model, x):
        return {"found": [model["a"](x)], "count": 3, "mask": x > 0}

    assert model_error(model, [(model["a"], Plus(value))], inputs, forward) == pytest.approx(wanted)
    assert list(model.named_children()) == parts


def test_a_default_layer_of_a_weight_without_zeros_runs():
    packed = secateur.formats.DensePacked.from_dense(torch.randn(32, 16), value_dtype=torch.int8)
    layer = PackedLinear(packed, plan=kernels.default_plan(packed, "int8"))
    assert layer.plan == RoutePlan.parse("int8-panels")
    assert layer(torch.randn(3, 16)).shape == (3, 32)
    with pytest.raises(RecipeError, match="value_dtype"):
        secateur.PackSettings(value_dtype="int3")
