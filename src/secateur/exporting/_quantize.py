"""Compute the products of a graph in 8 bits, as ONNX Runtime does it fastest on a CPU.

Weights are signed and symmetric, with a scale for each output. Inputs are unsigned, with a scale for each row that is
found anew in each call: a row's result depends on nothing else in its batch. One scale for a whole batch, which ONNX
Runtime's own tool writes, is as fast but ten times less accurate: a text's embedding then changes with its neighbours.
Products with the same input share its conversion.

The kernels are those for unsigned inputs and signed weights. On x86 processors without VNNI (before 2019 at Intel, 2022
at AMD) they add pairs of products in 16 bits, where large sums are cut off.
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
# Functions with a lower bound leave the numbers below it free for those above 0.
_LOWEST = {"Gelu": -0.1701, "Relu": 0.0, "Sigmoid": 0.0, "Softmax": 0.0}
_LOWEST_SILU = -0.2785
# The first version of the standard operators that converts rows with scales of their own.
_OPSET = 21
# Tables of fewer numbers stay: nothing would be gained.
_SMALLEST_TABLE = 16_384


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
    if by_input:
        graph.require(_MICROSOFT, 1)
        graph.require("", _OPSET)
    writer = _Writer(graph)
    for name, products in by_input.items():
        writer.write(name, products)
    graph.drop_unread()
    tables = _embeddings(graph, left) if embeddings else 0
    graph.save(output)
    return Quantized(sum(map(len, by_input.values())), tables, left)


def _product(graph: OnnxGraph, node: Any) -> _Product | str:
    """A product with a weight, or why it stays in float32; empty for other operators."""
    if not standard(node) or node.op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose"):
        return ""
    if node.op_type.startswith("Conv"):
        return "a convolution: ONNX Runtime computes those faster in float32"
    if not graph.can_be(_OPSET):
        return f"opset {graph.opset} cannot be raised to {_OPSET}, which has the operators for it"
    weight = graph.constant(node.input[1])
    if weight is None or graph.constant(node.input[0]) is not None:
        return "not a product of inputs and a weight"
    if weight.ndim != 2 or weight.dtype != np.float32:
        return f"its weight has {weight.ndim} axes of {weight.dtype}, not 2 of float32"
    if len(graph.shape(node.input[0]) or (0, 0)) < 2:
        return "its input has no rows"
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


class _Writer:
    """Puts products in 8 bits into a graph. They share constants, and the zero of values with as many rows."""

    def __init__(self, graph: OnnxGraph) -> None:
        self._graph = graph
        self._constants: dict[tuple[str, float], str] = {}
        self._zeros: dict[object, str] = {}

    def write(self, name: str, products: list[_Product]) -> None:
        """Put in the products that read one value."""
        graph = self._graph
        numbers, scale, zero = self._converted(name, products[0].weight.shape[0])
        one = self._constant("float32", 1.0)
        for product in products:
            title = product.node.input[1]
            weight, scales = quantized(product.weight)
            read = [numbers, graph.add_constant(f"{title}_8bit", weight), one]
            read += [graph.add_constant(f"{title}_scale", scales), self._constant("uint8", zero)]
            for node in (product.node, *product.extra):
                graph.remove(node)
            whole = graph.new_name(f"{product.output}_unscaled")
            scaled = graph.new_name(f"{product.output}_scaled") if product.bias else product.output
            graph.add("MatMulIntegerToFloat", read, [whole], domain=_MICROSOFT)
            graph.add("Mul", [whole, scale], [scaled])
            if product.bias:
                graph.add("Add", [scaled, product.bias], [product.output])

    def _converted(self, name: str, width: int) -> tuple[str, str, int]:
        """A value in 8 bits, the scales of its rows, and the number that stands for 0."""
        graph = self._graph
        largest, scale, numbers = (graph.new_name(f"{name}_{part}") for part in ("largest", "scale", "8bit"))
        lowest = _lowest(graph, name)
        size, zero = name, _zero(lowest)
        if lowest is None:
            size = graph.new_name(f"{name}_size")
            graph.add("Abs", [name], [size])
        graph.add("ReduceMax", [size, self._constant("int64", -1)], [largest], keepdims=1)
        share = self._constant("float32", 1 / (127 if lowest is None else 255 - zero))
        if zero and lowest:
            least, whole = self._constant("float32", -lowest / zero), graph.new_name(f"{name}_share")
            graph.add("Mul", [largest, share], [whole])
            graph.add("Max", [whole, least], [scale])
        else:
            # A row of zeros has the scale 0. Whatever it is converted to becomes 0 again behind the product.
            graph.add("Mul", [largest, share], [scale])
        graph.add(
            "QuantizeLinear", [name, scale, self._zeros_of(name, scale, zero)], [numbers], axis=-1, block_size=width
        )
        return numbers, scale, zero

    def _zeros_of(self, name: str, scale: str, zero: int) -> str:
        """The number that stands for 0, once for each row."""
        import onnx

        shape = self._graph.shape(name)
        rows: object = shape[:-1] if shape and "" not in shape[:-1] else name
        if (rows, zero) not in self._zeros:
            sizes, zeros = (self._graph.new_name(f"{name}_{part}") for part in ("rows", "zeros"))
            value = onnx.numpy_helper.from_array(np.array([zero], np.uint8))
            self._graph.add("Shape", [scale], [sizes])
            self._graph.add("ConstantOfShape", [sizes], [zeros], value=value)
            self._zeros[rows, zero] = zeros
        return self._zeros[rows, zero]

    def _constant(self, dtype: str, number: float) -> str:
        if (dtype, number) not in self._constants:
            value = np.array([number] if dtype == "int64" else number, dtype)
            self._constants[dtype, number] = self._graph.add_constant(f"{dtype}_{number:.6g}", value)
        return self._constants[dtype, number]


def _lowest(graph: OnnxGraph, name: str) -> float | None:
    """A bound that a value is never below, known from the function that made it; None if there is none."""
    node = graph.maker(name, "Mul", *_LOWEST)
    if node is None:
        return None
    if node.op_type != "Mul":
        return _LOWEST[node.op_type]
    for gate, value in (node.input, reversed(node.input)):
        sigmoid = graph.maker(gate, "Sigmoid")
        if sigmoid is not None and sigmoid.input[0] == value:
            return _LOWEST_SILU
    return None


def _zero(lowest: float | None) -> int:
    """The number that stands for 0: in the middle, or where a lower bound of such a size leaves most room above it."""
    if lowest is None:
        return 128
    return 0 if lowest == 0 else 20


def quantized(weight: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Round a weight to 8 bits.

    Args:
        weight: float32, of shape (inputs, outputs).

    Returns:
        Whole numbers from -127 to 127, and the scale of each output. Clipping the largest numbers was tried: in 8 bits
        it gains nothing.
    """
    largest = np.abs(weight).max(axis=0)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.clip(np.rint(weight / scales), -127, 127).astype(np.int8), scales


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
