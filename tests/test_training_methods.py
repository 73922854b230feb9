"""The training methods, by hand and against the slow truth."""

import copy
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from torch import nn
from training_cases import (
    METHODS,
    Network,
    loss_of,
    pruned,
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
    Unstructured,
    sparsify_,
)
from secateur.schedules import Linear
from secateur.training import SET, SRSTE, Gate, GradualMagnitude, RigL, Static, exchange


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
@pytest.mark.parametrize(
    ("pattern", "kind"),
    [(pattern, "adam") for pattern in ("unstructured", "unstructured,scope=row", "2:4", "block:4x4", "row")]
    + [("1:4", "sgd")],
)
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


# Settings


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
    methods = [method() for method in secateur.training.METHODS.values()]
    for method in methods:
        assert type(method)() == method
        assert copy.deepcopy(method) == method
        assert eval(repr(method), {type(method).__name__: type(method)}) == method
        assert json.loads(json.dumps(method.to_dict())) == method.to_dict()
    assert Gate(temperature=[4, 60]) == Gate()
    with pytest.raises(AttributeError):
        methods[0].freeze = 0.5


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_in_the_guide(method):
    guide = Path(__file__).parents[1] / "docs" / "training.md"
    rows = [line for line in guide.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{method}`")]
    assert len(rows) == 1
