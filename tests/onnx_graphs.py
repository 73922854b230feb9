"""ONNX files of a few operators, for tests of what is done to such files."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def write(
    path: Path,
    nodes: list[tuple[Any, ...]],
    inputs: dict[str, tuple[Any, ...]],
    constants: dict[str, np.ndarray[Any, Any]] | None = None,
    opset: int = 20,
) -> Path:
    """Write a graph of nodes ``(kind, inputs, outputs, settings)``; its output is the last node's first."""
    onnx = pytest.importorskip("onnx")
    make = onnx.helper
    graph = make.make_graph(
        [make.make_node(kind, read, made, **(fields[0] if fields else {})) for kind, read, made, *fields in nodes],
        "graph",
        [make.make_tensor_value_info(name, 1, shape) for name, shape in inputs.items()],
        [make.make_tensor_value_info(nodes[-1][2][0], 1, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", opset)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def kinds(path: Path) -> Counter[str]:
    """Return how many nodes of each kind a file has."""
    onnx = pytest.importorskip("onnx")
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
