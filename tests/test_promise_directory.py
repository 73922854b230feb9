"""Model directories are timed as a whole before and after, with inputs that are made up for the kind of model."""

import json

import pytest
import torch
from fake_timing import kernels_win
from typer.testing import CliRunner

import secateur
from secateur.cli import app
from secateur.packing import PackSettings, pack_directory

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
PICTURE = {"num_channels": 3, "image_size": 16, "patch_size": 8}
WHISPER = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 64, "pad_token_id": 0,
    "max_source_positions": 16, "num_mel_bins": 8,
}  # fmt: skip
TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CLIP = {"text_config": {**SIZES, **TOKENS}, "vision_config": {**SIZES, **PICTURE}, "projection_dim": 16}
RESNET = {"embedding_size": 8, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "bottleneck"}
KINDS = {  # the model, its sizes, and the shapes of its inputs at 1, 4 and 40 rows
    "decoder": ("LlamaForCausalLM", {**SIZES, **TOKENS, "max_position_embeddings": 64}, ["1 x 1", "1 x 4", "2 x 32"]),
    "encoder": ("RobertaModel", {**SIZES, **TOKENS, "max_position_embeddings": 64}, ["1 x 1", "1 x 4", "2 x 32"]),
    "both": ("T5ForConditionalGeneration", {**T5, **TOKENS}, ["1 x 1", "1 x 4", "1 x 40"]),
    "images": ("ViTModel", {**SIZES, **PICTURE}, ["1 x 3 x 16 x 16", "4 x 3 x 16 x 16", "8 x 3 x 16 x 16"]),
    "convolutions": ("ResNetModel", RESNET, ["1 x 3 x 224 x 224", "4 x 3 x 224 x 224", "8 x 3 x 224 x 224"]),
}
REASONS = {  # of models that no input can be made up for
    "audio": ("WhisperModel", WHISPER, "WhisperModel reads input_features, for which no example can be made up here."),
    "text and images": ("CLIPModel", CLIP, "CLIPModel fails with made-up input_ids: "),
}


@pytest.fixture(autouse=True)
def _kernels_win(monkeypatch):
    kernels_win(monkeypatch)


def directory(name, sizes, path):
    """A pruned model with random weights."""
    torch.manual_seed(0)
    made = getattr(transformers, name)
    model = made(made.config_class(**sizes))
    secateur.prune_(model, pattern="unstructured", sparsity=0.8, method="magnitude")
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_timed_with_inputs_of_its_kind(kind, tmp_path):
    name, sizes, shapes = KINDS[kind]
    source = directory(name, sizes, tmp_path / "pruned")
    report = pack_directory(source, tmp_path / "packed", PackSettings(batch_sizes=[1, 4, 40]))
    assert [time.shape for time in report.times] == shapes
    assert {time.ratio for time in report.times} == {4.0}
    assert any(layer.packed for layer in report.layers)


@pytest.mark.parametrize("kind", REASONS)
def test_a_model_without_an_example_is_packed_and_the_report_says_why_it_was_not_timed(kind, tmp_path):
    name, sizes, reason = REASONS[kind]
    source = directory(name, sizes, tmp_path / "pruned")
    report = pack_directory(source, tmp_path / "packed")
    assert report.times == ()
    assert report.notes[-1].startswith(f"the whole model was not timed before and after: {reason}")
    assert any(layer.packed for layer in report.layers)


def test_the_command_prints_the_times_and_writes_them(tmp_path):
    name, sizes, shapes = KINDS["decoder"]
    source, packed = directory(name, sizes, tmp_path / "pruned"), tmp_path / "packed"
    arguments = ["pack", str(source), "--output", str(packed), "--batch", "1", "--batch", "4"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "the whole model at" in result.output
    assert "the whole model is 4.00 times as fast at 1 x 1 (250.0 instead of 1,000 ms)" in result.output
    stored = json.loads((packed / "secateur.pack.json").read_text())
    assert [time["shape"] for time in stored["times"]] == shapes[:2]
