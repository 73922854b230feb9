"""What a layer does decides whether it is pruned by default: heads, routers, depthwise convolutions, adapters."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from secateur import prune_
from secateur.layers import select_layers


def block():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def named(**modules):
    return nn.ModuleDict(modules)


class WithClassifier(nn.Module):
    """As models of timm say which layer classifies."""

    def __init__(self):
        super().__init__()
        self.blocks, self.last = nn.ModuleList([block(), block()]), nn.Linear(8, 3)

    def get_classifier(self):
        return self.last


class Refuses(WithClassifier):
    """As base models of transformers do that have no such layer."""

    def get_output_embeddings(self):
        raise NotImplementedError


class Pooling(nn.Module):
    """A head that attends: its outputs are features."""

    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)


class Stack(nn.Module):
    is_transposed = False

    def __init__(self, count=4):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(count, 8, 8)), nn.Parameter(torch.randn(count, 8, 8))


def layers(*shapes):
    return nn.Sequential(*(module for shape in shapes for module in (nn.Linear(*shape), nn.ReLU())))


HEADS = {
    "resnet": (lambda: named(layer1=nn.ModuleList([block(), block()]), fc=nn.Linear(8, 5)), ["fc"]),
    "vgg": (lambda: named(features=layers((8, 8)), classifier=layers((8, 8), (8, 8), (8, 5))), ["classifier.4"]),
    "mobilenet": (
        lambda: named(features=layers((8, 8)), classifier=nn.Sequential(nn.Dropout(), nn.Linear(8, 5))),
        ["classifier.1"],
    ),
    "vit": (lambda: named(blocks=nn.ModuleList([block()]), heads=named(head=nn.Linear(8, 5))), ["heads.head"]),
    "swin": (lambda: named(blocks=nn.ModuleList([block()]), head=nn.Linear(8, 5)), ["head"]),
    "roberta": (
        lambda: named(a=block(), classifier=named(dense=nn.Linear(8, 8), out=nn.Linear(8, 2))), ["classifier.out"],
    ),
    "squeezenet": (lambda: named(a=nn.Conv2d(8, 8, 3), classifier=nn.Sequential(nn.Conv2d(8, 5, 1))), ["classifier.0"]),
    "says which": (WithClassifier, ["last"]),
    "says which, and has no other": (Refuses, ["last"]),
    "a multi-layer perceptron": (lambda: named(fc1=nn.Linear(8, 8), fc2=nn.Linear(8, 5)), []),
    "a sequence": (lambda: layers((8, 8), (8, 5)), []),
    "fc alone": (lambda: named(fc=nn.Linear(8, 5)), []),
    "fc before others": (lambda: named(fc=nn.Linear(8, 8), out=nn.Linear(8, 5)), []),
    "heads of attention": (lambda: nn.ModuleList([named(head=nn.Linear(8, 8)), named(head=nn.Linear(8, 8))]), []),
    "pooling": (lambda: named(a=block(), head=Pooling()), []),
}  # fmt: skip
ROUTERS = {
    "stack": (lambda: named(gate=nn.Linear(8, 4), experts=Stack()), ["gate"]),
    "nested": (lambda: named(router=named(layer=nn.Linear(8, 4)), experts=Stack()), ["router.layer"]),
    "shared": (
        lambda: named(gate=nn.Linear(8, 4), shared_gate=nn.Linear(8, 1), shared=nn.Linear(8, 8), experts=Stack()),
        ["gate", "shared_gate"],
    ),
    "list": (
        lambda: named(gate=nn.Linear(8, 3), experts=nn.ModuleList([block(), block(), block()])),
        ["gate"],
    ),
    "as many layers as outputs": (lambda: named(layers=nn.ModuleList([block(), block()]), out=nn.Linear(8, 2)), []),
    "beside a bilinear layer": (lambda: named(a=nn.Bilinear(8, 8, 4), b=nn.Linear(8, 4)), []),
    "as many rows as an expert": (lambda: named(other=nn.Linear(8, 8), experts=Stack(4)), []),
}
OTHERS = {
    "depthwise": (lambda: named(a=nn.Conv2d(8, 8, 3, groups=8), b=nn.Conv2d(8, 8, 1)), "depthwise convolution", ["a"]),
    "depthwise, more outputs": (
        lambda: named(a=nn.Conv1d(8, 16, 3, groups=8), b=nn.Linear(8, 8)), "depthwise convolution", ["a"],
    ),
    "grouped": (lambda: named(a=nn.Conv2d(8, 8, 3, groups=4), b=nn.Conv2d(8, 8, 1)), "depthwise convolution", []),
    "one channel": (lambda: named(a=nn.Conv2d(1, 8, 3), b=nn.Linear(8, 8)), "depthwise convolution", []),
    "adapter": (
        lambda: named(
            base=nn.Linear(8, 8), lora_A=named(default=nn.Linear(8, 2)), lora_B=named(default=nn.Linear(2, 8))
        ),
        "adapter",
        ["lora_A.default", "lora_B.default"],
    ),
}  # fmt: skip
CASES = [
    *((make, "output head", expected) for make, expected in HEADS.values()),
    *((make, "router", expected) for make, expected in ROUTERS.values()),
    *OTHERS.values(),
]


@pytest.mark.parametrize(("make", "role", "expected"), CASES, ids=[*HEADS, *ROUTERS, *OTHERS])
def test_layers_are_left_dense_by_what_they_do(make, role, expected):
    model = make()
    found, skipped = select_layers(model)
    left = {skip.name: skip.reason for skip in skipped if skip.reason.startswith(role)}
    assert list(left) == expected
    assert all(reason == f"{role}; include=[{name!r}] prunes it" for name, reason in left.items())
    assert not {layer.name for layer in found} & set(expected)
    for name in expected:
        assert [layer.name for layer in select_layers(model, include=[name])[0]] == [name]


class Standardised(nn.Conv2d):
    def forward(self, x):
        return functional.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Equalised(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight * 0.1, self.bias)


class Named(nn.Linear):
    """Its forward is its own, and computes the same."""

    def forward(self, x):
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


class Adapted(nn.Linear):
    """What is added is zero at first."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.low = nn.Parameter(torch.zeros(8, 8))

    def forward(self, x):
        return super().forward(x) + x @ self.low


class Elsewhere(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Fails(nn.Linear):
    def forward(self, x):
        raise RuntimeError("only with its own inputs")


TRANSFORM = {
    "standardised": (lambda: Standardised(4, 8, 3), "Standardised does not multiply its weight as it is"),
    "equalised": (lambda: Equalised(8, 8), "Equalised does not multiply its weight as it is"),
    "adapted": (lambda: Adapted(8, 8), "the forward of Adapted may use low besides its weight"),
    "elsewhere": (lambda: Elsewhere(8, 8), "the forward of Elsewhere does not return what Linear would"),
    "fails": (lambda: Fails(8, 8), "the forward of Fails does not return what Linear would"),
}


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize(("make", "reason"), TRANSFORM.values(), ids=TRANSFORM)
def test_layers_that_transform_their_weight_are_left_alone(make, reason, method):
    model = nn.ModuleDict({"odd": make(), "usual": nn.Linear(8, 8)})
    before = model["odd"].weight.detach().clone()
    batches = None if method == "magnitude" else [torch.randn(20, 8)]
    report = prune_(model, batches, sparsity=0.5, method=method, forward=lambda model, batch: model["usual"](batch))
    assert [layer.name for layer in report.layers] == ["usual"]
    assert {skip.name: skip.reason for skip in report.skipped}["odd"] == reason
    assert torch.equal(model["odd"].weight, before)


def test_a_subclass_that_computes_the_same_is_pruned_and_random_numbers_stay():
    torch.manual_seed(0)
    expected = torch.rand(3)
    model = nn.ModuleDict({"named": Named(8, 8).half().train(), "bare": Named(8, 8, bias=False)})
    torch.manual_seed(0)
    layers, skipped = select_layers(model)
    assert [layer.name for layer in layers] == ["named", "bare"]
    assert not skipped
    assert model["named"].training
    assert torch.equal(torch.rand(3), expected)


def test_a_weight_of_zeros_cannot_be_tried():
    model = nn.ModuleDict({"odd": Named(8, 8), "usual": nn.Linear(8, 8)})
    nn.init.zeros_(model["odd"].weight)
    _, (skip,) = select_layers(model)
    assert skip.reason == "Named has a forward of its own, which cannot be tried while its weight is zero"
