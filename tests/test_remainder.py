"""Sizes that groups and tiles do not divide: refused with the option that helps, or the rest stays dense."""

import json

import pytest
import torch
from cases import METHODS, loss_of
from fake_timing import routes_take
from torch import nn
from typer.testing import CliRunner

import secateur
from secateur import NM, Block, Column, PatternError, Recipe, RecipeError, Row, Unstructured, prune_
from secateur.cli import app
from secateur.packing import pack_directory

ROWS, COLUMNS = 22, 27
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 46, "num_hidden_layers": 1, "num_attention_heads": 2}
# Pattern, sparsity, whole rows and columns of a 22 x 27 weight, weights pruned, and the note.
PATTERNS = {
    "2:4": (22, 24, 22 * 12, "its last 3 columns stayed dense (66 weights)"),
    "1:4": (22, 24, 22 * 18, "its last 3 columns stayed dense (66 weights)"),
    "5:13": (22, 26, 22 * 16, "its last 1 column stayed dense (22 weights)"),
    "block:4x4": (20, 24, 16 * 15, "its last 2 rows and its last 3 columns stayed dense (114 weights)"),
    "block:3x9": (21, 27, 27 * 10, "its last 1 row stayed dense (27 weights)"),
    "block:32x32": (0, 0, 0, "its last 22 rows and its last 27 columns stayed dense (594 weights)"),
    "unstructured": (22, 27, 297, ""),
    "row": (22, 27, 11 * 27, ""),
    "column": (22, 27, 14 * 22, ""),
}


def made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(COLUMNS, ROWS)), [torch.randn(40, COLUMNS)]


def sparsity(pattern):
    return None if ":" in pattern and "block" not in pattern else 0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_whole_part_is_pruned_and_the_rest_stays_bit_for_bit(pattern, method):
    model, batches = made()
    before = model[0].weight.detach().clone()
    rows, columns, pruned, note = PATTERNS[pattern]
    kept_in_rows = "unstructured" if method.startswith(("wanda", "ria")) else ""
    if pattern == kept_in_rows:
        pruned = 22 * 14  # round(0.5 * 27) in each row
    report = prune_(
        model, batches, pattern=pattern, sparsity=sparsity(pattern), method=method, loss=loss_of, remainder="dense"
    )
    (layer,) = report.layers
    weight = model[0].weight.detach()
    assert (layer.pruned, layer.sparsity) == (pruned, pruned / (22 * 27))
    assert int((weight == 0).sum()) == layer.zeros == pruned
    rest = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    rest[:rows, :columns] = False
    assert (weight[rest] != 0).all()
    if "+" not in method and method not in ("sparsegpt", "admm", "alps"):
        assert torch.equal(weight[rest], before[rest])
    assert [text for text in layer.notes if "stayed dense" in text] == (
        [f"{note}, because {layer.pattern} does not divide them"] if note else []
    )


@pytest.mark.parametrize("pattern", [pattern for pattern in PATTERNS if PATTERNS[pattern][3]])
def test_without_it_the_layer_is_refused_with_the_option_before_anything_changes(pattern):
    model, batches = made()
    before = model[0].weight.detach().clone()
    with pytest.raises(PatternError, match=r"0: .*multiple of .*\n.*--remainder dense") as caught:
        prune_(model, batches, pattern=pattern, sparsity=sparsity(pattern))
    assert torch.equal(model[0].weight, before)
    (named,) = [word.strip("'") for word in str(caught.value).split() if ",remainder=dense" in word]
    prune_(model, batches, pattern=named, sparsity=sparsity(pattern))  # what the message names works


@pytest.mark.parametrize(
    ("given", "pattern", "remainder"),
    [
        ({"pattern": "2:4", "remainder": "dense"}, NM(2, 4, "dense"), "dense"),
        ({"pattern": "2:4,remainder=dense"}, NM(2, 4, "dense"), "dense"),
        ({"pattern": "2:4"}, NM(2, 4), "error"),
        ({"pattern": Block(4, 4), "sparsity": 0.5, "remainder": "dense"}, Block(4, 4, "dense"), "dense"),
        ({"pattern": "row", "sparsity": 0.5, "remainder": "dense"}, Row(), "error"),
        ({"pattern": Column(), "sparsity": 0.5, "remainder": "dense"}, Column(), "error"),
        ({"sparsity": 0.5, "remainder": "dense"}, Unstructured(), "error"),
    ],
)
def test_the_recipe_holds_the_pattern_that_is_used(given, pattern, remainder):
    recipe = Recipe(**given)
    assert (recipe.pattern, recipe.remainder) == (pattern, remainder)
    assert Recipe.from_toml(recipe.to_toml()) == Recipe.from_dict(recipe.to_dict()) == recipe


def test_another_word_is_refused():
    with pytest.raises(RecipeError, match=r"unknown remainder 'drop'.*error, dense"):
        Recipe(pattern="2:4", remainder="drop")


@pytest.mark.parametrize("pattern", ["2:4", "block:4x4"])
def test_a_directory_is_pruned_and_packed_with_its_rest(tmp_path, monkeypatch, pattern):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    command = ["prune", str(tmp_path / "model"), "--pattern", pattern, "--method", "magnitude"]
    command += [] if sparsity(pattern) is None else ["--sparsity", "0.5"]
    refused = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "out")])
    assert refused.exit_code == 2, refused.output
    assert "--remainder dense" in refused.stderr
    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "out"), "--remainder", "dense", "--json"])
    assert result.exit_code == 0, result.output
    layers = {layer["name"]: layer for layer in json.loads(result.stdout)["layers"]}
    assert "its last 2 columns stayed dense (64 weights)" in layers["model.layers.0.mlp.down_proj"]["notes"][0]
    assert not layers["model.layers.0.self_attn.q_proj"]["notes"]

    routes_take(monkeypatch, lambda name, index: {"dense": 1.0, "prepacked": 2.0}.get(name, 0.25))
    packed = {layer.name: layer for layer in pack_directory(tmp_path / "out", tmp_path / "packed").layers}
    assert all(layer.packed for layer in packed.values())
    # From the report, since the zeros alone would not say it.
    assert packed["model.layers.0.mlp.down_proj"].pattern == f"{pattern},remainder=dense"
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(secateur.load(tmp_path / "packed")(ids).logits, reference(ids).logits)
    again = secateur.load(tmp_path / "packed", dense=True).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in reference.state_dict().items())
