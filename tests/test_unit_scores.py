import itertools

import numpy as np
import pytest
import reference
import torch
from torch import nn

from secateur import LayerStatistics, PatternError, RecipeError, SolverError, StatisticsError
from secateur.layers import select_layers
from secateur.solvers import (
    UNIT_IMPORTANCES,
    Reader,
    UnitFLAP,
    UnitOBS,
    columns_of,
    refit_columns,
    remove_columns,
    remove_units,
)

FROM_INPUTS = ["obs", "flap", "wanda", "magnitude"]
NUMPY = {"rtol": 1e-9, "atol": 1e-9}


def inputs_of(columns=12, tokens=60, groups=1, seed=0, mean=2.0):
    """Correlated inputs that are not centred, ``[groups, tokens, columns]``."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    rows = torch.randn(groups, tokens, columns, generator=generator, dtype=torch.float64)
    return rows @ mix + mean * torch.randn(columns, generator=generator, dtype=torch.float64)


def weight_of(rows=6, columns=12, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(x):
    norm, gram = torch.linalg.vector_norm(x, dim=1), x.mT @ x
    gradients = torch.randn(4, x.shape[2], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return LayerStatistics(
        tokens=x.shape[1], input_norm=norm, input_mean=x.mean(1), gram=gram, input_gradients=gradients
    )


def units_of(columns=12, width=1):
    """Units whose columns are not adjacent."""
    return torch.arange(columns).view(width, -1).T.contiguous()


def damped(x, damping=0.01):
    return reference.damped(reference.gram(x.numpy()), damping)


def true_score(name, weight, x, unit):
    match name:
        case "magnitude":
            return reference.unit_magnitude(weight, unit)
        case "wanda":
            return reference.unit_wanda(weight, x, unit)
        case "flap":
            return reference.unit_flap(weight, x, unit)
        case "obs":
            return reference.without_columns(weight, reference.damped(reference.gram(x), 0.01), unit)[1]


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", FROM_INPUTS)
def test_scores_are_those_of_the_formula(name, groups, width):
    weight, x, units = weight_of(), inputs_of(groups=groups), units_of(width=width)
    found = UNIT_IMPORTANCES[name]().scores(weight, statistics_of(x), units)
    parts = list(zip(weight.chunk(groups), x, strict=True))
    truth = [sum(true_score(name, w.numpy(), rows.numpy(), unit) for w, rows in parts) for unit in units.tolist()]
    np.testing.assert_allclose(found.numpy(), truth, rtol=1e-9)


@pytest.mark.parametrize("name", UNIT_IMPORTANCES)
def test_scores_are_finite_and_one_for_each_unit(name):
    """A dead input, a dead weight, half precision, and the units of a graph, which are of NumPy."""
    weight, x, units = weight_of().bfloat16(), inputs_of(), units_of(width=2)
    weight[2], weight[:, 5] = 0, 0
    x[:, :, 3] = 0
    found = UNIT_IMPORTANCES[name]().scores(weight, statistics_of(x), units.numpy())
    assert found.shape == (6,)
    assert found.dtype == torch.float64
    assert found.isfinite().all()
    assert (found >= 0).all()


@pytest.mark.parametrize("name", ["obs", "flap", "wanda"])
def test_a_unit_that_never_fires_costs_nothing(name):
    x = inputs_of()
    x[:, :, 3] = 0
    found = UNIT_IMPORTANCES[name]().scores(weight_of(), statistics_of(x), units_of())
    assert found[3] == 0
    assert (found > 0).sum() == 11


def test_a_constant_unit_is_free_only_where_its_mean_is_folded():
    x = inputs_of()
    x[:, :, 3] = 1000.0
    statistics = statistics_of(x)
    rounded = LayerStatistics(
        tokens=60, input_norm=statistics.input_norm.float(), input_mean=statistics.input_mean, gram=statistics.gram
    )
    assert UnitFLAP().scores(weight_of(), rounded, units_of()).argmin() == 3
    assert UnitFLAP().scores(weight_of(), rounded, units_of())[3] == 0
    assert UNIT_IMPORTANCES["wanda"]().scores(weight_of(), rounded, units_of()).argmax() == 3


FROM_STATISTICS = [name for name, kind in UNIT_IMPORTANCES.items() if kind().needs]


@pytest.mark.parametrize("name", FROM_STATISTICS)
def test_a_missing_statistic_is_named(name):
    importance = UNIT_IMPORTANCES[name]()
    with pytest.raises(StatisticsError, match="needs calibration inputs"):
        importance.scores(weight_of(), None, units_of())
    with pytest.raises(StatisticsError, match="was not gathered"):
        importance.scores(weight_of(), LayerStatistics(tokens=3), units_of())


@pytest.mark.parametrize("name", FROM_STATISTICS)
def test_statistics_of_another_layer_are_refused(name):
    with pytest.raises(StatisticsError, match=r"fit a weight \(6, 12\)"):
        UNIT_IMPORTANCES[name]().scores(weight_of(), statistics_of(inputs_of(columns=11)), units_of())


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([[0], [12]], "numbers from 0 to 12"),
        ([[-1], [2]], "numbers from -1 to 2"),
        ([[0, 1], [1, 2]], "1 columns are in several"),
        ([0, 1], "units must be integers"),
        ([[0.5]], "units must be integers"),
        ([[]], "units must be integers"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", [*UNIT_IMPORTANCES, "remove_columns"])
def test_units_that_are_no_columns_are_refused(name, units, message):
    statistics = statistics_of(inputs_of())

    def use():
        if name == "remove_columns":
            return remove_columns(weight_of(), statistics.gram, torch.tensor(units), 1)
        return UNIT_IMPORTANCES[name]().scores(weight_of(), statistics, torch.tensor(units))

    with pytest.raises(PatternError, match=message):
        use()


def without_units(name):
    """A layer whose input features can be zeroed, an input of it, and the dimension of its weight that reads them."""
    torch.manual_seed(0)
    match name:
        case "linear":
            return nn.Linear(6, 4), torch.randn(5, 6), 1, 1
        case "transposed linear":
            return pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 6), torch.randn(5, 6), 0, 1
        case "convolution":
            return nn.Conv2d(6, 4, (3, 2)), torch.randn(2, 6, 5, 5), 1, 1
        case "grouped convolution":
            return nn.Conv1d(12, 4, 3, groups=2), torch.randn(2, 12, 5), 1, 2
        case "transposed convolution":
            return nn.ConvTranspose2d(6, 4, 3), torch.randn(2, 6, 5, 5), 0, 1
        case "grouped transposed convolution":
            return nn.ConvTranspose1d(12, 4, 3, groups=2), torch.randn(2, 12, 5), 0, 2


KINDS = [
    "linear", "transposed linear", "convolution", "grouped convolution",
    "transposed convolution", "grouped transposed convolution",
]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_zero_columns_take_units_out_in_each_layer_kind(name):
    module, x, dim, groups = without_units(name)
    module, x = module.double(), x.double()
    layer = select_layers(nn.Sequential(module))[0][0]
    units = torch.tensor([[0, 4], [5, 2], [1, 3]])
    indices = torch.cat([units, units + 6], 1) if (groups, dim) == (2, 0) else units
    columns = columns_of(layer, dim, indices.numpy())
    assert len(columns) == 3
    features_first = x.movedim(1, 0).clone()
    for group in range(groups):
        features_first[units[1] + 6 * group] = 0
    expected = module(features_first.movedim(0, 1))
    matrix = layer.matrix().clone()
    matrix[:, columns[1]] = 0
    assert not torch.allclose(module(x), expected)
    layer.write_(matrix)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    ("name", "dim", "units"),
    [("linear", 0, [[0], [1]]), ("grouped transposed convolution", 0, [[0], [1]])],
    ids=["rows", "one group only"],
)
def test_what_is_not_by_columns_is_refused(name, dim, units):
    layer = select_layers(nn.Sequential(without_units(name)[0]))[0][0]
    with pytest.raises(
        PatternError, match=r"0: indices along dimension 0 of its parameter .* are not the same columns"
    ):
        columns_of(layer, dim, units)


# One unit after the other


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("delay", [128, 6])
def test_greedy_removal_is_that_of_a_new_fit_each_time(width, delay, monkeypatch):
    """Also where what was removed is applied to the large matrices several times."""
    monkeypatch.setattr("secateur.solvers._remove._DELAY", delay)
    weight, x, units = weight_of(columns=18), inputs_of(columns=18)[0], units_of(18, width)
    order, costs = remove_columns(weight, x.T @ x, units, 1)
    true_order, true_costs = reference.greedy_removal(weight.numpy(), damped(x), units.tolist(), 1)
    assert order.tolist() == true_order
    np.testing.assert_allclose(costs.numpy(), true_costs, rtol=1e-8)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("width", [1, 2])
def test_the_first_that_goes_is_the_best_single_one(width, seed):
    weight, x, units = weight_of(seed=seed), inputs_of(seed=seed)[0], units_of(width=width)
    order, costs = remove_columns(weight, x.T @ x, units, len(units) - 1)
    errors = [reference.without_columns(weight.numpy(), damped(x), unit)[1] for unit in units.tolist()]
    assert order.tolist() == [int(np.argmin(errors))]
    np.testing.assert_allclose(costs.numpy(), [min(errors)], rtol=1e-9)


def test_greedy_beats_scores_that_are_computed_once():
    """Each of two inputs that are nearly equal can go, but not both."""
    wins = 0
    for seed in range(8):
        x = inputs_of(6, seed=seed, mean=0.0)[0]
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x = torch.cat([x, x + 0.05 * noise], 1)
        weight, units = weight_of(seed=seed), units_of()
        _, costs = remove_columns(weight, x.T @ x, units, 6)
        scores = UnitOBS().scores(weight, statistics_of(x[None]), units)
        once = reference.without_columns(weight.numpy(), damped(x), scores.argsort()[:6].tolist())[1]
        assert float(costs[-1]) <= once * (1 + 1e-9)
        wins += float(costs[-1]) < 0.5 * once
    assert wins >= 6


def test_all_units_can_go_and_then_all_of_the_output_is_lost():
    weight, x = weight_of(), inputs_of()[0]
    order, costs = remove_columns(weight, x.T @ x, units_of(), 0)
    assert sorted(order.tolist()) == list(range(12))
    np.testing.assert_allclose(float(costs[-1]), np.trace(weight.numpy() @ damped(x) @ weight.numpy().T), rtol=1e-8)
    order, costs = remove_columns(weight, x.T @ x, units_of(), 12)
    assert order.shape == costs.shape == (0,)


@pytest.mark.parametrize("per_step", [1, 2, 3, 50])
def test_costs_are_exact_however_many_go_in_a_step(per_step):
    weight, x, units = weight_of(), inputs_of()[0], units_of(width=2)
    order, costs = remove_columns(weight, x.T @ x, units, 2, per_step=per_step)
    assert len(set(order.tolist())) == 4
    for number, cost in enumerate(costs.tolist(), 1):
        gone = units[order[:number]].flatten().tolist()
        truth = reference.without_columns(weight.numpy(), damped(x), gone)[1]
        np.testing.assert_allclose(cost, truth, rtol=1e-9)


def test_columns_of_no_unit_stay_and_take_over():
    weight, x, units = weight_of(), inputs_of()[0], units_of()[:5]
    order, costs = remove_columns(weight, x.T @ x, units, 2)
    true_order, true_costs = reference.greedy_removal(weight.numpy(), damped(x), units.tolist(), 2)
    assert order.tolist() == true_order
    np.testing.assert_allclose(costs.numpy(), true_costs, rtol=1e-9)


def test_dead_inputs_go_first_and_cost_nothing():
    x = inputs_of()[0]
    x[:, [2, 9]] = 0
    order, costs = remove_columns(weight_of(), x.T @ x, units_of(), 9)
    assert set(order[:2].tolist()) == {2, 9}
    assert costs[:2].tolist() == [0, 0]
    assert costs[2] > 0


@pytest.mark.parametrize("widths", [(1, 1), (1, 3)], ids=str)
def test_layers_that_read_the_same_units_decide_together(widths):
    readers, truth = [], np.zeros(4)
    for seed, width in enumerate(widths):
        weight, x, units = weight_of(columns=4 * width, seed=seed), inputs_of(4 * width, seed=seed)[0], None
        units = units_of(4 * width, width)
        readers.append(Reader(weight, x.T @ x, units))
        truth += [reference.without_columns(weight.numpy(), damped(x), unit)[1] for unit in units.tolist()]
    order, costs = remove_units(readers, 3)
    assert order.tolist() == [int(truth.argmin())]
    np.testing.assert_allclose(costs.numpy(), [truth.min()], rtol=1e-9)


def test_groups_of_a_convolution_decide_together():
    weight, x = weight_of(), inputs_of(groups=2)
    parts = [Reader(part, rows.T @ rows, units_of()) for part, rows in zip(weight.chunk(2), x, strict=True)]
    order, costs = remove_columns(weight, x.mT @ x, units_of(), 5)
    expected, expected_costs = remove_units(parts, 5)
    assert order.tolist() == expected.tolist()
    torch.testing.assert_close(costs, expected_costs)


def test_as_many_go_of_each_group_when_asked():
    weight, x = weight_of(), inputs_of()[0]
    weight[:, :4] *= 0.01  # without groups, these would go
    order, costs = remove_columns(weight, x.T @ x, units_of(), 6, group_size=4)
    assert sorted((order // 4).tolist()) == [0, 0, 1, 1, 2, 2]
    gone = order.tolist()
    np.testing.assert_allclose(float(costs[-1]), reference.without_columns(weight.numpy(), damped(x), gone)[1])
    free, _ = remove_columns(weight, x.T @ x, units_of(), 6)
    assert set(range(4)) <= set(free.tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 13}, "13 of 12 units"),
        ({"keep": -1}, "-1 of 12 units"),
        ({"keep": 7, "group_size": 4}, "in 3 groups of 4"),
        ({"keep": 5, "group_size": 5}, "in 2 groups of 5"),
    ],
    ids=str,
)
def test_numbers_that_are_not_possible_are_refused(options, message):
    x = inputs_of()[0]
    with pytest.raises(PatternError, match=message):
        remove_columns(weight_of(), x.T @ x, units_of(), **options)


def test_settings_of_removal_are_checked():
    x = inputs_of()[0]
    with pytest.raises(RecipeError, match="damping"):
        remove_columns(weight_of(), x.T @ x, units_of(), 3, damping=-1.0)
    with pytest.raises(RecipeError, match="per_step"):
        remove_columns(weight_of(), x.T @ x, units_of(), 3, per_step=0)
    with pytest.raises(StatisticsError, match="does not fit"):
        remove_columns(weight_of(), torch.eye(11), units_of(), 3)
    with pytest.raises(SolverError, match="not positive definite"):
        remove_columns(weight_of(), -torch.eye(12), units_of(), 3)
    different = [Reader(weight_of(), torch.eye(12), units_of(width=width)) for width in (1, 2)]
    with pytest.raises(PatternError, match=r"\[12, 6\]"):
        remove_units(different, 3)


# What stays takes over


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("bias", "weights"), list(itertools.product([False, True], repeat=2)), ids=lambda on: "with" if on else "without"
)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_refit_is_least_squares_on_the_inputs(bias, weights, damping, groups):
    weight, x = weight_of(), inputs_of(groups=groups)
    kept = torch.tensor([True, False, True, True] * 3)
    found = refit_columns(weight, statistics_of(x), kept, bias=bias, weights=weights, damping=damping)
    parts = [
        reference.refit_columns(w.numpy(), rows.numpy(), kept.numpy(), damping, bias=bias, weights=weights)
        for w, rows in zip(weight.chunk(groups), x, strict=True)
    ]
    np.testing.assert_allclose(found.weight.numpy(), np.concatenate([part[0] for part in parts]), **NUMPY)
    np.testing.assert_allclose(found.error_after, sum(part[2] for part in parts), rtol=1e-8)
    if bias:
        np.testing.assert_allclose(found.bias_shift.numpy(), np.concatenate([part[1] for part in parts]), **NUMPY)
    else:
        assert found.bias_shift is None
    assert (found.weight[:, ~kept] == 0).all()


def test_errors_are_those_of_the_output():
    weight, x = weight_of(), inputs_of()
    kept = torch.tensor([True, False, True, True] * 3)
    found = refit_columns(weight, statistics_of(x), kept, bias=True)
    dense = x[0] @ weight.T
    torch.testing.assert_close(found.energy, float(dense.square().sum()))
    torch.testing.assert_close(found.error_before, float((dense - x[0] @ (weight * kept).T).square().sum()))
    after = dense - x[0] @ found.weight.T - found.bias_shift
    torch.testing.assert_close(found.error_after, float(after.square().sum()))
    assert found.error_after < found.error_before


def test_each_way_to_make_up_for_what_went_is_better_than_less():
    statistics, kept = statistics_of(inputs_of()), torch.tensor([True, False, True, True] * 3)

    def error(**options):
        return refit_columns(weight_of(), statistics, kept, damping=0.0, **options).error_after

    nothing, only_bias = error(bias=False, weights=False), error(bias=True, weights=False)
    only_weights, both = error(bias=False), error(bias=True)
    assert both < only_weights < nothing
    assert both < only_bias < nothing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_refit_keeps_the_dtype_and_says_the_error_of_the_rounded_weight(dtype):
    weight, x = weight_of().to(dtype), inputs_of()
    kept = torch.arange(12) < 8
    found = refit_columns(weight, statistics_of(x), kept, bias=True)
    assert found.weight.dtype == found.bias_shift.dtype == dtype
    lost = x[0] @ (weight.double() - found.weight.double()).T
    np.testing.assert_allclose(found.error_after, float((lost - lost.mean(0)).square().sum()), rtol=1e-6)


def test_refit_on_too_few_and_dead_inputs_stays_finite():
    x = inputs_of(tokens=4)
    x[:, :, [0, 5]] = 0
    x[:, :, 7] = 1000.0
    kept = torch.arange(12) < 9
    found = refit_columns(weight_of(), statistics_of(x.float()), kept, bias=True)
    assert found.weight.isfinite().all()
    assert found.error_after < found.error_before
    # What multiplies an input that never fires stays as it is.
    torch.testing.assert_close(found.weight[:, [0, 5]], weight_of()[:, [0, 5]])


@pytest.mark.parametrize(
    "kept", [torch.ones(12, dtype=torch.bool), torch.zeros(12, dtype=torch.bool)], ids=["all", "none"]
)
def test_refit_of_all_or_no_columns(kept):
    weight, x = weight_of(), inputs_of()
    found = refit_columns(weight, statistics_of(x), kept, bias=True)
    torch.testing.assert_close(found.weight, weight * kept)
    torch.testing.assert_close(found.bias_shift, (weight * ~kept) @ x[0].mean(0))


@pytest.mark.parametrize("kept", [torch.ones(11, dtype=torch.bool), torch.ones(12)], ids=["short", "floating"])
def test_kept_columns_that_do_not_fit_are_refused(kept):
    with pytest.raises(PatternError, match=r"kept must be bool \[12\]"):
        refit_columns(weight_of(), statistics_of(inputs_of()), kept, bias=False)


def test_refit_needs_its_statistics():
    kept = torch.arange(12) < 9
    with pytest.raises(StatisticsError, match="pass batches"):
        refit_columns(weight_of(), None, kept, bias=False)
    with pytest.raises(StatisticsError, match="'input_mean' was not gathered"):
        refit_columns(weight_of(), LayerStatistics(tokens=3, gram=torch.eye(12)), kept, bias=True)
