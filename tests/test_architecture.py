"""A config without architectures: the class is read off the stored tensors, or the choices are named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import with_tokenizer
from typer.testing import CliRunner

import secateur
from secateur import FormatError
from secateur.cli import app
from secateur.huggingface import is_causal, load_model, open_model
from secateur.packing import pack_directory
from secateur.pruning import Recipe, prune_directory

transformers = pytest.importorskip("transformers")

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
_TEXT = {**_SIZES, "vocab_size": 2048, "max_position_embeddings": 64}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}

# Config, its settings, class, and whether the class is the only one with these tensors.
CASES = {
    "a language model": ("LlamaConfig", {**_TEXT, "tie_word_embeddings": False}, "LlamaForCausalLM", True),
    "its head tied": ("LlamaConfig", {**_TEXT, "tie_word_embeddings": True}, "LlamaForCausalLM", True),
    "no head": ("LlamaConfig", _TEXT, "LlamaModel", True),
    "with experts": ("MixtralConfig", {**_TEXT, "num_local_experts": 2}, "MixtralForCausalLM", True),
    "masked words": ("BertConfig", _TEXT, "BertForMaskedLM", True),
    "an encoder": ("BertConfig", _TEXT, "BertModel", True),
    "images": ("ViTConfig", {**_SIZES, "image_size": 16, "patch_size": 8}, "ViTForImageClassification", True),
    "classes of texts or of tokens": ("BertConfig", _TEXT, "BertForSequenceClassification", False),
    "an encoder and a decoder": ("T5Config", {**_T5, "tie_word_embeddings": True}, "T5ForConditionalGeneration", False),
    "classes of texts": ("LlamaConfig", _TEXT, "LlamaForSequenceClassification", True),
}


def nameless(path, case):
    config, settings, name, _ = CASES[case]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    if case == "an encoder":
        model = transformers.BertModel(model.config, add_pooling_layer=False)
    secateur.prune_(model, pattern="2:4", method="magnitude")
    model.save_pretrained(path)
    table = json.loads((path / "config.json").read_text())
    del table["architectures"]
    (path / "config.json").write_text(json.dumps(table))
    return path


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_packed_or_the_choices_are_named(tmp_path, case):
    source, (_, _, name, unique) = nameless(tmp_path / "model", case), CASES[case]
    if not unique:
        with pytest.raises(FormatError, match=rf"has no 'architectures'.*{name}.*\nAdd the right one"):
            pack_directory(source, tmp_path / "packed")
        assert not (tmp_path / "packed").exists()
        return
    pack_directory(source, tmp_path / "packed")
    again = secateur.load(tmp_path / "packed", dense=True)
    assert type(again).__name__ == name
    stored = {n: t for shard in source.glob("*.safetensors") for n, t in load_file(shard).items()}
    again.save_pretrained(tmp_path / "again")
    written = {n: t for shard in (tmp_path / "again").glob("*.safetensors") for n, t in load_file(shard).items()}
    assert stored.keys() <= written.keys()
    assert all(torch.equal(written[n], tensor) for n, tensor in stored.items())


@pytest.mark.parametrize("case", CASES)
def test_pruning_keeps_every_tensor_and_names_the_class_where_it_is_known(tmp_path, case):
    source, (_, _, name, unique) = nameless(tmp_path / "model", case), CASES[case]
    prune_directory(source, tmp_path / "out", Recipe(pattern="1:4", method="magnitude"))
    before = {n for shard in source.glob("*.safetensors") for n in load_file(shard)}
    assert before == {n for shard in (tmp_path / "out").glob("*.safetensors") for n in load_file(shard)}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("architectures") == ([name] if unique else None)


@pytest.mark.parametrize("case", CASES)
def test_a_language_model_is_measured_as_one(tmp_path, case):
    directory = open_model(nameless(tmp_path / "model", case))
    assert is_causal(directory) == CASES[case][2].endswith("ForCausalLM")


def test_perplexity_needs_no_name(tmp_path):
    source = with_tokenizer(nameless(tmp_path / "model", "its head tied"))
    (tmp_path / "text.txt").write_text("def read(path):\n    return path\n" * 60)
    command = ["prune", str(source), "--output", str(tmp_path / "out"), "--pattern", "1:4", "--method", "magnitude"]
    result = CliRunner().invoke(app, [*command, "--evaluate", str(tmp_path / "text.txt"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["evaluation"]["metric"] == "perplexity"


def test_a_name_that_is_there_is_not_doubted(tmp_path):
    source = nameless(tmp_path / "model", "a language model")
    table = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**table, "architectures": ["LlamaModel"]}))
    model, _ = load_model(open_model(source), "cpu", with_head=True)
    assert type(model).__name__ == "LlamaModel"


def test_tensors_of_no_class_are_said(tmp_path):
    source = nameless(tmp_path / "model", "a language model")
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, "reward.weight": torch.ones(1, 32)}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"LlamaForCausalLM.*LlamaForSequenceClassification"):
        pack_directory(source, tmp_path / "packed")
