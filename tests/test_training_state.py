"""States of trainings that are not what ``state_dict`` returned: refused before anything is replaced, or as good."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training_cases import LEARNED, METHODS, Network, setup, sgd, train

from secateur import FormatError, LotteryTicket, RecipeError, SparseTraining
from secateur.integrations._shared import STATE_FILE, read_state, restore, write_state

WRONG = {
    "none": None,
    "negative": -1,
    "bool": True,
    "huge": 10**400,
    "nan": math.nan,
    "text": "x",
    "list": [1, 2],
    "table": {"a": 1},
    "object": SimpleNamespace(),
    "tensor": torch.ones(2, 3),
    "flags": torch.ones(2, 3, dtype=torch.bool),
    "on meta": torch.empty(16, 72, dtype=torch.bool, device="meta"),
    "sparse": torch.eye(3).to_sparse(),
}


def half_way(method, steps=3):
    torch.manual_seed(0)
    model, optimizer, training = setup(method)
    train(model, optimizer, training, range(steps))
    return model, optimizer, training


def places(value, path=()):
    """Every place in nested mappings."""
    if not isinstance(value, dict):
        return [path]
    return [path] * bool(path) + [found for key, part in value.items() for found in places(part, (*path, key))]


def put(state, path, value):
    for key in path[:-1]:
        state = state[key]
    state[path[-1]] = value


def drop(state, path):
    for key in path[:-1]:
        state = state[key]
    del state[path[-1]]


def same(a, b):
    """Whether two states or parts of them are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        usable = all(tensor.layout == torch.strided and not tensor.is_meta for tensor in (a, b))
        return usable and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)


def refused_or_as_good(model, optimizer, training, state):
    """Load a state. If it is refused nothing changes; else the training goes on to its end. Return the error."""
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), training.state_dict()))
    refused = None
    try:
        training.load_state_dict(state)
    except (RecipeError, FormatError) as error:
        refused = error
    if refused is not None:
        assert same(dict(model.state_dict()), dict(before[0]))
        assert same(training.state_dict(), before[2])
        assert len(str(refused)) < 1000
        return refused
    train(model, optimizer, training, range(training.step_count, 8))
    training.finalize()
    return None


@pytest.mark.parametrize("method", METHODS)
def test_a_state_that_lacks_anything_is_refused(method):
    state = half_way(method)[2].state_dict()
    model, optimizer, training = half_way(method, 1)
    for path in places(state):
        broken = copy.deepcopy(state)
        drop(broken, path)
        error = refused_or_as_good(model, optimizer, training, broken)
        assert error is not None, path
        assert isinstance(error, RecipeError if path[0] in ("version", "recipe") or path[1:] in FIRST else FormatError)
    assert refused_or_as_good(model, optimizer, training, state) is None


FIRST = [("stem",), ("body.0",), ("body.2",)]  # without its entry a state is that of another model


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("method", ["gate", "rigl"])  # one that learns, and one that masks
def test_a_state_with_anything_wrong_is_refused(method, wrong):
    state = half_way(method)[2].state_dict()
    model, optimizer, training = half_way(method, 1)
    harmless = {("none", "mask"), ("bool", "straight_through"), ("bool", "freeze")}  # True is 1.0, and no mask is one
    for path in places(state):
        if path[1:2] in (("stem",), ("body.2",)) or (wrong, path[-1]) in harmless:
            continue
        broken = copy.deepcopy(state)
        put(broken, path, WRONG[wrong])
        if not same(broken, state):
            assert refused_or_as_good(model, optimizer, training, broken) is not None, path


@pytest.mark.parametrize("method", METHODS)
def test_what_is_wrong_with_a_layer_is_named(method):
    model, optimizer, training = half_way(method, 5)
    state = training.state_dict()
    entry = state["weights"]["body.0"]
    mask = torch.ones(16, 72, dtype=torch.bool)
    cases = [
        ("mask", mask.float(), FormatError, r"body.0: the mask is not a bool tensor of shape \(16, 72\), but float32"),
        ("mask", mask.T, FormatError, r"body.0: the mask is not a bool tensor of shape .* but bool \[72, 16\]"),
        ("mask", mask.to_sparse(), FormatError, "body.0: the mask is not a bool tensor with values"),
        ("shape", [72, 16], RecipeError, r"body.0: the state is of a weight of shape \(72, 16\), but this one has"),
        ("shape", [16.0, 72], FormatError, "body.0: the shape should be a list of sizes"),
    ]
    if method in LEARNED:
        threshold = entry["threshold"]
        cases += [
            (
                "threshold",
                torch.full_like(threshold, math.nan),
                FormatError,
                "body.0: the threshold is NaN at 1 places",
            ),
            ("threshold", threshold.long(), FormatError, "body.0: the threshold is not a floating-point tensor"),
            (
                "threshold",
                threshold.expand(3, 1),
                FormatError,
                r"threshold is not .* of shape \(1, 1\), but .* \[3, 1\]",
            ),
            ("temperature", math.nan, FormatError, "body.0: the temperature should be a number above 0, got nan"),
            ("temperature", -1.0, FormatError, "temperature should be a number above 0, got -1"),
            ("temperature", math.inf, FormatError, "temperature should be a number above 0, got inf"),
            ("straight_through", 1, FormatError, "straight_through should be a bool, got 1"),
        ]
    for key, value, error, match in cases:
        broken = copy.deepcopy(state)
        broken["weights"]["body.0"][key] = value
        found = refused_or_as_good(model, optimizer, training, broken)
        with pytest.raises(error, match=match):
            raise found
    for change, error, match in (
        ({"step": -1}, FormatError, "the step should be an int of at least 0 and of 64 bits, got -1"),
        ({"step": True}, FormatError, "the step should be an int of at least 0 and of 64 bits, got True"),
        ({"step": 2.0}, FormatError, "the step should be an int of at least 0 and of 64 bits, got 2.0"),
        ({"generator": torch.zeros(3, dtype=torch.uint8)}, FormatError, "the state of the generator is not one"),
        ({"version": True}, RecipeError, "not the state of a SparseTraining"),
        ({"weights": state["weights"] | {"more": entry}}, RecipeError, "holds the layers stem, body.0, body.2, more"),
        ({"recipe": state["recipe"] | {"sparsity": 0.7}}, RecipeError, "sparsity: saved 0.7, here 0.6"),
    ):
        with pytest.raises(error, match=match):
            raise refused_or_as_good(model, optimizer, training, state | change)


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_that_breaks_its_pattern_is_refused(method):
    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
        optimizer = sgd(model)
        return SparseTraining(model, optimizer, method=method, pattern="2:4", steps=8)

    training, other = made(), made()
    state = training.state_dict()
    good = torch.tensor([True, True, False, False] * 4).expand(8, 16).clone()
    state["weights"]["0"]["mask"] = good
    other.load_state_dict(state)
    assert torch.equal(other.masks["0"], good)
    state["weights"]["0"]["mask"] = (
        good.roll(1, 0).index_fill(1, torch.tensor([2]), True).index_fill(0, torch.tensor([0]), False)
    )
    with pytest.raises(FormatError, match="0: the mask breaks the pattern 2:4: "):
        other.load_state_dict(state)
    assert torch.equal(other.masks["0"], good)


@pytest.mark.parametrize(("method", "another"), [("gate", "magnitude"), ("magnitude", "sr-ste"), ("rigl", "set")])
def test_the_state_of_another_method_is_refused(method, another):
    state = half_way(another)[2].state_dict()
    with pytest.raises(RecipeError, match=f"method: saved .*'{another}'"):
        raise refused_or_as_good(*half_way(method, 1), state)


@pytest.mark.parametrize("method", ["gate", "rigl"])
def test_callbacks_say_where_a_wrong_state_is_from(tmp_path, method):
    training = half_way(method)[2]
    state = training.state_dict()
    state["weights"]["body.0"]["mask"] = torch.ones(2, 2, dtype=torch.bool)
    write_state(tmp_path / STATE_FILE, state)
    before = training.state_dict()
    for source in ("", "somewhere"):
        with pytest.raises(
            FormatError, match=f"{source or 'the checkpoint'}: body.0: the mask is not a bool tensor of"
        ):
            restore(training, read_state(tmp_path / STATE_FILE), source=source)
    assert same(training.state_dict(), before)


def test_the_state_of_a_ticket_is_checked_before_anything_is_replaced():
    def made():
        torch.manual_seed(0)
        model = Network()
        ticket = LotteryTicket(model, sgd(model))
        ticket.snapshot()
        ticket.prune(0.5)
        return ticket

    ticket, state = made(), made().state_dict()
    before = ticket.masks
    inside = ("plan", "tensors", "optimizer")  # plain values for the report, and what the optimizer checks itself
    for path in places(state):
        if any(key in inside for key in path[:-1]):
            continue
        for wrong in (SimpleNamespace(), -1, [torch.ones(2)], torch.ones(2, 2), {"a": SimpleNamespace()}, "left out"):
            broken = copy.deepcopy(state)
            put(broken, path, wrong) if not isinstance(wrong, str) else drop(broken, path)
            if path != ("asked",) or not isinstance(wrong, int):
                with pytest.raises((RecipeError, FormatError)):
                    ticket.load_state_dict(broken)
        assert all(torch.equal(mask, before[name]) for name, mask in ticket.masks.items())
    ticket.load_state_dict(state)
    assert all(torch.equal(mask, before[name]) for name, mask in ticket.masks.items())
