"""Sparse training: exact budgets in every loop and on every layer, and runs that can stop and go on anywhere."""

import copy
import dataclasses
import io
import json
import math

import pytest
import reference
import torch
from torch import nn
from training_cases import (
    LEARNED,
    MASKED,
    METHODS,
    OPTIMIZERS,
    Network,
    images,
    loss_of,
    mlp,
    rows,
    setup,
    sgd,
    train,
    weights_of,
)

import secateur
from secateur import (
    NM,
    Column,
    RecipeError,
    SparseTraining,
    SparsityPattern,
    sparsify_,
)
from secateur.reports import Report
from secateur.training import SET, SRSTE, Gate, GradualMagnitude, RigL, Static, TrainingSettings


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# The contract: whatever the method and the pattern


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "pattern",
    [
        "unstructured",
        "unstructured,scope=row",
        "2:4",
        "1:4",
        "block:4x4",
        "row",
        "column",
        "2:4,remainder=dense",
        "block:4x2,remainder=dense",
    ],
)
def test_every_method_ends_at_the_exact_count(method, pattern):
    torch.manual_seed(1)
    model = mlp(10, 7, 5) if "dense" in pattern else Network()
    types = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    model, optimizer, training = setup(method, model, pattern=pattern)
    train(model, optimizer, training, range(8))

    x = images(9)[0] if isinstance(model, Network) else rows(9, 10)
    masks, before = training.masks, model.train()(x)
    report = training.finalize()
    assert torch.equal(model.eval()(x), before)
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert all(not parameter._backward_hooks for parameter in model.parameters())

    assert [layer.name for layer in report.layers] == list(masks) != []
    for layer in report.layers:
        mask, weight = masks[layer.name], model.get_submodule(layer.name).weight.detach().flatten(1)
        asked = SparsityPattern.parse(pattern)
        fitted = Column(9) if (asked, layer.name) == (Column(), "stem") else asked
        sparsity = {"2:4": 0.5, "1:4": 0.75}.get(pattern[:3], 0.6)
        count = sum(  # in units of the pattern, by the reference
            len(unit)
            for units in reference.competitions(fitted, *layer.shape)
            for unit in units[: round(sparsity * len(units))]
        )
        assert layer.pattern == str(fitted)
        assert layer.pruned == int((~mask).sum()) == count == fitted.num_pruned(layer.shape, sparsity) > 0
        assert not weight[~mask].any()
        assert layer.zeros == int((weight == 0).sum()) >= count
        assert layer.shape == weight.shape
        assert not layer.notes
        fitted.check(mask)


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss(method):
    """Masks move, but what is trained is the network that is kept."""
    model, optimizer, training = setup(method, steps=60, update_every=6)
    with torch.no_grad():
        before = sum(loss_of(model, step) for step in range(4))
    for step in range(60):
        train(model, optimizer, training, [step % 4])
    training.finalize()
    with torch.no_grad():
        assert sum(loss_of(model, step) for step in range(4)) < before / 3


@pytest.mark.parametrize("method", METHODS)
def test_report_says_what_was_done(method):
    model, optimizer, training = setup(method, pattern="column")
    train(model, optimizer, training, range(8))
    report = training.finalize()
    assert training.finalize() is report
    assert {entry.name: entry.reason for entry in report.skipped} == {
        "norm": "no weight matrix",
        "classifier": "output head; include=['classifier'] prunes it",
    }
    assert report.num_pruned == sum(layer.pruned for layer in report.layers)
    recipe = report.recipe
    assert recipe["method"] == training.method.to_dict()
    assert recipe["method"]["name"] == method
    assert (recipe["pattern"], recipe["sparsity"], recipe["steps"], recipe["update_every"]) == ("column", 0.6, 8, 2)
    assert recipe["schedule"]["final"] == 0.6
    assert all(len(layer.thumbnail) == min(48, layer.shape[0]) for layer in report.layers)
    assert json.loads(json.dumps(recipe)) == recipe
    assert Report.from_json(report.to_json()) == report
    assert "| body.0 | 16 x 72 | column | 0.6 |" in report.to_markdown()
    page = report.to_html()
    assert f"Method {method}, pattern column:9, column" in page
    assert "Recipe.load" not in page


@pytest.mark.parametrize("method", METHODS)
def test_finalize_before_the_end_prunes_what_is_missing(method):
    model, optimizer, training = setup(method, sparsity=0.9)
    train(model, optimizer, training, range(1))
    report = training.finalize()
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight
        assert layer.pruned == round(0.9 * weight.numel()) == int((weight == 0).sum())
        early = training.method.ramp is not None
        assert layer.notes == (("finalized at step 1 of 8, before the mask was final",) if early else ())
    with pytest.raises(RecipeError, match="the training is finalized"):
        training.step()
    assert training.step_count == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.0, 1])
def test_nothing_or_everything_is_pruned(method, sparsity):
    model, optimizer, training = setup(method, sparsity=sparsity)
    train(model, optimizer, training, range(8))
    report = training.finalize()
    assert report.sparsity == sparsity
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert bool(model.body[0].weight.any()) == (sparsity == 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 3])
def test_short_trainings_arrive(method, steps):
    model, optimizer, training = setup(method, steps=steps, update_every=100)
    train(model, optimizer, training, range(steps))
    assert training.current_sparsity == 0.6
    assert all(not layer.notes for layer in training.finalize().layers)


@pytest.mark.parametrize("method", METHODS)
def test_steps_beyond_the_last_change_no_mask(method):
    model, optimizer, training = setup(method)
    train(model, optimizer, training, range(8))
    masks = training.masks
    train(model, optimizer, training, range(8, 12))
    if method != "sr-ste":  # whose mask follows the weights until it is frozen
        assert all(torch.equal(mask, masks[name]) for name, mask in training.masks.items())
    assert training.step_count == 12
    assert all(not layer.notes for layer in training.finalize().layers)


def test_update_every_is_a_hundredth_of_the_steps():
    for steps, every in ((1, 1), (99, 1), (100, 1), (1000, 10)):
        model = mlp()
        assert SparseTraining(model, sgd(model), sparsity=0.5, steps=steps).update_every == every


# Where people train


@pytest.mark.parametrize("method", METHODS)
def test_gradients_accumulate(method):
    models = []
    for parts in (1, 2):
        torch.manual_seed(0)
        model, optimizer, training = setup(method, Network().double(), optimizer=lambda m: sgd(m, lr=0.05))
        for step in range(8):
            x, y = images(step)
            optimizer.zero_grad()
            for a, b in zip(x.double().chunk(parts), y.chunk(parts), strict=True):
                (nn.functional.cross_entropy(model(a), b) / parts).backward()
            optimizer.step()
            training.step()
        models.append((training.masks, model.state_dict()))
    (masks, state), (other_masks, other) = models
    assert all(torch.equal(mask, other_masks[name]) for name, mask in masks.items())
    for name, tensor in state.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", MASKED)
def test_clipping_sees_kept_weights_only(method):
    model, optimizer, training = setup(method, schedule="one_shot" if method == "magnitude" else None)
    for step in range(1, 9):
        twin = copy.deepcopy(model)
        loss_of(twin, step).backward()
        optimizer.zero_grad()
        loss_of(model, step).backward()
        due = method == "rigl" and step in (2, 4)
        total = 0.0
        for name, parameter in twin.named_parameters():
            mask = training.masks.get(name.removesuffix(".weight"))
            gradient = parameter.grad if mask is None or due else parameter.grad * mask.view(parameter.shape)
            total += float(gradient.double().square().sum())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert float(norm) == pytest.approx(math.sqrt(total), rel=1e-5)
        optimizer.step()
        training.step()


@pytest.mark.parametrize("method", METHODS)
def test_scaled_gradients_and_a_skipped_step(method):
    """In step 4 the gradients overflow, and the scaler leaves the optimizer's step out."""
    model, optimizer, training = setup(method, steps=16)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
    moved = 0
    for step in range(1, 17):
        before, masks = copy.deepcopy(model.state_dict()), training.masks
        optimizer.zero_grad()
        loss = loss_of(model, step)
        scaler.scale(loss * (math.inf if step == 4 else 1)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        training.step()
        new = training.masks
        moved += sum(int((new[name] ^ masks[name]).sum()) for name in masks) * (step != 4)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        if step == 4:
            assert torch.equal(model.body[0].bias, before["body.0.bias"])
            if method in ("rigl", "static"):  # the others do not need the gradient to go on
                assert all(torch.equal(mask, masks[name]) for name, mask in new.items())
    assert bool(moved) == (method != "static")
    assert training.finalize().num_pruned == sum(round(0.6 * n) for n in (288, 1152, 192))


@pytest.mark.parametrize("method", METHODS)
def test_autocast(method):
    model, optimizer, training = setup(method, pattern="2:4")
    for step in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        training.step()
    x = images()[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x)
        report = training.finalize()
        assert torch.equal(model.eval()(x), before)
    assert report.sparsity == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_weights(method):
    """bfloat16 weights tie often; the count is exact all the same."""
    model, optimizer, training = setup(method, mlp().bfloat16())
    for step in range(8):
        optimizer.zero_grad()
        (model(rows(step).bfloat16()) - 1).square().mean().backward()
        optimizer.step()
        training.step()
    report = training.finalize()
    assert [layer.pruned for layer in report.layers] == [round(0.6 * 96), round(0.6 * 48)]
    assert model[0].weight.dtype == torch.bfloat16


# Every optimizer under one method of each class, and every method under one optimizer.
@pytest.mark.parametrize(
    ("method", "name"),
    [*(("gate", name) for name in OPTIMIZERS), *(("rigl", name) for name in OPTIMIZERS)]
    + [(method, "adamw") for method in METHODS if method not in ("gate", "rigl")],
)
def test_zeros_hold_whatever_the_optimizer(method, name):
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Tanh(), nn.Linear(12, 4, bias=False))
    model, optimizer, training = setup(method, model, optimizer=OPTIMIZERS[name])
    moved = False
    for step in range(8):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        moved |= any(bool(w[~training.masks[n]].any()) for n, w in weights_of(model, training).items())
        training.step()
        if method in MASKED:
            assert all(not w[~training.masks[n]].any() for n, w in weights_of(model, training).items())
    if method in MASKED and name == "muon":
        assert moved  # it mixes all weights of a matrix: the zeros are restored, not left alone
    x = rows(9)
    before = model(x)
    report = training.finalize()
    assert report.num_pruned == round(0.6 * 96) + round(0.6 * 48)
    assert torch.equal(model(x), before)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
@pytest.mark.parametrize("method", METHODS)
def test_compiles_in_one_graph(method):
    torch.compiler.reset()
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, optimizer, training = setup(method, mlp(), steps=14)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        for step in range(14):
            optimizer.zero_grad()
            (run(rows(step)) - 1).square().mean().backward()
            optimizer.step()
            training.step()
        training.finalize()
        runs.append((run(rows(20)), model.state_dict()))
    torch.testing.assert_close(runs[1][0], runs[0][0])
    for name, tensor in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], tensor)
        assert torch.equal(runs[1][1][name] == 0, tensor == 0)


@pytest.mark.parametrize("method", METHODS)
def test_copies_carry_no_hooks(method):
    model, optimizer, training = setup(method)
    train(model, optimizer, training, range(4))
    twin = copy.deepcopy(model)
    assert all(not parameter._backward_hooks for parameter in twin.parameters())
    hooked = {name for name, parameter in model.named_parameters() if parameter._backward_hooks}
    assert hooked == (set() if method in LEARNED else {f"{name}.weight" for name in training.masks})
    loss_of(twin, 0).backward()
    assert twin.body[0].weight.grad.count_nonzero() == 16 * 72 or method in LEARNED
    training.finalize()
    assert all(not parameter._backward_hooks for parameter in model.parameters())


# Which layers


@pytest.mark.parametrize("method", METHODS)
def test_layers_are_chosen_by_name(method):
    for selection, names in (
        ({}, ["stem", "body.0", "body.2"]),
        ({"include": ["classifier", "body.2"]}, ["body.2", "classifier"]),
        ({"exclude": ["stem"]}, ["body.0", "body.2"]),
    ):
        model, optimizer, training = setup(method, **selection)
        assert list(training.masks) == names
        train(model, optimizer, training, range(8))
        report = training.finalize()
        assert [layer.name for layer in report.layers] == names
        assert {skip.name for skip in report.skipped} == {"stem", "body.0", "body.2", "norm", "classifier"} - set(names)
        for name in ("stem", "body.0", "body.2", "classifier"):
            assert bool((model.get_submodule(name).weight == 0).any()) == (name in names)


@pytest.mark.parametrize("method", METHODS)
def test_names_are_not_globs(method):
    model = nn.ModuleDict({"[a]": nn.Linear(8, 4), "b*": nn.Linear(8, 4), "bc": nn.Conv1d(2, 2, 2)})
    training = SparseTraining(model, sgd(model), method=method, sparsity=0.5, steps=4)
    assert list(training.masks) == ["[a]", "b*"] + ["bc"] * (method in MASKED)


@pytest.mark.parametrize("method", METHODS)
def test_tied_weights_have_one_mask(method):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4))
    model[2].weight = model[0].weight
    model, optimizer, training = setup(method, model)
    assert list(training.masks) == ["0", "3"]
    train(model, optimizer, training, range(8))
    x = rows(9)
    before = model(x)
    report = training.finalize()
    assert report.layers[0].tied_to == ("2",)
    assert report.num_pruned == round(0.6 * 64) + round(0.6 * 32)
    assert model[0].weight is model[2].weight
    assert int((model[2].weight == 0).sum()) == round(0.6 * 64)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_an_embedding_reads_too(method):
    """Kept at zero it may be shared; behind a mask it would hold other numbers than the layer uses."""
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False))
    model[2].weight = model[0].weight
    optimizer = sgd(model)
    keywords = {"method": method, "sparsity": 0.5, "steps": 4, "include": ["2"]}
    if method in LEARNED:
        with pytest.raises(RecipeError, match=r"2: '0' \(Embedding\) reads the same weight, but would not see"):
            SparseTraining(model, optimizer, **keywords)
        assert type(model[2]) is nn.Linear
        sparsify_(model, pattern="row", sparsity=0.5, include=["2"])
        with pytest.raises(RecipeError, match=r"2: '0' \(Embedding\) reads the same weight, but would not see"):
            SparseTraining(model, optimizer, method=method, steps=4)
        return
    training = SparseTraining(model, optimizer, **keywords)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.arange(10)).square().mean().backward()
        optimizer.step()
        training.step()
        assert not model[0].weight[~training.masks["2"]].any()
    assert training.finalize().num_pruned == 40


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 6))  # [in, out]

    def forward(self, x):
        return 2 * x @ self.kernel


@pytest.mark.parametrize("method", MASKED)
@pytest.mark.parametrize("make", ["registered", "Conv1D", "nn.Conv1d"])
def test_other_kinds_of_layers(method, make, monkeypatch):
    if make == "registered":
        monkeypatch.setattr("secateur.layers._kinds._KINDS", dict(secateur.layers._kinds._KINDS))
        kind = secateur.LayerKind(
            to_matrix=lambda module, kernel: kernel.T,
            from_matrix=lambda module, matrix: matrix.T,
            input_rows=lambda module, x: x.reshape(1, -1, x.shape[-1]),
            parameter="kernel",
        )
        secateur.register_layer(Scaled, kind)
        layer = Scaled()
        stored, x = layer.kernel, torch.randn(16, 8)
    elif make == "Conv1D":
        layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 8)
        stored, x = layer.weight, torch.randn(16, 8)
    else:
        layer = nn.Conv1d(8, 6, 1)
        stored, x = layer.weight, torch.randn(2, 8, 5)
    model = nn.Sequential(layer)
    optimizer = sgd(model)
    training = SparseTraining(model, optimizer, method=method, pattern="2:4", steps=8, update_every=2)
    for _ in range(8):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        training.step()
    mask = training.masks["0"]
    assert mask.shape == (6, 8)
    assert training.finalize().num_pruned == 24
    matrix = stored.detach().flatten(1) if make == "nn.Conv1d" else stored.detach().T
    assert not matrix[~mask].any()
    assert torch.equal(matrix != 0, mask) or method in ("set", "rigl")


# Interrupted and resumed


def states(model, optimizer, training):
    """Through a file, read without unpickling anything but tensors and plain values."""
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict(), training.state_dict()), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("method", [*METHODS, SRSTE(freeze=0.5), Static("random"), RigL(initial="random")], ids=str)
@pytest.mark.parametrize(("pattern", "kind"), [("unstructured", "adamw"), ("2:4", "sgd")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(method, pattern, kind):
    keywords = {"pattern": pattern, "steps": 12, "optimizer": OPTIMIZERS[kind]}
    model, optimizer, training = setup(method, **keywords)
    saved = {}
    for step in range(12):
        saved[step] = states(model, optimizer, training)
        train(model, optimizer, training, [step])
    masks, momenta = training.masks, optimizer.state_dict()["state"]
    training.finalize()
    for step, training_first in ((0, True), (1, False), (4, True), (5, False), (9, True), (10, False), (11, True)):
        torch.manual_seed(step + 1)
        other, its_optimizer, its_training = setup(method, **keywords)
        weights, past, rest = saved[step]
        if training_first:
            its_training.load_state_dict(rest)
        other.load_state_dict(weights)
        its_optimizer.load_state_dict(past)
        if not training_first:
            its_training.load_state_dict(rest)
        assert its_training.step_count == step
        train(other, its_optimizer, its_training, range(step, 12))
        assert all(torch.equal(mask, masks[name]) for name, mask in its_training.masks.items())
        for index, values in its_optimizer.state_dict()["state"].items():
            assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(momenta[index][k])) for k, v in values.items())
        its_training.finalize()
        final = other.state_dict()
        assert all(torch.equal(tensor, final[name]) for name, tensor in model.state_dict().items())


def test_a_state_is_a_snapshot():
    for method in METHODS:
        model, optimizer, training = setup(method)
        train(model, optimizer, training, range(3))
        state = training.state_dict()
        before = copy.deepcopy(state)
        train(model, optimizer, training, range(3, 8))
        for name, entry in state["weights"].items():
            for key, value in entry.items():
                other = before["weights"][name][key]
                assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert torch.equal(state["generator"], before["generator"])


@pytest.mark.parametrize("method", ["gate", "set"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"sparsity": 0.7}, "another recipe:\n  sparsity: saved 0.6, here 0.7"),
        ({"steps": 10}, "  steps: saved 8, here 10"),
        ({"seed": 3}, "  seed: saved 0, here 3"),
        ({"update_every": 3}, "  update_every: saved 2, here 3"),
        ({"pattern": "row"}, "  pattern: saved 'unstructured', here 'row'"),
        ({"method": "other"}, "  method: saved"),
        ({"exclude": ["stem"]}, "the state holds the layers stem, body.0, body.2, but this model has body.0, body.2"),
        ({"model": "wider"}, r"body.0: the state is of a weight of shape \(16, 72\), but this one has \(20, 72\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_state_of_another_training_is_refused(method, other, message):
    model, optimizer, training = setup(method)
    train(model, optimizer, training, range(3))
    state = training.state_dict()
    if other.get("method"):
        other = {"method": {"gate": Gate(freeze=0.7), "set": SET(0.2)}[method]}
    model = Network()
    if other.get("model"):
        model.body = nn.Sequential(nn.Linear(72, 20), nn.Tanh(), nn.Linear(20, 12, bias=False))
        other = {}
    model, optimizer, training = setup(
        other.get("method", method), model, **{k: v for k, v in other.items() if k != "method"}
    )
    before, own = copy.deepcopy(model.state_dict()), copy.deepcopy(training.state_dict())
    with pytest.raises(RecipeError, match=message):
        training.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert str(training.state_dict()) == str(own)


def test_states_of_other_versions_or_things_are_refused():
    model, _, training = setup("magnitude")
    for state in ({}, {"version": 99}, training.state_dict() | {"version": 0}, None, [1], model.state_dict()):
        with pytest.raises(RecipeError, match="not the state of a SparseTraining, or one of another version"):
            training.load_state_dict(state)
    state = training.state_dict()
    training.finalize()
    for call in (training.state_dict, lambda: training.load_state_dict(state)):
        with pytest.raises(RecipeError, match="the training is finalized"):
            call()


def test_a_training_from_settings_is_that_from_keywords():
    keywords = {"method": "magnitude", "pattern": "2:4", "steps": 8, "update_every": 2, "exclude": ["stem"]}
    settings = TrainingSettings(GradualMagnitude(), NM(2, 4), steps=8, update_every=2, exclude=("stem",))
    runs = []
    for make in (
        lambda model, optimizer: SparseTraining(model, optimizer, **keywords),
        lambda model, optimizer: SparseTraining.from_settings(model, optimizer, settings),
    ):
        torch.manual_seed(0)
        model = Network()
        optimizer = sgd(model)
        training = make(model, optimizer)
        train(model, optimizer, training, range(8))
        runs.append((training.state_dict(), training.finalize().recipe, model.state_dict()))
    assert str(runs[0]) == str(runs[1])
    with pytest.raises(TypeError, match="steps must be an int, got NoneType"):
        SparseTraining.from_settings(model, optimizer, dataclasses.replace(settings, steps=None))


@pytest.mark.parametrize("method", METHODS)
def test_a_training_to_resume_changes_nothing_until_it_has_its_state(method):
    model, optimizer, training = setup(method)
    train(model, optimizer, training, range(8))
    weights, state = copy.deepcopy(model.state_dict()), training.state_dict()
    training.release()
    assert all(not parameter._backward_hooks for parameter in model.parameters())
    keywords = {} if method in LEARNED else {"sparsity": 0.6}
    settings = TrainingSettings(secateur.training.METHODS[method](), steps=8, update_every=2, **keywords)
    other = SparseTraining.from_settings(model, optimizer, settings, to_resume=True)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert other.layers_unlike(state) == []
    other.load_state_dict(state)
    assert all(torch.equal(mask, training.masks[name]) for name, mask in other.masks.items())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    mask = ~training.masks["body.0"]
    state["weights"]["body.0"]["mask"] = mask.view(state["weights"]["body.0"]["shape"]) if method in LEARNED else mask
    assert other.layers_unlike(state) == ["body.0"]
