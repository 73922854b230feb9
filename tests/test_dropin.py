"""A replacement can do whatever the layer that it replaces can: each law for every layer that learns or runs packed."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from dropin_cases import CASES, EMBEDDINGS, FEW, LEARNING, PACKED, STAGES, dense_of, every
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from transformers.pytorch_utils import Conv1D

import secateur
from secateur import PackSettings, RecipeError
from secateur.formats import FORMATS, pack
from secateur.layers import Replaceability, kind_of, own_behaviour, plain_class
from secateur.nn import Packed, PackedAs, SparseLayer
from secateur.packing._jobs import find_jobs

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_every_replacement_is_here():
    """The cases have each class that learns, in each stage, each packed class, and each format."""

    def final(cls):
        below = cls.__subclasses__()
        return {cls} if not below else {one for each in below for one in final(each)}

    layers = [case.pair()[1] for case in (CASES | EMBEDDINGS).values()]
    wanted = final(SparseLayer) | {one for base in Packed.__args__ for one in final(base)}
    assert {type(layer) for layer in layers} == wanted
    stages = {(type(layer), float(layer.stage)) for layer in layers if isinstance(layer, SparseLayer)}
    assert stages == {(cls, stage) for cls in final(SparseLayer) for stage in (0, 1, 2)}
    assert {layer.packed.name for layer in layers if isinstance(layer, Packed)} == set(FORMATS)


# Calls


@every(CASES | EMBEDDINGS)
def test_positional_and_keyword_calls_of_every_shape(case):
    original, layer = case.pair()
    dense = dense_of(original, layer)
    keyword = next(iter(inspect.signature(original.forward).parameters))
    for x in case.inputs():
        expected, y = dense(x), layer(x)
        assert (y.shape, y.dtype, y.device) == (expected.shape, expected.dtype, expected.device)
        torch.testing.assert_close(y, expected, **CLOSE)
        assert torch.equal(layer(**{keyword: x}), y)


@every(CASES)
def test_inputs_that_are_not_contiguous(case):
    original, layer = case.pair()
    dense = dense_of(original, layer)
    for x in case.inputs():
        expected = dense(x)
        strided = torch.stack([x, x], -1)[..., 0]
        reversed_order = x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
        for given in (strided, reversed_order):
            torch.testing.assert_close(layer(given), expected, **CLOSE)
    first = case.inputs()[1]
    torch.testing.assert_close(layer(first[:1].expand(first.shape)), dense(first[:1].expand(first.shape)), **CLOSE)


def in_place(y):
    """What models do in place to the result of a layer."""
    y += 1
    y[..., :1] = 0.5
    y = nn.functional.dropout(y.mul_(2), 0.0, inplace=True)
    return nn.functional.relu(y, inplace=True)


def out_of_place(y):
    y = torch.cat([torch.full_like(y[..., :1], 0.5), y[..., 1:] + 1], -1)
    return (2 * y).relu()


@every(CASES)
@pytest.mark.parametrize("gradient", ["of the input", "of the layer", "none", "no_grad", "inference_mode"])
def test_operations_in_place_after_it(case, gradient):
    original, layer = case.pair()
    dense = dense_of(original, layer)
    layer.requires_grad_(gradient == "of the layer")
    for x in case.inputs():
        x.requires_grad_(gradient == "of the input")
        expected = out_of_place(dense(x))
        with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(gradient, torch.enable_grad)():
            y = in_place(layer(x))
        torch.testing.assert_close(y, expected, **CLOSE)
        if x.requires_grad:
            (wanted,) = torch.autograd.grad(expected.square().sum(), x)
            (found,) = torch.autograd.grad(y.square().sum(), x)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        elif y.requires_grad:
            layer.zero_grad()
            y.square().sum().backward()
            assert layer.weight.grad.isfinite().all()
    model = nn.Sequential(layer, nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True))
    for x in case.inputs():
        if x.numel():
            model(x.requires_grad_(gradient != "none")).sum()


@every(FEW)
def test_a_result_can_take_what_needs_a_gradient_in_place(case):
    """A residual stream: ``y += x``, where only x is learned."""
    _, layer = case.pair()
    layer.requires_grad_(False)
    for x in case.inputs():
        y = layer(x)
        learned = nn.Parameter(torch.ones(y.shape))
        y += learned
        y.sum().backward()
        assert torch.equal(learned.grad, torch.ones(y.shape))


@every(CASES)
def test_autocast(case):
    original, layer = case.pair()
    dense = dense_of(original, layer)
    for x in case.inputs():
        with torch.autocast("cpu", torch.bfloat16):
            expected, y = dense(x), layer(x)
        assert y.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.double()(x.double()).dtype == torch.float64


@every(FEW)
def test_hooks(case):
    _, layer = case.pair()
    seen = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: seen.append(("pre", args[0].shape))),
        layer.register_forward_hook(lambda module, args, y: seen.append(("post", y.shape)) or y + 1),
        layer.register_full_backward_pre_hook(lambda module, gradients: seen.append(("back pre", None))),
        layer.register_full_backward_hook(lambda module, ins, outs: seen.append(("back", ins[0].shape))),
    ]
    x = case.inputs()[1].requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert seen == [("pre", x.shape), ("post", y.shape), ("back pre", None), ("back", x.shape)]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(layer(x) + 1, y)
    assert len(seen) == 4


@every(FEW)
def test_functional_call(case):
    _, layer = case.pair()
    _, other = case.pair(seed=7)
    x = case.inputs()[1]
    before = layer(x)
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    if isinstance(layer, SparseLayer):
        assert torch.equal(torch.func.functional_call(layer, tensors, (x,)), other(x))
    moved = {name: tensor.detach().clone() for name, tensor in layer.named_parameters()}
    assert torch.equal(torch.func.functional_call(layer, moved, (x,)), before)
    assert torch.equal(layer(x), before)
    torch.testing.assert_close(torch.func.vmap(layer)(x.unsqueeze(0))[0], before, **CLOSE)


# As an object


@every(CASES | EMBEDDINGS)
def test_attributes(case):
    original, layer = case.pair()
    dense = dense_of(original, layer)
    public = {name: value for name, value in vars(original).items() if not name.startswith("_")}
    for name, value in public.items():
        if name == "padding" and isinstance(value, str) and isinstance(layer, Packed):
            continue
        assert getattr(layer, name) == value, name
    for name in ("weight", "bias"):
        expected, found = getattr(dense, name, None), getattr(layer, name)
        if expected is None:
            assert found is None
        else:
            assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
    if isinstance(layer, Packed) or (layer.mask is not None and not layer.straight_through):
        torch.testing.assert_close(layer.weight, dense.weight.detach())
    sizes = [value for value in public.values() if isinstance(value, int | tuple) and not isinstance(value, bool)]
    assert all(str(value) in repr(layer) for value in sizes[:2])
    assert repr(layer).startswith(f"{type(layer).__name__}(")
    assert repr(copy.deepcopy(layer).to("meta"))


def copies(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return {
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
        "torch.save": torch.load(file, weights_only=False),
    }


@every(CASES | EMBEDDINGS)
def test_copies_are_equal_and_independent(case):
    original, layer = case.pair()
    x = case.inputs()[1]
    expected = layer(x)
    for name, other in copies(layer).items():
        assert torch.equal(other(x), expected), name
        assert repr(other) == repr(layer)
        assert other.state_dict().keys() == layer.state_dict().keys()
        assert type(dense_of(original, other)) is type(original)
        for tensor in other.state_dict().values():
            tensor.zero_()
        assert torch.equal(layer(x), expected), name


@every(CASES | EMBEDDINGS)
def test_modes(case):
    _, layer = case.pair()
    assert layer.training
    assert not layer.eval().training
    x = case.inputs()[1]
    expected = layer(x)
    assert torch.equal(layer.train()(x), expected)
    layer.requires_grad_(False)
    assert not layer(x).requires_grad


@every(CASES | EMBEDDINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(case, dtype):
    original, layer = case.pair()
    dense = dense_of(original, layer).to(dtype)
    assert layer.to(dtype) is layer
    assert layer.weight.dtype == dtype
    for x in case.inputs():
        given = x.to(dtype) if x.is_floating_point() else x
        y = layer(given)
        assert y.dtype == dtype
        torch.testing.assert_close(y, dense(given), rtol=0.03, atol=0.06)
    state = layer.state_dict()
    assert layer.float().state_dict().keys() == state.keys()
    assert layer(case.inputs()[1]).dtype == torch.float32


@every(CASES | EMBEDDINGS)
def test_meta_and_back(case):
    _, layer = case.pair()
    state = copy.deepcopy(layer.state_dict())
    inputs = case.inputs()
    expected = [layer(x) for x in inputs]
    layer.to("meta")
    for x, y in zip(inputs, expected, strict=True):
        found = layer(x.to("meta"))
        assert (found.shape, found.dtype, found.is_meta) == (y.shape, y.dtype, True)
    layer.to_empty(device="cpu")
    assert layer.load_state_dict(state, strict=True) == ([], [])
    for x, y in zip(inputs, expected, strict=True):
        assert torch.equal(layer(x), y)


# Its state


def signature(module):
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in module.state_dict().items()}


@every(CASES | EMBEDDINGS)
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_a_state_is_loaded_strictly_into_a_new_layer(case, assign):
    _, layer = case.pair()
    _, other = case.pair(seed=5)
    state = copy.deepcopy(layer.state_dict())
    assert other.load_state_dict(state, strict=True, assign=assign) == ([], [])
    for x in case.inputs():
        assert torch.equal(other(x), layer(x))
    now = other.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())


@every({name: case for name, case in LEARNING.items() if name.endswith("soft") or "threshold" in name})
def test_a_state_of_any_stage_is_loaded_at_any_stage(case):
    """What Lightning does with the best checkpoint, and a user who goes back."""
    layers = {}
    for name, enter in STAGES.items():
        layers[name] = case.pair()[1]
        enter(layers[name])
    assert len({str(signature(layer)) for layer in layers.values()}) == 1
    x = case.inputs()[1]
    for layer in layers.values():
        state = copy.deepcopy(layer.state_dict())
        for name, enter in STAGES.items():
            other = case.pair(seed=5)[1]
            enter(other)
            other(x)
            assert other.load_state_dict(state, strict=True) == ([], []), name
            assert torch.equal(other(x), layer(x)), name
            assert other.straight_through == layer.straight_through
            assert (other.mask is None) == (layer.mask is None)


class ByStates:
    """An average as timm keeps it: of all that is in the state, tensor by tensor."""

    def __init__(self, model):
        self.module = copy.deepcopy(model)

    def update_parameters(self, model):
        pairs = zip(self.module.state_dict().values(), model.state_dict().values(), strict=True)
        for average, now in pairs:
            average.copy_(0.9 * average + 0.1 * now)


AVERAGES = {
    "swa": AveragedModel,
    "swa, buffers too": lambda model: AveragedModel(model, use_buffers=True),
    "ema": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "ema, buffers too": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "one by one": lambda model: AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True),
    "by states": ByStates,
}


@every({name: case for name, case in LEARNING.items() if name.endswith("soft") or "threshold" in name})
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_averages_before_and_after_freezing(case, average):
    _, layer = case.pair()
    averaged = average(layer)
    inputs = case.inputs()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    ever_kept = torch.zeros(layer.weight.shape, dtype=torch.bool)
    for step in range(6):
        optimizer.zero_grad()
        sum(layer(x).square().mean() for x in inputs if x.numel()).backward()
        optimizer.step()
        if step == 3:
            layer.freeze(layer.hard_mask(), straight_through=True)
        elif step == 4:
            layer.hard_prune(optimizer)
        elif step < 3 and layer.pattern is not None:
            layer.solve_threshold(None if step else 0.0 if "column" not in str(layer.pattern) else None)
        averaged.update_parameters(layer)
        inside = averaged.module
        assert signature(inside) == signature(layer)
        assert all(inside(x).isfinite().all() for x in inputs)
        assert (inside.mask is None) == (layer.mask is None)
        if layer.mask is not None:
            ever_kept |= layer.mask
            assert (inside.mask >= layer.mask).all()
            assert (inside.mask <= ever_kept).all()
            assert not inside.effective_weight()[~ever_kept].any()
    twin = case.pair(seed=5)[1]
    twin.load_state_dict(inside.state_dict(), strict=True)
    assert torch.equal(twin(inputs[1]), inside(inputs[1]))


@every(PACKED)
@pytest.mark.parametrize("average", [AVERAGES["swa"], AVERAGES["ema"]], ids=["swa", "ema"])
def test_averages_of_a_model_with_packed_layers(case, average):
    """Its parameters are averaged. Averages of buffers would be averages of indices, which mean nothing."""
    _, layer = case.pair()
    model = nn.Sequential(layer, nn.PReLU())
    averaged = average(model)
    for _ in range(3):
        averaged.update_parameters(model)
    x = case.inputs()[1]
    torch.testing.assert_close(averaged(x), model(x))


# Compilers


# Compiling takes seconds. Other tests compile sparse layers of other patterns.
COMPILED = ["linear unstructured soft", "linear unstructured frozen", "Conv1D unstructured soft", "conv2d column soft"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
@every({name: CASES[f"learning {name}"] for name in COMPILED} | {n: c for n, c in PACKED.items() if "strided" not in n})
def test_compiles_to_one_graph_with_operations_in_place(case):
    original, layer = case.pair()
    dense = dense_of(original, layer)
    torch._dynamo.reset()
    compiled = torch.compile(nn.Sequential(layer, nn.ReLU(inplace=True)), fullgraph=True, backend="aot_eager")
    for x in case.inputs()[1:3]:
        x.requires_grad_()
        y = compiled(x)
        torch.testing.assert_close(y, dense(x).relu(), **CLOSE)
        if x.numel():
            y.sum().backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:No complete tensor found:UserWarning")
@every(PACKED | EMBEDDINGS)
def test_exports(case):
    _, layer = case.pair()
    x = case.inputs()[1]
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x), **CLOSE)


# Which layers may be replaced


class Pointwise(nn.Conv2d):
    """Nothing of its own but a name."""


class Named(nn.Linear):
    """As models have them, to find their layers by class."""

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        self.role = "up"


def of_falcon(*args):
    return pytest.importorskip("transformers.models.falcon.modeling_falcon").FalconLinear(*args)


HARMLESS = {
    "a name": lambda: Named(16, 8),
    "FalconLinear": lambda: of_falcon(16, 8),
    "Conv1D": lambda: Conv1D(8, 16),
    "a convolution": lambda: Pointwise(16, 8, 1),
}


def fed(layer, batch=8):
    return torch.randn(batch, 16, *([3, 3] if isinstance(layer, nn.Conv2d) else []))


@pytest.mark.parametrize("method", ["gate", "sr-ste"])
@pytest.mark.parametrize("make", HARMLESS.values(), ids=HARMLESS)
def test_harmless_subclasses_are_trained_packed_and_given_back(make, method, tmp_path):
    torch.manual_seed(0)
    original = make()
    model = nn.Sequential(make(), nn.ReLU(inplace=True))
    model[0].load_state_dict(original.state_dict())
    x = fed(original)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    training = secateur.SparseTraining(model, optimizer, method=method, pattern="2:4", steps=6)
    assert isinstance(model[0], SparseLayer)
    keys = signature(model)
    twin = AveragedModel(model)
    for _ in range(6):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        training.step()
        twin.update_parameters(model)
        assert signature(model) == keys
        twin.module.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(twin(x), model(x))
    expected = model(x)
    report = training.finalize()
    assert (report.sparsity, type(model[0])) == (0.5, type(original))
    assert getattr(model[0], "role", None) == getattr(original, "role", None)
    assert model[0].weight is optimizer.param_groups[0]["params"][0]
    torch.testing.assert_close(model(x), expected if method == "gate" else model(x), **CLOSE)
    expected = model(x)
    packed = nn.Sequential(PackedAs.of(model[0]).build(*stored(model[0])), nn.ReLU())
    torch.testing.assert_close(packed(x), expected, **CLOSE)
    secateur.save(packed, tmp_path / "tiny.sparse.safetensors")
    again = secateur.load(tmp_path / "tiny.sparse.safetensors", into=nn.Sequential(make(), nn.ReLU()))
    assert torch.equal(again(x), packed(x))
    jobs, skipped = find_jobs(model, PackSettings(), {})
    assert ([job.name for job in jobs], skipped) == (["0"], [])


def stored(layer):
    matrix = kind_of(layer).to_matrix(layer, layer.weight.detach())
    return pack(matrix), layer.bias, None, torch.float32


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Standardised(nn.Conv2d):
    def forward(self, input):
        return nn.functional.conv2d(input, self.weight - self.weight.mean(), self.bias)


class Computed(nn.Linear):
    @property
    def weight(self):
        return 2 * self._parameters["weight"]


def computed():
    """As parametrizations make them."""
    linear = nn.Linear(16, 8)
    linear.__class__ = Computed
    return linear


class Called(nn.Linear):
    def __call__(self, *args, **keywords):
        return super().__call__(*args, **keywords) + 1


class Looked(nn.Linear):
    def __getattr__(self, name):
        return super().__getattr__(name)


def with_more(kind):
    linear = nn.Linear(16, 8)
    if kind == "buffer":
        linear.register_buffer("scale", torch.ones(8))
    else:
        linear.scale = nn.Parameter(torch.ones(8)) if kind == "parameter" else nn.Identity()
    return linear


BESIDES = "it has 'scale' besides weight and bias"
OWN = [
    ("Scaled does not multiply its weight as it is", lambda: Scaled(16, 8)),
    ("Standardised does not multiply its weight as it is", lambda: Standardised(16, 8, 1)),
    ("Called has its own __call__, unlike Linear", lambda: Called(16, 8)),
    ("Looked has its own __getattr__, unlike Linear", lambda: Looked(16, 8)),
    (
        "the forward of Half does not return what Conv1D would",
        lambda: type("Half", (Conv1D,), {"forward": lambda self, x: x})(8, 16),
    ),
    *((BESIDES, lambda kind=kind: with_more(kind)) for kind in ("parameter", "buffer", "module")),
]


@pytest.mark.parametrize(("reason", "make"), OWN, ids=range(len(OWN)))
def test_layers_with_a_behaviour_of_their_own_are_replaced_nowhere(reason, make):
    layer = make()
    assert plain_class(layer) is None
    assert PackedAs.of(layer) is None
    model = nn.Sequential(layer)
    assert Replaceability(model).why_not(layer) == own_behaviour(layer)
    with pytest.raises(RecipeError, match=reason):
        secateur.sparsify_(model, pattern="2:4", include=["0"])
    with torch.no_grad():
        layer._parameters["weight"][:4] = 0
    jobs, skipped = find_jobs(nn.Sequential(layer, nn.Linear(4, 4)), PackSettings(), {})
    assert not jobs
    assert own_behaviour(layer) in [skip.reason for skip in skipped]
    if isinstance(layer, nn.Linear):
        for replace in (secateur.SparseLinear.from_linear, secateur.PackedLinear.from_linear):
            with pytest.raises(RecipeError, match=reason):
                replace(layer)
    assert model[0] is layer


def test_a_weight_that_is_computed_is_a_behaviour_of_its_own():
    assert own_behaviour(computed()).startswith("Computed has its own weight, unlike Linear")
    assert plain_class(computed()) is None


# States of version 0.1.0: no ``kept`` and no ``stage``, but a ``mask`` if the layer was pruned.


@pytest.mark.parametrize("enter", STAGES.values(), ids=STAGES)
def test_states_of_an_earlier_version(enter):
    layer = secateur.SparseLinear(8, 6, pattern="2:4")
    old = {name: tensor for name, tensor in layer.state_dict().items() if name not in ("kept", "stage")}
    old = {name: tensor.clone() for name, tensor in old.items()}
    mask = torch.rand(6, 8) > 0.5
    enter(layer)
    grew_back = layer.straight_through
    assert layer.load_state_dict(old | {"mask": mask}, strict=True) == ([], [])
    assert torch.equal(layer.mask, mask)
    assert layer.straight_through == grew_back  # such a state does not say
    assert layer.load_state_dict(old, strict=True) == ([], [])
    assert layer.mask is None
    enter(layer)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for kept"):
        layer.load_state_dict(old | {"mask": torch.ones(6, 4, dtype=torch.bool)})
    assert torch.equal(layer.kept, before["kept"])
    assert torch.equal(layer.stage, before["stage"])
