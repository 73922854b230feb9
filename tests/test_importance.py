import math

import numpy as np
import pytest
import reference
import torch
from cases import IMPORTANCES

from secateur import (
    NM,
    RIA,
    Column,
    LayerStatistics,
    Magnitude,
    Random,
    RecipeError,
    StatisticsError,
    Unstructured,
    Wanda,
)

FROM_INPUTS = [importance for importance in IMPORTANCES if importance.needs]


def weight_of(rows=6, columns=8, dtype=torch.float64):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def statistics_of(columns=8, groups=None):
    shape = (columns,) if groups is None else (groups, columns)
    norm = torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).exp()
    return LayerStatistics(tokens=16, input_norm=norm)


def truth(importance, weight, norms):
    match importance:
        case Magnitude():
            return reference.magnitude(weight)
        case Wanda():
            return reference.wanda(weight, norms)
        case RIA(exponent=exponent):
            return reference.ria(weight, norms, exponent)


@pytest.mark.parametrize("importance", [Magnitude(), *FROM_INPUTS], ids=str)
def test_scores_are_those_of_the_paper(importance):
    weight, statistics = weight_of(), statistics_of()
    weight[2], weight[:, 5] = 0, 0
    expected = truth(importance, weight.numpy(), statistics.input_norm.numpy())
    np.testing.assert_allclose(importance.scores(weight, statistics).numpy(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("importance", IMPORTANCES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_scores_are_finite_and_wide(importance, dtype):
    """In float16 the largest weight times an input norm of 3000 would be infinite."""
    weight = weight_of(dtype=dtype)
    weight[0, 0], weight[3], weight[:, 4] = 65504.0, 0, 0
    before = weight.clone()
    statistics = LayerStatistics(tokens=16, input_norm=torch.full((8,), 3000.0))
    scores = importance.scores(weight, statistics)
    assert scores.shape == weight.shape
    assert scores.dtype in (torch.float32, torch.float64)
    assert scores.isfinite().all()
    assert (scores >= 0).all()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("importance", IMPORTANCES, ids=str)
def test_scores_carry_no_gradient(importance):
    assert not importance.scores(weight_of().requires_grad_(), statistics_of()).requires_grad


@pytest.mark.parametrize("importance", FROM_INPUTS, ids=str)
def test_dead_inputs_score_zero(importance):
    statistics = statistics_of()
    statistics.input_norm[[2, 6]] = 0
    dead = importance.scores(weight_of(), statistics) == 0
    assert dead.all(0).tolist() == [False, False, True, False, False, False, True, False]
    assert dead.sum() == 12


@pytest.mark.parametrize("importance", FROM_INPUTS, ids=str)
def test_groups_score_as_layers_of_their_own(importance):
    """The same column of two groups multiplies two different inputs."""
    weight, statistics = weight_of(rows=6), statistics_of(groups=3)
    scores = importance.scores(weight, statistics)
    for group in range(3):
        rows = slice(2 * group, 2 * group + 2)
        alone = LayerStatistics(tokens=16, input_norm=statistics.input_norm[group])
        torch.testing.assert_close(scores[rows], importance.scores(weight[rows], alone))


def test_wanda_uses_the_norm_not_its_square():
    """``|w| * norm`` is [2, 3] and keeps the second; ``|w| * norm ** 2`` is [4, 3] and would keep the first."""
    statistics = LayerStatistics(tokens=1, input_norm=torch.tensor([2.0, 1.0]))
    scores = Wanda().scores(torch.tensor([[1.0, 3.0]]), statistics)
    assert scores.tolist() == [[2.0, 3.0]]
    assert NM(1, 2).mask(scores).tolist() == [[False, True]]


def test_wanda_takes_the_root_once():
    """``|w| * norm`` is [4, 3] and keeps the first; ``|w| * sqrt(norm)`` is [2, 3] and would keep the second."""
    statistics = LayerStatistics(tokens=1, input_norm=torch.tensor([4.0, 1.0]))
    assert NM(1, 2).mask(Wanda().scores(torch.tensor([[1.0, 3.0]]), statistics)).tolist() == [[True, False]]


def test_wanda_ranks_as_magnitude_within_a_column():
    weight = weight_of()
    wanda = Wanda().scores(weight, statistics_of())
    assert torch.equal(wanda.argsort(0), weight.abs().argsort(0))


def test_ria_by_hand():
    """Columns sum to 4 and 8, rows to 10 and 2; norms of 4 and 1 enter by their root."""
    weight = torch.tensor([[3.0, -7.0], [1.0, 1.0]])
    statistics = LayerStatistics(tokens=1, input_norm=torch.tensor([4.0, 1.0]))
    scores = RIA().scores(weight, statistics)
    torch.testing.assert_close(
        scores, torch.tensor([[(3 / 4 + 3 / 10) * 2, 7 / 8 + 7 / 10], [(1 / 4 + 1 / 2) * 2, 5 / 8]])
    )
    assert NM(1, 2).mask(scores).tolist() == [[True, False], [True, False]]


def test_ria_shares_change_the_choice():
    """By size the row keeps 5; by share it keeps 4, which is all that its input has, while 5 is a twentieth."""
    weight = torch.tensor([[4.0, 5.0], [0.0, 95.0]])
    statistics = LayerStatistics(tokens=1, input_norm=torch.ones(2))
    assert NM(1, 2).mask(RIA().scores(weight, statistics))[0].tolist() == [True, False]
    assert NM(1, 2).mask(Wanda().scores(weight, statistics))[0].tolist() == [False, True]


def test_scopes_are_those_of_the_papers():
    assert (Magnitude().scope, Wanda().scope, RIA().scope) == ("layer", "row", "row")
    assert Magnitude().needs == Random().needs == frozenset()
    assert Wanda().needs == RIA().needs == {"input_norm"}


@pytest.mark.parametrize("importance", FROM_INPUTS, ids=str)
def test_missing_inputs_are_an_error(importance):
    with pytest.raises(StatisticsError, match="calibration"):
        importance.scores(weight_of(), None)
    with pytest.raises(StatisticsError, match="'input_norm' was not gathered"):
        importance.scores(weight_of(), LayerStatistics(tokens=1))


@pytest.mark.parametrize("importance", FROM_INPUTS, ids=str)
def test_inputs_of_another_layer_are_an_error(importance):
    for shape in ((7,), (1,), (4, 8), (2, 4)):
        with pytest.raises(StatisticsError, match="does not fit a weight"):
            importance.scores(weight_of(), LayerStatistics(tokens=1, input_norm=torch.ones(shape)))


@pytest.mark.parametrize("importance", [Magnitude(), Random()], ids=str)
def test_without_needs_there_need_be_no_statistics(importance):
    assert importance.scores(weight_of(), None).shape == (6, 8)


def test_impossible_settings_are_refused():
    with pytest.raises(RecipeError, match="exponent must be a number, got NaN"):
        RIA(exponent=math.nan)
    with pytest.raises(TypeError, match="exponent must be a number, got str"):
        RIA(exponent="1")
    with pytest.raises(TypeError, match="seed must be an int, got float"):
        Random(seed=0.5)


# Random


def test_random_repeats_itself_and_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    first = Random(3).scores(weight_of(), None)
    assert torch.equal(first, Random(3).scores(weight_of(), None))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("other", [Random(4), Random(-3), Random(3 + 2**31)], ids=str)
def test_random_differs_between_seeds(other):
    assert not torch.equal(Random(3).scores(weight_of(), None), other.scores(weight_of(), None))


def test_random_differs_between_layers_of_one_shape():
    changed = weight_of()
    changed[5, 7] += 1
    assert not torch.equal(Random().scores(weight_of(), None), Random().scores(changed, None))


def test_random_depends_on_values_not_on_strides():
    assert torch.equal(Random().scores(weight_of(), None), Random().scores(weight_of().T.contiguous().T, None))


def test_random_takes_any_seed():
    for seed in (0, -1, 2**31, 2**32, 2**63, -(2**40)):
        assert Random(seed).scores(weight_of(), None).shape == (6, 8)


def test_random_is_uniform():
    scores = Random().scores(torch.ones(200, 200), None)
    assert 0 <= scores.min() < 0.001
    assert 0.999 < scores.max() < 1
    assert math.isclose(scores.mean(), 0.5, abs_tol=0.01)  # 7 standard deviations
    assert math.isclose(scores.std(), 1 / math.sqrt(12), abs_tol=0.01)


# Why units are scored by the sum of squares


@pytest.mark.parametrize("pattern", [Unstructured(), Column()], ids=str)
def test_wanda_masks_cost_least_when_inputs_are_uncorrelated(pattern):
    """Brute force over all masks of the same shape and count, with the true squared output error as the cost."""
    weight, statistics = weight_of(rows=2, columns=4), statistics_of(columns=4)
    cost = (weight * statistics.input_norm).square()
    mask = pattern.mask(Wanda().scores(weight, statistics), 0.5)
    costs = []
    for bits in range(2**8):
        other = torch.tensor([bits >> i & 1 for i in range(8)]).bool().view(2, 4)
        if other.sum() == 4 and (pattern == Unstructured() or (other == other[0]).all()):
            costs.append(cost[~other].sum().item())
    assert math.isclose(cost[~mask].sum().item(), min(costs), rel_tol=1e-12)
