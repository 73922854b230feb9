"""Sparse training: mistakes are named, and leave the model as it was."""

import copy
import math

import pytest
import torch
from torch import nn
from training_cases import (
    LEARNED,
    MASKED,
    METHODS,
    Network,
    assert_unchanged,
    loss_of,
    mlp,
    setup,
    sgd,
    snapshot,
    train,
)

import secateur
from secateur import (
    PatternError,
    RecipeError,
    SparseConv2d,
    SparseLinear,
    SparseTraining,
    sparsify_,
)
from secateur.schedules import Cubic, Linear, OneShot
from secateur.training import SRSTE, Gate, GradualMagnitude


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Errors


@pytest.mark.parametrize("method", ["gate", "rigl"])
@pytest.mark.parametrize(
    "keywords", [{"sparsity": 1.5}, {"pattern": "block:16x4"}, {"schedule": Linear(0.7, 0, 4)}], ids=str
)
def test_errors_of_both_classes_of_methods_leave_the_model_as_it_was(method, keywords):
    model = Network()
    optimizer = sgd(model)
    before = snapshot(model, optimizer)
    with pytest.raises(secateur.SparsityError):
        SparseTraining(model, optimizer, **({"method": method, "sparsity": 0.6, "steps": 8} | keywords))
    assert_unchanged(model, optimizer, before)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"sparsity": 1.5}, PatternError, "between 0 and 1, got 1.5"),
        ({"sparsity": -0.1}, PatternError, "between 0 and 1, got -0.1"),
        ({"sparsity": math.nan}, PatternError, "between 0 and 1, got nan"),
        ({"sparsity": 60}, PatternError, "Did you mean 0.6?"),
        ({"sparsity": "half"}, TypeError, "sparsity must be a number, got str"),
        ({"sparsity": None}, PatternError, "unstructured fits any sparsity"),
        ({"pattern": "2:4", "sparsity": 0.6}, PatternError, "2:4 fixes the sparsity at 0.5, but 0.6 was asked"),
        ({"pattern": "2:5", "sparsity": None}, PatternError, "stem: 2:5 needs an input size .* multiple of 5, got 36"),
        ({"pattern": "block:16x4"}, PatternError, "stem: block:16x4 needs an output size .* multiple of 16, got 8"),
        ({"pattern": "diagonal"}, PatternError, "'diagonal' names no pattern"),
        ({"pattern": 24}, TypeError, "pattern must be a SparsityPattern or its text, got int"),
        ({"method": "magnitud"}, RecipeError, "unknown training method 'magnitud'; did you mean 'magnitude'?"),
        ({"method": Gate}, TypeError, "method must be a Method or its name, got"),
        ({"method": None}, TypeError, "method must be a Method or its name, got NoneType"),
        ({"steps": 0}, RecipeError, "steps must be at least 1, got 0"),
        ({"steps": 2.5}, TypeError, "steps must be an int, got float"),
        ({"steps": True}, TypeError, "steps must be an int, got bool"),
        ({"update_every": 0}, RecipeError, "update_every must be at least 1, got 0"),
        ({"update_every": "1"}, TypeError, "update_every must be an int, got str"),
        ({"schedule": Cubic(0.6, 0, 9)}, RecipeError, "the schedule ends at step 9, but .* by step . of 8"),
        ({"schedule": OneShot(0.6, at=9)}, RecipeError, "the schedule ends at step 9, but .* by step . of 8"),
        ({"schedule": Linear(0.7, 0, 4)}, RecipeError, "ends at sparsity 0.7, but 0.6 was asked"),
        (
            {"schedule": "quartic"},
            RecipeError,
            "unknown schedule 'quartic'; did you mean 'cubic'.* one_shot, linear, cubic",
        ),
        ({"schedule": 0.6}, TypeError, "schedule must be a Schedule or its name, got float"),
        ({"include": ["nothing.*"]}, RecipeError, r"'nothing.\*' matches none"),
        ({"exclude": ["*"]}, RecipeError, "no layer"),
        ({"include": ["norm"]}, RecipeError, "no layer"),
        ({"seed": "a"}, TypeError, "seed must be an int, got str"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got float"),
    ],
    ids=str,
)
def test_wrong_settings_leave_the_model_as_it_was(keywords, error, message):
    model = Network()
    optimizer = sgd(model)
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message):
        SparseTraining(model, optimizer, **({"sparsity": 0.6, "steps": 8} | keywords))
    assert_unchanged(model, optimizer, before)


@pytest.mark.parametrize("method", ["set", "rigl", "static"])
@pytest.mark.parametrize("schedule", ["cubic", OneShot(0.6, at=1)], ids=str)
def test_methods_of_constant_sparsity_have_no_schedule(method, schedule):
    model = Network()
    optimizer = sgd(model)
    before = snapshot(model, optimizer)
    with pytest.raises(RecipeError, match=r"keeps? the sparsity constant from the start"):
        SparseTraining(model, optimizer, method=method, sparsity=0.6, steps=8, schedule=schedule)
    assert_unchanged(model, optimizer, before)
    for same in ("one_shot", OneShot(0.6), None):
        training = SparseTraining(model, optimizer, method=method, sparsity=0.6, steps=8, schedule=same)
        assert training.schedule == OneShot(0.6)
        training.finalize()


def test_named_schedules_run_over_the_ramp_of_the_method():
    for method, begin, end in ((Gate(ramp=(0.1, 0.5)), 1, 5), (GradualMagnitude((0.2, 0.9)), 2, 9)):
        for name, expected in (
            ("one_shot", OneShot(0.6, at=begin)),
            ("linear", Linear(0.6, begin, end)),
            ("cubic", Cubic(0.6, begin, end)),
            (None, Cubic(0.6, begin, end)),
            (Cubic(0.6, 3, 7), Cubic(0.6, 3, 7)),
        ):
            model = mlp()
            training = SparseTraining(model, sgd(model), method=method, sparsity=0.6, steps=10, schedule=name)
            assert training.schedule == expected
    with pytest.raises(RecipeError, match=r"sr-ste has no ramp .* say where it begins and ends, as in Cubic"):
        SparseTraining(model := mlp(), sgd(model), method="sr-ste", sparsity=0.6, steps=10, schedule="cubic")
    model = mlp()
    training = SparseTraining(model, sgd(model), method="sr-ste", steps=10, schedule=Cubic(0.6, 0, 5))
    assert training.sparsity == 0.6
    for freeze, last in ((0.5, 5), (1.0, 10)):
        with pytest.raises(RecipeError, match=f"sr-ste must reach its sparsity by step {last} of 10"):
            SparseTraining(
                model := mlp(), sgd(model), method=SRSTE(freeze=freeze), steps=10, schedule=Cubic(0.6, 0, 11)
            )


@pytest.mark.parametrize("method", METHODS)
def test_models_that_cannot_be_trained(method):
    def refuse(model, optimizer, error, message, **keywords):
        before = snapshot(model, optimizer)
        with pytest.raises(error, match=message):
            SparseTraining(model, optimizer, **({"method": method, "sparsity": 0.6, "steps": 8} | keywords))
        assert_unchanged(model, optimizer, before)

    model = nn.Sequential(nn.LayerNorm(4))
    refuse(model, sgd(model), RecipeError, "no layer")
    model, other = Network(), Network()
    refuse(model, sgd(other), RecipeError, "stem: its weight is not among the optimizer's 9 parameters")
    refuse(model, torch.optim.SGD(list(model.parameters())[:-5], lr=1), RecipeError, r"body.2: its weight is not among")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    refuse(model, sgd(model), RecipeError, r"stem, body.0, body.2: no weight takes a gradient.*\nUnfreeze some")
    model = Network()
    model.body[0].weight.data[0, 0] = math.inf
    refuse(model, sgd(model), RecipeError, r"body.0: 1 of its weights are NaN or infinite")
    model = nn.Sequential(nn.Linear(4, 4, device="meta"))
    with pytest.raises(RecipeError, match="0: its weight is on the meta device"):
        SparseTraining(model, sgd(model), method=method, sparsity=0.6, steps=8)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got list"):
        SparseTraining(Network(), [], method=method, sparsity=0.6, steps=8)
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got dict"):
        SparseTraining({}, sgd(model), method=method, sparsity=0.6, steps=8)


@pytest.mark.parametrize("method", LEARNED)
def test_sparse_layers_that_do_not_fit_the_training(method):
    def refuse(message, **keywords):
        before = snapshot(model, optimizer)
        with pytest.raises(RecipeError, match=message):
            SparseTraining(model, optimizer, **({"method": method, "steps": 8} | keywords))
        assert_unchanged(model, optimizer, before)

    model = Network()
    sparsify_(model, pattern="row", sparsity=0.5)
    optimizer = sgd(model)
    refuse("stem: it was made for row at 0.5, but column at its sparsity was asked. Leave both out", pattern="column")
    refuse("stem: it was made for row at 0.5, but its pattern at 0.6 was asked", sparsity=0.6)
    refuse("the model has 3 sparse layers already, .* give include and exclude to sparsify_", include=["stem"])
    refuse("the model has 3 sparse layers already", exclude=["stem"])

    model = Network()
    sparsify_(model, pattern="row", sparsity=0.5, include=["stem"])
    sparsify_(model, pattern="row", sparsity=0.75, include=["body.0"])
    optimizer = sgd(model)
    refuse("different patterns or sparsities, .*\n  stem: row at 0.5\n  body.0: row at 0.75")

    model = Network()
    sparsify_(model)
    optimizer = sgd(model)
    refuse("stem: it learns its threshold by gradient, without a pattern or budget", sparsity=0.5)

    model = SparseLinear(8, 4, pattern="2:4")
    optimizer = sgd(model)
    refuse("the model is itself a sparse layer.*\nPut it into an nn.Sequential")
    model = nn.Linear(8, 4)
    optimizer = sgd(model)
    refuse("a bare layer cannot be replaced in place", sparsity=0.5)
    model = nn.Sequential(nn.Linear(8, 4))
    model[0].register_forward_hook(lambda *arguments: None)
    optimizer = sgd(model)
    refuse("it has hooks, which a replacement would lose", sparsity=0.5)


@pytest.mark.parametrize("method", MASKED)
def test_methods_with_plain_layers_leave_sparse_ones_alone(method):
    model = Network()
    sparsify_(model, pattern="row", sparsity=0.5, include=["stem"])
    training = SparseTraining(model, sgd(model), method=method, sparsity=0.5, steps=8)
    assert list(training.masks) == ["body.0", "body.2"]
    training.finalize()
    assert type(model.stem) is SparseConv2d
    bare = nn.Linear(8, 4)
    training = SparseTraining(bare, sgd(bare), method=method, sparsity=0.5, steps=8)
    training.finalize()
    assert int((bare.weight == 0).sum()) == 16


@pytest.mark.parametrize(
    ("to_none", "message"),
    [
        (True, r"rigl needs gradients after step 2, but there are none\.\nCall step\(\) before"),
        (False, r"rigl needs gradients after step 2, but those of all layers are zero\.\nCall step\(\) before"),
    ],
)
def test_rigl_needs_its_gradients(to_none, message):
    model, optimizer, training = setup("rigl")
    train(model, optimizer, training, range(1))
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=to_none)
    before = training.masks
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(RecipeError, match=message):
        training.step()
    assert training.step_count == 1
    assert all(torch.equal(mask, before[name]) for name, mask in training.masks.items())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_layer_stays_as_it_is_and_is_reported(method):
    model = Network()
    model.body[2].weight.requires_grad_(False)
    before = model.body[2].weight.clone()
    model, optimizer, training = setup(method, model)
    train(model, optimizer, training, range(8))
    report = training.finalize()
    assert torch.equal(model.body[2].weight, before)
    assert [layer.name for layer in report.layers] == ["stem", "body.0"]
    assert ("body.2", "frozen: it takes no gradient") in [(skip.name, skip.reason) for skip in report.skipped]


class WithSpare(Network):
    """The loss does not depend on one of its layers."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(8, 8)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_without_a_gradient_is_pruned_like_the_others(method):
    model, optimizer, training = setup(method, WithSpare())
    train(model, optimizer, training, range(8))
    layers = {layer.name: layer for layer in training.finalize().layers}
    assert layers["spare"].pruned == round(layers["spare"].asked * 64)
    assert int((model.spare.weight == 0).sum()) >= layers["spare"].pruned
    noted = [name for name, layer in layers.items() if any("had no gradient" in note for note in layer.notes)]
    assert noted == (["spare"] if method == "rigl" else [])


def test_no_other_method_needs_gradients_nor_does_rigl_between_updates():
    for method in METHODS:
        if method != "rigl":
            training = setup(method)[2]
            for _ in range(2):
                training.step()
    setup("rigl")[2].step()


@pytest.mark.parametrize("method", ["gate", "magnitude"])  # whose mask is still to come
def test_finalizing_with_weights_that_are_nan_changes_nothing(method):
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    model, optimizer, training = setup(method, model)
    train(model, optimizer, training, range(2))
    model[1].weight.data.masked_fill_(training.masks["1"], math.nan)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PatternError, match=r"^1: \d+ of (its )?48"):
        training.finalize()
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", ["magnitude", "sr-ste", "set", "rigl"])
def test_weights_that_became_nan_are_named(method):
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Linear(12, 4, bias=False))
    model, optimizer, training = setup(method, model)
    for step in range(1, 9):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        if step == 2:
            model[1].weight.data[training.masks["1"].nonzero()[0].unbind()] = math.nan
            with pytest.raises(PatternError, match=r"^1: 1 of (its )?48"):
                training.step()
            return
        training.step()
