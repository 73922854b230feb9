"""Scores from the gradient of a loss: the gradients are right for every kind of layer, and nothing is left behind."""

import copy
import gc
import math

import numpy as np
import pytest
import reference
import torch
from cases import FROM_LOSS, PATTERNS, loss_of
from tiny import with_tokenizer
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

from secateur import (
    NM,
    Block,
    Column,
    Fisher,
    LayerStatistics,
    Magnitude,
    Movement,
    Recipe,
    RecipeError,
    Row,
    Select,
    StatisticsError,
    Taylor,
    Unstructured,
    prune_,
)
from secateur.calibration import GRADIENTS, add_gradients, gather, load_batches, observe, quiet, replayed
from secateur.cli import app
from secateur.layers import select_layers


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Gradients, for each kind of layer


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
        self.first = nn.Conv2d(2, 4, (3, 2), padding=1)
        self.line = nn.Conv1d(4, 4, 2, groups=2)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, groups=2)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = x + 0.1 * self.line(x.flatten(2)).mean(2)[..., None, None]
        return self.up(torch.tanh(self.grouped(x)))


class Experts(nn.Module):
    """Experts in one 3-D parameter, of which each batch uses another."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 5, 6))
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        expert = int(x[0, 0] > 0)
        return self.last(torch.tanh(functional.linear(x, self.experts[expert])))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.same = nn.MultiheadAttention(8, 2, batch_first=True)
        self.other = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)

    def forward(self, x):
        x = x + self.same(x, x, x)[0]
        return self.other(x, x[..., :6], x[..., :4])[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(8, 3, batch_first=True)

    def forward(self, x):
        return self.gru(self.lstm(x)[0])[0]


class Functional(nn.Module):
    """Weights that functions multiply, without a call of a layer; one of them is stored as ``[in, out]``."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 5)
        self.turned = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        return torch.tanh(functional.linear(x, self.inner.weight)) @ self.turned


def of_transformers(name, config_name, **settings):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, config_name)(**settings)
    batches = [{"input_ids": torch.randint(3, 20, (2, 5))} for _ in range(2)]
    return getattr(transformers, name)(config), batches


_SMALL = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
KINDS = {
    "twice": lambda: (Twice(), [torch.randn(4, 6) for _ in range(3)]),
    "convolutions": lambda: (Convolutions(), [torch.randn(2, 2, 6, 6) for _ in range(2)]),
    "experts": lambda: (Experts(), [torch.ones(70, 6), 0.1 * torch.randn(70, 6) - 1]),
    "attention": lambda: (Attention(), [torch.randn(2, 3, 8) for _ in range(2)]),
    "recurrent": lambda: (Recurrent(), [torch.randn(2, 4, 5) for _ in range(2)]),
    "functional": lambda: (Functional(), [torch.randn(7, 6) for _ in range(2)]),
    "gpt2": lambda: of_transformers(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16
    ),
    "mixtral": lambda: of_transformers(
        "MixtralForCausalLM",
        "MixtralConfig",
        **_SMALL,
        num_hidden_layers=1,
        num_key_value_heads=1,
        num_local_experts=2,
        num_experts_per_tok=2,
    ),
}


def loss_of_any(output, batch):
    return loss_of(output if isinstance(output, torch.Tensor) else output.logits, batch)


def made(name):
    model, batches = KINDS[name]()
    model = model.double().eval()
    if name == "mixtral":
        model.set_experts_implementation("eager")  # the other one knows no float64
    batches = [batch.double() if isinstance(batch, torch.Tensor) else batch for batch in batches]
    with quiet(model):
        observed = observe(model, load_batches(batches, torch.device("cpu")))
    return model, batches, observed, select_layers(model, observed=observed)[0]


def loss_at(model, batch):
    with quiet(model):
        return float(loss_of_any(model(**batch) if isinstance(batch, dict) else model(batch), batch))


def gathered(model, batches, observed, layers, needs=GRADIENTS):
    with quiet(model):
        source = replayed(model, batches, layers, sequential=False)
        statistics = gather(source, 0, [], observed=observed, strict=False)
        return add_gradients(statistics, needs, model, batches, layers, loss_of_any)


@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"mixtral"}))  # it computes in float32 here and there
def test_gradients_are_those_of_the_matrix(name):
    """By a finite difference: single weights of the ``[out, in]`` matrix move, and the loss of each batch is taken."""
    model, batches, observed, layers = made(name)
    if name == "experts":
        assert [layer.name for layer in layers] == ["experts.0", "experts.1", "experts.2", "last"]
    found = gathered(model, batches, observed, layers)
    unused = {"experts.2"} if name == "experts" else set()  # no input reaches it, so nothing tells its weights apart
    assert found.keys() == {layer.name for layer in layers} - unused
    step = 1e-6
    for layer in layers:
        if layer.name in unused:
            continue
        matrix = layer.matrix().clone()
        rows, columns = matrix.shape
        statistics = found[layer.name]
        assert statistics.gradient.shape == statistics.gradient_squares.shape == matrix.shape
        for row, column in ((0, 1), (rows - 1, 0), (rows // 2, columns - 1)):
            sides = []
            for change in (step, -step):
                moved = matrix.clone()
                moved[row, column] += change
                layer.write_(moved)
                sides.append([loss_at(model, batch) for batch in batches])
            layer.write_(matrix)
            truth = (np.array(sides[0]) - np.array(sides[1])) / (2 * step)
            tolerance = {"rel": 1e-5, "abs": 1e-7}
            assert float(statistics.gradient[row, column]) == pytest.approx(truth.mean(), **tolerance), layer.name
            assert float(statistics.gradient_squares[row, column]) == pytest.approx((truth**2).mean(), **tolerance)


def test_experts_that_run_grouped_have_the_same_gradients():
    model, batches, observed, layers = made("mixtral")
    exact = gathered(model, batches, observed, layers)
    for batch in batches:
        loss_of_any(model(**batch), batch).backward()
    for layer in layers:
        torch.testing.assert_close(exact[layer.name].gradient * 2, layer.to_matrix(layer.parameter.grad))
    assert len([name for name in exact if "experts" in name]) == 4
    model.zero_grad()
    model.set_experts_implementation("grouped_mm")
    model.float()
    with quiet(model):
        observed = observe(model, load_batches(batches, torch.device("cpu")))
    found = gathered(model, batches, observed, select_layers(model, observed=observed)[0])
    assert found.keys() == exact.keys()
    for name, statistics in found.items():
        assert statistics.gradient.dtype == torch.float32
        largest = float(exact[name].gradient.abs().max())
        torch.testing.assert_close(statistics.gradient.double(), exact[name].gradient, rtol=1e-3, atol=1e-5 * largest)


# Scores


def statistics_of(gradients):
    """What is gathered of the gradients of several batches, ``[batches, out, in]``."""
    gradients = torch.as_tensor(gradients)
    return LayerStatistics(1, gradient=gradients.mean(0), gradient_squares=gradients.square().mean(0))


def random_case(rows=6, columns=20, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    return weight, torch.randn(5, rows, columns, generator=generator, dtype=dtype)


def test_scores_are_those_of_the_formulas():
    weight, gradients = random_case()
    mean, squares = gradients.mean(0).numpy(), gradients.square().mean(0).numpy()
    for importance, truth in (
        (Taylor(), reference.taylor(weight.numpy(), mean)),
        (Fisher(), reference.fisher(weight.numpy(), squares)),
        (Movement(), reference.movement(weight.numpy(), mean)),
    ):
        np.testing.assert_allclose(importance.scores(weight, statistics_of(gradients)), truth, rtol=1e-12, atol=1e-15)


def test_taylor_averages_before_the_magnitude():
    """The gradients of the first weight cancel: its score is 0, and the mean of magnitudes is 10 against 1."""
    statistics = statistics_of([[[10.0, 1.0]], [[-10.0, 1.0]]])
    assert Taylor().scores(torch.tensor([[1.0, 1.0]]), statistics).tolist() == [[0.0, 1.0]]


def test_taylor_has_the_weight():
    """By the gradient alone the first would stay."""
    statistics = statistics_of([[[2.0, 1.0]]])
    assert Taylor().scores(torch.tensor([[1.0, -3.0]]), statistics).tolist() == [[2.0, 3.0]]


def test_fisher_squares_each_batch():
    """Of the first weight, the square of the mean is 0, the mean of squares 100: it stays."""
    statistics = statistics_of([[[10.0, 1.0]], [[-10.0, 1.0]]])
    scores = Fisher().scores(torch.tensor([[1.0, 1.0]]), statistics)
    torch.testing.assert_close(scores, torch.tensor([[50.0, 0.5]], dtype=torch.float64).sqrt())


def test_fisher_has_the_square_of_the_weight():
    """``w^2 g^2`` is 9 and 8; ``|w| g^2`` would be 3 and 4, and ``g^2`` 1 and 2."""
    statistics = statistics_of([[[1.0, math.sqrt(2)]]])
    assert NM(1, 2).mask(Fisher().scores(torch.tensor([[3.0, 2.0]]), statistics)).tolist() == [[True, False]]


def test_fisher_of_a_tile_is_the_sum_of_costs():
    """Costs are 4, 4 and 6, 0: the first column stays. A sum of squared costs would be 32 and 36."""
    weight, gradients = torch.tensor([[2.0, 6**0.5], [2.0, 0.0]]), torch.full((1, 2, 2), 2**0.5)
    scores = Fisher().scores(weight, statistics_of(gradients))
    assert Column().mask(scores, 0.5).tolist() == [[True, False], [True, False]]


def test_movement_keeps_its_sign():
    """The first weight and its gradient point the same way: descent moves it to zero, and it goes, large as it is."""
    statistics = statistics_of([[[5.0, -1.0]]])
    weight = torch.tensor([[5.0, 1.0]])
    assert NM(1, 2).mask(Movement().scores(weight, statistics)).tolist() == [[False, True]]
    assert NM(1, 2).mask(Taylor().scores(weight, statistics)).tolist() == [[True, False]]


@pytest.mark.parametrize("pattern", [*PATTERNS, Block(3, 4)], ids=str)
def test_movement_ranks_units_by_the_sum_of_what_the_loss_gains(pattern):
    """So a tile with one weight of 3 and one of -2 is below one with 1 and 1."""
    weight, gradients = random_case()
    change = (-weight * gradients.mean(0)).double()
    scores = Movement().scores(weight, statistics_of(gradients))
    units = pattern.units(weight.shape)
    truth = units.elements(units.crop(change)).sum(2)
    assert torch.equal(units.scores(scores).argsort(1), truth.argsort(1))


def test_movement_tells_small_changes_apart_beside_a_large_one():
    """In float32, what is left of the small ones is lost as soon as the least is taken off."""
    statistics = statistics_of([[[1.0, -1e-9, -2e-9, -3e-9]]])
    scores = Movement().scores(torch.ones(1, 4), statistics)
    assert scores[0].argsort().tolist() == [0, 1, 2, 3]
    assert len(scores.unique()) == 4


@pytest.mark.parametrize("importance", FROM_LOSS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_scores_are_finite_wide_and_scale_with_the_loss(importance, dtype, size):
    """In float32 the squares of the largest would be infinite, and those of the least zero."""
    weight, gradients = random_case(dtype=torch.float32)
    weight[0, 0], weight[3], weight[:, 4] = 65504.0, 0, 0
    weight = weight.to(dtype).requires_grad_()
    before = weight.detach().clone()
    scores = importance.scores(weight, statistics_of(gradients * size))
    assert scores.dtype in (torch.float32, torch.float64)
    assert scores.isfinite().all()
    assert (scores >= 0).all()
    assert not scores.requires_grad
    assert torch.equal(weight, before)
    factor = math.sqrt(size) if isinstance(importance, Movement) else size
    torch.testing.assert_close(
        scores, importance.scores(weight, statistics_of(gradients)) * factor, rtol=1e-5, atol=1e-5 * factor
    )


@pytest.mark.parametrize("importance", FROM_LOSS, ids=str)
def test_what_is_missing_or_does_not_fit_is_an_error(importance):
    weight, gradients = random_case()
    with pytest.raises(StatisticsError, match="pass batches and loss"):
        importance.scores(weight, None)
    with pytest.raises(StatisticsError, match=r"'gradient(_squares)?' was not gathered"):
        importance.scores(weight, LayerStatistics(1))
    with pytest.raises(StatisticsError, match=r"does not fit a weight \(6, 20\)"):
        importance.scores(weight, statistics_of(gradients[:, :1]))


# Pruning a model


class Residual(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.up, self.down = nn.Linear(size, size + 4), nn.Linear(size + 4, size)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Chain(nn.Module):
    """Three blocks, each a stage, and a head, which is not pruned."""

    def __init__(self, size=8):
        super().__init__()
        self.blocks = nn.ModuleList(Residual(size) for _ in range(3))
        self.head = nn.Linear(size, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def chain():
    return Chain().double(), [torch.randn(5, 8, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("importance", FROM_LOSS, ids=str)
@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(2, 2), Row()], ids=str)
def test_each_stage_is_scored_on_the_model_as_pruned_so_far(importance, sequential, pattern):
    """By hand: gradients of the whole model by plain autograd, stage after stage."""
    model, batches = chain()
    truth = copy.deepcopy(model)
    sparsity = None if pattern.sparsity else 0.5
    prune_(model, batches, pattern=pattern, sparsity=sparsity, method=importance, loss=loss_of, sequential=sequential)
    modules = [[block.up, block.down] for block in truth.blocks]
    for stage in modules if sequential else [[module for block in modules for module in block]]:
        gradients = {module: [] for module in stage}
        for batch in batches:
            truth.zero_grad()
            loss_of(truth(batch), batch).backward()
            for module, found in gradients.items():
                found.append(module.weight.grad.clone())
        for module, found in gradients.items():
            scores = importance.scores(module.weight, statistics_of(torch.stack(found)))
            module.weight.data[~pattern.mask(scores, sparsity)] = 0
    for name, parameter in truth.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=0, atol=0)


def test_gradients_exist_for_one_stage_at_a_time():
    model, batches = chain()
    stages, graphs = [], []

    def statistics():
        return [one for one in gc.get_objects() if type(one) is LayerStatistics and one.gradient is not None]

    others = {id(one) for one in statistics()}

    def watching(output, batch):
        wanted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert all(parameter.grad is None for parameter in model.parameters())  # read and freed, batch by batch
        stages.append((tuple(wanted), len([one for one in statistics() if id(one) not in others])))
        return loss_of(output, batch)

    handles = [
        block.register_forward_hook(
            lambda module, args, output, number=number: graphs.append((number, output.requires_grad))
        )
        for number, block in enumerate(model.blocks)
    ]
    prune_(model, batches, sparsity=0.5, method="taylor+refit", loss=watching)
    for handle in handles:
        handle.remove()
    assert len(stages) == 9
    for number in range(3):
        names = (f"blocks.{number}.up.weight", f"blocks.{number}.down.weight")
        assert stages[3 * number : 3 * number + 3] == [(names, 0)] * 3  # those of the stage before are gone
    # While a stage learns, blocks before it keep no activations.
    rows = [graphs[place : place + 3] for place in range(len(graphs) - 2)]
    for number in range(3):
        assert [(block, block >= number) for block in range(3)] in rows


class Task(nn.Module):
    """A loss with weights of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, output, batch):
        return loss_of(output * self.scale, batch)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_the_model(fails):
    model, batches = chain()
    model.train()
    model.blocks[1].requires_grad_(False)  # frozen, and pruned all the same
    model.head.weight.grad = torch.full_like(model.head.weight, 7)
    model.blocks[0].up.weight.grad = torch.full_like(model.blocks[0].up.weight, 5)
    own = {name: parameter.grad for name, parameter in model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    inputs, task, state = copy.deepcopy(batches), Task(), torch.random.get_rng_state()
    calls = []

    def loss(output, batch):
        calls.append(batch)
        if fails and len(calls) == 5:
            raise ZeroDivisionError
        return task(output, batch)

    if fails:
        with pytest.raises(ZeroDivisionError):
            prune_(model, batches, sparsity=0.5, method="fisher", loss=loss)
    else:
        report = prune_(model, batches, sparsity=0.5, method="fisher", loss=loss)
        assert (model.blocks[1].up.weight == 0).sum() == report.layers[2].pruned == 48
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == flags[name]
        assert parameter.grad is own[name]
        assert parameter._backward_hooks is None
        assert not parameter._post_accumulate_grad_hooks
    assert (model.head.weight.grad == 7).all()
    assert (model.blocks[0].up.weight.grad == 5).all()
    assert task.scale.grad is None
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(batches, inputs, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["taylor", "fisher", "movement"])
def test_gradients_do_not_depend_on_the_mode_around(mode, method):
    model, batches = chain()
    other = copy.deepcopy(model)
    prune_(model, batches, sparsity=0.5, method=method, loss=loss_of)
    with mode():
        prune_(other, [batch.clone() for batch in batches], sparsity=0.5, method=method, loss=loss_of)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_a_loss_gets_the_batch_as_it_was_given():
    """With the label that the model does not take."""
    model, batches = chain()
    other, labels = copy.deepcopy(model), [torch.randint(3, (5,)) for _ in range(3)]
    pairs = list(zip(batches, labels, strict=True))
    report = prune_(
        model, pairs, sparsity=0.5, method="taylor", loss=lambda y, batch: functional.cross_entropy(y, batch[1])
    )
    assert "label" in report.calibration["ignored"]
    prune_(
        other,
        [(batch,) for batch in batches],
        sparsity=0.5,
        method="taylor",
        loss=lambda y, batch: functional.cross_entropy(
            y, labels[next(at for at, one in enumerate(batches) if torch.equal(one, batch[0]))]
        ),
    )
    assert torch.equal(model.blocks[2].up.weight, other.blocks[2].up.weight)


def test_a_model_that_computes_its_own_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**_SMALL, num_hidden_layers=2, max_position_embeddings=16, num_labels=3)
    model = transformers.BertForSequenceClassification(config)
    batches = [{"input_ids": torch.randint(3, 20, (4, 5)), "labels": torch.randint(3, (4,))} for _ in range(2)]
    report = prune_(model, batches, pattern="2:4", method="fisher+refit", loss=lambda output, batch: output.loss)
    assert report.sparsity == 0.5


@pytest.mark.parametrize("method", ["taylor", "fisher", "movement"])
def test_a_stack_scores_each_expert_by_its_own_gradient(method):
    """Too few inputs reached the second one, and none the third, which stays dense and is named."""
    model, batches = Experts().double(), [torch.randn(70, 6).double() / 10 - 1, torch.ones(30, 6).double()]
    report = prune_(model, batches, sparsity=0.5, method=method, loss=loss_of)
    by_name = {layer.name: layer for layer in report.layers}
    assert {"experts.0", "experts.1"} <= by_name.keys()
    assert by_name["experts.0"].notes == ()
    assert by_name["experts.1"].notes == (
        "calibrated on all inputs of its stack: only 30 reached it, and its gradient is of those alone",
    )
    assert [entry.name for entry in report.skipped if "no calibration input" in entry.reason] == ["experts.2"]
    assert (model.experts[2] != 0).all()
    report.verify(model)


def test_a_gradient_of_zero_is_told():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # no neuron is ever active
    report = prune_(model, [torch.randn(9, 4)], sparsity=0.5, method="taylor", loss=loss_of)
    assert report.layers[0].notes == (
        "the gradient of the loss is zero for all of its weights, so that their place decides",
    )


def test_layers_that_share_inputs_still_share_a_factorisation():
    statistics = LayerStatistics(1, gram=torch.eye(2))
    with_one = statistics.with_gradients(gradient=torch.ones(3, 2))
    with_one.factors["key"] = (torch.eye(2), 0.0)
    assert statistics.factors is with_one.factors
    assert statistics.gradient is None


def test_progress_never_goes_back():
    model, batches = chain()
    seen = []
    prune_(
        model,
        batches,
        sparsity=0.5,
        method="fisher",
        loss=loss_of,
        progress=lambda what, done, total: seen.append(done / total),
    )
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert len(seen) == 3 * 6 + 6


# Errors


@pytest.mark.parametrize("method", ["taylor", "fisher+refit", Select(Movement())])
def test_a_missing_loss_is_told_before_a_weight_changes(method):
    model, batches = chain()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RecipeError, match=r"method '(taylor|fisher\+refit|movement)' learns from .*\nPass loss="):
        prune_(model, batches, sparsity=0.5, method=method)
    with pytest.raises(RecipeError, match="needs calibration inputs"):
        prune_(model, None, sparsity=0.5, method=method, loss=loss_of)
    with pytest.raises(TypeError, match=r"loss must be a function .*, got Tensor.*output\.loss"):
        prune_(model, batches, sparsity=0.5, method=method, loss=torch.ones(()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_loss_that_no_method_needs_is_not_called():
    model, batches = chain()

    def never(output, batch):
        raise AssertionError

    other = copy.deepcopy(model)
    prune_(model, batches, sparsity=0.5, method="wanda", loss=never)
    prune_(other, batches, sparsity=0.5, method="wanda")
    assert torch.equal(model.head.weight, other.head.weight)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda output, batch: output, r"loss of batch 0 must be a scalar tensor, got a tensor of shape \(5, 3\)"),
        (lambda output, batch: 1.0, "must be a scalar tensor, got float"),
        (lambda output, batch: output.sum().detach(), "does not depend on the weights of the layers in any of 3"),
        (lambda output, batch: output.sum() * math.nan, "loss of batch 0 is nan"),
        (lambda output, batch: (output * 0).sqrt().sum(), "blocks.0.down: the gradients of batch 0 are NaN"),
        (
            lambda output, batch: (output * 1e200).sum(),
            "blocks.0.up: the squares or the sum of its gradients are beyond",
        ),
    ],
)
def test_losses_that_say_nothing_are_refused(loss, message):
    model, batches = chain()
    with pytest.raises(StatisticsError, match=message):
        prune_(model, batches, sparsity=0.5, method="fisher", loss=loss)


def test_a_layer_that_the_loss_does_not_depend_on_is_named():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x), self.unused(x)

    with pytest.raises(StatisticsError, match="unused: the loss does not depend on its weight in any of 1 batches"):
        prune_(
            TwoHeads(), [torch.randn(3, 4)], sparsity=0.5, method="taylor", loss=lambda output, batch: output[0].sum()
        )


def test_a_backward_pass_that_fails_is_told_with_the_batch():
    def spoiled(output, batch):
        squares = output.exp()
        loss = squares.sum()
        squares.mul_(2)
        return loss

    model, batches = chain()
    with pytest.raises(StatisticsError, match="the loss of batch 0 has no gradient: one of the variables"):
        prune_(model, batches, sparsity=0.5, method="taylor", loss=spoiled)


def test_weights_made_in_inference_mode_are_told():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(StatisticsError, match=r"0: its weight was made in torch\.inference_mode"):
        prune_(model, [torch.randn(3, 4)], sparsity=0.5, method="taylor", loss=loss_of)


def test_a_gradient_in_parts_is_refused():
    """Its squares would not add up to that of the whole."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            x = x.requires_grad_() if torch.is_grad_enabled() else x
            for _ in range(2):
                x = checkpoint(self.layer, x, use_reentrant=True) if torch.is_grad_enabled() else self.layer(x)
            return x

    with pytest.raises(
        StatisticsError, match=r"layer: the loss does not depend .*\nGive .* Re-entrant checkpointing hides"
    ):
        prune_(Parts(), [torch.randn(3, 4)], sparsity=0.5, method="fisher", loss=loss_of)


def test_an_allocation_may_need_gradients(monkeypatch):
    from secateur.pruning import _allocation

    seen = []

    def measure(layers, target):
        seen.extend(candidate.statistics.gradient for candidate in layers)
        return [None] * len(layers)

    entry = _allocation.Allocation(_allocation.ALLOCATIONS["uniform"].shares, measure, frozenset({"gradient"}))
    monkeypatch.setitem(_allocation.ALLOCATIONS, "by-loss", entry)
    model, batches = chain()
    recipe = Recipe(sparsity=0.5, method=Magnitude(), allocation="by-loss")
    with pytest.raises(RecipeError, match="the allocation 'by-loss' learns from the gradient of a loss"):
        prune_(model, batches, recipe)
    prune_(model, batches, recipe, loss=loss_of)
    assert len(seen) == 6
    assert all(gradient.any() for gradient in seen)


# Directories


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("def function(argument):\n    return argument + 1\n\n" * 200)
    return path


@pytest.mark.parametrize("method", ["taylor", "fisher+refit", "movement"])
def test_a_language_model_learns_from_its_next_tokens(tmp_path, text, method):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**_SMALL | {"vocab_size": 2048}, num_hidden_layers=2, max_position_embeddings=64)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    with_tokenizer(tmp_path / "dense")
    how = ["--sparsity", "0.5", "--method", method, "--samples", "4", "--sequence-length", "16"]
    arguments = ["prune", tmp_path / "dense", "--output", tmp_path / "out", "--calibration", text, *how]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    pruned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        weight = pruned.model.layers[1].get_submodule(name).weight
        assert int((weight == 0).sum()) == weight.numel() // 2
        assert (dense.model.layers[1].get_submodule(name).weight != 0).all()


def test_other_models_have_no_loss_of_their_own(tmp_path, text):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(**_SMALL | {"vocab_size": 2048}, num_hidden_layers=1, max_position_embeddings=64)
    transformers.BertModel(config).save_pretrained(tmp_path / "dense")
    with_tokenizer(tmp_path / "dense")
    arguments = ["prune", tmp_path / "dense", "--output", tmp_path / "out", "--calibration", text, "--sparsity", "0.5"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--method", "fisher"])
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "the method fisher learns from a loss, and only causal language models have one here" in said
    assert "--method sparsegpt, or give a loss in Python: secateur.prune_(model, batches, loss=...)" in said
    assert not (tmp_path / "out").exists()
