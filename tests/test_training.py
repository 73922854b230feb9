"""Sparse training: exact budgets, masks that move by the book, and runs that can stop and go on anywhere."""

import copy
import io
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
from torch import nn

import secateur
from secateur import (
    NM,
    Column,
    PatternError,
    RecipeError,
    SparseConv2d,
    SparseLinear,
    SparseTraining,
    SparsityPattern,
    Unstructured,
    sparsify_,
)
from secateur.reports import Report
from secateur.schedules import Cubic, Linear, OneShot
from secateur.training import SET, SRSTE, Gate, GradualMagnitude, Method, RigL, Static, exchange

METHODS = ["gate", "magnitude", "sr-ste", "set", "rigl", "static"]
LEARNED = ["gate", "sr-ste"]
MASKED = ["magnitude", "set", "rigl", "static"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Network(nn.Module):
    """A convolution of 4 x 3 x 3 inputs, and linear layers; all sizes divide by four."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3)
        self.body = nn.Sequential(nn.Linear(72, 16), nn.Tanh(), nn.Linear(16, 12, bias=False))
        self.norm = nn.LayerNorm(12)
        self.classifier = nn.Linear(12, 3)

    def forward(self, x):
        return self.classifier(self.norm(self.body(self.stem(x).tanh().flatten(1))))


def images(step=0):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, 5, 5, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def mlp(inputs=8, hidden=12, outputs=4):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def rows(step=0, size=8):
    return torch.randn(16, size, generator=torch.Generator().manual_seed(step))


def sgd(model, **keywords):
    return torch.optim.SGD(model.parameters(), **({"lr": 0.1, "momentum": 0.9} | keywords))


def loss_of(model, step):
    if isinstance(model, Network):
        x, y = images(step)
        return nn.functional.cross_entropy(model(x), y)
    return (model(rows(step, model[0].weight.shape[1])) - 1).square().mean()


def train(model, optimizer, training, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        training.step()


def setup(method, model=None, **keywords):
    """A model, its optimizer and its training: unstructured at 60 % in 8 steps, masks updated every other."""
    model = Network() if model is None else model
    optimizer = keywords.pop("optimizer", sgd)(model)
    keywords = {"steps": 8, "update_every": 2, "method": method} | keywords
    if "sparsity" not in keywords and ":" not in str(keywords.get("pattern", "")).replace("block:", ""):
        keywords["sparsity"] = 0.6
    return model, optimizer, SparseTraining(model, optimizer, **keywords)


def pruned(training):
    return {name: int((~mask).sum()) for name, mask in training.masks.items()}


def weights_of(model, training):
    return {name: model.get_submodule(name).weight.detach().flatten(1) for name in training.masks}


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
        early = method in ("gate", "magnitude")
        assert layer.notes == (("finalized at step 1 of 8, before the mask was final",) if early else ())
    with pytest.raises(RecipeError, match="the training is finalized"):
        training.step()
    assert training.step_count == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.0, 1.0, 0, 1])
def test_nothing_or_everything_is_pruned(method, sparsity):
    model, optimizer, training = setup(method, sparsity=sparsity)
    train(model, optimizer, training, range(8))
    report = training.finalize()
    assert report.sparsity == sparsity
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert bool(model.body[0].weight.any()) == (sparsity == 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 3])
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


# gate


@pytest.mark.parametrize("pattern", ["unstructured", "unstructured,scope=row", "2:4", "block:4x4", "row", "column"])
def test_gate_meets_its_budget_at_every_step_and_freezes_on_time(pattern):
    steps = 20  # ramp from round(0.05 * 20) = 1 to round(0.33 * 20) = 7, freeze at round(0.8 * 20) = 16
    model, optimizer, training = setup("gate", pattern=pattern, steps=steps)
    frozen = None
    for step in range(steps + 1):
        if step:
            train(model, optimizer, training, [step])
        final = 0.5 if pattern == "2:4" else 0.6
        sparsity = reference.gate_schedule(final, 1, 7, step)
        assert training.current_sparsity == pytest.approx(sparsity, abs=1e-15)
        for name, mask in training.masks.items():
            layer = model.get_submodule(name)
            fitted = Column(9) if (pattern, name) == ("column", "stem") else SparsityPattern.parse(pattern)
            for units in reference.competitions(fitted, *mask.shape):
                gone = [not mask[unit[0]] for unit in units]
                assert sum(gone) == round(sparsity * len(units))
            if step < 16:
                assert layer.mask is None
                assert float(layer.temperature) == pytest.approx(4 * 15 ** (step / 16), rel=1e-6)
            else:
                assert torch.equal(layer.mask.flatten(1), mask)
                assert not layer.straight_through
                assert not layer.weight.flatten(1)[~mask].any()
        if step == 15:
            hidden = [w[~training.masks[name]] for name, w in weights_of(model, training).items()]
            assert all(values.all() for values in hidden)  # soft until it is frozen
        if step == 16:
            frozen = training.masks
            state = optimizer.state[model.body[0].weight]["momentum_buffer"]
            assert not state[~frozen["body.0"]].any()
            assert state[frozen["body.0"]].any()
        if step > 16:
            assert all(torch.equal(mask, frozen[name]) for name, mask in training.masks.items())
    assert len({str(training._masked.weights[name].pattern) for name in frozen}) == (2 if pattern == "column" else 1)


@pytest.mark.parametrize("pattern", [Unstructured(), Unstructured("row"), NM(2, 4), secateur.Block(2, 2), Column()])
def test_gate_is_the_slow_one_in_float64(pattern):
    """Ten steps of SGD on a least-squares problem: ramp to step 3, annealing to step 8, then the frozen mask."""
    steps, rate = 10, 0.05
    generator = np.random.default_rng(3)
    weight, x, y = (generator.normal(size=size) for size in ((4, 8), (32, 8), (32, 4)))
    sparsity = 0.5 if pattern == NM(2, 4) else 0.6
    layer = nn.Linear(8, 4, bias=False, dtype=torch.float64)
    layer.weight.data = torch.from_numpy(weight.copy())
    model = nn.Sequential(layer)
    optimizer = sgd(model, lr=rate, momentum=0)
    training = SparseTraining(model, optimizer, pattern=pattern, sparsity=sparsity, steps=steps)
    mask = None
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()
        training.step()

        if step == 8:
            scores = np.abs(weight)
            mask = reference.mask(pattern, scores, sparsity)
            weight = weight * mask
        if mask is None:
            now, temperature = reference.gate_schedule(sparsity, 0, 3, step), 4 * 15 ** (step / 8)
            effective = reference.gate_effective(weight, pattern, now, temperature)
        else:
            effective = weight
        upstream = 2 * (x @ effective.T - y).T @ x / y.size
        if mask is None:
            weight = weight - rate * reference.gate_gradient(weight, upstream, pattern, now, temperature)
        else:
            weight = weight - rate * upstream * mask
        expected = torch.from_numpy(weight * (reference.mask(pattern, np.abs(weight), sparsity) if step == 7 else 1))
        torch.testing.assert_close(model[0].weight.detach(), expected, rtol=0, atol=1e-8)
    assert np.count_nonzero(weight) == np.count_nonzero(mask)


def test_gate_takes_over_layers_that_are_there_already():
    model = Network()
    made = sparsify_(model, pattern="column", sparsity=0.5)
    optimizer = sgd(model)
    for keywords in ({}, {"pattern": "column"}, {"sparsity": 0.5}, {"schedule": Linear(0.5, 0, 4)}):
        training = SparseTraining(model, optimizer, steps=8, **keywords)
        assert (training.pattern, training.sparsity) == (Column(), 0.5)
    assert list(training.masks) == list(made) == ["stem", "body.0", "body.2"]
    assert model.stem is made["stem"]
    train(model, optimizer, training, range(8))
    report = training.finalize()
    assert [layer.pattern for layer in report.layers] == ["column:9", "column", "column"]
    assert type(model.stem) is nn.Conv2d
    assert report.sparsity == 0.5
    assert {entry.name for entry in report.skipped} == {"norm", "classifier"}


# magnitude


def test_magnitude_follows_the_cubic_and_revives_nothing():
    """20 steps, ramp to round(0.75 * 20) = 15, updates every 4 and at 15."""
    model, optimizer, training = setup(GradualMagnitude(ramp=(0.0, 0.75)), steps=20, update_every=4)
    updates, seen = [0, 4, 8, 12, 15], []
    for step in range(21):
        if step:
            train(model, optimizer, training, [step])
        last = max(update for update in updates if update <= step)
        sparsity = 0.6 * (1 - (1 - last / 15) ** 3)
        for name, weight in weights_of(model, training).items():
            assert pruned(training)[name] == round(sparsity * weight.numel())
            assert not weight[~training.masks[name]].any()
        seen.append(training.masks)
    for before, after in pairwise(seen):
        assert all(not (after[name] & ~before[name]).any() for name in before)
    assert pruned(training)["body.0"] == round(0.6 * 16 * 72)


def test_magnitude_prunes_the_smallest_of_those_that_are_left():
    model = nn.Sequential(nn.Linear(6, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -6, 5, 2, -4, 3]]))
    optimizer = sgd(model, lr=0)
    training = SparseTraining(
        model, optimizer, method="magnitude", sparsity=4 / 6, steps=4, schedule=Linear(4 / 6, 0, 4), update_every=1
    )
    order = []
    for _ in range(4):
        model(torch.ones(1, 6)).sum().backward()
        optimizer.step()
        training.step()
        order.append((~training.masks["0"][0]).nonzero().flatten().tolist())
    assert order == [[0], [0, 3], [0, 3, 5], [0, 3, 4, 5]]


def test_magnitude_revives_nothing_among_weights_that_became_zero():
    """Weight 0 is pruned first; then 6 and 7 are trained to zero. One of them goes next, and 0 does not come back."""
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.5, 4, 4, 4, 4, 4, 1, 1]]))
    optimizer = sgd(model, lr=1, momentum=0)
    training = SparseTraining(
        model, optimizer, method="magnitude", steps=3, schedule=Linear(0.375, 0, 3), update_every=1
    )
    order = []
    for x in ([0.0] * 8, [0.0] * 6 + [1, 1], [0.0] * 8):
        optimizer.zero_grad()
        model(torch.tensor([x])).sum().backward()
        optimizer.step()
        training.step()
        order.append((~training.masks["0"][0]).nonzero().flatten().tolist())
    assert order == [[0], [0, 7], [0, 6, 7]]


def test_magnitude_prunes_one_more_of_each_group_on_the_way_to_n_of_m():
    model = nn.Sequential(nn.Linear(16, 4, bias=False))
    optimizer = sgd(model)
    training = SparseTraining(
        model, optimizer, method="magnitude", pattern="1:4", schedule=Linear(0.75, 0, 6), steps=6, update_every=1
    )
    # sparsity 0.125 to 0.75 in steps of 0.125; round(4 * sparsity), halves to even
    for step, gone in enumerate([0, 0, 1, 2, 2, 2, 3]):
        if step:
            train(model, optimizer, training, [step])
        kept = training.masks["0"].unflatten(1, (4, 4)).sum(2)
        assert kept.unique().tolist() == [4 - gone]


# sr-ste


def test_sr_ste_step_by_hand():
    """Weight, mask and gradient of one step, then the decay of the pruned weights and the next mask.

    weight     4     3    2.9    1
    mask       1     1     0     0      the two largest: forward is 4 + 3 = 7 times the input
    input      2     2    -1     1      and dense gradient of the output
    - 0.5 g    3     2    3.4   0.5
    decay      3     2    3.06  0.45    the pruned ones shrink by a tenth
    next mask  1     0     1     0
    """
    model = nn.Sequential(nn.Linear(4, 1, bias=False, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, 3, 2.9, 1]], dtype=torch.float64))
    optimizer = sgd(model, lr=0.5, momentum=0)
    training = SparseTraining(model, optimizer, method=SRSTE(decay=0.1), pattern="2:4", steps=4)
    x = torch.tensor([[2.0, 2, -1, 1]], dtype=torch.float64)
    output = model(x)
    assert output.item() == 4 * 2 + 3 * 2
    output.sum().backward()
    assert torch.equal(model[0].weight.grad, x)
    optimizer.step()
    training.step()
    expected = torch.tensor([[3.0, 2, 3.06, 0.45]], dtype=torch.float64)
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=0, atol=1e-12)
    assert training.masks["0"].tolist() == [[True, False, True, False]]
    assert model(x).item() == pytest.approx(3 * 2 - 3.06)
    training.finalize()
    torch.testing.assert_close(model[0].weight.detach(), expected * torch.tensor([1, 0, 1, 0]), rtol=0, atol=1e-12)


def test_sr_ste_freezes_when_asked():
    model, optimizer, training = setup(SRSTE(freeze=0.5), pattern="2:4")
    for step in range(9):
        if step:
            train(model, optimizer, training, [step])
        assert all(weight.modules[0].straight_through == (step < 4) for weight in training._masked.weights.values())
        if step == 4:
            masks = training.masks
        if step >= 4:
            assert all(torch.equal(mask, masks[name]) for name, mask in training.masks.items())
            assert all(not weight[~masks[name]].any() for name, weight in weights_of(model, training).items())


# set and rigl


def test_exchange_by_hand():
    """Kept 0 to 4, of these the smallest go; of the others those with the highest growth come.

    weight   5   1   4   2   3   0   0   0   0   0
    growth   0   9   0   8   0   3   5   1   4   2
    drop         1st     2nd 3rd
    grow                         3rd 1st 5th 2nd 4th     others only
                 1st     2nd     5th 3rd     4th         with those that were just dropped
    """
    weight = torch.tensor([[5.0, -1, 4, -2, 3, 0, 0, 0, 0, 0]])
    growth = torch.tensor([[0.0, 9, 0, 8, 0, 3, 5, 1, 4, 2]])
    mask = weight != 0
    others = {
        0.0: [0, 1, 2, 3, 4],
        0.2: [0, 2, 3, 4, 6],
        0.4: [0, 2, 4, 6, 8],
        0.6: [0, 2, 5, 6, 8],
        1.0: [5, 6, 7, 8, 9],
    }
    dropped_too = {
        0.0: [0, 1, 2, 3, 4],
        0.2: [0, 1, 2, 3, 4],  # 1 comes back at once
        0.4: [0, 1, 2, 3, 4],
        0.6: [0, 1, 2, 3, 6],
        1.0: [1, 3, 5, 6, 8],
    }
    for regrow_dropped, expected in ((False, others), (True, dropped_too)):
        for fraction, kept in expected.items():
            new = exchange(Unstructured(), mask, weight, growth, fraction, regrow_dropped=regrow_dropped)
            assert new[0].nonzero().flatten().tolist() == kept, (regrow_dropped, fraction)


def test_exchange_of_groups_by_hand():
    """1:4 cannot exchange 0.3 of a weight in each of four groups: round(0.3 * 4) = 1 moves, where the smallest is.

    kept      3          1          2          4       of groups 0 to 3
    fraction 0.6: round(2.4) = 2: also in group 2. Growth prefers index 2 of each group, then 1.
    """
    weight = torch.zeros(2, 8)
    weight[0, 0], weight[0, 4], weight[1, 0], weight[1, 4] = 3, 1, 2, 4
    growth = torch.tensor([0.0, 1, 2, 0]).repeat(2, 2)
    expected = {
        0.1: [0, 0, 0, 0],
        0.3: [0, 2, 0, 0],
        0.6: [0, 2, 2, 0],
        1.0: [2, 2, 2, 2],
    }
    for fraction, places in expected.items():
        new = exchange(NM(1, 4), weight != 0, weight, growth, fraction, regrow_dropped=False)
        NM(1, 4).check(new)
        assert new.view(4, 4).int().argmax(1).tolist() == places, fraction


def test_exchange_takes_whole_rows_and_leaves_the_remainder_alone():
    weight = torch.tensor([[1.0, 1], [3, 0], [0, 0], [0, 0]])  # sums of squares 2 and 9
    growth = torch.tensor([[9.0, 9], [0, 0], [1, 1], [2, 0]])  # 2 < 4: the largest, not the most
    mask = torch.tensor([[True, True], [True, True], [False, False], [False, False]])
    new = exchange(secateur.Row(), mask, weight, growth, 0.5, regrow_dropped=False)
    assert new[:, 0].tolist() == [False, True, False, True]
    mask = torch.tensor([[True, False, True]])
    new = exchange(NM(1, 2, "dense"), mask, torch.tensor([[1.0, 0, 5]]), torch.ones(1, 3), 1, regrow_dropped=False)
    assert new.tolist() == [[False, True, True]]
    nothing_to_exchange = exchange(NM(2, 4, "dense"), mask, torch.ones(1, 3), torch.ones(1, 3), 1, regrow_dropped=False)
    assert torch.equal(nothing_to_exchange, mask)


def eight_weights():
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[8.0, -1, 6, -2, 0.5, 0.4, 0.3, 0.2]]))
    return model


def test_rigl_by_hand():
    """Half of 8 weights are kept, at first 0 to 3. fraction / 2 * (1 + cos(pi * step / 4)) of 4 move.

    step 1   0.427 -> 2    weight    8  -1   6  -2   .   .   .   .      drop 1 and 3
                           gradient  0   9   0   0   3  -7   5   1      grow 1 (it stays) and 5
    step 2   0.25  -> 1    weight    8  -1   6   .   .   0   .   .      drop 5
                           gradient  0   0   0   0   4  -1   2   3      grow 4
    step 3   0.073 -> 0
    """
    model = eight_weights()
    optimizer = sgd(model, lr=0)
    training = SparseTraining(
        model, optimizer, method=RigL(fraction=0.5, until=1.0), sparsity=0.5, steps=4, update_every=1
    )
    kept, values = [], []
    for x in ([0.0, 9, 0, 0, 3, -7, 5, 1], [0.0, 0, 0, 0, 4, -1, 2, 3], [9.0] * 8, [9.0] * 8):
        optimizer.zero_grad()
        model(torch.tensor([x])).sum().backward()
        optimizer.step()
        training.step()
        kept.append(training.masks["0"][0].nonzero().flatten().tolist())
        values.append(model[0].weight[0].tolist())
    assert kept == [[0, 1, 2, 5], [0, 1, 2, 4], [0, 1, 2, 4], [0, 1, 2, 4]]
    assert all(value == [8, -1, 6, 0, 0, 0, 0, 0] for value in values)


def test_set_by_hand():
    """fraction 0.5 of 4 kept weights: 1 and 3, the smallest, go at every update; two of the four others come."""
    seen = set()
    for seed in range(20):
        model = eight_weights()
        optimizer = sgd(model, lr=0)
        training = SparseTraining(
            model, optimizer, method=SET(fraction=0.5, until=0.5), sparsity=0.5, steps=4, update_every=1, seed=seed
        )
        masks = []
        for _ in range(4):
            model(torch.ones(1, 8)).sum().backward()
            optimizer.step()
            training.step()
            masks.append(training.masks["0"][0].nonzero().flatten().tolist())
        assert masks[0][:2] == [0, 2]
        assert set(masks[0][2:]) < {4, 5, 6, 7}
        assert masks[1:] == masks[:1] * 3  # only step 1 lies before half of 4 steps
        seen.add(tuple(masks[0]))
    assert len(seen) == 6  # all pairs of four


@pytest.mark.parametrize("method", ["set", "static", "rigl"])
def test_chance_is_seeded(method):
    method = {"set": SET(), "static": Static("random"), "rigl": RigL(initial="random")}[method]
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 5)  # the global generator takes no part
        torch.rand(3)
        state = torch.random.get_rng_state()
        torch.manual_seed(7)
        model, optimizer, training = setup(method, seed=seed)
        torch.random.set_rng_state(state)
        train(model, optimizer, training, range(8))
        assert torch.equal(torch.random.get_rng_state(), state)
        runs.append(training.masks)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


@pytest.mark.parametrize("method", ["set", "rigl"])
@pytest.mark.parametrize("pattern", ["unstructured", "unstructured,scope=row", "2:4", "1:4", "block:4x4", "row"])
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_regrown_weights_start_at_zero_without_a_past(method, pattern, kind):
    def adam(model):
        return torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)

    optimizer = sgd if kind == "sgd" else adam
    model, optimizer, training = setup(method, pattern=pattern, steps=16, optimizer=optimizer)
    count, exchanged = pruned(training), 0
    for step in range(1, 17):
        before = training.masks
        train(model, optimizer, training, [step])
        assert pruned(training) == count
        for name, mask in training.masks.items():
            training._masked.weights[name].pattern.check(mask)
            parameter = model.get_submodule(name).weight
            assert not parameter.flatten(1)[~mask].any()
            new, lasting = mask & ~before[name], mask & before[name]
            exchanged += int(new.sum())
            if step % 2 or step >= 12:
                assert not new.any()
                continue
            for key, value in optimizer.state[parameter].items():
                if key != "step":
                    assert not value.flatten(1)[new | ~mask].any(), key
                    assert value.flatten(1)[lasting].any(), key
            assert not parameter.flatten(1)[new].any()
    assert exchanged > 0


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x4", "2:4"])
def test_rigl_grows_where_the_dense_gradient_is_largest(pattern):
    model, optimizer, training = setup(RigL(fraction=0.5), pattern=pattern, steps=16)
    moves = 0
    for step in range(1, 9):
        twin = copy.deepcopy(model)
        loss_of(twin, step).backward()
        before = training.masks
        train(model, optimizer, training, [step])
        if step % 2:
            assert all(torch.equal(mask, before[name]) for name, mask in training.masks.items())
            continue
        fraction = 0.25 * (1 + math.cos(math.pi * step / 12))
        for name, mask in training.masks.items():
            old = before[name]
            gradient = twin.get_submodule(name).weight.grad.flatten(1).abs().double()
            new, gone = mask & ~old, old & ~mask
            own = training._masked.weights[name].pattern
            if pattern == "unstructured":
                moved = round(fraction * int(old.sum()))
                assert int(new.sum()) == int(gone.sum()) <= moved
            for units in reference.competitions(own, *mask.shape):
                grown = [u for u in units if new[u[0]]]
                passed_over = [u for u in units if not mask[u[0]]]
                least = min((reference.unit_score(gradient.numpy(), u) for u in grown), default=math.inf)
                most = max((reference.unit_score(gradient.numpy(), u) for u in passed_over), default=0)
                assert not grown or least >= most
        moves += sum(int((mask ^ before[name]).sum()) for name, mask in training.masks.items())
    assert moves


def test_static_mask_never_moves():
    for initial in ("magnitude", "random"):
        model = Network()
        by_magnitude = Unstructured().mask(model.body[0].weight.detach().abs(), 0.6)
        model, optimizer, training = setup(Static(initial), model)
        first = training.masks
        assert torch.equal(first["body.0"], by_magnitude) == (initial == "magnitude")
        for step in range(8):
            train(model, optimizer, training, [step])
            for name, mask in training.masks.items():
                assert torch.equal(mask, first[name])
                assert not model.get_submodule(name).weight.flatten(1)[~mask].any()


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


OPTIMIZERS = {
    "sgd": lambda model: sgd(model, nesterov=True, weight_decay=0.1),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=0.1),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.02, amsgrad=True),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.05),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.9, centered=True),
    "rprop": lambda model: torch.optim.Rprop(model.parameters(), lr=0.01),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = lambda model: torch.optim.Muon(model.parameters(), lr=0.05)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
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
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
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


@pytest.mark.parametrize("method", METHODS)
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
        other = {"method": {"gate": Gate(freeze=0.7), "sr-ste": SRSTE(0.1), "set": SET(0.2)}.get(method, "set")}
        if method == "set":
            assert other["method"] != SET()
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


# Errors


def snapshot(model, optimizer):
    modules = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    parameters = {name: (id(p), bool(p._backward_hooks)) for name, p in model.named_parameters()}
    return modules, parameters, {k: v.clone() for k, v in model.state_dict().items()}, str(optimizer.state_dict())


def assert_unchanged(model, optimizer, before):
    after = snapshot(model, optimizer)
    assert after[:2] == before[:2]
    assert after[2].keys() == before[2].keys()
    assert all(torch.equal(tensor, before[2][name]) for name, tensor in after[2].items())
    assert after[3] == before[3]


@pytest.mark.parametrize("method", METHODS)
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
def test_wrong_settings_leave_the_model_as_it_was(method, keywords, error, message):
    model = Network()
    optimizer = sgd(model)
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message):
        SparseTraining(model, optimizer, **({"method": method, "sparsity": 0.6, "steps": 8} | keywords))
    assert_unchanged(model, optimizer, before)


@pytest.mark.parametrize("method", ["set", "rigl", "static"])
@pytest.mark.parametrize("schedule", ["linear", "cubic", Cubic(0.6, 0, 4), OneShot(0.6, at=1)], ids=str)
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
    model.body[2].weight.requires_grad_(False)
    refuse(model, sgd(model), RecipeError, r"body.2: its weight takes no gradient.* Exclude the layer")
    SparseTraining(model, sgd(model), method=method, sparsity=0.6, steps=8, exclude=["body.2"])
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
        (True, r"stem: rigl needs its gradient after step 2, but there is none\.\nCall step\(\) before"),
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


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Gate(temperature=(60, 4)), RecipeError, "temperature must rise .* got 60 and 4"),
        (lambda: Gate(temperature=(0, 4)), RecipeError, "temperature must rise"),
        (lambda: Gate(temperature=(4, math.inf)), RecipeError, "temperature must rise"),
        (lambda: Gate(temperature=4), TypeError, "temperature must be two numbers, got 4"),
        (lambda: Gate(ramp=(0.5, 0.2)), RecipeError, "in order; got 0.5, 0.2 and 0.8"),
        (lambda: Gate(ramp=(0.1, 0.9)), RecipeError, "in order; got 0.1, 0.9 and 0.8"),
        (lambda: Gate(freeze=1.5), RecipeError, "in order"),
        (lambda: Gate(freeze=math.nan), RecipeError, "freeze must be a number, got NaN"),
        (lambda: SRSTE(decay=-1), RecipeError, "decay is a part of a whole, between 0 and 1, got -1"),
        (lambda: SRSTE(freeze="end"), TypeError, "freeze must be a number, got str"),
        (lambda: GradualMagnitude((0.9, 0.1)), RecipeError, "in order; got 0.9 and 0.1"),
        (lambda: GradualMagnitude((0.0, True)), TypeError, "ramp must be a number, got bool"),
        (lambda: SET(fraction=2), RecipeError, "fraction is a part of a whole, between 0 and 1, got 2"),
        (lambda: RigL(until=-0.5), RecipeError, "until is a part of a whole"),
        (lambda: Static("ones"), RecipeError, "unknown initial mask 'ones'. Valid are magnitude, random"),
    ],
)
def test_wrong_settings_of_methods(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_methods_are_values():
    methods: list[Method] = [Gate(), SRSTE(), GradualMagnitude(), Static(), SET(), RigL()]
    assert {method.name for method in methods} == set(METHODS)
    for method in methods:
        assert type(method)() == method
        assert copy.deepcopy(method) == method
        assert eval(repr(method), vars(secateur.training)) == method
        assert json.loads(json.dumps(method.to_dict())) == method.to_dict()
    assert Gate(temperature=[4, 60]) == Gate()
    with pytest.raises(AttributeError):
        methods[0].freeze = 0.5
