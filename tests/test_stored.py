"""Weights go back to where the checkpoint has them, whatever transformers makes of the checkpoint when it loads it."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from secateur import FormatError
from secateur.cli import app
from secateur.files import ModelDirectory
from secateur.huggingface import StoredWeights, load_model
from secateur.pruning import Recipe, prune_directory

transformers = pytest.importorskip("transformers")

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {**_SIZES, "vocab_size": 64, "max_position_embeddings": 64}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}

# Family: config, its settings, model class, and a parameter that the checkpoint stores in the form that is told.
FAMILIES = {
    "as it is": ("LlamaConfig", _GROUPED, "LlamaForCausalLM", "layers.0.mlp.up_proj.weight"),
    "experts one by one, of Mixtral": (
        "MixtralConfig",
        {**_GROUPED, "num_local_experts": 4},
        "MixtralForCausalLM",
        "layers.1.mlp.experts.gate_up_proj",
    ),
    "experts one by one, of Qwen": (
        "Qwen3MoeConfig",
        {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16},
        "Qwen3MoeForCausalLM",
        "layers.1.mlp.experts.down_proj",
    ),
    "experts stacked": (
        "GptOssConfig",
        {**_GROUPED, "num_local_experts": 4, "head_dim": 16, "layer_types": ["full_attention"] * 2},
        "GptOssForCausalLM",
        "layers.1.mlp.experts.gate_up_proj",
    ),
    "a router under another name": (
        "PhimoeConfig",
        {**_GROUPED, "num_local_experts": 4},
        "PhimoeForCausalLM",
        "layers.0.mlp.router.weight",
    ),
    "another prefix": (
        "NemotronHConfig",
        {**_GROUPED, **_MAMBA, "head_dim": 16, "layers_block_type": ["mamba", "attention"]},
        "NemotronHForCausalLM",
        "layers.0.mixer.in_proj.weight",
    ),
    "three weights in one": (
        "NomicBertConfig",
        _TEXT,
        "NomicBertForMaskedLM",
        "layers.0.self_attn.k_proj.weight",
    ),
    "other names": (
        "ViTConfig",
        {**_SIZES, "image_size": 16, "patch_size": 8},
        "ViTForImageClassification",
        "layers.0.attention.q_proj.weight",
    ),
    "an encoder and a decoder": (
        "T5Config",
        _T5,
        "T5ForConditionalGeneration",
        "decoder.block.1.layer.2.DenseReluDense.wi.weight",
    ),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Returns the directory of a family, in bfloat16 and in several shards. It is made once."""
    root = tmp_path_factory.mktemp("families")

    def of(family):
        config, settings, model, _ = FAMILIES[family]
        path = root / family.replace(" ", "-")
        if not path.exists():
            torch.manual_seed(0)
            made = getattr(transformers, model)(getattr(transformers, config)(**settings)).to(torch.bfloat16)
            made.save_pretrained(path, max_shard_size="20KB")
            assert len(list(path.glob("*.safetensors"))) > 1
        return path

    return of


def tensors(path):
    return {shard.name: load_file(shard) for shard in sorted(path.glob("*.safetensors"))}


def matrices(model, missing=()):
    return [name for name, parameter in model.named_parameters() if parameter.ndim > 1 and name not in missing]


@torch.no_grad()
def change_(model, names):
    generator = torch.Generator().manual_seed(1)
    for name in names:
        parameter = model.get_parameter(name)
        parameter.mul_(torch.rand(parameter.shape, generator=generator) < 0.5)


def write(model, directory, names, output):
    stored = StoredWeights(model, directory, names)
    assert stored.lost == ()
    change_(model, names)
    stored.round_()
    directory.write_pruned(output, stored, {})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_head", [False, True], ids=["base", "with head"])
def test_what_changed_in_the_model_is_what_the_written_checkpoint_loads(saved, tmp_path, family, with_head):
    source, output = saved(family), tmp_path / "out"
    directory = ModelDirectory.open(source)
    model, missing = load_model(directory, "cpu", with_head=with_head)
    assert model.dtype == torch.float32
    write(model, directory, matrices(model, missing), output)

    before, after = tensors(source), tensors(output)
    assert {shard: sorted(found) for shard, found in before.items()} == {s: sorted(found) for s, found in after.items()}
    assert all(after[shard][name].dtype == torch.bfloat16 for shard in after for name in after[shard])
    assert all(after[shard][name].shape == before[shard][name].shape for shard in after for name in after[shard])
    again, _ = load_model(ModelDirectory.open(output), "cpu", with_head=with_head)
    assert all(torch.equal(again.get_parameter(n), p) for n, p in model.named_parameters() if n not in missing)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_holds_the_changed_weight_changes(saved, tmp_path, family):
    source, output = saved(family), tmp_path / "out"
    directory = ModelDirectory.open(source)
    model, _ = load_model(directory, "cpu", with_head=True)
    name = next(name for name, _ in model.named_parameters() if name.endswith(FAMILIES[family][3]))
    write(model, directory, [name], output)
    before, after = tensors(source), tensors(output)
    changed = {n: int((after[s][n] != before[s][n]).sum()) for s in after for n in after[s]}
    assert sum(changed.values()) == int((model.get_parameter(name) == 0).sum())
    pieces = sum(count > 0 for count in changed.values())
    assert pieces == {"experts one by one, of Mixtral": 8, "experts one by one, of Qwen": 4}.get(family, 1)


def test_a_stack_that_the_checkpoint_has_as_the_model_has_it_is_written_so(saved, tmp_path):
    """transformers also loads a Mixtral whose experts were stored stacked, under the names of the model."""
    source = tmp_path / "stacked"
    model, _ = load_model(ModelDirectory.open(saved("experts one by one, of Mixtral")), "cpu", with_head=True)
    source.mkdir()
    save_file({n: p.detach().clone() for n, p in model.named_parameters()}, source / "model.safetensors")
    model.config.save_pretrained(source)
    directory = ModelDirectory.open(source)
    model, missing = load_model(directory, "cpu", with_head=True)
    write(model, directory, matrices(model, missing), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(written[name], parameter) for name, parameter in model.named_parameters())


def test_precisions_that_differ_within_a_stack_are_kept(saved, tmp_path):
    source = tmp_path / "mixed"
    stored = {n: t for found in tensors(saved("experts one by one, of Mixtral")).values() for n, t in found.items()}
    expert = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    stored[expert] = stored[expert].half()
    source.mkdir()
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    config = saved("experts one by one, of Mixtral") / "config.json"
    (source / "config.json").write_text(config.read_text())
    directory = ModelDirectory.open(source)
    model, _ = load_model(directory, "cpu", with_head=True)
    write(model, directory, ["model.layers.0.mlp.experts.down_proj"], tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written[expert].dtype == torch.float16
    again, _ = load_model(ModelDirectory.open(tmp_path / "out"), "cpu", with_head=True)
    assert all(torch.equal(again.get_parameter(name), parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("family", ["as it is", "experts one by one, of Mixtral", "three weights in one"])
def test_values_that_are_not_those_of_the_checkpoint_are_lost_by_name(saved, family):
    directory = ModelDirectory.open(saved(family))
    model, missing = load_model(directory, "cpu", with_head=True)
    name = next(name for name, _ in model.named_parameters() if name.endswith(FAMILIES[family][3]))
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] += 1  # in one expert only
    lost = StoredWeights(model, directory, matrices(model, missing)).lost
    assert name in lost
    together = {"three weights in one": 3}.get(family, 1)  # its neighbours in the same stored tensor are lost, too
    assert len(lost) == together


@torch.no_grad()
def test_a_change_that_cannot_be_written_is_named_and_only_changes_are_written(saved):
    directory = ModelDirectory.open(saved("experts one by one, of Mixtral"))
    model, _ = load_model(directory, "cpu", with_head=True)
    stack, query = "model.layers.0.mlp.experts.down_proj", "model.layers.0.self_attn.q_proj.weight"
    model.get_parameter(stack)[1, 0, 0] += 1
    stored = StoredWeights(model, directory, matrices(model))
    assert stored.lost == (stack,)
    assert (list(stored), len(stored), stored.unwritable) == ([], 0, ())
    assert query not in stored
    with pytest.raises(KeyError):
        stored[query]
    model.get_parameter(query)[0] = 0
    assert (list(stored), stored.unwritable) == ([query], ())
    assert torch.equal(stored[query], model.get_parameter(query))
    model.get_parameter(stack)[0] = 0
    model.get_parameter("model.norm.weight")[0] = 0
    assert stored.unwritable == (stack, "model.norm.weight")


def test_what_turns_out_to_be_a_layer_while_the_model_runs_is_written_too(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.pruning._directory.select_layers", lambda *given: ([], []))
    source = saved("as it is")
    report = prune_directory(source, tmp_path / "out", Recipe(pattern="2:4", method="magnitude"))
    written = {n: t for found in tensors(tmp_path / "out").values() for n, t in found.items()}
    assert len(report.layers) == 14
    assert all((written[f"{layer.name}.weight"] == 0).sum() == layer.pruned for layer in report.layers)


def test_a_pruned_weight_that_the_checkpoint_lacks_is_an_error_and_nothing_is_written(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.pruning._directory.select_layers", lambda *given: ([], []))
    source = tmp_path / "model"
    stored = {n: t for found in tensors(saved("as it is")).values() for n, t in found.items()}
    source.mkdir()
    stored.pop("model.layers.1.mlp.up_proj.weight")
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text((saved("as it is") / "config.json").read_text())
    with pytest.raises(FormatError, match=r"stores 1 weights.*layers\.1\.mlp\.up_proj\.weight.*Nothing was"):
        prune_directory(source, tmp_path / "out", Recipe(pattern="2:4", method="magnitude"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_of_every_form_is_pruned(saved, tmp_path, family):
    report = prune_directory(saved(family), tmp_path / "out", Recipe(pattern="2:4", method="magnitude"))
    assert report.sparsity == 0.5
    zeros = {n: int((t == 0).sum()) for found in tensors(tmp_path / "out").values() for n, t in found.items()}
    assert sum(zeros.values()) >= sum(layer.pruned for layer in report.layers) > 0


def test_an_encoder_decoder_with_text_says_what_works(saved, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Some text. " * 100)
    for option in ("--calibration", "--evaluate"):
        command = ["prune", str(saved("an encoder and a decoder")), "--output", str(tmp_path / "out")]
        result = CliRunner().invoke(app, [*command, "--pattern", "2:4", "--method", "magnitude", option, str(text)])
        assert result.exit_code == 2, result.output
        assert "encoder-decoder" in result.stderr
        assert "--method magnitude" in result.stderr
        assert "'labels'" in result.stderr
    assert not (tmp_path / "out").exists()
