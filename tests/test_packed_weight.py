"""A packed weight is a tensor: products run packed, its shape costs nothing, and all else computes on the dense one."""

import copy
import pickle

import numpy as np
import pytest
import torch
from fake_timing import kernels_win
from torch import nn
from torch.nn import functional

import secateur
from secateur import PackedLinear, SparsityError
from secateur.formats import Bitmask, pack
from secateur.nn import PackedStack, PackedWeight

OUT, IN, COUNT = 12, 8, 5


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sparse(*shape):
    weight = torch.randn(*shape)
    return weight.masked_fill(torch.rand(*shape) < 0.6, 0)


@pytest.fixture
def dense():
    return sparse(OUT, IN)


@pytest.fixture
def layer(dense):
    return PackedLinear(Bitmask.from_dense(dense), torch.randn(OUT))


def stack_of(weight, **options):
    parts = {str(index): PackedLinear(pack(matrix)) for index, matrix in enumerate(weight)}
    return PackedStack(parts, **options)


@pytest.fixture
def not_unpacked(monkeypatch):
    monkeypatch.setattr(PackedLinear, "matrix", None)


x, columns = torch.randn(3, IN), torch.randn(IN, 4)
PRODUCTS = {
    "linear": lambda w: functional.linear(x, w),
    "linear with bias": lambda w: functional.linear(x, w, torch.ones(OUT)),
    "by keyword": lambda w: functional.linear(input=x, weight=w, bias=torch.ones(OUT)),
    "of one row": lambda w: functional.linear(x[0], w),
    "of no row": lambda w: functional.linear(x[:0], w),
    "of more dimensions": lambda w: functional.linear(x.expand(2, 2, 3, IN), w),
    "x @ w.T": lambda w: x @ w.T,
    "x @ w.mT": lambda w: x @ w.mT,
    "x @ w.t()": lambda w: x @ w.t(),
    "torch.t": lambda w: torch.matmul(x, torch.t(w)),
    "transpose": lambda w: torch.mm(x, w.transpose(0, 1)),
    "permute": lambda w: x.matmul(w.permute(1, 0)),
    "there and back": lambda w: functional.linear(x, w.T.T.swapaxes(0, -1).mT),
    "w @ columns": lambda w: w @ columns,
    "w @ vector": lambda w: w @ columns[:, 0],
    "w @ batch": lambda w: w @ columns.expand(2, IN, 4),
    "mv": lambda w: torch.mv(w, columns[:, 0]),
    "w.mm": lambda w: w.mm(columns),
    "rmatmul": lambda w: w.T.__rmatmul__(x),
    "addmm": lambda w: torch.addmm(torch.ones(OUT), x, w.T),
    "addmm with factors": lambda w: torch.addmm(torch.ones(3, OUT), x, w.T, beta=2, alpha=0.5),
    "einsum": lambda w: torch.einsum("bi,oi->bo", x, w),
    "einsum turned": lambda w: torch.einsum("oi,bi->ob", w, x),
    "einsum of more": lambda w: torch.einsum("abi,oi->boa", x.expand(2, 3, IN), w),
    "detached": lambda w: functional.linear(x, w.detach().data.contiguous()),
    "of the same dtype": lambda w: functional.linear(x, w.to(torch.float32).to(x.dtype).float()),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_run_packed(name, layer, dense, not_unpacked):
    product = PRODUCTS[name]
    expected, found = product(dense), product(layer.weight)
    assert type(found) is torch.Tensor
    assert found.is_contiguous() == expected.is_contiguous() or "einsum" in name
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


batch, mixed = torch.randn(COUNT, 3, IN), torch.tensor([3, 0, 3, 1])
ends = torch.tensor([2, 2, 5, 6, 9], dtype=torch.int32)
rows = torch.randn(9, IN)
STACKED = {
    "linear of one": lambda w: functional.linear(x, w[2]),
    "of the last": lambda w: functional.linear(x, w[-1]),
    "of a tensor's": lambda w: functional.linear(x, w[torch.tensor(3)]),
    "of NumPy's": lambda w: functional.linear(x, w[np.int64(3)]),
    "select": lambda w: functional.linear(x, w.select(0, 1)),
    "unbind": lambda w: functional.linear(x, w.unbind(0)[4]),
    "iterate": lambda w: torch.stack([functional.linear(x, one) for one in w]),
    "chunk": lambda w: functional.linear(x, w.chunk(COUNT)[1].squeeze(0)),
    "split": lambda w: x @ w.split([2, 3])[1].mT,
    "narrow": lambda w: x @ w.narrow(0, 1, 2).mT,
    "slice": lambda w: x @ w[1:4].mT,
    "bmm": lambda w: torch.bmm(batch, w.transpose(1, 2)),
    "bmm from the left": lambda w: torch.bmm(w, batch.mT),
    "matmul of all": lambda w: torch.matmul(x, w.mT),
    "matmul of one for all": lambda w: torch.matmul(x[None], w.mT),
    "baddbmm": lambda w: torch.baddbmm(torch.ones(COUNT, 1, OUT), batch, w.mT),
    "selected": lambda w: torch.bmm(w[mixed], batch[:4].mT),
    "index_select": lambda w: torch.bmm(batch[:4], w.index_select(0, mixed).mT),
    "selected by a list": lambda w: torch.bmm(batch[:4], w[mixed.tolist()].mT),
    "grouped": lambda w: functional.grouped_mm(rows, w.mT, offs=ends),
    "grouped of a batch": lambda w: functional.grouped_mm(batch, w.mT),
    "einsum": lambda w: torch.einsum("eti,eoi->eto", batch, w),
    "einsum of all": lambda w: torch.einsum("ti,eoi->teo", x, w),
    "einsum of more": lambda w: torch.einsum("tebi,eoi->boet", batch.transpose(0, 1)[:, :, None], w),
    "view as rows": lambda w: functional.linear(x, w.reshape(COUNT * OUT, IN)),
    "there and back": lambda w: functional.linear(x, w.view(-1, IN).view(COUNT, OUT, IN)[3]),
}


@pytest.mark.parametrize("form", ["stack", "transposed"])
@pytest.mark.parametrize("name", STACKED)
def test_products_of_stacks_run_packed(name, form, not_unpacked):
    dense, product = sparse(COUNT, OUT, IN), STACKED[name]
    if form == "stack":
        expected, found = product(dense), product(stack_of(dense))
    elif "view" in name or "back" in name:
        return  # rows of the one are no rows of the other
    else:  # the parameter is [count, in, out], and code turns it
        turned = stack_of(dense, transposed=True)
        assert turned.shape == (COUNT, IN, OUT)
        expected, found = product(dense), product(turned.mT)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", [False, True])
def test_only_matrices_that_inputs_reach_are_multiplied(gradient, monkeypatch):
    dense = sparse(COUNT, OUT, IN)
    stack, sizes = stack_of(dense), []
    product = PackedLinear.product
    monkeypatch.setattr(PackedLinear, "product", lambda self, x, bias=None: sizes.append(len(x)) or product(self, x))
    given = torch.zeros(COUNT, 6, IN)
    given[1], given[3, 2] = torch.randn(6, IN), torch.randn(IN)
    given.requires_grad_(gradient)
    found = torch.bmm(given, stack.mT)
    torch.testing.assert_close(found, torch.bmm(given, dense.mT), rtol=1e-5, atol=1e-5)
    assert sizes == ([1] * COUNT if gradient else [6, 1])  # a gradient needs all; each is one batch of 6 then
    sizes.clear()
    functional.grouped_mm(rows, stack.mT, offs=ends)
    assert sizes == [2, 3, 1, 3]


OTHERS = {
    "==": lambda w: w == 0,
    "+": lambda w: w + 1,
    "1 +": lambda w: 1 + w,
    "-": lambda w: -w,
    "abs": lambda w: w.abs().sum(),
    "norm": torch.linalg.vector_norm,
    "clone": lambda w: w.clone(),
    "double": lambda w: w.double(),
    "a part of a row": lambda w: w[2:5, 1:3],
    "a row": lambda w: w[0],
    "cat": lambda w: torch.cat([w, w]),
    "stack": lambda w: torch.stack([w, w]),
    "numpy": lambda w: torch.from_numpy(w.numpy()),
    "asarray": lambda w: torch.from_numpy(np.asarray(w)),
    "tolist": lambda w: torch.tensor(w.tolist()),
    "flatten": lambda w: w.flatten(),
    "a float64 product": lambda w: functional.linear(x.double(), w.double()),
    "x @ w of another side": lambda w: torch.ones(1, len(w)) @ w,
    "where": lambda w: torch.where(w > 0, w, 0.0),
    "outer": lambda w: torch.einsum("oi,oj->ij", w, w),
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "an operator": lambda w: torch.ops.aten.mul.Tensor(w, w),
}


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_gets_the_dense_weight(name, layer, dense):
    expected, found = OTHERS[name](dense), OTHERS[name](layer.weight)
    assert type(found) is type(expected)
    assert torch.equal(found, expected)


def test_shape_dtype_and_device_unpack_nothing(layer, dense, not_unpacked):
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert torch.is_tensor(weight)
    for one, other in ((weight, dense), (weight.T, dense.T)):
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "is_cuda", "is_meta",
                     "nbytes", "itemsize", "grad"):  # fmt: skip
            assert getattr(one, name) == getattr(other, name), name
        assert (one.size(), one.dim(), one.numel(), len(one)) == (other.size(), other.dim(), other.numel(), len(other))
        assert (one.stride(), one.is_contiguous(), one.is_floating_point()) == (
            other.stride(), other.is_contiguous(), other.is_floating_point(),
        )  # fmt: skip
    assert weight is layer.weight  # it is made once
    assert {weight: 1}[weight] == 1


def test_it_follows_its_layer(layer, dense):
    weight = layer.weight
    layer.load_state_dict({**layer.state_dict(), "values": layer.values * 2})
    assert torch.equal(weight + 0, 2 * dense)
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight + 0, (2 * dense).bfloat16())
    other = copy.deepcopy(layer)
    other.load_state_dict({**layer.state_dict(), "values": layer.values * 2})
    assert torch.equal(layer.weight + 0, (2 * dense).bfloat16())
    assert torch.equal(other.weight + 0, (4 * dense).bfloat16())


CHANGES = {
    "mul_": lambda w: w.mul_(2),
    "copy_": lambda w: w.copy_(torch.zeros(OUT, IN)),
    "[0] =": lambda w: w.__setitem__(0, 1.0),
    "+=": lambda w: w.__iadd__(1),
    "data =": lambda w: setattr(w, "data", torch.zeros(OUT, IN)),
    "init": nn.init.zeros_,
    "out=": lambda w: torch.add(torch.ones(OUT, IN), 1, out=w),
    "requires_grad_": lambda w: w.requires_grad_(),
    "nn.Parameter": nn.Parameter,
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_would_change_it_is_refused(name, layer, dense):
    with pytest.raises(SparsityError, match="packed weight"):
        CHANGES[name](layer.weight)
    assert torch.equal(layer.weight + 0, dense)


def test_gradients_reach_inputs_and_biases(layer, dense):
    found = []
    for weight in (dense, layer.weight):
        given, bias = torch.ones(3, IN, requires_grad=True), torch.ones(OUT, requires_grad=True)
        functional.linear(given, weight, bias).square().sum().backward()
        found.append((given.grad, bias.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


def test_autocast_acts_as_on_a_dense_weight(layer, dense):
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = functional.linear(x, layer.weight), functional.linear(x, dense)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_transforms_and_compilers_see_it(layer, dense):
    product = torch.vmap(lambda one: functional.linear(one, layer.weight))(x)
    torch.testing.assert_close(product, x @ dense.T, rtol=1e-5, atol=1e-5)

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return functional.linear(x.to(self.layer.weight.dtype), self.layer.weight)

    with torch.no_grad():
        compiled = torch.compile(Reads(), backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, x @ dense.T, rtol=1e-5, atol=1e-5)


def test_a_stack_acts_as_the_parameter_that_it_replaces():
    dense = sparse(COUNT, OUT, IN)
    stack = stack_of(dense)
    assert (stack.shape, stack.dtype, stack.device, len(stack)) == (dense.shape, dense.dtype, dense.device, COUNT)
    assert torch.equal(stack + 1, dense + 1)
    assert torch.equal(2 * stack, 2 * dense)
    assert torch.equal(torch.cat([stack.tensor(), dense]), torch.cat([dense, dense]))
    assert stack.to(torch.bfloat16).dtype == stack.bfloat16().dtype == torch.bfloat16
    assert stack.dtype == torch.float32  # as a tensor, it was not changed itself
    assert nn.Sequential(stack).to(torch.bfloat16)[0].dtype == torch.bfloat16
    with pytest.raises(AttributeError, match="nonsense"):
        _ = stack.nonsense
    assert "shape=(5, 12, 8)" in repr(stack)
    assert not list(stack.parameters())


def test_matrices_that_do_not_go_together_are_refused():
    parts = {"0": PackedLinear(pack(sparse(4, 8))), "1": PackedLinear(pack(sparse(6, 8)))}
    assert PackedStack(parts, stacked=False).shape == (10, 8)
    for options in ({}, {"stacked": False, "transposed": True}):
        with pytest.raises(SparsityError, match="should be the same"):
            PackedStack(parts, **options)
    with pytest.raises(SparsityError, match="0 matrices"):
        PackedStack({})


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["self", "cross", "decoder", "encoder", "encoder_layers"])
def test_attention_of_pytorch_runs_packed(kind, need_weights, monkeypatch):
    kernels_win(monkeypatch)
    if kind in ("self", "cross"):
        model = nn.ModuleDict({"a": nn.MultiheadAttention(IN, 2, batch_first=True)})
    elif kind == "decoder":
        model = nn.ModuleDict({"a": nn.TransformerDecoderLayer(IN, 2, 16, batch_first=True)})
    else:
        inner = nn.TransformerEncoderLayer(IN, 2, 16, batch_first=True)
        model = nn.ModuleDict({"a": nn.TransformerEncoder(inner, 2) if kind == "encoder_layers" else inner})
    secateur.prune_(model.eval(), pattern="2:4", method="magnitude")
    given, memory = torch.randn(2, 5, IN), torch.randn(2, 7, IN)
    args = {"self": (given,) * 3, "cross": (given, memory, memory), "decoder": (given, memory)}.get(kind, (given,))
    options = {"need_weights": need_weights} if kind in ("self", "cross") else {}

    def output():
        y = model["a"](*args, **options)
        return y[0] if isinstance(y, tuple) else y

    with torch.no_grad():
        expected = output()
        report = secateur.pack_(model, batch_sizes=[1])
        assert not [name for name, p in model.named_parameters() if p.ndim > 1], report.skipped
        monkeypatch.setattr(PackedLinear, "matrix", None)
        torch.testing.assert_close(output(), expected, rtol=1e-4, atol=1e-5)


def test_int8_values_are_read_with_their_scales(dense):
    layer = PackedLinear(pack(dense, torch.int8))
    assert isinstance(layer.weight, PackedWeight)
    torch.testing.assert_close(functional.linear(x, layer.weight), x @ layer.matrix().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [{}, {"kdim": 4, "vdim": 12}], ids=str)
def test_attention_that_would_lose_as_a_whole_stays_dense(kind, monkeypatch):
    kernels_win(monkeypatch)
    model = nn.ModuleDict({"a": nn.MultiheadAttention(IN, 2, **kind), "usual": nn.Linear(IN, IN)})
    secateur.prune_(model, pattern="2:4", method="magnitude")
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(
        "secateur.packing._attention.time_in_turn", lambda *_, **__: {"dense": [1.0] * 3, "packed": [1.5] * 3}
    )
    report = secateur.pack_(model, batch_sizes=[3])
    packed = {layer.name: layer.packed for layer in report.layers}
    assert packed.pop("usual")
    assert len(packed) == (4 if kind else 2)
    assert not any(packed.values())
    reasons = {layer.reason for layer in report.layers if not layer.packed}
    assert len(reasons) == 1
    assert "at 3 tokens the whole nn.MultiheadAttention would take 1.50 of its time" in reasons.pop()
    assert all(torch.equal(value, before[name]) for name, value in model["a"].state_dict(prefix="a.").items())
