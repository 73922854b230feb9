import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import secateur
from secateur import PatternError, RecipeError, SparseConv2d, SparseLinear, densify_, sparsify_


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 16, bias=False))
        self.norm = nn.LayerNorm(16)
        self.classifier = nn.Linear(16, 3)

    def forward(self, x):
        hidden = self.stem(x).flatten(1)
        return self.classifier(self.norm(self.body(hidden)))


def snapshot(model):
    """Which objects hang where, and their values."""
    modules = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    return modules, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    modules, state = snapshot(model)
    assert modules == before[0]
    assert state.keys() == before[1].keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in before[1].items())


def batch():
    return torch.randn(8, 1, 3, 3), torch.randint(0, 3, (8,))


def train(model, optimizer, steps):
    x, y = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


# Which layers


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        ({}, ["stem", "body.0", "body.2"]),
        ({"include": ["classifier"]}, ["classifier"]),
        ({"include": ["body.*", "classifier"]}, ["body.0", "body.2", "classifier"]),
        ({"include": ("body.*",), "exclude": ("body.0",)}, ["body.2"]),
        ({"exclude": ["stem"]}, ["body.0", "body.2"]),
    ],
    ids=str,
)
def test_layers_are_chosen_by_name(selection, names):
    model = Network()
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    made = sparsify_(model, **selection)
    assert list(made) == names
    for name, module in model.named_modules():
        assert isinstance(module, SparseLinear | SparseConv2d) == (name in names)
        if name in names:
            assert made[name] is module
    now = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert parameters.items() <= now.items()  # same names, same objects
    assert now.keys() - parameters.keys() == {f"{name}.threshold" for name in names}
    assert model(batch()[0]).shape == (8, 3)


def test_options_reach_every_layer():
    model = Network()
    for layer in sparsify_(model, structured=False, temperature=7.0, threshold=0.2, hard=True).values():
        assert layer.threshold.shape == layer.weight.shape
        assert (layer.threshold == 0.2).all()
        assert float(layer.temperature) == 7
        assert layer.hard
    model = Network().eval()
    for layer in sparsify_(model, pattern="column", sparsity=0.5, exclude=["stem"]).values():
        assert str(layer.pattern) == "column"
        assert layer.target == 0.5
        assert not layer.training
    layer = sparsify_(Network(), pattern="column", sparsity=0.5, include=["stem"])["stem"]
    assert str(layer.pattern) == "column:9"


def test_a_module_used_twice_is_replaced_in_both_places():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    made = sparsify_(model)
    assert list(made) == ["a"]
    assert model["a"] is model["b"][0] is made["a"]
    assert densify_(model) == ["a"]
    assert type(model["a"]) is nn.Linear
    assert model["a"] is model["b"][0]
    assert model["a"].weight is shared.weight


def tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))
    model[2].weight = model[0].weight
    return model


def test_tied_weights_learn_one_mask_under_a_pattern():
    model = tied()
    made = sparsify_(model, pattern="2:4")
    assert list(made) == ["0", "2", "3"]
    assert made["0"].weight is made["2"].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        for layer in made.values():
            layer.solve_threshold()
    expected = made["0"].effective_weight()
    assert torch.equal(made["2"].effective_weight(), expected)
    for layer in made.values():
        layer.hard_prune(optimizer)
    assert torch.equal(made["0"].mask, made["2"].mask)
    assert torch.equal(made["0"].weight, expected)
    densify_(model)
    assert model[0].weight is model[2].weight
    assert torch.equal(model[2].weight, expected)


def test_tied_weights_are_left_alone_without_a_pattern():
    """Each would have its own thresholds, and pruning the one would not prune the other."""
    model = tied()
    assert list(sparsify_(model)) == ["3"]
    model = tied()
    before = snapshot(model)
    with pytest.raises(RecipeError, match="0: shares its weight with '2', so it needs a pattern: one mask for both"):
        sparsify_(model, include=["0", "2"])
    assert_unchanged(model, before)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.layer = nn.Linear(8, 8)
        self.out = nn.Linear(8, 10, bias=False)
        self.out.weight = self.embedding.weight


def test_layers_tied_to_an_embedding_wait_until_they_are_named():
    model = Tied()
    assert list(sparsify_(model)) == ["layer"]
    model = Tied()
    assert list(sparsify_(model, include=["out"])) == ["out"]
    assert model.out.weight is model.embedding.weight


def hooked(register):
    layer = nn.Linear(4, 4)
    getattr(layer, register)(lambda *arguments: None)
    return nn.Sequential(layer)


def with_own_forward():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = lambda x: x
    return model


class Special(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("model", "include", "reason"),
    [
        (nn.Linear(4, 4), "", "a bare layer cannot be replaced in place; build the sparse layer with from_linear"),
        (nn.Sequential(Special(4, 4)), "0", "have a counterpart that learns its mask, not Special"),
        (nn.Sequential(nn.Conv1d(4, 4, 3)), "0", "have a counterpart that learns its mask, not Conv1d"),
        (hooked("register_forward_hook"), "0", "it has hooks, which a replacement would lose"),
        (hooked("register_forward_pre_hook"), "0", "it has hooks, which a replacement would lose"),
        (hooked("register_full_backward_hook"), "0", "it has hooks, which a replacement would lose"),
        (hooked("register_full_backward_pre_hook"), "0", "it has hooks, which a replacement would lose"),
        (with_own_forward(), "0", "its forward was replaced on the object"),
        (
            nn.TransformerEncoderLayer(8, 2, 16),
            "linear1",
            "nn.TransformerEncoderLayer reads its weight without calling it",
        ),
        (nn.MultiheadAttention(8, 2), "out_proj", "nn.MultiheadAttention reads its weight without calling it"),
        (
            nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))),
            "0",
            "its weight is computed by _WeightNorm",
        ),
        (nn.Sequential(SparseLinear(4, 4)), "0", "SparseLinear is no known kind of layer"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_layers_that_cannot_be_replaced_say_why(model, include, reason):
    before = snapshot(model)
    for names in ([], [include]):
        with pytest.raises(RecipeError, match=reason):
            sparsify_(model, include=names)
    assert_unchanged(model, before)


def test_layers_that_cannot_be_replaced_stay_beside_those_that_can():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 8), encoder, nn.Linear(8, 4), hooked("register_forward_hook"))
    assert list(sparsify_(model)) == ["0", "2"]
    assert model.eval()(torch.randn(2, 3, 4)).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.ReLU()), "has no layer"),
        (nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), "has no layer"),
        (nn.Sequential(nn.Conv1d(4, 4, 3)), "no layer that can learn its mask. Its modules with parameters:\n  0 "),
    ],
)
def test_a_model_with_nothing_to_sparsify(model, message):
    with pytest.raises(RecipeError, match=message):
        sparsify_(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pattern": "2:4"}, PatternError, "stem: 2:4 needs an input size that is a multiple of 4, got 9"),
        (
            {"pattern": "block:5x4", "sparsity": 0.5, "exclude": ["stem"]},
            PatternError,
            "body.0: block:5x4 needs an output size that is a multiple of 5, got 16",
        ),
        ({"pattern": "row", "sparsity": 1.5}, PatternError, "^sparsity is the fraction .* got 1.5"),
        ({"pattern": "row", "sparsity": -0.1}, PatternError, "between 0 and 1, got -0.1"),
        ({"pattern": "row", "sparsity": math.nan}, PatternError, "between 0 and 1, got nan"),
        ({"pattern": "row", "sparsity": 90}, PatternError, "Did you mean 0.9?"),
        ({"pattern": "row", "sparsity": "half"}, TypeError, "sparsity must be a number, got str"),
        ({"pattern": "row"}, PatternError, "row fits any sparsity"),
        ({"sparsity": 0.5}, PatternError, "needs a pattern"),
        ({"pattern": "diagonal", "sparsity": 0.5}, PatternError, "'diagonal' names no pattern"),
        ({"pattern": 24}, TypeError, "pattern must be a SparsityPattern or its text, got int"),
        (
            {"structured": False, "pattern": "row", "sparsity": 0.5},
            PatternError,
            "one learned threshold for each weight",
        ),
        ({"temperature": -1}, RecipeError, "^temperature must be above 0, got -1"),
        ({"include": ["nothing.*"]}, RecipeError, r"'nothing.\*' matches none"),
        ({"exclude": ["nothing"]}, RecipeError, "'nothing' matches none"),
        ({"exclude": ["*"]}, RecipeError, "no layer"),
    ],
    ids=str,
)
def test_errors_leave_the_model_as_it_was(options, error, message):
    model = Network()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        sparsify_(model, **options)
    assert_unchanged(model, before)


def test_weights_that_cannot_be_scored_are_named():
    model = Network()
    with torch.no_grad():
        model.body[2].weight[0, 0] = math.nan
    modules = snapshot(model)[0]
    with pytest.raises(RecipeError, match=r"body.2: 1 of its weights are NaN or infinite"):
        sparsify_(model, pattern="row", sparsity=0.5)
    assert snapshot(model)[0] == modules


# And back


@pytest.mark.parametrize(
    "options",
    [{"threshold": 0.1}, {"pattern": "unstructured", "sparsity": 0.9}, {"pattern": "row", "sparsity": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("prune", [True, False])
def test_densify_leaves_plain_modules_with_zeros(options, prune):
    model = Network()
    kinds = {name: type(module) for name, module in model.named_modules()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    made = sparsify_(model, **options)
    if "pattern" not in options:
        optimizer.add_param_group({"params": [layer.threshold for layer in made.values()]})
    train(model, optimizer, 3)
    for layer in made.values():
        if layer.pattern is not None:
            layer.solve_threshold()
        if prune:
            layer.hard_prune(optimizer)
    train(model, optimizer, 2 if prune else 0)
    effective = {name: layer.effective_weight() for name, layer in made.items()}
    active = {name: layer.num_active() for name, layer in made.items()}
    x, _ = batch()
    pruned = model(x)

    assert densify_(model) == ["stem", "body.0", "body.2"]
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    for name, weight in effective.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
        assert int(weight.count_nonzero()) == active[name] < weight.numel()
        if "pattern" in options:
            pattern = secateur.SparsityPattern.parse(options["pattern"])
            matrix = weight.flatten(1)
            assert int((weight == 0).sum()) == pattern.num_pruned(matrix.shape, options["sparsity"])
    if prune:
        assert torch.equal(model(x), pruned)
    fresh = Network()
    assert fresh.load_state_dict(model.state_dict()) == ([], [])
    assert densify_(model) == []


def test_parameters_stay_in_the_optimizer():
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 2)
    sparsify_(model, pattern="unstructured", sparsity=0.5)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 1)
    densify_(model)
    weights = {id(parameter) for parameter in model.parameters()}
    assert (
        weights == {id(parameter) for parameter in optimizer.param_groups[0]["params"]} == set(map(id, optimizer.state))
    )
    for name in ("stem.weight", "body.0.weight", "body.2.weight", "classifier.weight"):
        assert not torch.equal(model.state_dict()[name], before[name])
    middle = model.stem.weight.detach().clone()
    train(model, optimizer, 1)
    assert not torch.equal(model.stem.weight, middle)


def test_densify_meets_the_budget_even_if_the_threshold_is_stale():
    model = Network()
    sparsify_(model, pattern="unstructured", sparsity=0.75)
    with torch.no_grad():
        model.body[0].weight.normal_()
    densify_(model)
    assert int((model.body[0].weight == 0).sum()) == 0.75 * 36 * 16


def test_densify_of_a_bare_layer_is_refused():
    layer = SparseLinear(8, 4, threshold=0.1)
    before = snapshot(layer)
    with pytest.raises(RecipeError, match="a bare layer cannot be replaced in place: its to_linear or to_conv2d"):
        densify_(layer)
    assert_unchanged(layer, before)


def test_the_whole_way_of_a_larger_model():
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10))
    made = sparsify_(model, pattern="2:4", exclude=["4"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = torch.randn(32, 256), torch.randint(0, 10, (32,))
    losses = []
    for step in range(8):
        if step == 5:
            for layer in made.values():
                layer.hard_prune(optimizer)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        if step < 5:
            for layer in made.values():
                layer.solve_threshold()
    assert losses[4] < losses[0]
    assert losses[7] < losses[5]
    densify_(model)
    for index in (0, 2):
        kept = model[index].weight.unflatten(1, (-1, 4)).count_nonzero(2)
        assert (kept == 2).all()
