"""``secateur compare``: the ways to run the model in a directory."""

import json

import numpy as np
import pytest
import torch
from evaluate_cases import LAYERS, LINES, SIZES, make_classifier
from fake_timing import routes_take
from tiny import with_tokenizer
from typer.testing import CliRunner

import secateur
from secateur import ComparisonReport, RecipeError, StatisticsError
from secateur.cli import app
from secateur.comparison import SHAPES, compare_directory
from secateur.engines import EngineModel
from secateur.packing import pack_directory
from secateur.pipeline import DirectoryEvaluation, evaluate_directory
from secateur.pruning import Recipe, prune_directory

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return make_classifier(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def pruned(bert, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "pruned"
    prune_directory(bert, path, Recipe(sparsity=0.9, method="magnitude"), device="cpu")
    return path


@pytest.fixture
def files(tmp_path):
    """A file of each kind, by the kind."""
    (tmp_path / "text.txt").write_text("\n".join(LINES * 3))
    pairs = [f'"{one}","{other}",{(3 * i + j) % 5}' for i, one in enumerate(LINES) for j, other in enumerate(LINES[:i])]
    (tmp_path / "pairs.csv").write_text("\n".join(["sentence1,sentence2,score", *pairs]))
    labels = [json.dumps({"text": line, "label": i % 2}) for i, line in enumerate(LINES)]
    (tmp_path / "labels.jsonl").write_text("\n".join(labels))
    return {"text": tmp_path / "text.txt", "pairs": tmp_path / "pairs.csv", "labels": tmp_path / "labels.jsonl"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing is timed: the n-th way takes one n-th of a second; packed layers win."""
    routes_take(
        monkeypatch, lambda name, index: {"dense": 1.0, "prepacked": 2.0}.get(name, 1 / (1 + index)), call=False
    )


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.mark.parametrize(("kind", "metric"), [("text", "rank"), ("pairs", "spearman"), ("labels", "accuracy")])
def test_every_way_has_the_figure_of_the_same_evaluation(bert, pruned, files, kind, metric):
    report = compare_directory(
        pruned, files[kind], dense=bert, shapes=[(1, 16)], ways=["torch-int8", "packed"], memory=False
    )
    assert (report.metric, report.model, report.dense) == (metric, "pruned", "bert")
    assert [found.absence for found in report.ways if found.way != "packed"] == [""] * 4
    expected = evaluate_directory(pruned, [files[kind]], bert, metrics=[metric], device="cpu")
    assert report["torch"].quality == pytest.approx(expected[metric], abs=1e-3)
    assert report["packed"].quality == pytest.approx(expected[metric], abs=0.5)
    assert report.ways[0].quality == pytest.approx(expected.figures[0].dense, abs=1e-3)
    assert report.ways[2].absence == "no layer has zeros, so that nothing was packed"
    names = {found.metric for found in report["torch"].figures}
    assert names == {"rank", "embedding_similarity"} if kind == "text" else {metric}


def test_the_bytes_are_those_of_the_files(bert, pruned, files, tmp_path):
    report = compare_directory(pruned, files["text"], dense=bert, ways=["torch-int8", "packed"], memory=False)
    assert report["torch"].nbytes == (pruned / "model.safetensors").stat().st_size
    pack_directory(pruned, tmp_path / "packed")
    assert report["packed"].nbytes == pytest.approx(
        (tmp_path / "packed" / "model.sparse.safetensors").stat().st_size, rel=0.05
    )
    assert report["torch-int8"].nbytes < report["torch"].nbytes


def test_a_packed_directory_is_run_as_it_is_and_dense(bert, pruned, files, tmp_path):
    packed = tmp_path / "packed"
    pack_directory(pruned, packed)
    ways = ["torch-int8", "packed", "packed-int8"]
    report = compare_directory(packed, files["text"], dense=bert, shapes=[(1, 16)], ways=ways, memory=False)
    assert [found.absence for found in report.ways if not found.is_dense] == [""] * 4
    assert report["packed"].notes[0] == "as it is stored"
    assert report["packed"].nbytes == (packed / "model.sparse.safetensors").stat().st_size
    assert report["torch"].nbytes > 1.1 * report["packed"].nbytes
    assert report["torch"].quality == pytest.approx(report["packed"].quality, abs=0.5)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["packed"]  # nothing is left


def test_a_language_model_is_measured_by_perplexity(files, tmp_path):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **LAYERS)).save_pretrained(tmp_path / "llama")
    llama = with_tokenizer(tmp_path / "llama")
    report = compare_directory(llama, files["text"], ways=["torch-int8"], shapes=[(2, 8)], memory=False)
    assert (report.metric, report.higher_is_better, report.dense) == ("perplexity", False, "")
    expected = evaluate_directory(llama, [files["text"]], device="cpu")["perplexity"]
    assert report["torch"].quality == pytest.approx(expected, rel=1e-4)
    assert report["torch"].model == "llama"


def test_default_shapes_are_those_that_the_model_takes(bert, files):
    report = compare_directory(bert, files["text"], ways=["torch"], memory=False)
    assert report.shapes == tuple(shape for shape in SHAPES if shape[1] <= 64)
    assert report.notes == ("1 x 128 was left out: the model takes 64 tokens",)


@pytest.mark.parametrize("precision", ["onnx", "onnx-int8"])
def test_another_engine_gives_the_same_figure(bert, pruned, files, precision):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    report = compare_directory(pruned, files["labels"], shapes=[(1, 16), (3, 8)], ways=[precision], memory=False)
    found = report[precision]
    assert found.absence == ""
    assert [one.shape for one in found.timings] == [(1, 16), (3, 8)]
    assert found.quality == pytest.approx(report["torch"].quality, abs=0 if precision == "onnx" else 0.41)
    assert found.nbytes < 1.3 * report["torch"].nbytes
    assert "onnxruntime" in report.versions


@pytest.mark.parametrize(("outputs", "fits"), [(("last_hidden_state", "logits"), True), (("logits",), False)])
def test_an_exported_head_is_not_taken_for_an_embedding(bert, files, outputs, fits):
    class Session:
        inputs = ("input_ids", "attention_mask")

        def __call__(self, feeds):
            states = np.random.default_rng(0).standard_normal((*feeds["input_ids"].shape, 8)).astype(np.float32)
            return {name: states if name == "last_hidden_state" else states[:, 0, :2] for name in outputs}

    session = Session()
    session.outputs = outputs
    evaluation = DirectoryEvaluation(bert, [files["text"]], has_dense=True, metrics=["rank"], device="cpu")
    if fits:
        assert evaluation.measure_model(EngineModel(session))[0][0].metric == "rank"
        return
    with pytest.raises(StatisticsError, match="gives logits, and rank needs the states of tokens"):
        evaluation.measure_model(EngineModel(session))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shapes": [(1, 65)]}, RecipeError, "a shape of 1 x 65 is longer than the 64 tokens"),
        ({"shapes": [(1, 2, 3)]}, RecipeError, "a shape is two numbers"),
        ({"shapes": []}, RecipeError, "shapes is empty"),
        ({"ways": ["x"]}, RecipeError, "unknown way 'x'"),
        ({"metric": "accuracy"}, RecipeError, "unknown metric 'accuracy'"),
        ({"batches": [1]}, RecipeError, "batches are for modules"),
        ({"metric": len}, TypeError, "metric must be a name for a directory"),
        ({"dense": torch.nn.Linear(1, 1)}, TypeError, "dense must be a directory, as the model is, got Linear"),
    ],
)
def test_mistakes_in_the_call(bert, files, arguments, error, message):
    with pytest.raises(error, match=message):
        secateur.compare(bert, files["text"], **arguments)


def test_mistakes_in_the_files(bert, files, tmp_path):
    with pytest.raises(TypeError, match="data must be the path of a file for a directory, got list"):
        secateur.compare(bert, [torch.ones(1, 4)])
    with pytest.raises(StatisticsError, match=r"none\.txt"):
        secateur.compare(bert, tmp_path / "none.txt")
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "secateur.export.json").write_text("{}")
    with pytest.raises(RecipeError, match="has a model for another engine"):
        secateur.compare(exported, files["text"], dense=bert)


def test_the_command_shows_tables_and_writes_a_page(bert, pruned, files, tmp_path):
    page = tmp_path / "page.html"
    arguments = (
        pruned,
        "--dense",
        bert,
        "--evaluate",
        files["text"],
        "--no-memory",
        "--way",
        "packed",
        "--shape",
        "2x8",
    )
    result = run(*arguments, "--html", page)
    assert result.exit_code == 0, result.output
    for text in (
        "Ways to run the model",
        "2 x 8",
        "secateur packed",
        "Not run",
        "no layer has zeros",
        "fastest at 2 x 8",
    ):
        assert text in result.stdout
    assert page.read_text().count("<svg") == 2
    result = run(*arguments, "--json")
    report = ComparisonReport.from_json(result.stdout)
    assert [found.way for found in report.ways] == ["torch", "packed"] * 2
    assert report.shapes == ((2, 8),)


@pytest.mark.parametrize("text", ["8", "8x", "x64", "8x64x2", "-1x4", "a x b"])
def test_a_shape_that_is_none_is_a_mistake(bert, files, text):
    result = run(bert, "--evaluate", files["text"], f"--shape={text}")
    assert result.exit_code == 2
    assert "--shape is texts x tokens, such as 8x64" in result.output
