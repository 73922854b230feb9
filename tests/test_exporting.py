"""A module becomes a file of another engine, and is the same function there."""

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import exact_products, needs_engine, registry_is_read_once  # noqa: F401 - a fixture
from torch import Tensor, nn

import secateur
from secateur import FormatError, KernelError, Pooling, RecipeError, StatisticsError
from secateur.engines import ENGINES
from secateur.evaluation import POOLING_MODES
from secateur.exporting import is_exported, open_exported
from secateur.exporting._calibration import named
from secateur.exporting._inputs import inputs_of
from secateur.reports import ExportCheck, ExportedInput, ExportReport, ExportTiming

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(5, 90, (rows, length))


def text(rows: int, length: int) -> dict[str, Tensor]:
    """Texts with padding, but for the first."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1:, length - length // 3 :] = 0
    return {"input_ids": tokens(rows, length), "attention_mask": mask}


SMALL = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}


def bert(name: str, **settings: Any) -> nn.Module:
    return getattr(transformers, name)(transformers.BertConfig(**SMALL, **settings))


def llama(**settings: Any) -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, **settings)
    return transformers.LlamaForCausalLM(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


class TwoInputs(nn.Module):
    """Takes tensors by name and a number, and returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> tuple[Tensor, tuple[Tensor, ...]]:
        both = self.left(a) * scale + self.right(b)
        return both, (both.relu(),)


class Signal(nn.Module):
    """Its input has a second size that may be any."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(2, 3, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"signal": self.layer(x).tanh()}


def packed() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    secateur.prune_(model, sparsity=0.8, method="magnitude")
    return nn.Sequential(secateur.PackedLinear.from_linear(model[0]), nn.ReLU(), model[2])


@dataclass(frozen=True)
class Case:
    """A model, an example, another input, and the names of what goes in and out."""

    make: Callable[[], nn.Module]
    batch: Callable[[], Any]
    other: Callable[[], Any]
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]
    arguments: Mapping[str, Any] | None = None


B, S = "batch", "sequence"
CASES = {
    "perceptron": Case(
        lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU()),
        lambda: torch.randn(1, 8),
        lambda: torch.randn(5, 8),
        {"input": (B, 8)},
        ("output",),
    ),
    "half precision": Case(
        lambda: nn.Linear(8, 4).to(torch.bfloat16),
        lambda: torch.randn(2, 8, dtype=torch.bfloat16),
        lambda: torch.randn(5, 8),
        {"input": (B, 8)},
        ("output",),
    ),
    "packed": Case(packed, lambda: torch.randn(2, 16), lambda: torch.randn(3, 16), {"input": (B, 16)}, ("output",)),
    "two inputs": Case(
        TwoInputs,
        lambda: {"a": torch.randn(2, 4), "b": torch.randn(2, 5), "scale": 2.0},
        lambda: {"a": torch.randn(3, 4), "b": torch.randn(3, 5)},
        {"a": (B, 4), "b": (B, 5)},
        ("output.0", "output.1.0"),
    ),
    "any width": Case(
        Signal,
        lambda: torch.randn(1, 2, 8),
        lambda: torch.randn(1, 2, 21),
        {"x": (1, 2, "width")},
        ("signal",),
        {"dynamic": {"x": {2: "width"}}},
    ),
    "images": Case(
        resnet,
        lambda: {"pixel_values": torch.randn(1, 3, 16, 16)},
        lambda: {"pixel_values": torch.randn(4, 3, 16, 16)},
        {"pixel_values": (B, 3, 16, 16)},
        ("logits",),
    ),
    "encoder": Case(
        lambda: bert("BertModel"),
        lambda: {**text(1, 6), "token_type_ids": torch.zeros(1, 6, dtype=torch.long)},
        lambda: {**text(3, 11), "token_type_ids": torch.zeros(3, 11, dtype=torch.long)},
        {"input_ids": (B, S), "attention_mask": (B, S), "token_type_ids": (B, S)},
        ("last_hidden_state", "pooler_output"),
    ),
    "classifier": Case(
        lambda: bert("BertForSequenceClassification", num_labels=3),
        lambda: text(2, 6),
        lambda: text(4, 9),
        {"input_ids": (B, S), "attention_mask": (B, S)},
        ("logits",),
    ),
    "language model without a cache": Case(
        lambda: llama(use_cache=False),
        lambda: text(2, 6),
        lambda: text(1, 9),
        {"input_ids": (B, S), "attention_mask": (B, S)},
        ("logits",),
    ),
}


def exported(model: nn.Module, batch: Any, output: Path, **arguments: Any) -> ExportReport:
    return secateur.export(model, batch, output, shapes=(), **arguments)


def flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    return [tensor for value in values for tensor in flat(value)]


@pytest.mark.parametrize("name", CASES)
def test_an_exported_model_is_the_same_function(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.make().eval()
    before = copy.deepcopy(model.state_dict())
    report = exported(model, case.batch(), tmp_path / "out", **(case.arguments or {}))
    assert capfd.readouterr() == ("", "")  # the exporter prints and logs much
    assert {entry.name: entry.shape for entry in report.inputs} == case.inputs
    assert report.outputs == case.outputs
    assert report.error < 1e-4
    assert len(report.checks) > 1
    other = case.other()
    engine = open_exported(tmp_path / "out")
    found = engine(**other) if isinstance(other, dict) else engine(other)
    scale = {"scale": 2.0} if name == "two inputs" else {}
    with torch.no_grad():
        model.float()
        right = model(**other, **scale) if isinstance(other, dict) else model(other)
    for a, b in zip(found.values(), flat(right), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor.float(), model.state_dict()[key]) for key, tensor in before.items())
    assert ExportReport.from_json((tmp_path / "out" / "secateur.export.json").read_text()) == report


def test_embeddings_of_sentences_are_an_output(tmp_path: Path) -> None:
    class States(nn.Module):
        """The states of tokens, without the rest of an encoder."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(100, 8)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            return {"last_hidden_state": self.table(input_ids)}

    model, pooling = States().eval(), Pooling(POOLING_MODES)
    report = exported(model, text(2, 6), tmp_path / "out", pooling=pooling)
    assert report.outputs == ("last_hidden_state", "sentence_embedding")
    batch = text(3, 12)
    found = open_exported(tmp_path / "out")(**batch)
    right = pooling(model(**batch)["last_hidden_state"], batch["attention_mask"])
    torch.testing.assert_close(found.sentence_embedding, right, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, ExportReport]:
    torch.manual_seed(0)
    model, path = llama().eval(), tmp_path_factory.mktemp("cached") / "out"
    return model, path, exported(model, text(1, 6), path)


def test_a_language_model_has_its_cache(cached: tuple[Any, Path, ExportReport]) -> None:
    report = cached[2]
    names = ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key", "past_key_values.0.value"]
    assert [entry.name for entry in report.inputs] == names
    assert report.inputs[3].shape == ("batch", 1, "past", 8)
    assert report.outputs == ("logits", "present.0.key", "present.0.value")
    assert not report.notes


def test_a_language_model_writes_the_same_with_its_cache(cached: tuple[Any, Path, ExportReport]) -> None:
    model, path, _ = cached
    engine, ids = open_exported(path), tokens(2, 5)
    right = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    given, past = ids, dict[str, Tensor]()
    for _ in range(6):
        found = engine(input_ids=given, **past)
        past = {name.replace("present", "past_key_values"): found[name] for name in engine.outputs[1:]}
        given = found.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, given], dim=1)
    assert torch.equal(ids, right)


def test_weights_that_do_not_fit_into_one_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.exporting._onnx.LARGEST", 1000)
    model = nn.Linear(32, 64)
    report = exported(model, torch.randn(2, 32), tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out" / "onnx").iterdir()) == ["model.onnx", "model.onnx_data"]
    assert report.nbytes > 4 * 32 * 64
    x = torch.randn(3, 32)
    torch.testing.assert_close(open_exported(tmp_path / "out")(x).output, model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, ExportReport]:
    torch.manual_seed(0)
    model, path = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), tmp_path_factory.mktemp("r") / "out"
    report = secateur.export(model, torch.randn(2, 64), path, int8=True, shapes=((1, 1), (4, 1)))
    return model, path, report


@exact_products
def test_8_bits_are_smaller_and_their_error_is_told(rounded: tuple[nn.Module, Path, ExportReport]) -> None:
    model, path, report = rounded
    assert report.nbytes < report.bytes_before
    assert report.float32_error < 1e-4 < report.error < 0.1
    assert min(check.cosine for check in report.checks) > 0.99
    x = torch.randn(50, 64)
    found, right = open_exported(path)(x).output, model(x).detach()
    assert 1e-4 < (found - right).abs().max() / right.abs().max() < 0.1


def test_speed_is_measured_beside_pytorch(rounded: tuple[nn.Module, Path, ExportReport]) -> None:
    _, _, report = rounded
    assert [timing.shape for timing in report.timings] == ["1x64", "4x64"]
    assert all(timing.engine > 0 and timing.pytorch > 0 for timing in report.timings)
    assert report.machine["threads"] == "1"


@exact_products
@pytest.mark.parametrize(
    ("arguments", "numbers"),
    [
        ({}, "float32"),
        ({"int8": True}, "int8"),
        ({"int8": True, "calibration": [torch.randn(2048, 64, generator=torch.Generator().manual_seed(1))]}, "int8"),
        ({"bfloat16": True}, "bfloat16"),
    ],
    ids=["float32", "int8", "int8 with ranges", "bfloat16"],
)
def test_openvino_runs_what_was_exported(arguments: dict[str, Any], numbers: str, tmp_path: Path) -> None:
    needs_engine("openvino")
    if ENGINES["openvino"].lacks("bfloat16" if "bfloat16" in arguments else "float32"):
        pytest.skip("this processor has no bfloat16")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    report = exported(model, torch.randn(2, 64), tmp_path / "out", to="openvino", **arguments)
    assert report.numbers == numbers
    assert report.file == "openvino/openvino_model.xml"
    assert report.nbytes == sum(file.stat().st_size for file in (tmp_path / "out" / "openvino").iterdir())
    x = torch.randn(20, 64)
    found, right = open_exported(tmp_path / "out")(x).output, model(x).detach()
    error = float((found - right).abs().max() / right.abs().max())
    assert error < (1e-4 if numbers == "float32" else 0.1)
    assert report.float32_error < 1e-4


def test_a_processor_without_bfloat16_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_engine("openvino")
    lacking = replace(ENGINES["openvino"], lacks=lambda precision: "it is too old")
    monkeypatch.setattr("secateur.exporting._settings.ENGINES", {**ENGINES, "openvino": lacking})
    with pytest.raises(KernelError, match="nothing can be checked in bfloat16: it is too old"):
        exported(nn.Linear(4, 2), torch.randn(1, 4), tmp_path / "out", to="openvino", bfloat16=True)


# What cannot be exported


class ByValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class NotFinite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / torch.zeros_like(x)


class FixedRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(2, 8)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ByValue(), r"ByValue cannot be exported: PyTorch's exporter says: \w+: .*\nA model that decides by"),
        (Random(), r"the output output of an input 2x8 differs by .* of its scale .* at most 1e-04 is allowed"),
        (NotFinite(), r"has numbers that are not finite"),
        (FixedRows(), r"FixedRows cannot be exported: .*\n.*inputs of one size only"),
    ],
    ids=["by value", "random", "not finite", "fixed size"],
)
def test_what_is_another_function_is_not_written(model: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        exported(model, torch.randn(2, 8), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"to": "tensorrt"}, RecipeError, "format"),
        ({"to": "dense"}, RecipeError, "a module has no directory"),
        ({"bfloat16": True}, RecipeError, "ONNX Runtime computes nothing in bfloat16"),
        ({"int8": 1}, TypeError, "int8 must be a bool"),
        ({"tolerance": 0.0}, RecipeError, "tolerance must be above 0"),
        ({"shapes": ((0, 16),)}, RecipeError, "number of texts must be at least 1"),
        ({"dynamic": {"y": {}}}, RecipeError, "'y'"),
        ({"dynamic": {"input": {2: "width"}}}, RecipeError, r"dynamic says 2: 'width' of the input input, whose shape"),
        ({"dynamic": [0]}, TypeError, "dynamic must map"),
        ({"pooling": "mean"}, TypeError, "pooling must be a Pooling"),
        ({"pooling": Pooling()}, RecipeError, "Linear returns output, and a pooling needs last_hidden_state"),
        ({"batch": [1, 2]}, TypeError, "batch must be one example input"),
        ({"batch": {}}, RecipeError, "batch has no tensor"),
        (
            {"batch": {"input": [torch.ones(1)]}},
            RecipeError,
            "input input is a list, and an exported model takes tensors",
        ),
        ({"model": {}}, TypeError, "model must be an nn.Module"),
    ],
)
def test_a_mistake_is_named_before_any_work(
    arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"model": nn.Linear(8, 4), "batch": torch.randn(2, 8), "output": tmp_path / "out"}
    with pytest.raises(error, match=message):
        secateur.export(**{**given, **arguments})
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_kept_unless_it_may_be_replaced(tmp_path: Path) -> None:
    model, out = nn.Linear(4, 2), tmp_path / "out"
    exported(model, torch.randn(1, 4), out)
    assert is_exported(out)
    with pytest.raises(FormatError, match="already exists"):
        exported(model, torch.randn(1, 4), out)
    exported(nn.Linear(4, 3), torch.randn(1, 4), out, overwrite=True)
    assert open_exported(out)(torch.ones(1, 4)).output.shape == (1, 3)


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.exporting._onnx.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'onnx and onnxscript and onnxruntime; .*pip install "secateur\[onnx\]"'):
        exported(nn.Linear(4, 2), torch.randn(1, 4), tmp_path / "out")


# A directory that nobody vouches for


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "out"
    exported(nn.Linear(4, 2), torch.randn(1, 4), path)
    return path


def changed(table: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**table, **changes})


ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "no JSON": (lambda table: "{", "not readable JSON"),
    "a list": (lambda table: "[]", "should hold a JSON object"),
    "nothing": (lambda table: "{}", "not a report of an export: 'schema'"),
    "newer": (lambda table: changed(table, schema=99), "its schema is 99"),
    "unknown key": (lambda table: changed(table, more=1), "not a report of an export: .*more"),
    "wrong type": (lambda table: changed(table, int8="yes"), "int8 must be bool"),
    "no inputs": (lambda table: changed(table, inputs=None), "not a report"),
    "inputs of another type": (
        lambda table: changed(table, inputs=[{"name": 1, "dtype": "", "shape": []}]),
        "name must be",
    ),
    "absolute": (lambda table: changed(table, file="/etc/model.onnx"), "a file in the directory was expected"),
    "outside": (lambda table: changed(table, file="../model.onnx"), "a file in the directory was expected"),
    "not there": (lambda table: changed(table, file="onnx/other.onnx"), "lacks onnx/other.onnx, which"),
    "no engine": (lambda table: changed(table, file="secateur.export.json"), "is no file of an engine"),
    "precision": (lambda table: changed(table, precision="float8"), "precision"),
    "other inputs": (
        lambda table: changed(table, inputs=[{"name": "x", "dtype": "int64", "shape": [1]}]),
        "its report says x and output",
    ),
    "dtype": (
        lambda table: changed(table, inputs=[{"name": "input", "dtype": "load", "shape": [1], "default": "ones"}]),
        "has the dtype 'load', which PyTorch has not",
    ),
    "default": (
        lambda table: changed(table, inputs=[{"name": "input", "dtype": "int64", "shape": [1], "default": "eval"}]),
        "has the default 'eval'; known are ones",
    ),
    "a cache that is not empty": (
        lambda table: changed(
            table, inputs=[{"name": "input", "dtype": "int64", "shape": [1 << 40], "default": "empty"}]
        ),
        "cannot be empty",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_report_is_not_trusted(name: str, small: Path, tmp_path: Path) -> None:
    attack, message = ATTACKS[name]
    path = tmp_path / "copy"
    (path / "onnx").mkdir(parents=True)
    (path / "onnx" / "model.onnx").write_bytes((small / "onnx" / "model.onnx").read_bytes())
    table = json.loads((small / "secateur.export.json").read_text())
    (path / "secateur.export.json").write_text(attack(table))
    with pytest.raises((FormatError, RecipeError), match=message):
        open_exported(path)


def test_a_directory_without_an_exported_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"has no model for another engine: it has no secateur\.export\.json"):
        open_exported(tmp_path)


def test_the_precision_is_one_of_the_engine(small: Path) -> None:
    with pytest.raises(RecipeError, match=r"ONNX Runtime: .*precision"):
        open_exported(small, precision="bfloat16")
    assert open_exported(small, precision="float32", threads=1)(torch.ones(1, 4)).output.shape == (1, 2)


# The report

REPORT = ExportReport(
    model="BertModel",
    to="onnx",
    file="onnx/model.onnx",
    precision="float32",
    int8=True,
    inputs=(ExportedInput("input_ids", "int64", ("batch", "sequence")),),
    outputs=("last_hidden_state",),
    bytes_before=1000,
    nbytes=300,
    checks=(ExportCheck("1x16", 0.01, 0.999), ExportCheck("3x7", 0.02, 0.998)),
    float32_error=1e-6,
    timings=(ExportTiming("1x16", 1.0, 2.5, 2.5, 2.4, 2.6),),
    fused={"attention": 6},
    left={"head": "has no constant weight"},
    notes=("a note",),
    machine={"processor": "a fast one", "threads": "2"},
)


def test_a_report_says_size_error_and_speed() -> None:
    text = str(REPORT)
    assert "BertModel for ONNX Runtime in int8: onnx/model.onnx, 300 bytes, from 1,000 bytes of weights" in text
    assert "largest error 2.0e-02 of the outputs' scale (1.0e-06 before rounding), lowest cosine 0.998000" in text
    assert "rewritten in the graph: 6 attention" in text
    assert "| 1x16 | 1.000 | 2.500 | 2.50 | 2.40 to 2.60 |" in REPORT.to_markdown()
    assert "a fast one" in REPORT.to_markdown()
    page = REPORT.to_html()
    assert all(word in page for word in ("2.50 x", "has no constant weight", "A note", "300"))


@pytest.mark.parametrize(
    ("report", "numbers", "text"),
    [
        (REPORT, "int8", "beside PyTorch in float32"),
        (replace(REPORT, precision="bfloat16"), "int8 and bfloat16", "beside PyTorch in float32"),
        (replace(REPORT, int8=False, precision="bfloat16"), "bfloat16", "beside PyTorch in float32"),
        (replace(REPORT, int8=False), "float32", "equal to PyTorch in float32 on made-up inputs of 2 shapes"),
    ],
)
def test_a_report_says_in_which_numbers(report: ExportReport, numbers: str, text: str) -> None:
    assert report.numbers == numbers
    assert text in str(report)
    assert ExportReport.from_json(report.to_json()) == report


def test_warnings_of_the_exporter_stay_inside(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        exported(nn.Linear(4, 2), torch.randn(1, 4), tmp_path / "out")
    assert not [str(warning.message) for warning in found if "secateur" not in warning.filename]


# Ranges of 8 bits


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"input_ids": tokens(2, 3), "labels": torch.ones(2)}, (2, 3)),
        ((tokens(2, 5),), (2, 5)),
        (tokens(1, 4), (1, 4)),
    ],
    ids=["by name", "by position", "a tensor"],
)
def test_batches_for_ranges_have_all_inputs(batch: Any, found: tuple[int, int]) -> None:
    inputs = inputs_of(nn.Identity(), {**text(2, 6), "token_type_ids": torch.zeros(2, 6, dtype=torch.long)}, None, None)
    (whole,) = named(inputs, [batch])
    assert list(whole) == ["input_ids", "attention_mask", "token_type_ids"]
    assert {tuple(tensor.shape) for tensor in whole.values()} == {found}
    assert whole["attention_mask"].all()
    assert not whole["token_type_ids"].any()
    with pytest.raises(StatisticsError, match="calibration batch 0 lacks input_ids"):
        list(named(inputs, [{"attention_mask": torch.ones(1, 2)}]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"int8": True}, "ONNX Runtime finds ranges in each call"), ({"to": "openvino"}, "int8 is off")],
)
def test_ranges_go_with_8_bits_of_openvino(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"calibration sets the ranges of 8 bits in OpenVINO, and {message}"):
        exported(nn.Linear(4, 2), torch.randn(1, 4), tmp_path / "out", calibration=[torch.randn(1, 4)], **arguments)
