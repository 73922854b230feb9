"""Pruning in several rounds: masks only grow, counts are exact, and what happens in between is noticed."""

import copy
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from cases import PATTERNS, SOLVERS, loss_of
from safetensors.torch import load_file
from tiny import with_tokenizer
from torch import nn
from typer.testing import CliRunner

import secateur
from secateur import (
    NM,
    FormatError,
    LayerProblem,
    Magnitude,
    PatternError,
    Recipe,
    RecipeError,
    Select,
    Solution,
    Solver,
    SolverError,
    SparseGPT,
    Unstructured,
    prune_,
)
from secateur.cli import app
from secateur.huggingface import CalibrationText
from secateur.patterns import at_partial_sparsity
from secateur.pruning import prune_directory
from secateur.reports import Report, stages_from_json, stages_to_json
from secateur.schedules import Cubic
from secateur.solvers import verify


def model_of(rows=6, columns=20, layers=2):
    torch.manual_seed(0)
    sizes = [columns, *[columns] * (layers - 1), rows]
    found = nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(sizes)])
    with torch.no_grad():
        found[0].weight[2] = 0  # zeros of its own, and equal weights
        found[-1].weight[:, 3:6] = 0.25
    return found


def inputs(columns=20):
    torch.manual_seed(1)
    x = torch.randn(3, 40, columns)
    x[..., 7] = 0  # a dead input
    return list(x)


def kept(model):
    return [layer.weight != 0 for layer in model]


def asked(pattern):
    return None if pattern.sparsity is not None else 0.6


def test_a_hand_made_case():
    # One-shot keeps the 7 and the 8. In rounds the first prunes 1 to 5, then the 6 grows, and the second prunes the 7.
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    model[0].weight.data = torch.arange(1.0, 9.0).view(1, 8)
    seen = []

    def between(changed, number):
        seen.append((number, changed[0].weight.tolist()))
        with torch.no_grad():
            changed[0].weight[0, 5] = 60.0

    report = prune_(model, sparsity=0.75, method="magnitude", rounds=2, between=between)
    # Cubic: 0.75 * (1 - 0.5 ** 3) = 0.65625 of 8 weights are 5.
    assert seen == [(1, [[0.0, 0.0, 0.0, 0.0, 0.0, 6.0, 7.0, 8.0]])]
    assert report.rounds == (0.625, 0.75)
    assert model[0].weight.tolist() == [[0.0, 0.0, 0.0, 0.0, 0.0, 60.0, 0.0, 8.0]]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("rounds", [2, 5])
def test_masks_only_grow_and_every_round_has_its_exact_count(pattern, solver, rounds):
    model, found = model_of(), []
    report = prune_(
        model,
        inputs(),
        pattern=pattern,
        sparsity=asked(pattern),
        method=solver,
        loss=loss_of,
        rounds=rounds,
        between=lambda changed, number: found.append(kept(changed)),
    )
    found.append([report.masks[f"{index}.weight"] for index in range(2)])
    assert len(found) == rounds
    schedule = Cubic(pattern.resolve(asked(pattern)), 0, rounds)
    for number, masks in enumerate(found, 1):
        shapes = [mask.shape for mask in masks]
        scoped = secateur.SparsityPattern.parse(report.layers[0].pattern)  # by rows, for Wanda and RIA
        now, share = at_partial_sparsity(scoped, schedule(number))
        counts = [now.num_pruned(shape, share) for shape in shapes]
        if number == rounds:
            assert [int((~mask).sum()) for mask in masks] == counts
        assert report.rounds[number - 1] == pytest.approx(sum(counts) / sum(map(torch.Size.numel, shapes)))
    for earlier, later in pairwise(found):
        # What was zero stays zero; a weight that was zero in the dense model may be kept by a mask.
        for index in range(2):
            came_back = ~earlier[index] & later[index] & (model[index].weight != 0)
            assert not came_back.any()
    report.verify(model)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_one_round_is_one_shot_bit_for_bit(pattern, solver):
    models = [model_of(), model_of()]
    for model, extra in zip(models, [{}, {"rounds": 1}], strict=True):
        report = prune_(model, inputs(), pattern=pattern, sparsity=asked(pattern), method=solver, loss=loss_of, **extra)
        assert report.rounds == ()
        assert "rounds" not in report.recipe
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("first", [0.05, 0.3, 0.55])
def test_solvers_keep_what_stays_pruned_even_where_scores_speak_against_it(pattern, solver, first):
    torch.manual_seed(2)
    weight, x = torch.randn(6, 20), torch.randn(50, 20)
    gram = x.T @ x
    statistics = secateur.LayerStatistics(50, gram.diagonal().sqrt(), gram)
    statistics = statistics.with_gradients(gradient=torch.randn(6, 20), gradient_squares=torch.rand(6, 20))
    early, share = at_partial_sparsity(pattern, first)
    before = solver.solve(LayerProblem(weight, statistics, early, share))
    # Large weights where all were pruned: a solver that looks at the values alone would bring them back.
    tempting = torch.where(before.mask, before.weight, 100.0)
    problem = LayerProblem(tempting, statistics, pattern, asked(pattern), ~before.mask)
    solution = solver.solve(problem)
    verify(problem, solution)
    assert not (solution.mask & ~before.mask).any()


def test_verify_notices_a_solver_that_brings_weights_back():
    class Forgetful(Solver):
        needs = frozenset()

        def solve(self, problem):
            mask = problem.pattern.mask(-problem.weight.abs(), problem.sparsity)
            return Solution(problem.weight * mask, mask, problem.weight.abs())

    with pytest.raises(SolverError, match=r"0: the solver keeps \d+ weights that an earlier round pruned"):
        prune_(model_of(layers=1), sparsity=0.5, method=Forgetful(), rounds=3)


def test_sparsegpt_shares_out_among_blocks_what_is_left():
    # By rounding, a block of the second round would get fewer than it has lost already.
    torch.manual_seed(0)
    weight, x = torch.randn(1, 6), torch.randn(50, 6)
    statistics = secateur.LayerStatistics(50, gram=x.T @ x)
    pruned = torch.tensor([[False, False, True, True, False, False]])
    problem = LayerProblem(weight.masked_fill(pruned, 0), statistics, Unstructured(), 0.5, pruned)
    solution = SparseGPT(block_size=2).solve(problem)
    verify(problem, solution)
    assert not solution.mask[pruned].any()


def test_nm_passes_through_its_steps_and_a_round_without_a_step_costs_nothing():
    model, seen, told = model_of(rows=8, columns=16), [], []
    report = prune_(
        model,
        [torch.randn(30, 16)],
        pattern=NM(2, 8),
        method="sparsegpt",
        rounds=16,
        between=lambda changed, number: seen.append([int(n) for n in (changed[0].weight != 0)[3].view(-1, 8).sum(1)]),
        progress=lambda text, done, total: told.append((text, done / total)),
    )
    assert [a[0] for a in seen] == [8 - round(8 * Cubic(0.75, 0, 16)(number)) for number in range(1, 16)]
    assert all(a == b for a, b in seen)
    assert report.rounds[-1] == 0.75
    assert [layer.pattern for layer in report.layers] == ["2:8", "2:8"]
    # Six steps from 8:8 to 2:8, and the last round, which makes the report.
    assert len({text.partition(":")[0] for text, _ in told}) == 7
    assert [part for _, part in told] == sorted(part for _, part in told)
    assert told[-1][1] == 1.0


def test_convolutions_and_the_error_over_all_rounds():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2))
    dense = copy.deepcopy(model)
    x = [torch.randn(8, 4, 9, 9)]
    report = prune_(model, x, pattern="column", sparsity=0.5, method="wanda", rounds=3)
    with torch.no_grad():
        apart = dense[0](x[0]) - model[0](x[0])
        without_bias = dense[0](x[0]) - dense[0].bias.view(-1, 1, 1)
    assert report.layers[0].relative_error == pytest.approx(float(apart.norm() / without_bias.norm()), rel=1e-4)
    assert report.sparsity == 0.5


def test_zeros_that_move_in_between_are_put_back_and_told():
    model = model_of(layers=1)

    def train(changed, number):
        with torch.no_grad():
            changed[0].weight += 1.0

    with pytest.warns(
        UserWarning, match=r"pruned weights in 1 layers were not zero any more after between\(model, 1\)"
    ):
        report = prune_(model, sparsity=0.5, method="magnitude", rounds=2, between=train)
    report.verify(model)
    assert report.layers[0].pruned == 60
    assert report.layers[0].notes == ("52 pruned weights moved between rounds 1 and 2, and are zero again",)


@pytest.mark.parametrize("way", ["a layer more", "a layer less"])
def test_other_layers_after_between_are_an_error_that_names_them(way):
    model = model_of()

    def change(changed, number):
        if way == "a layer more":
            changed.append(nn.Linear(6, 6))
        else:
            del changed[1]

    with pytest.raises(RecipeError, match=r"after between\(model, 1\).*" + ("'2'" if "more" in way else "1.weight")):
        prune_(model, sparsity=0.5, method="magnitude", rounds=2, between=change)


def test_batches_are_read_once_and_the_model_is_left_in_its_mode():
    model, read = model_of().train(), []

    def batches():
        for batch in inputs():
            read.append(len(batch))
            yield batch

    modes = []
    prune_(model, batches(), sparsity=0.5, method="wanda", rounds=3, between=lambda m, n: modes.append(m.training))
    assert read == [40, 40, 40]
    assert modes == [True, True]
    assert model.training


def test_a_layer_that_inputs_no_longer_reach_keeps_its_zeros():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.use = nn.Linear(8, 8), nn.Linear(8, 8), True

        def forward(self, x):
            return self.second(self.first(x)) if self.use else self.first(x)

    model = Routed()
    report = prune_(
        model,
        [torch.randn(30, 8)],
        sparsity=0.5,
        rounds=2,
        between=lambda changed, number: setattr(changed, "use", False),
    )
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["first"].pruned == 32
    assert by_name["second"].pruned == 8 * round(8 * 0.4375)
    assert by_name["second"].notes == ("no input reached it in a later round, so that it was not pruned further",)
    assert not [entry for entry in report.skipped if entry.name == "second"]
    report.verify(model)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rounds": 0}, "rounds must be 1 or more, got 0|rounds .*0"),
        ({"between": lambda model, number: None}, "there is only one, so it would never be called"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_a_weight_changes(settings, said):
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RecipeError, match=said):
        prune_(model, sparsity=0.5, method="magnitude", **settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_recipe_and_report_say_it():
    recipe = Recipe.from_toml("sparsity = 0.5\nmethod = 'magnitude'\nrounds = 3")
    assert recipe.rounds == 3
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    report = prune_(model_of(), recipe=recipe)
    assert report.recipe["rounds"] == 3
    assert "; 3 rounds: 3" in str(report)
    assert "<dt>Rounds</dt><dd>3</dd>" in report.to_html()
    assert "<dt>Rounds</dt>" not in prune_(model_of(), sparsity=0.5, method="magnitude").to_html()
    again = Report.from_json(report.to_json())
    assert again == report
    table = json.loads(report.to_json())
    del table["rounds"]  # as older versions wrote it
    assert Report.from_json(json.dumps(table)).rounds == ()
    with pytest.raises(TypeError, match="rounds must be an int"):
        Recipe(sparsity=0.5, rounds="many")
    with pytest.raises(PatternError):
        Recipe(rounds=2)


def test_a_method_on_magnitudes_alone_gives_the_same_in_rounds_as_at_once():
    at_once, in_rounds = model_of(), model_of()
    prune_(at_once, sparsity=0.7, method=Select(Magnitude()))
    prune_(in_rounds, sparsity=0.7, method=Select(Magnitude()), rounds=7)
    for one, other in zip(kept(at_once), kept(in_rounds), strict=True):
        assert torch.equal(one, other)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny encoder in a directory, with its pooler."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.BertModel(config).save_pretrained(path)
    return with_tokenizer(path)


def stored(path):
    return load_file(path / "model.safetensors")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(
        "def read(path):\n    with open(path) as file:\n        return file.read()\n" * 60, encoding="utf-8"
    )
    return CalibrationText(path, samples=4, sequence_length=32)


def test_a_directory_in_rounds_keeps_what_was_trained_in_between(encoder, text, tmp_path):
    norm = "embeddings.LayerNorm.bias"

    def between(model, number):
        assert number == 1
        with torch.no_grad():
            model.get_parameter(norm).fill_(0.5)

    recipe = Recipe(pattern="2:4", method="sparsegpt")
    report = prune_directory(encoder, tmp_path / "out", recipe, calibration=text, rounds=2, between=between)
    assert report.recipe["rounds"] == 2
    before, after = stored(encoder), stored(tmp_path / "out")
    assert torch.equal(after[norm], torch.full((32,), 0.5))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {norm, *(name for layer in report.layers for name in layer.parameters[:1])}
    for layer in report.layers:
        assert ((after[f"{layer.name}.weight"] == 0).view(-1, 4).sum(1) == 2).all()
    assert secateur.Report.from_json((tmp_path / "out" / "secateur.json").read_text()).rounds == report.rounds


def test_what_changes_in_between_and_cannot_be_written_is_an_error(encoder, text, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path / "net")

    def between(model, number):
        model.get_buffer("embedder.embedder.normalization.running_mean").fill_(1.0)

    recipe = Recipe(sparsity=0.5, method="magnitude", rounds=2)
    with pytest.raises(FormatError, match=r"normalization\.running_mean"):
        prune_directory(tmp_path / "net", tmp_path / "out", recipe, between=between)
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match="there is only one"):
        prune_directory("nowhere", tmp_path / "out", recipe, rounds=1, between=between)


def test_pruning_again_keeps_the_report_of_a_recovery(encoder, text, tmp_path):
    from test_recovery_report import report as recovered

    recipe = Recipe(sparsity=0.5, method="magnitude")
    first = prune_directory(encoder, tmp_path / "once", recipe)
    (tmp_path / "once" / "secateur.json").write_text(stages_to_json([first, recovered()]))
    prune_directory(tmp_path / "once", tmp_path / "twice", replace(recipe, sparsity=0.6))
    stages = stages_from_json((tmp_path / "twice" / "secateur.json").read_text())
    assert [type(stage).__name__ for stage in stages] == ["Report", "RecoveryReport", "Report"]


def test_the_command_takes_rounds(encoder, tmp_path):
    arguments = ["prune", encoder, "--output", tmp_path / "out", "--sparsity", "0.8", "--method", "magnitude"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--rounds", "3", "--json"])
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout)
    assert table["recipe"]["rounds"] == 3
    assert len(table["rounds"]) == 3
    result = CliRunner().invoke(app, [*map(str, arguments), "--overwrite", "--rounds", "0"])
    assert result.exit_code == 2
    assert "rounds" in result.stderr


def test_a_recovery_in_between_keeps_all_zeros():
    dense = model_of(rows=20)
    model, batches, gained = copy.deepcopy(dense), inputs(), []

    def between(changed, number):
        gained.append(secateur.recover_(changed, dense, batches, steps=5, learning_rate=0.01).gain)

    # A zero that moves would be a warning, and warnings are errors.
    report = prune_(model, batches, sparsity=0.7, method="wanda", rounds=3, between=between)
    assert len(gained) == 2
    assert report.sparsity == 0.7
    report.verify(model)
