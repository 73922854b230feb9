"""Run a model in OpenVINO, on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from secateur._errors import FormatError, KernelError, StatisticsError
from secateur.engines._library import DOMAIN, does_not_fit, library

_HINTS = {"float32": "f32", "bfloat16": "bf16"}
_TELEMETRY = "openvino_telemetry"


def import_openvino() -> Any:
    """Import OpenVINO so that it reports nothing to its makers.

    ``import openvino`` starts a process that sends the version and an identity of the user over the network, and
    writes that identity below the home directory, unless the user has switched this off. Without the package
    ``openvino_telemetry`` it does neither. So that package cannot be imported while OpenVINO is. No setting and no
    file is changed; where a program imported OpenVINO before, what it chose stays.

    Returns:
        The module ``openvino``.
    """
    if "openvino" not in sys.modules and _TELEMETRY not in sys.modules:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # Python's way to say: not to be imported
        try:
            import openvino
        finally:
            del sys.modules[_TELEMETRY]
    import openvino

    return openvino


@cache
def lacks(precision: str) -> str:
    """Why the processor cannot compute in a precision; empty if it can.

    Args:
        precision: ``"float32"`` or ``"bfloat16"``.
    """
    if precision != "bfloat16" or "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return ""
    return "this processor has no instructions for bfloat16, and OpenVINO would compute in float32"


def load(path: Path, precision: str, threads: int | None) -> OpenVinoSession:
    """Open a file.

    Args:
        path: of an ``.xml`` file, with its ``.bin`` beside it; or of an ``.onnx`` file.
        precision: of what the file does not say to be in 8 bits: ``"float32"`` or ``"bfloat16"``. Without a word
            OpenVINO takes bfloat16 where the processor has it; a file cannot choose.
        threads: to compute with; None for PyTorch's number.

    Raises:
        FormatError: OpenVINO does not take the file.
        KernelError: the processor has no bfloat16.
    """
    openvino = import_openvino()
    if lacks(precision):
        raise KernelError(f"{path.name} cannot run in {precision}: {lacks(precision)}. Take float32.")
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
    """A model in OpenVINO. Threads may share it; they take turns."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._turn = Lock()
        self.inputs = tuple(entry.get_any_name() for entry in compiled.inputs)
        self.outputs = tuple(entry.get_any_name() for entry in compiled.outputs)

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return all outputs by name.

        Raises:
            StatisticsError: the model cannot compute inputs of these shapes.
        """
        with self._turn:
            try:
                # Not `infer`: on one thread it loses errors, and answers shapes that the model cannot take, such as
                # texts that are too long, with the outputs of the call before (OpenVINO 2026.4).
                # Inputs are only read. Those that are not contiguous are copied.
                self._request.start_async(dict(feeds), share_inputs=True)
                self._request.wait()
            except Exception as error:  # RuntimeError, and whatever its layers raise
                self._request = self._compiled.create_infer_request()
                shapes = ", ".join(f"{name} {'x'.join(map(str, value.shape))}" for name, value in feeds.items())
                cause = str(error).strip().splitlines()[-1]
                raise StatisticsError(
                    f"OpenVINO cannot compute {shapes}: {cause}. Inputs of one call belong together, and the model may "
                    "have a longest text. Check their shapes."
                ) from None
            # Copies, which the next call does not write over.
            outputs = zip(self.outputs, self._compiled.outputs, strict=True)
            return {name: self._request.get_tensor(output).data.copy() for name, output in outputs}
