"""Everything in a packed model, as a file has it: taken from a model, or read from a file and checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur._errors import FormatError, RecipeError
from secateur._types import dtype_name
from secateur.formats import UNSCALED_DTYPES, DensePacked, Format, check_sizes, pack
from secateur.nn import PackedAs, linear_of, packed_layers, packed_stacks
from secateur.packing._file import PackedFile
from secateur.packing._history import History, patterns_in, patterns_of
from secateur.packing._measure import machine
from secateur.patterns import SparsityPattern
from secateur.shapes import Facts

# The dtypes of dense weights, and of other tensors that a dtype can be asked for.
DENSE_DTYPES = frozenset({*UNSCALED_DTYPES, torch.float64})
_DTYPES = {dtype_name(dtype): dtype for dtype in DENSE_DTYPES}
_WINDOW = ("kernel_size", "padding", "dilation")  # of a convolution, besides its stride
_LONGEST_PLAN = 10_000  # characters: some 400 routes


@dataclass(frozen=True)
class LayerEntry:
    """All that a packed layer has besides its weight and its bias.

    Args:
        dtype: dtype of the dense weight.
        packed_as: the module that it replaces.
        plan: which route to take for how many input rows, as text.
    """

    dtype: torch.dtype
    packed_as: PackedAs = field(default_factory=PackedAs)
    plan: str = ""


@dataclass(frozen=True)
class StackEntry:
    """What a parameter that is packed as a whole has besides its matrices, each of which is stored as a layer.

    Args:
        parts: names of the matrices, in their order. The layer of each is that of the parameter, a dot, and this.
        stacked: whether they are the matrices of a stack; else they follow on one another in the first dimension.
        transposed: whether the parameter has them as ``[in, out]``.
    """

    parts: tuple[str, ...]
    stacked: bool
    transposed: bool


@dataclass(frozen=True)
class Contents:
    """Everything in a packed model, as a file has it.

    Args:
        layers: packed weights by name.
        entries: what each packed layer has besides its weight.
        tensors: all other tensors by name, biases of packed layers among them.
        modules: for a packed layer with several names, each further name and the first name.
        weights: for packed layers that share a weight, the name of each further one and that of the first.
        tied: for a tensor with several names, each further name and the first name.
        machine: the machine that the plans were measured on.
        model: name of the class, for transformers models.
        absent: names of tensors that the checkpoint had no values for.
        sparse: names among ``layers`` of tensors that are not packed layers but are stored without their zeros, and
            their shapes. They become dense only after the model was found to have a tensor of that shape, because a
            file of a few bytes may claim any shape.
        stacks: parameters whose matrices are among ``layers``, by name.
        shrunk: how the model was made smaller before it was saved.
    """

    layers: Mapping[str, Format]
    entries: Mapping[str, LayerEntry]
    tensors: Mapping[str, Tensor]
    modules: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    absent: tuple[str, ...] = ()
    sparse: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stacks: Mapping[str, StackEntry] = field(default_factory=dict)
    shrunk: Facts = field(default_factory=Facts)

    @property
    def stacked_layers(self) -> set[str]:
        """Names of the layers that are matrices of a parameter."""
        return {f"{name}.{part}" for name, entry in self.stacks.items() for part in entry.parts}

    def metadata(self) -> dict[str, Any]:
        """Return everything but the tensors, as JSON can hold it."""
        entries = {
            name: {
                "dtype": dtype_name(entry.dtype),
                "transposed": entry.packed_as.transposed,
                "stride": None if entry.packed_as.stride is None else list(entry.packed_as.stride),
                "plan": entry.plan,
                # a key that files without embeddings do not have, as in 0.1
                **({"embedding": {"padding_idx": entry.packed_as.padding_idx}} if entry.packed_as.embedding else {}),
            }
            | {  # keys that a pointwise convolution does not have, as in 0.1
                key: list(sizes) for key in _WINDOW if (sizes := getattr(entry.packed_as, key)) is not None
            }
            for name, entry in self.entries.items()
        }
        same = {name: dict(getattr(self, name)) for name in ("modules", "weights", "tied", "machine")}
        sparse = {name: list(shape) for name, shape in self.sparse.items()}
        # "kinds" is the key of version 1 of the file.
        found = {"kinds": entries, **same, "model": self.model, "absent": list(self.absent), "sparse": sparse}
        if self.stacks:  # a key that files without stacks do not have, as in 0.1
            found["stacks"] = {
                name: {"parts": list(entry.parts), "stacked": entry.stacked, "transposed": entry.transposed}
                for name, entry in self.stacks.items()
            }
        if self.shrunk:
            found["shrunk"] = self.shrunk.to_dict()
        return found

    @classmethod
    def of(cls, file: PackedFile) -> Contents:
        """Return the contents of a file, after checking its metadata.

        Raises:
            FormatError: the metadata is not that of a packed model.
        """
        table = file.metadata
        layers, tensors = dict(file.layers), dict(file.tensors)
        try:
            sparse = {name: tuple(shape) for name, shape in dict(table.get("sparse", {})).items()}
            for name, shape in sparse.items():
                if name in tensors:
                    raise ValueError(f"the tensor {name} is there twice")
                check_sizes(shape)
                if len(shape) < 2 or (shape[0], math.prod(shape[1:])) != layers[name].shape:
                    raise ValueError(f"the tensor {name} has the shape {shape}, but is stored as {layers[name].shape}")
            texts = {key: dict(table.get(key, {})) for key in ("modules", "weights", "tied", "machine")}
            of = {**{name: name for name in layers if name not in sparse}, **texts["weights"]}
            entries = {n: _entry(table.get("kinds", {}).get(n), layers[first]) for n, first in of.items()}
            stacks = {name: _stack_entry(name, e, entries) for name, e in dict(table.get("stacks", {})).items()}
            model, absent = table.get("model", ""), table.get("absent", [])
            if not all(isinstance(text, str) for named in texts.values() for text in named.values()):
                raise TypeError("names should be str")
            if not isinstance(model, str) or not all(isinstance(name, str) for name in absent):
                raise TypeError("names should be str")
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise FormatError(f"the metadata is not that of a packed model: {error!s:.500}.") from None
        shrunk = Facts.from_dict(table["shrunk"]) if "shrunk" in table else Facts()
        all_tensors = {**tensors, **sparse}
        for key, known in (
            ("modules", {**entries, **stacks}),
            ("weights", layers.keys() - sparse),
            ("tied", all_tensors),
        ):
            for name, first in texts[key].items():
                if first not in known or name in known:
                    raise FormatError(
                        f"the metadata says that {name!r:.200} is another name of {first!r:.200}, but the latter is "
                        "missing or the former is stored, too."
                    )
        return cls(
            layers,
            entries,
            tensors,
            modules=texts["modules"],
            weights=texts["weights"],
            tied=texts["tied"],
            machine=texts["machine"],
            model=model,
            absent=tuple(absent),
            sparse=sparse,
            stacks=stacks,
            shrunk=shrunk,
        )


def _stack_entry(name: str, table: Any, entries: Mapping[str, LayerEntry]) -> StackEntry:
    parts, stacked, transposed = table["parts"], table["stacked"], table["transposed"]
    if table.keys() != {"parts", "stacked", "transposed"} or not isinstance(parts, list) or not parts:
        raise ValueError(f"the stack {name:.200} should have parts, stacked and transposed")
    if not isinstance(stacked, bool) or not isinstance(transposed, bool) or not all(type(p) is str for p in parts):
        raise TypeError(f"the stack {name:.200} should have str as parts, and bools")
    if len(set(parts)) < len(parts) or any(not part or "." in part for part in parts):
        raise ValueError(f"the parts of the stack {name:.200} should have different names without dots")
    for part in parts:
        if entries[f"{name}.{part}"].packed_as != PackedAs():
            raise ValueError(f"part {part:.200} of the stack {name:.200} should be a plain matrix")
    return StackEntry(tuple(parts), stacked, transposed)


def in_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a floating-point tensor in a dtype; None for its own. float8 stays as it is: its scale is elsewhere."""
    return tensor if dtype is None or tensor.dtype not in DENSE_DTYPES else tensor.to(dtype)


def _entry(table: Any, packed: Format) -> LayerEntry:
    if table is None:  # write_packed was called without a model
        return LayerEntry(packed.dense_dtype)
    stride, transposed, plan = table["stride"], table["transposed"], table["plan"]
    if stride is not None:
        stride = tuple(stride)
        if len(stride) not in (1, 2) or any(type(step) is not int or not 0 < step < 2**31 for step in stride):
            raise ValueError(f"the stride {stride} should be one or two numbers above 0")
        if transposed:
            raise ValueError("a transposed linear layer has no stride")
    window: dict[str, Any] = {key: tuple(table[key]) for key in _WINDOW if key in table}
    for key, sizes in window.items():
        least = 0 if key == "padding" else 1
        if stride is None or len(sizes) != len(stride):
            raise ValueError(f"the {key} {sizes!s:.100} should have one number for each of the stride")
        if any(type(size) is not int or not least <= size < 2**31 for size in sizes):
            raise ValueError(f"the {key} {sizes!s:.100} should be numbers from {least} on")
    if packed.shape[1] % math.prod(window.get("kernel_size", ())):
        raise ValueError(f"the kernel {window['kernel_size']} does not divide a row of {packed.shape[1]} weights")
    if not isinstance(transposed, bool) or not isinstance(plan, str) or len(plan) > _LONGEST_PLAN:
        raise TypeError(f"transposed should be a bool and plan a str of up to {_LONGEST_PLAN} characters")
    packed_as = PackedAs(transposed, stride, **window)
    if (embedding := table.get("embedding")) is not None:
        packed_as = PackedAs(embedding=True, padding_idx=embedding["padding_idx"])
        if transposed or stride is not None or not isinstance(packed, DensePacked) or packed.value_dtype != torch.int8:
            raise ValueError("an embedding should be stored as whole rows of int8, without a stride")
        if (
            type(packed_as.padding_idx) not in (int, type(None))
            or not 0 <= (packed_as.padding_idx or 0) < packed.shape[0]
        ):
            raise ValueError(
                f"the padding row {packed_as.padding_idx!r:.40} should be one of the {packed.shape[0]} rows"
            )
    return LayerEntry(_DTYPES[table["dtype"]], packed_as, plan)


def take_apart(
    model: nn.Module, dtype: torch.dtype | None, absent: Iterable[str] = (), history: History = ()
) -> Contents:
    """Return the contents of a model: packed layers, other tensors, and which of them are shared.

    Args:
        model: the model, with or without packed layers.
        dtype: floating-point dtype of all tensors that are not packed weights; None for their own.
        absent: names of tensors that are not stored.
        history: reports of how layers were pruned, whose patterns are used.

    Raises:
        RecipeError: the model is itself a packed layer.
        FormatError: a module has state that is not a tensor.
    """
    layers: dict[str, Format] = {}
    entries: dict[str, LayerEntry] = {}
    tensors: dict[str, Tensor] = {}
    modules: dict[str, str] = {}
    weights: dict[str, str] = {}
    by_module: dict[int, str] = {}
    by_weight: dict[int, str] = {}
    own: set[str] = set()  # keys of the state of packed layers
    for name, module in packed_layers(model).items():
        inner = linear_of(module)
        prefix = f"{name}." if name else ""
        prefix += "linear." if inner is not module else ""
        own |= {prefix + key for key in (*inner.names, "bias")}
        if (first := by_module.setdefault(id(module), name)) != name:
            modules[name] = first
            continue
        packed_as = PackedAs.of(module)
        assert packed_as is not None
        entries[name] = LayerEntry(dtype or inner.weight_dtype, packed_as, str(inner.plan))
        if inner.bias is not None:
            tensors[f"{name}.bias"] = inner.bias
        if (first := by_weight.setdefault(id(inner.values), name)) != name:
            weights[name] = first
        else:
            layers[name] = inner.packed
    stacks: dict[str, StackEntry] = {}
    for name, stack in packed_stacks(model).items():
        own |= {f"{name}.{part}.{key}" for part, inner in stack.parts.items() for key in (*inner.names, "bias")}
        if (first := by_module.setdefault(id(stack), name)) != name:
            modules[name] = first
            continue
        stacks[name] = StackEntry(tuple(stack.parts), stack.stacked, stack.transposed)
        for part, inner in stack.parts.items():
            where = f"{name}.{part}"
            entries[where] = LayerEntry(dtype or inner.weight_dtype, PackedAs(), str(inner.plan))
            if (first := by_weight.setdefault(id(inner.values), where)) != where:
                weights[where] = first
            else:
                layers[where] = inner.packed
    if "" in entries:
        raise RecipeError(
            "the model is a bare packed layer, which has no name to be stored under. Put it into a module."
        )
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if name in own or name in absent:
            continue
        if not isinstance(tensor, Tensor) or name.rpartition(".")[2] == "_extra_state":
            raise FormatError(
                f"{name}: the extra state of a module is no parameter or buffer and cannot be stored. Remove it first."
            )
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        if (first := seen.setdefault(place, name)) != name:
            tied[name] = first
        else:
            tensors[name] = tensor
    tensors = {name: in_dtype(tensor, dtype) for name, tensor in tensors.items()}
    known = patterns_in(history)
    smaller = {name: _without_zeros(tensor, known.get(name.rpartition(".")[0])) for name, tensor in tensors.items()}
    sparse = {name: packed for name, packed in smaller.items() if packed is not None}
    shapes = {name: tuple(tensors.pop(name).shape) for name in sparse}
    name = type(model).__name__
    absent = tuple(sorted(absent))
    return Contents(layers | sparse, entries, tensors, modules, weights, tied, machine(), name, absent, shapes, stacks)


def _without_zeros(tensor: Tensor, pattern: SparsityPattern | None) -> Format | None:
    """A dense weight, packed only to be stored; None where this would not make it smaller."""
    if tensor.ndim < 2 or tensor.dtype not in UNSCALED_DTYPES or not tensor.numel():
        return None
    matrix = tensor.detach().cpu().flatten(1)
    if not (matrix == 0).any():
        return None
    packed = pack(matrix, None, patterns_of(matrix, pattern)[0])
    return packed if packed.nbytes < matrix.nbytes else None
