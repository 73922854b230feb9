"""The exact choice of one option for each layer: it is what trying all choices gives."""

import itertools
import random

import pytest

from secateur import RecipeError
from secateur.pruning import Option, choose, choose_many


def drawn(seed, layers=4, options=4, budgets=1, step=1):
    generator = random.Random(seed)
    return [
        [
            Option(tuple(step * generator.randint(0, 30) for _ in range(budgets)), generator.random())
            for _ in range(options)
        ]
        for _ in range(layers)
    ]


def by_trying(layers, budgets, fixed=None, nearest=False):
    """The least loss over all choices that count."""
    fixed = fixed or (0,) * len(budgets)
    choices = []
    for picked in itertools.product(*layers):
        costs = tuple(sum(option.costs[axis] for option in picked) + fixed[axis] for axis in range(len(budgets)))
        choices.append((costs, sum(option.loss for option in picked)))
    if nearest:
        least = min(abs(costs[0] - budgets[0]) for costs, _ in choices)
        return min(loss for costs, loss in choices if abs(costs[0] - budgets[0]) == least)
    return min(
        (loss for costs, loss in choices if all(c <= b for c, b in zip(costs, budgets, strict=True))), default=None
    )


@pytest.mark.parametrize("within", ["at most", "nearest"])
@pytest.mark.parametrize("step", [1, 12])
@pytest.mark.parametrize("seed", range(12))
def test_one_budget_is_solved_as_by_trying_all_choices(seed, step, within):
    layers = drawn(seed, step=step)
    budget = step * 60 + (seed % 3)
    found = choose(layers, [budget], within=within)
    assert found.loss == pytest.approx(by_trying(layers, [budget], nearest=within == "nearest"))
    picked = [options[number] for options, number in zip(layers, found.picked, strict=True)]
    assert found.costs == (sum(option.costs[0] for option in picked),)
    assert found.loss == pytest.approx(sum(option.loss for option in picked))


@pytest.mark.parametrize("seed", range(12))
def test_two_budgets_are_solved_as_by_trying_all_choices(seed):
    layers = drawn(seed, budgets=2)
    budgets = (50, 45 + seed)
    best = by_trying(layers, budgets)
    if best is None:
        with pytest.raises(RecipeError, match=r"no choice is within the budgets|the cheapest choice costs"):
            choose(layers, budgets)
        return
    found = choose(layers, budgets)
    assert found.loss == pytest.approx(best)
    assert all(cost <= budget for cost, budget in zip(found.costs, budgets, strict=True))


@pytest.mark.parametrize("seed", range(6))
def test_what_is_fixed_is_taken_off_once_and_every_candidate_sees_the_whole_budget(seed):
    """A published planner takes it off inside its loops, so that later candidates see a budget that has shrunk."""
    layers = drawn(seed)
    budgets = [70]
    expected = by_trying(layers, budgets, fixed=(20,))
    for _ in range(3):
        found = choose(layers, budgets, fixed=(20,))
        assert found.loss == pytest.approx(expected)
        assert found.costs[0] <= 70
    assert budgets == [70]
    order = choose(layers[::-1], budgets, fixed=(20,))  # the order of the candidates makes no difference
    assert order.loss == pytest.approx(expected)


def test_a_greedy_choice_would_be_worse():
    layers = [[Option((0,), 9.0), Option((6,), 0.0)], *[[Option((0,), 5.0), Option((5,), 0.0)] for _ in range(2)]]
    assert choose(layers, [10]).picked == (0, 1, 1)  # the largest gain first would leave room for nothing else


def test_an_option_with_an_infinite_loss_is_never_chosen():
    assert choose([[Option((0,), float("inf")), Option((3,), 1.0)]], [3]).picked == (1,)


def test_nearest_may_lie_above_and_of_equal_totals_the_least_loss_counts():
    layers = [[Option((0,), 0.0), Option((10,), loss)] for loss in (3.0, 1.0, 2.0)]
    assert choose(layers, [16], within="nearest").picked == (0, 1, 1)
    assert choose(layers, [14], within="nearest").picked == (0, 1, 0)


@pytest.mark.parametrize(
    ("layers", "budgets", "message"),
    [
        ([[Option((7,), 0.0)], [Option((5,), 0.0)]], [11], "the budget is 11, but the cheapest choice costs 12"),
        ([[Option((7, 0), 0.0), Option((0, 7), 0.0)]], [5, 5], "no choice is within the budgets 5, 5 at once"),
        ([[Option((1,), 0.0), Option((99_999_999,), 0.0)]], [100_000_000], "Give the costs in coarser units"),
    ],
)
def test_what_cannot_be_solved_is_said_with_what_is_possible(layers, budgets, message):
    with pytest.raises(RecipeError, match=message):
        choose(layers, budgets)


@pytest.mark.parametrize("budgets", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_the_integer_program_is_what_trying_all_choices_gives(seed, budgets):
    layers = drawn(seed, budgets=budgets)
    limits = (55, 60 + seed, 58)[:budgets]
    best = by_trying(layers, limits)
    picked = choose_many([[(option.costs, option.loss) for option in options] for options in layers], limits)
    if best is None:
        assert picked is None
        return
    chosen = [options[number] for options, number in zip(layers, picked, strict=True)]
    assert sum(option.loss for option in chosen) == pytest.approx(best)
    assert all(sum(option.costs[axis] for option in chosen) <= limit for axis, limit in enumerate(limits))
