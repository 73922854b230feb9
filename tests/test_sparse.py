import copy
import io
import math

import pytest
import reference
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations

from secateur import (
    NM,
    Block,
    Column,
    PatternError,
    RecipeError,
    Row,
    SparseConv2d,
    SparseLinear,
    SparsityPattern,
    Unstructured,
)
from secateur.layers import clear_state_
from secateur.patterns import with_channel_width

# With the shape [out, in] to learn them in; 2 of the rows and columns of the last ones are a dense remainder.
PATTERNS = [
    (Unstructured(), 0.7, (6, 12)),
    (Unstructured("row"), 0.5, (6, 12)),
    (NM(2, 4), None, (6, 12)),
    (NM(1, 4), None, (6, 12)),
    (NM(2, 4, remainder="dense"), None, (6, 14)),
    (Block(2, 3), 0.6, (6, 12)),
    (Block(4, 4, remainder="dense"), 0.5, (10, 14)),
    (Row(), 0.5, (6, 12)),
    (Column(), 0.3, (6, 12)),
    (Column(3), 0.5, (6, 12)),
]
EVERY_PATTERN = pytest.mark.parametrize(("pattern", "sparsity", "shape"), PATTERNS, ids=str)
BY_NAME = [("unstructured", 0.7), ("2:4", None), ("block:2x2", 0.6), ("row", 0.5), ("column", 0.5)]
FIVE_PATTERNS = pytest.mark.parametrize(("pattern", "sparsity"), BY_NAME, ids=str)

LAYERS = {
    "structured": lambda **options: SparseLinear(8, 6, threshold=0.1, **options),
    "one a weight": lambda **options: SparseLinear.unstructured(8, 6, threshold=0.1, **options),
    "hard": lambda **options: SparseLinear(8, 6, threshold=0.1, hard=True, **options),
    **{
        name: lambda name=name, sparsity=sparsity, **options: SparseLinear(
            8, 6, pattern=name, sparsity=sparsity, **options
        )
        for name, sparsity in BY_NAME
    },
    "conv": lambda **options: SparseConv2d(4, 6, 3, padding=1, threshold=0.1, **options),
    "conv unstructured": lambda **options: SparseConv2d(4, 6, 3, structured=False, threshold=0.1, **options),
    "conv column": lambda **options: SparseConv2d(4, 6, (2, 3), pattern="column", sparsity=0.5, **options),
}
EVERY_LAYER = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def an_input(layer, *batch, dtype=None):
    channels = (layer.in_features,) if isinstance(layer, SparseLinear) else (layer.in_channels, 5, 7)
    return torch.randn(*batch, *channels, dtype=dtype or layer.weight.dtype)


def product(layer, x, weight):
    """What the layer should compute with this weight, by torch's own operations."""
    if isinstance(layer, SparseLinear):
        return F.linear(x, weight, layer.bias)
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def train(layer, optimizer, steps, set_to_none=True):
    x = an_input(layer, 16)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=set_to_none)
        (layer(x) - 1).square().mean().backward()
        optimizer.step()
        if layer.pattern is not None and layer.mask is None:
            layer.solve_threshold()


def state_of(layer):
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_same_state(layer, state):
    now = layer.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())


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


# Pruned for good


@EVERY_LAYER
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_after_hard_prune_forward_is_the_product_with_the_effective_weight(make, dtype):
    layer = make(dtype=dtype)
    with torch.no_grad():  # whole numbers: no rounding can hide or make a difference
        layer.weight.copy_(torch.randint(-9, 10, layer.weight.shape))
        layer.bias.copy_(torch.randint(-9, 10, layer.bias.shape))
    layer.reset_threshold(4)
    x = torch.randint(-9, 10, an_input(layer, 5).shape).to(dtype)
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


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("tell", [True, False], ids=["told", "untold"])
@pytest.mark.parametrize("optimizer", optimizers().values(), ids=optimizers())
@pytest.mark.parametrize("make", [LAYERS[name] for name in ("structured", "one a weight", "2:4", "row", "conv column")])
def test_zeros_stay_zero_whatever_the_optimizer_does(make, optimizer, tell, set_to_none):
    layer = make()
    optimizer = optimizer(layer.parameters())
    train(layer, optimizer, 3)
    layer.hard_prune(optimizer if tell else None)
    mask, active = layer.hard_mask(), layer.num_active()
    kept = layer.weight.detach().clone()
    assert 0 < active < layer.weight.numel()
    x = an_input(layer, 4)
    for _ in range(4):
        train(layer, optimizer, 1, set_to_none)
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


@EVERY_LAYER
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
        assert ("mask" in states[-1]) == pruned
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


@EVERY_LAYER
def test_casts(make):
    layer = make().to(torch.float64)
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {torch.float64}
    x = an_input(layer, 3)
    y = layer(x)
    assert y.dtype == torch.float64
    layer.float()
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {torch.float32}
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


@EVERY_LAYER
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
@EVERY_LAYER
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


@EVERY_LAYER
def test_exports(make):
    layer = make()
    x = an_input(layer, 4)
    for _ in range(2):
        program = torch.export.export(layer, (x,), strict=False)
        torch.testing.assert_close(program.module()(x), layer(x))
        layer.hard_prune()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@EVERY_LAYER
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


# Shapes


@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("make", [LAYERS["structured"], LAYERS["one a weight"], LAYERS["2:4"]])
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
    "options",
    [{}, {"structured": False}, *({"pattern": name, "sparsity": sparsity} for name, sparsity in BY_NAME)],
    ids=str,
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
    own = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers(), x)}
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
