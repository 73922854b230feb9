import copy
import itertools
import math

import numpy as np
import pytest
import reference
import torch
from test_distributed import a_batch, a_model, on_two_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import secateur
from secateur import NM, Block, Column, LotteryTicket, PatternError, RecipeError, Report, Row, Unstructured

GLOBAL = [Unstructured(), Block(2, 2), Block(2, 4, remainder="dense"), Row(), Column()]
LAYER = [*GLOBAL, Unstructured("layer"), Unstructured("row")]
OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, amsgrad=True),
    "lbfgs": lambda ps: torch.optim.LBFGS(ps, lr=0.1, max_iter=3),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Net(nn.Module):
    """A convolution, a norm with buffers, and two linear layers of different sizes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 2)
        self.norm = nn.BatchNorm2d(6)
        self.wide = nn.Linear(24, 8)
        self.small = nn.Linear(8, 4)

    def forward(self, x):
        return self.small(self.wide(self.norm(self.conv(x)).relu().flatten(1)).relu())


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 2, 3, 3, generator=generator), torch.randn(16, 4, generator=generator)


def one_step(model, optimizer, step, ticket=None, scheduler=None):
    def closure():
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    if ticket is not None:
        ticket.step()
    if scheduler is not None:
        scheduler.step()


def make(kind="sgd", pattern="unstructured", **keywords):
    model = Net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5], gamma=0.5)
    return (
        model,
        optimizer,
        scheduler,
        LotteryTicket(model, optimizer, scheduler=scheduler, pattern=pattern, **keywords),
    )


def everything(model, optimizer, scheduler):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))


def assert_identical(one, other):
    """The same structure, and the same bits in every tensor."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_identical(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_identical(a, b)
    else:
        assert one == other


def matrices(model):
    return {
        name: getattr(model, name).weight.detach().flatten(1).double().numpy() for name in ("conv", "wide", "small")
    }


def fitted(pattern, name):
    return Column(4) if pattern == Column() and name == "conv" else pattern


def true_global_masks(weights, pattern, sparsity, before):
    """All units of all layers in one list, sorted by whether they are pruned already and by root mean square."""
    units = [
        (name, unit)
        for name, weight in weights.items()
        for unit in reference.competitions(fitted(pattern, name), *weight.shape)[0]
    ]

    def score(name, unit):
        if not before[name][unit[0]]:
            return -1.0
        return math.sqrt(math.fsum(float(weights[name][place]) ** 2 for place in unit) / len(unit))

    survivors = reference.best([score(*entry) for entry in units], len(units) - round(sparsity * len(units)))
    masks = {name: np.ones(weight.shape, dtype=bool) for name, weight in weights.items()}
    for index, (name, unit) in enumerate(units):
        for place in unit:
            masks[name][place] = index in survivors
    return masks


def as_arrays(masks):
    return {name: mask.numpy() for name, mask in masks.items()}


def assert_same_masks(masks, expected):
    assert masks.keys() == expected.keys()
    for name, mask in masks.items():
        np.testing.assert_array_equal(mask.numpy(), expected[name], err_msg=name)


# By hand


def test_a_worked_example():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    weight = model[0].weight
    weight.data.copy_(torch.tensor([[1.0, -0.5]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)
    ticket = LotteryTicket(model, optimizer)

    def step(gradient):
        weight.grad = None
        (weight * torch.tensor([gradient])).sum().backward()
        optimizer.step()
        ticket.step()

    step([2.0, 0.0])  # momentum 2, 0
    assert weight.tolist() == [[0.5, -0.5]]
    ticket.snapshot(step=1)
    optimizer.param_groups[0]["lr"] = 0.5
    step([0.0, 4.0])  # momentum 1, 4
    assert weight.tolist() == [[0.0, -2.5]]
    ticket.prune(0.5)
    assert ticket.rewind_with_mask() == 1
    assert weight.tolist() == [[0.0, -0.5]]
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [[0.0, 0.0]]  # 2, 0 at the snapshot; one is pruned
    step([8.0, 4.0])  # momentum 0, 4; the learning rate is 0.25 again
    assert weight.tolist() == [[0.0, -1.5]]
    assert ticket.rewind() == 1
    assert weight.tolist() == [[0.5, -0.5]]
    step([0.0, 0.0])  # momentum 1, 0: that of the snapshot is back, also where it was pruned
    assert weight.tolist() == [[0.25, -0.5]]


def test_units_of_different_sizes_compare_by_root_mean_square():
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 2, bias=False))
    model[0].weight.data.fill_(1.0)  # norm 2, root mean square 1
    model[1].weight.data.copy_(torch.tensor([[1.5], [0.9]]))
    ticket = LotteryTicket(model, torch.optim.SGD(model.parameters(), lr=0.1), pattern="row")
    assert {n: m[:, 0].tolist() for n, m in ticket.prune(1 / 3).items()} == {"0": [True], "1": [True, False]}
    assert {n: m[:, 0].tolist() for n, m in ticket.prune(2 / 3).items()} == {"0": [False], "1": [True, False]}


# Masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("pattern", GLOBAL, ids=str)
def test_global_masks_are_those_of_one_sorted_list(pattern, dtype):
    model = Net().to(dtype)
    ticket = LotteryTicket(model, torch.optim.SGD(model.parameters(), lr=0.1), pattern=pattern)
    before = as_arrays(ticket.masks)
    for sparsity in (0.0, 0.21, 0.21, 0.55, 0.9, 1.0):
        expected = true_global_masks(matrices(model), pattern, sparsity, before)
        masks = ticket.prune(sparsity)
        assert_same_masks(masks, expected)
        for name, weight in matrices(model).items():
            assert (weight[~expected[name]] == 0).all()
            assert not (before[name] < expected[name]).any()
        before = expected
        with torch.no_grad():  # training moves them, pruned ones too
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("pattern", LAYER, ids=str)
def test_layer_masks_are_exact_and_never_bring_weights_back(pattern):
    model = Net()
    ticket = LotteryTicket(model, torch.optim.SGD(model.parameters(), lr=0.1), pattern=pattern)
    before = as_arrays(ticket.masks)
    for sparsity in (0.3, 0.75, 1.0):
        expected = {
            name: reference.mask(fitted(pattern, name), np.where(before[name], abs(weight), -1), sparsity)
            for name, weight in matrices(model).items()
        }
        assert_same_masks(ticket.prune(sparsity, scope="layer"), expected)
        assert not any((before[name] < expected[name]).any() for name in expected)
        before = expected
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))


def test_nm_prunes_on_the_way_and_then_exactly():
    model = Net()
    ticket = LotteryTicket(model, torch.optim.SGD(model.parameters(), lr=0.1), pattern="2:4")
    first = ticket.prune(0.25)
    assert all((mask.view(-1, 4).sum(1) == 3).all() for mask in first.values())
    second = ticket.prune()
    for name, mask in second.items():
        NM(2, 4).check(mask)
        assert not (mask & ~first[name]).any()
    with pytest.raises(PatternError, match=r"2:4 fixes the sparsity at 0.5, but 0.6"):
        ticket.prune(0.6)


def test_equal_weights_go_last_first():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for layer in model:
        layer.weight.data.fill_(0.0)
    ticket = LotteryTicket(model, torch.optim.SGD(model.parameters(), lr=0.1))
    masks = ticket.prune(0.375)
    assert masks["0"].all()
    assert masks["1"].flatten().tolist() == [True, False, False, False]
    assert ticket.sparsity == 0.375


def test_a_shared_weight_has_one_mask():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    ticket = LotteryTicket(model, torch.optim.SGD(model.parameters(), lr=0.1))
    ticket.snapshot()
    ticket.prune(0.5)
    report = ticket.finalize()
    assert [(layer.name, layer.tied_to) for layer in report.layers] == [("0", ("2",)), ("3", ())]
    assert report.num_pruned == 16


def test_a_bare_layer_has_a_ticket_too():
    layer = nn.Linear(4, 4)
    ticket = LotteryTicket(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    ticket.snapshot()
    assert int(ticket.prune(0.5)[""].sum()) == 8
    ticket.rewind_with_mask()
    assert int((layer.weight == 0).sum()) == 8


# Rewinding


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_rewind_brings_every_bit_back_in_place(kind):
    model, optimizer, scheduler, ticket = make(kind)
    objects = {name: id(tensor) for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())}
    for step in range(2):
        one_step(model, optimizer, step, ticket, scheduler)
    ticket.snapshot(2)
    at_snapshot = everything(model, optimizer, scheduler)
    for step in range(2, 6):
        one_step(model, optimizer, step, ticket, scheduler)
    at_end = everything(model, optimizer, scheduler)
    assert at_end[1]["param_groups"][0]["lr"] != at_snapshot[1]["param_groups"][0]["lr"]
    for _ in range(2):  # twice, so that the snapshot must have survived the training in between
        ticket.prune(0.8)
        assert ticket.rewind() == 2
        assert ticket.sparsity == 0
        assert_identical(everything(model, optimizer, scheduler), at_snapshot)
        assert all(parameter.grad is None for parameter in model.parameters())
        for step in range(2, 6):
            one_step(model, optimizer, step, ticket, scheduler)
        assert_identical(everything(model, optimizer, scheduler), at_end)
    now = itertools.chain(model.named_parameters(), model.named_buffers())
    assert {name: id(tensor) for name, tensor in now} == objects


def test_a_snapshot_before_the_first_step_holds_no_momentum():
    model, optimizer, scheduler, ticket = make("adamw")
    ticket.snapshot()
    one_step(model, optimizer, 0, ticket, scheduler)
    assert optimizer.state
    ticket.rewind()
    assert not optimizer.state
    one_step(model, optimizer, 0, ticket, scheduler)


class InPlace:
    """A schedule that keeps, and changes, the very objects that it is given."""

    def __init__(self):
        self.state = {"rates": [1.0]}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_a_scheduler_that_changes_its_state_in_place_is_rewound():
    model, scheduler = Net(), InPlace()
    ticket = LotteryTicket(model, torch.optim.SGD(model.parameters(), lr=0.1), scheduler=scheduler)
    ticket.snapshot()
    for _ in range(2):
        scheduler.state["rates"].append(0.5)
        ticket.rewind()
        assert scheduler.state == {"rates": [1.0]}


def test_a_later_snapshot_replaces_the_first():
    model, optimizer, scheduler, ticket = make()
    ticket.snapshot(0)
    one_step(model, optimizer, 0, ticket, scheduler)
    ticket.snapshot(1)
    after = everything(model, optimizer, scheduler)
    one_step(model, optimizer, 1, ticket, scheduler)
    assert ticket.rewind() == 1
    assert_identical(everything(model, optimizer, scheduler), after)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_rewind_with_masks_is_the_snapshot_times_the_masks(kind):
    model, optimizer, scheduler, ticket = make(kind)
    for step in range(2):
        one_step(model, optimizer, step, ticket, scheduler)
    ticket.snapshot(2)
    weights, moments, _ = everything(model, optimizer, scheduler)
    for step in range(2, 4):
        one_step(model, optimizer, step, ticket, scheduler)
    masks = ticket.prune(0.7)
    assert ticket.rewind_with_mask() == 2
    assert_same_masks(ticket.masks, as_arrays(masks))
    for index, (name, parameter) in enumerate(model.named_parameters()):
        layer = name.removesuffix(".weight")
        mask = masks[layer].view_as(parameter) if layer in masks else torch.ones_like(parameter, dtype=torch.bool)
        torch.testing.assert_close(parameter.data, weights[name] * mask, rtol=0, atol=0)
        for key, value in optimizer.state[parameter].items():
            saved = moments["state"][index][key]
            expected = saved * mask if saved.shape == parameter.shape else saved
            torch.testing.assert_close(value, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_pruned_weights_stay_zero_and_clipping_does_not_see_them(kind):
    model, optimizer, scheduler, ticket = make(kind)
    ticket.snapshot()
    masks = ticket.prune(0.6)
    for step in range(4):
        one_step(model, optimizer, step, ticket, scheduler)
        for name, mask in masks.items():
            parameter = getattr(model, name).weight
            assert not parameter.flatten(1)[~mask].any()
            assert not parameter.grad.flatten(1)[~mask].any()
            assert parameter.flatten(1)[mask].all()
    ticket.rewind()
    one_step(model, optimizer, 0, ticket, scheduler)
    assert all(getattr(model, name).weight.grad.flatten(1)[~mask].any() for name, mask in masks.items())


def test_step_brings_back_the_zeros_that_something_else_moved():
    model, _, _, ticket = make()
    mask = ticket.prune(0.5)["wide"]
    with torch.no_grad():
        model.wide.weight.add_(1)
    ticket.step()
    assert torch.equal(model.wide.weight != 0, mask)


def test_learning_rate_rewinding_keeps_weights_and_masks():
    model, optimizer, scheduler, ticket = make()
    one_step(model, optimizer, 0, ticket, scheduler)
    ticket.snapshot(1)
    _, moments, schedule = everything(model, optimizer, scheduler)
    for step in range(1, 5):
        one_step(model, optimizer, step, ticket, scheduler)
    masks = ticket.prune(0.5)
    weights = copy.deepcopy(model.state_dict())
    assert ticket.rewind(weights=False) == 1
    assert_identical(copy.deepcopy(model.state_dict()), weights)
    assert_same_masks(ticket.masks, as_arrays(masks))
    assert_identical(scheduler.state_dict(), schedule)
    assert optimizer.param_groups[0]["lr"] == moments["param_groups"][0]["lr"]
    momentum = optimizer.state[model.wide.weight]["momentum_buffer"]
    index = [name for name, _ in model.named_parameters()].index("wide.weight")
    assert torch.equal(momentum, moments["state"][index]["momentum_buffer"] * masks["wide"])


def test_masks_of_one_ticket_serve_another():
    _, _, _, donor = make()
    masks = donor.prune(0.5)
    model, _, _, ticket = make()
    ticket.snapshot(3)
    before = model.small.weight.detach().clone()
    assert ticket.rewind_with_mask({name: masks[name] for name in ("conv", "wide")}) == 3
    assert torch.equal(model.small.weight, before)
    assert torch.equal(model.wide.weight != 0, masks["wide"])
    masks["wide"].fill_(True)  # a copy was taken
    assert not ticket.masks["wide"].all()
    assert ticket.rewind_with_mask({}) == 3
    assert ticket.sparsity == 0


# The search


def searching(rounds=3, sparsity=0.9, pattern="unstructured", save=None, log=None, stop=None, **keywords):
    """A search after two steps of training, with what its trainings began with in ``log``."""
    torch.manual_seed(0)
    model, optimizer, scheduler, ticket = make(pattern=pattern)
    for step in range(2):
        one_step(model, optimizer, step, ticket, scheduler)
    ticket.snapshot(2)

    def train(ticket, start):
        if save is not None:
            save.append((*everything(model, optimizer, scheduler), copy.deepcopy(ticket.state_dict())))
        if log is not None:
            log.append((start, ticket.sparsity, optimizer.param_groups[0]["lr"], copy.deepcopy(model.state_dict())))
        for step in range(start, 6):
            if stop is not None and (len(save), step) == stop:
                raise KeyboardInterrupt
            one_step(model, optimizer, step, ticket, scheduler)

    return model, optimizer, scheduler, ticket, train, {"sparsity": sparsity, "rounds": rounds, **keywords}


def test_a_search_end_to_end():
    log = []
    model, optimizer, scheduler, ticket, train, how = searching(log=log)
    start = copy.deepcopy(model.state_dict())
    one_step(model, optimizer, 77, ticket, scheduler)  # whatever happened since the snapshot
    report = ticket.search(train, **how)
    total = sum(weight.size for weight in matrices(model).values())
    counts = [0, *(round((1 - 0.1 ** (r / 3)) * total) for r in (1, 2)), round(0.9 * total)]
    assert [round(sparsity * total) for _, sparsity, _, _ in log] == counts
    assert [(begin, rate) for begin, _, rate, _ in log] == [(2, 0.1)] * 4
    pruned = torch.zeros_like(start["wide.weight"], dtype=torch.bool)
    for _, _, _, state in log:
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, torch.where(tensor == 0, 0, start[name]), rtol=0, atol=0)
        assert not (pruned & (state["wide.weight"] != 0)).any()
        pruned = state["wide.weight"] == 0
    assert isinstance(report, Report)
    assert report.num_pruned == counts[-1] == sum(int((weight == 0).sum()) for weight in matrices(model).values())
    assert report.num_weights == total
    assert report.recipe == {
        "method": {"name": "lottery", "scope": "global", "rounds": 3, "rewind": "weights", "step": 2},
        "pattern": "unstructured",
        "sparsity": 0.9,
    }
    assert Report.from_json(report.to_json()) == report
    assert [skip.name for skip in report.skipped] == ["norm"]
    assert not torch.equal(model.wide.weight, start["wide.weight"] * ticket.masks["wide"])  # and it was trained


def test_a_ticket_learns_what_its_size_allows():
    """A task of three inputs in twelve: at 90 % the ticket must fit it, where a random mask at 90 % does not."""
    truth = torch.zeros(2, 12)
    truth[0, 1], truth[1, 4], truth[1, 9] = 2.0, -1.0, 1.5

    def loss_of(model, step):
        x = torch.randn(64, 12, generator=torch.Generator().manual_seed(step))
        return nn.functional.mse_loss(model(x), x @ truth.T)

    model = nn.Sequential(nn.Linear(12, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    ticket = LotteryTicket(model, optimizer)
    ticket.snapshot()

    def train(ticket, start):
        for step in range(start, 60):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
            ticket.step()

    ticket.search(train, sparsity=0.875, rounds=2)
    assert ticket.masks["0"].nonzero().tolist() == [[0, 1], [1, 4], [1, 9]]
    assert loss_of(model, 99) < 1e-3
    torch.testing.assert_close(model[0].weight.data, truth, rtol=0, atol=0.02)


@pytest.mark.parametrize("rewind", ["learning-rate", "nothing"])
def test_a_search_that_keeps_weights(rewind):
    log, ends = [], []
    model, optimizer, _, ticket, train, how = searching(log=log, rewind=rewind)

    def train_and_note(ticket, start):
        train(ticket, start)
        ends.append((copy.deepcopy(model.state_dict()), optimizer.param_groups[0]["lr"]))

    start = copy.deepcopy(model.state_dict())
    one_step(model, optimizer, 77, ticket)  # whatever happened since the snapshot
    ticket.search(train_and_note, **how)
    assert [begin for begin, *_ in log] == [2] * 4
    assert_identical(log[0][-1], start)
    for (_, _, rate, began), (ended, last_rate) in zip(log[1:], ends, strict=False):
        for name, tensor in began.items():
            torch.testing.assert_close(tensor, torch.where(tensor == 0, 0, ended[name]), rtol=0, atol=0)
        assert rate == (0.1 if rewind == "learning-rate" else last_rate)
        assert last_rate < 0.1


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("pattern", [Unstructured(), Row(), Block(2, 2)], ids=str)
def test_a_search_is_exact_under_patterns_and_scopes(pattern, scope):
    model, _, _, ticket, train, how = searching(pattern=pattern, scope=scope, sparsity=0.6, rounds=2)
    report = ticket.search(train, **how)
    units = {
        name: len(reference.competitions(fitted(pattern, name), *weight.shape)[0])
        for name, weight in matrices(model).items()
    }
    pruned = {}
    for layer in report.layers:
        mask = ticket.masks[layer.name]
        fitted(pattern, layer.name).check(mask)
        pruned[layer.name] = int((~mask).sum()) * units[layer.name] // mask.numel()
        assert layer.zeros == layer.pruned == int((~mask).sum())
    if scope == "global":
        assert sum(pruned.values()) == round(0.6 * sum(units.values()))
    else:
        assert pruned == {name: round(0.6 * count) for name, count in units.items()}


def test_a_search_under_nm_leaves_out_the_rounds_that_prune_nothing():
    log = []
    _, _, _, ticket, train, how = searching(pattern="2:4", sparsity=None, rounds=5, log=log)
    report = ticket.search(train, **how)
    assert [sparsity for _, sparsity, *_ in log] == [0.0, 0.25, 0.5]
    assert report.sparsity == 0.5
    assert {layer.pattern for layer in report.layers} == {"2:4"}


@pytest.mark.parametrize("rewind", ["weights", "learning-rate"])
@pytest.mark.parametrize("at", [(1, 4), (3, 2), (4, 5)], ids=str)
def test_an_interrupted_search_resumed_is_the_uninterrupted_one(rewind, at, tmp_path):
    model, optimizer, scheduler, ticket, train, how = searching(rewind=rewind)
    report = ticket.search(train, **how)
    expected, masks = everything(model, optimizer, scheduler), as_arrays(ticket.masks)

    saves = []
    *_, ticket, train, how = searching(rewind=rewind, save=saves, stop=at)
    with pytest.raises(KeyboardInterrupt):
        ticket.search(train, **how)
    torch.save(saves[-1], tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)

    model, optimizer, scheduler, ticket, train, how = searching(rewind=rewind)
    one_step(model, optimizer, 50, ticket, scheduler)
    for target, state in zip((model, optimizer, scheduler, ticket), saved, strict=True):
        target.load_state_dict(state)
    resumed = ticket.search(train, **how)
    assert_identical(everything(model, optimizer, scheduler), expected)
    assert_same_masks(ticket.masks, masks)
    assert [layer.pruned for layer in resumed.layers] == [layer.pruned for layer in report.layers]
    assert resumed.recipe == report.recipe


def test_a_search_goes_on_to_a_higher_sparsity():
    log = []
    _, _, _, ticket, train, how = searching(log=log, rounds=1, sparsity=0.5)
    ticket.search(train, **how)
    log.clear()
    report = ticket.search(train, sparsity=0.75, rounds=2)  # its first round, 50 %, is done
    assert [sparsity for _, sparsity, *_ in log] == [0.5, 0.75]
    assert report.sparsity == 0.75


def test_nothing_left_of_a_layer_is_noted():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.data.fill_(0.1)
    ticket = LotteryTicket(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model[1].weight.data.fill_(1.0)
    ticket.prune(0.5)
    first, second = ticket.finalize().layers
    assert "nothing of it is kept" in first.notes[0]
    assert not second.notes


# The end


def hooks_on(model):
    return [name for name, parameter in model.named_parameters() if parameter._backward_hooks]


def test_finalize_leaves_a_plain_model():
    model, optimizer, scheduler, ticket = make(pattern="2:4")
    ticket.snapshot()
    ticket.prune(0.25)
    with torch.no_grad():
        model.wide.weight.add_(1)  # and the loop forgot its last step()
    report = ticket.finalize()
    assert int((model.wide.weight == 0).sum()) == report.layers[1].pruned == 48
    assert report.layers[1].pattern == "3:4"
    assert report.layers[1].notes == ("on the way to 2:4",)
    assert ticket.finalize() is report
    assert not hooks_on(model)
    one_step(model, optimizer, 0, None, scheduler)
    assert (model.wide.weight != 0).all()
    for call in (ticket.snapshot, ticket.rewind, ticket.rewind_with_mask, ticket.step, ticket.prune):
        with pytest.raises(RecipeError, match="is finalized"):
            call()
    with pytest.raises(RecipeError, match="is finalized"):
        ticket.load_state_dict({})


def test_a_copy_of_the_model_is_free():
    model, _, _, ticket = make()
    ticket.prune(0.5)
    assert hooks_on(model) == ["conv.weight", "wide.weight", "small.weight"]
    twin = copy.deepcopy(model)
    assert not hooks_on(twin)
    x, y = batch(0)
    nn.functional.mse_loss(twin(x), y).backward()
    assert (twin.wide.weight.grad.flatten(1)[~ticket.masks["wide"]] != 0).any()


def test_a_ticket_that_pruned_nothing_reports_that():
    _, _, _, ticket = make()
    report = ticket.finalize()
    assert report.num_pruned == 0
    assert all(layer.asked == layer.sparsity == 0 for layer in report.layers)


# Errors


def ticket_of(model, **keywords):
    return LotteryTicket(model, torch.optim.SGD(model.parameters(), lr=0.1), **keywords)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda t: t.rewind(), RecipeError, "no snapshot"),
        (lambda t: t.rewind(weights=False), RecipeError, "no snapshot"),
        (lambda t: t.rewind_with_mask(), RecipeError, "no snapshot"),
        (lambda t: t.search(print, 0.5, rounds=1), RecipeError, "no snapshot"),
        (lambda t: t.snapshot(-1), RecipeError, "step must be at least 0, got -1"),
        (lambda t: t.snapshot(1.0), TypeError, "step must be an int"),
        (lambda t: t.prune(), PatternError, "say which"),
        (lambda t: t.prune(1.5), PatternError, "between 0 and 1"),
        (lambda t: t.prune("half"), TypeError, "must be a number"),
        (lambda t: t.prune(0.5, scope="all"), RecipeError, "unknown scope 'all'.* Valid are global, layer"),
        (lambda t: (t.prune(0.5), t.prune(0.4)), RecipeError, r"sparsity 0.4 prunes 109 units, but 136 are pruned"),
        (
            lambda t: (t.prune(0.5, scope="layer"), t.prune(0.4, scope="layer")),
            RecipeError,
            r"prunes 19 weights of conv, but 24 are pruned",
        ),
        (lambda t: (t.snapshot(), t.search("loop", 0.5, rounds=1)), TypeError, "train must be callable"),
        (lambda t: (t.snapshot(), t.search(print, 0.5, rounds=0)), RecipeError, "at least 1"),
        (lambda t: (t.snapshot(), t.search(print, 0.5, rounds=1.0)), TypeError, "rounds must be an int"),
        (
            lambda t: (t.snapshot(), t.search(print, 0.5, rounds=1, rewind=True)),
            RecipeError,
            "unknown rewind True.* Valid are weights, learning-rate, nothing",
        ),
        (
            lambda t: (t.snapshot(), t.prune(0.6), t.search(print, 0.5, rounds=1)),
            RecipeError,
            "163 are pruned already",
        ),
        (lambda t: (t.snapshot(), t.rewind_with_mask([])), TypeError, "must be a mapping"),
        (
            lambda t: (t.snapshot(), t.rewind_with_mask({"norm": None})),
            RecipeError,
            "masks for norm, but .* conv, wide",
        ),
        (lambda t: (t.snapshot(), t.rewind_with_mask({"wide": torch.ones(8, 24)})), TypeError, "wide: .* bool"),
        (
            lambda t: (t.snapshot(), t.rewind_with_mask({"wide": torch.ones(24, 8, dtype=torch.bool)})),
            PatternError,
            r"wide: its mask has shape \(24, 8\), but the weight as \[out, in\] has \(8, 24\)",
        ),
        (lambda t: t.load_state_dict({}), RecipeError, "not the state"),
        (
            lambda t: t.load_state_dict(ticket_of(Net(), pattern="row").state_dict()),
            RecipeError,
            "under the pattern row",
        ),
        (lambda t: t.load_state_dict(ticket_of(nn.Linear(3, 3)).state_dict()), RecipeError, "holds the layers"),
    ],
)
def test_errors_change_nothing(act, error, message):
    model = Net()
    ticket = ticket_of(model)
    with pytest.raises(error, match=message):
        act(ticket)
    kept = all(torch.equal(getattr(model, n).weight.flatten(1) != 0, mask) for n, mask in ticket.masks.items())
    assert kept
    assert ticket.sparsity in (0, 0.5, 136 / 272, 163 / 272)


@pytest.mark.parametrize(
    ("make_ticket", "error", "message"),
    [
        (lambda: LotteryTicket("model", None), TypeError, "model must be"),
        (lambda: LotteryTicket(Net(), None), TypeError, "optimizer must be"),
        (lambda: ticket_of(Net(), scheduler=3), TypeError, "scheduler must have"),
        (lambda: ticket_of(Net(), pattern=0.5), TypeError, "pattern must be"),
        (lambda: ticket_of(Net(), pattern="3:7"), PatternError, "conv: 3:7 needs"),
        (lambda: ticket_of(nn.Sequential(nn.BatchNorm1d(3))), RecipeError, "no layer to prune"),
        (lambda: ticket_of(Net(), exclude=["attention"]), RecipeError, "matches none"),
        (
            lambda: LotteryTicket(Net(), torch.optim.SGD(Net().parameters(), lr=0.1)),
            RecipeError,
            "conv: its weight is not among the optimizer's 8",
        ),
    ],
)
def test_a_ticket_that_cannot_be(make_ticket, error, message):
    with pytest.raises(error, match=message):
        make_ticket()


def test_a_frozen_weight_stays_dense_and_is_reported():
    model = Net()
    model.wide.weight.requires_grad_(False)
    ticket = ticket_of(model)
    assert ticket.masks.keys() == {"conv", "small"}
    assert ("wide", "frozen: it takes no gradient") in [(skip.name, skip.reason) for skip in ticket.finalize().skipped]


def test_a_model_of_frozen_weights_is_refused_and_nothing_hooked():
    model = Net().requires_grad_(False)
    with pytest.raises(RecipeError, match="no weight takes a gradient"):
        ticket_of(model)
    assert not hooks_on(model)


@pytest.mark.parametrize("pattern", [Unstructured("row"), Unstructured("layer")], ids=str)
def test_a_scope_in_the_pattern_contradicts_a_global_one(pattern):
    with pytest.raises(PatternError, match="Use scope='layer'"):
        ticket_of(Net(), pattern=pattern).prune(0.5)


@pytest.mark.parametrize(
    ("pattern", "mask", "message"),
    [
        ("2:4", torch.tensor([[1, 1, 0, 0, 1, 0, 0, 0]]).bool(), "keep 1 weights"),
        ("2:4", torch.tensor([[1, 0, 0, 0, 1, 0, 0, 0]]).bool(), "2:4 keeps exactly 2"),
        ("2:4", torch.tensor([[1, 1, 1, 0, 1, 1, 0, 0]]).bool(), "3:4 keeps exactly 3"),
        ("row", torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]]).bool(), "kept in part"),
        ("unstructured,scope=row", torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool(), "row 1 keeps 3"),
    ],
)
def test_a_mask_that_its_pattern_forbids(pattern, mask, message):
    model = nn.Sequential(nn.Linear(mask.shape[1], len(mask)))
    ticket = ticket_of(model, pattern=pattern)
    ticket.snapshot()
    with pytest.raises(PatternError, match=f"0: .*{message}"):
        ticket.rewind_with_mask({"0": mask})
    assert (model[0].weight != 0).all()


def test_weights_that_diverged_are_named():
    model, _, _, ticket = make()
    model.wide.weight.data[0, :2] = math.nan
    with pytest.raises(RecipeError, match="wide: 2 of its weights are NaN"):
        ticket.prune(0.5)
    assert ticket.sparsity == 0


def grow(model):
    model.extra = nn.Linear(2, 2)


def shrink(model):
    del model.norm


def resize(model):
    model.small = nn.Linear(8, 5)


def replace_one(model):
    model.small.weight = nn.Parameter(model.small.weight.detach().clone())


def narrow(model):
    model.half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (grow, "extra.weight is new"),
        (shrink, "norm.running_mean is gone"),
        (resize, r"small.weight was float32 \[4, 8\] and is float32 \[5, 8\]"),
        (replace_one, "small.weight is another object"),
        (narrow, r"wide.weight was float32 \[8, 24\] and is float16"),
    ],
)
def test_a_model_that_changed_since_the_snapshot(change, message):
    model, _, _, ticket = make()
    ticket.snapshot()
    change(model)
    for call in (ticket.rewind, ticket.rewind_with_mask, lambda: ticket.rewind(weights=False)):
        with pytest.raises(RecipeError, match=message):
            call()


def test_an_optimizer_that_changed_since_the_snapshot():
    _, optimizer, _, ticket = make()
    ticket.snapshot()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(RecipeError, match=r"groups of \[8, 1\] parameters, but had \[8\]"):
        ticket.rewind()


def test_a_state_with_or_without_a_scheduler():
    _, _, _, ticket = make()
    ticket.snapshot()
    with pytest.raises(RecipeError, match="taken with a scheduler"):
        ticket_of(Net()).load_state_dict(ticket.state_dict())


# Shards


def _sharded_ticket(rank):
    single, sharded = a_model(), a_model()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    results = []
    for model in (single, sharded):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        ticket = LotteryTicket(model, optimizer)
        ticket.snapshot()

        def train(ticket, start, model=model, optimizer=optimizer):
            for step in range(start, 4):
                x, y = a_batch(step)
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()
                optimizer.step()
                ticket.step()
            with torch.no_grad():
                model(x)  # leaves whole weights in place of the shards

        ticket.search(train, sparsity=0.8, rounds=2)
        results.append((ticket.masks, ticket.finalize()))
    for name, mask in results[0][0].items():
        assert torch.equal(results[1][0][name], mask), name
    for (name, parameter), other in zip(sharded.named_parameters(), single.parameters(), strict=True):
        whole = parameter.full_tensor()
        assert torch.equal(whole == 0, other == 0), name
        torch.testing.assert_close(whole, other)
    assert results[1][1].num_pruned == round(0.8 * (12 * 16 + 16 * 7))


@pytest.mark.slow
def test_under_fully_shard_a_ticket_is_the_same(tmp_path):
    on_two_processes(_sharded_ticket, tmp_path)


def test_the_names_are_public():
    assert secateur.LotteryTicket is secateur.training.LotteryTicket is LotteryTicket
