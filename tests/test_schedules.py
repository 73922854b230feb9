import copy
import dataclasses
import itertools
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur import PatternError, RecipeError
from secateur.schedules import Cubic, Linear, OneShot, Schedule

GRADUAL = [Linear, Cubic]
AWKWARD = [(0.7, 0.1), (0.0, 0.9), (1 / 3, 2 / 3), (5e-324, 1.0)]
SCHEDULES = [OneShot(0.9), OneShot(0.9, 10, 0.2), Linear(0.8, 10, 20), Linear(0.3, 0, 7, 0.1), Cubic(0.8, 10, 20)]

fractions = st.floats(0, 1)


def spans(longest):
    return st.tuples(st.integers(0, 10**6), st.integers(1, longest)).map(lambda pair: (pair[0], pair[0] + pair[1]))


# The values


@pytest.mark.parametrize("kind", GRADUAL)
@pytest.mark.parametrize("ends", AWKWARD, ids=str)
@pytest.mark.parametrize("span", [(0, 1), (10, 17), (5, 10**6)], ids=str)
def test_both_ends_are_exact_and_hold_beyond(kind, ends, span):
    (initial, final), (begin, end) = ends, span
    schedule = kind(final, begin, end, initial)
    assert [schedule(step) for step in (-1, 0, begin)] == [initial] * 3
    assert [schedule(step) for step in (end, end + 1, 10**30)] == [final] * 3


def test_the_end_would_not_be_exact_by_the_formula_alone():
    """0.7 + (0.1 - 0.7) is not 0.1: the case above separates an exact end from a plausible one."""
    assert 0.7 + (0.1 - 0.7) != 0.1


def test_one_shot_jumps_at_its_step():
    schedule = OneShot(0.3, at=5, initial=0.1)
    assert [schedule(step) for step in (-1, 0, 4, 5, 6)] == [0.1, 0.1, 0.1, 0.3, 0.3]


def test_linear_by_hand():
    """From 0.2 to 0.6 in four steps of 0.1."""
    schedule = Linear(0.6, begin=10, end=14, initial=0.2)
    assert [schedule(step) for step in range(9, 16)] == pytest.approx([0.2, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6], abs=1e-15)


def test_cubic_by_hand():
    """Zhu and Gupta, equation 1, from 0.2 to 1: 1 - 0.8 * (1 - t)^3, with (1 - t)^3 = 1, 27/64, 8/64, 1/64, 0.

    A cube of the progress itself, slow at first, would give 0.2125 after the first step.
    """
    schedule = Cubic(1.0, begin=10, end=14, initial=0.2)
    expected = [1 - 0.8 * cube / 64 for cube in (64, 27, 8, 1, 0)]
    assert [schedule(step) for step in range(10, 15)] == pytest.approx(expected, abs=1e-15)


@given(fractions, fractions, spans(400), st.sampled_from(GRADUAL))
def test_the_sparsity_is_monotone_and_stays_between_its_ends(initial, final, span, kind):
    schedule = kind(final, *span, initial)
    values = [schedule(step) for step in range(span[0], span[1] + 1)]
    if final < initial:
        values.reverse()
    assert all(a <= b for a, b in itertools.pairwise(values))
    assert (values[0], values[-1]) == (min(initial, final), max(initial, final))


@given(fractions, fractions, spans(10**9), st.sampled_from(GRADUAL), st.data())
def test_long_ramps_stay_between_their_ends(initial, final, span, kind, data):
    begin, end = span
    step = data.draw(st.integers(begin, end) | st.integers(max(begin, end - 5), end))
    assert min(initial, final) <= kind(final, begin, end, initial)(step) <= max(initial, final)


@given(fractions, fractions, spans(1000), st.data())
def test_cubic_is_ahead_of_linear(initial, final, span, data):
    step = data.draw(st.integers(*span))
    cubic, linear = Cubic(final, *span, initial)(step), Linear(final, *span, initial)(step)
    assert abs(cubic - initial) >= abs(linear - initial) - 1e-15


@pytest.mark.parametrize("kind", GRADUAL)
@pytest.mark.parametrize("at", [0, 1, 10])
def test_a_ramp_of_no_length_is_one_shot(kind, at):
    schedule, jump = kind(0.3, begin=at, end=at, initial=0.1), OneShot(0.3, at, initial=0.1)
    assert [schedule(step) for step in range(-1, 13)] == [jump(step) for step in range(-1, 13)]


@pytest.mark.parametrize("schedule", [OneShot(1, 5), Linear(1, 5, 9), Cubic(1, 5, 9)], ids=repr)
def test_the_value_is_a_float_even_of_whole_numbers(schedule):
    assert {type(schedule(step)) for step in range(12)} == {float}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_end_is_the_first_step_at_the_final_sparsity(schedule):
    assert schedule(schedule.end) == schedule.final
    assert schedule.end == 0 or schedule(schedule.end - 1) < schedule.final


# A value


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_schedule_is_a_value(schedule):
    names = {type(schedule).__name__: type(schedule)}
    for twin in (copy.copy(schedule), copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule)),
                 eval(repr(schedule), names)):  # fmt: skip
        assert twin == schedule
        assert hash(twin) == hash(schedule)
        assert [twin(step) for step in range(30)] == [schedule(step) for step in range(30)]
    assert isinstance(schedule, Schedule)


def test_schedules_differ_by_kind_and_by_each_field():
    arguments = [(0.5, 0, 2), (0.6, 0, 2), (0.5, 1, 2), (0.5, 0, 3), (0.5, 0, 2, 0.1)]
    schedules = [
        OneShot(0.5), OneShot(0.6), OneShot(0.5, 1), OneShot(0.5, 0, 0.1),
        *(kind(*fields) for kind in GRADUAL for fields in arguments),
    ]  # fmt: skip
    assert len(set(schedules)) == len(schedules)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_schedule_cannot_be_changed(schedule):
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.final = 0.1


def test_calls_leave_no_trace():
    schedule = Cubic(0.8, 10, 20)
    forward = [schedule(step) for step in range(30)]
    assert [schedule(step) for step in reversed(range(30))] == forward[::-1]


def test_schedule_itself_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Schedule()


# Errors


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("name", ["final", "initial"])
@pytest.mark.parametrize(("kind", "steps"), [(OneShot, {"at": 3}), (Cubic, {"begin": 0, "end": 3})])
def test_a_sparsity_outside_its_range(kind, steps, name, value):
    with pytest.raises(PatternError, match=rf"{name} is the fraction of zeros, between 0 and 1, got {value:g}\."):
        kind(**{"final": 0.5, name: value}, **steps)


@pytest.mark.parametrize("name", ["final", "initial"])
@pytest.mark.parametrize("kind", GRADUAL)
def test_a_sparsity_that_is_no_number(kind, name):
    with pytest.raises(TypeError, match=f"{name} must be a number, got str"):
        kind(**{"final": 0.5, name: "0.5"}, begin=0, end=3)


@pytest.mark.parametrize(
    ("span", "message"), [((-1, 5), "begin must be at least 0, got -1"), ((5, 4), "end must be at least 5, got 4")]
)
@pytest.mark.parametrize("kind", GRADUAL)
def test_steps_out_of_order(kind, span, message):
    with pytest.raises(RecipeError, match=message):
        kind(0.5, *span)


@pytest.mark.parametrize("name", ["begin", "end"])
@pytest.mark.parametrize("kind", GRADUAL)
def test_a_step_that_is_no_int(kind, name):
    with pytest.raises(TypeError, match=f"{name} must be an int, got float"):
        kind(0.5, **{"begin": 0, "end": 3, name: 1.0})


def test_one_shot_names_its_own_argument():
    with pytest.raises(RecipeError, match="at must be at least 0, got -1"):
        OneShot(0.5, at=-1)
    with pytest.raises(TypeError, match="at must be an int, got float"):
        OneShot(0.5, at=1.0)
