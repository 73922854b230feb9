import copy
import json
import math
from html import unescape

import pytest
import torch
from cases import PACKED_PATTERNS
from fake_timing import kernels_win, routes_take
from torch import nn

import secateur
from secateur import FormatError, PackedLinear, RecipeError
from secateur._types import dtype_name
from secateur.kernels import RoutePlan, available
from secateur.nn import PackedConv1D, PackedConv2d
from secateur.packing import Measurement, _decide, _images, _measure, decide, read_packed
from secateur.reports import PackReport
from secateur.timing import MeasurementCache

DENSE_BYTES = 1000


def measured(table, nbytes=None):
    """A measurement from rows -> route -> seconds, the same in each of three rounds."""
    seconds = {rows: {route: [s] * 3 for route, s in routes.items()} for rows, routes in table.items()}
    routes = next(iter(table.values()))
    return measurement(
        seconds, {name: DENSE_BYTES if name in ("dense", "prepacked") else 400 for name in routes} | (nbytes or {})
    )


def measurement(seconds, nbytes):
    """A measurement whose routes are given as text."""
    return Measurement(
        {rows: {route(name): times for name, times in routes.items()} for rows, routes in seconds.items()},
        {route(name): size for name, size in nbytes.items()},
    )


def route(text):
    return RoutePlan.parse(text).routes[0]


def test_a_gain_at_one_batch_counts_whatever_the_noise_at_another():
    seconds = {
        1: {"dense": [1.0] * 4, "bitmask": [0.5] * 4},
        8: {"dense": [1.0, 1.0, 9.0, 9.0], "bitmask": [2, 1, 1, 2]},
    }
    decision = decide(measurement(seconds, {"dense": 9, "bitmask": 1}), 9, 1.0)
    assert decision.choices[1].ratio > decision.choices[0].ratio
    assert decision.choices[1].low < 1.01
    assert decision.plan == RoutePlan.parse("bitmask")


def test_the_fastest_within_memory_wins_each_batch():
    table = {1: {"dense": 1.0, "prepacked": 1.1, "bitmask": 0.5, "panels:64x128": 0.8}}
    table[32] = {"dense": 1.0, "prepacked": 0.5, "bitmask": 1.5, "panels:64x128": 0.6}
    decision = decide(measured(table), DENSE_BYTES, 1.0)
    assert str(decision.plan) == "bitmask@5 panels:64x128"
    assert decision.nbytes == 800
    assert [choice.ratio for choice in decision.choices] == pytest.approx([2.0, 1 / 0.6])
    assert decision.choices[1].prepacked_seconds == 0.5
    more = decide(measured(table), DENSE_BYTES, 2.0)
    assert str(more.plan) == "bitmask@5 prepacked"
    less = decide(measured(table), DENSE_BYTES, 0.5)
    assert str(less.plan) == "panels:64x128"


def test_a_layer_that_would_lose_somewhere_stays_dense():
    table = {
        1: {"dense": 1.0, "prepacked": 1.0, "bitmask": 0.5},
        128: {"dense": 1.0, "prepacked": 0.9, "bitmask": 1.25},
    }
    decision = decide(measured(table), DENSE_BYTES, 1.0)
    assert decision.plan == RoutePlan.parse("prepacked")  # which loses nowhere
    table[1]["prepacked"] = 1.2
    decision = decide(measured(table), DENSE_BYTES, 1.0)
    assert decision.plan is None
    assert decision.nbytes == 0
    assert "at batch 1" in decision.reason
    assert "1.2" in decision.reason
    assert decide(measured(table), DENSE_BYTES, 2.0).plan == RoutePlan.parse("bitmask@11 prepacked")


def test_a_gain_within_noise_does_not_count():
    table = {1: {"dense": 1.0, "bitmask": 0.98}}
    assert "no route is faster" in decide(measured(table), DENSE_BYTES, 1.0).reason
    noisy = measurement(
        {1: {"dense": [1.0, 2.0, 1.0, 1.0], "bitmask": [1.5, 1.0, 0.8, 1.02]}}, {"dense": 9, "bitmask": 9}
    )
    decision = decide(noisy, 9, 1.0)
    assert decision.choices[0].ratio > _decide.GAIN
    assert decision.choices[0].low < 1
    assert decision.plan is None
    table = {1: {"dense": 1.0, "bitmask": 2.0}}
    assert decide(measured(table), DENSE_BYTES, 1.0).reason.startswith("at batch 1 the fastest route")


def test_memory_decides_between_routes_that_are_nearly_as_fast():
    table = {1: {"dense": 1.0, "bitmask": 0.50, "panels:64x128": 0.49}}
    decision = decide(measured(table, {"bitmask": 10}), DENSE_BYTES, 1.0)
    assert decision.plan == RoutePlan.parse("bitmask")
    decision = decide(measured(table, {"bitmask": 400, "panels:64x128": 10}), DENSE_BYTES, 1.0)
    assert decision.plan == RoutePlan.parse("panels:64x128")


def test_a_layer_stays_dense_if_no_route_fits_into_memory():
    decision = decide(measured({1: {"dense": 1.0, "bitmask": 0.5}}), DENSE_BYTES, 0.1)
    assert decision.plan is None
    assert decision.reason == "no route fits into 0.1 times the bytes of the dense weight"


def test_routes_that_were_dropped_at_some_batch_are_not_chosen():
    slow = measurement(
        {1: {"dense": [1.0] * 7, "bitmask": [0.1] * 7}, 8: {"dense": [1.0] * 7, "bitmask": [9.0] * 2}},
        {"dense": 9, "bitmask": 1},
    )
    assert decide(slow, 9, 1.0).plan is None


# pack_


def winner(monkeypatch, name="bitmask", **others):
    """Let one route win; routes that are not named take 5 seconds."""
    table = {"dense": 1.0, "prepacked": 1.2, name: 0.25, **others}
    routes_take(monkeypatch, lambda route, index: table.get(route, 5.0))


def pruned(*layers, pattern="unstructured", sparsity=0.7):
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    parsed = secateur.SparsityPattern.parse(pattern)
    for layer in model:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            weight = layer.weight.detach().flatten(1)
            mask = parsed.mask(weight.abs(), None if isinstance(parsed, secateur.NM) else sparsity)
            with torch.no_grad():
                layer.weight.copy_(weight.masked_fill(~mask, 0).view_as(layer.weight))
    return model


def test_pack_replaces_what_wins_and_the_outputs_stay(monkeypatch):
    winner(monkeypatch)
    model = pruned(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32, bias=False)).eval()
    x = torch.randn(5, 64)
    expected = model(x)
    report = secateur.pack_(model)
    assert isinstance(model[0], PackedLinear)
    assert isinstance(model[2], PackedLinear)
    assert not model[0].training
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert [layer.name for layer in report.layers] == ["0", "2"]
    first = report.layers[0]
    assert (first.shape, first.pattern, first.format, first.value_dtype) == (
        (48, 64),
        "unstructured",
        "bitmask",
        "float32",
    )
    assert first.packed
    assert first.error == 0
    assert first.density == pytest.approx(0.3, abs=0.01)
    assert [choice.rows for choice in first.choices] == [1, 8, 32, 128]
    assert {choice.route for choice in first.choices} == {"bitmask"}
    assert {choice.ratio for choice in first.choices} == {4.0}
    assert first.dense_bytes == 4 * 48 * 64
    assert first.stored_bytes == model[0].nbytes < first.dense_bytes
    assert first.runtime_bytes == model[0].runtime_nbytes
    assert report.resident_bytes == report.stored_bytes + sum(layer.runtime_bytes for layer in report.layers)


def test_pack_leaves_what_does_not_win_as_it_was(monkeypatch):
    winner(monkeypatch, "none")
    model = pruned(nn.Linear(64, 48), nn.Linear(48, 48))
    before = list(model)
    report = secateur.pack_(model)
    assert list(model) == before
    assert not any(layer.packed for layer in report.layers)
    assert report.layers[0].reason.endswith("(prepacked) takes 1.20 of the dense layer's time")
    assert report.stored_bytes == report.dense_bytes


def test_layers_that_are_alike_are_measured_once(monkeypatch):
    winner(monkeypatch)
    calls = []
    inner = _measure.time_in_turn
    monkeypatch.setattr(_measure, "time_in_turn", lambda *args, **keep: calls.append(1) or inner(*args))
    layers = [nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 32)]
    secateur.pack_(pruned(*layers), batch_sizes=[1, 4])
    assert len(calls) == 4
    secateur.pack_(pruned(*[nn.Linear(64, 64)]), batch_sizes=[1, 4])
    assert len(calls) == 4
    secateur.pack_(pruned(*[nn.Linear(64, 64)]), batch_sizes=[1, 4], value_dtype="int8")
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("sparsities", "expected"),
    [
        ((0.7, 0.7, 0.7, 0.7), 1),  # though each satisfies another N:M by chance
        ((0.5, 0.51), 1),
        ((0.9, 0.903), 1),
        ((0.5, 0.6, 0.7, 0.8), 4),
        ((0.9, 0.95), 2),
    ],
)
def test_what_random_zeros_satisfy_by_chance_makes_no_other_kind_of_layer(monkeypatch, sparsities, expected):
    winner(monkeypatch)
    measured, inner = [], _measure.time_in_turn
    monkeypatch.setattr(_measure, "time_in_turn", lambda *args, **keep: measured.append(1) or inner(*args))
    model = nn.Sequential(*(pruned(nn.Linear(64, 64), sparsity=sparsity)[0] for sparsity in sparsities))
    for layer in model:  # another order of rows and columns, and so other patterns by chance
        with torch.no_grad():
            layer.weight.copy_(layer.weight[torch.randperm(64)][:, torch.randperm(64)])
    secateur.pack_(model, batch_sizes=[1])
    assert len(measured) == expected


def test_a_route_of_one_layer_is_not_taken_for_another_whose_zeros_do_not_allow_it(monkeypatch):
    """Both are as dense, but the zeros of one of them happen to follow a pattern with faster kernels."""
    kernels_win(monkeypatch)
    even, uneven = nn.Linear(32, 32), nn.Linear(32, 32)
    with torch.no_grad():
        even.weight[:, ::2] = 0
        uneven.weight[:, 16:] = 0
        for weight in (even.weight, uneven.weight):  # no columns, which would be a pattern of both
            weight[torch.arange(32), torch.randint(32, (32,))] = 1.0
    for layers in ([even, uneven], [uneven, even]):
        model = copy.deepcopy(nn.Sequential(*layers))
        x = torch.randn(4, 32)
        expected = model(x)
        secateur.pack_(model, batch_sizes=[4])
        torch.testing.assert_close(model(x), expected)


def test_skipped_layers_have_their_reason(monkeypatch):
    winner(monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Conv2d(4, 4, 3, groups=2), nn.LayerNorm(64))
    model.append(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
        model[2].weight[:2] = 0
        model[4].weight[:, 1::2] = 0
    model[4].register_forward_hook(lambda *args: None)
    report = secateur.pack_(model)
    reasons = {skip.name: skip.reason for skip in report.skipped}
    assert [layer.name for layer in report.layers] == ["0"]
    assert report.layers[0].pattern == "column"
    assert reasons["1"] == "no zeros"
    assert "a convolution with 2 groups" in reasons["2"]
    assert reasons["3"] == "no weight matrix"
    assert "hooks" in reasons["4"]


def test_include_and_exclude(monkeypatch):
    winner(monkeypatch)
    model = pruned(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    secateur.pack_(model, include=["0", "1"], exclude=["1"])
    assert [type(layer).__name__ for layer in model] == ["PackedLinear", "Linear", "Linear"]
    with pytest.raises(RecipeError, match="matches none"):
        secateur.pack_(model, include=["7"])


@pytest.mark.parametrize("given", ["int8", torch.int8, torch.bfloat16])
def test_values_of_fewer_bits_have_their_error_in_the_report(monkeypatch, given):
    winner(monkeypatch)
    model = pruned(nn.Linear(64, 64))
    weight = model[0].weight.detach().clone()
    report = secateur.pack_(model, value_dtype=given)
    layer = report.layers[0]
    assert layer.value_dtype == (given if isinstance(given, str) else dtype_name(given))
    expected = float((model[0].weight.double() - weight.double()).norm() / weight.double().norm())
    assert 0 < layer.error == pytest.approx(expected)
    assert layer.error < 0.02


def test_a_weight_that_cannot_be_stored_is_skipped(monkeypatch):
    winner(monkeypatch)
    model = pruned(nn.Linear(64, 64), nn.Linear(64, 64).double())
    reasons = {skip.name: skip.reason for skip in secateur.pack_(model).skipped}
    assert list(reasons) == ["1"]
    assert reasons["1"].startswith("cannot be packed: the weight is float64, but values can be stored as float32, ")


def test_settings_that_are_out_of_range_are_refused():
    model = pruned(nn.Linear(64, 64))
    for sizes in ([], [0], [1.5], [True]):
        with pytest.raises((RecipeError, TypeError), match=r"batch.size"):
            secateur.pack_(model, batch_sizes=sizes)
    with pytest.raises(RecipeError, match="memory"):
        secateur.pack_(model, memory=0)
    with pytest.raises(RecipeError, match=r"unknown value_dtype 'int3'.*Valid are float32, "):
        secateur.pack_(model, value_dtype="int3")
    with pytest.raises(RecipeError, match=r"unknown value_dtype 'int32'; did you mean 'int8'\?"):
        secateur.pack_(model, value_dtype=torch.int32)
    with pytest.raises(RecipeError, match="no layer"):
        secateur.pack_(nn.Sequential(nn.ReLU()))


def test_a_bare_layer_says_what_to_do(monkeypatch):
    winner(monkeypatch)
    report = secateur.pack_(pruned(nn.Linear(64, 64))[0])
    assert "PackedLinear.from_linear" in report.skipped[0].reason
    layer = PackedLinear.from_linear(pruned(nn.Linear(64, 64))[0])
    with pytest.raises(RecipeError, match="bare layer"):
        secateur.pack_(layer)
    with pytest.raises(RecipeError, match="bare layer"):
        secateur.unpack_(layer)


def test_tied_weights_are_packed_once_and_unpacked_tied(monkeypatch):
    winner(monkeypatch)
    model = pruned(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 64))
    model[2].weight = model[0].weight  # with a bias of its own
    model[3] = model[0]
    x = torch.randn(2, 64)
    expected = model(x)
    report = secateur.pack_(model)
    assert [layer.tied_to for layer in report.layers] == [("2",)]
    assert model[3] is model[0]
    assert model[2] is not model[0]
    assert model[2].values is model[0].values
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert secateur.unpack_(model) == ["0", "2", "3"]
    assert model[3] is model[0]
    assert model[2].weight is model[0].weight
    assert not torch.equal(model[2].bias, model[0].bias)


def test_unpack_restores_every_weight_exactly(monkeypatch):
    winner(monkeypatch)
    model = pruned(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    secateur.pack_(model)
    assert secateur.unpack_(model) == ["0", "2"]
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert secateur.unpack_(model) == []


def test_packed_layers_are_measured_again(monkeypatch):
    winner(monkeypatch)
    model = pruned(nn.Linear(64, 64), nn.ReLU())
    secateur.pack_(model)
    layer = model[0]
    assert str(layer.plan) == "bitmask"
    winner(monkeypatch, "panels:64x128")
    report = secateur.pack_(model)
    assert model[0] is layer
    assert str(layer.plan) == "panels:64x128"
    assert report.layers[0].packed
    winner(monkeypatch)
    expected = model[0].to_linear()
    report = secateur.pack_(model, value_dtype="int8")
    assert report.layers[0].value_dtype == "int8"
    assert model[0].values.dtype == torch.int8
    assert torch.equal(model[0].bias, expected.bias)
    weight = expected.weight.detach()
    torch.testing.assert_close(model[0].weight, weight, rtol=0, atol=float(weight.abs().max()) / 250)
    winner(monkeypatch, "none")
    secateur.pack_(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("stride", "order"),
    [(1, torch.channels_last), (2, torch.contiguous_format), ((1, 2), torch.channels_last)],
)
def test_pointwise_convolutions(monkeypatch, stride, order):
    winner(monkeypatch)
    model = pruned(nn.Conv2d(16, 24, 1, stride=stride), pattern="unstructured")
    model.append(nn.ReLU())
    x = torch.randn(2, 16, 7, 8).contiguous(memory_format=order)
    expected = model(x)
    before = model[0]
    report = secateur.pack_(model)
    assert isinstance(model[0], PackedConv2d)
    assert [choice.rows for choice in report.layers[0].choices] == list(_images.PIXELS)
    y = model[0](x)
    torch.testing.assert_close(y.relu(), expected, rtol=1e-5, atol=1e-5)
    assert y.is_contiguous(memory_format=order)
    assert model[0](x[0]).shape == expected.shape[1:]
    assert secateur.unpack_(model) == ["0"]
    assert torch.equal(model[0].weight, before.weight)
    assert (model[0].stride, type(model[0])) == (before.stride, nn.Conv2d)


def test_transformers_transposed_layer(monkeypatch):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    winner(monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(conv1d(48, 64), nn.ReLU())
    with torch.no_grad():
        model[0].weight[torch.rand(64, 48) < 0.6] = 0
    x = torch.randn(3, 64)
    expected, before = model(x), model[0]
    secateur.pack_(model)
    assert isinstance(model[0], PackedConv1D)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    secateur.unpack_(model)
    assert type(model[0]) is conv1d
    assert torch.equal(model[0].weight, before.weight)
    assert torch.equal(model(x), expected)


def test_without_kernels_only_routes_of_dense_arithmetic_are_measured(monkeypatch):
    winner(monkeypatch)
    monkeypatch.setattr("secateur.kernels._plan.has_kernels", lambda: False)
    model = pruned(nn.Linear(64, 64))
    report = secateur.pack_(model)
    assert type(model[0]) is nn.Linear
    assert {choice.route for choice in report.layers[0].choices} <= {"prepacked", "dense"}
    winner(monkeypatch, "rows")
    monkeypatch.setattr("secateur.kernels._plan.has_kernels", lambda: False)
    model = pruned(nn.Linear(64, 64), pattern="row")
    secateur.pack_(model)
    assert str(model[0].plan) == "rows"


def test_pack_measures_for_real():
    model = pruned(nn.Linear(128, 96), nn.ReLU(), sparsity=0.9)
    report = secateur.pack_(model, batch_sizes=[1, 3])
    layer = report.layers[0]
    assert {choice.rows for choice in layer.choices} == {1, 3}
    assert all(0 < choice.low <= choice.ratio <= choice.high < math.inf for choice in layer.choices)
    assert all((choice.prepacked_seconds is None) == (available()["onednn"] != "ok") for choice in layer.choices)
    assert layer.packed == isinstance(model[0], PackedLinear)
    assert layer.packed != bool(layer.reason)


# Report


def test_report_as_text(monkeypatch):
    winner(monkeypatch)
    model = pruned(nn.Linear(64, 64), nn.LayerNorm(64))
    report = secateur.pack_(model)
    assert PackReport.from_json(report.to_json()) == report
    text = report.to_markdown()
    assert "| 0 | 64 x 64 | unstructured | 30.0% | bitmask | float32 | exact | 0 |" in text
    assert "1: 4.00 (4.00-4.00) 250.0 ms bitmask" in text
    assert "no weight matrix" in text
    first, run = str(report).splitlines()
    assert first == "95.52% of the model's 17,152 dense bytes are packed now; 95.52% were considered"
    assert run.startswith("packed 1 of 1 layers with zeros, skipped 1 modules; 16,384 bytes dense, ")
    assert text.splitlines()[2] == f"{first}."
    assert first in unescape(report.to_html())
    assert set(report.machine) == {"processor", "kernels", "threads", "secateur", "torch"}
    for wrong in ("[]", "{}", "nothing", '{"layers": [{}]}'):
        with pytest.raises(ValueError, match=r"report|JSON|Expecting"):
            PackReport.from_json(wrong)


# Cache


def test_a_measurement_in_the_cache_file_is_used(monkeypatch, tmp_path):
    path = tmp_path / "deep" / "cache.json"
    winner(monkeypatch)
    first = secateur.pack_(pruned(nn.Linear(64, 64)), cache=path)
    assert path.exists()
    monkeypatch.setattr(MeasurementCache, "_memory", {})
    monkeypatch.setattr(_measure, "time_in_turn", lambda *args, **keep: pytest.fail("measured again"))
    again = secateur.pack_(pruned(nn.Linear(64, 64)), cache=path)
    assert again.layers == first.layers
    torch.set_num_threads(2)  # another machine, as far as timings go
    try:
        with pytest.raises(pytest.fail.Exception):
            secateur.pack_(pruned(nn.Linear(64, 64)), cache=path)
    finally:
        torch.set_num_threads(1)


def test_a_busy_machine_is_reported_and_its_times_are_not_stored(monkeypatch, tmp_path):
    path = tmp_path / "cache.json"
    winner(monkeypatch)
    quiet = _measure.time_in_turn

    def busy(*args, **keep):
        return {name: [s * (1 + 2 * (i % 2)) for i, s in enumerate(times * 3)] for name, times in quiet(*args).items()}

    assert not secateur.pack_(pruned(nn.Linear(64, 64)), cache=path).warning
    assert len(next(iter(json.loads(path.read_text())["machines"].values()))) == 1
    monkeypatch.setattr(_measure, "time_in_turn", busy)
    report = secateur.pack_(pruned(nn.Linear(64, 32)), cache=path)
    assert report.warning == ""  # dense and packed slowed down together: the ratios stand
    assert len(next(iter(json.loads(path.read_text())["machines"].values()))) == 1
    alone = {route("dense"): [1.0, 3.0] * 4}
    monkeypatch.setattr(
        _measure, "time_in_turn", lambda *args, **keep: {n: t[:1] * 8 for n, t in quiet(*args).items()} | alone
    )
    report = secateur.pack_(pruned(nn.Linear(32, 32)))
    assert report.spread > 1.5
    assert report.warning.startswith("the machine was busy")
    assert "The machine was busy" in report.to_markdown()


def test_cache_file_keeps_other_machines(monkeypatch, tmp_path):
    path = tmp_path / "cache.json"
    winner(monkeypatch)
    secateur.pack_(pruned(nn.Linear(64, 64)), cache=path)
    table = json.loads(path.read_text())
    (own,) = table["machines"]
    table["machines"]["another"] = {"kept": "as it is"}
    path.write_text(json.dumps(table))
    secateur.pack_(pruned(nn.Linear(64, 32)), cache=path)
    table = json.loads(path.read_text())
    assert table["machines"]["another"] == {"kept": "as it is"}
    assert len(table["machines"][own]) == 2


def test_cache_file_of_another_version_is_replaced(monkeypatch, tmp_path):
    path = tmp_path / "cache.json"
    path.write_text('{"secateur autotune": 0, "machines": {}}')
    winner(monkeypatch)
    secateur.pack_(pruned(nn.Linear(64, 64)), cache=path)
    assert json.loads(path.read_text())["secateur autotune"] == 1


def test_a_file_that_is_not_an_autotune_cache_is_refused_and_kept(tmp_path):
    path = tmp_path / "cache.json"
    for text in ("", "[]", "{}", "\x00", '{"secateur autotune": 1, "machines": []}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(FormatError, match=r"cache\.json is not an autotune cache"):
            secateur.pack_(pruned(nn.Linear(64, 64)), cache=path)
        assert path.read_text() == text


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.pop("nbytes"),
        lambda entry: entry["nbytes"].pop("bitmask"),
        lambda entry: entry["nbytes"].update(bitmask=-1),
        lambda entry: entry["seconds"].update({"x": {}}),
        lambda entry: entry["seconds"].clear(),
        lambda entry: entry["seconds"]["1"].update(bitmask=[]),
        lambda entry: entry["seconds"]["1"].update(bitmask=[0.0]),
        lambda entry: entry["seconds"]["1"].update(bitmask=[math.inf]),
        lambda entry: (entry["nbytes"].update(evil=1), [w.update(evil=[1.0]) for w in entry["seconds"].values()]),
        lambda entry: entry.update(seconds=3),
    ],
)
def test_an_invalid_measurement_in_the_cache_file_is_refused(monkeypatch, tmp_path, change):
    path = tmp_path / "cache.json"
    winner(monkeypatch)
    secateur.pack_(pruned(nn.Linear(64, 64)), cache=path)
    table = json.loads(path.read_text())
    for entries in table["machines"].values():
        for entry in entries.values():
            change(entry)
    path.write_text(json.dumps(table))
    with pytest.raises(FormatError, match="is invalid"):
        secateur.pack_(pruned(nn.Linear(64, 64)), cache=path)


# The history of the model


def test_the_pattern_that_a_layer_was_pruned_to_is_used(monkeypatch):
    winner(monkeypatch)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with torch.no_grad():
        model[2].weight[:, 1::2] = 0  # whole columns, which is not what it will be pruned to
    first = secateur.prune_(model, pattern="row", sparsity=0.5, method="magnitude", include=["0"])
    second = secateur.prune_(model, pattern="2:4", method="magnitude", include=["2"])
    report = secateur.pack_(copy.deepcopy(model), history=[first, second])
    assert [layer.pattern for layer in report.layers] == ["row", "2:4"]
    assert report.notes == ()
    guessed = secateur.pack_(copy.deepcopy(model))
    assert [layer.pattern for layer in guessed.layers] == ["row", "column"]
    assert guessed.notes == ("the patterns of 2 layers were found from their zeros",)


def test_the_history_is_not_used_for_zeros_that_break_its_pattern(monkeypatch):
    winner(monkeypatch)
    model = nn.Sequential(nn.Linear(64, 64))
    history = secateur.prune_(model, pattern="2:4", method="magnitude")
    with torch.no_grad():
        model[0].weight[:33] = 1.0
        model[0].weight[33:] = 0.0
    report = secateur.pack_(model, history=history)
    assert report.layers[0].pattern == "row"
    assert report.notes == ("the patterns of 1 layers were found from their zeros",)
    assert "found from their zeros" in report.to_markdown()
    assert PackReport.from_json(report.to_json()) == report
    with pytest.raises(TypeError, match="history must be a Report"):
        secateur.pack_(model, history=["2:4"])


def test_settings_as_one_value(monkeypatch):
    winner(monkeypatch)
    model = pruned(nn.Linear(64, 64), nn.ReLU())
    settings = secateur.PackSettings(batch_sizes=(4, 2, 2), value_dtype="bfloat16")
    report = secateur.pack_(model, settings)
    assert [choice.rows for choice in report.layers[0].choices] == [2, 4]
    assert report.layers[0].value_dtype == "bfloat16"
    with pytest.raises(RecipeError, match="not both"):
        secateur.pack_(model, settings, memory=2.0)


def test_dense_weights_are_stored_by_the_pattern_in_the_history(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight[:, 1::2] = 0
    history = secateur.prune_(model, pattern="2:4", method="magnitude")
    path = tmp_path / "a.sparse.safetensors"
    for given, pattern in ((history, "2:4"), ((), "column")):
        secateur.save(model, path, history=given)
        assert str(read_packed(path).layers["0.weight"].pattern) == pattern
        again = secateur.load(path, into=nn.Sequential(nn.Linear(64, 64)))
        assert torch.equal(again[0].weight, model[0].weight)


# Layers that are all zeros


@pytest.mark.parametrize("value_dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("pattern", PACKED_PATTERNS)
def test_a_dead_layer_is_packed_saved_and_loaded_with_its_model(monkeypatch, tmp_path, pattern, value_dtype):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(48, 32, 1), nn.Flatten(), nn.Linear(32, 80), nn.Linear(80, 48, bias=False))

    dead = model()
    fixed = secateur.SparsityPattern.parse(pattern).sparsity is not None
    history = secateur.prune_(dead, pattern=pattern, sparsity=None if fixed else 0.5, method="magnitude")
    with torch.no_grad():
        dead[0].weight.zero_()
        dead[2].weight.zero_()
    for known in ((), history):  # with the pattern that it was pruned to, and with what its zeros show
        packed, x = copy.deepcopy(dead), torch.randn(3, 48, 1, 1)
        routes_take(monkeypatch, lambda name, index: 1.0 if name == "dense" else 0.2 + 0.01 * index)
        report = secateur.pack_(packed, value_dtype=value_dtype, history=known)
        assert [layer.packed for layer in report.layers] == [True] * 3
        path = tmp_path / "dead.sparse.safetensors"
        secateur.save(packed, path)
        again = secateur.load(path, into=model())
        exact = value_dtype is None
        torch.testing.assert_close(again(x), dead(x), rtol=1e-5, atol=1e-5 if exact else 0.05)
        assert torch.equal(again(x), packed(x))
        assert torch.equal(again[0](x), dead[0].bias.view(1, -1, 1, 1).expand(3, -1, 1, 1))
        secateur.unpack_(again)
        assert not again[2].weight.any()
