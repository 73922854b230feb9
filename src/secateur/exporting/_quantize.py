"""Compute the products of a graph in 8 bits, as ONNX Runtime does it fastest on a CPU.

Weights are signed and symmetric, with a scale for each output; inputs are unsigned, with a scale that is found anew in
each call. Products with the same input share its conversion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from secateur.exporting._onnx_graph import OnnxGraph, attributes, standard

_MICROSOFT = "com.microsoft"
_FLOAT = 1
# Tables of fewer numbers stay: nothing would be gained.
_SMALLEST_TABLE = 16_384
# Shares of the largest number of a column that are tried as the end of the 8 bit scale.
_CLIPS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.8, 0.75)


@dataclass(frozen=True)
class Quantized:
    """What is computed or stored in 8 bits in a file.

    Args:
        products: how many products with weights.
        embeddings: how many tables of embeddings.
        left: why other products and tables stayed in float32, by the name of their weight or node.
    """

    products: int
    embeddings: int
    left: Mapping[str, str]


@dataclass
class _Product:
    node: Any
    weight: np.ndarray[Any, Any]
    bias: str
    output: str
    extra: tuple[Any, ...]


def quantize(source: Path, output: Path, *, embeddings: bool = True) -> Quantized:
    """Write a graph whose products with weights are computed in 8 bits.

    Args:
        source: an ``.onnx`` file of float32 numbers, best one that ``fuse`` has written.
        output: the file to write.
        embeddings: whether tables of embeddings are stored in 8 bits as well, with a scale for each row.

    Raises:
        FormatError: the source cannot be read, or the output cannot be written.
    """
    graph = OnnxGraph(source)
    left: dict[str, str] = {}
    by_input: dict[str, list[_Product]] = {}
    for node in list(graph.nodes):
        found = _product(graph, node)
        if isinstance(found, _Product):
            by_input.setdefault(node.input[0], []).append(found)
        elif found:
            left[node.name or node.output[0]] = found
    for name, products in by_input.items():
        _write(graph, name, products)
    tables = _embeddings(graph, left) if embeddings else 0
    if by_input:
        graph.require(_MICROSOFT, 1)
    graph.save(output)
    return Quantized(sum(map(len, by_input.values())), tables, left)


def _product(graph: OnnxGraph, node: Any) -> _Product | str:
    """A product with a weight, or why it stays in float32; empty for other operators."""
    if not standard(node) or node.op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose"):
        return ""
    if node.op_type.startswith("Conv"):
        return "a convolution: ONNX Runtime computes those faster in float32"
    weight = graph.constant(node.input[1])
    if weight is None or graph.constant(node.input[0]) is not None:
        return "not a product of inputs and a weight"
    if weight.ndim != 2 or weight.dtype != np.float32:
        return f"its weight has {weight.ndim} axes of {weight.dtype}, not 2 of float32"
    if not np.isfinite(weight).all():
        return "its weight has numbers that are not finite"
    if node.op_type == "Gemm":
        return _gemm(graph, node, weight)
    add = graph.only_reader(node.output[0], "Add")
    if add is not None:
        for name in add.input:
            bias = graph.constant(name)
            if bias is not None and bias.shape == (weight.shape[1],):
                return _Product(node, weight, name, add.output[0], (add,))
    return _Product(node, weight, "", node.output[0], ())


def _gemm(graph: OnnxGraph, node: Any, weight: np.ndarray[Any, Any]) -> _Product | str:
    fields = attributes(node)
    if fields.get("transA") or fields.get("alpha", 1.0) != 1.0 or fields.get("beta", 1.0) != 1.0:
        return "its input is transposed or its result scaled"
    weight = weight.T if fields.get("transB") else weight
    bias = node.input[2] if len(node.input) > 2 else ""
    value = graph.constant(bias) if bias else None
    if bias and (value is None or value.shape != (weight.shape[1],)):
        return "its bias is not one number for each output"
    return _Product(node, weight, bias, node.output[0], ())


def _write(graph: OnnxGraph, name: str, products: list[_Product]) -> None:
    """Put in the products that read one value. Where there are several, they share its conversion to 8 bits."""
    shared: list[str] = []
    if len(products) > 1:
        shared = [graph.new_name(f"{name}_{part}") for part in ("8bit", "scale", "zero")]
        graph.add("DynamicQuantizeLinear", [name], shared)
    for product in products:
        numbers, scales = quantized(product.weight)
        title = product.node.input[1]
        weight = graph.add_constant(f"{title}_8bit", numbers)
        scale = graph.add_constant(f"{title}_scale", scales)
        for node in (product.node, *product.extra):
            graph.remove(node)
        if shared:
            read = [shared[0], weight, shared[1], scale, shared[2], "", product.bias]
            kind = "MatMulIntegerToFloat"
        else:
            read, kind = [name, weight, scale, "", product.bias], "DynamicQuantizeMatMul"
        while not read[-1]:
            read.pop()
        graph.add(kind, read, [product.output], domain=_MICROSOFT)


def quantized(weight: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Round a weight to 8 bits.

    Args:
        weight: float32, of shape (inputs, outputs).

    Returns:
        Whole numbers from -127 to 127, and the scale of each output: of those tried the one of the smallest squared
        error.
    """
    largest = np.abs(weight).max(axis=0)
    largest[largest == 0] = 1.0
    best = np.full(weight.shape[1], np.inf)
    numbers, scales = np.zeros(weight.shape, np.int8), np.ones(weight.shape[1], np.float32)
    for clip in _CLIPS:
        scale = (largest * (clip / 127)).astype(np.float32)
        rounded = np.clip(np.rint(weight / scale), -127, 127)
        error = np.square(rounded * scale - weight).sum(axis=0)
        better = error < best
        best[better], scales[better] = error[better], scale[better]
        numbers[:, better] = rounded[:, better].astype(np.int8)
    return numbers, scales


def _embeddings(graph: OnnxGraph, left: dict[str, str]) -> int:
    """Store tables in 8 bits, with a scale for each row, and return how many."""
    count = 0
    for name in list(graph.initializers):
        readers = graph.readers(name)
        lookups = [node for node in readers if node.op_type == "Gather" and standard(node) and node.input[0] == name]
        if not lookups or graph.element_type(name) != _FLOAT:
            continue
        table = graph.constant(name)
        if table is None or table.ndim != 2 or table.size < _SMALLEST_TABLE:
            continue
        if len(lookups) != len(readers) or any(attributes(node).get("axis", 0) != 0 for node in lookups):
            left[name] = "a table of embeddings that something else reads as well"
            continue
        if not np.isfinite(table).all():
            left[name] = "a table of embeddings with numbers that are not finite"
            continue
        _write_table(graph, name, table, lookups)
        count += 1
    return count


def _write_table(graph: OnnxGraph, name: str, table: np.ndarray[Any, Any], lookups: list[Any]) -> None:
    numbers, scales = quantized(table.T)
    rows = graph.add_constant(f"{name}_8bit", numbers.T)
    scale = graph.add_constant(f"{name}_scale", scales[:, None])
    for node in lookups:
        ids, output = node.input[1], node.output[0]
        found, sizes, wide = (graph.new_name(f"{output}_{part}") for part in ("8bit", "scale", "float"))
        graph.remove(node)
        graph.add("Gather", [rows, ids], [found])
        graph.add("Gather", [scale, ids], [sizes])
        graph.add("Cast", [found], [wide], to=_FLOAT)
        graph.add("Mul", [wide, sizes], [output])
