"""Find attention in a graph, and write it as one operator.

The operator ``Attention`` of opset 23 reads queries, keys and values where the products before it left them: no
transposes, one pass over the scores, and no copies. Measured on a CPU it is faster than those of com.microsoft.

Rows whose positions are all hidden become 0, as in PyTorch. The exporter's own operators give their average instead,
because it writes "hidden" as the lowest number and not as minus infinity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.exporting._onnx_graph import OnnxGraph, attributes, standard

# The first with the operator Attention. ONNX Runtime 1.23 is the first that computes it on a CPU.
_OPSET = 23
# What changed its meaning between opset 20 and 23.
_CHANGED = frozenset({"GroupNormalization"})
_OLDEST = 18

_FLOAT, _BOOL = 1, 9


@dataclass
class _Found:
    """Attention, as it was found: values of four axes (batch, heads, positions, head size)."""

    query: str
    keys: str
    values: str
    mask: str | None
    scale: float
    causal: bool
    output: str
    node: Any


def fuse_attention(graph: OnnxGraph) -> tuple[int, dict[str, str]]:
    """Write attention as one operator wherever it is found.

    Returns:
        How often, and why something that looks like it was left, by the name of a value.
    """
    left: dict[str, str] = {}
    if not _may_be_raised(graph):
        return 0, {"the file": f"opset {graph.opset} cannot be raised to {_OPSET}, which has the operator Attention"}
    count = 0
    for node in list(graph.nodes):
        found = _written_out(graph, node) if node.op_type == "Softmax" else _operator(graph, node)
        if found is None:
            continue
        reason = _write(graph, found)
        if reason:
            left[node.output[0]] = reason
        else:
            count += 1
    if count:
        graph.require("", _OPSET)
    return count, left


def _may_be_raised(graph: OnnxGraph) -> bool:
    if graph.opset >= _OPSET:
        return True
    return graph.opset >= _OLDEST and not any(node.op_type in _CHANGED for node in graph.nodes)


def _operator(graph: OnnxGraph, node: Any) -> _Found | None:
    """The operator as the exporter writes it: on four axes, between transposes."""
    if node.op_type != "Attention" or not standard(node) or len(node.output) > 1:
        return None
    fields = attributes(node)
    others = {name for name, value in fields.items() if value and name not in ("scale", "is_causal")}
    if others or any(node.input[4:]):
        return None
    shape = graph.shape(node.input[0])
    if shape is None or len(shape) != 4 or not isinstance(shape[3], int) or not shape[3]:
        return None
    mask = node.input[3] if len(node.input) > 3 and node.input[3] else None
    scale = float(fields.get("scale", shape[3] ** -0.5))
    return _Found(
        node.input[0], node.input[1], node.input[2], mask, scale, bool(fields.get("is_causal")), node.output[0], node
    )


def _written_out(graph: OnnxGraph, softmax: Any) -> _Found | None:
    """Products, a mask, a softmax, and products with the values."""
    if not standard(softmax):
        return None
    rank = len(graph.shape(softmax.output[0]) or ())
    if attributes(softmax).get("axis", -1) not in (-1, rank - 1) or rank != 4:
        return None
    last = _behind_softmax(graph, softmax)
    product = graph.only_reader(last, "MatMul")
    if product is None or product.input[0] != last:
        return None
    scores, mask = softmax.input[0], None
    if (add := graph.maker(scores, "Add")) is not None:
        first = _scores(graph, add.input[0])
        scores, mask = (add.input[0], add.input[1]) if first is not None else (add.input[1], add.input[0])
    parts = _scores(graph, scores)
    if parts is None:
        return None
    query, keys, scale = parts
    return _Found(query, keys, product.input[1], mask, scale, False, product.output[0], product)


def _behind_softmax(graph: OnnxGraph, softmax: Any) -> str:
    """The name behind ``Where(IsNaN(p), 0, p)``, which the exporter writes for rows without any position."""
    name: str = softmax.output[0]
    readers = graph.readers(name)
    if len(readers) == 2 and {entry.op_type for entry in readers} == {"IsNaN", "Where"}:
        test, where = sorted(readers, key=lambda entry: str(entry.op_type))
        if where.input[0] == test.output[0] and graph.scalar(where.input[1]) == 0.0 and where.input[2] == name:
            return str(where.output[0])
    return name


def _scores(graph: OnnxGraph, name: str) -> tuple[str, str, float] | None:
    """Queries, keys and the scale of ``scale * queries @ keys^T``; the scale may lie before or behind the product."""
    name, scale = _unscaled(graph, name)
    product = graph.maker(name, "MatMul")
    if product is None:
        return None
    query, first = _unscaled(graph, product.input[0])
    turned, second = _unscaled(graph, product.input[1])
    keys = _turned_back(graph, turned)
    if keys is None:
        return None
    keys, third = _unscaled(graph, keys)
    return query, keys, scale * first * second * third


def _unscaled(graph: OnnxGraph, name: str) -> tuple[str, float]:
    """A value without its product by one number, and that number."""
    scale = 1.0
    while (node := graph.maker(name, "Mul", "Div")) is not None:
        first, second = node.input
        if (number := graph.scalar(second)) is not None:
            name, scale = first, scale * (number if node.op_type == "Mul" else 1 / number if number else np.nan)
        elif node.op_type == "Mul" and (number := graph.scalar(first)) is not None:
            name, scale = second, scale * number
        else:
            break
    return name, scale


def _turned_back(graph: OnnxGraph, name: str) -> str | None:
    """The keys, from the keys with their last two axes exchanged; written as one or as three operators."""
    node = graph.maker(name, "Transpose", "Reshape")
    if node is None:
        return None
    if node.op_type == "Transpose":
        order = list(attributes(node).get("perm", ()))
        return str(node.input[0]) if order == [0, 1, 3, 2] else _merged_order(graph, node, order)
    middle = graph.maker(node.input[0], "Transpose")
    if middle is None or list(attributes(middle).get("perm", ())) != [0, 2, 1]:
        return None
    outer = graph.maker(middle.input[0], "Reshape")
    if outer is None or len(graph.shape(outer.input[0]) or ()) != 4:
        return None
    if not _exchanges(graph, node, outer):
        return None
    return str(outer.input[0])


def _merged_order(graph: OnnxGraph, node: Any, order: list[int]) -> str | None:
    """Keys that one ``Transpose`` brings from (batch, positions, heads, size) to (batch, heads, size, positions)."""
    if order != [0, 2, 3, 1]:
        return None
    shape = graph.shape(node.input[0])
    output = graph.new_name(f"{node.input[0]}_by_heads")
    graph.add("Transpose", [node.input[0]], [output], perm=[0, 2, 1, 3])
    graph.know(output, graph.element_type(node.input[0]), shape and (shape[0], shape[2], shape[1], shape[3]))
    return output


def _exchanges(graph: OnnxGraph, last: Any, first: Any) -> bool:
    """Whether the shapes of the two ``Reshape`` come from the shape of the keys: (-1, n, m), and then (..., m, n)."""
    to_three, to_four = graph.maker(first.input[1], "Concat"), graph.maker(last.input[1], "Concat")
    if to_three is None or to_four is None or len(to_three.input) != 3 or len(to_four.input) != 3:
        return False
    return (
        graph.scalar(to_three.input[0]) == -1
        and to_four.input[1] == to_three.input[2]
        and to_four.input[2] == to_three.input[1]
        and _sizes_of(graph, to_four.input[0], first.input[0])
        and _sizes_of(graph, to_three.input[1], first.input[0])
        and _sizes_of(graph, to_three.input[2], first.input[0])
    )


def _sizes_of(graph: OnnxGraph, name: str, value: str) -> bool:
    cut = graph.maker(name, "Slice")
    shape = None if cut is None else graph.maker(cut.input[0], "Shape")
    return shape is not None and shape.input[0] == value


def _write(graph: OnnxGraph, found: _Found) -> str:
    """Put the operator in. Returns why not, if it cannot be."""
    shapes = [graph.shape(name) for name in (found.query, found.keys, found.values)]
    if any(graph.element_type(name) != _FLOAT for name in (found.query, found.keys, found.values)):
        return "only float32 is known to be computed by ONNX Runtime on a CPU"
    heads = [shape[1] if shape is not None and len(shape) == 4 else "" for shape in shapes]
    if not all(isinstance(number, int) and number > 0 for number in heads) or len(set(heads)) != 1:
        return f"the numbers of heads of queries, keys and values are {', '.join(map(str, heads))}"
    if not np.isfinite(found.scale) or found.scale <= 0:
        return f"its scores are multiplied by {found.scale:g}"
    inputs = [_by_positions(graph, name) for name in (found.query, found.keys, found.values)]
    behind = _joined(graph, found.output)
    flat = all(name is not None for name in inputs) and behind is not None
    mask = _mask(graph, found.mask, found.query) if found.mask else ""
    if mask is None:
        return "the shape of its mask is not known"
    fields: dict[str, Any] = {"scale": found.scale}
    if found.causal:
        fields["is_causal"] = 1
    if flat:
        fields |= {"q_num_heads": heads[0], "kv_num_heads": heads[1]}
    assert behind is not None or not flat
    output = behind.output[0] if flat and behind is not None else found.output
    read = [str(name) for name in inputs] if flat else [found.query, found.keys, found.values]
    for node in (found.node, *((behind,) if flat else ())):
        graph.remove(node)
    graph.add("Attention", [*read, mask] if mask else read, [output], **fields)
    return ""


def _by_positions(graph: OnnxGraph, name: str) -> str | None:
    """The value of axes (batch, positions, heads * size) that was cut into heads; None if it is made otherwise."""
    turn = graph.maker(name, "Transpose")
    if turn is None or list(attributes(turn).get("perm", ())) != [0, 2, 1, 3]:
        return None
    cut = graph.maker(turn.input[0], "Reshape")
    if cut is None:
        return None
    whole, parts = graph.shape(cut.input[0]), graph.shape(cut.output[0])
    return str(cut.input[0]) if _splits_last(whole, parts) else None


def _joined(graph: OnnxGraph, name: str) -> Any:
    """The ``Reshape`` that joins the heads again behind a ``Transpose``; None if there is none, or another reader."""
    turn = graph.only_reader(name, "Transpose")
    if turn is None or list(attributes(turn).get("perm", ())) != [0, 2, 1, 3]:
        return None
    join = graph.only_reader(turn.output[0], "Reshape")
    if join is None:
        return None
    return join if _splits_last(graph.shape(join.output[0]), graph.shape(turn.output[0])) else None


def _splits_last(whole: tuple[int | str, ...] | None, parts: tuple[int | str, ...] | None) -> bool:
    """Whether the second shape is the first one with its last axis cut in two."""
    if whole is None or parts is None or len(whole) != 3 or len(parts) != 4 or "" in whole[:2]:
        return False
    last, (heads, size) = whole[2], parts[2:]
    if not (isinstance(last, int) and isinstance(heads, int) and isinstance(size, int)):
        return False
    return whole[:2] == parts[:2] and last == heads * size


def _mask(graph: OnnxGraph, name: str, query: str) -> str | None:
    """The mask in float32, with as many rows as there are queries: ONNX Runtime does not spread its last two axes."""
    shape, positions = graph.shape(name), graph.shape(query)
    if shape is None or positions is None or not 2 <= len(shape) <= 4 or "" in (shape[-2], positions[2]):
        return None
    if graph.element_type(name) == _BOOL:
        name = _in_float(graph, name)
    if shape[-2] == positions[2]:
        return name
    return _spread(graph, name, query) if shape[-2] == 1 else None


def _in_float(graph: OnnxGraph, name: str) -> str:
    """0 where a mask is true and the lowest number elsewhere: once, and not again in each layer."""
    wish = f"{name}_in_float"
    if graph.maker(wish, "Where") is None:
        numbers = np.array(0, np.float32), np.array(np.finfo(np.float32).min)
        shown, hidden = (graph.add_constant(f"{name}_{i}", number) for i, number in enumerate(numbers))
        graph.add("Where", [name, shown, hidden], [wish])
        graph.know(wish, _FLOAT, graph.shape(name))
    return wish


def _spread(graph: OnnxGraph, name: str, query: str) -> str:
    """A mask of one row, repeated for each query."""
    wish = f"{name}_for_each_query"
    if graph.maker(wish, "Expand") is None:
        rows, sizes = f"{wish}_rows", f"{wish}_sizes"
        one = graph.add_constant(f"{wish}_one", np.ones(1, np.int64))
        graph.add("Shape", [query], [rows], start=2, end=3)
        graph.add("Concat", [rows, one], [sizes], axis=0)
        graph.add("Expand", [name, sizes], [wish])
    return wish
