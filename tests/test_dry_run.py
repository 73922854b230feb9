"""``secateur prune --dry-run``: what each layer would lose is shown, and nothing is changed or written."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import with_tokenizer
from typer.testing import CliRunner

import secateur
from secateur.cli import app

transformers = pytest.importorskip("transformers")

TEXT = "def area(width, height):\n    return width * height\n" * 60
SMALL = ("--samples", "4", "--sequence-length", "32")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return with_tokenizer(path)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["prune", *(str(argument) for argument in arguments)])


def files_of(path):
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.iterdir()}


@pytest.mark.parametrize("allocation", ["uniform", "erk", "sensitivity"])
def test_a_dry_run_says_what_the_run_does_and_writes_nothing(llama, text, tmp_path, allocation):
    before, place = files_of(llama), tmp_path / "out"
    settings = ("--sparsity", "0.6", "--method", "sparsegpt", "--allocation", allocation, "--calibration", text, *SMALL)
    looked = run(llama, "--dry-run", "--output", place, *settings, "--json")
    assert looked.exit_code == 0, looked.output
    assert not place.exists()
    assert files_of(llama) == before
    found = json.loads(looked.stdout)
    done = run(llama, "--output", place, *settings)
    assert done.exit_code == 0, done.output
    report = secateur.Report.from_json((place / "secateur.json").read_text())
    assert {one.name: one.pruned for one in report.layers} == {one["name"]: one["pruned"] for one in found["layers"]}
    assert found["totals"]["pruned"] == found["totals"]["budget"] == report.num_pruned
    after = load_file(place / "model.safetensors")
    for layer in found["layers"]:
        assert int((after[f"{layer['name']}.weight"] == 0).sum()) >= layer["pruned"]


def test_a_dry_run_prints_a_table_with_a_picture(llama, text, tmp_path):
    arguments = ("--sparsity", "0.5", "--allocation", "sensitivity", "--calibration", text, *SMALL)
    result = run(llama, "--dry-run", *arguments, "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    for word in ("model.layers.0.mlp.up_proj", "█", "relative error", "to the weight", "nothing was changed"):
        assert word in result.stdout
    assert "model.layers.1" in (tmp_path / "page.html").read_text(encoding="utf-8").replace("<wbr>", "")


def test_bounds_and_two_to_four_below_a_half(llama, text):
    bounded = ("--sparsity", "0.5", "--allocation", "erk", "--sparsity-bounds", "0.4", "0.6", "--method", "magnitude")
    found = json.loads(run(llama, "--dry-run", *bounded, "--json").stdout)
    assert all(0.39 < layer["sparsity"] < 0.61 for layer in found["layers"])
    some = ("--pattern", "2:4", "--sparsity", "0.3", "--allocation", "owl", "--calibration", text, *SMALL)
    result = run(llama, "--dry-run", *some)
    assert result.exit_code == 0, result.output
    assert "layers get 2:4 and the others stay dense" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "0.5", "--method", "magnitude"], "Give it, or --dry-run to look only"),
        (["--sparsity", "0.5", "--method", "magnitude", "--allocation", "owl", "--dry-run"], "--allocation uniform"),
        (["--sparsity", "0.5", "--allocation", "sensitivty", "--dry-run"], "did you mean 'sensitivity'"),
        (["--sparsity", "0.5", "--sparsity-bounds", "0.6", "0.9", "--dry-run"], "a sparsity from 0.6 to 0.9"),
        (["--pattern", "2:4", "--sparsity", "0.3", "--dry-run"], "leaves some layers dense"),
    ],
)
def test_a_mistake_gives_one_message_and_status_2(llama, arguments, message):
    result = run(llama, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("secateur: ") == 1
