import copy
import math

import numpy as np
import pytest
import reference
import torch
from torch import nn
from torch.nn import functional

from secateur import LayerStatistics, PatternError, StatisticsError, shrink_
from secateur.calibration import gather_gradients, load_batches, observe, quiet
from secateur.layers import select_layers
from secateur.solvers import UnitFisher, UnitTaylor, influence


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Twice(nn.Module):
    """One linear layer that is used twice, and a frozen one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3).requires_grad_(False)

    def forward(self, x):
        return self.last(torch.tanh(self.first(torch.tanh(self.first(x)))))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, groups=2)

    def forward(self, x):
        return self.up(torch.tanh(self.grouped(functional.silu(self.norm(self.first(x))))))


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config), [{"input_ids": torch.randint(3, 20, (2, 5))} for _ in range(2)]


class Experts(nn.Module):
    """Experts in one 3-D parameter, of which each batch uses another."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 5, 6))
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        expert = int(x[0, 0] > 0)
        return self.last(torch.tanh(functional.linear(x, self.experts[expert])))


CASES = {
    "linear_twice": lambda: (Twice(), [torch.randn(4, 6) for _ in range(3)]),
    "convolutions": lambda: (Convolutions(), [torch.randn(2, 2, 6, 6) for _ in range(2)]),
    "gpt2": gpt2,
    "experts": lambda: (Experts(), [torch.ones(4, 6), -torch.ones(3, 6) + 0.1 * torch.randn(3, 6)]),
}


def loss_of(output, batch):
    found = output if isinstance(output, torch.Tensor) else output.logits
    return torch.sin(found.double()).square().sum()


def case(name):
    model, batches = CASES[name]()
    model = model.double().eval()
    batches = [batch.double() if isinstance(batch, torch.Tensor) else batch for batch in batches]
    with quiet(model):
        observed = observe(model, load_batches(batches, torch.device("cpu")))
    return model, batches, select_layers(model, observed=observed)[0]


def loss_at(model, batch):
    with quiet(model):
        output = model(**batch) if isinstance(batch, dict) else model(batch)
        return float(loss_of(output, batch))


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_a_factor_on_each_column(name):
    """By a finite difference: each column times one plus or minus a small number."""
    model, batches, layers = case(name)
    found = gather_gradients(model, batches, layers, loss_of)
    assert found.keys() == {layer.name for layer in layers}
    step = 1e-5
    for layer in layers:
        matrix = layer.matrix().clone()
        assert found[layer.name].shape == (len(batches), matrix.shape[1])
        for column in (0, matrix.shape[1] // 2, matrix.shape[1] - 1):
            sides = []
            for factor in (1 + step, 1 - step):
                scaled = matrix.clone()
                scaled[:, column] *= factor
                layer.write_(scaled)
                sides.append([loss_at(model, batch) for batch in batches])
            layer.write_(matrix)
            truth = (np.array(sides[0]) - np.array(sides[1])) / (2 * step)
            np.testing.assert_allclose(found[layer.name][:, column].numpy(), truth, rtol=1e-5, atol=1e-7)


def test_the_columns_of_a_channel_add_up_to_a_factor_on_the_channel():
    """In a grouped convolution, on that channel of each group."""
    model, batches, layers = case("convolutions")
    found = gather_gradients(model, batches, layers, loss_of)["grouped"].unflatten(1, (2, 9)).sum(2)
    for channel in range(2):
        sides = []
        for factor in (1 + 1e-5, 1 - 1e-5):

            def scale(module, args, factor=factor, channel=channel):
                factors = torch.ones(4, 1, 1, dtype=torch.float64)
                factors[[channel, channel + 2]] = factor
                return args[0] * factors

            handle = model.grouped.register_forward_pre_hook(scale)
            sides.append([loss_at(model, batch) for batch in batches])
            handle.remove()
        truth = (np.array(sides[0]) - np.array(sides[1])) / 2e-5
        np.testing.assert_allclose(found[:, channel].numpy(), truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("width", [1, 3])
def test_taylor_and_fisher_are_those_of_the_formula(width):
    gradients = torch.randn(5, 12, dtype=torch.float64)
    units = torch.arange(12).view(width, -1).T
    statistics = LayerStatistics(tokens=5, input_gradients=gradients)
    for importance, truth in ((UnitTaylor(), reference.unit_taylor), (UnitFisher(), reference.unit_fisher)):
        found = importance.scores(torch.ones(2, 12), statistics, units)
        expected = [truth(gradients.numpy(), unit) for unit in units.tolist()]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_a_head_is_scored_as_one_factor():
    """The score is the derivative by a factor on all columns of the unit together, found by a finite difference."""
    model, batches, layers = case("gpt2")
    layer = next(layer for layer in layers if layer.name.endswith("attn.c_proj"))
    gradients = gather_gradients(model, batches, layers, loss_of)[layer.name]
    statistics = LayerStatistics(tokens=20, input_gradients=gradients)
    scores = UnitFisher().scores(layer.matrix(), statistics, torch.arange(8).view(2, 4))
    matrix = layer.matrix().clone()
    for head in range(2):
        sides = []
        for factor in (1 + 1e-5, 1 - 1e-5):
            scaled = matrix.clone()
            scaled[:, head * 4 : head * 4 + 4] *= factor
            layer.write_(scaled)
            sides.append([loss_at(model, batch) for batch in batches])
        layer.write_(matrix)
        truth = sum(((a - b) / 2e-5) ** 2 for a, b in zip(*sides, strict=True))
        assert float(scores[head]) == pytest.approx(truth, rel=1e-5)


def test_the_model_is_afterwards_as_before():
    model, batches, layers = case("linear_twice")
    model.train()
    model.first.weight.grad = torch.ones_like(model.first.weight)
    state, batch_before = copy.deepcopy(model.state_dict()), copy.deepcopy(batches)
    gather_gradients(model, batches, layers, loss_of)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False, False]
    assert (model.first.weight.grad == 1).all()
    assert model.last.weight.grad is None
    assert all(torch.equal(a, b) for a, b in zip(batches, batch_before, strict=True))
    loss_of(model(batches[0]), None).backward()  # no hook is left
    assert not (model.first.weight.grad == 1).all()


def test_the_model_is_as_before_when_the_loss_fails():
    model, batches, layers = case("linear_twice")

    def fails(output, batch):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        gather_gradients(model, batches, layers, fails)
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gives_finite_sums(dtype):
    model, batches, layers = case("linear_twice")
    exact = gather_gradients(model, batches, layers, loss_of)
    found = gather_gradients(model.to(dtype), [batch.to(dtype) for batch in batches], layers, loss_of)
    for name, gradients in found.items():
        assert gradients.dtype == torch.float64
        torch.testing.assert_close(gradients, exact[name], rtol=0.1, atol=0.1 * float(exact[name].abs().max()))


def test_counts_batches():
    model, batches, layers = case("linear_twice")
    done = []
    gather_gradients(model, batches, layers, loss_of, on_batch=done.append)
    assert done == [1, 2, 3]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda output, batch: output, r"loss of batch 0 must be a scalar tensor, got a tensor of shape \(4, 3\)"),
        (lambda output, batch: 1.0, "must be a scalar tensor, got float"),
        (lambda output, batch: output.sum().detach(), "does not depend on the weights of the layers"),
        (lambda output, batch: output.sum() * math.nan, "loss of batch 0 is nan"),
        (lambda output, batch: (output * 0).sqrt().sum(), "last: the gradients of batch 0 are NaN or infinite"),
    ],
)
def test_losses_that_say_nothing_are_refused(loss, message):
    model, batches, layers = case("linear_twice")
    with pytest.raises(StatisticsError, match=message):
        gather_gradients(model, batches, layers, loss)


@pytest.mark.parametrize("method", ["taylor", "fisher"])
def test_a_loss_gets_the_label_that_the_model_does_not_take(method):
    def made():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))

    batches, labels = [torch.randn(40, 6) for _ in range(2)], [torch.randint(3, (40,)) for _ in range(2)]
    given = zip(batches, labels, strict=True)
    seen = []

    def loss(output, batch):
        seen.append(batch[1])
        return functional.cross_entropy(output, batch[1])

    report = shrink_(made(), given, keep={"channels": 0.5}, method=method, loss=loss)
    assert report.after.parameters < report.before.parameters
    assert all(torch.equal(one, other) for one, other in zip(seen, labels, strict=True))


def test_a_layer_that_the_loss_does_not_depend_on_is_named():
    model = nn.ModuleDict({"used": nn.Linear(4, 2), "unused": nn.Linear(4, 2)})
    layers, _ = select_layers(model, include=["*used"])
    with pytest.raises(StatisticsError, match="unused: the loss does not depend on its weight in any of 1 batches"):
        gather_gradients(
            model, [torch.randn(3, 4)], layers, lambda output, batch: output.sum(), lambda m, x: m["used"](x)
        )


# What a block does to its input


def test_influence_is_that_of_the_formula():
    x, y = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    real = torch.tensor([[True] * 5, [True, True, False, False, False]])
    found = influence(x, y, real)
    truth = [reference.influence(x[place].numpy(), y[place].numpy()) for place in np.ndindex(2, 5) if real[place]]
    np.testing.assert_allclose(found.numpy(), truth, rtol=1e-12)
    assert influence(x, y).shape == (10,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_influence_survives_large_and_small_values(dtype):
    x = torch.tensor([[60000.0, 60000.0, 0.0], [1e-5, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=dtype)
    y = torch.tensor([[60000.0, 60000.0, 0.0], [0.0, 1e-5, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=dtype)
    torch.testing.assert_close(influence(x, y), torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    assert float(influence(x[:1], -y[:1])) == pytest.approx(2)


def test_what_is_padding_may_be_anything():
    x = torch.randn(3, 4)
    y = x.clone()
    y[1] = math.nan
    with pytest.raises(StatisticsError, match="NaN or infinite"):
        influence(x, y)
    assert influence(x, y, torch.tensor([True, False, True])).tolist() == [0, 0]
    assert influence(x, y, torch.zeros(3, dtype=torch.bool)).shape == (0,)


def test_shapes_of_blocks_must_fit():
    with pytest.raises(PatternError, match="do not fit"):
        influence(torch.randn(2, 4), torch.randn(2, 5))
    with pytest.raises(PatternError, match="do not fit"):
        influence(torch.randn(2, 4), torch.randn(2, 4), torch.ones(4, dtype=torch.bool))
