"""From an ONNX file to OpenVINO's own files."""

from __future__ import annotations

from pathlib import Path

from secateur._errors import RecipeError


def convert(source: Path, folder: Path, *, int8: bool) -> None:
    """Write ``openvino_model.xml`` and ``.bin``.

    Args:
        source: an ``.onnx`` file of float32 numbers.
        folder: to make.
        int8: compute products in 8 bits.
    """
    import openvino

    if int8:
        raise RecipeError("8 bits in OpenVINO are not written yet. Leave out int8, or give to='onnx' (--to onnx).")
    folder.mkdir(parents=True)
    openvino.save_model(openvino.convert_model(source), folder / "openvino_model.xml", compress_to_fp16=False)
