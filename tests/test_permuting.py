"""Inputs in another order: the same function, more kept, the real models' parts, and nothing changed where it fails."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import with_tokenizer
from torch import nn
from typer.testing import CliRunner

import secateur
from secateur import NM, RecipeError, SolverError, permute_
from secateur.cli import app
from secateur.permuting import _permute
from secateur.permuting._assign import assign
from secateur.permuting._search import search

transformers = pytest.importorskip("transformers")


def uneven(model, seed=0):
    """Give the columns of all weights different sizes, as those of trained models have."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            if parameter.ndim == 1:
                parameter.abs_().add_(0.1)  # so that few channels are dead
            else:
                widths = torch.rand(parameter.shape[1], generator=generator)
                parameter.mul_(widths.view(1, -1, *[1] * (parameter.ndim - 2)))
        for buffer in model.buffers():
            if buffer.is_floating_point() and buffer.ndim:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


def llama(**settings):
    config = transformers.LlamaConfig(
        **{"vocab_size": 64, **settings},
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return uneven(transformers.LlamaForCausalLM(config))


def gpt2():
    return uneven(transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)))


def bert():
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    return uneven(transformers.BertModel(config))


def convolutions():
    return uneven(
        nn.Sequential(
            nn.Conv2d(4, 32, 3),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 1),
            nn.Flatten(),
            nn.Linear(32 * 4, 4),
        )
    )


def perceptron():
    return uneven(nn.Sequential(nn.Linear(8, 48), nn.GELU(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4)))


def tokens():
    return {"input_ids": torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(0))}


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# How to make a model, its inputs, and the kinds of units that have a new order afterwards.
MODELS = {
    "perceptron": (perceptron, lambda: numbers(16, 8), {"channels": 2}),
    "convolutions": (convolutions, lambda: numbers(4, 4, 6, 6), {"channels": 2}),
    "llama": (llama, tokens, {"values": 2, "ffn": 2, "hidden": 1}),
    "llama with tied embeddings": (
        lambda: llama(tie_word_embeddings=True),
        tokens,
        {"values": 2, "ffn": 2, "hidden": 1},
    ),
    "gpt2": (gpt2, tokens, {"values": 2, "ffn": 2, "hidden": 1}),
    "bert": (bert, tokens, {"values": 2, "ffn": 2}),
}


def outputs(model, inputs):
    with torch.no_grad():
        found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return found if isinstance(found, torch.Tensor) else found[0]


@pytest.mark.parametrize(("make", "inputs", "kinds"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("importance", ["wanda", "ria", "magnitude"])
def test_more_is_kept_and_the_function_stays(make, inputs, kinds, importance):
    model, batch = make(), inputs()
    before, state = outputs(model, batch), {name: value.clone() for name, value in model.state_dict().items()}
    report = permute_(model, [batch], importance=importance, exclude=["0"] if isinstance(model, nn.Sequential) else ())
    torch.testing.assert_close(outputs(model, batch), before, rtol=1e-4, atol=1e-4)
    assert report.after > report.before
    moved = [entry.kind for entry in report.dimensions if entry.moved]
    assert {kind: moved.count(kind) for kind in set(moved)} == kinds
    assert report.error <= report.tolerance
    for name, value in model.state_dict().items():  # nothing but the order changed
        assert torch.equal(value.flatten().sort().values, state[name].flatten().sort().values), name


@pytest.mark.parametrize("name", ["perceptron", "llama", "gpt2"])
def test_the_report_says_what_a_mask_of_the_new_model_keeps(name):
    make, inputs, _ = MODELS[name]
    model, exclude = make(), ["0"] if name == "perceptron" else ()
    report = permute_(model, [inputs()], importance="magnitude", exclude=exclude)
    layers, _ = secateur.layers.select_layers(model, ("*",), exclude)
    for layer, said in zip(layers, report.layers, strict=True):
        scores = layer.matrix().abs().double()
        kept = float(scores[NM(2, 4).mask(scores)].sum() / scores.sum())
        assert said.name == layer.name
        assert said.after == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "1:2", "2:4,remainder=dense", "transposable:2:4"])
def test_it_works_for_every_n_and_m(pattern):
    model, batch = perceptron(), numbers(16, 8)
    before = outputs(model, batch)
    report = permute_(model, [batch], pattern=pattern)
    torch.testing.assert_close(outputs(model, batch), before, rtol=1e-4, atol=1e-4)
    assert report.after > report.before
    assert report.pattern == pattern


def test_the_same_seed_gives_the_same_order():
    models = [perceptron() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        permute_(model, [numbers(16, 8)], seed=seed)
    assert torch.equal(models[0][2].weight, models[1][2].weight)
    assert not torch.equal(models[0][2].weight, models[2][2].weight)


def test_gradients_and_tied_parameters_follow():
    model = llama(tie_word_embeddings=True)
    model(**tokens()).logits.sum().backward()
    norms = {name: parameter.grad.norm() for name, parameter in model.named_parameters()}
    before = {name: (p * p.grad).sum() for name, p in model.named_parameters()}
    permute_(model, [tokens()])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.norm(), norms[name])
        torch.testing.assert_close((parameter * parameter.grad).sum(), before[name], rtol=1e-3, atol=1e-3)


def test_half_precision_keeps_its_bits():
    model = llama().to(torch.bfloat16)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = permute_(model, [tokens()])
    assert report.dtype == "float64"
    for name, value in model.state_dict().items():
        assert value.dtype == state[name].dtype
        assert torch.equal(value.flatten().sort().values, state[name].flatten().sort().values)


class Depends(nn.Module):
    """Its neurons are not interchangeable, although each could go: the order of two halves matters."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        y = self.up(x)
        return self.down(y.cumsum(1))


def test_units_whose_order_matters_stay_and_are_named():
    model = uneven(Depends())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = permute_(model, [numbers(16, 8)])
    assert report.after == report.before
    assert all(layer.reason for layer in report.layers)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_failed_proof_puts_the_model_back(monkeypatch):
    model = perceptron()
    state = {name: value.clone() for name, value in model.state_dict().items()}

    class Believes(_permute._Tried):
        def able(self, shared):
            return shared, ""

    def wrong(model, graph, observed, layers, find=_permute.find_shared):
        shared = find(model, graph, observed, layers)
        parts = [dataclasses.replace(one, places=one.places[1:]) for one in shared[0].parts]
        return [dataclasses.replace(shared[0], parts=tuple(parts))]

    monkeypatch.setattr(_permute, "_Tried", Believes)
    monkeypatch.setattr(_permute, "find_shared", wrong)
    with pytest.raises(SolverError, match=r"another function.*\n.*as it was"):
        permute_(model, [numbers(16, 8)])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "unstructured"}, "the order of inputs matters to N:M"),
        ({"pattern": "block:4x4"}, "the order of inputs matters to N:M"),
        ({"importance": "sparsegpt"}, "Give an importance"),
        ({"rounds": 0}, "rounds"),
        ({"include": ["nothing"]}, "nothing"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_before_anything_changes(settings, message):
    with pytest.raises(RecipeError, match=message):
        permute_(perceptron(), [numbers(16, 8)], **settings)


def test_the_report_is_json():
    report = permute_(perceptron(), [numbers(16, 8)])
    table = json.loads(report.to_json())
    assert table["after"] == report.after
    assert "reordered the inputs of 2 of 3 layers" in str(report)


def test_the_command_reorders_and_then_prunes(tmp_path):
    """What is written computes the same as what was pruned, in the shapes and names of the input."""
    llama(vocab_size=2048).save_pretrained(tmp_path / "in")
    with_tokenizer(tmp_path / "in")
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten. " * 80)
    arguments = ["prune", str(tmp_path / "in"), "--pattern", "2:4", "--method", "wanda", "--output"]
    text = ["--calibration", str(tmp_path / "text.txt"), "--samples", "2", "--sequence-length", "32", "--json"]
    kept = {}
    for name, options in {"plain": [], "permuted": ["--permute"]}.items():
        result = CliRunner().invoke(app, [*arguments, str(tmp_path / name), *text, *options])
        assert result.exit_code == 0, result.output
        table = json.loads(result.stdout)
        assert ("reordered the inputs" in table["calibration"].get("prepared", "")) == bool(options)
        kept[name] = sum(layer["relative_error"] for layer in table["layers"])
        stored = load_file(tmp_path / name / "model.safetensors")
        for layer in table["layers"]:
            NM(2, 4).check(stored[f"{layer['name']}.weight"] != 0)
    assert kept["permuted"] < kept["plain"]


def test_the_command_needs_text_to_reorder(tmp_path):
    with_tokenizer(llama(vocab_size=2048).save_pretrained(tmp_path / "in") or tmp_path / "in")
    arguments = ["prune", str(tmp_path / "in"), "--pattern", "2:4", "--method", "magnitude", "--permute"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "--calibration" in result.output


# The search


def kept(scores, order, n, m):
    """Slow truth."""
    rows = [[row[j] for j in order] for row in scores.tolist()]
    return math.fsum(x for row in rows for g in range(0, len(row), m) for x in sorted(row[g : g + m], reverse=True)[:n])


def test_a_small_search_is_exact():
    """With two sets of two there are three different orders."""
    for seed in range(20):
        scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        order = search([scores[:, :, None]], 1, 2, 4, 8, seed=0)
        best = max(kept(scores, found, 1, 2) for found in itertools.permutations(range(4)))
        assert kept(scores, order, 1, 2) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 5)])
@pytest.mark.parametrize("width", [1, 2, 3, 9])
def test_an_order_is_a_permutation_that_keeps_no_less(n, m, width):
    units = 4 * m
    scores = torch.rand(6, units, width, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    other = torch.rand(5, units, 1, generator=torch.Generator().manual_seed(m + 1), dtype=torch.float64)
    order = search([scores, other], n, m, units, 3, seed=0)
    assert sorted(order.tolist()) == list(range(units))
    flat = [scores.flatten(1), other.flatten(1)]
    moved = [found[:, order].flatten(1) for found in (scores, other)]
    before, after = (sum(kept(f, range(f.shape[1]), n, m) for f in found) for found in (flat, moved))
    assert after > before


def test_units_beyond_the_last_whole_group_stay():
    scores = torch.rand(6, 14, 1, generator=torch.Generator().manual_seed(0))
    order = search([scores], 2, 4, 12, 4, seed=0)
    assert order[12:].tolist() == [12, 13]
    assert order.tolist() != list(range(14))


@pytest.mark.parametrize("size", [0, 1, 2, 5, 40])
@pytest.mark.parametrize("levels", [2, 1000])
def test_the_assignment_is_the_best(size, levels):
    optimize = pytest.importorskip("scipy.optimize")
    values = np.random.default_rng(size).integers(levels, size=(size, size)).astype(float)
    rows, columns = optimize.linear_sum_assignment(values, maximize=True)
    found = assign(values)
    assert sorted(found.tolist()) == list(range(size))
    assert values[found, np.arange(size)].sum() == values[rows, columns].sum()
