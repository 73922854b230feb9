"""Gates: a small grammar that reads what it should, and refuses all else with the place."""

import math
import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur import RecipeError
from secateur.pipeline import FIGURES, Gate
from secateur.pipeline._gates import WITHOUT_DENSE

COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}

GOOD = {
    "similarity >= 0.99": Gate("similarity", ">=", 0.99),
    "perplexity <= 1.05 * dense": Gate("perplexity", "<=", 1.05, of_dense=True),
    "sparsity >= 0.8": Gate("sparsity", ">=", 0.8),
    "bytes <= 20e6": Gate("bytes", "<=", 20e6),
    "speedup>=2": Gate("speedup", ">=", 2),
    "  minutes  <\t30 ": Gate("minutes", "<", 30),
    "accuracy > -1.5e-3": Gate("accuracy", ">", -0.0015),
    "sparsity_total == 50%": Gate("sparsity_total", "==", 0.5),
    "bytes <= dense": Gate("bytes", "<=", 1, of_dense=True),
    "rank >= 98% * dense": Gate("rank", ">=", 0.98, of_dense=True),
    "parameters < .5*dense": Gate("parameters", "<", 0.5, of_dense=True),
}


@pytest.mark.parametrize("text", GOOD)
def test_what_can_be_written(text):
    assert Gate.parse(text) == GOOD[text]


BAD = {
    "": "at its end: expected a figure",
    "similarity": "at its end: expected one of >=",
    "similarity >=": "at its end: expected a number or dense",
    "similarity => 0.9": r"at character 12 \('='\): expected one of >=",
    "similarity = 0.9": r"at character 12 \('='\)",
    "similarity >= 0.9 0.8": r"at character 19 \('0.8'\): expected nothing more",
    "similarity >= 0.9 and bytes < 3": r"at character 19 \('and'\): expected nothing more",
    "simlarity >= 0.9": r"at character 1 \('simlarity'\).*did you mean 'similarity'\? Valid are perplexity",
    "zzz >= 1": r"no figure 'zzz'\. Valid are",
    "0.9 <= similarity": r"at character 1 \('0.9'\): expected a figure",
    "similarity >= 1.05 * sparse": r"at character 22 \('sparse'\): the only name in a bound is dense",
    "similarity >= nan": r"\('nan'\): the only name",
    "similarity >= 1e999": "too large",
    "similarity >= 2 * 3": r"at character 19 \('3'\): expected dense",
    "similarity >= dense * 2": r"at character 21 \('\*'\): expected nothing more",
    "similarity >= 0.9; import os": r"at character 18 \(';'\)",
    "__import__('os').system('x') >= 1": "no figure '__import__'",
    "similarity >= (0.9)": r"at character 15 \('\('\)",
    "similarity >= 1_000": r"\('_000'\)",
    "similarity >= \u0661": "expected a number",
    "minutes <= 2 * dense": "which has none",
    "speedup >= dense": "which has none",
}


@pytest.mark.parametrize("text", BAD)
def test_what_cannot_be_read_is_refused_with_its_place(text):
    with pytest.raises(RecipeError, match=BAD[text]):
        Gate.parse(text)


@pytest.mark.parametrize("value", [3, None, ["similarity >= 1"]])
def test_only_text_is_a_gate(value):
    with pytest.raises(TypeError, match="a gate must be a text"):
        Gate.parse(value)


numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(st.sampled_from(sorted(FIGURES)), st.sampled_from(sorted(COMPARE)), numbers, st.booleans())
def test_a_gate_is_read_as_it_is_written(figure, op, factor, of_dense):
    gate = Gate(figure, op, factor, of_dense and figure not in WITHOUT_DENSE)
    assert Gate.parse(str(gate)) == gate


@given(st.sampled_from(sorted(COMPARE)), numbers, st.floats(), st.floats() | st.none(), st.booleans())
def test_a_gate_compares_as_arithmetic_does(op, factor, value, dense, of_dense):
    bound = factor if not of_dense else math.nan if dense is None else factor * dense
    assert Gate("bytes", op, factor, of_dense).passes(value, dense) == COMPARE[op](value, bound)


@given(st.text() | st.text("similarity<>=0.9*%dens ", max_size=30))
def test_any_text_is_a_gate_or_an_error_of_ours(text):
    try:
        gate = Gate.parse(text)
    except RecipeError:
        pass  # any other exception fails the test
    else:
        assert Gate.parse(str(gate)) == gate


@pytest.mark.parametrize("op", COMPARE)
def test_what_is_missing_or_not_a_number_never_passes(op):
    assert not Gate("similarity", op, 0.5).passes(None)
    assert not Gate("similarity", op, 0.5).passes(math.nan)
    assert not Gate("similarity", op, 0.5, of_dense=True).passes(0.5, None)


@pytest.mark.parametrize("op", COMPARE)
def test_slack_is_on_both_sides_of_the_bound(op):
    gate = Gate("sparsity", op, 0.5)
    for value in (0.375, 0.5, 0.625):
        assert gate.passes(value, slack=0.125)
    assert gate.passes(0.25, slack=0.125) == COMPARE[op](0.25, 0.5)
    assert gate.passes(0.75, slack=0.125) == COMPARE[op](0.75, 0.5)
    assert not gate.passes(math.nan, slack=0.125)
