"""Run a model in OpenVINO, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur._errors import FormatError, KernelError
from secateur.engines._library import DOMAIN, does_not_fit, library

_HINTS = {"float32": "f32", "bfloat16": "bf16"}


def load(path: Path, precision: str, threads: int | None) -> OpenVinoSession:
    """Open a file.

    Args:
        path: of an ``.xml`` file, with its ``.bin`` beside it; or of an ``.onnx`` file.
        precision: of the computation: ``"float32"`` or ``"bfloat16"``. Without a word OpenVINO takes bfloat16 where
            the processor has it.
        threads: to compute with; None for PyTorch's number.

    Raises:
        FormatError: OpenVINO does not take the file.
    """
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads() if threads is None else threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    missing = _add_kernels(core)
    try:
        return OpenVinoSession(core.compile_model(core.read_model(path), "CPU", settings))
    except Exception as error:  # RuntimeError, and whatever its layers raise
        reason = f" ({missing})" if missing and DOMAIN in str(error) else ""
        raise FormatError(f"{path} is not a model that OpenVINO takes: {error}{reason}") from None


def _add_kernels(core: Any) -> str:
    """Let models have packed layers; return why they cannot, which only matters to a model that has some."""
    try:
        core.add_extension(str(library("openvino")))
    except KernelError as error:
        return str(error)
    except Exception as error:
        return does_not_fit("openvino", error)
    return ""


class OpenVinoSession:
    """A model in OpenVINO."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self.inputs = tuple(entry.get_any_name() for entry in compiled.inputs)
        self.outputs = tuple(entry.get_any_name() for entry in compiled.outputs)

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        # Inputs are only read, and outputs are copies, which the next call does not write over.
        found = self._request.infer(dict(feeds), share_inputs=True, share_outputs=False)
        return {name: found[output] for name, output in zip(self.outputs, self._compiled.outputs, strict=True)}
