"""Metadata of other tools: what is stored is believed, and what no longer holds is not written."""

import json
import pickle
import shutil

import pytest
import torch
from fake_timing import routes_take
from safetensors.torch import load_file, save_file
from tiny import with_tokenizer
from typer.testing import CliRunner

import secateur
from secateur import FormatError
from secateur.cli import app
from secateur.files import inspect, is_part
from secateur.formats import Bitmask
from secateur.packing import inspect_stored, pack_directory

transformers = pytest.importorskip("transformers")

# What other tools leave in config.json, of weights that are dense by now.
CLAIMS = {
    "sparsity of compressed-tensors": {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "sparsity_config": {"format": "dense", "sparsity_structure": "2:4"},
        }
    },
    "sparsity alone": {"sparsity_config": {"format": "sparse-bitmask"}},
    "an old version": {"compression_config": {"sparsity_config": {"format": "sparse-bitmask"}}},
    "a tool that nobody knows": {"quantization_config": {"quant_method": "zzz"}},
    "4 bits": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
}


@pytest.fixture(scope="session")
def pruned(tmp_path_factory):
    """A tiny language model, pruned to 2:4."""
    root = tmp_path_factory.mktemp("claims")
    torch.manual_seed(0)
    sizes = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    model.save_pretrained(root / "model")
    with_tokenizer(root / "model")
    result = run("prune", root / "model", "--output", root / "pruned", "--pattern", "2:4", "--method", "magnitude")
    assert result.exit_code == 0, result.output
    return root / "pruned"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def with_config(source, target, changes):
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def compressed(source, target, claim):
    """The model as compressed-tensors 0.14 wrote it: every matrix of the block as sparse-bitmask."""
    with_config(source, target, claim)
    stored = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "proj" not in name:
            stored[name] = tensor
            continue
        packed = Bitmask.from_dense(tensor)
        parts = {"compressed": packed.values, "bitmask": packed.bitmask, "row_offsets": packed.row_offsets}
        stored |= {f"{name}.{key}": part for key, part in parts.items()} | {f"{name}.shape": torch.tensor(tensor.shape)}
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    return target


def claims(path):
    return {"quantization_config", "compression_config", "sparsity_config"} & json.loads(
        (path / "config.json").read_text()
    ).keys()


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_dense_model_is_pruned_and_packed_whatever_its_config_claims(pruned, tmp_path, claim):
    source = with_config(pruned, tmp_path / "model", CLAIMS[claim])
    result = run("prune", source, "--output", tmp_path / "out", "--pattern", "1:4", "--method", "magnitude", "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["layers"]) == 7
    assert run("pack", source, "--output", tmp_path / "packed", "--batch", "1").exit_code == 0
    assert claims(source) == CLAIMS[claim].keys()
    assert claims(tmp_path / "out") == set()
    packed = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert packed["quantization_config"] == {"quant_method": "secateur", "packed": 1}  # ours, and no other
    assert claims(tmp_path / "packed") == {"quantization_config"}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert (model.model.layers[0].mlp.up_proj.weight == 0).double().mean() == 0.75


@pytest.mark.parametrize("claim", [*CLAIMS, "none"])
def test_a_compressed_checkpoint_is_exported_to_one_that_loads(pruned, tmp_path, claim):
    source = compressed(pruned, tmp_path / "compressed", CLAIMS.get(claim, {}))
    assert run("export", source, "--output", tmp_path / "dense").exit_code == 0
    assert claims(tmp_path / "dense") == set()
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = load_file(pruned / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items() if name in expected)


@pytest.mark.parametrize("claim", [*CLAIMS, "none"])
@pytest.mark.parametrize(
    "command", [["prune", "--pattern", "2:4", "--method", "magnitude"], ["pack"]], ids=["prune", "pack"]
)
def test_compressed_weights_are_refused_with_the_way_out_whatever_the_config_claims(pruned, tmp_path, claim, command):
    source = compressed(pruned, tmp_path / "compressed", CLAIMS.get(claim, {}))
    result = run(command[0], source, "--output", tmp_path / "out", *command[1:])
    assert result.exit_code == 2, result.output
    assert "it stores 'model.layers.0." in result.stderr
    assert f"secateur export {source} --output DENSE" in result.stderr
    assert not (tmp_path / "out").exists()


QUANTIZED = {  # a tensor that only a quantized checkpoint has
    "GPTQ": ("layers.0.up_proj.qweight", torch.zeros(4, 8, dtype=torch.int32)),
    "int8": ("layers.0.up_proj.weight", torch.zeros(4, 8, dtype=torch.int8)),
    "4 bits": ("layers.0.up_proj.weight", torch.zeros(32, 1, dtype=torch.uint8)),
    "float8": ("layers.0.up_proj.weight", torch.zeros(4, 8).to(torch.float8_e4m3fn)),
    "a scale": ("layers.0.up_proj.weight_scale", torch.ones(4, 1)),
    "compressed-tensors": ("layers.0.up_proj.weight_packed", torch.zeros(4, 8, dtype=torch.int32)),
    "4-bit floats": ("layers.0.experts.down_proj_blocks", torch.zeros(4, 8, dtype=torch.uint8)),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_are_refused_by_name_without_any_claim(pruned, tmp_path, kind):
    source = with_config(pruned, tmp_path / "model", {})
    name, tensor = QUANTIZED[kind]
    save_file({**load_file(pruned / "model.safetensors"), name: tensor}, source / "model.safetensors")
    result = run("prune", source, "--output", tmp_path / "out", "--pattern", "2:4", "--method", "magnitude")
    assert result.exit_code == 2, result.output
    assert f"is quantized or packed: it stores {name!r}" in result.stderr
    assert "quantize it afterwards" in result.stderr


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("embeddings.position_ids", "I64"),
        ("attn.relative_position_index", "I64"),
        ("h.0.attn.bias", "BOOL"),
        ("h.0.attn.bias", "U8"),
        ("norm.num_batches_tracked", "I64"),
        ("up.weight", "BF16"),
        ("conv.weight_g", "F32"),
        ("layer_scales", "F32"),
    ],
)
def test_what_dense_models_store_is_no_part_of_a_quantized_weight(name, dtype):
    assert not is_part(name, dtype)


def test_a_packed_model_given_to_prune_names_the_way_back(pruned, tmp_path, monkeypatch):
    routes_take(monkeypatch, lambda name, index: {"dense": 1.0, "prepacked": 2.0}.get(name, 0.25))
    pack_directory(pruned, tmp_path / "packed")
    result = run(
        "prune", tmp_path / "packed", "--output", tmp_path / "out", "--pattern", "2:4", "--method", "magnitude"
    )
    assert result.exit_code == 2, result.output
    assert "secateur export" in result.stderr


# inspect


def shown(path):
    result = run("inspect", path, "--json")
    assert result.exit_code == 0, result.output
    return {row["name"]: row for row in json.loads(result.stdout)}


def test_inspect_tells_of_packed_weights_what_it_tells_of_dense_ones(pruned, tmp_path, monkeypatch):
    routes_take(monkeypatch, lambda name, index: {"dense": 1.0, "prepacked": 2.0}.get(name, 0.25))
    pack_directory(pruned, tmp_path / "packed")
    dense = shown(pruned)
    for path in (tmp_path / "packed", tmp_path / "packed" / "model.sparse.safetensors"):
        packed = shown(path)
        assert packed.keys() == dense.keys()
        for name, row in packed.items():
            assert {**row, "format": "dense"} == dense[name]
            assert row["format"] == ("nm" if "proj" in name else "dense")
    text = run("inspect", tmp_path / "packed").output
    assert "stored as" in text
    assert "stored as" not in run("inspect", pruned).output


def test_inspect_tells_of_weights_that_are_only_stored_without_zeros(pruned, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(pruned)
    secateur.save(model, tmp_path / "saved")
    dense, saved = shown(pruned), shown(tmp_path / "saved")
    assert {name: {**row, "format": "dense"} for name, row in saved.items()} == dense
    assert {row["format"] for name, row in saved.items() if "proj" in name} == {"nm"}


def test_inspect_tells_the_shape_of_a_convolution_that_is_stored_without_zeros(tmp_path):
    convolution = torch.nn.Conv2d(8, 16, 3)
    secateur.prune_(torch.nn.Sequential(convolution), sparsity=0.9, method="magnitude")
    secateur.save(torch.nn.Sequential(convolution), tmp_path / "c.safetensors")
    (summary,) = [found for found in inspect_stored(tmp_path / "c.safetensors") if found.name == "0.weight"]
    assert (summary.shape, summary.format) == ((16, 8, 3, 3), "bitmask")
    assert summary.sparsity == float((convolution.weight == 0).double().mean())


def test_inspect_reads_int8_values_and_a_declared_remainder(tmp_path):
    linear = torch.nn.Linear(27, 8)
    secateur.prune_(torch.nn.Sequential(linear), pattern="2:4", method="magnitude", remainder="dense")
    packed = secateur.PackedLinear.from_linear(linear, "2:4,remainder=dense", torch.int8)
    secateur.save(torch.nn.Sequential(packed), tmp_path / "p.safetensors")
    (row,) = [row for row in shown(tmp_path / "p.safetensors").values() if row["name"] == "0.weight"]
    assert (row["dtype"], row["format"], row["patterns"]) == ("I8", "nm", ["2:4,remainder=dense"])
    assert row["sparsity"] == float((packed.weight == 0).double().mean())


@pytest.mark.parametrize("claim", [*CLAIMS, "none"])
def test_inspect_reads_compressed_tensors(pruned, tmp_path, claim):
    source = compressed(pruned, tmp_path / "compressed", CLAIMS.get(claim, {}))
    dense = shown(pruned)
    for path in (source, source / "model.safetensors"):
        found = shown(path)
        assert {name: {**row, "format": "dense"} for name, row in found.items()} == dense
        assert {row["format"] for name, row in found.items() if "proj" in name} == {"bitmask"}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_inspect_does_not_guess_the_zeros_of_quantized_weights(tmp_path, kind):
    name, tensor = QUANTIZED[kind]
    save_file({name: tensor, "norm.weight": torch.ones(4)}, tmp_path / "m.safetensors")
    (row,) = shown(tmp_path / "m.safetensors").values()
    if kind == "float8":  # whose zeros are zeros, whatever the scale
        assert (row["sparsity"], row["format"]) == (1.0, "dense")
        return
    assert (row["sparsity"], row["format"], row["patterns"]) == (None, "quantized", [])
    assert "their zeros are not known" in run("inspect", tmp_path / "m.safetensors").output


def test_inspect_lists_a_tensor_of_4_bit_floats(tmp_path):
    header = json.dumps({"up.weight": {"dtype": "F4", "shape": [4, 8], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    assert shown(tmp_path / "m.safetensors")["up.weight"]["sparsity"] is None


@pytest.mark.parametrize(
    "name", ["model.pt", "pytorch_model.bin", "model.ckpt", "old.pth", "no_ending", "m.safetensors"]
)
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_pickle_is_called_one(tmp_path, name, form):
    path = tmp_path / name
    if form == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    else:
        torch.save({"w": torch.ones(2, 2)}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(FormatError, match=r"is a pickle.*any code[\s\S]*weights_only=True"):
        list(inspect(path))
    result = run("inspect", path)
    assert result.exit_code == 2, result.output
    assert "is a pickle" in result.stderr


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_begins_like_a_pickle_is_read(tmp_path, length):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}).encode().ljust(length)
    (tmp_path / "m.bin").write_bytes(length.to_bytes(8, "little") + header + bytes(4))
    assert [found.sparsity for found in inspect_stored(tmp_path / "m.bin")] == [1.0]
