"""Round the matrix products of an ONNX file to 8 bits, with ONNX Runtime's dynamic quantization."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from secateur.exporting._onnx import LARGEST


@dataclass(frozen=True)
class Quantized:
    """What was rounded.

    Args:
        products: number of matrix products in 8 bits.
        left: names of those that stayed in float32, and why.
    """

    products: int
    left: Mapping[str, str] = field(default_factory=dict)


def quantize(source: Path, output: Path, *, embeddings: bool = True) -> Quantized:
    """Write a graph whose matrix products, and embeddings if asked for, have weights of 8 bits.

    Args:
        source: an ``.onnx`` file.
        output: to write.
        embeddings: round tables of embeddings, too.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    large = sum(entry.stat().st_size for entry in source.parent.iterdir()) > LARGEST
    with _silence():
        quantize_dynamic(
            source,
            output,
            op_types_to_quantize=["MatMul", "Gemm", *(["Gather"] if embeddings else [])],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=large,
            extra_options={"MatMulConstBOnly": True},
        )
    nodes = onnx.load(output, load_external_data=False).graph.node
    return Quantized(sum(node.op_type == "MatMulInteger" for node in nodes))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without its advice to prepare the graph, which an exported one does not need."""
    logger = logging.getLogger()
    before = logger.level
    try:
        logger.setLevel(logging.ERROR)
        yield
    finally:
        logger.setLevel(before)
