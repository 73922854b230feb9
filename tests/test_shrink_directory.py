"""``secateur shrink``: a model directory becomes a smaller one, whole or not at all."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import with_tokenizer
from typer.testing import CliRunner

from secateur.cli import app
from secateur.graph import Removal
from secateur.reports import ShrinkReport, stages_from_json
from secateur.shrinking import check_request, pruned_before

transformers = pytest.importorskip("transformers")

TEXT = "def read(path):\n    with open(path) as file:\n        return file.read()\n" * 60
SMALL = ("--samples", "4", "--sequence-length", "32")
QUICK = ("--no-latency",)


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny random language model of four blocks in bfloat16, in several shards."""
    path = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="150KB")
    return with_tokenizer(path)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A tiny encoder with a head, tied to its embedding."""
    path = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    transformers.BertForMaskedLM(config).save_pretrained(path)
    return with_tokenizer(path)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def shrink(source, *arguments):
    return CliRunner().invoke(app, ["shrink", str(source), *map(str, arguments)])


def weights(path):
    tensors = {}
    for shard in path.glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


def stage(path):
    return stages_from_json((path / "secateur.json").read_text())[-1]


def test_blocks_go_and_the_output_loads_like_any_other(llama, text, tmp_path):
    out = tmp_path / "out"
    result = shrink(llama, "--output", out, "--remove-layers", "1-2", *SMALL, "--calibration", text, "--evaluate", text)
    assert result.exit_code == 0, result.stderr
    report = stage(out)
    assert report.kept_blocks == {"model.layers": (0, 3)}
    assert report.evaluation.metric == "perplexity"
    assert report.latency.shape == (1, 32)
    assert report.calibration == {"file": "text.txt", "samples": 4, "sequence_length": 32, "seed": 0}
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    dense = transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert model.config.num_hidden_layers == 2
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    kept = dense.model.layers[3].self_attn.q_proj.weight
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, kept)
    assert (out / "tokenizer.json").exists()
    assert {t.dtype for t in weights(out).values()} == {torch.bfloat16}
    ids = torch.arange(5, 15)[None]
    with_cache = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(with_cache, model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))


def test_bytes_are_those_on_the_disk(llama, tmp_path):
    out = tmp_path / "out"
    assert shrink(llama, "--output", out, "--remove-layers", "0", *QUICK).exit_code == 0
    report = stage(out)
    assert report.before.nbytes == sum(t.nbytes for t in weights(llama).values())
    assert report.after.nbytes == sum(t.nbytes for t in weights(out).values())
    assert report.latency is None
    assert any("no text to learn from" in note for note in report.notes)


def test_an_encoder_keeps_its_head_and_what_is_tied(bert, text, tmp_path):
    out = tmp_path / "out"
    result = shrink(bert, "--output", out, "--remove-layers", "bert.encoder.layer=1", "--evaluate", text, *QUICK)
    assert result.exit_code == 0, result.stderr
    assert stage(out).evaluation.metric == "output similarity"
    model, info = transformers.AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert set(weights(bert)) - set(weights(out)) == {n for n in weights(bert) if ".layer.2." in n}


def test_a_list_of_units_is_written_and_read_and_refused_for_another_model(llama, bert, tmp_path):
    removal, first, second = tmp_path / "removal.json", tmp_path / "first", tmp_path / "second"
    result = shrink(llama, "--output", first, "--remove-layers", "1,3", "--removal", removal, *QUICK)
    assert result.exit_code == 0, result.stderr
    assert Removal.load(removal).units["model.layers"] == (1, 3)
    assert shrink(llama, "--output", second, "--removal", removal, *QUICK).exit_code == 0
    assert all(torch.equal(weights(second)[name], tensor) for name, tensor in weights(first).items())
    result = shrink(bert, "--output", tmp_path / "third", "--removal", removal, *QUICK)
    assert result.exit_code == 2
    assert "another model: LlamaForCausalLM" in result.stderr
    assert not (tmp_path / "third").exists()
    result = shrink(llama, "--output", tmp_path / "third", "--remove-layers", "1", "--removal", removal, *QUICK)
    assert result.exit_code == 2
    assert "removal.json exists" in result.stderr


def test_methods_that_learn_from_a_loss_need_a_language_model(bert, text, tmp_path):
    how = ("--output", tmp_path / "out", "--keep", "ffn=0.5", "--calibration", text, *SMALL, "--method", "taylor+refit")
    assert "only causal language models have one" in " ".join(shrink(bert, *how).stderr.split())


def test_the_history_of_a_directory_has_all_stages(llama, tmp_path):
    pruned, small, again = tmp_path / "pruned", tmp_path / "small", tmp_path / "again"
    how = ("--pattern", "2:4", "--method", "magnitude")
    assert CliRunner().invoke(app, ["prune", str(llama), "--output", str(pruned), *how]).exit_code == 0
    assert shrink(pruned, "--output", small, "--remove-layers", "1", *QUICK).exit_code == 0
    assert CliRunner().invoke(app, ["prune", str(small), "--output", str(again), *how]).exit_code == 0
    stages = stages_from_json((again / "secateur.json").read_text())
    assert [type(found).__name__ for found in stages] == ["Report", "ShrinkReport", "Report"]
    model = transformers.AutoModelForCausalLM.from_pretrained(small)
    (history,) = pruned_before(stages[:2], model)
    names = [layer.name for layer in history.layers]
    assert len(names) == len(set(names)) == 3 * 7
    assert all(name in dict(model.named_modules()) for name in names)


@pytest.mark.parametrize(
    "text", ["3", "{}", '{"stages": 3}', '{"stages": [3]}', '{"stages": [{"stage": "x", "report": 1}]}']
)
def test_what_is_no_history_is_refused(text):
    with pytest.raises(ValueError, match=r"not a|not the stages|unknown stage"):
        stages_from_json(text)


def test_analyze_shows_what_could_go_and_writes_nothing(llama, tmp_path):
    result = shrink(llama, "--analyze")
    assert result.exit_code == 0, result.stderr
    assert "model.layers" in result.stdout
    assert "nothing was changed" in result.stdout
    table = json.loads(shrink(llama, "--analyze", "--json", "--html", tmp_path / "page.html").stdout)
    assert {entry["kind"] for entry in table["dimensions"]} >= {"layers", "ffn"}
    assert table["size"]["macs"] > 0
    assert "model.layers" in (tmp_path / "page.html").read_text().replace("<wbr>", "")


def test_json_and_page_hold_the_report(llama, tmp_path):
    out, page = tmp_path / "out", tmp_path / "page.html"
    result = shrink(llama, "--output", out, "--remove-layers", "0", "--json", "--html", page, *QUICK)
    assert ShrinkReport.from_json(result.stdout) == stage(out)
    assert "Layers, kept and gone" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "exactly one of --keep, --target, --remove-layers and --zeros"),
        (("--keep", "ffn=0.5", "--zeros"), "got --keep and --zeros"),
        (("--keep", "fnn=0.5"), "unknown kind in keep 'fnn'; did you mean 'ffn'"),
        (("--keep", "ffn"), "such as ffn=0.5; got 'ffn'"),
        (("--keep", "ffn=0.5", "--keep", "ffn=0.6"), "names ffn twice"),
        (("--keep", "ffn=0"), "above 0 and at most 1, got 0"),
        (("--keep", "ffn=1.5"), "above 0 and at most 1, got 1.5"),
        (("--keep", "ffn=nan"), "NaN"),
        (("--target", "bytes=0.5"), "unknown key 'bytes' in the target"),
        (("--target", "params=2"), "above 0 and at most 1, got 2"),
        (("--remove-layers", "4-2"), "both ends included; got '4-2'"),
        (("--remove-layers", "-1"), "both ends included"),
        (("--remove-layers", "1-999999999"), "both ends included"),
        (("--keep", "layers=0.5"), "learns from text: give some with --calibration"),
        (("--remove-layers", "1", "--method", "obs"), "the method obs learns from text"),
        (("--removal", "missing.json"), "missing.json is no file"),
        (("--analyze",), "--analyze only looks, and takes no --output"),
    ],
)
def test_mistakes_end_with_one_message_and_nothing_is_written(llama, tmp_path, arguments, message):
    out = tmp_path / "out"
    result = shrink(llama, "--output", out, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not out.exists()


def test_the_output_is_needed_and_not_replaced(llama, tmp_path):
    assert "--output says where" in shrink(llama, "--remove-layers", "0").stderr
    assert "exists" in shrink(llama, "--output", tmp_path, "--remove-layers", "0").stderr


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep": {}}, ValueError, "keep is empty"),
        ({"keep": 0.5}, TypeError, "keep must be a dict"),
        ({"keep": {"ffn": "half"}}, TypeError, "must be a number"),
        ({"target": {"params": 0.5, "macs": 0.5}}, ValueError, "one of params and macs"),
        ({"remove": {"layers": "23"}}, TypeError, "must be a list of numbers"),
        ({"remove": {"layers": [1.0]}}, TypeError, "must be an int"),
        ({"remove": {"layers": [-1]}}, ValueError, "at least 0"),
        ({"zeros": 1}, TypeError, "zeros must be a bool"),
        ({"zeros": True, "round_to": 0}, ValueError, "round_to must be at least 1"),
        ({"keep": {"ffn": 0.5}, "zeros": True}, ValueError, "got keep and zeros"),
    ],
)
def test_requests_that_cannot_be_meant_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        check_request(**{"keep": None, "target": None, "remove": None, "zeros": False} | arguments)
