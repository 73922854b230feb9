"""Put packed layers into an ONNX file: products by a constant weight become the operation of our kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur import kernels
from secateur._errors import SparsityError
from secateur._types import Weight
from secateur.engines import DOMAIN, import_openvino, library
from secateur.exporting._onnx_graph import OnnxGraph, attributes, standard
from secateur.kernels import (
    GroupLayout,
    Int8BitmaskLayout,
    Int8PanelLayout,
    Int8TileLayout,
    Layout,
    PanelLayout,
    TileLayout,
)
from secateur.patterns import NM, Block, satisfied

OPERATION, _VERSION = "PackedLinear", 1
SPARSITY = 0.7  # zeros of a weight from which on the kernels are faster than dense products in the engines
_FEWEST = 128 * 128  # weights; a smaller product takes less time than what surrounds it
HALF = 0.5  # in 8 bits, zeros from which on only the weights that are kept are stored
_MOST_STORED = 1.3  # values that groups store for each weight that is kept, before panels are better
_FLOAT = 1  # the number of float32 in ONNX


@dataclass(frozen=True)
class PackedNodes:
    """What became packed layers in a file.

    Args:
        packed: by the name of a node, its layout.
        left: by the name of a product with a constant weight, why it stayed as it was.
        bytes_before: of the weights that are packed now, as they were.
        bytes_after: of the same weights, packed.
    """

    packed: Mapping[str, str]
    left: Mapping[str, str]
    bytes_before: int
    bytes_after: int


def pack_nodes(source: Path, output: Path, *, sparsity: float = SPARSITY, int8: bool = False) -> PackedNodes:
    """Write an ONNX file whose products by sparse constant weights are packed layers.

    ``MatMul`` and ``Gemm`` by a float32 constant become ``secateur.PackedLinear``, with a bias that is added right
    after them. The file then needs the library of :func:`secateur.engines.library`, in ONNX Runtime or in OpenVINO.

    Args:
        source: an ONNX file.
        output: another one.
        sparsity: the fewest zeros that a weight must have, as a fraction.
        int8: compute in 8 bits, as ``pack_(precision="int8")`` does. Then weights without zeros are packed, too:
            the kernels for those are as fast as the engine's.

    Raises:
        FormatError: the source cannot be read, or the output cannot be written.
    """
    packer = _Packer(OnnxGraph(source), 0.0 if int8 else sparsity, layout_in_bytes if int8 else layout_for)
    packer.run()
    packer.graph.save(output)
    return PackedNodes(packer.packed, packer.left, packer.before, packer.after)


def save_for_openvino(source: Path, folder: Path) -> None:
    """Write ``openvino_model.xml`` and ``.bin`` of an ONNX file with packed layers.

    Raises:
        KernelError: the library for OpenVINO was not built.
    """
    openvino = import_openvino()
    core = openvino.Core()
    core.add_extension(str(library("openvino")))
    folder.mkdir(parents=True)
    openvino.save_model(core.read_model(source), folder / "openvino_model.xml", compress_to_fp16=False)


@dataclass(frozen=True)
class _Stored:
    """A packed weight in the file: the name of its constant, how many outputs it has, and its layout."""

    name: str
    rows: int
    layout: str


class _Packer:
    """One pass over the products of a graph."""

    def __init__(self, graph: OnnxGraph, sparsity: float, lay_out: Callable[[Weight], Layout]) -> None:
        self.graph, self._sparsity, self._lay_out = graph, sparsity, lay_out
        self._stored: dict[tuple[str, bool], _Stored | str] = {}  # a weight that several products use is stored once
        self.packed: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self.before = self.after = 0

    def run(self) -> None:
        for node in list(self.graph.nodes):
            turned = _is_turned(node)
            if turned is None or self.graph.constant(node.input[1]) is None:
                continue
            name = node.name or node.output[0]
            key = (node.input[1], turned)
            if key not in self._stored:
                self._stored[key] = self._store(*key)
            stored = self._stored[key]
            if isinstance(stored, str):
                self.left[name] = stored
            else:
                self._replace(node, stored)
                self.packed[name] = stored.layout
        if self.packed:
            self.graph.require(DOMAIN, _VERSION)

    def _store(self, name: str, turned: bool) -> _Stored | str:
        """Add a packed weight to the graph, or return why it is not worth it."""
        value = self.graph.constant(name)
        assert value is not None
        if value.ndim != 2 or self.graph.element_type(name) not in (_FLOAT, None) or value.dtype != "float32":
            return "its weight is no matrix of float32 numbers"
        weight = torch.from_numpy((value.T if turned else value).copy())
        zeros = float((weight == 0).float().mean())
        if weight.numel() < _FEWEST:
            return f"its weight has {weight.numel()} numbers; packed layers are faster from {_FEWEST} on"
        if zeros < self._sparsity:
            return f"{zeros:.0%} of its weight are zeros; packed layers are faster from {self._sparsity:.0%} on"
        try:
            layout = self._lay_out(weight)
        except SparsityError as error:
            return str(error)
        data = kernels.to_bytes(layout)
        self.before += weight.nbytes
        self.after += data.nbytes
        return _Stored(self.graph.add_constant(f"{name}.packed", data), weight.shape[0], layout.kernel)

    def _replace(self, node: Any, stored: _Stored) -> None:
        """Put a packed layer in the place of a product, and of the addition of a bias after it."""
        result, bias = node.output[0], list(node.input[2:])
        add = None if bias else self.graph.only_reader(result, "Add")
        if add is not None:
            other = next((name for name in add.input if name != result), result)
            value = self.graph.constant(other)
            if value is None or value.shape != (stored.rows,):
                add = None
            else:
                bias, result = [other], add.output[0]
        self.graph.remove(node)
        if add is not None:
            self.graph.remove(add)
        self.graph.add(OPERATION, [node.input[0], stored.name, *bias], [result], DOMAIN)


def _is_turned(node: Any) -> bool | None:
    """Whether the weight of a product is [in, out]; None for a node that is no product like that of a linear layer."""
    if not standard(node) or node.op_type not in ("MatMul", "Gemm"):
        return None
    given = attributes(node)
    if node.op_type == "MatMul":
        return True
    plain = given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0 and not given.get("transA", 0)
    return not given.get("transB", 0) if plain else None


def layout_for(weight: Weight) -> Layout:
    """Return the layout of a weight ``[out, in]`` in the file of an engine: by the pattern that its zeros satisfy."""
    zero = weight == 0
    kept = weight.numel() - int(zero.count_nonzero())
    for pattern in satisfied(zero):
        match pattern:
            case NM(n, m) if weight.numel() * n // m <= _MOST_STORED * kept:
                return GroupLayout.pack(weight, n=n, m=m)
            case Block(height, width):
                return TileLayout.pack(weight, height=height, width=width)
    return PanelLayout.pack(weight)


def layout_in_bytes(weight: Weight) -> Layout:
    """Return the layout of a weight ``[out, in]`` for products in 8 bits, in the file of an engine.

    Raises:
        KernelError, FormatError: the weight cannot be rounded to 8 bits.
    """
    zero = weight == 0
    if float(zero.float().mean()) < HALF:
        return Int8PanelLayout.pack(weight)
    blocks = [pattern for pattern in satisfied(zero) if isinstance(pattern, Block)]
    for height, width in ((4, 4), (4, 1), (1, 4)):
        if any(not (block.height % height or block.width % width) for block in blocks):
            return Int8TileLayout.pack(weight, height=height, width=width)
    return Int8BitmaskLayout.pack(weight)
