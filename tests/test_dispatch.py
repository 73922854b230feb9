"""When a packed layer may skip PyTorch's dispatcher, and that whatever intercepts the dispatcher sees the layer."""

import subprocess
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from secateur import PackedLinear, RecipeError, kernels
from secateur.kernels._dispatch import may_skip_dispatcher


class Named(torch.Tensor):
    pass


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def layer():
    torch.manual_seed(0)
    linear = nn.Linear(16, 8)
    linear.weight.data[torch.rand(8, 16) < 0.7] = 0
    return PackedLinear.from_linear(linear)


def test_a_usual_call_may_skip_the_dispatcher():
    x = torch.ones(2, 3)
    for context in (nullcontext, torch.no_grad, torch.inference_mode):
        with context():
            assert may_skip_dispatcher(x)
    assert may_skip_dispatcher(nn.Parameter(x))
    assert may_skip_dispatcher(x.requires_grad_())  # the caller considers gradients
    assert not may_skip_dispatcher(x.as_subclass(Named))


@pytest.mark.parametrize(
    "context",
    [
        Recording,
        lambda: FlopCounterMode(display=False),
        FakeTensorMode,
        lambda: torch.device("cpu"),
        torch.autograd.profiler.profile,
        forward_ad.dual_level,
    ],
)
def test_nothing_that_intercepts_the_dispatcher_is_skipped(context):
    x = torch.ones(2, 3)
    with context():
        assert not may_skip_dispatcher(x)
    assert may_skip_dispatcher(x)


def test_no_transform_or_trace_is_skipped():
    seen = []

    def look(x):
        seen.append(may_skip_dispatcher(x))
        return x + 1

    x = torch.ones(2, 3)
    torch.func.vmap(look)(x)
    torch.func.grad(lambda x: look(x).sum())(x)
    make_fx(look)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these two script or trace, which is deprecated
        torch.func.jvp(look, (x,), (x,))
        torch.jit.trace(look, x, check_trace=False)
    assert seen
    assert not any(seen)


def test_whatever_intercepts_the_dispatcher_sees_a_packed_layer(layer):
    x = torch.randn(3, 16)
    with torch.no_grad():
        expected = layer(x)
        with Recording() as mode:
            again = layer(x)
        assert torch.equal(again, expected)
        assert mode.seen == ["secateur.packed_linear_inference.default"]
        with torch.autograd.profiler.profile() as profile:
            assert torch.equal(layer(x), expected)
        assert "secateur::packed_linear_inference" in {event.name for event in profile.function_events}
        graph = make_fx(layer)(x)
        other = torch.randn(3, 16)
        assert torch.equal(graph(other), layer(other))


@pytest.mark.parametrize("rows", [1, 5])
def test_default_dtype_and_device_do_not_change_a_product(layer, rows):
    x = torch.randn(rows, 16)
    packed = kernels.BitmaskLayout.pack(layer.weight)
    expected, alone = layer(x), kernels.linear(x, packed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(layer(x), expected)
        assert torch.equal(kernels.linear(x, packed), alone)
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):
        assert torch.equal(layer(x), expected)
        assert torch.equal(kernels.linear(x, packed), alone)


# What a compiler sees


def operators_of(module, *, exported=False, learned=False, gradient=True):
    """The operators of secateur in the graph of a compiled or an exported module."""
    seen = []

    def backend(graph, example_inputs):
        seen.extend(graph.graph.nodes)
        return graph

    x = torch.randn(3, 16, requires_grad=learned)
    if exported:
        seen = list(torch.export.export(module, (x,)).graph.nodes)
    else:
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend=backend)
        with torch.set_grad_enabled(gradient):
            torch.testing.assert_close(compiled(x), module(x))
    return [str(node.target) for node in seen if str(node.target).startswith("secateur")]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
@pytest.mark.filterwarnings("ignore:No complete tensor found:UserWarning")
def test_a_compiled_layer_has_autograd_only_where_a_gradient_may_pass(layer):
    """The operator without autograd takes half of the time to call."""
    fast, whole = ["secateur.packed_linear_inference.default"], ["secateur.packed_linear.default"]
    assert operators_of(layer) == fast
    assert operators_of(layer, learned=True) == whole
    assert operators_of(layer, learned=True, gradient=False) == fast
    below = nn.Sequential(nn.Linear(16, 16), layer)
    assert operators_of(below) == whole
    assert operators_of(below, gradient=False) == fast
    assert operators_of(layer, exported=True) == whole  # it may be differentiated later


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_layer_compiled_for_inference_is_compiled_anew_for_a_gradient(layer):
    torch._dynamo.reset()
    compiled = torch.compile(nn.Sequential(layer, nn.ReLU()), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 16)
    expected = layer(x).relu()
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x.requires_grad_()).sum().backward()
    (wanted,) = torch.autograd.grad(layer(x).relu().sum(), x)
    torch.testing.assert_close(x.grad, wanted)


# Memory


FAULTS = """
import resource, torch
from secateur import kernels

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        held = [torch.ones(6 << 20) for _ in range(3)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
took = kernels.keep_memory()
faults()
print(int(took), before, faults())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no resource module")
def test_memory_is_kept_for_the_next_call():
    output = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    took, before, after = map(int, output.split())
    assert after <= before
    if took and before > 1000:  # else the C library kept it anyway
        assert after < before / 10


def test_a_limit_of_memory_is_checked():
    with pytest.raises(RecipeError, match="limit must be at least 0, got -1"):
        kernels.keep_memory(-1)
    with pytest.raises(TypeError, match="limit must be an int"):
        kernels.keep_memory(1e9)
