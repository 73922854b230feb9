"""What can be removed from a model is found in one forward pass, whatever the model is."""

import pytest
from shrink_cases import CASES, differences, distance, disturbed, double, half, masked, outputs, sliced
from shrink_families import FAMILIES

from secateur.graph import find_blocks, find_experts, find_units


@pytest.fixture(autouse=True)
def families_need_transformers(request):
    if request.node.callspec.params["case"] in FAMILIES:
        pytest.importorskip("transformers")


@pytest.mark.parametrize("case", [*CASES, *FAMILIES], ids=str)
def test_units_and_boundaries_are_those_of_the_model(case):
    assert differences(case, find_units(case.make(), case.batch())) == []


@pytest.mark.parametrize("case", [*CASES, *FAMILIES], ids=str)
def test_blocks_and_experts_are_those_of_the_model(case):
    model = case.make()
    for kind, found in (("layers", find_blocks(model, case.batch())), ("experts", find_experts(model))):
        assert sorted(dimension.size for dimension in found) == sorted(case.units.get(kind, ())), kind


@pytest.mark.parametrize("case", [*CASES, *FAMILIES], ids=str)
def test_units_can_go_without_anything_else_noticing(case):
    """Zeros in the places that read the units take them out: nothing else does, and slicing changes no output."""
    model, batch = case.make(), double(case.batch())
    dense = outputs(double(model), batch)
    for dimension in find_units(model, case.batch()).dimensions:
        if dimension.cut:
            continue
        expected = outputs(masked(model, dimension, half(dimension)), batch)
        assert distance(dense, expected) > 1e-6, f"{dimension.name}: the case says nothing"
        assert distance(expected, outputs(disturbed(model, dimension, half(dimension)), batch)) < 1e-12, dimension.name
        if case.plain and dimension.kind != "query_heads":
            assert distance(expected, outputs(sliced(model, dimension, half(dimension)), batch)) < 1e-10, dimension.name
