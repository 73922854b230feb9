"""Methods as text and as tables."""

import re

import pytest
from cases import HEADS
from cases import METHODS as CASES
from hypothesis import given
from hypothesis import strategies as st

from secateur import (
    ADMM,
    ALPS,
    RIA,
    Importance,
    Magnitude,
    Random,
    RecipeError,
    Refit,
    Select,
    Solver,
    SparseGPT,
    Wanda,
)
from secateur.solvers import METHODS, WRAPPERS, method_from_dict, method_name, method_to_dict, parse_method

TUNED = [
    Select(RIA(exponent=0.25)),
    Select(Random(seed=7)),
    SparseGPT(block_size=64, damping=0.1),
    ADMM(iterations=20, gradual=15, rho=1.0, damping=0.1),
    ALPS(damping=0.1),
    Refit(Select(Magnitude()), iterations=3, damping=0.5),
    Refit(SparseGPT(block_size=32)),
    Refit(Refit(Select(RIA(2.0)))),
    Refit(Refit(SparseGPT()), iterations=3),
]


class OwnSolver(Solver):
    needs = frozenset()

    def solve(self, problem):
        raise NotImplementedError


class OwnImportance(Importance):
    needs = frozenset()
    scope = "layer"

    def scores(self, weight, statistics):
        raise NotImplementedError


class Tuned(SparseGPT):
    """A subclass may behave in another way, so its parent's name must not stand for it."""


class Picky(Select):
    """The same."""


def named(value):
    """Without addresses, which differ from one process to the next."""
    return re.sub(r" at 0x\w+", "", repr(value))


OWN = [OwnSolver(), Select(OwnImportance()), Tuned(), Picky(Wanda()), Refit(OwnSolver()), Refit(Tuned())]


def test_every_method_has_a_case():
    assert set(METHODS) == set(HEADS)
    assert set(CASES) == {*HEADS, *(f"{head}+{wrapper}" for head in HEADS for wrapper in WRAPPERS)}


@pytest.mark.parametrize("name", CASES)
def test_a_method_is_known_by_name(name):
    assert parse_method(name) == CASES[name]
    assert parse_method(f"  {name.upper()} ") == CASES[name]
    assert method_name(CASES[name]) == name


@given(st.sampled_from(METHODS), st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=4))
def test_text_composes_from_the_inside_out(head, wrappers):
    solver = HEADS[head]
    for wrapper in wrappers:
        solver = WRAPPERS[wrapper](solver)
    text = "+".join([head, *wrappers])
    assert parse_method(text) == solver
    assert method_name(solver) == text


@pytest.mark.parametrize("solver", [*TUNED, *OWN], ids=named)
def test_a_method_with_other_settings_or_of_another_class_is_named_by_its_repr(solver):
    assert method_name(solver) == repr(solver)


@pytest.mark.parametrize("solver", [*CASES.values(), *TUNED], ids=repr)
def test_a_table_gives_the_same_method_back(solver):
    again = method_from_dict(method_to_dict(solver))
    assert again == solver
    assert type(again) is type(solver)


@pytest.mark.parametrize("solver", OWN, ids=named)
def test_a_method_of_ones_own_is_shown_in_a_table_but_not_read_back(solver):
    table = method_to_dict(solver)
    assert any(name in str(table) for name in ("OwnSolver", "OwnImportance", "Tuned", "Picky"))
    with pytest.raises(RecipeError):
        method_from_dict(table)


@pytest.mark.parametrize("inner", ["sparsegpt", {"name": "sparsegpt", "block_size": 128}], ids=["name", "table"])
def test_the_method_inside_may_be_a_name_or_a_table(inner):
    assert method_from_dict({"name": "refit", "inner": inner}) == Refit(SparseGPT())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("wnada", ["unknown method 'wnada'", "did you mean 'wanda'", "sparsegpt"]),
        ("sparse-gpt", ["did you mean 'sparsegpt'"]),
        ("wanda+refitt", ["unknown method suffix '+refitt'", "did you mean '+refit'"]),
        ("wanda+refit+refitt", ["unknown method suffix '+refitt'"]),
        ("wanda+", ["unknown method suffix '+'", "+refit"]),
        ("refit", ["unknown method 'refit'"]),
        ("+refit", ["unknown method ''"]),
        ("", ["unknown method ''"]),
    ],
)
def test_text_that_names_no_method_is_an_error_that_helps(text, words):
    with pytest.raises(RecipeError) as raised:
        parse_method(text)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"name": "sparsgpt"}, ["'sparsgpt'", "did you mean 'sparsegpt'"]),
        ({}, ["unknown method"]),
        ({"name": ["wanda"]}, ["unknown method"]),
        ({"name": "sparsegpt", "blocksize": 3}, ["'blocksize'", "did you mean 'block_size'"]),
        ({"name": "wanda", "damping": 3}, ["unknown key 'damping'", "wanda"]),
        ({"name": "refit"}, ["refit", "inner"]),
        ({"name": "refit", "inner": 3}, ["refit", "inner"]),
        ({"name": "refit", "inner": {"name": "wnada"}}, ["did you mean 'wanda'"]),
    ],
    ids=str,
)
def test_a_table_that_describes_no_method_is_an_error_that_helps(table, words):
    with pytest.raises(RecipeError) as raised:
        method_from_dict(table)
    assert all(word in str(raised.value) for word in words), str(raised.value)
