"""Cutting a model into stages: which they are, and in which order they run."""

import pytest
import torch
from calibration_cases import CASES, Chain, albert_case, mlp_case, vectors

from secateur.calibration import call_model, quiet, replayed
from secateur.calibration._stages import find_stages
from secateur.layers import select_layers


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def stages_of(model, batches):
    layers, _ = select_layers(model)
    with quiet(model):
        return find_stages(model, layers, batches, call_model)[0]


@pytest.mark.parametrize("case", CASES)
def test_stages_are_the_repeated_blocks_and_the_layers_between_in_the_order_in_which_they_run(case):
    model, batches, names = CASES[case]()
    stages = stages_of(model, batches)
    assert [stage.name for stage in stages] == names
    found = [layer.name for stage in stages for layer in stage.layers]
    assert sorted(found) == sorted(layer.name for layer in select_layers(model)[0])
    for stage in stages:
        assert stage.module is model.get_submodule(stage.name)
        inside = {id(module) for module in stage.module.modules()}
        assert all(id(module) in inside for layer in stage.layers for module in layer.modules)


def test_a_stage_that_runs_twice_or_not_at_all_does_not_end_a_pass():
    model, batches, _ = albert_case()
    assert {stage.name: stage.once for stage in stages_of(model, batches)} == {
        "inner": True, "group.0": False, "group.1": False, "outer": True,
    }  # fmt: skip

    class Unused(Chain):
        def forward(self, x):
            return self.blocks[2](self.blocks[0](x))

    stages = stages_of(Unused().double(), vectors())
    assert [stage.name for stage in stages] == ["blocks.0", "blocks.2", "blocks.1", "blocks.3"]
    assert [stage.once for stage in stages] == [True, True, False, False]


def test_batches_of_each_code_path_are_tried_once():
    ran = []

    def forward(model, batch):
        ran.append(batch[1])
        return model(batch[0])

    model = Chain().double()
    batches = [(x, flag) for x, flag in zip(vectors(4), "abab", strict=True)]
    layers, _ = select_layers(model)
    with quiet(model):
        find_stages(model, layers, batches, forward)
    assert ran == ["a", "b"]


def test_one_pass_is_one_stage_and_costs_no_trial():
    def forward(model, batch):
        raise AssertionError("no pass is needed to know the stages")

    for case, sequential in ((mlp_case, True), (CASES["llama"], False)):
        model, batches, _ = case()
        layers, _ = select_layers(model)
        (stage,) = replayed(model, batches, layers, forward, sequential).stages
        assert (stage.name, stage.module, stage.layers) == ("", model, tuple(layers))
