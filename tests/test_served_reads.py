"""Layers that learn a mask and are read instead of called: the mask acts there, too."""

import copy
import pickle

import pytest
import torch
from read_cases import IN, OUT, CallsAndReads, ReadsACopy, ReadsFromTheLeft, ReadsWeight
from torch import nn
from torch.nn import functional

import secateur
from secateur import SparseTraining
from secateur.training import METHODS

LEARN = [method for method in METHODS if METHODS[method]().learns]
READERS = [ReadsWeight, ReadsFromTheLeft, ReadsACopy, CallsAndReads]


class ReadByTheModel(nn.Module):
    """The outermost module reads a layer deep inside."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Sequential(nn.Linear(IN, OUT)), nn.Linear(OUT, IN))

    def forward(self, x):
        deep = self.inner[0][0]
        return self.inner[1](functional.linear(x, deep.weight, deep.bias))


class ReadsAttention(nn.Module):
    """As attention with relative positions does: the weights of layers are handed to PyTorch's own function."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(IN, IN) for _ in range(4))

    def forward(self, x):
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        x = x.transpose(0, 1)
        y, _ = functional.multi_head_attention_forward(
            x, x, x, IN, 2, torch.empty(0), bias, None, None, False, 0.0, self.o.weight, self.o.bias,
            use_separate_proj_weight=True, q_proj_weight=self.q.weight, k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight, need_weights=False,
        )  # fmt: skip
        return y.transpose(0, 1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def trained(model, method, steps=6, total=6):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    training = SparseTraining(model, optimizer, method=method, sparsity=0.5, steps=total)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 5, IN)).square().mean().backward()
        optimizer.step()
        training.step()
    return training


@pytest.mark.parametrize("method", LEARN)
@pytest.mark.parametrize("kind", [*READERS, ReadByTheModel, ReadsAttention])
def test_the_mask_acts_on_what_is_read(kind, method):
    model, x = kind(), torch.randn(3, 5, IN)
    training = trained(model, method)
    learned = {name: layer.hard_mask() for name, layer in secateur.nn.sparse_layers(model).items()}
    before = model(x)
    report = training.finalize()
    assert {layer.name for layer in report.layers} == learned.keys()
    torch.testing.assert_close(model(x), before)
    for name, mask in learned.items():
        assert torch.equal(model.get_submodule(name).weight != 0, mask)
        assert int((~mask).sum()) == mask.numel() // 2


@pytest.mark.parametrize("method", LEARN)
def test_what_is_read_has_the_gradient_of_what_is_called(method):
    """Two models with the same weights, one that calls its layer and one that reads it, are trained alike."""

    class Calls(ReadsWeight):
        def forward(self, x):
            return x + self.proj(self.qkv(x))

    reads, calls = ReadsWeight(), Calls()
    calls.load_state_dict(reads.state_dict())
    for model in (reads, calls):
        torch.manual_seed(1)
        model(torch.zeros(1, 1, IN))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        training = SparseTraining(model, optimizer, method=method, sparsity=0.5, steps=6)
        with torch.no_grad():
            model(torch.zeros(1, 1, IN))  # the pass that shows what is read
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(4, 5, IN)).square().mean().backward()
            optimizer.step()
            training.step()
        training.finalize()
    for one, other in zip(reads.parameters(), calls.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", [*READERS, ReadByTheModel])
def test_the_parameter_stays_what_everybody_else_sees(kind):
    model = kind()
    training = trained(model, "gate", steps=2)
    for layer in secateur.nn.sparse_layers(model).values():
        assert isinstance(layer.weight, nn.Parameter)
        assert layer.weight is layer._parameters["weight"]
        assert layer.weight.grad is not None
    training.finalize()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_whose_layers_are_called_has_no_hooks_after_its_first_pass():
    model = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, IN))
    trained(model, "gate", steps=1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("when", ["before the first pass", "later"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_serve_what_was_found_out_before(way, when):
    model, x = ReadsWeight(), torch.randn(3, 5, IN)
    training = trained(model, "gate", steps=0 if when.startswith("before") else 4)
    made = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(made(x), model(x))
    if when == "later":
        torch.testing.assert_close(made(x), model(x))
        with torch.no_grad():
            made.qkv.weight.zero_()  # of the copy alone
        assert not torch.allclose(made(x), model(x))
    training.finalize()
    made(x)


def test_an_error_in_a_pass_leaves_nothing_on():
    class Fails(ReadsWeight):
        fails = True

        def forward(self, x):
            y = super().forward(x)
            if self.fails:
                raise RuntimeError("as asked")
            return y

    model = Fails()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    training = SparseTraining(model, optimizer, method="gate", sparsity=0.5, steps=4)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="as asked"):
            model(torch.randn(2, 3, IN))
    assert isinstance(model.qkv.weight, nn.Parameter)
    model.fails = False
    model(torch.randn(2, 3, IN))
    training.finalize()


@pytest.mark.parametrize("kind", [ReadsWeight, ReadByTheModel, ReadsAttention])
def test_a_run_that_is_resumed_goes_on_to_the_bit(kind):
    def make(seed):
        torch.manual_seed(seed)
        model = kind()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        return model, optimizer, SparseTraining(model, optimizer, method="gate", sparsity=0.5, steps=8)

    def run(model, optimizer, training, steps):
        for step in steps:
            optimizer.zero_grad()
            x = torch.randn(4, 5, IN, generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            training.step()

    whole, resumed = make(0), make(1)
    run(*whole, range(3))
    for one, other in zip(resumed, whole, strict=True):
        one.load_state_dict(copy.deepcopy(other.state_dict()))
    run(*whole, range(3, 8))
    run(*resumed, range(3, 8))
    for one, other in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reads", [{"": "qkv"}, {"gone": ["qkv"]}, {"": ["gone"]}, {1: ["qkv"]}, [], {"": [None]}])
def test_a_state_that_names_what_is_not_there_is_refused(reads):
    model = ReadsWeight()
    training = trained(model, "gate", steps=2)
    state = training.state_dict()
    assert state["reads"] == {"": ["qkv"]}
    with pytest.raises(secateur.FormatError, match="Restore the checkpoint"):
        training.load_state_dict(state | {"reads": reads})
