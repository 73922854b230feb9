"""Tiny models of several families in ONNX files, for tests of what is done to such files."""

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 600,
    "max_position_embeddings": 40,
}


def _config(name: str) -> tuple[str, Any]:
    """The class of a tiny model, and its settings."""
    import transformers

    match name:
        case "bert":
            return "AutoModel", transformers.BertConfig(**SMALL)
        case "roberta":
            return "AutoModel", transformers.RobertaConfig(**SMALL)
        case "mpnet":
            return "AutoModel", transformers.MPNetConfig(**SMALL)
        case "distilbert":
            sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 600}
            return "AutoModel", transformers.DistilBertConfig(**sizes, max_position_embeddings=40)
        case "classifier":
            return "AutoModelForSequenceClassification", transformers.BertConfig(**SMALL, num_labels=3)
        case "vit":
            return "AutoModel", transformers.ViTConfig(**SMALL, image_size=16, patch_size=4)
        case "gpt2":
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 600, "n_positions": 40}
            return "AutoModelForCausalLM", transformers.GPT2Config(**sizes)
        case _:
            return "AutoModelForCausalLM", transformers.LlamaConfig(**SMALL, num_key_value_heads=2)


FAMILIES = ("bert", "roberta", "mpnet", "distilbert", "classifier", "vit", "gpt2", "llama")


class _Text(nn.Module):
    """A model of texts whose only output is its first."""

    def __init__(self, model: nn.Module, given: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.given = model, given

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        """Return the first output."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=False, **self.given)[0]


class _Image(nn.Module):
    """A model of images whose only output is its first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> Any:
        """Return the first output."""
        return self.model(pixel_values, return_dict=False)[0]


def inputs_of(name: str, rows: int, positions: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return inputs of a family; the last positions of the first row are padding."""
    random = np.random.default_rng(rows + positions)
    if name == "vit":
        return {"pixel_values": random.standard_normal((rows, 3, 16, 16)).astype(np.float32)}
    mask = np.ones((rows, positions), np.int64)
    mask[0, positions - 2 :] = 0
    return {"input_ids": random.integers(2, 600, (rows, positions)), "attention_mask": mask}


def exported(name: str, path: Path, opset: int = 20) -> Path:
    """Write a tiny random model of a family to a file that takes batches of any size, and return the path."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    kind, config = _config(name)
    model = getattr(transformers, kind).from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.2)  # weights of a normalisation, and biases, that would be missed
    inputs = {name: torch.from_numpy(value) for name, value in inputs_of(name, 2, 6).items()}
    batch, sequence = torch.export.Dim("batch", max=64), torch.export.Dim("sequence", max=40)
    shapes = {key: {0: batch} if value.ndim == 4 else {0: batch, 1: sequence} for key, value in inputs.items()}
    given = {"use_cache": False} if kind == "AutoModelForCausalLM" else {}
    return export(_Image(model) if name == "vit" else _Text(model, given), inputs, path, shapes, opset)


def export(model: nn.Module, inputs: dict[str, Any], path: Path, shapes: Any = None, opset: int = 20) -> Path:
    """Write a module to a file, and return the path."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            model,
            (),
            kwargs=inputs,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            verbose=False,
            input_names=list(inputs),
            output_names=["output"],
        )
    assert program is not None
    program.save(path)
    return path


def run(path: Path, inputs: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Return the first output of a file in ONNX Runtime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = {entry.name for entry in session.get_inputs()}
    found: np.ndarray[Any, Any] = session.run(None, {k: v for k, v in inputs.items() if k in names})[0]
    return found
