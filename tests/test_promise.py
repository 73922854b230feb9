"""The whole model is timed before and after packing, by a clock that its layers move. What does not pay goes back."""

import pytest
import torch
from fake_timing import kernels_win, routes_take
from read_cases import CASES, IN, Blocks
from torch import nn

import secateur
from secateur import PackedLinear, RecipeError
from secateur.packing import _promise
from secateur.reports import PackReport

ROWS = (1, 8)


@pytest.fixture(autouse=True)
def _layers_win(monkeypatch):
    """Every layer alone is four times as fast packed. The whole model is really timed."""
    torch.manual_seed(0)
    routes_take(monkeypatch, lambda name, index: {"dense": 1.0, "prepacked": 2.0}.get(name, 0.25), whole=False)


class Clock:
    """Time that only calls of a model move: each of its layers by what it costs.

    Args:
        dense: seconds of any dense layer.
        packed: returns the seconds of a packed layer, given its outputs and the rows of the input.
    """

    def __init__(self, packed, dense=1.0):
        self.now, self.dense, self.packed, self.disturbed = 0.0, dense, packed, 0

    def __call__(self):
        return self.now

    def forward(self, model, x):
        for layer in model:
            if isinstance(layer, PackedLinear):
                self.now += self.packed(layer.out_features, len(x)) * (1 + (self.disturbed > 0))
                self.disturbed -= 1
            elif isinstance(layer, nn.Linear):
                self.now += self.dense
        return model(x)


def all_take(seconds, otherwise=0.75):
    """Each arrangement of the model runs once, and takes what is said here."""

    def in_turn(calls, against, timer, keep, ready, fewest):
        for name, call in calls.items():
            ready[name]()
            call()
        return {name: [seconds.get(name, otherwise)] * 3 for name in calls}

    return in_turn


def pruned(*outputs):
    """A model of layers with these outputs, whose weights are half zero."""
    layers, inputs = [], 32
    for size in outputs:
        layers += [nn.Linear(inputs, size), nn.ReLU()]
        inputs = size
    model = nn.Sequential(*layers)
    secateur.prune_(model, pattern="unstructured", sparsity=0.7, method="magnitude", include=["*"])
    return model


def pack(model, clock):
    return secateur.pack_(
        model,
        batches=[torch.randn(rows, 32) for rows in ROWS],
        batch_sizes=[1],
        include=None if any(isinstance(layer, PackedLinear) for layer in model) else ["*"],
        forward=clock.forward,
        timer=clock,
    )


def test_a_model_that_is_faster_stays_packed_and_its_times_are_reported():
    model = pruned(32, 48)
    report = pack(model, Clock(lambda outputs, rows: 0.5 if rows == 1 else 1.0))
    assert [type(layer).__name__ for layer in model] == ["PackedLinear", "ReLU"] * 2
    assert [(time.shape, time.before, time.after, time.ratio) for time in report.times] == [
        ("1 x 32", 2000.0, 1000.0, 2.0),
        ("8 x 32", 2000.0, 2000.0, 1.0),
    ]
    assert not any(layer.taken_back for layer in report.layers)
    assert "the whole model is 2.00 times as fast at 1 x 32 (1,000 instead of 2,000 ms), 1.00 times" in str(report)


@pytest.mark.parametrize("repacked", [False, True], ids=["dense before", "packed before"])
def test_only_the_layers_that_make_the_model_slower_go_back(repacked):
    """The kind of 48 outputs is slower with 8 rows; the two others together gain more than noise."""
    model = pruned(32, 48, 32, 48, 16)
    if repacked:
        pack(model, Clock(lambda outputs, rows: 0.5))
        assert sum(isinstance(layer, PackedLinear) for layer in model) == 5
    before = list(model)
    report = pack(model, Clock(lambda outputs, rows: 3.0 if outputs == 48 and rows == 8 else 0.5))
    assert [layer.name for layer in report.layers if layer.packed] == ["0", "4", "8"]
    back = [layer for layer in report.layers if layer.taken_back]
    assert [layer.name for layer in back] == ["2", "6"]
    assert back[0].reason == (
        "taken back: with this layer and 1 more dense the whole model is 2.14 times as fast at 8 x 32"
    )
    assert [isinstance(layer, PackedLinear) for layer in model if not isinstance(layer, nn.ReLU)] == [
        True, False, True, False, True,
    ]  # fmt: skip
    if not repacked:
        assert model[2] is before[2]
    assert [(time.shape, time.ratio) for time in report.times] == [
        ("1 x 32", pytest.approx(5 / 3.5)),
        ("8 x 32", pytest.approx(5 / 3.5)),
    ]
    assert report.times[1].after == pytest.approx(3500)
    assert "; 2 layers were taken back" in str(report)
    assert all(layer.runtime_bytes == 0 for layer in back)


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        (lambda outputs, rows: 1.0, "not faster by more than noise: at best 1.00 times as fast (1.00-1.00), at 1 x 32"),
        (lambda outputs, rows: 2.0 if rows == 8 else 0.1, "takes 2.00 of its time at 8 x 32"),
    ],
    ids=["no gain", "slower at one"],
)
def test_if_no_part_of_it_pays_the_model_is_as_it_was(packed, reason):
    model = pruned(32, 32)
    before, modes = list(model), [module.training for module in model.modules()]
    report = pack(model, Clock(packed))
    assert list(model) == before
    assert [module.training for module in model.modules()] == modes
    assert all(layer.reason.endswith(reason) and layer.taken_back for layer in report.layers)
    assert "the whole model would not be faster packed, and stays as it is; 2 layers were taken back" in str(report)
    assert [(time.before, time.after, time.ratio) for time in report.times] == [(2000.0, 2000.0, 1.0)] * 2


def test_a_clock_that_stands_still_shows_no_gain():
    model = pruned(32, 48)
    report = secateur.pack_(model, batches=[torch.randn(1, 32)], batch_sizes=[1], include=["*"], timer=lambda: 0.0)
    assert all(layer.taken_back for layer in report.layers)


def test_many_kinds_of_layers_are_tried_in_a_few_groups(monkeypatch):
    outputs = range(8, 8 * 13, 8)
    model = pruned(*outputs)
    arranged = []
    inner = _promise._Stage.arrangement
    monkeypatch.setattr(
        _promise._Stage,
        "arrangement",
        lambda stage, swaps, packed: arranged.append(packed) or inner(stage, swaps, packed),
    )
    slow = 8 * 12
    report = pack(model, Clock(lambda size, rows: 9.0 if size == slow else 0.5))
    assert len(arranged) == 2 + _promise._MOST_GROUPS + 1
    taken = [layer.shape[0] for layer in report.layers if layer.taken_back]
    assert slow in taken
    assert len(taken) <= len(outputs) - _promise._MOST_GROUPS + 1


def test_a_disturbance_is_measured_again():
    model = pruned(32)
    clock = Clock(lambda outputs, rows: 0.5)
    clock.disturbed = 7  # all calls of the first measurement
    report = pack(model, clock)
    assert report.layers[0].packed
    assert clock.disturbed < 0


@pytest.mark.parametrize("fails_at", [3, 5, 9])
def test_a_model_that_fails_while_it_is_timed_is_as_it_was(fails_at):
    model = pruned(32, 48)
    before, modes = list(model), [module.training for module in model.modules()]
    clock, calls = Clock(lambda outputs, rows: 2.0), []

    def forward(model, x):
        calls.append(x)
        if len(calls) == fails_at:
            raise RecipeError("out of order")
        return clock.forward(model, x)

    with pytest.raises(RecipeError, match="out of order"):
        secateur.pack_(
            model, batches=[torch.randn(1, 32)], batch_sizes=[1], include=["*"], forward=forward, timer=clock
        )
    assert list(model) == before
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("faster", [True, False])
@pytest.mark.parametrize("case", [case for case in CASES if case != "Heads"])  # whose weights cannot be packed
def test_whatever_holds_the_weights_goes_back(case, faster, monkeypatch):
    """Parameters of modules, stacks and layers, in whatever way functions multiply them."""
    kernels_win(monkeypatch)
    monkeypatch.setattr(_promise, "time_in_turn", all_take({"dense": 1.0 if faster else 0.5}))
    inputs = [torch.randn(2, 40, IN)]
    model = Blocks(CASES[case]).eval()
    history = secateur.prune_(model, inputs, pattern="2:4", method="wanda", include=["*"])
    expected = model(inputs[0])
    names = list(model.state_dict())
    report = secateur.pack_(model, batches=inputs, batch_sizes=[1], history=history, include=["*"])
    assert all(layer.packed is faster for layer in report.layers if not layer.reason or layer.taken_back)
    assert any(layer.packed if faster else layer.taken_back for layer in report.layers)
    assert (list(model.state_dict()) == names) is not faster
    torch.testing.assert_close(model(inputs[0]), expected, rtol=1e-4, atol=1e-5)


def test_recurrent_modules_go_back(monkeypatch):
    kernels_win(monkeypatch)
    monkeypatch.setattr(_promise, "time_in_turn", all_take({}))
    model = nn.Sequential(nn.LSTM(16, 32))
    secateur.prune_(model, pattern="2:4", method="magnitude", include=["*"])
    lstm = model[0]
    report = secateur.pack_(model, batches=[torch.randn(3, 1, 16)], batch_sizes=[1])
    assert report.layers[0].taken_back
    assert model[0] is lstm


def test_one_input_of_each_shape_is_timed_and_of_many_shapes_a_few(monkeypatch):
    model = pruned(32)
    clock = Clock(lambda outputs, rows: 0.5)
    sizes = [5, 5, 1, 9, 2, 3, 7, 8, 4, 6]
    batches = [torch.randn(rows, 32) for rows in sizes]
    report = secateur.pack_(model, batches=batches, batch_sizes=[1], include=["*"], forward=clock.forward, timer=clock)
    assert [time.shape for time in report.times] == [f"{rows} x 32" for rows in (1, 2, 4, 5, 7, 9)]
    assert "the whole model was timed with 6 of the 9 shapes of inputs that were given" in report.notes


def test_without_a_packed_layer_nothing_is_timed(monkeypatch):
    routes_take(monkeypatch, lambda name, index: 1.0, whole=False)
    model = pruned(32)
    report = pack(model, Clock(lambda outputs, rows: 0.5))
    assert report.times == ()
    assert "no layer is packed, so that the whole model was not timed" in report.notes


def test_the_report_is_read_again_with_its_times():
    report = pack(pruned(32, 48), Clock(lambda outputs, rows: 3.0 if outputs == 48 else 0.25))
    assert PackReport.from_json(report.to_json()) == report
    assert "| 1 x 32 | 2,000 | 1,250 | 1.60 | 1.60-1.60 |" in report.to_markdown()
    for text in (report.to_html(), report.to_markdown()):
        assert "taken back: with this layer dense the whole model is 2.60 times as fast" in text
