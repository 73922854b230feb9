"""LSTM, GRU and RNN run packed, with every option and form of input, as the dense module does."""

import copy
import pickle

import pytest
import torch
from fake_timing import kernels_win, routes_take
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import secateur
from secateur import PackedLinear, SparsityError
from secateur.formats import pack
from secateur.nn import PackedRecurrent, PackedStack

IN, HIDDEN = 6, 8
KINDS = {"LSTM": (nn.LSTM, {}), "GRU": (nn.GRU, {}), "tanh": (nn.RNN, {}), "relu": (nn.RNN, {"nonlinearity": "relu"})}
OPTIONS = [
    {},
    {"num_layers": 2, "bias": False},
    {"bidirectional": True, "batch_first": True},
    {"num_layers": 3, "bidirectional": True, "dropout": 0.5},
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def made(kind, options):
    cls, own = KINDS[kind]
    dense = cls(IN, HIDDEN, **options, **own).eval()
    secateur.prune_(nn.Sequential(dense), pattern="unstructured", sparsity=0.6, method="magnitude", include=["*"])
    return dense, packed(dense)


def packed(dense, names=None):
    weights = {name: p for name, p in dense.named_parameters() if name.startswith("weight") and name in (names or name)}
    stacks = {name: PackedStack({"0": PackedLinear(pack(p.detach()))}, stacked=False) for name, p in weights.items()}
    return PackedRecurrent(dense, stacks)


def flat(value):
    if isinstance(value, PackedSequence):
        assert value.batch_sizes is not None
        return [value.data, value.batch_sizes]
    return [value] if isinstance(value, torch.Tensor) else [part for one in value for part in flat(one)]


def same(found, expected):
    assert [type(part) for part in found] == [type(part) for part in expected]
    for one, other in zip(flat(found), flat(expected), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def inputs(dense):
    """Every form of input: batched, not batched, one step, and sequences of other lengths in any order."""
    batch = torch.randn(3, 5, IN) if dense.batch_first else torch.randn(5, 3, IN)
    yield batch
    yield torch.randn(5, IN)
    yield batch[:, :1] if dense.batch_first else batch[:1]
    for lengths, enforced in (([5, 3, 3], True), ([2, 5, 4], False)):
        yield pack_padded_sequence(batch, torch.tensor(lengths), batch_first=dense.batch_first, enforce_sorted=enforced)
    yield pack_sequence([torch.randn(4, IN), torch.randn(1, IN)])


def begin(dense, x):
    batch = 3
    if isinstance(x, PackedSequence):
        batch = int(x.batch_sizes[0])
    count = dense.num_layers * (1 + dense.bidirectional)
    shape = (count, HIDDEN) if isinstance(x, torch.Tensor) and x.ndim == 2 else (count, batch, HIDDEN)
    states = torch.randn(shape), torch.randn(shape)
    return states if isinstance(dense, nn.LSTM) else states[0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_states_are_those_of_the_dense_module(kind, options):
    dense, layer = made(kind, options)
    for x in inputs(dense):
        same(layer(x), dense(x))
        hx = begin(dense, x)
        same(layer(x, hx), dense(x, hx))
        same(layer(input=x, hx=hx), dense(input=x, hx=hx))


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_may_stay_dense(kind):
    dense, _ = made(kind, {"num_layers": 2})
    layer, x = packed(dense, ["weight_hh_l0", "weight_ih_l1"]), torch.randn(5, 3, IN)
    assert [name for name, p in layer.named_parameters() if "weight" in name] == ["weight_ih_l0", "weight_hh_l1"]
    same(layer(x), dense(x))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_attributes_of_the_dense_module_and_becomes_it_again(kind, options):
    dense, layer = made(kind, options)
    for name in ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional",
                 "proj_size", "training"):  # fmt: skip
        assert getattr(layer, name) == getattr(dense, name)
    layer.flatten_parameters()
    for own, expected in zip(layer.all_weights, dense.all_weights, strict=True):
        assert all(torch.equal(torch.as_tensor(one + 0), other) for one, other in zip(own, expected, strict=True))
    again, x = layer.to_dense(), torch.randn(4, 2, IN)
    assert type(again) is type(dense)
    assert again.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in again.state_dict().items())
    same(again(x), dense(x))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_copied_pickled_loaded_and_converted(kind):
    _, layer = made(kind, {"num_layers": 2, "bidirectional": True})
    x = torch.randn(5, 3, IN)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        same(other(x), expected)
    _, other = made(kind, {"num_layers": 2, "bidirectional": True})
    other.load_state_dict(layer.state_dict())
    same(other(x), expected)
    half = copy.deepcopy(layer).to(torch.bfloat16)(x.bfloat16())
    assert {part.dtype for part in flat(half)} == {torch.bfloat16}
    torch.testing.assert_close(half[0].float(), expected[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_input_the_states_and_the_biases(kind):
    dense, layer = made(kind, {"num_layers": 2, "bidirectional": True})
    found = []
    for module in (dense.train(), copy.deepcopy(layer).train()):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(4, 2, IN, generator=generator, requires_grad=True)
        hx = [torch.randn(4, 2, HIDDEN, generator=generator, requires_grad=True) for _ in range(2)]
        module(x, tuple(hx) if kind == "LSTM" else hx[0])[0].square().sum().backward()
        found.append([x.grad, hx[0].grad, *(p.grad for name, p in module.named_parameters() if "bias" in name)])
    for own, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-4)


def test_dropout_acts_between_layers_in_training_alone():
    _, layer = made("LSTM", {"num_layers": 2, "dropout": 0.5})
    x = torch.randn(5, 3, IN)
    assert torch.equal(layer(x)[0], layer(x)[0])
    layer.train()
    assert not torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_other_sizes_are_refused_as_by_the_dense_module(kind):
    dense, layer = made(kind, {})
    wrong = [(torch.randn(5, 3, IN + 1),), (torch.randn(5, 3, 2, IN),), (torch.randn(5, 3, IN).double(),)]
    state = torch.randn(1, 4, HIDDEN)
    wrong.append((torch.randn(5, 3, IN), (state, state) if kind == "LSTM" else state))
    wrong.append((torch.randn(5, 3, IN), (state[0], state[0]) if kind == "LSTM" else state[0]))
    for args in wrong:
        with pytest.raises((RuntimeError, ValueError)) as expected:
            dense(*args)
        with pytest.raises(expected.type):
            layer(*args)


def test_what_no_packed_module_can_be_is_refused():
    with pytest.raises(SparsityError, match="proj_size=3"):
        PackedRecurrent(nn.LSTM(IN, HIDDEN, proj_size=3))
    stack = PackedStack({"0": PackedLinear(pack(torch.randn(4, 4)))}, stacked=False)
    with pytest.raises(SparsityError, match=r"'weight_hh_l0' of the shape \[4, 4\]"):
        PackedRecurrent(nn.LSTM(IN, HIDDEN), {"weight_hh_l0": stack})
    with pytest.raises(SparsityError, match="has none there"):
        PackedRecurrent(nn.LSTM(IN, HIDDEN), {"weight": stack})


class Tagger(nn.Module):
    def __init__(self, kind, options):
        super().__init__()
        cls, own = KINDS[kind]
        self.body, self.head = cls(IN, HIDDEN, **options, **own), nn.Linear(HIDDEN * (1 + self.is_both(options)), 4)

    @staticmethod
    def is_both(options):
        return options.get("bidirectional", False)

    def forward(self, x):
        return self.head(self.body(x)[0])


def tagger(kind, options):
    model = Tagger(kind, options).eval()
    secateur.prune_(model, sparsity=0.5, method="magnitude")
    return model


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_a_recurrent_module_is_packed_saved_loaded_and_unpacked(kind, options, monkeypatch, tmp_path):
    kernels_win(monkeypatch)
    model = tagger(kind, options)
    x = torch.randn(5, 3, IN)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    report = secateur.pack_(model, batch_sizes=[1, 2])
    entry = next(layer for layer in report.layers if layer.name == "body")
    assert entry.packed
    assert entry.matrices == sum("weight" in name for name in state if name.startswith("body"))
    assert isinstance(model.body, PackedRecurrent)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    again = secateur.pack_(model, batch_sizes=[1])
    assert [layer.name for layer in again.layers if layer.packed] == [
        "body",
        *(["head"] if len(again.layers) > 1 else []),
    ]
    packed_output = model(x)
    path = tmp_path / "tagger.sparse.safetensors"
    secateur.save(model, path)
    for into in (Tagger(kind, options).eval(), copy.deepcopy(model)):
        loaded = secateur.load(path, into=into)
        assert isinstance(loaded.body, PackedRecurrent)
        assert torch.equal(loaded(x), packed_output)
    dense = secateur.load(path, into=Tagger(kind, options).eval(), dense=True)
    secateur.unpack_(model)
    for restored in (dense, model):
        assert type(restored.body) is KINDS[kind][0]
        assert restored.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in restored.state_dict().items())


def test_a_recurrent_module_that_would_not_gain_stays_dense_with_the_reason(monkeypatch):
    routes_take(monkeypatch, lambda name, index: 1.0)
    model = tagger("LSTM", {})
    report = secateur.pack_(model, batch_sizes=[1])
    assert type(model.body) is nn.LSTM
    assert next(layer for layer in report.layers if layer.name == "body").reason.startswith("no route is faster")


def test_recurrent_modules_that_cannot_run_packed_are_skipped_with_the_reason(monkeypatch):
    kernels_win(monkeypatch)

    class Own(nn.LSTM):
        pass

    model = nn.ModuleDict({
        "projected": nn.LSTM(IN, HIDDEN, proj_size=3), "own": Own(IN, HIDDEN), "hooked": nn.LSTM(IN, HIDDEN),
        "dense": nn.LSTM(IN, HIDDEN), "usual": nn.LSTM(IN, HIDDEN),
    })  # fmt: skip
    secateur.prune_(model, sparsity=0.5, method="magnitude", exclude=["dense.*"])
    model["hooked"].register_forward_hook(lambda *_: None)
    report = secateur.pack_(model, batch_sizes=[1])
    assert [layer.name for layer in report.layers] == ["usual"]
    reasons = {skip.name: skip.reason for skip in report.skipped}
    assert "proj_size" in reasons["projected"]
    assert "not Own" in reasons["own"]
    assert "hooks" in reasons["hooked"]
    assert reasons["dense"] == "no zeros"
