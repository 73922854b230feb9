"""The room of other engines: files of theirs are opened, and called like PyTorch models."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from secateur import FormatError, RecipeError, StatisticsError
from secateur.engines import ENGINES, EngineModel, engine_for


class Twice:
    """A session that doubles its first input."""

    inputs: tuple[str, ...] = ("input_ids", "attention_mask", "past_key_values.0.key")
    outputs = ("last_hidden_state",)

    def __init__(self) -> None:
        self.got: dict[str, np.ndarray] = {}

    def __call__(self, feeds: Any) -> dict[str, np.ndarray]:
        self.got = dict(feeds)
        if feeds["input_ids"].dtype != np.int64:
            raise RuntimeError("wrong dtype\nand much more")
        return {"last_hidden_state": 2 * feeds["input_ids"]}


IDS = torch.tensor([[1, 2], [3, 4]])


def model(session: Twice | None = None) -> EngineModel:
    past = torch.zeros(2, 1, 0, 4)
    defaults = {"attention_mask": lambda given: torch.ones_like(given["input_ids"])}
    return EngineModel(session or Twice(), {**defaults, "past_key_values.0.key": lambda given: past})


@pytest.mark.parametrize("by_name", [True, False])
def test_a_model_is_called_like_one_of_pytorch(by_name: bool) -> None:
    found = model()(input_ids=IDS) if by_name else model()(IDS)
    assert torch.equal(found["last_hidden_state"], 2 * IDS)
    assert torch.equal(found.last_hidden_state, 2 * IDS)
    with pytest.raises(AttributeError, match="logits"):
        found.logits


def test_inputs_that_are_left_out_get_their_defaults() -> None:
    session = Twice()
    model(session)(IDS, past_key_values=None)
    assert session.got["attention_mask"].tolist() == [[1, 1], [1, 1]]
    assert session.got["past_key_values.0.key"].shape == (2, 1, 0, 4)
    assert list(session.got) == list(Twice.inputs)


@pytest.mark.parametrize(
    ("args", "inputs"),
    [
        ((), {}),
        ((), {"attention_mask": IDS}),
        ((), {"input_ids": IDS, "token_type_ids": IDS}),
        ((IDS,), {"input_ids": IDS}),
        ((IDS, IDS, IDS, IDS), {}),
    ],
    ids=["nothing", "without the one that is needed", "unknown", "twice", "too many"],
)
def test_wrong_inputs_are_refused_by_name(args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
    with pytest.raises(StatisticsError, match=r"takes input_ids, attention_mask, past_key_values.0.key; got"):
        model()(*args, **inputs)


def test_a_failure_of_the_engine_names_shapes_and_dtypes() -> None:
    with pytest.raises(StatisticsError, match=r"input_ids \[2, 2\] int32.*: wrong dtype\nGive inputs"):
        model()(IDS.int())
    with pytest.raises(TypeError, match="input_ids must be a tensor, got list"):
        model()([[1, 2]])


def test_numbers_that_numpy_has_not_are_widened() -> None:
    session = Twice()
    found = EngineModel(session, model()._defaults)
    with pytest.raises(StatisticsError, match="float32"):
        found(IDS.to(torch.bfloat16))
    assert session.got["input_ids"].dtype == np.float32


def test_its_signature_has_the_names_of_its_inputs() -> None:
    # Those that are names in Python: whoever evaluates a model asks whether it takes token_type_ids.
    assert list(inspect.signature(model().forward).parameters) == ["input_ids", "attention_mask"]


def test_a_model_has_no_weights() -> None:
    assert not list(model().parameters())
    assert model().eval().inputs == Twice.inputs


@pytest.mark.parametrize(("name", "engine"), [("a/model.onnx", "onnxruntime"), ("model.xml", "openvino")])
def test_the_suffix_says_the_engine(name: str, engine: str) -> None:
    assert engine_for(Path(name)).name == engine


def test_other_files_have_no_engine() -> None:
    with pytest.raises(RecipeError, match=r"model\.safetensors is no file of an engine; known are \.onnx"):
        engine_for(Path("model.safetensors"))


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_that_is_missing_says_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.engines._engine.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=rf'not installed; install it with: pip install "secateur\[{ENGINES[name].extra}'
    ):
        ENGINES[name].check()


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x0a" * 50], ids=["empty", "text", "bytes"])
def test_a_file_that_is_no_model_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    engine = ENGINES[name]
    pytest.importorskip(engine.name)
    file = tmp_path / f"model{engine.suffix}"
    file.write_bytes(content)
    with pytest.raises(FormatError, match=f"model{engine.suffix} is not a model that {engine.title} takes"):
        engine.load(file, "float32", 1)
    assert engine.version


def test_a_module_may_hold_one() -> None:
    holder = nn.Sequential(model())
    assert torch.equal(holder(IDS).last_hidden_state, 2 * IDS)
