import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
import warnings
from importlib.resources import as_file, files

import pytest
import torch
from fake_timing import routes_take
from safetensors.torch import load_file, save_file
from tiny import with_tokenizer
from typer.testing import CliRunner

import secateur
from secateur.cli import app
from secateur.cli._app import show
from secateur.reports import Table, TableColumn

transformers = pytest.importorskip("transformers")

TEXT = "def read(path):\n    with open(path) as file:\n        return file.read()\n" * 60


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny random language model with the demo's tokenizer, in bfloat16, in two shards."""
    path = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path, max_shard_size="150KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return with_tokenizer(path)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A tiny encoder with a classification head that AutoModel does not load, and no pooler in the checkpoint."""
    path = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.BertForMaskedLM(config)
    model.save_pretrained(path)
    return with_tokenizer(path)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def prune(source, output, *arguments):
    return run("prune", source, "--output", output, *arguments)


SMALL = ("--samples", "4", "--sequence-length", "32")


def weights(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt", "wanda+refit", "random", "admm", "alps"])
def test_prune_writes_a_directory_that_loads_unchanged(llama, text, tmp_path, method):
    output = tmp_path / "out"
    result = prune(llama, output, "--pattern", "2:4", "--method", method, "--calibration", text, *SMALL)
    assert result.exit_code == 0, result.output
    before, after = weights(llama), weights(output)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        if "proj" in name:
            groups = (tensor == 0).view(-1, 4).sum(1)
            assert (groups == 2).all(), name
            assert not torch.signbit(tensor[tensor == 0]).any()
        else:
            assert torch.equal(tensor, before[name])
    assert sorted(p.name for p in llama.iterdir()) == sorted(
        p.name for p in output.iterdir() if p.name != "secateur.json"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, after["model.layers.0.mlp.up_proj.weight"])
    transformers.AutoModel.from_pretrained(output)
    transformers.AutoTokenizer.from_pretrained(output)
    config = json.loads((output / "config.json").read_text())
    assert config["sparsity"]["recipe"]["pattern"] == "2:4"
    report = secateur.Report.from_json((output / "secateur.json").read_text())
    assert report.sparsity == 0.5
    assert report.calibration == {"file": "text.txt", "samples": 4, "sequence_length": 32, "seed": 0}


@pytest.mark.parametrize(
    ("arguments", "held_out", "noted"),
    [(["--held-out", "0.25"], 0.25, ""), (["--damping", "auto"], 0.2, "chosen by"), (["--damping", "0.5"], 0, "")],
)
def test_prune_measures_on_text_that_it_holds_out(llama, text, tmp_path, arguments, held_out, noted):
    fixed = ("--sparsity", "0.5", "--method", "sparsegpt", "--calibration", text, *SMALL)
    result = prune(llama, tmp_path / "out", *fixed, *arguments, "--json")
    assert result.exit_code == 0, result.output
    report = secateur.Report.from_json(result.stdout)
    assert report.recipe.get("held_out", 0) == held_out
    assert all((layer.held_out_error is not None) == bool(held_out) for layer in report.layers)
    assert all(any(noted in note for note in layer.notes) for layer in report.layers if noted)
    assert report.recipe["method"]["damping"] == (0.5 if "0.5" in arguments else 0.01)
    refused = prune(llama, tmp_path / "other", *fixed, "--damping", "some")
    assert refused.exit_code == 2
    assert "unknown damping 'some'" in refused.output
    refused = prune(llama, tmp_path / "other", "--pattern", "2:4", "--method", "magnitude", "--held-out", "0.2")
    assert "0.2 of the calibration text is to be held out, and there is none" in refused.output


def test_prune_takes_windows_by_what_they_hold(llama, text, tmp_path):
    arguments = ("--pattern", "2:4", "--calibration", text, *SMALL, "--select", "diverse", "--json")
    result = prune(llama, tmp_path / "out", *arguments)
    assert secateur.Report.from_json(result.stdout).calibration["select"] == "diverse"


def test_evaluation_measures_the_weights_that_are_written(llama, text, tmp_path):
    output = tmp_path / "out"
    arguments = ("--sparsity", "0.6", "--method", "magnitude", "--evaluate", text, "--json")
    result = prune(llama, output, *arguments)
    assert result.exit_code == 0, result.output
    evaluation = json.loads(result.stdout)["evaluation"]
    again = prune(output, tmp_path / "again", *arguments)  # pruned already: nothing changes, and so neither does this
    assert json.loads(again.stdout)["evaluation"]["before"] == pytest.approx(evaluation["after"], rel=1e-6)
    assert json.loads(again.stdout)["evaluation"]["after"] == pytest.approx(evaluation["after"], rel=1e-6)
    assert evaluation["metric"] == "perplexity"
    assert evaluation["before"] != evaluation["after"]


def test_an_encoder_keeps_its_head_and_its_untrained_pooler_is_reported(bert, text, tmp_path):
    output = tmp_path / "out"
    result = prune(
        bert, output, "--pattern", "block:4x4", "--sparsity", "0.5", "--calibration", text, *SMALL, "--evaluate", text
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"metric +tokens +before +after .*\n +output similarity +[\d,]+ +1\.000 ", result.output)
    before, after = weights(bert), weights(output)
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert len(changed) == 12
    assert all(".encoder.layer." in f".{name}" for name in changed)
    report = secateur.Report.from_json((output / "secateur.json").read_text())
    reasons = {skip.name: skip.reason for skip in report.skipped}
    assert reasons["pooler.dense"] == "not in the checkpoint, so its values are not trained"
    transformers.AutoModelForMaskedLM.from_pretrained(output)


def test_same_seed_same_bytes_other_seed_other_mask(llama, text, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        result = prune(llama, tmp_path / name, "--pattern", "2:4", "--calibration", text, *SMALL, "--seed", seed)
        assert result.exit_code == 0, result.output
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_recipe_file_with_options_that_win(llama, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('pattern = "2:4"\nmethod = "magnitude"\nexclude = ["*.mlp.*"]\n')
    result = prune(llama, tmp_path / "out", "--recipe", recipe, "--pattern", "1:4", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {layer["pattern"] for layer in report["layers"]} == {"1:4"}
    assert not any("mlp" in layer["name"] for layer in report["layers"])


def test_an_option_completes_a_recipe(llama, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('method = "magnitude"\n')
    result = prune(llama, tmp_path / "out", "--recipe", recipe, "--sparsity", "0.25", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["recipe"]["sparsity"] == 0.25


@pytest.mark.parametrize(
    "change", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"model_type": ["llama"]}, {"vocab_size": 16}]
)
def test_a_config_that_cannot_be_right(llama, tmp_path, change):
    source = tmp_path / "model"
    shutil.copytree(llama, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    result = prune(source, tmp_path / "out", "--pattern", "2:4", "--method", "magnitude")
    assert result.exit_code == 2, result.output
    assert "cannot be loaded" in result.stderr


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path, llama, text):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    source = tmp_path / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / name, source / name)
    result = prune(source, tmp_path / "out", "--pattern", "2:4", "--calibration", text, *SMALL)
    assert result.exit_code == 2, result.output
    assert "the tokenizer is its own" in result.stderr


@pytest.mark.parametrize("stored_twice", [False, True])
def test_a_tied_head_that_is_included_is_written_wherever_it_is_stored(tmp_path, stored_twice):
    with as_file(files("secateur.demo") / "model") as demo:
        source = tmp_path / "model"
        shutil.copytree(demo, source)
    if stored_twice:
        tensors = load_file(source / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = prune(source, tmp_path / "out", "--sparsity", "0.5", "--method", "magnitude", "--include", "lm_head")
    assert result.exit_code == 0, result.output
    written = weights(tmp_path / "out")
    for name in ["model.embed_tokens.weight", "lm_head.weight"][: 1 + stored_twice]:
        assert 0.5 <= (written[name] == 0).float().mean() < 0.51


def test_html_report(llama, tmp_path):
    result = prune(llama, tmp_path / "out", "--pattern", "2:4", "--method", "magnitude", "--html", tmp_path / "r.html")
    assert result.exit_code == 0, result.output
    assert "model.layers.0.mlp.up_proj" in (tmp_path / "r.html").read_text().replace("<wbr>", "")


def test_tied_head_and_fused_names_are_left_alone(tmp_path, text):
    """The demo model ties its head to its embedding: neither may change."""
    with as_file(files("secateur.demo") / "model") as demo:
        result = prune(demo, tmp_path / "out", "--pattern", "2:4", "--method", "magnitude", "--json")
        assert result.exit_code == 0, result.output
        before = weights(demo)["model.embed_tokens.weight"]
    assert torch.equal(weights(tmp_path / "out")["model.embed_tokens.weight"], before)
    assert "lm_head" in {skip["name"] for skip in json.loads(result.stdout)["skipped"]}


MISTAKES = {
    "missing directory": (["nowhere", "--pattern", "2:4"], "does not exist"),
    "unknown pattern": (["MODEL", "--pattern", "2-4"], "names no pattern"),
    "unknown method": (["MODEL", "--pattern", "2:4", "--method", "sparsgpt"], "did you mean 'sparsegpt'"),
    "no sparsity": (["MODEL", "--method", "magnitude"], "say which"),
    "percent": (["MODEL", "--sparsity", "50", "--method", "magnitude"], "Did you mean 0.5"),
    "2:4 at another sparsity": (["MODEL", "--pattern", "2:4", "--sparsity", "0.7"], "fixes the sparsity at 0.5"),
    "no calibration": (["MODEL", "--pattern", "2:4"], "--calibration TEXT_FILE"),
    "missing text": (["MODEL", "--pattern", "2:4", "--calibration", "nowhere.txt"], "cannot be read"),
    "empty text": (["MODEL", "--pattern", "2:4", "--calibration", "EMPTY"], "holds no text"),
    "short text": (["MODEL", "--pattern", "2:4", "--calibration", "TEXT"], "--samples"),
    "too long windows": (
        ["MODEL", "--pattern", "2:4", "--calibration", "TEXT", "--sequence-length", "4096"],
        "more than the 128 tokens",
    ),
    "pattern that does not fit": (
        ["MODEL", "--pattern", "block:5x5", "--sparsity", "0.5", "--method", "magnitude"],
        "model.layers.0.self_attn.q_proj: block:5x5 needs an output size that is a multiple of 5, got 32",
    ),
    "glob that matches nothing": (
        ["MODEL", "--pattern", "2:4", "--method", "magnitude", "--exclude", "x"],
        "matches none",
    ),
    "missing recipe": (["MODEL", "--recipe", "nowhere.toml"], "cannot read the recipe"),
    "unknown device": (
        ["MODEL", "--pattern", "2:4", "--method", "magnitude", "--device", "foo"],
        "'foo' cannot be used",
    ),
    "no values": (["MODEL", "--pattern", "2:4", "--method", "magnitude", "--device", "meta"], "'meta' cannot be used"),
    "page that cannot be written": (
        ["MODEL", "--pattern", "2:4", "--method", "magnitude", "--html", "TEXT/report.html"],
        "cannot be made",
    ),
    "page that is a directory": (
        ["MODEL", "--pattern", "2:4", "--method", "magnitude", "--html", "MODEL"],
        "is a directory. Give the path of a file",
    ),
    "not a model": (["TEXT", "--pattern", "2:4"], "is a file, not a directory"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_message_status_2_and_no_output(llama, text, tmp_path, mistake):
    arguments, message = MISTAKES[mistake]
    (tmp_path / "empty.txt").write_text("")
    places = {
        "MODEL": llama,
        "TEXT": text,
        "TEXT/report.html": text / "report.html",
        "EMPTY": tmp_path / "empty.txt",
    }
    output = tmp_path / "out"
    result = prune(
        *[places.get(argument, argument) for argument in arguments[:1]],
        output,
        *[places.get(argument, argument) for argument in arguments[1:]],
    )
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stderr.count("secateur: ") == 1
    assert not output.exists()
    assert not list(tmp_path.glob("*.partial"))


def test_existing_output_and_overwrite(llama, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("{}")
    (output / "keep").write_text("")
    refused = prune(llama, output, "--pattern", "2:4", "--method", "magnitude")
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    assert (output / "keep").exists()
    assert prune(llama, output, "--pattern", "2:4", "--method", "magnitude", "--overwrite").exit_code == 0
    assert not (output / "keep").exists()


def test_no_tokenizer_is_said(llama, text, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(llama, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    result = prune(bare, tmp_path / "out", "--pattern", "2:4", "--calibration", text, *SMALL)
    assert result.exit_code == 2, result.output
    assert "no tokenizer" in result.stderr


def test_unknown_model_type_and_wrong_shapes(llama, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    (broken / "config.json").write_text('{"model_type": "no_such_model", "architectures": ["X"]}')
    result = prune(broken, tmp_path / "out", "--pattern", "2:4", "--method", "magnitude")
    assert result.exit_code == 2, result.output
    assert "cannot be loaded by transformers" in result.stderr


def test_code_in_a_model_directory_is_never_run(llama, tmp_path):
    evil = tmp_path / "evil"
    shutil.copytree(llama, evil)
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((evil / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (evil / "config.json").write_text(json.dumps(config))
    prune(evil, tmp_path / "out", "--pattern", "2:4", "--method", "magnitude")
    assert not (tmp_path / "ran").exists()


def test_inspect(llama, tmp_path):
    prune(llama, tmp_path / "out", "--pattern", "2:4", "--method", "magnitude")
    result = run("inspect", tmp_path / "out")
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if "layers.0.mlp.up_proj" in line)
    assert "50.00%" in line
    assert "2:4" in line
    rows = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert {row["sparsity"] for row in rows if "proj" in row["name"]} == {0.5}
    assert all("2:4" in row["patterns"] for row in rows if "proj" in row["name"])
    assert run("inspect", tmp_path / "nowhere").exit_code == 2


def test_inspect_one_file(tmp_path):
    save_file({"[bold]w": torch.eye(4)}, tmp_path / "m.safetensors")
    result = run("inspect", tmp_path / "m.safetensors")
    assert "[bold]w" in result.output
    assert "75.00%" in result.output


def test_tables_on_a_terminal(capsys):
    """Cells as they are, empty columns left out, remarks below, nothing at all for a table without rows."""
    columns = (
        TableColumn("[b]name"),
        TableColumn("n", is_number=True),
        TableColumn("no"),
        TableColumn("x", is_note=True),
    )
    rows = (("[red]a", "10", "", ""), ("b", "9", "", "remark [1]"))
    show(Table("Empty", columns, ()), Table("The [i]title", columns, rows, ("A note.",), strong=((0, 1),)))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["The [i]title", "[b]name   n", "[red]a   10", "b         9", "b: remark [1]", "A note.", ""]


def test_version_and_help():
    assert secateur.__version__ in run("--version").output
    assert "--calibration" in run("prune", "--help").output


def test_an_interrupt_writes_nothing(llama, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.pruning._directory.prune_", interrupt)
    result = prune(llama, tmp_path / "out", "--pattern", "2:4", "--method", "magnitude")
    assert result.exit_code == 130
    assert "nothing was written" in result.stderr
    assert list(tmp_path.iterdir()) == []


# What stops a command, and when: before its output has its place, and after. It says what was written, which is true.
STOPS = {"interrupt": (signal.SIGINT, "interrupted", 130), "termination": (signal.SIGTERM, "terminated", 143)}


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("when", ["secateur.files._whole._flush", "secateur.files._whole._flush_folder", "show"])
def test_a_signal_cleans_up_and_says_what_was_written(llama, tmp_path, monkeypatch, stop, when):
    number, word, status = STOPS[stop]
    written = when != "secateur.files._whole._flush"
    output = tmp_path / "out"
    stopped = []

    def strike(*args):
        if not stopped and output.exists() == written:
            stopped.append(True)
            os.kill(os.getpid(), number)

    monkeypatch.setattr("secateur.cli._prune.show" if when == "show" else when, strike)
    before = signal.getsignal(signal.SIGTERM)
    result = prune(llama, output, "--pattern", "2:4", "--method", "magnitude")
    assert stopped
    assert result.exit_code == status, result.output
    told = f"{output} was written before that, and is complete" if written else "nothing was written"
    assert f"secateur: {word}; {told}." in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"][: int(written)]
    assert not written or transformers.AutoModelForCausalLM.from_pretrained(output)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_after_the_output_is_complete_says_so(llama, tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    monkeypatch.setattr("secateur.reports.Report.to_html", lambda self: page.mkdir() or "page")
    result = prune(llama, tmp_path / "out", "--pattern", "2:4", "--method", "magnitude", "--html", page)
    assert result.exit_code == 2
    assert re.search(rf"page.html could not be written(?s:.*)Written before that: {tmp_path / 'out'}\.", result.stderr)


def test_links_out_of_a_model_are_named_once(llama, tmp_path, kernels_win):
    pruned, source = tmp_path / "pruned", tmp_path / "source"
    shutil.copytree(llama, source)
    (tmp_path / "private").write_text("private")
    (source / "notes.txt").symlink_to(tmp_path / "private")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = prune(source, pruned, "--pattern", "2:4", "--method", "magnitude")
        assert result.exit_code == 0, result.output
        assert result.stderr.count(f"secateur: {source} has links that lead out of it") == 1
        (pruned / "notes.txt").unlink()
        (pruned / "notes.txt").symlink_to(tmp_path / "private")
        result = run("pack", pruned, "--output", tmp_path / "packed")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("notes.txt -> ") == 1
    assert ".py" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cache", "{}/file/cache.json"), "cannot be made"),
        (("--cache", "{}"), "is a directory"),
        (("--cache", "{}/out/cache.json"), "is where the output"),
        (("--cache", "{}/file"), "not an autotune cache"),
        (("--cache", "/proc/x/cache.json"), "cannot be made"),
        (("--html", "{}"), "is a directory"),
        (("--html", "{}/out"), "is where the output"),
        (("--html", "{}/" + "x" * 300), "File name too long"),
        (("--html", "{}/missing/" + "x" * 300), "File name too long"),
    ],
)
def test_pack_says_what_cannot_be_written_before_it_loads_the_model(llama, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "file").write_text("thesis")
    monkeypatch.setattr("secateur.packing._directory.load_model", lambda *args, **keep: pytest.fail("loaded"))
    result = run("pack", llama, "--output", tmp_path / "out", *(text.format(tmp_path) for text in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupt_while_the_command_is_imported(monkeypatch, capsys):
    import secateur_command

    class Slow(types.ModuleType):
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "secateur.cli", Slow("secateur.cli"))
    assert secateur_command.main() == 130
    assert capsys.readouterr().err == "secateur: interrupted; nothing was written.\n"


# A config that counts what the weights cannot have: refused before anything of that size is built.
COUNTS = ["num_hidden_layers", "num_labels", "vocab_size", "hidden_size", "intermediate_size"]


@pytest.mark.parametrize("name", COUNTS)
def test_a_config_that_describes_a_far_larger_model_is_refused_at_once(llama, tmp_path, kernels_win, name):
    pruned, packed = tmp_path / "pruned", tmp_path / "packed"
    assert prune(llama, pruned, "--pattern", "2:4", "--method", "magnitude").exit_code == 0
    assert run("pack", pruned, "--output", packed).exit_code == 0
    for path in (pruned, packed):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, name: 10**9}))
    for arguments in (
        ("prune", pruned, "--output", tmp_path / "out", "--pattern", "2:4", "--method", "magnitude"),
        ("pack", pruned, "--output", tmp_path / "out"),
        ("export", packed, "--output", tmp_path / "out"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert re.search(rf"{name} = 1,000,000,000, but|describes a model of [\d,]+ numbers, but", result.stderr)
    with pytest.raises(secateur.FormatError, match="Correct the config"):
        secateur.load(packed)


def test_counts_in_nested_configs_and_lists():
    from secateur.huggingface import _plausible

    shapes = [(64, 32)] * 20
    _plausible.check_counts("m", {"num_hidden_layers": 1000, "max_window_layers": 28, "eos_token_id": 10**9}, shapes)
    for config in (
        {"text_config": {"decoder": {"n_layer": 1001}}},
        {"depths": [2, 2, 10**6]},
        {"num_local_experts": 5000},
        {"num_labels": 1 << 21},
    ):
        with pytest.raises(secateur.FormatError, match=r"m: the config has .* but there are 20 tensors"):
            _plausible.check_counts("m", config, shapes)


@pytest.mark.parametrize("wrong", ["x", -1, [], True, float("nan"), {}])
@pytest.mark.parametrize("name", ["model_max_length", "max_position_embeddings"])
def test_a_limit_of_tokens_that_is_no_number_is_named(llama, text, tmp_path, wrong, name):
    source = tmp_path / "model"
    shutil.copytree(llama, source)
    path = source / {"model_max_length": "tokenizer_config.json"}.get(name, "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), name: wrong}))
    result = prune(source, tmp_path / "out", "--pattern", "2:4", "--calibration", text, *SMALL)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert name in result.stderr or "cannot be loaded by transformers" in result.stderr or "tokenizer" in result.stderr


def test_missing_transformers_names_the_extra(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = prune(llama, tmp_path / "out", "--pattern", "2:4", "--method", "magnitude")
    assert result.exit_code == 2
    assert 'pip install "secateur[transformers]"' in result.stderr


@pytest.mark.slow
def test_the_installed_command_prints_plain_progress_lines(llama, tmp_path):
    """In a process of its own, as users run it: lines on stderr, the table on stdout, nothing else."""
    command = [sys.executable, "-c", "from secateur.cli import main; main()", "prune", str(llama)]
    command += ["--output", str(tmp_path / "out"), "--pattern", "2:4", "--method", "magnitude"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.strip().splitlines()
    assert all(" % " in line for line in lines)
    assert "100 %" in result.stderr
    assert re.search(
        r"^\d+\.\d\d% of the model's [\d,]+ weights are zero now; .*\npruned ", result.stdout, re.MULTILINE
    )
    assert "\x1b" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "stream", "said"),
    [
        (["--version"], 0, "stdout", f"secateur {secateur.__version__}"),
        (["inspect", "no-such-directory"], 2, "stderr", "secateur: no-such-directory does not exist."),
    ],
    ids=["works", "a mistake"],
)
def test_the_package_runs_as_a_module(tmp_path, arguments, status, stream, said):
    """As launchers start it (torchrun -m secateur), with the exit status of the command."""
    command = [sys.executable, "-m", "secateur", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == status, result.stderr
    assert getattr(result, stream).startswith(said)


# Packing and measuring


@pytest.fixture
def kernels_win(monkeypatch):
    """Every kernel takes a quarter of the dense layer's time, and nothing is measured."""
    routes_take(monkeypatch, lambda name, index: {"dense": 1.0, "prepacked": 2.0}.get(name, 0.25))


def test_pack_and_export_bring_back_every_weight(llama, tmp_path, kernels_win):
    pruned, packed, dense = (tmp_path / name for name in ("pruned", "packed", "dense"))
    assert prune(llama, pruned, "--sparsity", "0.8", "--method", "magnitude").exit_code == 0
    page = tmp_path / "page.html"
    result = run("pack", pruned, "--output", packed, "--cache", tmp_path / "cache.json", "--html", page)
    assert result.exit_code == 0, result.output
    assert "packed 14 of 14 layers with zeros" in result.stdout
    assert re.search(r"unstructured,scope=layer +20\.\d% +bitmask +bfloat16 ", result.stdout)
    assert "output head" in result.stdout
    assert (tmp_path / "cache.json").exists()
    assert "model.layers.0.mlp.up_proj" in page.read_text(encoding="utf-8").replace("<wbr>", "")
    model = secateur.load(packed, dtype=torch.float32)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    result = run("export", packed, "--output", dense)
    assert result.exit_code == 0, result.output
    before, after = weights(pruned), weights(dense)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_pack_in_fewer_bits_as_json(llama, tmp_path, kernels_win):
    pruned = tmp_path / "pruned"
    prune(llama, pruned, "--pattern", "2:4", "--method", "magnitude")
    arguments = ("--value-dtype", "int8", "--batch", "4", "--exclude", "*.mlp.*", "--json", "--threads", "1")
    result = run("pack", pruned, "--output", tmp_path / "packed", *arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {layer["value_dtype"] for layer in report["layers"]} == {"int8"}
    assert all(0 < layer["error"] < 0.02 and layer["pattern"] == "2:4" for layer in report["layers"])
    assert len(report["layers"]) == 8
    assert [choice["rows"] for choice in report["layers"][0]["choices"]] == [4]
    assert report["machine"]["threads"] == "1"


def test_pack_in_other_arithmetic(llama, text, tmp_path, monkeypatch):
    routes_take(monkeypatch, lambda name, index: {"dense": 1.0, "int8-panels": 0.2}.get(name, 5.0))
    found = {}
    for name, asked in {"precision": ("--precision", "int8"), "tolerance": ("--tolerance", "0.2")}.items():
        arguments = (*asked, "--batch", "4", "--calibration", text, *SMALL)
        result = run("pack", llama, "--output", tmp_path / name, *arguments)
        assert result.exit_code == 0, result.output
        tables = int(name == "precision")  # of embeddings, which a tolerance leaves as they are
        assert f"packed {14 + tables} of {14 + tables} layers, skipped" in result.stdout
        assert "the relative error of the model's outputs is 0.0" in result.stdout
        found[name] = json.loads((tmp_path / name / "secateur.pack.json").read_text(encoding="utf-8"))
    for table in found.values():
        layers = [row for row in table["layers"] if "embed" not in row["name"]]
        assert {(row["format"], row["precision"], row["value_dtype"]) for row in layers} == {("dense", "int8", "int8")}
        assert all(0 < row["output_error"] < 0.2 for row in layers)
        assert 0 < table["output_error"] < 0.2
    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits = [secateur.load(tmp_path / name, dtype=torch.float32)(ids).logits for name in found]
    assert (logits[0] - logits[1]).norm() < 0.1 * logits[1].norm()
    result = run("export", tmp_path / "precision", "--output", tmp_path / "dense")
    assert result.exit_code == 0, result.output
    with torch.no_grad():
        dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)(ids).logits
    assert (dense - logits[0]).norm() < 0.1 * dense.norm()


def test_pack_and_export_say_what_is_wrong(llama, tmp_path, kernels_win):
    for arguments in (
        ("pack", tmp_path / "nothing", "--output", tmp_path / "out"),
        ("pack", llama, "--output", tmp_path / "out", "--value-dtype", "int3"),
        ("pack", llama, "--output", tmp_path / "out", "--memory", "0"),
        ("pack", llama, "--output", tmp_path / "out", "--tolerance", "0.1"),
        ("pack", llama, "--output", tmp_path / "out", "--precision", "int4"),
        ("pack", llama, "--output", tmp_path / "out", "--precision", "int8", "--value-dtype", "float32"),
        ("pack", llama, "--output", tmp_path / "out", "--include", "nowhere"),
        ("pack", llama, "--output", llama),
        ("export", llama, "--output", tmp_path / "out"),
        ("export", tmp_path / "nothing", "--output", tmp_path / "out"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, arguments
        assert result.stderr.splitlines()[-1]
        assert "secateur: " in result.stderr
        assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4", "row", "column"])
def test_bench_measures_a_random_layer(kernels_win, pattern, tmp_path):
    page = tmp_path / "bench.html"
    arguments = ("bench", "--shape", "32x64", "--pattern", pattern, "--batch", "1", "--batch", "5")
    result = run(*arguments, "--json", "--html", page)
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout)
    found = {(entry["rows"], entry["contender"]): entry for entry in table["results"]}
    from secateur import kernels
    from secateur.packing import _bench

    assert {key[1] for key in found} == set(_bench.CONTENDERS)
    assert {key[0] for key in found} == {1, 5}
    for (_, contender), entry in found.items():
        if entry["ratio"] is None:
            assert entry["note"]
            assert contender not in _bench.OURS or kernels.available()["native"] != "ok"
        else:
            assert entry["ratio"] == entry["low"] == entry["high"] == 4.0
            assert entry["error"] < _bench._TOLERANCE.get(contender, _bench._EXACT)
    text = page.read_text(encoding="utf-8")
    assert "32x64" in text
    assert '<i style="width:100.0%">' in text
    assert "http:" not in text
    assert "https:" not in text
    assert "<script" not in text
    assert "4.00 (4.00-4.00)" in run(*arguments).stdout


def test_bench_measures_each_kind_of_layer_of_a_model(llama, tmp_path, kernels_win):
    pruned = tmp_path / "pruned"
    prune(llama, pruned, "--sparsity", "0.8", "--method", "magnitude", "--exclude", "*.mlp.*")
    result = run("bench", pruned, "--batch", "2", "--threads", "1")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("unstructured 80%") == 1  # q, k, v and o of both blocks are alike
    result = run("bench", llama)
    assert result.exit_code == 2
    assert "no layer has zeros" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--shape", "64"),
        ("--shape", "0x4"),
        ("--shape", "axb"),
        ("--shape", "30x30", "--pattern", "2:4"),
        ("--pattern", "nothing"),
        ("--pattern", "2:4", "--sparsity", "0.9"),
        ("--sparsity", "2"),
        ("--batch", "0"),
    ],
)
def test_bench_says_what_is_wrong(arguments, kernels_win):
    result = run("bench", "--shape", "32x64", *arguments)
    assert result.exit_code == 2, result.output
    assert "secateur: " in result.stderr


def test_bench_refuses_a_wrong_product(kernels_win, monkeypatch):
    from secateur import kernels
    from secateur.packing import _bench

    if kernels.available()["native"] != "ok":
        pytest.skip("no kernels")
    native = sys.modules["secateur.kernels._native_backend"]
    weight = _bench.made_weight((8, 16), secateur.Unstructured(), 0.5)
    monkeypatch.setattr(native.Bound, "__call__", lambda self, x, bias: torch.zeros(len(x), 8))
    with pytest.raises(secateur.SparsityError, match="is off by 1 of the largest output"):
        _bench.bench_weight(weight, [1])


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("output head; include=['lm_head'] prunes it", "output head; --include lm_head prunes it"),
        ("exclude=['a.*.b', 'c d'].", "--exclude 'a.*.b' --exclude 'c d'."),
        ("(--overwrite (overwrite=True))", "(--overwrite (--overwrite))"),
        ("(strict=False)", "(without --strict)"),
        ("pass remainder='dense' to", "pass --remainder dense to"),
        ("exclude=[...], x=[1], include = ['a']", "exclude=[...], x=[1], include = ['a']"),
        ("", ""),
    ],
)
def test_advice_is_given_in_options(message, expected):
    from secateur.cli._messages import in_options

    assert in_options(message) == expected
