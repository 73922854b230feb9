"""Where do the rows of a tensor come from? Padding is followed through a forward pass while it runs.

Every tensor that is computed from the batch carries its *origin*: which inputs it stands for, and which of its elements
stand at a padded position. A layer's output stands where its first argument stood, an attention's where its queries
did, a sum's where its parts did; an operation that only moves elements moves their padding with them. So tokens that a
router sends to an expert, frames of sound, and texts with images between them are recognised by where they came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from secateur.calibration._decisions import tensors
from secateur.calibration._labels import (
    CONVOLUTIONS,
    NEUTRAL,
    PADDED,
    POOLS,
    einsum_of,
    either_of,
    expanded,
    framed,
    neutral,
    reduced,
    together,
    varies,
)


@dataclass(frozen=True)
class Origin:
    """What a tensor stands for.

    Args:
        inputs: the inputs of the batch, by index.
        padded: uint8 in the tensor's shape, mostly a view without memory of its own: ``REAL``, ``PADDED``, or
            ``NEUTRAL`` for an element that no input is behind. None where that is not known.
        gathered: whether its rows were picked by index, so that their order is not that of the input.
    """

    inputs: frozenset[int]
    padded: Tensor | None
    gathered: bool = False


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Functions that only move elements: their first argument, or for some another one that is written into the first.
_MOVES = _names(
    "view view_as reshape reshape_as flatten unflatten ravel transpose swapaxes swapdims permute movedim moveaxis t "
    "T mT H mH squeeze unsqueeze expand expand_as broadcast_to repeat repeat_interleave tile narrow select getitem "
    "index_select gather take_along_dim masked_select split split_with_sizes chunk tensor_split unbind cat concat "
    "concatenate stack hstack vstack dstack roll flip unfold pad diagonal as_strided rot90 take pack_padded_sequence "
    "pad_packed_sequence"
)
_WRITES = {
    "setitem": 2, "index_put": 2, "masked_scatter": 2, "scatter": 3, "scatter_add": 3, "index_copy": 3, "index_add": 3,
    "slice_scatter": 1, "select_scatter": 1,
}  # fmt: skip
_ADDS = frozenset({"index_add", "scatter_add"})
_PICKS = frozenset({"index_select", "gather", "take_along_dim", "masked_select", "take", "roll", "flip"})
_SORTS = frozenset({"sort", "argsort", "msort", "topk", "kthvalue"})
_SCRAMBLES = frozenset({"scatter_reduce", "index_reduce", "put"})
_MOVED_KEYWORDS = frozenset({"input", "tensors", "source", "src", "value", "values"})
# Functions whose result stands where one of their arguments stood, with the number of that argument.
_MIXES = dict.fromkeys(
    _names(
        "linear matmul mm bmm mv rnn_tanh rnn_relu lstm gru bilinear scaled_dot_product_attention grouped_mm scaled_mm "
        "multi_head_attention_forward scaled_dot_product_flash_attention flex_attention einsum"
    ),
    0,
) | {"addmm": 1, "baddbmm": 1, "addbmm": 1, "rmatmul": 1}
_PRODUCTS = frozenset({"matmul", "mm", "bmm", "rmatmul", "einsum"})
_REDUCTIONS = _names(
    "sum mean amax amin max min prod logsumexp norm vector_norm var std any all argmax argmin median nansum "
    "count_nonzero"
)
_NEW = _names(
    "new_zeros new_ones new_full new_empty new_tensor zeros_like ones_like full_like empty_like rand_like randn_like"
)


class Origins(TorchFunctionMode):
    """Follows origins while it is entered. It remembers them between forward passes for as long as the tensors live."""

    def __init__(self) -> None:
        super().__init__()
        self._known = WeakTensorKeyDictionary()  # of origins

    def begin(self, tensor: Tensor, index: int, padded: Tensor) -> None:
        """Say that a tensor is an input of the batch."""
        self._known[tensor] = Origin(frozenset({index}), padded.to(torch.uint8).expand(tensor.shape))

    def of(self, tensor: Tensor) -> Origin | None:
        """Return where a tensor comes from; None for one that comes from no input, or is not known to."""
        found: Origin | None = self._known.get(tensor)
        if found is not None and found.padded is not None and found.padded.shape != tensor.shape:
            return Origin(found.inputs, None, found.gathered)  # the tensor was given another shape in place
        return found

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = _name(func)
        target = args[0] if name == "setitem" else result
        outputs = [
            leaf for leaf in (target if isinstance(target, tuple | list) else [target]) if isinstance(leaf, Tensor)
        ]
        if outputs and name not in _NEW:
            parts = list(tensors(args[0] if name == "deepcopy" else (args, kwargs)))  # its memo is none of its inputs
            if any(part in self._known for part in parts):
                self._follow(name, func, args, kwargs, parts, outputs)
        return result

    def _follow(
        self, name: str, func: Callable[..., Any], args: Any, kwargs: Any, parts: list[Tensor], outputs: list[Tensor]
    ) -> None:
        origins = [(part, origin) for part in parts if (origin := self.of(part)) is not None]
        found: Sequence[Tensor | None]
        if name in _MIXES:
            mixed = self._mixed(name, args, kwargs, outputs)
            if mixed is None:
                return
            (inputs, gathered), found = (mixed[0].inputs, mixed[0].gathered), mixed[1]
        elif name in _MOVES or name in _WRITES:
            moved = [(part, origin) for part, origin in origins if self._is_moved(name, part, args, kwargs)]
            if not moved:
                return
            inputs = frozenset[int]().union(*(origin.inputs for _, origin in moved))
            kept = [origin.gathered for part, origin in moved if name not in _WRITES or part is args[0]]
            gathered = any(kept) or name in _PICKS or (name == "getitem" and _picks(args[1]))
            found = []
            if all(origin.padded is not None for _, origin in moved):
                # Whatever is unusual about the call, the origin is lost then, and not wrong.
                with suppress(RuntimeError, TypeError, IndexError, ValueError, AttributeError):
                    found = self._moved(name, func, args, kwargs)
        else:
            inputs = frozenset[int]().union(*(origin.inputs for _, origin in origins))
            gathered = any(origin.gathered for part, origin in origins if part.ndim == outputs[0].ndim)
            found = [self._beside(name, args, kwargs, origins, output) for output in outputs]
        if len(found) != len(outputs):
            found = [None] * len(outputs)
        for output, padded in zip(outputs, found, strict=True):
            fits = padded is not None and padded.shape == output.shape
            self._known[output] = Origin(inputs, padded if fits else None, gathered)

    def _is_moved(self, name: str, part: Tensor, args: Any, kwargs: Any) -> bool:
        moved = [args[number] for number in (0, _WRITES.get(name, 0)) if number < len(args)]
        moved += [value for key, value in kwargs.items() if key in _MOVED_KEYWORDS]
        return any(part is leaf for leaf in tensors(moved))

    def _moved(self, name: str, func: Callable[..., Any], args: Any, kwargs: Any) -> list[Tensor | None]:
        """Do with the labels what the function does with the elements."""
        writes = name in _WRITES

        def label(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)([label(entry) for entry in value])
            if not isinstance(value, Tensor):
                return value
            origin = self.of(value)
            padded = neutral(value) if origin is None else origin.padded
            if padded is None or not writes:
                return padded
            # Sums of labels must not overflow, and what is written to must be memory of its own.
            return (padded == PADDED if name in _ADDS else padded).to(torch.int32, copy=True).contiguous()

        if name == "setitem" and not isinstance(args[2], Tensor):
            origin = self.of(args[0])
            return [None if origin is None else origin.padded]  # a constant brings no other origin
        numbers = (0, _WRITES.get(name, 0))
        moved = [label(value) if number in numbers else value for number, value in enumerate(args)]
        options = {key: label(value) if key in _MOVED_KEYWORDS else value for key, value in kwargs.items()}
        # Labels lie in memory in another way than the elements that they speak of.
        if name in ("view", "view_as"):
            func = getattr(Tensor, name.replace("view", "reshape"))
        if name == "as_strided":
            layout = torch.empty_strided(args[0].shape, args[0].stride(), dtype=torch.uint8, device=args[0].device)
            moved[0] = layout.copy_(moved[0])
        if name == "pad":
            # Tokens that a model itself adds to a text are padding, too; zeros beside an image or a sound are its edge.
            value = NEUTRAL if args and args[0].is_floating_point() else PADDED
            moved, options = (
                moved[:2],
                {key: options[key] for key in ("input", "pad") if key in options} | {"value": value},
            )
        result = func(*moved, **options)
        if writes:
            written = moved[0] if name == "setitem" else result
            return [(written > 0 if name in _ADDS else written).to(torch.uint8)]
        return list(tensors(result))

    def _mixed(
        self, name: str, args: Any, kwargs: Any, outputs: list[Tensor]
    ) -> tuple[Origin, list[Tensor | None]] | None:
        """Where one argument stood: the inputs of a layer, the queries of an attention."""
        operands = args[1:] if name == "einsum" else args
        if name == "einsum" and len(operands) == 1 and isinstance(operands[0], tuple | list):
            operands = operands[0]
        place, number = 0, _MIXES[name]
        source = operands[number] if number < len(operands) else kwargs.get("query", kwargs.get("input"))
        if isinstance(source, nn.Parameter) and name in _PRODUCTS and len(operands) == 2:
            # A weight times the inputs: the columns of the result stand where those of the inputs did.
            place, source = 1, operands[1 - number]
        origin = self.of(source) if isinstance(source, Tensor) else None
        if origin is None:
            return None
        padded = origin.padded
        if padded is None or not padded.ndim:
            return origin, [None] * len(outputs)
        if name == "einsum":
            return origin, [einsum_of(str(args[0]), place, padded, output) for output in outputs]
        if place and padded.ndim < 2:
            return origin, [None] * len(outputs)
        rows = together(padded, -2 if place else -1, keepdim=True)
        return origin, [expanded(rows, output) for output in outputs]

    def _beside(
        self, name: str, args: Any, kwargs: Any, origins: list[tuple[Tensor, Origin]], output: Tensor
    ) -> Tensor | None:
        """Functions of elements, of rows, and of windows."""
        source, padded = origins[0][0], origins[0][1].padded
        if padded is None or not output.ndim:
            return None
        if name in _SCRAMBLES or (name in _SORTS and varies(name, padded, args, kwargs)):
            return None
        if name in ("embedding", "one_hot"):
            return expanded(padded.unsqueeze(-1), output)
        if name in CONVOLUTIONS or name in POOLS:
            return framed(name, args, kwargs, padded, output)
        if name in _REDUCTIONS and output.shape != source.shape and len(origins) == 1:
            return reduced(args, kwargs, padded, output)
        union = None
        for _, origin in origins:
            label = None if origin.padded is None else expanded(origin.padded, output)
            if label is not None:
                union = label if union is None or union is label else either_of(union, label)
        if union is None and output.shape[:-1] == source.shape[:-1]:
            union = expanded(together(padded, -1, keepdim=True), output)
        return union


def _name(func: Callable[..., Any]) -> str:
    """A function's name without the underscores of methods and of functions that work in place."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", ""))
    return str(name).partition(".")[0].strip("_")


def _picks(index: Any) -> bool:
    """Whether an index picks entries in an order of its own."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(
        isinstance(part, list) or (isinstance(part, Tensor) and (part.ndim > 0 or part.dtype == torch.bool))
        for part in parts
    )
