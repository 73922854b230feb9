import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import secateur
from secateur import NM, Block, Column, GroupSparsity, PatternError, RecipeError, Row, SparsityPattern, Unstructured

CASES = [  # a pattern and a shape that it fits, with a dense remainder where the pattern can have one
    (Unstructured(), (5, 7)),
    (Unstructured("row"), (5, 7)),
    (NM(2, 4), (3, 8)),
    (NM(2, 4, remainder="dense"), (3, 10)),
    (Block(2, 3), (4, 9)),
    (Block(2, 3, remainder="dense"), (5, 11)),
    (Block(1, 1), (3, 4)),
    (Row(), (4, 6)),
    (Column(), (4, 6)),
    (Column(3), (4, 6)),
]
cases = pytest.mark.parametrize(("pattern", "shape"), CASES, ids=str)
STRENGTH = 0.3
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def after_prox(group, weight, step_size):
    weight = weight.clone()
    assert group.prox_(weight, step_size) is None
    return weight


sizes = st.integers(1, 5)
remainders = st.sampled_from(["error", "dense"])


@st.composite
def problems(draw):
    """A pattern and a weight that fits it: of any dtype and strides, with units of zeros and weights that are equal."""
    pattern = draw(
        st.one_of(
            st.builds(Unstructured, st.sampled_from([None, "layer", "row"])),
            sizes.flatmap(lambda m: st.builds(NM, st.integers(0, m), st.just(m), remainders)),
            st.builds(Block, sizes, sizes, remainders),
            st.builds(Row),
            st.builds(Column, st.integers(2, 5)),
        )
    )
    height, width = pattern._tile()
    dense = getattr(pattern, "remainder", "error") == "dense"
    rows = height * draw(st.integers(0, 3)) + (draw(st.integers(0, height - 1)) if dense else 0)
    columns = width * draw(st.integers(0, 3)) + (draw(st.integers(0, width - 1)) if dense else 0)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    levels = draw(st.sampled_from([0, 1, 40]))
    weight = torch.randint(-levels, levels + 1, (rows, columns), generator=generator).to(draw(st.sampled_from(DTYPES)))
    match draw(st.sampled_from(["contiguous", "transposed", "strided"])):
        case "transposed":
            weight = weight.T.contiguous().T
        case "strided":
            holder = torch.full((2 * rows, 3 * columns), math.nan, dtype=weight.dtype)
            holder[::2, 1::3] = weight
            weight = holder[::2, 1::3]
    return pattern, weight


# The penalty


def test_a_penalty_by_hand():
    """Rows of norms 5 and 13, and sqrt(2) weights each. Squared norms or no sqrt(|g|) would give 97 or 9."""
    group = GroupSparsity("row", strength=0.5)
    value = group.penalty(torch.tensor([[3.0, 4.0], [5.0, 12.0]]))
    torch.testing.assert_close(value, torch.tensor(0.5 * math.sqrt(2) * 18))


@cases
def test_the_penalty_is_the_reference(pattern, shape):
    weight = random(*shape)
    value = GroupSparsity(pattern, STRENGTH).penalty(weight)
    assert value.shape == ()
    assert value.item() == pytest.approx(reference.group_penalty(weight.numpy(), pattern, STRENGTH), rel=1e-13)


@given(problems())
def test_the_penalty_is_the_reference_for_any_shape(problem):
    pattern, weight = problem
    value = GroupSparsity(pattern, STRENGTH).penalty(weight)
    assert value.dtype == torch.promote_types(weight.dtype, torch.float32)
    assert value.item() == pytest.approx(
        reference.group_penalty(weight.double().numpy(), pattern, STRENGTH), rel=TOLERANCE[value.dtype]
    )


@cases
def test_the_gradient_is_that_of_finite_differences(pattern, shape):
    weight = random(*shape).requires_grad_()
    assert torch.autograd.gradcheck(GroupSparsity(pattern, STRENGTH).penalty, weight)


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_at_zero_is_zero(pattern, shape, dtype):
    weight = torch.zeros(shape, dtype=dtype, requires_grad=True)
    value = GroupSparsity(pattern, STRENGTH).penalty(weight)
    value.backward()
    assert value == 0
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_a_zero_unit_beside_others_gets_no_gradient_and_spoils_none():
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    GroupSparsity("row", 1.0).penalty(weight).backward()
    expected = math.sqrt(2) * torch.tensor([[0.0, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(weight.grad, expected)


def test_the_remainder_is_not_penalised():
    weight = random(5, 11).requires_grad_()
    GroupSparsity(Block(2, 3, remainder="dense"), 1.0).penalty(weight).backward()
    assert not weight.grad[4:].any()
    assert not weight.grad[:, 9:].any()
    assert weight.grad[:4, :9].all()


def test_n_to_m_is_the_plain_lasso_whatever_n_and_m():
    weight = random(4, 8)
    values = [GroupSparsity(pattern, 0.25).penalty(weight) for pattern in ("2:4", "1:2", "0:8", "unstructured")]
    torch.testing.assert_close(torch.stack(values), (0.25 * weight.abs().sum()).expand(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", ["row", "unstructured"])
def test_half_precision_is_summed_in_float32(pattern, dtype):
    """A million ones: float16 ends at 65504, bfloat16 stops counting at 256."""
    weight = torch.ones(1, 1_000_000, dtype=dtype, requires_grad=True)
    value = GroupSparsity(pattern, 1.0).penalty(weight)  # sqrt(1e6) * sqrt(1e6), or 1e6 * 1
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(1e6, rel=1e-4)
    value.backward()
    assert weight.grad.dtype == dtype
    torch.testing.assert_close(weight.grad, torch.ones_like(weight), rtol=0.01, atol=0)


def test_a_penalty_under_autocast_is_still_float32():
    weight = random(64, 64, dtype=torch.float32)
    group = GroupSparsity("row", 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        value = group.penalty(weight)
    torch.testing.assert_close(value, group.penalty(weight), rtol=0, atol=0)


def test_not_a_number_is_not_hidden():
    weight = torch.tensor([[math.nan, 1.0], [1.0, 1.0]])
    group = GroupSparsity("row", 1.0)
    assert group.penalty(weight).isnan()
    group.prox_(weight, 10.0)
    assert weight[0].isnan().all()
    assert not weight[1].any()


# The proximal step


def test_a_proximal_step_by_hand():
    """Norms 5 and 0.5 against a threshold of 0.5 * sqrt(2) = 0.707: scaled by 1 - 0.1414, and gone."""
    weight = torch.tensor([[3.0, 4.0], [0.3, -0.4]])
    GroupSparsity("row", strength=0.25).prox_(weight, step_size=2.0)
    scale = 1 - math.sqrt(2) / 10
    torch.testing.assert_close(weight, torch.tensor([[3 * scale, 4 * scale], [0.0, 0.0]]))
    assert not weight.signbit()[1].any()  # no -0.0


@cases
def test_the_proximal_step_is_the_reference(pattern, shape):
    weight = random(*shape)
    shrunk = after_prox(GroupSparsity(pattern, STRENGTH), weight, 2.0)
    expected = torch.from_numpy(reference.group_prox(weight.numpy(), pattern, 2 * STRENGTH))
    torch.testing.assert_close(shrunk, expected, rtol=1e-13, atol=1e-14)
    assert torch.equal(shrunk == 0, expected == 0)


@given(problems(), st.sampled_from([1e-3, 1.0, 11.0, 1e6]))
def test_the_proximal_step_is_the_reference_for_any_shape(problem, step_size):
    pattern, weight = problem
    before = weight.double().numpy()
    GroupSparsity(pattern, STRENGTH).prox_(weight, step_size)  # in place, whatever the strides
    expected = torch.from_numpy(reference.group_prox(before, pattern, step_size * STRENGTH))
    tolerance = TOLERANCE[weight.dtype]
    torch.testing.assert_close(weight.double(), expected, rtol=tolerance, atol=100 * TOLERANCE[torch.float32])


@cases
def test_no_other_matrix_has_a_lower_objective(pattern, shape):
    """The proximal step is the minimiser: conditions of optimality, then a thousand attempts to do better."""
    weight, step_size, group = random(*shape), 2.0, GroupSparsity(pattern, STRENGTH)
    shrunk = after_prox(group, weight, step_size)
    some_gone = some_left = False
    for units in reference.competitions(pattern, *shape):
        for unit in units:
            w, v = (np.array([matrix[place].item() for place in unit]) for matrix in (weight, shrunk))
            threshold = step_size * STRENGTH * math.sqrt(len(unit))
            if v.any():
                np.testing.assert_allclose(v - w + threshold * v / np.linalg.norm(v), 0, atol=1e-12)
                some_left = True
            else:
                assert np.linalg.norm(w) <= threshold
                some_gone = True
    assert some_left
    assert some_gone or isinstance(pattern, Row | Column | Block)  # a few large units may all survive

    def objective(v):
        return (v - weight).square().sum() / 2 + step_size * group.penalty(v)

    least = objective(shrunk)
    for seed in range(1000):
        nearby = shrunk + random(*shape, seed=seed) * 10.0 ** -(seed % 6)
        assert objective(nearby) > least


@cases
def test_two_steps_are_one_of_their_sum(pattern, shape):
    """So a step is not idempotent: the proximal operators of a norm add up."""
    weight, group = random(*shape), GroupSparsity(pattern, STRENGTH)
    twice = after_prox(group, after_prox(group, weight, 0.7), 0.9)
    torch.testing.assert_close(twice, after_prox(group, weight, 1.6), rtol=1e-12, atol=1e-13)
    assert not torch.equal(twice, after_prox(group, weight, 0.9))


@cases
def test_zero_stays_zero(pattern, shape):
    weight = torch.zeros(shape)
    GroupSparsity(pattern, STRENGTH).prox_(weight, 1.0)
    assert torch.equal(weight, torch.zeros(shape))


@cases
@pytest.mark.parametrize(("strength", "step_size"), [(0, 1.0), (0.5, 0)])
def test_a_step_of_no_size_changes_no_bit(pattern, shape, strength, step_size):
    weight = random(*shape, dtype=torch.float32)
    weight[0] = torch.tensor([-0.0, 1e-30, 0.0]).repeat(4)[: shape[1]]
    after = after_prox(GroupSparsity(pattern, strength), weight, step_size)
    assert torch.equal(after.view(torch.int32), weight.view(torch.int32))


@cases
def test_a_huge_step_leaves_nothing_but_the_remainder(pattern, shape):
    weight = random(*shape, dtype=torch.float32)
    after = after_prox(GroupSparsity(pattern, 1e300), weight, 1e300)
    rows, columns = pattern.units(shape).core
    assert not after[:rows, :columns].any()
    assert torch.equal(after[rows:], weight[rows:])
    assert torch.equal(after[:, columns:], weight[:, columns:])


def test_a_threshold_below_the_dtype_keeps_zeros_and_the_rest():
    """1e-60 is 0 in float32, and 0 / 0 is not a number."""
    weight = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    GroupSparsity("row", 1e-30).prox_(weight, 1e-30)
    assert weight.tolist() == [[0.0, 0.0], [1.0, 2.0]]


def test_a_unit_at_the_threshold_goes():
    weight = torch.tensor([[0.5, -0.5, math.nextafter(0.5, 1)]], dtype=torch.float64)
    GroupSparsity("unstructured", 0.5).prox_(weight, 1.0)
    assert (weight != 0).tolist() == [[False, False, True]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_shrunk_in_float32_and_rounded_once(dtype):
    weight = random(8, 3000, dtype=dtype)
    weight[3] *= 0.01
    group = GroupSparsity("row", 0.1)
    expected = after_prox(group, weight.float(), 1.0).to(dtype)
    group.prox_(weight, 1.0)
    assert torch.equal(weight, expected)
    assert weight.any(1).tolist() == [row != 3 for row in range(8)]


def test_a_parameter_is_changed_in_place_and_outside_the_graph():
    parameter = nn.Parameter(random(4, 4))
    pointer, version = parameter.data_ptr(), parameter._version
    GroupSparsity("row", 0.1).prox_(parameter, 1.0)
    assert parameter.data_ptr() == pointer
    assert parameter._version > version  # a backward pass over the old value is an error, not a wrong gradient
    assert parameter.is_leaf


# Convolutions


@pytest.mark.parametrize("space", [1, 2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_column_means_a_whole_input_channel_of_a_convolution(space, layout):
    """By a loop over channels, without the library's notion of a matrix."""
    weight = random(4, 5, *(3, 2, 2)[:space])
    weight[:, 2] *= 0.01
    if layout == "channels_last":
        weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
    group = GroupSparsity("column", STRENGTH)
    channels = [weight[:, channel] for channel in range(5)]
    size = channels[0].numel()
    expected = sum(STRENGTH * math.sqrt(size) * math.hypot(*channel.flatten().tolist()) for channel in channels)
    assert group.penalty(weight).item() == pytest.approx(expected, rel=1e-13)

    threshold = 0.5 * STRENGTH * math.sqrt(size)
    scales = [max(0.0, 1 - threshold / math.hypot(*channel.flatten().tolist())) for channel in channels]
    shrunk = torch.stack([channel * scale for channel, scale in zip(channels, scales, strict=True)], 1)
    strides = weight.stride()
    group.prox_(weight, 0.5)
    torch.testing.assert_close(weight, shrunk, rtol=1e-13, atol=0)
    assert [bool(weight[:, channel].any()) for channel in range(5)] == [True, True, False, True, True]
    assert weight.stride() == strides


def test_row_means_a_whole_output_channel_of_a_convolution():
    weight = random(4, 3, 2, 2)
    expected = sum(STRENGTH * math.sqrt(12) * math.hypot(*channel.flatten().tolist()) for channel in weight)
    assert GroupSparsity("row", STRENGTH).penalty(weight).item() == pytest.approx(expected, rel=1e-13)


def test_a_remainder_may_cut_through_a_kernel():
    weight = random(3, 2, 5)
    pattern = Block(2, 4, remainder="dense")
    shrunk = after_prox(GroupSparsity(pattern, STRENGTH), weight, 1.0)
    expected = reference.group_prox(weight.flatten(1).numpy(), pattern, STRENGTH)
    torch.testing.assert_close(shrunk.flatten(1), torch.from_numpy(expected))


# Models


def net():
    return nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8), nn.LayerNorm(8), nn.Linear(8, 4)
    )


def test_a_models_penalty_is_the_sum_over_its_layers():
    model, group = net(), GroupSparsity("column", 0.01)
    value = group.model_penalty(model)
    torch.testing.assert_close(value, sum(group.penalty(model[index].weight) for index in (0, 3, 5)))
    value.backward()
    assert all(model[index].weight.grad.any() for index in (0, 3, 5))
    assert model[4].weight.grad is None


def test_a_models_proximal_step_is_that_of_each_layer_and_of_nothing_else():
    model, group = net(), GroupSparsity("column", 0.5)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for index in (0, 3, 5):
        group.prox_(expected[f"{index}.weight"], 0.3)
    assert group.model_prox_(model, 0.3) is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    zero = sum(int((model[index].weight == 0).sum()) for index in (0, 3, 5))
    assert 0 < zero < sum(model[index].weight.numel() for index in (0, 3, 5))


def test_globs_choose_the_layers_of_both():
    model, group = net(), GroupSparsity("row", 1.0)
    assert torch.equal(group.model_penalty(model, include=["3"]), group.penalty(model[3].weight))
    group.model_prox_(model, 100.0, exclude=["0", "5"])
    assert [bool(model[index].weight.any()) for index in (0, 3, 5)] == [True, False, True]


def test_a_tied_weight_counts_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    group = GroupSparsity("row", 0.1)
    assert torch.equal(group.model_penalty(model), group.penalty(model[0].weight))
    expected = after_prox(group, model[0].weight.detach(), 0.5)
    group.model_prox_(model, 0.5)
    assert torch.equal(model[1].weight, expected)


def test_an_output_head_is_left_alone_unless_named():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "lm_head": nn.Linear(4, 9)})
    group = GroupSparsity("row", 1.0)
    assert torch.equal(group.model_penalty(model), group.penalty(model["body"].weight))
    assert torch.equal(group.model_penalty(model, include=["lm_head"]), group.penalty(model["lm_head"].weight))


def test_a_frozen_layer_is_left_alone():
    model, group = net(), GroupSparsity("row", 1.0)
    model[0].weight.requires_grad_(False)
    model[3].weight.requires_grad_(False)
    assert torch.equal(group.model_penalty(model), group.penalty(model[5].weight))
    group.model_prox_(model, 100.0)
    assert [bool(model[index].weight.any()) for index in (0, 3, 5)] == [True, True, False]


def test_a_transposed_layer_has_its_inputs_as_columns():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(transformers.Conv1D(3, 5))  # weight [in, out]
    nn.init.normal_(model[0].weight)
    with torch.no_grad():
        model[0].weight[2] = 0.01
    group, twin = GroupSparsity("column", 0.5), model[0].weight.detach().T.clone()
    assert torch.equal(group.model_penalty(model), group.penalty(twin))
    group.prox_(twin, 0.1)
    group.model_prox_(model, 0.1)
    assert torch.equal(model[0].weight.T, twin)
    assert [bool(row.any()) for row in model[0].weight] == [True, True, False, True, True]


def test_a_layer_that_does_not_fit_is_named_before_any_is_changed():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
    before = copy.deepcopy(model.state_dict())
    group = GroupSparsity("block:4x4", 1.0)
    with pytest.raises(PatternError, match=r"^1: block:4x4 needs an output size that is a multiple of 4, got 6"):
        group.model_penalty(model)
    with pytest.raises(PatternError, match=r"^1: block:4x4 needs an output size"):
        group.model_prox_(model, 100.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_with_nothing_to_work_on():
    group = GroupSparsity("row", 1.0)
    with pytest.raises(RecipeError, match="no layer to prune"):
        group.model_penalty(nn.LayerNorm(4))
    with pytest.raises(RecipeError, match="'nothing' matches none"):
        group.model_prox_(nn.Linear(4, 4), 0.1, include=["nothing"])
    with pytest.raises(RecipeError, match="none of the 3 layers' weights requires a gradient"):
        group.model_prox_(net().requires_grad_(False), 0.1)


def test_models_of_wrong_types():
    group = GroupSparsity("row", 1.0)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got Tensor"):
        group.model_penalty(torch.ones(2, 2))
    with pytest.raises(TypeError, match="exclude must be glob patterns"):
        group.model_prox_(net(), 0.1, exclude=[3])


def test_a_sharded_weight_keeps_its_shards():
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    torch.distributed.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=1)
    try:
        from torch.distributed.tensor import DTensor, Shard, distribute_tensor

        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model, plain = nn.Linear(6, 4), nn.Linear(6, 4)
        plain.load_state_dict(model.state_dict())
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        group = GroupSparsity("column", 0.2)
        for each in (model, plain):
            group.model_penalty(each).backward()
            group.model_prox_(each, 0.5)
            group.prox_(each.weight, 0.1)
        assert isinstance(model.weight, DTensor)
        assert type(group.penalty(model.weight)) is torch.Tensor  # whole, so that it adds to any loss
        assert model.weight.placements == (Shard(0),)
        assert torch.equal(model.weight.to_local(), plain.weight)
        assert torch.equal(model.weight.grad.to_local(), plain.weight.grad)
    finally:
        torch.distributed.destroy_process_group()


# Training


def regression():
    """Inputs with orthonormal columns, for which the group lasso has a closed form, and outputs."""
    x = torch.linalg.qr(random(20, 6)).Q
    return x, x @ (random(6, 4, seed=1) * torch.tensor([2.0, 0.1, 1.5, 0.1, 1.0, 0.1]).unsqueeze(1).double())


def trained(step, optimizer_of, steps=300):
    x, y = regression()
    model = nn.Linear(6, 4, bias=False).double()
    optimizer = optimizer_of(model)
    for _ in range(steps):
        optimizer.zero_grad()
        step(model, optimizer, (model(x) - y).square().sum() / 2)
    return model.weight.detach()


def test_gradient_steps_and_proximal_steps_find_the_group_lasso():
    """The learning rate of SGD is the step size: the solution is the proximal step, of size 1, from least squares."""
    group = GroupSparsity("column", 0.3)

    def step(model, optimizer, loss):
        loss.backward()
        optimizer.step()
        group.model_prox_(model, optimizer.param_groups[0]["lr"])

    weight = trained(step, lambda model: torch.optim.SGD(model.parameters(), lr=0.25))
    x, y = regression()
    least_squares = (x.T @ y).T.numpy()
    solution = torch.from_numpy(reference.group_prox(least_squares, Column(), 0.3))
    torch.testing.assert_close(weight, solution, rtol=1e-8, atol=1e-10)
    assert weight.any(0).tolist() == [True, False, True, False, True, False]


def test_adam_with_proximal_steps_drops_the_inputs_that_are_only_noise():
    """Its updates, not its gradients, stand against the strength: about 1 where all agree, 0.2 where they are noise."""
    generator = torch.Generator().manual_seed(0)
    model, group = nn.Linear(6, 4, bias=False), GroupSparsity("column", 0.5)
    truth = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0]).repeat(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(400):
        x = torch.randn(16, 6, generator=generator)
        y = x @ truth.T + 0.5 * torch.randn(16, 4, generator=generator)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        group.model_prox_(model, optimizer.param_groups[0]["lr"])
    assert model.weight.any(0).tolist() == [True, False, True, False, True, False]


def test_the_penalty_through_the_gradient_makes_units_small_but_never_zero():
    group = GroupSparsity("column", 0.3)

    def step(model, optimizer, loss):
        (loss + group.model_penalty(model)).backward()
        optimizer.step()

    weight = trained(step, lambda model: torch.optim.SGD(model.parameters(), lr=0.01), steps=1000)
    norms = weight.norm(dim=0)
    assert norms[1::2].max() < 0.02 < norms[::2].min()
    assert weight.all()


def test_a_compiled_penalty_is_the_same():
    weight = random(4, 6, dtype=torch.float32).requires_grad_()
    group = GroupSparsity("block:2x3", 0.1)
    compiled = torch.compile(group.penalty, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(weight), group.penalty(weight))


# A value, and its errors


def test_it_is_a_value():
    group = GroupSparsity("block:2x3,remainder=dense", 1)
    assert group == GroupSparsity(SparsityPattern.Block(2, 3, remainder="dense"), strength=1.0)
    assert repr(group) == "GroupSparsity(pattern=Block(2, 3, remainder='dense'), strength=1.0)"
    for twin in (
        copy.copy(group),
        copy.deepcopy(group),
        pickle.loads(pickle.dumps(group)),
        eval(repr(group), vars(secateur)),
    ):
        assert twin == group
        assert hash(twin) == hash(group)
    others = [GroupSparsity("row", 1.0), GroupSparsity("row", 2.0), GroupSparsity("column", 1.0)]
    assert len({group, *others}) == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        group.strength = 2.0


@pytest.mark.parametrize("value", [-1, -1e-9, math.nan, math.inf, -math.inf])
def test_numbers_out_of_range(value):
    allowed = "at least 0" if math.isfinite(value) else "a number" if math.isnan(value) else "finite"
    got = "NaN" if math.isnan(value) else f"{value:g}"
    with pytest.raises(RecipeError, match=f"strength must be {allowed}, got {got}"):
        GroupSparsity("row", value)
    weight = torch.ones(2, 2)
    for call in (GroupSparsity("row", 1.0).prox_, GroupSparsity("row", 1.0).model_prox_):
        with pytest.raises(RecipeError, match=f"step_size must be {allowed}, got {got}"):
            call(weight, value)
    assert torch.equal(weight, torch.ones(2, 2))


@pytest.mark.parametrize("value", [True, "0.1", None, torch.tensor(0.1)], ids=repr)
def test_numbers_of_wrong_types(value):
    name = type(value).__name__
    with pytest.raises(TypeError, match=f"strength must be a number, got {name}"):
        GroupSparsity("row", value)
    with pytest.raises(TypeError, match=f"step_size must be a number, got {name}"):
        GroupSparsity("row", 1.0).prox_(torch.ones(2, 2), value)


def test_a_learning_rate_that_is_a_tensor_is_told_what_to_do():
    with pytest.raises(TypeError, match=r"pass float\(step_size\)"):
        GroupSparsity("row", 1.0).model_prox_(net(), torch.tensor(0.1))


def test_patterns_that_are_none():
    with pytest.raises(PatternError, match="'rows' names no pattern"):
        GroupSparsity("rows", 1.0)
    with pytest.raises(TypeError, match="pattern must be a SparsityPattern or its text, got int"):
        GroupSparsity(4, 1.0)


@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
def test_weights_that_are_no_matrix(shape):
    group = GroupSparsity("row", 1.0)
    for call in (group.penalty, lambda weight: group.prox_(weight, 1.0)):
        with pytest.raises(PatternError, match=r"row needs a weight of shape \(out, in\) or, .* got shape \("):
            call(torch.ones(shape))


def test_weights_that_do_not_fit():
    group = GroupSparsity("block:2x3", 1.0)
    for call in (group.penalty, lambda weight: group.prox_(weight, 1.0)):
        with pytest.raises(PatternError, match="block:2x3 needs an input size that is a multiple of 3, got 4"):
            call(torch.ones(2, 4))


@pytest.mark.parametrize(
    "weight",
    [*(torch.ones(2, 2).to(kind) for kind in (torch.int64, torch.complex64, torch.float8_e4m3fn)), [[1.0]]],
    ids=lambda weight: str(getattr(weight, "dtype", "list")),
)
def test_weights_of_wrong_types(weight):
    group = GroupSparsity("row", 1.0)
    name = str(weight.dtype) if isinstance(weight, torch.Tensor) else "list"
    for call in (group.penalty, lambda weight: group.prox_(weight, 1.0)):
        with pytest.raises(TypeError, match=f"weight must be a floating-point tensor of 16 bits or more, got {name}"):
            call(weight)
