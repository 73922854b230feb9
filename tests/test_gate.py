"""The native pass of the differentiable mask: against float64, against torch operations, and where it must not run."""

import contextlib
import copy
import math

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from secateur import NM, SparseConv2d, SparseLinear, Unstructured, kernels
from secateur.nn import _gate, _gate_formula

EVERY_ISA = pytest.mark.parametrize("isa", kernels.isas())
NEEDS_NATIVE = pytest.mark.skipif(not kernels.isas(), reason="no native module")

PART = 1 << 14  # weights of a part in native/ops/gate.h
# Competitions and units.
LEARNED = [(1, 1), (3, 5), (17, 33), (70, 90), (3, PART), (2, 2 * PART + 19)]
SOLVED = [*LEARNED, (1, 15), (1, 700 * 900), *((7, m) for m in range(2, 34)), *((5000, m) for m in (2, 3, 4, 8, 16))]
CASES = [
    *(("row", shape) for shape in LEARNED),
    *(("each", shape) for shape in [*LEARNED, (700, 900)]),
    *(("solved", shape) for shape in SOLVED),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def numbers(mode, shape):
    """Weights, thresholds in their midst, gradients and a temperature."""
    weights, grads = torch.randn(shape), torch.randn(shape)
    if mode == "each":
        return weights, torch.rand(shape) * 2 - 0.5, grads, 5.0
    if mode == "row":
        return weights, torch.rand(shape[0], 1) * 2 - 0.5, grads, 5.0
    return weights, weights.abs().mean(1, keepdim=True) * (0.8 + 0.4 * torch.rand(shape[0], 1)), grads, 4.0


def by_autograd(weights, threshold, grads, temperature, *, solved, hard):
    """Effective weight and gradients from the formula alone, float64.

    The offset of a solved threshold is zero and follows the scores as the implicit function theorem has it.
    """
    w, t = (tensor.double().requires_grad_() for tensor in (weights, threshold))
    scores = w.abs()
    slope = temperature / t.detach() if solved else temperature
    offset = 0
    if solved:
        soft = torch.sigmoid((scores.detach() - t.detach()) * slope)
        k = soft * (1 - soft)
        offset = (k / k.sum(1, keepdim=True) * scores).sum(1, keepdim=True)
        offset = offset - offset.detach()
    mask = torch.sigmoid((scores - t - offset) * slope)
    if hard:
        mask = (scores >= t).double() + mask - mask.detach()
    effective = w * mask
    return effective.detach(), *torch.autograd.grad(effective, (w, t), grads.double())


@pytest.mark.parametrize(("mode", "shape"), CASES, ids=str)
@EVERY_ISA
def test_native_follows_the_formula(isa, mode, shape):
    for hard in (False, True):
        assert_follows_the_formula(isa, mode, shape, hard)


def assert_follows_the_formula(isa, mode, shape, hard):
    weights, threshold, grads, temperature = numbers(mode, shape)
    options = {"solved": mode == "solved", "hard": hard}
    effective, by_weights, by_threshold = by_autograd(weights, threshold, grads, temperature, **options)
    out = kernels.gate(weights, threshold, temperature, isa, **options)
    torch.testing.assert_close(out.double(), effective, rtol=1e-5, atol=1e-7)
    before = grads.clone()
    ours, moved = kernels.gate_backward(grads, weights, threshold, temperature, isa, owned=False, **options)
    torch.testing.assert_close(ours.double(), by_weights, rtol=1e-5, atol=1e-5)
    assert torch.equal(grads, before)
    if mode == "solved":
        assert moved is None
    else:
        torch.testing.assert_close(moved.double(), by_threshold, rtol=1e-5, atol=1e-6 * math.sqrt(shape[1]) + 1e-5)
    over, _ = kernels.gate_backward(grads, weights, threshold, temperature, isa, owned=True, **options)
    assert over is grads
    assert torch.equal(over, ours)


@EVERY_ISA
def test_the_sigmoid_is_good_to_two_units_in_the_last_place(isa):
    z = torch.linspace(-86, 86, 200_001)
    threshold = 1 - z.view(1, -1)
    exact = torch.sigmoid(1 - threshold.double())
    mask = kernels.gate(torch.ones_like(threshold), threshold, 1.0, isa, solved=False, hard=False)
    assert ((mask.double() - exact) / exact).abs().max() < 2 * 2**-23


SPECIAL = [0.0, -0.0, 0.3, -0.5, 1e-45, -1e-30, 1e30, -1e37, 0.02, 2.0, -2.0, 7.0]


@pytest.mark.parametrize("units", [1, 2, 3, 4, 8, 12, 16, 48])
@EVERY_ISA
def test_extremes_are_those_of_torch(isa, units):
    for value in (math.inf, -math.inf, 0.0, 1e-38, 0.5, -1.0, 3e38, math.nan):
        for hard in (False, True):
            assert_those_of_torch(isa, value, units, hard)


def assert_those_of_torch(isa, value, units, hard):
    weights = torch.tensor(SPECIAL * 8).view(-1, units)
    poisoned = weights.clone()
    poisoned.view(-1)[[5, 40]] = torch.tensor([math.nan, math.inf])
    grads, temperature = torch.randn_like(weights), torch.tensor(4.0)
    column = torch.full((len(weights), 1), value)
    for w in (weights, poisoned):
        for threshold, solved in ((column, True), (column, False), (column.expand_as(w).contiguous(), False)):
            results = []
            for backend in ({"backend": "reference"}, {"backend": "native", "isa": isa}):
                with torch.no_grad(), kernels.use(**backend):
                    arguments = (
                        w,
                        threshold,
                        temperature,
                        (NM(1, units) if solved else Unstructured("row")).units(w.shape),
                    )
                    forward = _gate_formula.effective_weight(*arguments, solved=solved, hard=hard)
                    results.append((forward, *_gate_formula.gradients(grads, *arguments, solved=solved, hard=hard)))
            (expected, *by_torch), (ours, *by_native) = results
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-37, equal_nan=True)
            torch.testing.assert_close(by_native, by_torch, rtol=1e-4, atol=1e-6, equal_nan=True)
            if not hard:
                continue
            numbers = ~expected.isnan()
            assert torch.equal(ours[numbers], expected[numbers])
            assert torch.equal(ours.signbit()[numbers], expected.signbit()[numbers])


@EVERY_ISA
def test_a_weight_that_is_nan_stays_where_it_is(isa):
    weights, threshold, grads, temperature = numbers("row", (5, 40))
    weights[2, 7] = math.nan
    out = kernels.gate(weights, threshold, temperature, isa, solved=False, hard=False)
    ours, _ = kernels.gate_backward(grads, weights, threshold, temperature, isa, solved=False, hard=False, owned=False)
    for tensor in (out, ours):
        assert tensor.isnan().nonzero().tolist() == [[2, 7]]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(
    ("mode", "shape"),
    [
        ("row", (300, 500)),
        ("row", (2, 3 * PART)),
        ("each", (300, 500)),
        ("solved", (1, 150_000)),
        ("solved", (300, 500)),
        ("solved", (50_000, 3)),
        ("solved", (40_000, 4)),
    ],
    ids=str,
)
@EVERY_ISA
def test_results_do_not_depend_on_the_number_of_threads(isa, mode, shape, hard):
    weights, threshold, grads, temperature = numbers(mode, shape)
    options = {"solved": mode == "solved", "hard": hard}
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = kernels.gate(weights, threshold, temperature, isa, **options)
            by = kernels.gate_backward(grads, weights, threshold, temperature, isa, owned=False, **options)
            results.append([tensor for tensor in (out, *by) if tensor is not None])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Layers


LAYERS = {
    "structured": lambda **options: SparseLinear(24, 10, threshold=0.1, **options),
    "one a weight": lambda **options: SparseLinear.unstructured(24, 10, threshold=0.1, **options),
    "unstructured": lambda **options: SparseLinear(24, 10, pattern="unstructured", sparsity=0.7, **options),
    "row scope": lambda **options: SparseLinear(24, 10, pattern="unstructured,scope=row", sparsity=0.5, **options),
    "2:4": lambda **options: SparseLinear(24, 10, pattern="2:4", **options),
    "1:3": lambda **options: SparseLinear(24, 10, pattern="1:3", **options),
    "0:4": lambda **options: SparseLinear(24, 10, pattern="0:4", **options),
    "4:4": lambda **options: SparseLinear(24, 10, pattern="4:4", **options),
    "block:1x1": lambda **options: SparseLinear(24, 10, pattern="block:1x1", sparsity=0.5, **options),
    "one row": lambda **options: SparseLinear(24, 1, pattern="column", sparsity=0.5, **options),
    "conv": lambda **options: SparseConv2d(4, 6, 3, padding=1, threshold=0.1, **options),
    "conv 3:4": lambda **options: SparseConv2d(4, 6, 3, pattern="3:4", **options),
}
EVERY_LAYER = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def an_input(layer):
    return torch.randn(5, layer.in_features) if isinstance(layer, SparseLinear) else torch.randn(5, 4, 6, 7)


def gradients(layer, x, **options):
    """Of the output, the loss and each parameter."""
    y = layer(x)
    loss = y.square().sum()
    return y, *torch.autograd.grad(loss, list(layer.parameters()), **options)


@pytest.fixture
def calls(monkeypatch):
    """The native functions that were called."""
    made = []
    for name in ("gate", "gate_backward", "unit_sums", "times_units"):
        function = getattr(kernels, name)

        def spy(*arguments, function=function, name=name, **options):
            made.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(kernels, name, spy)
    return made


def assert_native_equals_torch(layer, isa, calls, expected_calls):
    calls.clear()  # of making the layer
    x = an_input(layer)
    with kernels.use("reference"):
        expected = gradients(layer, x)
    assert not calls
    with kernels.use("native", isa=isa):
        ours = gradients(layer, x)
    assert calls == expected_calls
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hard", [False, True])
@EVERY_LAYER
@EVERY_ISA
def test_layers_are_native_and_equal_to_torch(isa, make, hard, calls):
    layer = make(hard=hard)
    assert_native_equals_torch(layer, isa, calls, ["gate", "gate_backward"])


@NEEDS_NATIVE
def test_weights_that_were_widened_or_copied_into_order_are_native(calls):
    half = SparseLinear(24, 10, pattern="2:4", dtype=torch.bfloat16)
    order = SparseLinear(24, 10, pattern="2:4")
    order.weight = nn.Parameter(order.weight.detach().T.contiguous().T)
    remainder = SparseLinear(26, 10, pattern="2:4,remainder=dense")
    for layer, tolerance in ((half, 0.02), (order, 1e-5), (remainder, 1e-5)):
        x = an_input(layer).to(layer.weight.dtype)
        calls.clear()
        ours = gradients(layer, x)
        assert calls == ["gate", "gate_backward"]
        with kernels.use("reference"):
            torch.testing.assert_close(ours, gradients(layer, x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("make", [LAYERS["structured"], LAYERS["one a weight"], LAYERS["conv"]])
def test_a_penalty_on_gradients_has_its_own(make, calls):
    layer = make()
    exact = copy.deepcopy(layer).double()

    def second(layer, x):
        x.requires_grad_()
        y = layer(x)
        first = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], create_graph=True)
        assert "gate_backward" not in calls
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, *layer.parameters()])

    x = an_input(layer)
    ours = second(layer, x)
    calls.clear()
    for own, expected in zip(ours, second(exact, x.detach().double()), strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(own.double(), expected, rtol=0, atol=1e-5 * scale)


class Functions(TorchFunctionMode):
    """Sees every function and changes none."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        return function(*arguments, **(keywords or {}))


class Operations(TorchDispatchMode):
    """Sees every operation and changes none."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return function(*arguments, **(keywords or {}))


class Own(torch.Tensor):
    """A subclass like those that shard or quantise."""


def transposed(layer):
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)


def subclassed(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Own))


@pytest.mark.parametrize(
    ("change", "context"),
    [
        (lambda layer: layer.bfloat16(), contextlib.nullcontext),
        (lambda layer: layer.double(), contextlib.nullcontext),
        (transposed, contextlib.nullcontext),
        (subclassed, contextlib.nullcontext),
        (lambda layer: None, Functions),
        (lambda layer: None, Operations),
        (lambda layer: None, lambda: kernels.use("reference")),
    ],
    ids=["bfloat16", "float64", "transposed", "subclass", "function mode", "dispatch mode", "reference"],
)
@pytest.mark.parametrize("make", [LAYERS["structured"], LAYERS["one a weight"]])
def test_what_is_not_plain_memory_is_left_to_torch(make, change, context, calls):
    layer = make()
    exact = copy.deepcopy(layer).double()
    change(layer)
    x = an_input(exact).to(layer.weight.dtype)
    with context():
        ours = gradients(layer, x)
    assert "gate" not in calls  # torch itself turns functions off for a backward pass; operations still do as they did
    tolerance = 0.05 if layer.weight.dtype == torch.bfloat16 else 1e-4
    for own, expected in zip(ours, gradients(exact, x.double()), strict=True):
        scale = float(expected.detach().abs().max())
        torch.testing.assert_close(own.as_subclass(torch.Tensor).double(), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("make", [LAYERS["structured"], LAYERS["one a weight"], LAYERS["2:4"]])
def test_batched_gradients_are_left_to_torch(make, calls):
    layer = make()
    y = layer(an_input(layer))
    assert calls == ["gate"] * bool(kernels.isas())
    vectors = torch.randn(3, *y.shape)
    (batched,) = torch.autograd.grad(y, layer.weight, vectors, is_grads_batched=True, retain_graph=True)
    assert "gate_backward" not in calls
    for own, vector in zip(batched, vectors, strict=True):
        (expected,) = torch.autograd.grad(y, layer.weight, vector, retain_graph=True)
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
@pytest.mark.parametrize("make", [LAYERS["structured"], LAYERS["2:4"]])
def test_compiled_and_exported_layers_hold_torch_operations(make, calls):
    layer = make()
    x = an_input(layer)
    torch._dynamo.reset()
    compiled = gradients(torch.compile(layer, fullgraph=True, backend="aot_eager"), x)
    program = torch.export.export(layer, (x,), strict=False).module()
    exported = program(x)
    assert not calls
    expected = gradients(layer, x)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(exported, expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_matrices_without_weights(shape, calls):
    weights, threshold = torch.empty(shape, requires_grad=True), torch.ones(shape[0], 1, requires_grad=True)
    effective = _gate.gated(
        weights, threshold, torch.tensor(4.0), Unstructured("row").units(weights.shape), solved=False, hard=False
    )
    assert effective.shape == shape
    effective.sum().backward()
    assert threshold.grad.tolist() == [[0.0]] * shape[0]
    assert not calls


# Units of several weights


SHAPES = [
    (4, 4, 4, 4),
    (8, 12, 4, 4),
    (6, 2100, 3, 3),
    (64, 1088, 32, 32),
    (3, 2976, 1, 48),
    (10, 7, 5, 7),
    (5, 9, 5, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@EVERY_ISA
def test_sums_and_products_of_units(isa, shape):
    rows, columns, height, width = shape
    a, b = torch.randn(rows, columns), torch.randn(rows, columns)
    by_a, by_b = (torch.randn(rows // height, columns // width) for _ in range(2))

    def spread(units):
        return units.double().repeat_interleave(height, 0).repeat_interleave(width, 1)

    blocks = (a.double() * b.double()).view(rows // height, height, columns // width, width)
    sums = kernels.unit_sums(a, b, height, width, isa)
    torch.testing.assert_close(sums.double(), blocks.sum((1, 3)), rtol=1e-5, atol=1e-5)
    alone = kernels.times_units(a, by_a, height, width, isa, owned=False)
    assert torch.equal(alone, (a * spread(by_a).float()))
    expected = a.double() * spread(by_a) + b.double() * spread(by_b)
    before = a.clone()
    both = kernels.times_units(a, by_a, height, width, isa, plus=(b, by_b), owned=False)
    torch.testing.assert_close(both.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(a, before)
    over = kernels.times_units(a, by_a, height, width, isa, plus=(b, by_b), owned=True)
    assert over is a
    assert torch.equal(over, both)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("pattern", ["block:2x4", "block:5x3", "block:1x8", "row", "column"])
@EVERY_ISA
def test_layers_of_blocks_are_native_and_equal_to_torch(isa, pattern, hard, calls):
    layer = SparseLinear(24, 10, pattern=pattern, sparsity=0.5, hard=hard)
    expected = ["unit_sums", "times_units", "unit_sums", "unit_sums", "times_units"]  # forward, then backward
    assert_native_equals_torch(layer, isa, calls, expected)


@NEEDS_NATIVE
@pytest.mark.parametrize(("pattern", "shape"), [("row", (100, 10)), ("column", (10, 100)), ("block:2x100", (100, 10))])
def test_large_units_are_left_to_torch(pattern, shape, calls):
    layer = SparseLinear(*shape, pattern=pattern, sparsity=0.5)
    gradients(layer, an_input(layer))
    assert not calls


@NEEDS_NATIVE
def test_the_threshold_of_blocks_is_solved_from_the_scores_it_meets():
    """Whether gradients are recorded or not: otherwise a unit at the cut could be counted on either side."""
    layer = SparseLinear(512, 512, pattern="block:4x4", sparsity=0.9, hard=True)
    layer.solve_threshold()
    asked = round(0.9 * 128 * 128) * 16
    assert layer.weight.numel() - layer.num_active() == asked
    assert int((layer.effective_weight() == 0).sum()) == asked
    with torch.no_grad():
        assert layer.weight.numel() - layer.num_active() == asked
