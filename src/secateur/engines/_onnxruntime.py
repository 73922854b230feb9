"""Run a model in ONNX Runtime, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur._errors import FormatError, KernelError
from secateur.engines._library import DOMAIN, does_not_fit, library


def lacks(precision: str) -> str:
    """Why the processor cannot compute in a precision: it always can.

    Args:
        precision: ``"float32"``.
    """
    return ""


def load(path: Path, precision: str, threads: int | None) -> OnnxSession:
    """Open a file.

    Args:
        path: of an ``.onnx`` file.
        precision: ``"float32"``: the graph says what is computed in 8 bits.
        threads: to compute with; None for PyTorch's number.

    Raises:
        FormatError: ONNX Runtime does not take the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; what it warns of are choices of its own
    missing = _add_kernels(options)
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # classes of its own for each kind of failure
        reason = f" ({missing})" if missing and DOMAIN in str(error) else ""
        raise FormatError(f"{path} is not a model that ONNX Runtime takes: {error}{reason}") from None
    return OnnxSession(session)


def _add_kernels(options: Any) -> str:
    """Let models have packed layers; return why they cannot, which only matters to a model that has some."""
    try:
        path = library("onnxruntime")
        options.add_session_config_entry("secateur.threads", str(options.intra_op_num_threads))
        options.register_custom_ops_library(str(path))
    except KernelError as error:
        return str(error)
    except Exception as error:
        return does_not_fit("onnxruntime", error)
    return ""


class OnnxSession:
    """A model in ONNX Runtime."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs = tuple(entry.name for entry in session.get_inputs())
        self.outputs = tuple(entry.name for entry in session.get_outputs())

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self.outputs, self._session.run(None, dict(feeds)), strict=True))
