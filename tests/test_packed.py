import copy
import gc
import io

import pytest
import torch
from cases import PACKED_PATTERNS, PACKED_WITH_REMAINDER
from torch import nn

import secateur
from secateur import FormatError, PackedLinear, SparsityError, kernels
from secateur._errors import KernelError
from secateur.formats import Bitmask, NMPacked, RowPacked
from secateur.kernels import BitmaskRoute, DenseRoute, PanelRoute, PrepackedRoute, RoutePlan, _operator, candidates

PATTERNS = [*PACKED_PATTERNS, PACKED_WITH_REMAINDER]
VALUES = [None, torch.bfloat16, torch.float16, torch.int8]
OUT, IN = 48, 80


def pruned(pattern, out=OUT, features=IN, sparsity=0.6, bias=True, seed=0):
    """A linear layer and its weight's pattern, without any of the library's packing."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(features, out, bias=bias)
    weight = torch.randn(out, features, generator=generator)
    parsed = secateur.SparsityPattern.parse(pattern)
    mask = parsed.mask(weight.abs(), None if isinstance(parsed, secateur.NM) else sparsity)
    with torch.no_grad():
        linear.weight.copy_(weight.masked_fill(~mask, 0))
        if bias:
            linear.bias.copy_(torch.randn(out, generator=generator))
    return linear


def truth(linear, x):
    y = x.double() @ linear.weight.detach().double().T
    return y if linear.bias is None else y + linear.bias.detach().double()


def inputs(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def layer():
    return PackedLinear.from_linear(pruned("unstructured"))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_leading_shape_gives_what_float64_gives(pattern, bias):
    linear = pruned(pattern, bias=bias)
    before = copy.deepcopy(linear)
    packed = PackedLinear.from_linear(linear, pattern)
    for shape in ((IN,), (1, IN), (3, 5, IN), (40, IN), (0, IN), (2, 0, IN)):
        x = inputs(*shape)
        y = packed(x)
        assert y.shape == (*shape[:-1], OUT)
        torch.testing.assert_close(y.double(), truth(linear, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(linear.weight, before.weight)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_values_of_fewer_bits_compute_what_their_dense_weight_computes(pattern):
    for values in VALUES[1:]:
        packed = PackedLinear.from_linear(pruned(pattern), pattern, value_dtype=values)
        dense = packed.to_linear()
        assert dense.weight.dtype == torch.float32
        for batch in (1, 20):
            x = inputs(batch, IN)
            torch.testing.assert_close(packed(x).double(), truth(dense, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_route_computes_the_same(pattern, values):
    linear = pruned(pattern)
    packed = PackedLinear.from_linear(linear, pattern, value_dtype=values)
    routes = candidates(packed.packed, (secateur.Unstructured(),))
    assert routes[-2:] == [PrepackedRoute(), DenseRoute()]
    assert kernels.available()["native"] != "ok" or len(routes) > 4
    dense = packed.to_linear()
    for route in routes:
        packed.plan = RoutePlan((route,))
        for batch in (0, 1, 9):
            x = inputs(batch, IN)
            torch.testing.assert_close(packed(x).double(), truth(dense, x), rtol=1e-5, atol=1e-5, msg=str(route))


def test_a_plan_takes_the_nearest_measured_batch():
    plan = RoutePlan.of([(1, BitmaskRoute()), (8, BitmaskRoute()), (32, PanelRoute(64, 128)), (128, DenseRoute())])
    assert str(plan) == "bitmask@16 panels:64x128@64 dense"
    assert RoutePlan.parse(str(plan)) == plan
    assert [str(plan.route(rows)) for rows in (0, 16, 17, 64, 65, 9999)] == [
        "bitmask",
        "bitmask",
        "panels:64x128",
        "panels:64x128",
        "dense",
        "dense",
    ]


def test_a_text_that_is_not_a_plan_is_refused(layer):
    for text in ("", "fast", "bitmask@", "bitmask@2", "bitmask@9 dense@3 dense", "panels:0x4", "groups:2"):
        with pytest.raises(KernelError, match="not a plan"):
            PackedLinear(layer.packed, plan=text)


def test_a_plan_that_does_not_fit_the_weight_is_refused(layer):
    layer.plan = RoutePlan.parse("groups:2:4")
    with pytest.raises(KernelError, match="keeps"):
        layer(inputs(1, IN))
    layer.plan = RoutePlan.parse("rows")
    with pytest.raises(KernelError, match="the route rows runs only a weight that is stored as rows"):
        layer(inputs(1, IN))


def test_pruned_rows_give_the_bias_and_pruned_columns_are_not_read():
    linear = pruned("row")
    gone = (linear.weight == 0).all(1)
    assert gone.any()
    packed = PackedLinear.from_linear(linear)
    assert torch.equal(packed(inputs(3, IN))[:, gone], linear.bias[gone].expand(3, -1))
    linear = pruned("column")
    gone = (linear.weight == 0).all(0)
    packed = PackedLinear.from_linear(linear)
    x = inputs(3, IN)
    poisoned = x.masked_fill(gone, torch.nan)
    assert torch.equal(packed(poisoned), packed(x))
    assert torch.equal(packed.bias, linear.bias)  # it was not changed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("pattern", ["unstructured", "row", "column"])
def test_the_output_has_the_dtype_of_the_input(pattern, dtype):
    linear = pruned(pattern)
    x = inputs(3, IN).to(dtype)
    y = PackedLinear.from_linear(linear)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), truth(linear, x), rtol=2e-2, atol=5e-2)


def test_autocast_computes_as_a_dense_layer_would(layer):
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs(2, IN)).dtype == torch.bfloat16
        assert layer(inputs(2, IN).bfloat16()).dtype == torch.bfloat16
    assert layer(inputs(2, IN)).dtype == torch.float32


def test_inference_mode(layer):
    x = inputs(2, IN)
    expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
        made = PackedLinear(layer.packed, layer.bias)
        assert torch.equal(made(x), expected)
        state = PackedLinear.from_linear(pruned("unstructured", seed=5)).state_dict()
        made.load_state_dict(state)
        assert not torch.equal(made(x), expected)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "row", "column"])
def test_the_gradient_goes_to_the_input_only(pattern):
    linear = pruned(pattern)
    packed = PackedLinear.from_linear(linear)
    assert not list(packed.parameters())
    x = inputs(2, 3, IN).requires_grad_()
    weights = inputs(2, 3, OUT, seed=2)
    (found,) = torch.autograd.grad((packed(x) * weights).sum(), x)
    torch.testing.assert_close(found.double(), weights.double() @ linear.weight.detach().double(), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad((packed(x).square() * weights).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    y = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad((truth_graph(linear, y).square() * weights).sum(), y, create_graph=True)
    (expected,) = torch.autograd.grad(expected.sum(), y)
    torch.testing.assert_close(second.double(), expected, rtol=1e-4, atol=1e-3)


def truth_graph(linear, x):
    return x @ linear.weight.detach().double().T + linear.bias.detach().double()


def test_a_trainable_head_learns_above_a_packed_layer_and_an_adapter_below(layer):
    below, head = nn.Linear(IN, IN), nn.Linear(OUT, 2)
    model = nn.Sequential(below, layer, nn.ReLU(), head)
    model(inputs(4, IN)).sum().backward()
    assert below.weight.grad.abs().sum() > 0
    assert head.weight.grad.abs().sum() > 0
    assert not layer.values.requires_grad


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_operators_pass_pytorchs_own_check(pattern):
    packed = PackedLinear.from_linear(pruned(pattern), pattern)
    weight = [getattr(packed, name) for name in packed.names]
    for x in (inputs(3, IN), inputs(2, 3, IN).requires_grad_()):
        torch.library.opcheck(_operator._packed_linear, (x, weight, packed.bias, packed._spec))
    y = inputs(3, OUT).requires_grad_()
    torch.library.opcheck(_operator._packed_linear_transposed, (y, weight, packed._spec))
    checks = ("test_schema", "test_faketensor")
    arguments = (inputs(3, IN), weight, None, packed._spec)
    torch.library.opcheck(_operator._inference, arguments, test_utils=checks)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "row"])
def test_compile_sees_one_graph_at_any_batch(pattern):
    torch.compiler.reset()  # what was compiled for one pattern counts against the limit of the next
    linear = pruned(pattern)
    model = nn.Sequential(PackedLinear.from_linear(linear), nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 7):
        x = inputs(batch, IN)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x).double(), truth(linear, x).relu(), rtol=1e-5, atol=1e-5)
    x = inputs(2, IN).requires_grad_()
    (found,) = torch.autograd.grad(compiled(x).sum(), x)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(found, expected)


# PyTorch says so of any tensor with spare memory behind it; the file is right.
@pytest.mark.filterwarnings("ignore:No complete tensor found:UserWarning")
def test_export_carries_the_packed_weight_and_any_batch(layer):
    model = nn.Sequential(layer)
    program = torch.export.export(model, (inputs(4, IN),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.secateur.packed_linear.default]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    x = inputs(9, IN)
    assert torch.equal(again(x), model(x))


def test_copies_share_nothing(layer):
    x = inputs(3, IN)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected)
    twin.values.zero_()
    assert torch.equal(twin(x), layer.bias.expand(3, -1))
    assert torch.equal(layer(x), expected)


def test_what_was_prepared_is_freed_with_the_layer(layer):
    layer(inputs(1, IN))
    gc.collect()
    before = len(_operator._ready)
    twin = copy.deepcopy(layer)
    twin(inputs(1, IN))
    assert len(_operator._ready) == before + 1
    del twin
    gc.collect()
    assert len(_operator._ready) == before


def test_calls_prepare_a_route_once(layer, monkeypatch):
    made = []
    monkeypatch.setattr(_operator, "prepare", lambda *args: made.append(args[1]) or kernels.prepare(*args))
    layer.plan = RoutePlan.parse("bitmask@2 panels:128x256")
    for _ in range(3):
        layer(inputs(1, IN))
        layer(inputs(40, IN))
    assert len(made) == len(set(made)) == 2


def test_a_bitmask_runs_on_the_stored_values():
    layer = PackedLinear.from_linear(pruned("unstructured"), plan="bitmask")
    layer(inputs(1, IN))
    assert 0 < layer.runtime_nbytes < layer.values.nbytes / 4
    twin = copy.deepcopy(layer)
    twin(inputs(1, IN))
    assert twin.runtime_nbytes == layer.runtime_nbytes
    half = copy.deepcopy(layer).to(torch.bfloat16)
    half(inputs(1, IN))
    assert half.runtime_nbytes == layer.runtime_nbytes


def test_state_dict_of_another_mask_loads():
    first, second = (PackedLinear.from_linear(pruned("unstructured", sparsity=s, seed=9)) for s in (0.5, 0.7))
    assert first.values.shape != second.values.shape
    x = inputs(3, IN)
    first(x)
    assert set(second.state_dict()) == {"values", "bitmask", "row_offsets", "bias"}
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))
    second.values.zero_()
    assert not torch.equal(first(x), second(x))


def test_state_dict_of_int8_loads_into_float_and_back(layer):
    small = PackedLinear.from_linear(pruned("unstructured"), value_dtype=torch.int8)
    x = inputs(3, IN)
    expected = small(x), layer(x)
    states = copy.deepcopy(small.state_dict()), copy.deepcopy(layer.state_dict())
    layer.load_state_dict(states[0])
    small.load_state_dict(states[1])
    assert torch.equal(layer(x), expected[0])
    assert torch.equal(small(x), expected[1])


@pytest.mark.parametrize("name", ["values", "bitmask", "row_offsets"])
def test_an_invalid_state_dict_is_refused(layer, name):
    state = copy.deepcopy(layer.state_dict())
    state[name] = state[name][:-1] if name == "values" else state[name] + 1
    x = inputs(2, IN)
    expected = layer(x)
    with pytest.raises(RuntimeError, match=r"values|bitmask|row_offsets"):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), expected)
    del state[name]
    with pytest.raises(RuntimeError, match=name):
        layer.load_state_dict(state)


def test_a_buffer_changed_in_place_is_checked_again(layer):
    x = inputs(2, IN)
    layer(x)
    layer.values.mul_(2)
    torch.testing.assert_close(layer(x), 2 * PackedLinear.from_linear(pruned("unstructured"))(x) - layer.bias)
    layer.bitmask.fill_(255)
    with pytest.raises(FormatError, match="bitmask marks"):
        layer(x)


def test_to_changes_the_dtype_of_values_where_a_format_has_it(layer):
    assert copy.deepcopy(layer).to(torch.bfloat16).values.dtype == torch.bfloat16
    wide = copy.deepcopy(layer).double()
    assert wide.values.dtype == torch.float32
    assert wide.to_linear().weight.dtype == torch.float64
    small = PackedLinear.from_linear(pruned("unstructured"), value_dtype=torch.int8).half()
    assert (small.values.dtype, small.scales.dtype) == (torch.int8, torch.float32)
    assert small.to_linear().weight.dtype == torch.float16
    assert layer.to("meta").values.is_meta


def test_back_to_dense_is_exact(layer):
    linear = pruned("unstructured")
    back = PackedLinear.from_linear(linear).eval().to_linear()
    assert torch.equal(back.weight, linear.weight)
    assert torch.equal(back.bias, linear.bias)
    assert not back.training
    assert back.weight.requires_grad
    assert torch.equal(layer.weight, linear.weight)


def test_torch_save_and_load(layer, tmp_path):
    torch.save(layer, tmp_path / "layer.pt")
    again = torch.load(tmp_path / "layer.pt", weights_only=False)
    x = inputs(3, IN)
    assert torch.equal(again(x), layer(x))


def test_the_pattern_is_found_from_the_zeros():
    for pattern in ("2:4", "3:8", "block:4x4", "row", "column", "unstructured"):
        assert str(PackedLinear.from_linear(pruned(pattern)).pattern) == pattern
    assert isinstance(PackedLinear.from_linear(pruned("4:8")).packed, Bitmask)  # which is smaller there
    assert str(PackedLinear.from_linear(pruned("4:8")).pattern) == "4:8"


def test_weights_of_zeros_only_and_of_no_zeros():
    linear = pruned("unstructured", sparsity=1.0)
    packed = PackedLinear.from_linear(linear)
    assert isinstance(packed.packed, RowPacked)
    assert torch.equal(packed(inputs(2, IN)), linear.bias.expand(2, -1))
    linear = pruned("unstructured", sparsity=0.0)
    x = inputs(2, IN)
    torch.testing.assert_close(PackedLinear.from_linear(linear)(x).double(), truth(linear, x), rtol=1e-5, atol=1e-5)


def test_wrong_inputs(layer):
    with pytest.raises(KernelError, match=rf"takes {IN} features"):
        layer(inputs(2, IN + 1))
    with pytest.raises(RuntimeError, match=rf"takes {IN} features"):
        torch.compile(layer, backend="eager", fullgraph=True)(inputs(2, IN + 1))
    with pytest.raises(KernelError, match="shape"):
        layer(torch.tensor(1.0))
    with pytest.raises(TypeError, match="floating point"):
        layer(torch.ones(2, IN, dtype=torch.int64))
    with pytest.raises(KernelError, match="the bias has shape"):
        PackedLinear(layer.packed, torch.ones(OUT + 1))
    layer.bias = torch.ones(OUT - 1)
    with pytest.raises(KernelError, match="the bias has shape"):
        layer(inputs(1, IN))
    layer.bias = torch.ones(2 * OUT)[::2]
    assert torch.isfinite(layer(inputs(1, IN))).all()
    with pytest.raises(TypeError, match="storage format"):
        PackedLinear(torch.ones(2, 2))
    with pytest.raises(TypeError, match=r"nn\.Linear"):
        PackedLinear.from_linear(nn.ReLU())
    with pytest.raises(SparsityError):
        PackedLinear.from_linear(pruned("unstructured"), "2:4")


@pytest.mark.parametrize(("out", "features"), [(0, 4), (4, 0), (0, 0)])
def test_layers_without_weights(out, features):
    bias = torch.arange(float(out))
    layer = PackedLinear(Bitmask.from_dense(torch.ones(out, features)), bias)
    for shape in ((3, features), (2, 3, features), (0, features), (features,)):
        assert torch.equal(layer(torch.ones(shape)), bias.expand(*shape[:-1], -1))


def test_vmap(layer):
    x = inputs(4, 3, IN)
    assert torch.equal(torch.func.vmap(layer)(x), layer(x))
    assert torch.equal(torch.func.vmap(layer, in_dims=1)(x), layer(x.movedim(1, 0)))
    with pytest.raises(NotImplementedError, match="not over its weights"):
        torch.func.vmap(lambda bias: torch.func.functional_call(layer, {"bias": bias}, x[0]))(torch.ones(2, OUT))


def test_compiled_calls_prepare_a_route_once(layer, monkeypatch):
    made = []
    monkeypatch.setattr(_operator, "prepare", lambda *args: made.append(args[1]) or kernels.prepare(*args))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = inputs(1, IN)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(compiled(x), layer(x))
    assert len(made) == 1


def test_zeros_that_a_format_stores_need_not_fit_another_layout():
    weight = torch.zeros(16, 32)
    weight[:, ::16] = 1  # 1:16; as 2:16 the format stores one zero more in each group
    packed = NMPacked.from_dense(weight, pattern=secateur.NM(2, 16))
    assert int(packed.mask().sum()) == 2 * int((weight != 0).sum())
    layer = PackedLinear(packed, plan="groups:1:8")
    x = inputs(3, 32)
    if kernels.available()["native"] == "ok":
        torch.testing.assert_close(layer(x), x @ weight.T)
        assert layer.runtime_nbytes < PackedLinear(packed, plan="dense").weight.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backend_can_be_forced(dtype):
    layer = PackedLinear.from_linear(pruned("unstructured"), plan="bitmask").to(dtype)
    x = inputs(3, IN).to(dtype)
    expected = layer(x)
    with kernels.use("reference"):
        torch.testing.assert_close(layer(x), expected)
