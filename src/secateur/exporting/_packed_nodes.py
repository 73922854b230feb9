"""Put packed layers into an ONNX file: products by a weight with many zeros become the operation of our kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import kernels
from secateur.engines import DOMAIN
from secateur.formats import as_value_dtype
from secateur.kernels import GroupLayout, Layout, PanelLayout, TileLayout
from secateur.patterns import NM, Block, satisfied

OPERATION, _VERSION = "PackedLinear", 1
_FEWEST = 128 * 128  # weights; a smaller product is over before its threads have started
_MOST_STORED = 1.3  # values that a layout stores for each weight that is kept, before panels are better


@dataclass(frozen=True)
class PackedNodes:
    """What became packed layers in a file.

    Args:
        packed: by the name of the node, the layout, and the zeros of the weight as a fraction.
        left: by the name of the node, why it was left as it was.
        bytes_before: of the weights that are packed now, as they were.
        bytes_after: of the same weights, packed.
    """

    packed: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0


def pack_nodes(
    source: Path, output: Path, *, sparsity: float = 0.7, value_dtype: torch.dtype | str = torch.float32
) -> PackedNodes:
    """Write an ONNX file whose products by sparse constant weights are packed layers.

    ``MatMul`` and ``Gemm`` by a float32 constant become ``secateur.PackedLinear``, with a bias that is added right
    after them. The file then needs the library of :func:`secateur.engines.library` in ONNX Runtime, or in OpenVINO.

    Args:
        source: an ONNX file.
        output: another one.
        sparsity: the fewest zeros that a weight must have, as a fraction.
        value_dtype: of the values that are stored; ``"int8"`` and the 16-bit ones make the file smaller, and change the
            results.
    """
    import onnx

    dtype = as_value_dtype(value_dtype) or torch.float32
    model = onnx.load(source)
    rewriter = _Rewriter(model.graph, sparsity, dtype)
    rewriter.run()
    if rewriter.packed and not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, _VERSION))
    onnx.save(model, output)
    return PackedNodes(rewriter.packed, rewriter.left, rewriter.before, rewriter.after)


@dataclass(frozen=True)
class _Product:
    """A product by a constant weight: its input, the name of the weight, whether that is [in, out], and its bias."""

    x: str
    weight: str
    turned: bool
    bias: str = ""


class _Rewriter:
    """One pass over a graph."""

    def __init__(self, graph: Any, sparsity: float, dtype: torch.dtype) -> None:
        self._graph, self._sparsity, self._dtype = graph, sparsity, dtype
        self._constants = {entry.name: entry for entry in graph.initializer}
        self._users: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        self._results = {entry.name for entry in graph.output}
        self._blocks: dict[tuple[str, bool], Any] = {}  # a weight that several products use is stored once
        self.packed: dict[str, tuple[str, float]] = {}
        self.left: dict[str, str] = {}
        self.before = self.after = 0

    def run(self) -> None:
        gone: set[int] = set()
        found = []
        for node in self._graph.node:
            if id(node) in gone:
                continue
            product = self._product(node)
            new = None if product is None else self._replace(node, product, gone)
            found.append(node if new is None else new)
        del self._graph.node[:]
        self._graph.node.extend(found)
        self._drop_unused()

    def _product(self, node: Any) -> _Product | None:
        if node.op_type == "MatMul" and not node.domain and node.input[1] in self._constants:
            return _Product(node.input[0], node.input[1], turned=True)
        if node.op_type == "Gemm" and not node.domain and node.input[1] in self._constants:
            given = {entry.name: entry for entry in node.attribute}
            scales = [given[name].f for name in ("alpha", "beta") if name in given]
            bias = node.input[2] if len(node.input) > 2 else ""
            if any(scale != 1 for scale in scales) or ("transA" in given and given["transA"].i):
                return None
            if bias and not self._is_vector(bias):
                return None
            return _Product(node.input[0], node.input[1], not ("transB" in given and given["transB"].i), bias)
        return None

    def _is_vector(self, name: str) -> bool:
        return name in self._constants and len(self._constants[name].dims) == 1

    def _replace(self, node: Any, product: _Product, gone: set[int]) -> Any | None:
        """The packed layer in the place of a product and of the addition after it; None leaves the product."""
        import onnx

        block = self._block(node.name or node.output[0], product)
        if block is None:
            return None
        rows, name = block
        result, bias = node.output[0], product.bias
        users = self._users.get(result, [])
        if not bias and len(users) == 1 and users[0].op_type == "Add" and result not in self._results:
            other = next((n for n in users[0].input if n != result), "")
            if self._is_vector(other) and self._constants[other].dims[0] == rows:
                bias, result = other, users[0].output[0]
                gone.add(id(users[0]))
        inputs = [product.x, name, *([bias] if bias else [])]
        return onnx.helper.make_node(OPERATION, inputs, [result], name=node.name, domain=DOMAIN)

    def _block(self, node: str, product: _Product) -> tuple[int, str] | None:
        """The rows of a packed weight, and the name of its constant; None, with the reason, if it is not worth it."""
        import onnx

        key = (product.weight, product.turned)
        if key not in self._blocks:
            constant = self._constants[product.weight]
            if len(constant.dims) != 2 or constant.data_type != onnx.TensorProto.FLOAT:
                self._blocks[key] = "its weight is not a float32 matrix"
            else:
                weight = torch.from_numpy(onnx.numpy_helper.to_array(constant).copy())
                self._blocks[key] = self._pack(product.weight, weight.T if product.turned else weight)
        found = self._blocks[key]
        if isinstance(found, str):
            self.left[node] = found
            return None
        rows, name, layout, zeros = found
        self.packed[node] = layout, zeros
        return rows, name

    def _pack(self, name: str, weight: Tensor) -> str | tuple[int, str, str, float]:
        import onnx

        zero = weight == 0
        zeros = float(zero.float().mean())
        if weight.numel() < _FEWEST:
            return f"its weight has {weight.numel()} numbers; at least {_FEWEST} are worth it"
        if zeros < self._sparsity:
            return f"{zeros:.0%} of its weight are zeros; at least {self._sparsity:.0%} are worth it"
        layout = layout_for(weight, self._dtype)
        data = kernels.to_bytes(layout)
        constant = onnx.numpy_helper.from_array(data, f"{name}.packed")
        self._graph.initializer.append(constant)
        self.before += weight.nbytes
        self.after += data.nbytes
        return weight.shape[0], constant.name, layout.kernel, zeros

    def _drop_unused(self) -> None:
        used = Counter(name for node in self._graph.node for name in _names(node))
        kept = [entry for entry in self._graph.initializer if used[entry.name] or entry.name in self._results]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)


def _names(node: Any) -> Iterator[str]:
    """All names that a node reads, in its inner graphs too."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            for inner in graph.node:
                yield from _names(inner)


def layout_for(weight: Tensor, value_dtype: torch.dtype) -> Layout:
    """Return the layout of a weight ``[out, in]`` in the file of an engine: by the pattern that its zeros satisfy."""
    zero = weight == 0
    kept = weight.numel() - int(zero.count_nonzero())
    for pattern in satisfied(zero):
        match pattern:
            case NM(n, m) if weight.numel() * n // m <= _MOST_STORED * kept:
                return GroupLayout.pack(weight, n=n, m=m, value_dtype=value_dtype)
            case Block(height, width):
                return TileLayout.pack(weight, height=height, width=width, value_dtype=value_dtype)
    return PanelLayout.pack(weight, value_dtype=value_dtype)
