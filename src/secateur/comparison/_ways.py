"""The ways to run a model. A line in the table is all that a further one needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from secateur.comparison._subject import Deployed, NothingGainedError, Subject
from secateur.engines import ENGINES

Make = Callable[[Subject, Path], Deployed]

REFERENCE = "torch"  # the way of the dense model that all others are compared with


@dataclass(frozen=True)
class Way:
    """One way to run a model.

    Args:
        name: on the command line.
        title: in tables.
        make: makes what is deployed, in a new folder.
        wrap: of the module that was opened; it may change the module.
        engine: that runs it, by its name; empty for PyTorch.
        precision: that the engine computes in; None for the usual one.
        stores_wrapped: whether what ``wrap`` returned is what is deployed, and not what was opened.
    """

    name: str
    title: str
    make: Make
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    engine: str = ""
    precision: str | None = None
    stores_wrapped: bool = False

    @property
    def absence(self) -> str:
        """Why it cannot be used here, whatever the model; empty if it can."""
        return ENGINES[self.engine].absence if self.engine else ""


def _in_torch(subject: Subject, folder: Path) -> Deployed:
    return subject.in_torch(folder)


def _exported(to: str, *, int8: bool = False, packed: bool = False) -> Make:
    return lambda subject, folder: subject.exported(folder, to, int8, packed)


def _packed(precision: str | None) -> Make:
    return lambda subject, folder: subject.packed(folder, precision)


def _compiled(module: nn.Module) -> nn.Module:
    module.compile()  # in place: the module keeps its attributes, which evaluation reads
    return module


def _quantized(module: nn.Module) -> nn.Module:
    if not any(isinstance(part, nn.Linear) for part in module.modules()):
        raise NothingGainedError("PyTorch rounds Linear layers, and the model has none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that PyTorch will remove it some day
        found: nn.Module = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    return found


WAYS: Mapping[str, Way] = {
    way.name: way
    for way in (
        Way(REFERENCE, "PyTorch", _in_torch),
        Way("torch-compile", "torch.compile", _in_torch, wrap=_compiled),
        Way("torch-int8", "PyTorch int8", _in_torch, wrap=_quantized, stores_wrapped=True),
        Way("onnx", "ONNX Runtime", _exported("onnx"), engine="onnxruntime"),
        Way("onnx-int8", "ONNX Runtime int8", _exported("onnx", int8=True), engine="onnxruntime"),
        Way("onnx-packed", "ONNX Runtime packed", _exported("onnx", packed=True), engine="onnxruntime"),
        Way(
            "onnx-packed-int8",
            "ONNX Runtime packed int8",
            _exported("onnx", int8=True, packed=True),
            engine="onnxruntime",
        ),
        Way("openvino", "OpenVINO", _exported("openvino"), engine="openvino", precision="float32"),
        Way("openvino-bfloat16", "OpenVINO bfloat16", _exported("openvino"), engine="openvino", precision="bfloat16"),
        Way("openvino-int8", "OpenVINO int8", _exported("openvino", int8=True), engine="openvino"),
        Way("openvino-packed", "OpenVINO packed", _exported("openvino", packed=True), engine="openvino"),
        Way("packed", "secateur packed", _packed(None)),
        Way("packed-int8", "secateur packed int8", _packed("int8")),
    )
}
