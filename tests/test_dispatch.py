"""When a packed layer may skip PyTorch's dispatcher, and that whatever intercepts the dispatcher sees the layer."""

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

from secateur import PackedLinear, kernels
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
