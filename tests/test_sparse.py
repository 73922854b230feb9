"""Layers that learn their mask: the formula, its gradients, the budget."""

import copy
import math

import pytest
import reference
import torch
from sparse_cases import (
    BY_NAME,
    EVERY_PATTERN,
    FIVE_PATTERNS,
    LAYERS,
    an_input,
    assert_same_state,
    product,
    state_of,
    train,
)
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations

from secateur import (
    NM,
    PatternError,
    RecipeError,
    SparseConv2d,
    SparseLinear,
    SparsityPattern,
)
from secateur.nn import MaskSettings
from secateur.patterns import with_channel_width


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# The formula


def learned_effective(weight, threshold, temperature):
    """The formula in loops, float64."""
    weight, threshold = weight.detach(), threshold.detach()
    effective = torch.zeros(weight.shape, dtype=torch.float64)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            w = float(weight[i, j])
            t = float(threshold[i] if threshold.ndim == 1 else threshold[i, j])
            effective[i, j] = w / (1 + math.exp(-(abs(w) - t) * temperature))
    return effective


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("temperature", [None, 3.0])
def test_forward_is_the_formula_to_the_letter(structured, temperature, dtype):
    layer = SparseLinear(8, 6, structured=structured, temperature=temperature, dtype=dtype)
    nn.init.uniform_(layer.threshold, -0.2, 0.4)
    nn.init.normal_(layer.bias)
    x = torch.randn(5, 8, dtype=dtype)
    effective = learned_effective(layer.weight, layer.threshold, temperature or 10.0)
    y = torch.zeros(5, 6, dtype=torch.float64)
    for n in range(5):
        for i in range(6):
            y[n, i] = math.fsum(float(x[n, j]) * float(effective[i, j]) for j in range(8)) + float(
                layer.bias.detach()[i]
            )
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(layer(x).double(), y, **tolerance)


def test_a_worked_example():
    """Weights 3 and 1, threshold 2, temperature ln 3: masks 3/4 and 1/4, so 2.25 and 0.25; the bias is 0.5."""
    layer = SparseLinear(2, 1, threshold=2, temperature=math.log(3), dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, -1.0]]))
        layer.bias.fill_(0.5)
    torch.testing.assert_close(layer(torch.eye(2).double()).flatten(), torch.tensor([2.75, 0.25]).double())
    assert layer.effective_weight().tolist() == [[3, 0]]
    assert (layer.num_active(), layer.density(), layer.sparsity()) == (1, 0.5, 0.5)


def test_defaults():
    layer = SparseLinear(40, 30)
    assert (layer.in_features, layer.out_features, layer.is_structured) == (40, 30, True)
    assert float(layer.temperature) == 10
    assert torch.equal(layer.threshold, torch.full((30,), 0.01))
    assert torch.equal(layer.bias, torch.zeros(30))
    assert {name: parameter.shape for name, parameter in layer.named_parameters()} == {
        "weight": (30, 40),
        "bias": (30,),
        "threshold": (30,),
    }
    assert layer.mask is None
    assert not layer.hard


def test_weights_are_kaiming_uniform():
    layer = SparseLinear(256, 100)
    bound = 1 / math.sqrt(256)  # gain sqrt(1/3) of a leaky slope sqrt(5), times sqrt(3 / fan_in)
    assert 0.99 * bound < layer.weight.abs().max() <= bound
    assert layer.weight.detach().std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    torch.manual_seed(3)
    linear = nn.Linear(16, 4)
    torch.manual_seed(3)
    assert torch.equal(SparseLinear(16, 4).weight, linear.weight)
    torch.manual_seed(3)
    convolution = nn.Conv2d(4, 6, 3)
    torch.manual_seed(3)
    layer = SparseConv2d(4, 6, 3)
    assert torch.equal(layer.weight, convolution.weight)
    assert not layer.bias.any()


def test_constructors_by_name():
    layer = SparseLinear.unstructured(8, 6, bias=False)
    assert not layer.is_structured
    assert layer.threshold.shape == (6, 8)
    assert layer.bias is None
    assert SparseLinear.with_bias(8, 6, False).bias is None
    assert SparseLinear.with_bias(8, 6, True).bias.shape == (6,)
    assert SparseLinear(8, 6, device="meta", dtype=torch.float64).threshold.dtype == torch.float64


@pytest.mark.parametrize(
    ("layer", "count"),
    [
        (SparseLinear(8, 6), 48 + 6 + 6),
        (SparseLinear(8, 6, bias=False), 48 + 6),
        (SparseLinear.unstructured(8, 6), 48 + 6 + 48),
        (SparseLinear(8, 6, pattern="2:4"), 48 + 6),
        (SparseConv2d(4, 6, 3, groups=2), 108 + 6 + 6),
    ],
)
def test_num_parameters(layer, count):
    assert layer.num_parameters() == count


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            SparseLinear(8, 6, threshold=0),
            "SparseLinear(in_features=8, out_features=6, bias=True, structured=True, density=1.0000)",
        ),
        (
            SparseLinear.unstructured(8, 6, bias=False, threshold=9),
            "SparseLinear(in_features=8, out_features=6, bias=False, structured=False, density=0.0000)",
        ),
        (
            SparseLinear(8, 6, pattern="row", sparsity=0.5),
            "SparseLinear(in_features=8, out_features=6, bias=True, structured=True, pattern='row', density=0.5000)",
        ),
        (
            SparseLinear(8, 6, device="meta"),
            "SparseLinear(in_features=8, out_features=6, bias=True, structured=True, density=?)",
        ),
        (
            SparseConv2d(4, 6, 3, padding=1, groups=2, threshold=0),
            "SparseConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2, bias=True, "
            "structured=True, density=1.0000)",
        ),
        (
            SparseConv2d(4, 6, 3, threshold=0),
            "SparseConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), bias=True, structured=True, density=1.0000)",
        ),
    ],
)
def test_repr(layer, text):
    assert repr(layer) == text


def test_the_hard_rule_keeps_what_reaches_the_threshold():
    layer = SparseLinear(3, 2, threshold=0.5)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -0.5, 0.25], [-0.75, 0.0, 0.49]]))
        layer.threshold[1] = 0.75
    before = state_of(layer)
    assert layer.hard_mask().tolist() == [[True, True, False], [True, False, False]]
    assert layer.effective_weight().tolist() == [[0.5, -0.5, 0], [-0.75, 0, 0]]
    assert (layer.num_active(), layer.density(), layer.sparsity()) == (3, 0.5, 0.5)
    assert_same_state(layer, before)
    layer.effective_weight().fill_(7)
    layer.hard_mask().fill_(False)
    assert_same_state(layer, before)

    layer.reset_threshold(0.3)
    assert layer.threshold.tolist() == pytest.approx([0.3, 0.3])
    assert layer.num_active() == 4
    layer.reset_threshold(0)
    assert layer.num_active() == 6  # |0| >= 0


# Gradients


@pytest.mark.parametrize("name", ["structured", "one a weight", "conv", "conv unstructured"])
def test_gradcheck(name):
    layer = LAYERS[name](dtype=torch.float64)
    nn.init.normal_(layer.bias)
    nn.init.uniform_(layer.threshold, 0.05, 0.3)
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["weight", "bias", "threshold"]

    def function(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    inputs = (an_input(layer, 2).requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("name", ["structured", "one a weight", "conv"])
def test_second_derivatives_of_learned_thresholds(name):
    layer = LAYERS[name](dtype=torch.float64)
    nn.init.uniform_(layer.threshold, 0.05, 0.3)
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,)).sum(0).square()

    inputs = (an_input(layer, 2).requires_grad_(), *layer.parameters())
    assert torch.autograd.gradgradcheck(function, inputs)


@FIVE_PATTERNS
def test_second_derivatives_under_a_pattern(pattern, sparsity):
    """Of the gradient as it is: the threshold moves with the weights in it, so the loss has to be linear."""
    layer = SparseLinear(8, 6, pattern=pattern, sparsity=sparsity, dtype=torch.float64)
    x = an_input(layer, 2)

    def function(weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    assert torch.autograd.gradgradcheck(function, (layer.weight,))


@pytest.mark.parametrize("options", [{}, {"structured": False}, {"pattern": "2:4"}], ids=str)
def test_large_weights_have_second_derivatives(options):
    """Larger than what is worked on at a time, which is written into one tensor."""
    layer = SparseLinear(600, 500, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.weight.add_(layer.weight.sign(), alpha=0.01)  # no difference may step over zero, where |w| has a corner
    if layer.pattern is not None:
        layer.solve_threshold()
    x, direction, weight = an_input(layer, 2), torch.randn(500, 600, dtype=torch.float64), layer.weight.detach()

    def gradient(weight):
        return torch.func.grad(lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)).sum())(weight)

    first = gradient(weight)
    layer(x).sum().backward()
    torch.testing.assert_close(first, layer.weight.grad)
    by_differences = (gradient(weight + 1e-6 * direction) - gradient(weight - 1e-6 * direction)) / 2e-6
    (first,) = torch.autograd.grad(layer(x).sum(), layer.weight, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), layer.weight)
    torch.testing.assert_close((second * direction).sum(), (by_differences * direction).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("structured", [True, False])
def test_learned_thresholds_move(structured, hard, optimizer):
    layer = SparseLinear(8, 6, structured=structured, hard=hard)
    train(layer, optimizer(layer.parameters(), lr=0.05), 3)
    assert (layer.threshold != 0.01).all()
    assert len(layer.threshold.unique()) == layer.threshold.numel()


def solved_by_hand(matrix, pattern, sparsity, temperature, hard=False):
    """The effective weight under a pattern, written so that autograd derives its gradient under the budget.

    The offset d that keeps the sum of sigmoid((s - t - d) * slope) where it is follows each score by
    dd/ds_u = k_u / sum(k), the implicit function theorem; it enters as a term that is zero and has that gradient.
    """
    rows, columns = matrix.shape
    index = torch.tensor(
        [
            [[i * columns + j for i, j in unit] for unit in competition]
            for competition in reference.competitions(pattern, rows, columns)
        ]
    )
    units = matrix.flatten()[index]  # [competitions, units, elements]
    scores = units.square().mean(-1).sqrt()
    ordered = scores.detach().sort(1).values
    pruned = round(sparsity * scores.shape[1])
    threshold = (ordered[:, pruned - 1 : pruned] + ordered[:, pruned : pruned + 1]) / 2
    slope = temperature / threshold
    soft = torch.sigmoid((scores.detach() - threshold) * slope)
    k = soft * (1 - soft)
    offset = (k / k.sum(1, keepdim=True) * scores).sum(1, keepdim=True)
    mask = torch.sigmoid((scores - threshold - (offset - offset.detach())) * slope)
    if hard:
        mask = (scores >= threshold).double() + mask - mask.detach()
    return matrix.flatten().index_put((index,), units * mask.unsqueeze(-1)).view(rows, columns)


def assert_follows_the_reference(layer, x):
    width = math.prod(layer.weight.shape[2:])
    pattern = with_channel_width(layer.pattern, width)
    weight = layer.weight.detach().clone().requires_grad_()
    matrix = solved_by_hand(weight.flatten(1), pattern, layer.target, float(layer.temperature), layer.hard)
    expected = product(layer, x, matrix.view(weight.shape))
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    slopes = torch.randn_like(y)
    (by_hand,) = torch.autograd.grad(expected, weight, slopes)
    (ours,) = torch.autograd.grad(y, layer.weight, slopes)
    torch.testing.assert_close(ours, by_hand, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("hard", [False, True])
@EVERY_PATTERN
def test_pattern_layers_follow_the_reference(pattern, sparsity, shape, hard):
    layer = SparseLinear(shape[1], shape[0], pattern=pattern, sparsity=sparsity, hard=hard, dtype=torch.float64)
    assert float(layer.temperature) == 4
    assert_follows_the_reference(layer, an_input(layer, 5))
    layer.temperature = 1.5
    assert_follows_the_reference(layer, an_input(layer, 5))


@pytest.mark.parametrize(
    ("options", "pattern", "sparsity"),
    [
        ({}, "column", 0.5),
        ({"groups": 2}, "column", 0.5),
        ({}, "row", 0.5),
        ({}, "unstructured", 0.8),
        ({}, "2:4", None),
        ({"stride": 2, "padding": 1}, "block:2x3", 0.4),
    ],
)
def test_pattern_convolutions_follow_the_reference(options, pattern, sparsity):
    layer = SparseConv2d(4, 6, (3, 2), pattern=pattern, sparsity=sparsity, dtype=torch.float64, **options)
    assert_follows_the_reference(layer, an_input(layer, 2))
    layer.weight.data = layer.weight.data.to(memory_format=torch.channels_last)
    assert_follows_the_reference(layer, an_input(layer, 2))


@pytest.mark.parametrize("pattern", ["unstructured", "unstructured,scope=row", "2:4", "block:4x4", "row", None])
def test_large_weights_follow_the_reference(pattern):
    """Larger than what is worked on at a time."""
    if pattern is not None:
        layer = SparseLinear(512, 400, pattern=pattern, sparsity=0.5, dtype=torch.float64)
        assert_follows_the_reference(layer, an_input(layer, 2))
        return
    for structured in (True, False):
        layer = SparseLinear(512, 400, structured=structured, dtype=torch.float64)
        nn.init.uniform_(layer.threshold, 0, 0.05)
        weight, threshold = (tensor.detach().clone().requires_grad_() for tensor in (layer.weight, layer.threshold))
        column = threshold.unsqueeze(1) if structured else threshold
        x = an_input(layer, 2)
        expected = F.linear(x, weight * torch.sigmoid((weight.abs() - column) * 10), layer.bias)
        y = layer(x)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
        by_hand = torch.autograd.grad(expected.square().sum(), (weight, threshold))
        ours = torch.autograd.grad(y.square().sum(), (layer.weight, layer.threshold))
        torch.testing.assert_close(ours, by_hand, rtol=1e-9, atol=1e-11)


def test_the_budget_correction_is_the_derivative_at_a_constant_sum():
    """By finite differences, solving for the offset by bisection at each point: no formula of ours in it."""
    layer = SparseLinear(4, 5, False, pattern="row", sparsity=0.4, dtype=torch.float64)
    start = layer.weight.detach()
    threshold, target = float(layer.threshold), None
    pull = torch.randn(5, 4, dtype=torch.float64)

    def loss(matrix):
        scores = (matrix**2).mean(1).sqrt()
        low, high = -10.0, 10.0
        for _ in range(200):
            offset = (low + high) / 2
            mask = torch.sigmoid((scores - threshold - offset) * 4 / threshold)
            low, high = (offset, high) if mask.sum() > target else (low, offset)
        return (matrix * mask[:, None] * pull).sum()

    target = torch.sigmoid(((start**2).mean(1).sqrt() - threshold) * 4 / threshold).sum()
    expected = torch.zeros(5, 4, dtype=torch.float64)
    for i in range(5):
        for j in range(4):
            step = torch.zeros(5, 4, dtype=torch.float64)
            step[i, j] = 1e-5
            expected[i, j] = (loss(start + step) - loss(start - step)) / 2e-5
    (layer(torch.eye(4).double()).T * pull).sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("structured", [True, False])
def test_hard_is_the_hard_mask_forward_and_the_sigmoid_backward(structured):
    layer = SparseLinear(8, 6, structured=structured, hard=True, threshold=0.15, dtype=torch.float64)
    x = an_input(layer, 5)
    y = layer(x)
    assert 0 < layer.sparsity() < 1
    assert torch.equal(y, F.linear(x, layer.effective_weight(), layer.bias))
    weight, threshold = (tensor.detach().clone().requires_grad_() for tensor in (layer.weight, layer.threshold))
    column = threshold.unsqueeze(1) if structured else threshold
    soft = torch.sigmoid((weight.abs() - column) * 10)
    expected = F.linear(x, weight * ((weight.abs() >= column) + soft - soft.detach()))
    slopes = torch.randn_like(y)
    by_hand = torch.autograd.grad(expected, (weight, threshold), slopes)
    ours = torch.autograd.grad(y, (layer.weight, layer.threshold), slopes)
    torch.testing.assert_close(ours, by_hand, rtol=1e-10, atol=1e-12)


def test_temperature_is_settable():
    layer = SparseLinear(8, 6)
    buffer = layer.temperature
    layer.temperature = 25
    assert layer.temperature is buffer
    assert layer.state_dict()["temperature"] == 25
    x = an_input(layer, 3)
    torch.testing.assert_close(
        layer(x).double(), (x @ learned_effective(layer.weight, layer.threshold, 25).float().T).double()
    )
    layer.temperature = 1e9
    torch.testing.assert_close(layer(x), F.linear(x, layer.effective_weight(), layer.bias))
    for value in (0, -1.0, math.inf):
        with pytest.raises(RecipeError, match=r"temperature must be (above 0|finite), got"):
            layer.temperature = value
    with pytest.raises(TypeError, match="temperature must be a number, got str"):
        layer.temperature = "hot"


# The budget


@EVERY_PATTERN
def test_the_hard_rule_meets_the_budget_before_and_after_solving(pattern, sparsity, shape):
    layer = SparseLinear(shape[1], shape[0], pattern=pattern, sparsity=sparsity)
    pruned = pattern.num_pruned(shape, sparsity)
    assert layer.weight.numel() - layer.num_active() == pruned
    train(layer, torch.optim.SGD(layer.parameters(), lr=0.5), 3)
    assert layer.weight.numel() - layer.num_active() == pruned
    pattern.check(layer.hard_mask())


def test_solve_threshold_takes_a_smaller_sparsity_on_the_way():
    layer = SparseLinear(10, 10, pattern="unstructured", sparsity=0.9)
    for sparsity, active in ((0, 100), (0.25, 75), (1, 0), (None, 10)):
        layer.solve_threshold(sparsity)
        assert layer.num_active() == active
    x = an_input(layer, 3)
    layer.solve_threshold(0)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.solve_threshold(1)
    assert not layer(x).any()
    layer(x).sum().backward()
    assert layer.weight.grad.isfinite().all()


@EVERY_PATTERN
def test_hard_prune_has_the_exact_count_whatever_the_ties(pattern, sparsity, shape):
    layer = SparseLinear(shape[1], shape[0], pattern=pattern, sparsity=sparsity)
    for values in (torch.randn(shape), torch.ones(shape), torch.randint(1, 3, shape).float()):
        pruned = copy.deepcopy(layer)
        with torch.no_grad():
            pruned.weight.copy_(values)
        pruned.hard_prune()
        assert int((pruned.weight == 0).sum()) == pattern.num_pruned(shape, sparsity)
        assert layer.weight.numel() - pruned.num_active() == pattern.num_pruned(shape, sparsity)
        pattern.check(pruned.mask)
        linear = layer if pruned is layer else copy.deepcopy(layer)
        with torch.no_grad():
            linear.weight.copy_(values)
        assert torch.equal(linear.to_linear().weight, pruned.weight)  # exact there as well


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@FIVE_PATTERNS
def test_the_budget_is_exact_in_half_precision(pattern, sparsity, dtype):
    """Distinct weights that the dtype holds exactly, whose midpoints and root mean squares it does not."""
    made = SparseLinear(16, 8, pattern=pattern, sparsity=sparsity, dtype=dtype)
    cast = SparseLinear(16, 8, pattern=pattern, sparsity=sparsity).to(dtype)
    values = (torch.randperm(128) + 128).view(8, 16)
    pruned = SparsityPattern.parse(pattern).num_pruned((8, 16), sparsity)
    for layer in (made, cast):
        with torch.no_grad():
            layer.weight.copy_(values)
        layer.solve_threshold()
        assert (layer.weight.dtype, layer.threshold.dtype, layer.temperature.dtype) == (dtype, *[torch.float32] * 2)
        assert 128 - layer.num_active() == pruned
        layer.hard = True
        y = layer(torch.eye(16, dtype=dtype)).T
        assert int((y == 0).sum()) == pruned


# Shapes


@pytest.mark.parametrize("batch", [(), (5,), (2, 1, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("make", [LAYERS["structured"], LAYERS["2:4"]])
def test_any_leading_batch_shape(make, pruned, batch):
    layer = make()
    if pruned:
        layer.hard_prune()
    x = an_input(layer, *batch).requires_grad_()
    y = layer(x)
    assert y.shape == (*batch, 6)
    torch.testing.assert_close(y.reshape(-1, 6), layer(x.reshape(-1, 8)))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.weight.grad.shape == (6, 8)
    if 0 in batch:
        assert not layer.weight.grad.any()


@pytest.mark.parametrize("batch", [(), (3,), (0,)], ids=str)
def test_convolutions_of_any_batch(batch):
    layer = SparseConv2d(4, 6, 3)
    y = layer(torch.randn(*batch, 4, 5, 7))
    assert y.shape == (*batch, 6, 3, 5)
    y.sum().backward()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"structured": False}, {"pattern": "2:4"}, {"pattern": "row", "sparsity": 0.5}], ids=str
)
def test_layers_without_weights(options, shape):
    layer = SparseLinear(*shape, **options)
    assert (layer.num_active(), layer.density(), layer.sparsity()) == (0, 1, 0)
    assert "density=1.0000" in repr(layer)
    for _ in range(2):
        y = layer(torch.randn(3, shape[0]))
        assert torch.equal(y, torch.zeros(3, shape[1]))
        y.sum().backward()
        assert layer.weight.grad.shape == (shape[1], shape[0])
        layer.hard_prune()


def test_weights_in_any_memory_order():
    for options in ({}, {"structured": False}, *({"pattern": name, "sparsity": value} for name, value in BY_NAME)):
        linear = nn.Linear(8, 6)
        linear.weight = nn.Parameter(linear.weight.detach().T.contiguous().T)
        assert not linear.weight.is_contiguous()
        layer = SparseLinear.from_linear(linear, **options)
        other = copy.deepcopy(layer)
        other.weight = nn.Parameter(layer.weight.detach().contiguous())
        x = an_input(layer, 3)
        for both in (layer, other):
            both(x).square().sum().backward()
        torch.testing.assert_close(layer(x), other(x))
        torch.testing.assert_close(layer.weight.grad, other.weight.grad)


# Memory


def bytes_kept_for_backward(layer, x):
    """Of tensors that are neither the layer's own nor its input, each storage once."""
    mask = getattr(layer, "mask", None)
    held = (*layer.parameters(), *layer.buffers(), x, *([] if mask is None else [mask]))
    own = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    y.sum().backward()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"structured": False},
        {"hard": True},
        *({"pattern": name, "sparsity": sparsity} for name, sparsity in BY_NAME),
        {"pattern": "unstructured,scope=row", "sparsity": 0.5},
        {"pattern": "3:5,remainder=dense"},
        {"pattern": "block:7x5,remainder=dense", "sparsity": 0.5},
    ],
    ids=str,
)
def test_one_tensor_of_the_weights_size_is_kept_beyond_a_dense_layer(options):
    linear = nn.Linear(48, 32)
    x = torch.randn(4, 48)
    assert bytes_kept_for_backward(linear, x) == 0
    layer = SparseLinear.from_linear(linear, **options)
    x.requires_grad_()
    assert bytes_kept_for_backward(layer, x) == 48 * 32 * 4  # the effective weight
    layer.hard_prune()
    assert bytes_kept_for_backward(layer, x) == 48 * 32 * 4


# Errors


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SparseLinear(8, 6, sparsity=0.5), PatternError, "sparsity=0.5 needs a pattern to be met under"),
        (lambda: SparseLinear(8, 6, sparsity="0.5"), TypeError, "sparsity must be a number, got str"),
        (lambda: SparseLinear(8, 6, pattern="row"), PatternError, "row fits any sparsity: say which"),
        (lambda: SparseLinear(8, 6, pattern="row", sparsity=1.5), PatternError, "between 0 and 1, got 1.5"),
        (lambda: SparseLinear(8, 6, pattern="row", sparsity=math.nan), PatternError, "between 0 and 1, got nan"),
        (lambda: SparseLinear(8, 6, pattern="2:4", sparsity=0.9), PatternError, "2:4 fixes the sparsity at 0.5"),
        (lambda: SparseLinear(10, 6, pattern="2:4"), PatternError, "multiple of 4, got 10"),
        (lambda: SparseLinear(8, 6, pattern="2of4"), PatternError, "names no pattern"),
        (lambda: SparseLinear(8, 6, pattern=4), TypeError, "pattern must be a SparsityPattern or its text, got int"),
        (
            lambda: SparseLinear.unstructured(8, 6, pattern="2:4"),
            PatternError,
            "one learned threshold for each weight is for layers without a pattern; 2:4 solves its own",
        ),
        (lambda: SparseLinear(-1, 6), RecipeError, "in_features must be at least 0, got -1"),
        (lambda: SparseLinear(8, 6.0), TypeError, "out_features must be an int, got float"),
        (lambda: SparseLinear(8, 6, temperature=0), RecipeError, "temperature must be above 0, got 0"),
        (lambda: SparseLinear(8, 6, threshold=math.nan), RecipeError, "threshold must be a number, got NaN"),
        (lambda: SparseLinear(8, 6, threshold="low"), TypeError, "threshold must be a number, got str"),
        (lambda: SparseLinear(8, 6).reset_threshold(math.nan), RecipeError, "threshold must be a number, got NaN"),
        (lambda: SparseLinear(8, 6).reset_threshold(True), TypeError, "threshold must be a number, got bool"),
        (lambda: SparseLinear(8, 6).solve_threshold(), PatternError, "the threshold is learned"),
        (lambda: SparseLinear(8, 6, pattern="2:4").solve_threshold(2), PatternError, "between 0 and 1, got 2"),
        (lambda: SparseLinear(8, 6).freeze(torch.ones(6, 8)), TypeError, "must be a bool tensor, got torch.float32"),
        (lambda: SparseLinear(8, 6).freeze([True]), TypeError, "must be a bool tensor, got list"),
        (
            lambda: SparseLinear(8, 6).freeze(torch.ones(8, 6, dtype=torch.bool)),
            PatternError,
            r"has shape \(6, 8\), got \(8, 6\)",
        ),
        (lambda: SparseLinear(8, 6).hard_prune(0.5), TypeError, "optimizer must be a torch.optim.Optimizer, got float"),
        (lambda: SparseLinear.from_linear(nn.Conv2d(3, 4, 2)), TypeError, "linear must be an nn.Linear, got Conv2d"),
        (lambda: SparseConv2d.from_conv2d(nn.Linear(3, 4)), TypeError, "convolution must be an nn.Conv2d, got Linear"),
        (
            lambda: SparseLinear.from_linear(parametrizations.weight_norm(nn.Linear(8, 6))),
            TypeError,
            "must be parameters of their own",
        ),
        (lambda: SparseConv2d(4, 6, 3, groups=3), ValueError, "divisible by groups"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_hard_prune_of_weights_that_are_nan_changes_nothing():
    layer = SparseLinear(8, 6, pattern="row", sparsity=0.5)
    with torch.no_grad():
        layer.weight[2, 3] = math.nan
    with pytest.raises(PatternError, match="scores are NaN"):
        layer.hard_prune()
    assert layer.mask is None
    assert layer.weight.count_nonzero() == 48


# Settings


def test_settings_are_a_value_that_carries_every_keyword():
    settings = MaskSettings(True, NM(2, 4), None, 7.0, 0.2, True)
    assert settings == MaskSettings(pattern="2:4", sparsity=0.5, temperature=7.0, threshold=0.2, hard=True)
    assert hash(settings) == hash(copy.deepcopy(settings))
    keywords = {"pattern": "2:4", "temperature": 7.0, "threshold": 0.2, "hard": True}
    for by_value, by_keywords in (
        (SparseLinear.from_linear(nn.Linear(8, 6), settings=settings), SparseLinear(8, 6, **keywords)),
        (SparseConv2d.from_conv2d(nn.Conv2d(4, 6, 3), settings=settings), SparseConv2d(4, 6, 3, **keywords)),
    ):
        for layer in (by_value, by_keywords):
            assert (layer.pattern, layer.target, layer.structured, layer.hard) == (NM(2, 4), 0.5, True, True)
            assert float(layer.temperature) == 7
    learned = SparseLinear.from_linear(nn.Linear(8, 6), settings=MaskSettings(structured=False, threshold=0.2))
    assert torch.equal(learned.threshold, torch.full((6, 8), 0.2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda settings: SparseLinear.from_linear(nn.Linear(8, 6), settings=settings, hard=True),
            RecipeError,
            "not both; got a MaskSettings and hard",
        ),
        (
            lambda settings: SparseLinear.from_linear(nn.Linear(8, 6), settings="2:4"),
            TypeError,
            "MaskSettings, got str",
        ),
        (lambda settings: MaskSettings(hard=1), TypeError, "hard must be a bool, got int"),
        (lambda settings: MaskSettings(temperature=math.inf), RecipeError, "temperature must be finite, got inf"),
    ],
)
def test_wrong_settings(call, error, message):
    with pytest.raises(error, match=message):
        call(MaskSettings())
