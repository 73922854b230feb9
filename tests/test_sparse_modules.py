"""Layers that learn their mask, as modules: pruned for good, copied, saved, cast, compiled, from and to plain ones."""

import copy
import io
import math

import pytest
import torch
from sparse_cases import (
    CLASSES,
    EVERY_CLASS,
    EVERY_LAYER,
    LAYERS,
    an_input,
    assert_same_state,
    product,
    state_of,
    train,
)
from torch import nn
from torch.nn import functional as F  # noqa: N812

from secateur import (
    SparseConv2d,
    SparseLinear,
)
from secateur.layers import clear_state_


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Pruned for good


@EVERY_LAYER
def test_after_hard_prune_forward_is_the_product_with_the_effective_weight(make):
    layer = make()
    with torch.no_grad():  # whole numbers: no rounding can hide or make a difference
        layer.weight.copy_(torch.randint(-9, 10, layer.weight.shape))
        layer.bias.copy_(torch.randint(-9, 10, layer.bias.shape))
    layer.reset_threshold(4)
    x = torch.randint(-9, 10, an_input(layer, 5).shape).float()
    if layer.pattern is not None:
        layer.solve_threshold()
    layer.hard_prune()
    assert 0 < layer.sparsity() < 1
    assert not layer.threshold.any()
    effective = layer.effective_weight()
    assert torch.equal(effective, layer.weight)
    training, evaluation = layer.train()(x), layer.eval()(x)
    assert torch.equal(training, evaluation)
    assert torch.equal(training, product(layer, x, effective))
    if isinstance(layer, SparseLinear):
        assert torch.equal(training, x @ effective.T + layer.bias)
    layer.weight.data.normal_()
    x = an_input(layer, 5)
    assert torch.equal(layer.train()(x), product(layer, x, layer.effective_weight()))
    assert torch.equal(layer.train()(x), layer.eval()(x))


def optimizers():
    return {
        "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
        "nesterov": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
        "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05, weight_decay=0.1, amsgrad=True),
        "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1),
        "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9),
    }


# Every optimizer on one layer, and every class of layers under one optimizer.
LAYERS_UNDER_OPTIMIZERS = [
    *(("structured", optimizer) for optimizer in optimizers()),
    *((name, "adam") for name in CLASSES if name not in ("structured", "conv")),
]


@pytest.mark.parametrize("tell", [True, False], ids=["told", "untold"])
@pytest.mark.parametrize(("make", "optimizer"), LAYERS_UNDER_OPTIMIZERS)
def test_zeros_stay_zero_whatever_the_optimizer_does(make, optimizer, tell):
    layer = LAYERS[make]()
    optimizer = optimizers()[optimizer](layer.parameters())
    train(layer, optimizer, 3)
    layer.hard_prune(optimizer if tell else None)
    mask, active = layer.hard_mask(), layer.num_active()
    kept = layer.weight.detach().clone()
    assert 0 < active < layer.weight.numel()
    x = an_input(layer, 4)
    for step in range(4):
        train(layer, optimizer, 1, set_to_none=step % 2 == 0)
        assert not layer.weight.grad[~mask].any()
        if tell:
            assert not layer.weight[~mask].any()
            assert not layer.threshold.any()
        assert torch.equal(layer.mask, mask)
        assert layer.num_active() == active
        assert not layer.effective_weight()[~mask].any()
        assert torch.equal(layer(x), product(layer, x, layer.effective_weight()))
    moved = (layer.weight != kept)[mask]
    assert moved.all()
    if not tell:
        assert layer.weight[~mask].any()  # so there was something to protect from
    assert not copy.deepcopy(layer).state_dict()["weight"][~mask].any()
    plain = layer.to_linear() if isinstance(layer, SparseLinear) else layer.to_conv2d()
    assert not plain.weight[~mask].any()


def test_a_gradient_that_waits_does_not_move_what_is_pruned():
    layer = SparseLinear(8, 6, threshold=0.1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(an_input(layer, 4)).sum().backward()
    layer.hard_prune()
    optimizer.step()
    assert layer.sparsity() > 0
    assert not layer.weight[~layer.mask].any()


def test_pruned_weights_stay_out_even_if_they_are_not_finite():
    layer = SparseLinear(8, 6, threshold=0.1)
    layer.hard_prune()
    with torch.no_grad():
        layer.weight[~layer.mask] = math.inf
    x = an_input(layer, 3)
    layer(x).mul(math.inf).sum().backward()
    assert not layer.weight.grad[~layer.mask].any()
    assert layer(x).isfinite().all()


def test_clear_state_zeroes_the_momenta_of_what_the_mask_leaves_out():
    first, second = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    optimizer = torch.optim.Adam([first, second], amsgrad=True)
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    clear_state_(optimizer, first, mask)
    assert not optimizer.state  # nothing is made up before the first step
    (first + second).square().sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    clear_state_(optimizer, first, mask)
    state = optimizer.state_dict()["state"]
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert before[0][name].all()
        assert torch.equal(state[0][name], before[0][name] * mask)
        assert torch.equal(state[1][name], before[1][name])
    assert state[0]["step"] == 1


def test_hard_prune_twice_prunes_more_and_never_less():
    layer = SparseLinear(20, 10, threshold=0.05)
    layer.hard_prune()
    first = layer.hard_mask()
    assert 0 < layer.num_active() < 200
    assert layer.num_active() == int(first.sum())
    layer.hard_prune()
    assert torch.equal(layer.mask, first)

    layer.reset_threshold(0.1)
    assert torch.equal(layer.hard_mask(), first)  # nothing changes yet
    expected = first & (layer.weight.abs() >= 0.1)
    layer.hard_prune()
    assert torch.equal(layer.mask, expected)
    assert expected.sum() < first.sum()
    assert not layer.threshold.any()
    with torch.no_grad():
        layer.weight.fill_(1)  # what grows back behind the mask
    layer.hard_prune()
    assert torch.equal(layer.mask, expected)
    assert torch.equal(layer.weight != 0, expected)

    layer = SparseLinear(20, 10, pattern="unstructured", sparsity=0.5)
    layer.hard_prune()
    first = layer.hard_mask()
    layer.reset_threshold(1)
    with torch.no_grad():
        layer.weight.normal_()
    layer.hard_prune()
    assert torch.equal(layer.mask, first)  # the budget is met; that is all
    assert torch.equal(layer.weight != 0, first)


def test_freeze_copies_its_mask_and_can_let_gradients_through():
    layer = SparseLinear(8, 6)
    mask = torch.rand(6, 8) > 0.5
    given = mask.clone()
    layer.freeze(given, straight_through=True)
    given.fill_(True)
    assert torch.equal(layer.mask, mask)
    assert layer.weight.all()  # the pruned ones wait
    x = an_input(layer, 4)
    assert torch.equal(layer(x), F.linear(x, layer.weight * mask, layer.bias))
    assert layer.state_dict()["weight"].all()
    slopes = torch.randn(4, 6)
    layer(x).backward(slopes)
    torch.testing.assert_close(layer.weight.grad, slopes.T @ x)
    layer.freeze(mask)
    assert torch.equal(layer.weight != 0, mask)
    layer.weight.grad = None
    layer(x).backward(slopes)
    torch.testing.assert_close(layer.weight.grad, (slopes.T @ x) * mask)


# Copies, checkpoints, casts


@EVERY_CLASS
def test_deepcopy_is_independent(make):
    layer = make()
    for _ in range(2):
        other = copy.deepcopy(layer)
        assert repr(other) == repr(layer)
        assert_same_state(other, state_of(layer))
        x = an_input(layer, 3)
        assert torch.equal(other(x), layer(x))
        before = state_of(layer)
        other.temperature = 99
        train(other, torch.optim.SGD(other.parameters(), lr=1.0), 2)
        assert_same_state(layer, before)
        layer.hard_prune()


@EVERY_LAYER
def test_a_state_dict_makes_a_fresh_layer_the_same(make):
    layer = make()
    train(layer, torch.optim.SGD(layer.parameters(), lr=0.5), 2)
    layer.temperature = 12.5
    states = []
    for pruned in (False, True):
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        states.append(torch.load(file, weights_only=True))
        assert states[-1]["stage"] == 2 * pruned
        fresh = make()
        assert fresh.load_state_dict(states[-1], strict=True) == ([], [])
        assert_same_state(fresh, states[-1])
        x = an_input(layer, 3)
        assert torch.equal(fresh(x), layer(x))
        assert fresh.num_active() == layer.num_active()
        assert fresh.weight.requires_grad
        if not pruned:
            layer.hard_prune()
    layer.load_state_dict(states[0])  # a checkpoint from before takes the pruning back
    assert layer.mask is None
    assert_same_state(layer, states[0])
    layer.load_state_dict(states[1])
    assert_same_state(layer, states[1])
    on_meta = make(device="meta")
    on_meta.load_state_dict(states[1], assign=True)
    assert_same_state(on_meta, states[1])


def test_a_checkpoint_of_another_shape_is_refused():
    layer, other = SparseLinear(8, 6), SparseLinear(8, 4)
    other.hard_prune()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(other.state_dict())
    assert layer.mask is None
    with pytest.raises(RuntimeError, match="size mismatch for threshold"):
        layer.load_state_dict(SparseLinear(8, 6, pattern="2:4").state_dict())


def test_a_state_dict_between_forward_and_backward_disturbs_neither():
    layer = SparseLinear(8, 6, threshold=0.1)
    layer.hard_prune()
    with torch.no_grad():
        layer.weight.fill_(1)
    loss = layer(an_input(layer, 3)).sum()
    assert not layer.state_dict()["weight"][~layer.mask].any()
    loss.backward()
    assert layer.weight.grad[layer.mask].all()


@EVERY_CLASS
def test_casts(make):
    def dtypes():
        return {tensor.dtype for name, tensor in layer.state_dict().items() if name != "kept"}

    layer = make().to(torch.float64)
    assert dtypes() == {torch.float64}
    x = an_input(layer, 3)
    y = layer(x)
    assert y.dtype == torch.float64
    layer.float()
    assert dtypes() == {torch.float32}
    torch.testing.assert_close(layer(x.float()), y.float())
    layer.bfloat16()
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    half.sum().backward()
    assert layer.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), y, rtol=0.05, atol=0.05)
    layer.hard_prune()
    assert layer.mask.dtype == torch.bool
    layer.to("meta")
    assert layer(x.to("meta", torch.bfloat16)).is_meta
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}


@EVERY_CLASS
def test_autocast(make):
    layer = make()
    x = an_input(layer, 4)
    for _ in range(2):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.02)
        y.float().square().sum().backward()
        assert layer.weight.grad.dtype == torch.float32
        if isinstance(layer.threshold, nn.Parameter) and layer.mask is None:
            assert layer.threshold.grad.any()
        layer.hard_prune()


# Transformations of the program


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
@EVERY_CLASS
def test_compiles_to_one_graph(make):
    layer = make()
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = an_input(layer, 4)
    for change in (lambda both: None, lambda both: setattr(both, "temperature", 2), lambda both: both.hard_prune()):
        for both in (layer, twin):
            both.zero_grad()
            change(both)
        expected, y = twin(x), compiled(x)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        for ours, by_twin in zip(layer.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, by_twin.grad)


@EVERY_CLASS
def test_exports(make):
    layer = make()
    x = an_input(layer, 4)
    for _ in range(2):
        program = torch.export.export(layer, (x,), strict=False)
        torch.testing.assert_close(program.module()(x), layer(x))
        layer.hard_prune()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@EVERY_CLASS
def test_functional_call_and_gradients_of_each_sample(make):
    layer = make()
    x = an_input(layer, 3)
    for _ in range(2):
        parameters = dict(layer.named_parameters())
        moved = {name: parameter.detach() + 0.01 for name, parameter in parameters.items()}
        other = copy.deepcopy(layer)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                parameter.copy_(moved[name])
        assert torch.equal(torch.func.functional_call(layer, moved, (x,)), other(x))

        def loss(parameters, x, layer=layer):
            return torch.func.functional_call(layer, parameters, (x,)).square().sum()

        detached = {name: parameter.detach() for name, parameter in parameters.items()}
        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(detached, x)
        for n in range(3):
            layer.zero_grad()
            loss(parameters, x[n]).backward()
            for name, parameter in parameters.items():
                expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.testing.assert_close(each[name][n], expected)
        layer.hard_prune()


# From and to plain layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"pattern": "2:4"}], ids=str)
def test_to_and_from_linear_keeps_the_parameters(options, bias):
    linear = nn.Linear(8, 6, bias=bias).eval()
    linear.weight.requires_grad_(False)
    parameters = list(linear.parameters())
    layer = SparseLinear.from_linear(linear, **options)
    assert (layer.in_features, layer.out_features, layer.training) == (8, 6, False)
    assert [id(parameter) for name, parameter in layer.named_parameters() if name != "threshold"] == [
        id(parameter) for parameter in parameters
    ]
    assert not layer.weight.requires_grad
    layer.reset_threshold(0.1)
    if layer.pattern is not None:
        layer.solve_threshold()
    effective = layer.effective_weight()
    assert 0 < layer.sparsity() < 1
    back = layer.to_linear()
    assert type(back) is nn.Linear
    assert (back.in_features, back.out_features, back.training) == (8, 6, False)
    assert [id(parameter) for parameter in back.parameters()] == [id(parameter) for parameter in parameters]
    assert torch.equal(back.weight, effective)
    assert repr(back) == repr(linear)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "bias": False},
        {"groups": 2, "padding": (1, 2)},
        {"padding": "same", "dilation": (2, 2)},
        {"padding": "valid"},
        *({"padding": 1, "padding_mode": mode, "dilation": 1} for mode in ("reflect", "replicate", "circular")),
        {"padding": "same", "padding_mode": "circular"},
    ],
    ids=str,
)
def test_to_and_from_conv2d(options):
    convolution = nn.Conv2d(4, 6, (3, 2), **options).eval()
    text = repr(convolution)
    x = torch.randn(2, 4, 7, 8)
    parameters = list(convolution.parameters())
    layer = SparseConv2d.from_conv2d(convolution, threshold=0.1)
    built = SparseConv2d(4, 6, (3, 2), threshold=0.1, **options)
    built.load_state_dict(layer.state_dict())
    assert not layer.training
    soft = copy.deepcopy(convolution)
    with torch.no_grad():
        mask = torch.sigmoid((convolution.weight.abs() - 0.1) * 10)
        soft.weight.mul_(mask)
    torch.testing.assert_close(layer(x), soft(x))
    assert torch.equal(layer(x), built(x))
    layer.hard_prune()
    assert 0 < layer.sparsity() < 1
    pruned = layer(x)
    back = layer.to_conv2d()
    assert type(back) is nn.Conv2d
    assert [id(parameter) for parameter in back.parameters()] == [id(parameter) for parameter in parameters]
    assert (repr(back), back.training) == (text, False)
    assert torch.equal(back(x), pruned)


def test_column_prunes_whole_input_channels_of_a_convolution():
    layer = SparseConv2d(4, 6, (3, 2), pattern="column", sparsity=0.5)
    assert layer.threshold.shape == (1, 1)
    layer.hard_prune()
    assert layer.mask.flatten(2).all(2).all(0).sum() == 2
    assert layer.sparsity() == 0.5
    layer = SparseConv2d(4, 6, 3, groups=2, pattern="row", sparsity=0.5)
    layer.hard_prune()
    assert layer.mask.flatten(1).all(1).sum() == 3
