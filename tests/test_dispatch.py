"""When a packed layer may be called past PyTorch's dispatcher, and that nobody who listens there misses it."""

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


class Listening(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def layer():
    torch.manual_seed(0)
    linear = nn.Linear(16, 8)
    linear.weight.data[torch.rand(8, 16) < 0.7] = 0
    return PackedLinear.from_linear(linear)


def test_a_plain_call():
    x = torch.ones(2, 3)
    for context in (nullcontext, torch.no_grad, torch.inference_mode):
        with context():
            assert may_skip_dispatcher(x)
    assert may_skip_dispatcher(nn.Parameter(x))
    assert may_skip_dispatcher(x.requires_grad_())  # asked elsewhere
    assert not may_skip_dispatcher(x.as_subclass(Named))


@pytest.mark.parametrize(
    "context",
    [
        Listening,
        lambda: FlopCounterMode(display=False),
        FakeTensorMode,
        lambda: torch.device("cpu"),
        torch.autograd.profiler.profile,
        forward_ad.dual_level,
    ],
)
def test_what_listens_at_the_dispatcher(context):
    x = torch.ones(2, 3)
    with context():
        assert not may_skip_dispatcher(x)
    assert may_skip_dispatcher(x)


def test_what_transforms_and_traces():
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


def test_a_packed_layer_is_heard_by_whoever_listens(layer):
    x = torch.randn(3, 16)
    with torch.no_grad():
        expected = layer(x)
        with Listening() as mode:
            heard = layer(x)
        assert torch.equal(heard, expected)
        assert mode.heard == ["secateur.packed_linear_inference.default"]
        with torch.autograd.profiler.profile() as profile:
            assert torch.equal(layer(x), expected)
        assert "secateur::packed_linear_inference" in {event.name for event in profile.function_events}
        graph = make_fx(layer)(x)
        other = torch.randn(3, 16)
        assert torch.equal(graph(other), layer(other))


@pytest.mark.parametrize("rows", [1, 5])
def test_defaults_of_pytorch_do_not_reach_the_kernels(layer, rows):
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
