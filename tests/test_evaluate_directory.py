"""``secateur evaluate``, and what of it ``prune`` and ``shrink`` use: model directories are measured on files."""

import json
import re
import shutil

import pytest
import torch
from evaluate_cases import LAYERS, LINES, SIZES, make_classifier
from fake_timing import kernels_win
from safetensors.torch import load_file, save_file
from tiny import demo_tokenizer, with_tokenizer
from typer.testing import CliRunner

import secateur
from secateur import EvaluationReport, FormatError, Pooling, RecipeError, StatisticsError
from secateur.cli import app
from secateur.evaluation import read_data
from secateur.huggingface import directory_figures, directory_without_weights, pooling_of, reading_of, sentence_length
from secateur.packing import pack_directory
from secateur.pipeline import DirectoryEvaluation, _evaluate, evaluate_directory
from secateur.pruning import Recipe, prune_directory
from secateur.reports import evaluation_table, stages_from_json
from secateur.shrinking import analyze_directory, shrink_directory

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return make_classifier(tmp_path_factory.mktemp("models") / "bert", id2label={0: "bad", 1: "good"})


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **LAYERS)).save_pretrained(path)
    return with_tokenizer(path)


@pytest.fixture
def files(tmp_path):
    """A file of each kind, by the kind."""
    (tmp_path / "text.txt").write_text("\n".join(LINES * 3))
    pairs = [f'"{one}","{other}",{(3 * i + j) % 5}' for i, one in enumerate(LINES) for j, other in enumerate(LINES[:i])]
    (tmp_path / "pairs.csv").write_text("\n".join(["sentence1,sentence2,score", *pairs]))
    labels = [json.dumps({"text": line, "label": ["bad", "good", 0, 1][i % 4]}) for i, line in enumerate(LINES)]
    (tmp_path / "labels.jsonl").write_text("\n".join(labels))
    return {"text": tmp_path / "text.txt", "pairs": tmp_path / "pairs.csv", "labels": tmp_path / "labels.jsonl"}


def pruned(source, output, **arguments):
    return prune_directory(source, output, Recipe(sparsity=0.7, method="magnitude"), device="cpu", **arguments)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_several_files_are_measured_in_one_run(bert, files, tmp_path):
    pruned(bert, tmp_path / "out")
    report = evaluate_directory(tmp_path / "out", files.values(), bert, device="cpu")
    names = ["similarity", "embedding_similarity", "rank", "spearman", "accuracy"]
    assert [figure.metric for figure in report.figures] == names
    assert [figure.file for figure in report.figures] == [*["text.txt"] * 3, "pairs.csv", "labels.jsonl"]
    assert [figure.count for figure in report.figures][1:] == [5, 5, 10, 5]
    assert (report.model, report.dense) == ("out", "bert")
    # The same as on models.
    dense, model = (
        transformers.AutoModelForSequenceClassification.from_pretrained(path) for path in (bert, tmp_path / "out")
    )
    again = secateur.evaluate(model, list(files.values()), None, dense, tokenizer=demo_tokenizer())
    for one, other in zip(report.figures, again.figures, strict=True):
        assert (one.metric, one.dense) == (other.metric, pytest.approx(other.dense))
        assert one.value == pytest.approx(other.value, abs=1e-4)
    assert report["similarity"] < 0.999
    assert report["rank"] < 99.9


@pytest.mark.parametrize("kind", ["text", "pairs", "labels"])
@pytest.mark.parametrize("command", ["prune", "shrink"])
def test_prune_and_shrink_measure_every_kind_of_file(bert, files, tmp_path, command, kind):
    """Their figures are those of the directories that they read and wrote."""
    out = tmp_path / "out"
    if command == "prune":
        evaluation = pruned(bert, out, evaluate=files[kind]).evaluation
    else:
        removed = {"bert.encoder.layer": [0]}
        evaluation = shrink_directory(
            bert, out, remove=removed, evaluate=files[kind], latency=False, device="cpu"
        ).evaluation
    metric = {"text": "similarity", "pairs": "spearman", "labels": "accuracy"}[kind]
    assert evaluation.metric == {"similarity": "output similarity"}.get(metric, metric)
    assert stages_from_json((out / "secateur.json").read_text())[-1].evaluation == evaluation
    report = evaluate_directory(out, [files[kind]], bert, metrics=[metric], device="cpu")
    (figure,) = report.figures
    assert (figure.dense, figure.value) == pytest.approx((evaluation.before, evaluation.after), abs=1e-5)
    assert figure.count == evaluation.tokens
    assert evaluation_table(evaluation).columns[1].heading == figure.unit


def test_labels_change_no_name_of_a_pruned_layer(bert, files, tmp_path):
    """The head is there to be measured. What is pruned is the model without it, as with text."""
    reports = [pruned(bert, tmp_path / kind, evaluate=files[kind]) for kind in ("text", "labels")]
    names = [[layer.name for layer in report.layers] for report in reports]
    assert names[0] == names[1]
    first, second = (load_file(tmp_path / kind / "model.safetensors") for kind in ("text", "labels"))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["pruned", "shrunk", "unevenly shrunk", "packed"])
def test_every_kind_of_directory_is_measured(llama, files, tmp_path, monkeypatch, kind):
    out = tmp_path / "out"
    if kind == "pruned":
        pruned(llama, out)
    elif kind == "packed":
        pruned(llama, tmp_path / "pruned")
        kernels_win(monkeypatch)
        assert any(layer.packed for layer in pack_directory(tmp_path / "pruned", out).layers)
    elif kind == "shrunk":
        shrink_directory(llama, out, remove={"model.layers": [0]}, latency=False, device="cpu")
    else:
        shrink_directory(llama, out, remove=uneven(llama), latency=False, device="cpu")
    report = evaluate_directory(out, [files["text"]], llama, device="cpu")
    (figure,) = report.figures
    assert figure.metric == "perplexity"
    assert figure.dense == evaluate_directory(llama, [files["text"]], device="cpu")["perplexity"]
    assert figure.value != figure.dense


def uneven(path):
    """Neurons of the first block only."""
    found = next(d for d in analyze_directory(path, device="cpu").dimensions if d.kind == "ffn")
    return {found.name: [0, 1, 2]}


def test_the_dense_model_is_loaded_once(bert, files, tmp_path, monkeypatch):
    loaded = []
    original = _evaluate.load_to_measure
    monkeypatch.setattr(
        _evaluate, "load_to_measure", lambda path, *rest: loaded.append(str(path)) or original(path, *rest)
    )
    evaluation = DirectoryEvaluation(bert, [files["text"], files["pairs"]], has_dense=True, device="cpu")
    assert evaluation.metrics == ("similarity", "embedding_similarity", "rank", "spearman")
    assert not loaded  # what is measured is known before any model is
    outputs = []
    for sparsity in (0.2, 0.8):
        outputs.append(tmp_path / str(sparsity))
        prune_directory(bert, outputs[-1], Recipe(sparsity=sparsity, method="magnitude"), device="cpu")
    ranks = [evaluation.measure(output)["rank"] for output in outputs]
    assert ranks[0] > ranks[1]
    assert loaded == [str(bert), *map(str, outputs)]
    dense = evaluation.dense_figures()
    assert len(loaded) == 3
    assert (dense["rank"], dense["similarity"]) == (100.0, 1.0)
    assert dense["spearman"] == evaluate_directory(bert, [files["pairs"]], device="cpu")["spearman"]


def test_the_command_prints_writes_and_shows(bert, files, tmp_path):
    command = ["evaluate", bert, "--device", "cpu", "--dense", bert]
    for file in files.values():
        command += ["--evaluate", file]
    result = run(*command, "--json", "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.stderr
    report = EvaluationReport.from_json(result.stdout)
    assert report["rank"] == 100
    assert "embedding similarity" in (tmp_path / "page.html").read_text()
    result = run(*command)
    assert result.exit_code == 0, result.stderr
    assert "embedding similarity" in result.stdout
    assert "all 10 pairs of sentences" in result.stdout


MISTAKES = {
    "an encoder without a dense model": ("text", None, "plain text, which says how close .* --dense DENSE_DIR"),
    "a directory that is not there": ("text", "nowhere", "nowhere is not a model directory: it has no config.json"),
    "no file": (None, None, "Missing option|required"),
    "a wrong line": ("wrong", "bert", r"wrong.jsonl, line 2: unknown field 'lable'; did you mean 'label'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_ends_with_a_message(bert, files, tmp_path, case):
    kind, dense, message = MISTAKES[case]
    files["wrong"] = tmp_path / "wrong.jsonl"
    files["wrong"].write_text('{"text": "a", "label": 1}\n{"text": "b", "lable": 1}'.replace('"label": 1', '"id": 1'))
    arguments = ["--evaluate", files[kind]] if kind else []
    arguments += ["--dense", bert if dense == "bert" else tmp_path / dense] if dense else []
    result = run("evaluate", bert, *arguments)
    assert result.exit_code == 2
    assert not result.stdout
    assert re.search(message, result.stderr, re.DOTALL), result.stderr


def test_a_model_that_is_not_there_is_found_before_the_dense_one_runs(bert, files, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.pipeline._evaluate.load_to_measure", lambda *given: pytest.fail("loaded"))
    with pytest.raises(FormatError, match=r"no config\.json"):
        evaluate_directory(tmp_path / "nowhere", [files["text"]], bert)


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_a_language_model_takes_text_only(llama, files, tmp_path, kind):
    for measure in (
        lambda: evaluate_directory(llama, [files[kind]]),
        lambda: pruned(llama, tmp_path / "out", evaluate=files[kind]),
        lambda: shrink_directory(llama, tmp_path / "out", remove={"model.layers": [0]}, evaluate=files[kind]),
    ):
        with pytest.raises(RecipeError, match="this is a causal language model, whose figure is perplexity"):
            measure()
    assert not (tmp_path / "out").exists()


def test_a_head_that_nobody_trained_is_refused(bert, files, tmp_path):
    shutil.copytree(bert, tmp_path / "bert")
    tensors = load_file(bert / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}
    save_file(kept, tmp_path / "bert" / "model.safetensors", {"format": "pt"})
    message = r"no values for classifier\.bias, classifier\.weight, the head of BertForSequenceClassification"
    for measure in (
        lambda: evaluate_directory(tmp_path / "bert", [files["labels"]]),
        lambda: pruned(tmp_path / "bert", tmp_path / "out", evaluate=files["labels"]),
        lambda: shrink_directory(
            tmp_path / "bert", tmp_path / "out", remove={"bert.encoder.layer": [0]}, evaluate=files["labels"]
        ),
    ):
        with pytest.raises(RecipeError, match=message):
            measure()
    evaluate_directory(tmp_path / "bert", [files["pairs"]])  # needs no head


def test_a_metric_that_no_file_gives_is_refused(bert, files):
    with pytest.raises(RecipeError, match=r"no file gives perplexity; they give .*spearman"):
        evaluate_directory(bert, [files["pairs"], files["text"]], bert, metrics=["perplexity"])
    with pytest.raises(RecipeError, match="there is no file to measure on"):
        evaluate_directory(bert, [], bert)


# Directories of sentence-transformers

TYPES = {"old": "sentence_transformers.models.", "new": "sentence_transformers.sentence_transformer.modules.pooling."}
OLD = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}


def with_modules(path, pooling=OLD, *more, kind="sentence_transformers.models."):
    """Write ``modules.json`` and the config of the pooling."""
    modules = [{"type": f"{kind}Transformer", "path": ""}, {"type": f"{kind}Pooling", "path": "1_Pooling"}, *more]
    modules = [{"idx": number, "name": str(number), **module} for number, module in enumerate(modules)]
    (path / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (path / "modules.json").write_text(json.dumps(modules))
    return path


NORMALIZE = {"type": "sentence_transformers.base.modules.normalize.Normalize", "path": "2_Normalize"}


def test_the_pooling_of_a_directory(tmp_path):
    assert pooling_of(tmp_path) is None
    assert pooling_of(with_modules(tmp_path)) == Pooling(("cls", "mean"), normalize=False)
    new = {"embedding_dimension": 32, "pooling_mode": ["mean", "cls"], "include_prompt": True}
    dropout = {"type": "sentence_transformers.models.Dropout", "path": "2_Dropout"}
    with_modules(tmp_path, new, dropout, NORMALIZE, kind=TYPES["new"])
    assert pooling_of(tmp_path) == Pooling(("mean", "cls"), normalize=True)
    with_modules(tmp_path, {**new, "pooling_mode": "lasttoken"})
    assert pooling_of(tmp_path) == Pooling(("lasttoken",), normalize=False)
    with_modules(tmp_path, {"word_embedding_dimension": 32})
    assert pooling_of(tmp_path).modes == ("mean",)


def test_the_length_of_a_sentence(tmp_path):
    assert sentence_length(tmp_path) is None
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 24, "do_lower_case": false}')
    assert sentence_length(tmp_path) == 24
    for wrong in ("0", "-1", "true", '"24"', "1.5"):
        (tmp_path / "sentence_bert_config.json").write_text(f'{{"max_seq_length": {wrong}}}')
        with pytest.raises(FormatError, match="max_seq_length is"):
            sentence_length(tmp_path)


DENSE = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}
UNKNOWN = {
    "a dense layer": [DENSE],
    "another library": [{"type": "os.Normalize", "path": ""}],
    "a name that begins like it": [{"type": "sentence_transformers_evil.Normalize", "path": ""}],
    "a second pooling": [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}],
    "a second transformer": [{"type": "sentence_transformers.models.Transformer", "path": ""}],
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_module_that_is_not_known_is_named_and_not_imported(tmp_path, case, monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda *given: pytest.fail("imported"))
    with_modules(tmp_path, OLD, *UNKNOWN[case])
    with pytest.raises(RecipeError, match=f"module 2 is '{UNKNOWN[case][0]['type']}'"):
        pooling_of(tmp_path)


def test_a_normalisation_of_tokens_and_a_missing_pooling_are_refused(tmp_path):
    with_modules(tmp_path, OLD, NORMALIZE)
    (tmp_path / "2_Normalize").mkdir()
    (tmp_path / "2_Normalize" / "config.json").write_text('{"module_input_name": "token_embeddings"}')
    with pytest.raises(RecipeError, match="module 2 is"):
        pooling_of(tmp_path)
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Transformer", "path": ""}]')
    with pytest.raises(RecipeError, match="has no Pooling"):
        pooling_of(tmp_path)


WRONG_MODULES = {
    "no JSON": "[",
    "no list": "{}",
    "an empty list": "[]",
    "no mapping": "[1]",
    "no path": '[{"type": "sentence_transformers.models.Transformer"}]',
    "a type that is a number": '[{"type": 1, "path": ""}]',
    "a path upwards": '[{"type": "x", "path": "../other"}]',
    "a path upwards only": '[{"type": "x", "path": ".."}]',
    "a path from the root": '[{"type": "x", "path": "/etc"}]',
    "a deep one": "[" * 100_000,
    "a large one": "[" + " " * (1 << 20) + "]",
    "a key twice": '[{"type": "a", "type": "b", "path": ""}]',
}
WRONG_POOLINGS = {
    "a list": "[]",
    "an unknown mode": '{"pooling_mode": "median"}',
    "no mode": '{"pooling_mode": []}',
    "a mode that is a list": '{"pooling_mode": [["mean"]]}',
    "a switch that is a number": '{"pooling_mode_cls_token": 1}',
}


@pytest.mark.parametrize("case", WRONG_MODULES)
def test_a_list_of_modules_is_not_trusted(tmp_path, case):
    (tmp_path / "modules.json").write_text(WRONG_MODULES[case])
    with pytest.raises(FormatError, match=r"modules\.json"):
        pooling_of(tmp_path)


@pytest.mark.parametrize("case", WRONG_POOLINGS)
def test_the_settings_of_a_pooling_are_not_trusted(tmp_path, case):
    with_modules(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").write_text(WRONG_POOLINGS[case])
    with pytest.raises(FormatError, match=r"1_Pooling.config\.json"):
        pooling_of(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").unlink()
    with pytest.raises(FormatError, match="cannot be read"):
        pooling_of(tmp_path)


def test_a_directory_is_pooled_as_it_says(bert, files, tmp_path):
    shutil.copytree(bert, tmp_path / "model")
    values = {}
    for mode in ("mean", "cls"):
        with_modules(tmp_path / "model", {"pooling_mode": mode})
        values[mode] = evaluate_directory(tmp_path / "model", [files["pairs"]], device="cpu")["spearman"]
    assert values["mean"] == evaluate_directory(bert, [files["pairs"]], device="cpu")["spearman"]
    assert values["cls"] != values["mean"]
    (tmp_path / "model" / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    assert reading_of(directory_without_weights(tmp_path / "model")).sentence_length == 16


def test_an_unknown_pooling_stops_only_what_needs_it(bert, files, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(bert, model)
    with_modules(model, OLD, DENSE)
    report = evaluate_directory(model, [files["text"]], model, device="cpu")
    assert [figure.metric for figure in report.figures] == ["similarity"]
    assert "no embedding similarity and no rank: " in report.notes[0]
    assert "Dense" in report.notes[0]
    assert directory_figures(directory_without_weights(model), files["text"], True)[0] == ("similarity",)
    assert pruned(model, tmp_path / "out", evaluate=files["text"]).evaluation.metric == "output similarity"
    with pytest.raises(RecipeError, match="Dense"):
        evaluate_directory(model, [files["pairs"]], device="cpu")


def test_a_language_model_with_a_pooling_is_an_encoder(llama, files, tmp_path):
    shutil.copytree(llama, tmp_path / "model")
    with_modules(tmp_path / "model", {"pooling_mode": "lasttoken"})
    pruned(tmp_path / "model", tmp_path / "out")
    report = evaluate_directory(tmp_path / "out", [files["text"], files["pairs"]], tmp_path / "model", device="cpu")
    assert [figure.metric for figure in report.figures] == ["similarity", "embedding_similarity", "rank", "spearman"]
    assert report["rank"] < 100


def test_an_encoder_decoder_is_refused(tmp_path, files):
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    with pytest.raises(RecipeError, match="encoder-decoder"):
        evaluate_directory(tmp_path / "t5", [files["text"]])


@pytest.mark.slow  # importing the library takes seconds
def test_a_sentence_transformer_pools_by_itself(bert, files, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    transformers.BertModel.from_pretrained(bert).save_pretrained(with_modules(tmp_path / "model", OLD, NORMALIZE))
    with_tokenizer(tmp_path / "model")
    settings = tmp_path / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "pad_token": "<|endoftext|>"}))
    model = library.SentenceTransformer(str(tmp_path / "model"), device="cpu", local_files_only=True)
    report = secateur.evaluate(model, files["pairs"])
    data = read_data(files["pairs"])
    first, second = (torch.tensor(model.encode(list(texts))) for texts in (data.texts, data.others))
    expected = 100 * secateur.evaluation.spearman((first * second).sum(1), torch.tensor(data.scores))
    assert report["spearman"] == pytest.approx(expected, abs=1e-6)
    found = evaluate_directory(tmp_path / "model", [files["pairs"]], device="cpu")
    assert found["spearman"] == pytest.approx(expected, abs=1e-6)
    assert secateur.evaluate(model, files["text"], dense=model)["rank"] == 100.0


def test_text_that_the_model_cannot_read_names_the_file(bert, files, tmp_path):
    shutil.copytree(bert, tmp_path / "model")
    config = json.loads((bert / "config.json").read_text())
    tensors = load_file(bert / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    save_file(
        {**tensors, name: tensors[name][:100].clone()}, tmp_path / "model" / "model.safetensors", {"format": "pt"}
    )
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(StatisticsError, match=r"text\.txt: Bert.* fails on a batch .* with ids up to \d+: index"):
        evaluate_directory(tmp_path / "model", [files["text"]], bert, device="cpu")
