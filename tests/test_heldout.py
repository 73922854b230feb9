"""Batches that nothing is learned from: the error on them, the damping that it chooses, and layers with few tokens."""

import copy
import json
from dataclasses import dataclass, replace

import pytest
import torch
from calibration_cases import (
    Chain,
    InPlace,
    chain_case,
    llama_case,
    mlp_case,
    resnet_case,
    slow_inputs,
    unet_case,
    vectors,
)
from read_cases import EXPERTS, IN, Experts
from torch import nn

import secateur
from secateur import (
    LayerProblem,
    LayerStatistics,
    Magnitude,
    Recipe,
    RecipeError,
    Refit,
    Report,
    Select,
    Solver,
    SparseGPT,
    Wanda,
    prune_,
)
from secateur.calibration import load_batches, quiet, replayed
from secateur.layers import select_layers
from secateur.pruning._damping import DAMPINGS, solve_with_best
from secateur.pruning._one_round import held_out_batches
from secateur.reports import LayerReport, pruned_table
from secateur.solvers import has_damping, with_damping


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def slow_errors(dense, pruned, batches, sequential):
    """The relative error of each layer on batches, by full passes: stages before it pruned, all others dense."""
    layers, _ = select_layers(dense)
    with quiet(dense):
        stages = replayed(dense, load_batches(batches, torch.device("cpu")), layers, sequential=sequential).stages
    found, model = {}, copy.deepcopy(dense)
    for stage in stages:
        inputs = slow_inputs(model, batches, stage.layers)
        for layer in stage.layers:
            before = dense.get_submodule(layer.name).weight.detach().double().flatten(1)
            after = pruned.get_submodule(layer.name).weight.detach().double().flatten(1)
            rows = inputs[layer.name]
            split = (len(rows), -1, before.shape[1])
            lost = rows @ (before - after).view(split).mT
            found[layer.name] = float(lost.norm() / (rows @ before.view(split).mT).norm())
        for layer in stage.layers:
            model.get_submodule(layer.name).weight.data = pruned.get_submodule(layer.name).weight.data.clone()
    return found


CASES = {
    "a language model": llama_case,
    "convolutions in groups": resnet_case,
    "no blocks": mlp_case,
    "skips": unet_case,
    "in place": lambda: chain_case(InPlace),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "one pass"])
def test_the_held_out_error_is_that_of_full_passes_and_nothing_is_learned_from_it(case, sequential):
    model, batches, _ = case()
    dense, alone = copy.deepcopy(model), copy.deepcopy(model)
    settings = {"sparsity": 0.5, "method": "sparsegpt", "sequential": sequential}
    report = prune_(model, copy.deepcopy(batches), **settings, held_out=0.3)
    [number] = held_out_batches(0.3, len(batches))
    learned = [batch for index, batch in enumerate(batches) if index != number]
    without = prune_(alone, copy.deepcopy(learned), **settings)
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [layer.tokens for layer in report.layers] == [layer.tokens for layer in without.layers]
    assert [layer.relative_error for layer in report.layers] == [layer.relative_error for layer in without.layers]
    assert all(layer.held_out_error is None for layer in without.layers)
    truth = slow_errors(dense, model, copy.deepcopy(batches[number : number + 1]), sequential)
    assert {layer.name: layer.held_out_error for layer in report.layers} == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize(
    ("share", "total", "expected"),
    [
        (0.0, 5, ()),
        (0.2, 10, (2, 7)),
        (0.01, 4, (2,)),  # at least one
        (0.99, 4, (0, 2, 3)),  # one is left to learn from
        (0.5, 2, (1,)),
        (0.25, 8, (2, 6)),
    ],
)
def test_held_out_batches_are_spread_evenly_with_one_at_least_on_each_side(share, total, expected):
    found = held_out_batches(share, total)
    assert found == expected
    assert len(set(range(total)) - set(found)) > 0


def test_what_cannot_be_held_out_is_refused_before_a_weight_changes():
    model = Chain().double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RecipeError, match=r"held_out=0.2 holds out some.*there is 1: at least two"):
        prune_(model, vectors(1), sparsity=0.5, held_out=0.2)
    with pytest.raises(RecipeError, match=r"held_out=0.2.*there are none"):
        prune_(model, sparsity=0.5, method="magnitude", held_out=0.2)
    for share in (-0.1, 1.0, 2):
        with pytest.raises(RecipeError, match=r"held_out is the share.*in \[0, 1\)"):
            Recipe(sparsity=0.5, held_out=share)
    with pytest.raises(TypeError, match="held_out must be a number"):
        Recipe(sparsity=0.5, held_out="some")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_the_held_out_error_needs_no_other_error(method):
    model = Chain().double()
    report = prune_(model, vectors(4), sparsity=0.5, method=method, held_out=0.25, measure_error=False)
    assert all(layer.relative_error is None for layer in report.layers)
    assert all(0 < layer.held_out_error < 1 for layer in report.layers)
    assert "; mean layer error 0." in str(report)
    assert "on held-out tokens" in str(report)


def test_the_error_is_that_of_all_rounds():
    model, batches = mlp_case()[0], vectors(4)
    dense = copy.deepcopy(model)
    report = prune_(model, batches, sparsity=0.6, method="sparsegpt", rounds=3, held_out=0.25, sequential=False)
    first = report.layers[0]
    [number] = held_out_batches(0.25, 4)
    before, after = dense[0].weight.detach(), model[0].weight.detach()
    truth = (batches[number] @ (before - after).T).norm() / (batches[number] @ before.T).norm()
    assert first.held_out_error == pytest.approx(float(truth), rel=1e-6)


def test_experts_are_measured_on_the_tokens_that_reach_them():
    """They may learn from those of the whole stack, which are not theirs."""
    model = Experts()
    dense, data = copy.deepcopy(model), [torch.randn(1, 90, IN) for _ in range(2)]
    data[1][0, :, 0] = 0.001  # all go to one expert
    report = prune_(model, data, method="wanda", sparsity=0.5, held_out=0.5, include=["up"])
    tokens, routes = dense.routes(data[1])
    errors = [layer.held_out_error for layer in report.layers]
    assert [error is None for error in errors] == [not len(rows) for rows in routes]
    assert errors.count(None) == EXPERTS - 1
    [reached] = [expert for expert, rows in enumerate(routes) if len(rows)]
    before, after = dense.up[reached].detach(), model.up[reached].detach()
    lost = tokens @ (before - after).T
    assert errors[reached] == pytest.approx(float(lost.norm() / (tokens @ before.T).norm()), rel=1e-5)


# Damping


@dataclass(frozen=True)
class Own(Solver):
    """A method of a user's own that has a damping, and a method inside it."""

    inside: Solver
    damping: float = 0.5
    needs = frozenset({"gram"})

    def solve(self, problem):
        return self.inside.solve(problem)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (SparseGPT(block_size=8), SparseGPT(block_size=8, damping=0.3)),
        (Refit(SparseGPT(), iterations=3), Refit(SparseGPT(damping=0.3), iterations=3, damping=0.3)),
        (Refit(Select(Wanda())), Refit(Select(Wanda()), damping=0.3)),
        (Own(Refit(SparseGPT())), Own(Refit(SparseGPT(damping=0.3), damping=0.3), damping=0.3)),
    ],
    ids=repr,
)
def test_a_number_sets_every_damping_of_a_method(method, expected):
    assert has_damping(method)
    assert with_damping(method, 0.3) == expected
    recipe = Recipe(sparsity=0.5, method=method, damping=0.3)
    assert recipe.method == expected
    assert recipe.damping is None
    assert recipe == Recipe(sparsity=0.5, method=expected)
    assert recipe.held_out == 0


@pytest.mark.parametrize("damping", ["auto", 0.1])
def test_a_method_without_a_damping_refuses_one(damping):
    with pytest.raises(RecipeError, match=r"damping is given, but wanda has none.*\n.*\+refit"):
        Recipe(sparsity=0.5, method="wanda", damping=damping)


def test_a_damping_that_is_none_is_refused():
    with pytest.raises(RecipeError, match=r"unknown damping 'atuo'; did you mean 'auto'\?"):
        Recipe(sparsity=0.5, method="sparsegpt", damping="atuo")
    with pytest.raises(RecipeError, match="damping must be at least 0, got -1"):
        Recipe(sparsity=0.5, method="sparsegpt", damping=-1)


@pytest.mark.parametrize(
    ("settings", "held_out"), [({}, 0.2), ({"held_out": 0.4}, 0.4)], ids=["by itself", "as it is told"]
)
def test_auto_holds_out_batches_and_comes_back_from_a_file(settings, held_out):
    recipe = Recipe(sparsity=0.5, method="sparsegpt", damping="auto", **settings)
    assert recipe.held_out == held_out
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert {"held_out", "damping"} <= recipe.to_dict().keys()
    assert not {"held_out", "damping"} & Recipe(sparsity=0.5).to_dict().keys()  # older versions read what has neither


def few_and_noisy(seed):
    """Fewer tokens than inputs: the Gram matrix is singular, and what fits it best is not best elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    learned, held_out = (torch.randn(rows, 16, generator=generator, dtype=torch.float64) @ mixed for rows in (12, 40))
    weight = torch.randn(6, 16, generator=generator, dtype=torch.float64)
    statistics = LayerStatistics(12, learned.square().sum(0).sqrt(), learned.T @ learned)
    return weight, statistics, held_out


@pytest.mark.parametrize("method", [SparseGPT(), Refit(Select(Wanda())), Refit(SparseGPT())], ids=repr)
def test_the_damping_that_loses_least_on_held_out_tokens_is_kept(method):
    chosen = set()
    for seed in range(8):
        weight, statistics, x = few_and_noisy(seed)
        problem = LayerProblem(weight, statistics, secateur.Unstructured(), 0.5)
        gram = LayerStatistics(len(x), gram=x.T @ x)
        solution = solve_with_best(method, problem, weight, gram)
        tried = {}
        for damping in DAMPINGS:
            own = with_damping(method, damping).solve(problem)
            tried[damping] = (float((x @ (weight - own.weight).T).norm()), own)
        best = min(tried, key=lambda damping: tried[damping][0])
        assert torch.equal(solution.weight, tried[best][1].weight)
        assert solution.notes[-1].startswith(f"damping {best:g} chosen by the error on held-out tokens (0.001: 0.")
        chosen.add(best)
    assert len(chosen) > 1  # no damping is best for all layers


def test_where_nothing_can_be_measured_the_damping_is_the_methods_own():
    weight, statistics, _ = few_and_noisy(0)
    problem = LayerProblem(weight, statistics, secateur.Unstructured(), 0.5)
    own = SparseGPT(damping=0.7)
    silent = LayerStatistics(3, gram=torch.zeros(16, 16, dtype=torch.float64))
    for held_out, why in ((None, "no held-out input reached it"), (silent, "its held-out outputs are zero")):
        solution = solve_with_best(own, problem, weight, held_out)
        assert torch.equal(solution.weight, own.solve(problem).weight)
        assert solution.notes[-1] == f"the damping is the method's own, because {why}"


def test_every_layer_of_a_model_gets_the_damping_that_is_best_for_it():
    model, batches = Chain(2).double(), vectors(5)
    dense = copy.deepcopy(model)
    report = prune_(model, batches, sparsity=0.5, method="sparsegpt", damping="auto")
    errors = {layer.name: layer.held_out_error for layer in report.layers}
    first = report.layers[0].name
    for damping in DAMPINGS:
        fixed = prune_(copy.deepcopy(dense), batches, sparsity=0.5, method="sparsegpt", damping=damping, held_out=0.2)
        assert errors[first] <= fixed.layers[0].held_out_error  # later layers have other inputs
    assert all(any(note.startswith("damping ") for note in layer.notes) for layer in report.layers)
    assert report.recipe["damping"] == "auto"


def test_in_rounds_the_damping_is_chosen_each_time_by_what_is_lost_of_the_dense_weight():
    model = mlp_case()[0]
    report = prune_(model, vectors(5), sparsity=0.6, method="sparsegpt", damping="auto", rounds=2, sequential=False)
    for layer in report.layers:
        notes = [note for note in layer.notes if "chosen by" in note]
        assert len(notes) == 2
        least = min(float(part.split(": ")[1].rstrip(")")) for part in notes[0].split("(")[1].split(", "))
        assert layer.held_out_error == pytest.approx(least, abs=1e-4)


# Layers that learn from fewer tokens than they have inputs


@pytest.mark.parametrize(
    ("method", "tokens", "few"),
    [("sparsegpt", 11, 2), ("wanda+refit", 7, 3), ("sparsegpt", 12, 0), ("wanda", 1, 0), ("magnitude", 1, 0)],
)
def test_a_method_that_reads_the_gram_matrix_says_where_tokens_are_fewer_than_inputs(method, tokens, few):
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    report = prune_(model, [torch.randn(tokens, 8)], sparsity=0.5, method=method)
    noted = [layer for layer in report.layers if any("calibrated on fewer tokens" in note for note in layer.notes)]
    assert [layer.shape[1] for layer in noted] == [layer.shape[1] for layer in report.layers if few][-few or 3 :]
    assert len(noted) == few
    warned = [text for text in report.warnings if "calibrated on fewer tokens than inputs" in text]
    assert len(warned) == bool(few)
    if few:
        assert f"calibrated on fewer tokens ({tokens}) than it has inputs ({noted[0].shape[1]})" in noted[0].notes[0]
        assert warned[0].startswith(f"{few} layers were")
        assert f"warning: {warned[0]}" in str(report)
        assert Report.from_json(report.to_json()).warnings == report.warnings


# Reports

LAYER = LayerReport("up", (4, 4), "2:4", 0.5, 0.5, 8, 8, 0.125, 64, 0, 0.1, held_out_error=0.1875)


def report_of(*layers):
    return Report(layers, (), {"pattern": "2:4"}, {"secateur": "0"}, 1.0)


def test_every_form_of_a_report_shows_the_held_out_error_where_there_is_one():
    pytest.importorskip("matplotlib")
    without = replace(LAYER, name="down", held_out_error=None)
    both, none = report_of(LAYER, without), report_of(without)
    assert "mean layer error 0.1250, on held-out tokens 0.1875" in str(both)
    assert "| up | 4 x 4 | 2:4 | 0.5 | 50.00% | 0.1250 | 0.1875 | 0 |" in both.to_markdown()
    assert "| down | 4 x 4 | 2:4 | 0.5 | 50.00% | 0.1250 |  | 0 |" in both.to_markdown()
    assert "held-out error" not in none.to_markdown()
    assert "held-out" not in str(none)
    page = both.to_html()
    assert "held out 0.1875" in page
    assert "Held-out error is the same on inputs that nothing was learned from" in page
    assert "eld-out error" not in none.to_html()
    assert page.count("<use") > none.to_html().count("<use")  # a point in the chart
    assert [column.heading for column in pruned_table([LAYER]).columns][5:7] == ["relative error", "held-out error"]


def test_json_gives_it_back_and_older_reports_have_none():
    report = report_of(LAYER)
    assert Report.from_json(report.to_json()) == report
    table = json.loads(report.to_json())
    del table["layers"][0]["held_out_error"]
    assert Report.from_json(json.dumps(table)).layers == (replace(LAYER, held_out_error=None),)


def test_the_importance_of_a_method_is_no_method():
    """A damping is looked for in methods only."""
    assert not has_damping(Select(Magnitude()))
