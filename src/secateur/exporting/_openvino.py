"""From an ONNX file to OpenVINO's own files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur._errors import RecipeError


@dataclass(frozen=True)
class Converted:
    """What was written.

    Args:
        notes: what stayed in floating point, and why.
    """

    notes: tuple[str, ...] = ()


def convert(
    source: Path, folder: Path, *, int8: bool, calibration: Iterable[Mapping[str, Any]] | None = None
) -> Converted:
    """Write ``openvino_model.xml`` and ``.bin``.

    Args:
        source: an ``.onnx`` file of float32 numbers.
        folder: to make.
        int8: compute products in 8 bits.
        calibration: inputs by name, for ranges of products' inputs.
    """
    import openvino

    if int8:
        raise RecipeError("8 bits in OpenVINO are not written yet. Leave out int8, or give to='onnx' (--to onnx).")
    folder.mkdir(parents=True)
    openvino.save_model(openvino.convert_model(source), folder / "openvino_model.xml", compress_to_fp16=False)
    return Converted()
