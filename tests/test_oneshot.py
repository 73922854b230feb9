"""prune_ as a whole: what it does to the weights, what it says, and what it refuses before it touches anything."""

import copy

import pytest
import torch
from cases import PATTERNS, SOLVERS, loss_of
from torch import nn
from torch.nn import functional

import secateur
from secateur import (
    NM,
    RIA,
    Block,
    Column,
    Magnitude,
    Movement,
    PatternError,
    Recipe,
    RecipeError,
    Refit,
    Report,
    Row,
    Select,
    Solution,
    Solver,
    SolverError,
    SparseGPT,
    StatisticsError,
    Swaps,
    Unstructured,
    Wanda,
    prune_,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


all_solvers = pytest.mark.parametrize("method", SOLVERS, ids=repr)


class Mixed(nn.Module):
    """Convolutions, plain, grouped and depthwise, then linear layers of which the last is a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, (2, 3), padding="same", padding_mode="circular")
        self.grouped = nn.Conv2d(8, 8, 2, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 2, groups=8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, x):
        x = self.depthwise(functional.gelu(self.grouped(functional.gelu(self.conv(x))))).mean(3).transpose(1, 2)
        return self.classifier(self.second(functional.gelu(self.first(self.norm(x)))))


NAMES = ["conv", "grouped", "depthwise", "first", "second"]


def mixed(dtype=torch.float32):
    return Mixed().to(dtype)


def batches(dtype=torch.float32, count=2):
    return [torch.randn(4, 2, 5, 6, dtype=dtype) for _ in range(count)]


def weights(model, names=NAMES):
    """The weights as matrices, cloned."""
    return {name: model.get_submodule(name).weight.detach().clone().flatten(1) for name in names}


def bits(tensor):
    """For comparison bit by bit: 0.0 and -0.0 are equal as numbers."""
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


SPARSITY = 0.4


def kernel_positions(module):
    return module.weight[0, 0].numel()


def zeros_expected(pattern, sparsity, module):
    """Counted by hand from the table in the design, apart from the library's own counting."""
    rows, columns = module.weight.flatten(1).shape
    match pattern:
        case NM(n, m):
            return rows * (columns // m) * (m - n)
        case Block(height, width):
            return round(sparsity * (rows // height) * (columns // width)) * height * width
        case Row():
            return round(sparsity * rows) * columns
        case Column(width):
            width = kernel_positions(module) if pattern == Column() else width
            return round(sparsity * (columns // width)) * rows * width
        case Unstructured("row"):
            return rows * round(sparsity * columns)
        case _:
            return round(sparsity * rows * columns)


def fits(pattern, module):
    try:
        pattern.validate(module.weight.flatten(1).shape)
    except PatternError:
        return False
    return True


FITTING = [pattern for pattern in PATTERNS if any(fits(pattern, mixed().get_submodule(name)) for name in NAMES)]


@pytest.mark.parametrize(
    ("method", "pattern", "dtype"),
    [
        *((method, pattern, torch.float32) for method in (Select(Wanda()), SparseGPT()) for pattern in FITTING),
        *((method, NM(2, 4), torch.float32) for method in SOLVERS),
        *((method, Unstructured(), torch.bfloat16) for method in SOLVERS),
    ],
    ids=str,
)
def test_the_stored_weights_have_exactly_the_sparsity(method, pattern, dtype):
    model = mixed(dtype)
    sparsity = SPARSITY if pattern.sparsity is None else None
    names = [name for name in NAMES if fits(pattern, model.get_submodule(name))]
    dense, others = weights(model), {n: p.detach().clone() for n, p in model.named_parameters() if "bias" in n}
    report = prune_(
        model, batches(dtype), pattern=pattern, sparsity=sparsity, method=method, loss=loss_of, include=names
    )
    assert [layer.name for layer in report.layers] == names
    for layer in report.layers:
        module = model.get_submodule(layer.name)
        stored = module.weight.detach().flatten(1)
        zero = stored == 0
        scoped = Unstructured("row") if pattern == Unstructured() and compares_rows(method) else pattern
        expected = zeros_expected(scoped, sparsity, module)
        assert int(zero.sum()) == layer.zeros == layer.pruned == expected
        assert layer.sparsity == expected / stored.numel()
        assert layer.asked == (pattern.sparsity if sparsity is None else sparsity)
        assert layer.shape == tuple(stored.shape)
        assert not torch.signbit(stored[zero]).any()
        assert module.weight.dtype == dtype
        if isinstance(method, Select):
            torch.testing.assert_close(stored[~zero], dense[layer.name][~zero], rtol=0, atol=0)
    for name in set(NAMES) - set(names):
        torch.testing.assert_close(weights(model)[name], dense[name], rtol=0, atol=0)
    for name, other in others.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), other, rtol=0, atol=0)
    assert report.num_pruned == sum(layer.pruned for layer in report.layers)


def compares_rows(method):
    """Whether an unstructured pattern is compared row by row, as the papers of Wanda and RIA do."""
    while isinstance(method, Refit | Swaps):
        method = method.inner
    return isinstance(method, Select) and isinstance(method.importance, Wanda | RIA)


@all_solvers
def test_a_width_that_the_sparsity_does_not_divide_is_no_error(method):
    """Rounding within each row and rounding once for the layer give different counts: 7 * 2 and round(6.5 * 7)."""
    for sparsity in (0.5, 0.6, 1 / 3):
        model = nn.Sequential(nn.Linear(13, 7), nn.ReLU(), nn.Linear(7, 5))
        report = prune_(model, [torch.randn(30, 13)], sparsity=sparsity, method=method, loss=loss_of)
        for layer, module in zip(report.layers, (model[0], model[2]), strict=True):
            rows, columns = module.weight.shape
            by_row = compares_rows(method)
            expected = rows * round(sparsity * columns) if by_row else round(sparsity * rows * columns)
            assert layer.pruned == int((module.weight == 0).sum()) == expected


@all_solvers
def test_columns_of_a_convolution_go_as_whole_input_channels(method):
    model = mixed()
    prune_(model, batches(), pattern="column", sparsity=0.5, method=method, loss=loss_of, include=["conv", "grouped"])
    for module, channels in ((model.conv, 2), (model.grouped, 4)):
        gone = (module.weight == 0).permute(1, 0, 2, 3).flatten(1)
        assert gone.shape[0] == channels
        assert int(gone.all(1).sum()) == int(gone.any(1).sum()) == channels // 2


@all_solvers
def test_rows_go_as_whole_output_channels(method):
    model = mixed()
    prune_(model, batches(), pattern="row", sparsity=0.25, method=method, loss=loss_of, include=NAMES)
    for name in NAMES:
        gone = model.get_submodule(name).weight.flatten(1) == 0
        assert int(gone.all(1).sum()) == int(gone.any(1).sum()) == len(gone) // 4


@pytest.mark.parametrize(
    ("method", "pattern", "dtype"),
    [
        *((method, Unstructured(), torch.float32) for method in SOLVERS),
        *((Refit(SparseGPT()), pattern, torch.float32) for pattern in (Block(2, 1), Row(), Column())),
        *((Refit(SparseGPT()), Unstructured(), dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)),
    ],
    ids=str,
)
def test_sparsity_zero_changes_no_bit(method, pattern, dtype):
    model = mixed(dtype)
    with torch.no_grad():  # a dead input, and a weight that is zero
        model.first.weight[0, 0] = 0
        model.norm.weight[1] = model.norm.bias[1] = 0
    dense = weights(model)
    report = prune_(model, batches(dtype), pattern=pattern, sparsity=0, method=method, loss=loss_of)
    for layer in report.layers:
        assert torch.equal(bits(weights(model)[layer.name]), bits(dense[layer.name])), layer.name
        assert (layer.pruned, layer.sparsity, layer.relative_error) == (0, 0.0, 0.0)
    assert sum(layer.zeros for layer in report.layers) == 1


@all_solvers
def test_sparsity_zero_keeps_the_sign_of_zero(method):
    model = nn.Sequential(nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
    prune_(model, [torch.randn(20, 8)], sparsity=0, method=method, loss=loss_of)
    assert torch.signbit(model[0].weight[0, 0])


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        *((method, Unstructured()) for method in SOLVERS),
        *((SparseGPT(), pattern) for pattern in (Block(2, 1), Row(), Column(), NM(0, 2))),
    ],
    ids=str,
)
def test_sparsity_one_leaves_nothing(method, pattern):
    model = mixed()
    sparsity = None if isinstance(pattern, NM) else 1
    report = prune_(model, batches(), pattern=pattern, sparsity=sparsity, method=method, loss=loss_of)
    assert report.sparsity == 1
    for layer in report.layers:
        stored = weights(model)[layer.name]
        assert not bits(stored).any()
        assert layer.relative_error is None or layer.relative_error == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4,remainder=dense", "row", "column"])
def test_pruning_again_changes_nothing(pattern):
    """The sparsity is of the whole layer, not of what an earlier run left."""
    model = mixed()
    sparsity = None if pattern.startswith("2") else 0.5
    prune_(model, pattern=pattern, sparsity=sparsity, method="magnitude")
    once = weights(model)
    report = prune_(model, pattern=pattern, sparsity=sparsity, method="magnitude")
    torch.testing.assert_close(weights(model), once, rtol=0, atol=0)
    assert all(layer.pruned == layer.zeros for layer in report.layers)


def test_zeros_that_were_there_before_are_counted_apart_from_what_was_pruned():
    model = nn.Sequential(nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0, 0, 1], [4, 3, 2, 1]]))
    (layer,) = prune_(model, sparsity=0.25, method="magnitude").layers
    assert (layer.pruned, layer.zeros, layer.sparsity) == (2, 3, 0.25)


# The report.


def captured(model, inputs, name):
    """The inputs of one layer of the dense model."""
    found = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, args, output: found.append(args[0].detach())
    )
    with torch.no_grad():
        for batch in inputs:
            model(batch)
    handle.remove()
    return found


def outputs_without_bias(module, weight, inputs):
    plain = copy.deepcopy(module).double()
    plain.bias = None
    plain.weight = nn.Parameter(weight.double())
    with torch.no_grad():
        return torch.cat([plain(x.double()).flatten() for x in inputs])


@pytest.mark.parametrize(
    ("method", "dtype"),
    [*((method, torch.float32) for method in SOLVERS), (Refit(SparseGPT()), torch.bfloat16)],
    ids=str,
)
def test_the_reported_error_is_that_of_the_outputs(method, dtype):
    """From the layer's own forward on the inputs it saw, with the weights as they are stored."""
    model, inputs = mixed(dtype), batches(dtype)
    dense = copy.deepcopy(model)
    report = prune_(model, inputs, sparsity=0.5, method=method, loss=loss_of, include=NAMES)
    assert [layer.name for layer in report.layers] == NAMES
    for layer in report.layers:
        before, after = dense.get_submodule(layer.name), model.get_submodule(layer.name)
        seen = captured(dense, inputs, layer.name)  # no repeated blocks: one pass over the dense model
        truth = outputs_without_bias(before, before.weight.detach(), seen)
        change = outputs_without_bias(before, before.weight.detach().double() - after.weight.detach().double(), seen)
        assert layer.relative_error == pytest.approx(float(change.norm() / truth.norm()), rel=1e-3)
        assert 0 < layer.relative_error < 1 or method == Select(Movement())  # which looks at the loss alone
        assert layer.tokens == truth.numel() // before.weight.shape[0]


def test_compensation_lowers_the_reported_error():
    errors = {}
    for method in ("random", "wanda", "wanda+refit"):
        torch.manual_seed(0)
        report = prune_(mixed(), batches(count=6), sparsity=0.5, method=method, loss=loss_of)
        errors[method] = sum(layer.relative_error for layer in report.layers)
    assert errors["wanda+refit"] < errors["wanda"] < errors["random"]


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_without_measuring_there_is_no_error(method):
    report = prune_(mixed(), batches(), sparsity=0.5, method=method, loss=loss_of, measure_error=False)
    assert {layer.relative_error for layer in report.layers} == {None}
    assert all(layer.tokens > 0 for layer in report.layers)


def test_without_batches_nothing_about_inputs_is_claimed():
    report = prune_(mixed(), sparsity=0.5, method="magnitude")
    assert report.calibration_hash is None
    assert {(layer.relative_error, layer.tokens, layer.dead_inputs) for layer in report.layers} == {(None, None, None)}


def test_measuring_does_not_change_what_is_pruned():
    first, second = mixed(), mixed()
    second.load_state_dict(first.state_dict())
    inputs = batches()
    prune_(first, inputs, sparsity=0.5, method="wanda")
    prune_(second, inputs, sparsity=0.5, method="wanda", measure_error=False)
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)


def test_dead_inputs_are_counted_and_pruned_first():
    model = nn.Sequential(nn.Linear(6, 4))
    x = torch.randn(20, 6)
    x[:, [1, 4]] = 0
    for method in ("wanda", "ria", "sparsegpt", "wanda+refit"):
        fresh = copy.deepcopy(model)
        (layer,) = prune_(fresh, [x], sparsity=0.5, method=method, loss=loss_of).layers
        assert layer.dead_inputs == 2
        assert not fresh[0].weight[:, [1, 4]].any(), method


def test_an_output_of_nothing_but_zeros_has_no_relative_error():
    model = nn.Sequential(nn.Linear(4, 4))
    (layer,) = prune_(model, [torch.zeros(3, 4)], sparsity=0.5, method="wanda").layers
    assert layer.relative_error is None
    assert layer.dead_inputs == 4


def test_the_report_lists_what_was_skipped_and_survives_json():
    report = prune_(mixed(), batches(), pattern="2:4", method="wanda", exclude=["conv"])
    reasons = {skip.name: skip.reason for skip in report.skipped}
    assert reasons.keys() == {"conv", "depthwise", "norm", "classifier"}
    assert reasons["conv"] == "excluded"
    assert Report.from_json(report.to_json()) == report
    assert Recipe.from_dict(report.recipe) == Recipe(pattern="2:4", method="wanda", exclude=["conv"])
    assert report.versions.keys() == {"secateur", "torch", "python"}
    assert report.seconds >= sum(layer.seconds for layer in report.layers) > 0


def test_pictures_add_up():
    report = prune_(mixed(), batches(), sparsity=0.5, method="wanda")
    for layer in report.layers:
        assert sum(layer.histogram.pruned) == layer.pruned
        assert sum(layer.histogram.kept) == layer.num_weights - layer.pruned
        assert list(layer.histogram.edges) == sorted(set(layer.histogram.edges))
        assert len(layer.thumbnail) == layer.shape[0]
        mean = sum(map(sum, layer.thumbnail)) / layer.num_weights
        assert mean == pytest.approx(100 * (1 - layer.sparsity))


def test_tied_layers_are_one():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[4].weight = model[0].weight
    x = torch.randn(20, 6)
    rows = torch.cat([captured(model, [x], "0")[0], captured(model, [x], "4")[0]]).double()
    expected = model[0].weight.detach().clone()
    cost = expected.double().abs() * rows.square().sum(0).sqrt()
    expected.scatter_(1, cost.sort(1).indices[:, :3], 0.0)
    report = prune_(model, [x], sparsity=0.5, method="wanda")
    assert [(layer.name, layer.tied_to, layer.tokens) for layer in report.layers] == [("0", ("4",), 40), ("2", (), 20)]
    assert model[0].weight is model[4].weight
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=0, atol=0)
    assert report.num_weights == 72


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_the_model_may_be_a_layer_itself(method):
    model = nn.Linear(8, 4)
    report = prune_(model, [torch.randn(10, 8)], pattern="2:4", method=method, loss=loss_of)
    assert [(layer.name, layer.sparsity) for layer in report.layers] == [("", 0.5)]
    assert int((model.weight == 0).sum()) == 16
    assert "forward" not in vars(model)


def test_errors_of_a_model_that_is_a_layer_itself_have_a_name():
    with pytest.raises(PatternError, match=r"^\(the model itself\): 2:4"):
        prune_(nn.Linear(7, 4), pattern="2:4", method="magnitude")
    with pytest.raises(StatisticsError, match=r"^\(the model itself\): "):
        prune_(nn.Linear(2, 4), [torch.full((2, 2), float("nan"))], sparsity=0.5)


# Progress.


class Blocks(nn.Module):
    def __init__(self, count=3):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))) for _ in range(count))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("settings", [{}, {"sequential": False}, {"method": "magnitude"}], ids=str)
@pytest.mark.parametrize("calibrated", [True, False], ids=["batches", "no_batches"])
def test_progress_never_goes_back_and_ends_at_the_total(settings, calibrated):
    if not calibrated:
        settings = {"method": "magnitude"} | settings
    told = []
    inputs = [torch.randn(4, 8) for _ in range(3)] if calibrated else None
    prune_(Blocks(), inputs, sparsity=0.5, progress=lambda *args: told.append(args), **settings)
    done = [entry[1] for entry in told]
    assert done == sorted(done)
    assert {entry[2] for entry in told} == {16}
    assert (done[0] > 0, done[-1]) == (True, 16)
    names = [entry[0] for entry in told if not entry[0].startswith("calibrating")]
    assert names == ["stem", *(f"blocks.{i}.{j}" for i in range(3) for j in range(5))]
    assert ("calibrating" in told[0][0]) == calibrated


def test_an_interrupt_from_the_progress_callback_ends_the_run():
    def stop(description, done, total):
        if done >= 3:
            raise KeyboardInterrupt

    model = Blocks()
    with pytest.raises(KeyboardInterrupt):
        prune_(model, [torch.randn(4, 8)], sparsity=0.5, progress=stop)
    assert (model.stem.weight == 0).any()
    assert not (model.blocks[2][0].weight == 0).any()
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


# Repeatability.


@all_solvers
def test_two_runs_are_equal_bit_for_bit_and_leave_the_random_state(method):
    model, inputs = mixed(), batches()
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    state = torch.get_rng_state()
    one = prune_(first, inputs, sparsity=0.5, method=method, loss=loss_of)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    two = prune_(second, copy.deepcopy(inputs), sparsity=0.5, method=method, loss=loss_of)
    for name, weight in weights(first).items():
        assert torch.equal(bits(weight), bits(weights(second)[name]))
    assert one.calibration_hash == two.calibration_hash
    assert [layer.relative_error for layer in one.layers] == [layer.relative_error for layer in two.layers]


def test_other_batches_have_another_hash_and_make_another_model():
    model, inputs = mixed(), batches()
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    one = prune_(first, inputs, sparsity=0.5)
    two = prune_(second, [3 * inputs[0].flip(2) ** 3, inputs[1]], sparsity=0.5)
    assert one.calibration_hash != two.calibration_hash
    assert any((weights(first)[name] != weights(second)[name]).any() for name in NAMES)


def test_the_order_of_samples_in_the_batches_does_not_matter_much():
    """A sum over tokens: one batch of all is as good as many."""
    model, inputs = mixed(torch.float64), batches(torch.float64, 4)
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    prune_(first, inputs, sparsity=0.5, method="sparsegpt")
    prune_(second, [torch.cat(inputs).flip(0)], sparsity=0.5, method="sparsegpt")
    torch.testing.assert_close(weights(first), weights(second))


def test_sequential_calibration_differs_from_one_pass_after_the_first_block():
    model = Blocks()
    inputs = [torch.randn(10, 8)]
    staged, dense = copy.deepcopy(model), copy.deepcopy(model)
    prune_(staged, inputs, sparsity=0.75)
    prune_(dense, inputs, sparsity=0.75, sequential=False)
    assert torch.equal(staged.stem.weight, dense.stem.weight)
    assert any(not torch.equal(a.weight, b.weight) for a, b in zip(staged.blocks[2], dense.blocks[2], strict=True))


# What is refused, before anything changes.


def last_does_not_fit():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


def spoiled(value):
    model = last_does_not_fit()
    with torch.no_grad():
        model[4].weight[1, 2] = value
    return model


def on_meta():
    model = last_does_not_fit()
    model[4] = nn.Linear(6, 4, device="meta")
    return model


REFUSED = {
    "pattern": (last_does_not_fit, {"pattern": "2:4"}, PatternError, ["4: 2:4", "got 6", "last 2 columns"]),
    "block": (last_does_not_fit, {"pattern": "block:4x4", "sparsity": 0.5}, PatternError, ["2: block:4x4", "output"]),
    "channel": (last_does_not_fit, {"pattern": "column:4", "sparsity": 0.5}, PatternError, ["4: column:4"]),
    "nan": (lambda: spoiled(float("nan")), {"sparsity": 0.5}, RecipeError, ["4: 1 of its weights are NaN"]),
    "inf": (lambda: spoiled(float("inf")), {"sparsity": 0.5}, RecipeError, ["4: 1 of its weights are NaN or infinite"]),
    "meta": (on_meta, {"sparsity": 0.5}, RecipeError, ["4: ", "meta device"]),
    "no_batches": (last_does_not_fit, {"sparsity": 0.5}, RecipeError, ["Wanda", "batches", "magnitude"]),
    "no_batches_gram": (last_does_not_fit, {"sparsity": 0.5, "method": "sparsegpt"}, RecipeError, ["gram"]),
    "no_sparsity": (last_does_not_fit, {}, PatternError, ["sparsity=0.5"]),
    "percent": (last_does_not_fit, {"sparsity": 50}, PatternError, ["Did you mean 0.5?"]),
    "method": (last_does_not_fit, {"sparsity": 0.5, "method": "wnada"}, RecipeError, ["did you mean 'wanda'"]),
    "glob": (last_does_not_fit, {"sparsity": 0.5, "exclude": ["5"]}, RecipeError, ["'5' matches none"]),
    "nothing": (last_does_not_fit, {"sparsity": 0.5, "exclude": "*"}, RecipeError, ["no layer to prune"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_any_weight_changes(case):
    make, settings, error, words = REFUSED[case]
    model = make()
    before = [bits(p).clone() for p in model.parameters() if not p.is_meta]
    given = {} if case.startswith("no_") else {"method": "magnitude"}
    with pytest.raises(error) as raised:
        prune_(model, **(given | settings))
    message = str(raised.value)
    assert all(word in message for word in words), message
    for parameter, old in zip((p for p in model.parameters() if not p.is_meta), before, strict=True):
        assert torch.equal(bits(parameter), old)


@pytest.mark.parametrize("problem", [[], [torch.full((2, 8), float("nan"))]], ids=["empty", "nan"])
def test_batches_that_teach_nothing_are_refused_before_any_weight_changes(problem):
    model = last_does_not_fit()
    before = weights(model, ["0", "2", "4"])
    with pytest.raises(StatisticsError):
        prune_(model, problem, sparsity=0.5)
    torch.testing.assert_close(weights(model, ["0", "2", "4"]), before, rtol=0, atol=0)


def test_the_named_way_out_of_a_pattern_that_does_not_fit_works():
    model = last_does_not_fit()
    report = prune_(model, pattern=NM(2, 4, remainder="dense"), method="magnitude")
    assert report.layers[-1].sparsity == 8 / 24
    assert (model[4].weight[:, 4:] != 0).all()
    model = last_does_not_fit()
    prune_(model, pattern="2:4", method="magnitude", exclude=["4"])
    assert (model[4].weight != 0).all()


@pytest.mark.parametrize(
    "setting",
    [{"pattern": "2:4"}, {"sparsity": 0.5}, {"method": "wanda"}, {"include": ["*"]}, {"sequential": False},
     {"measure_error": False}, {"allocation": "uniform"}, {"exclude": []}],
    ids=str,
)  # fmt: skip
def test_a_recipe_and_settings_contradict_each_other(setting):
    with pytest.raises(RecipeError, match=f"not both; got a recipe and {next(iter(setting))}"):
        prune_(mixed(), recipe=Recipe(sparsity=0.5, method="magnitude"), **setting)


@pytest.mark.parametrize("wrong", ["2:4", {"sparsity": 0.5}, Wanda()], ids=["text", "table", "method"])
def test_a_recipe_of_the_wrong_type_is_a_type_error(wrong):
    with pytest.raises(TypeError, match="recipe"):
        prune_(mixed(), batches(), wrong)


def test_a_recipe_does_what_its_settings_do():
    settings = {"pattern": "2:4", "method": "sparsegpt", "exclude": ["conv"], "sequential": False}
    model, inputs = mixed(), batches()
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    one = prune_(first, inputs, Recipe(**settings))
    two = prune_(second, inputs, **settings)
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)
    assert one.recipe == two.recipe


# Solvers that break their contract.


class Returns(Solver):
    """Select by magnitude, then spoil the solution."""

    needs = frozenset()

    def __init__(self, spoil):
        self.spoil = spoil

    def solve(self, problem):
        return self.spoil(problem, Select(Magnitude()).solve(problem))


SPOILED = {
    "too_many": (lambda p, s: Solution(p.weight * 0, torch.zeros_like(s.mask), s.scores), "pruned 64 weights, but 32"),
    "not_zero": (lambda p, s: Solution(p.weight, s.mask, s.scores), "not zero"),
    "not_finite": (lambda p, s: Solution(s.weight / 0, s.mask, s.scores), "no longer finite"),
    "shape": (lambda p, s: Solution(s.weight.T, s.mask.T, s.scores.T), "for a weight"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_solution_that_breaks_the_contract_is_not_written(case):
    spoil, words = SPOILED[case]
    model = nn.Sequential(nn.Linear(16, 4))
    before = weights(model, ["0"])
    with pytest.raises(SolverError, match=f"^0: .*{words}"):
        prune_(model, sparsity=0.5, method=Returns(spoil))
    torch.testing.assert_close(weights(model, ["0"]), before, rtol=0, atol=0)


def test_weights_too_large_for_the_models_dtype_are_not_written():
    def grow(problem, solution):
        return Solution(solution.weight * 1e6, solution.mask, solution.scores)

    model = nn.Sequential(nn.Linear(16, 4).half())
    with pytest.raises(SolverError, match="beyond the range"):
        prune_(model, sparsity=0.5, method=Returns(grow))
    assert model[0].weight.isfinite().all()


def test_a_solution_may_have_any_strides():
    def transposed(problem, solution):
        return Solution(solution.weight.T.contiguous().T, solution.mask.T.contiguous().T, solution.scores)

    first, second = mixed(), mixed()
    second.load_state_dict(first.state_dict())
    prune_(first, sparsity=0.5, method=Returns(transposed))
    prune_(second, sparsity=0.5, method="magnitude")
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)


def test_a_solver_cannot_reach_the_models_weights():
    """It is given a copy: what it does to that, it does not do to the model."""

    def scribble(problem, solution):
        problem.weight.zero_()
        return solution

    model = nn.Sequential(nn.Linear(16, 4))
    dense = weights(model, ["0"])["0"]
    prune_(model, sparsity=0.5, method=Returns(scribble))
    kept = model[0].weight != 0
    torch.testing.assert_close(model[0].weight.detach()[kept], dense[kept], rtol=0, atol=0)


def test_a_solver_sees_float32_or_better():
    seen = {}

    def note(problem, solution):
        seen[problem.weight.dtype] = problem.weight.is_contiguous()
        return solution

    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        seen.clear()
        prune_(nn.Sequential(nn.Linear(16, 4, dtype=dtype)), sparsity=0.5, method=Returns(note))
        assert seen == {torch.promote_types(dtype, torch.float32): True}


def test_a_pruned_model_still_trains():
    model = mixed()
    prune_(model, batches(), sparsity=0.5, method="wanda")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(batches()[0]).square().mean().backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    copy.deepcopy(model)


def test_the_doc_example_of_the_package():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    report = secateur.prune_(model, [torch.randn(32, 8)], pattern="2:4", method="wanda")
    assert "pruned 96 of 192 weights (50.00%) in 2 layers, skipped 0 modules" in str(report)
