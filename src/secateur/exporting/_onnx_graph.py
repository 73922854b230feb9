"""An ONNX graph with an index: who makes a value, who reads it, and what is known of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from secateur._errors import FormatError

# Protobuf messages end at 2 GiB. A file that is near it has its weights in a second file.
_LARGEST_MESSAGE = 1_900_000_000


class OnnxGraph:
    """The graph of a file, to be rewritten.

    Nodes may be added in any order: :meth:`save` sorts them, and leaves out what nothing reads.

    Args:
        path: of an ``.onnx`` file; weights that lie in a second file are read with it.

    Raises:
        FormatError: it is no such file.
    """

    def __init__(self, path: Path) -> None:
        import onnx

        try:
            self.model = onnx.load(path)
        except Exception as error:  # of protobuf, of onnx, or of the operating system
            raise FormatError(f"{path} is not an ONNX file that can be read: {error}") from None
        self.external = _is_external(path)
        graph = self.model.graph
        self.nodes: list[Any] = list(graph.node)
        self.initializers: dict[str, Any] = {entry.name: entry for entry in graph.initializer}
        self.inputs = [entry.name for entry in graph.input if entry.name not in self.initializers]
        self.outputs = [entry.name for entry in graph.output]
        self._types = {v.name: v.type.tensor_type for v in [*graph.value_info, *graph.input, *graph.output]}
        self._names = {name for node in self.nodes for name in (*node.input, *node.output)} | set(self.initializers)
        self._index()

    def _index(self) -> None:
        self._makers: dict[str, Any] = {}
        self._readers: dict[str, list[Any]] = {}
        self._inner: Counter[str] = Counter()  # what graphs inside nodes read: it must stay as it is
        for node in self.nodes:
            self._enter(node)

    def _enter(self, node: Any) -> None:
        for name in node.output:
            self._makers[name] = node
        for name in node.input:
            self._readers.setdefault(name, []).append(node)
        for inner in _inner_graphs(node):
            self._inner.update(name for entry in inner.node for name in _read_by(entry))

    @property
    def opset(self) -> int:
        """The version of the standard operators; 0 if the file does not say."""
        return max((entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")), default=0)

    def require(self, domain: str, version: int) -> None:
        """Ask for a version of a set of operators at least."""
        import onnx

        for entry in self.model.opset_import:
            if entry.domain == domain:
                entry.version = max(entry.version, version)
                return
        self.model.opset_import.append(onnx.helper.make_opsetid(domain, version))

    def maker(self, name: str, *kinds: str) -> Any:
        """Return the node that makes a value, if it is of one of these kinds; None otherwise."""
        node = self._makers.get(name)
        return node if node is not None and (not kinds or (node.op_type in kinds and standard(node))) else None

    def readers(self, name: str) -> list[Any]:
        """Return the nodes that read a value, as often as they read it."""
        return self._readers.get(name, [])

    def only_reader(self, name: str, *kinds: str) -> Any:
        """Return the one node that reads a value, if nothing else needs it and the node is of one of these kinds."""
        readers = self.readers(name)
        if len(readers) != 1 or name in self.outputs or name in self._inner:
            return None
        return readers[0] if not kinds or (readers[0].op_type in kinds and standard(readers[0])) else None

    def constant(self, name: str) -> np.ndarray[Any, Any] | None:
        """Return a value that is always the same; None for another."""
        import onnx

        if name in self.initializers and name not in self.inputs:
            return np.asarray(onnx.numpy_helper.to_array(self.initializers[name]))
        node = self.maker(name, "Constant")
        if node is not None and "value" in (fields := attributes(node)):
            return np.asarray(onnx.numpy_helper.to_array(fields["value"]))
        return None

    def scalar(self, name: str) -> float | None:
        """Return the one number of a constant value; None for another."""
        value = self.constant(name)
        return float(value.reshape(())) if value is not None and value.size == 1 else None

    def shape(self, name: str) -> tuple[int | str, ...] | None:
        """Return a value's sizes, numbers or names of sizes; None if the rank is unknown. An unknown size is ``""``."""
        if (entry := self.initializers.get(name)) is not None:
            return tuple(entry.dims)
        kind = self._types.get(name)
        if kind is None or not kind.HasField("shape"):
            return None
        return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim)

    def element_type(self, name: str) -> int | None:
        """Return the number of a value's type in ONNX, such as 1 for float32; None if it is unknown."""
        if (entry := self.initializers.get(name)) is not None:
            return int(entry.data_type)
        kind = self._types.get(name)
        return None if kind is None else int(kind.elem_type)

    def know(self, name: str, element_type: int | None, shape: tuple[int | str, ...] | None) -> None:
        """Say what a new value is, where that is known."""
        import onnx

        if element_type is not None and shape is not None:
            self._types[name] = onnx.helper.make_tensor_type_proto(element_type, [x or None for x in shape]).tensor_type

    def new_name(self, wish: str) -> str:
        """Return a name that no value has yet."""
        name, number = wish, 1
        while name in self._names:
            name, number = f"{wish}_{number}", number + 1
        self._names.add(name)
        return name

    def add_constant(self, wish: str, value: np.ndarray[Any, Any]) -> str:
        """Add a constant, and return its name."""
        import onnx

        name = self.new_name(wish)
        self.initializers[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def add(self, kind: str, inputs: Iterable[str], outputs: Iterable[str], domain: str = "", **fields: Any) -> Any:
        """Add a node, and return it."""
        import onnx

        outputs = list(outputs)
        node = onnx.helper.make_node(kind, list(inputs), outputs, name=f"{kind}_{outputs[0]}", domain=domain, **fields)
        self.nodes.append(node)
        self._enter(node)
        return node

    def remove(self, node: Any) -> None:
        """Take a node out. Something else must make its outputs, or nothing may read them."""
        self.nodes = [entry for entry in self.nodes if entry is not node]
        for name in node.output:
            if self._makers.get(name) is node:
                del self._makers[name]
        for name in node.input:
            self._readers[name] = [entry for entry in self._readers[name] if entry is not node]

    def read_instead(self, node: Any, index: int, name: str) -> None:
        """Let a node read another value."""
        old = node.input[index]
        self._readers[old] = [entry for entry in self._readers[old] if entry is not node]
        node.input[index] = name
        for value in node.input:
            if value == old:
                self._readers[old].append(node)
        self._readers.setdefault(name, []).append(node)

    def save(self, path: Path) -> None:
        """Write the graph, sorted, without what nothing reads.

        Raises:
            FormatError: it could not be written.
        """
        import onnx

        graph = self.model.graph
        nodes = self._needed()
        read = {name for node in nodes for name in _read_by(node)} | set(self.outputs)
        kept = {name: entry for name, entry in self.initializers.items() if name in read}
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        graph.initializer.extend(kept.values())
        made = {name for node in nodes for name in node.output}
        known = [entry for entry in graph.value_info if entry.name in made]
        for entry in nodes:
            del entry.metadata_props[:]  # stack traces, with the paths of the machine that exported
        del graph.value_info[:]
        graph.value_info.extend(known)
        large = self.external or sum(entry.ByteSize() for entry in kept.values()) > _LARGEST_MESSAGE
        data = path.with_name(path.name + ".data")
        try:
            data.unlink(missing_ok=True)
            if large:
                onnx.save(self.model, path, save_as_external_data=True, location=data.name, size_threshold=1024)
            else:
                onnx.save(self.model, path)
        except OSError as error:
            raise FormatError(f"{path} could not be written: {error}") from None

    def _needed(self) -> list[Any]:
        """Return the nodes that lead to an output, each behind what it reads."""
        order: list[Any] = []
        done: set[int] = set()
        stack = [(self._makers[name], False) for name in reversed(self.outputs) if name in self._makers]
        while stack:
            node, behind = stack.pop()
            if behind:
                order.append(node)
            elif id(node) not in done:
                done.add(id(node))
                stack.append((node, True))
                makers = (self._makers.get(name) for name in _read_by(node))
                stack.extend((maker, False) for maker in makers if maker is not None and id(maker) not in done)
        return order


def standard(node: Any) -> bool:
    """Whether a node's operator is one of ONNX itself."""
    return node.domain in ("", "ai.onnx")


def attributes(node: Any) -> Mapping[str, Any]:
    """Return a node's settings by name, texts as text."""
    import onnx

    found = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def _inner_graphs(node: Any) -> Iterator[Any]:
    for entry in node.attribute:
        if entry.HasField("g"):
            yield entry.g
        yield from entry.graphs


def _read_by(node: Any) -> Iterator[str]:
    """What a node reads, the graphs inside it included."""
    yield from (name for name in node.input if name)
    for graph in _inner_graphs(node):
        for inner in graph.node:
            yield from _read_by(inner)
        yield from (entry.name for entry in graph.output)


def _is_external(path: Path) -> bool:
    import onnx

    model = onnx.load(path, load_external_data=False)
    return any(entry.data_location == onnx.TensorProto.EXTERNAL for entry in model.graph.initializer)
