"""Where do the rows of a tensor come from? Padding is followed through a forward pass while it runs.

Every tensor that is computed from the batch carries its *origin*: which inputs it stands for, and which of its elements
stand at a padded position. A layer's output stands where its first argument stood, an attention's where its queries
did, a sum's where its parts did; an operation that only moves elements moves their padding with them. So tokens that a
router sends to an expert, frames of sound, and texts with images between them are all recognised by where they came from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary


REAL, PADDED, NEUTRAL = 0, 1, 2  # in this order, so that a minimum says what several elements together stand for


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


# Functions that only move elements. The number of the argument that is moved, and of another that is written into it.
_MOVES = dict.fromkeys(
    "view view_as reshape reshape_as flatten unflatten ravel transpose swapaxes swapdims permute movedim moveaxis t "
    "T mT H mH squeeze unsqueeze expand expand_as broadcast_to repeat repeat_interleave tile narrow select getitem "
    "index_select gather take_along_dim masked_select split split_with_sizes chunk tensor_split unbind cat concat "
    "concatenate stack hstack vstack dstack roll flip unfold pad diagonal as_strided rot90 pack_padded_sequence "
    "pad_packed_sequence".split(),
    (0,),
)
_WRITES = {
    "setitem": (0, 2), "index_put": (0, 2), "masked_scatter": (0, 2), "scatter": (0, 3), "scatter_add": (0, 3),
    "index_copy": (0, 3), "index_add": (0, 3), "slice_scatter": (0, 1), "select_scatter": (0, 1),
}  # fmt: skip
_PICKS = frozenset({"index_select", "gather", "take_along_dim", "masked_select", "roll", "flip"})
_ADDS = frozenset({"index_add", "scatter_add"})
_DATA_KEYWORDS = frozenset({"input", "tensors", "source", "src", "value", "values"})
# Functions whose result stands where one of their arguments stood, with the number of that argument.
_MIXES = dict.fromkeys(
    "linear matmul mm bmm mv rnn_tanh rnn_relu lstm gru bilinear scaled_dot_product_attention grouped_mm scaled_mm "
    "multi_head_attention_forward scaled_dot_product_flash_attention flex_attention".split(),
    0,
) | {"addmm": 1, "baddbmm": 1, "addbmm": 1, "rmatmul": 1, "einsum": 1}
_REDUCTIONS = frozenset(
    "sum mean amax amin max min prod logsumexp norm vector_norm var std any all argmax argmin median nansum "
    "count_nonzero".split()
)
_POOLS = frozenset({"avg_pool1d", "avg_pool2d", "max_pool1d", "max_pool2d"})
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
_NEW = frozenset(
    "new_zeros new_ones new_full new_empty new_tensor zeros_like ones_like full_like empty_like rand_like "
    "randn_like".split()
)


class Origins(TorchFunctionMode):
    """Follows origins while it is entered. It remembers them between forward passes for as long as the tensors live."""

    def __init__(self) -> None:
        super().__init__()
        self._known: WeakTensorKeyDictionary[Origin] = WeakTensorKeyDictionary()

    def begin(self, tensor: Tensor, index: int, padded: Tensor) -> None:
        """Say that a tensor is an input of the batch."""
        self._known[tensor] = Origin(frozenset({index}), padded.to(torch.uint8).expand(tensor.shape))

    def of(self, tensor: Tensor) -> Origin | None:
        """Return where a tensor comes from; None for one that comes from no input, or is not known to."""
        found = self._known.get(tensor)
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
        outputs = [leaf for leaf in (target if isinstance(target, tuple | list) else [target]) if isinstance(leaf, Tensor)]
        if outputs and name not in _NEW:
            parts = list(_tensors(args[0] if name == "deepcopy" else (args, kwargs)))  # its memo is none of its inputs
            if any(part in self._known for part in parts):
                self._follow(name, func, args, kwargs, parts, outputs)
        return result

    def _follow(
        self, name: str, func: Callable[..., Any], args: Any, kwargs: Any, parts: list[Tensor], outputs: list[Tensor]
    ) -> None:
        origins = [(part, origin) for part in parts if (origin := self.of(part)) is not None]
        found: list[Tensor | None] | None
        gathered = any(origin.gathered for part, origin in origins if part.ndim == outputs[0].ndim)
        if name in _MIXES:
            source, origin, padded = self._mixed(name, args, kwargs)
            if origin is None:
                return
            inputs, gathered = origin.inputs, origin.gathered
            found = [padded(output) for output in outputs]
        elif name in _MOVES or name in _WRITES:
            moved = [(part, origin) for part, origin in origins if self._is_moved(name, part, args, kwargs)]
            if not moved:
                return
            inputs = frozenset().union(*(origin.inputs for _, origin in moved))
            if name in _WRITES:
                gathered = any(origin.gathered for part, origin in moved if part is args[0])
            else:
                gathered = gathered or name in _PICKS or (name == "getitem" and any(True for _ in _indices(args[1])))
            found = None
            if all(origin.padded is not None for _, origin in moved):
                # Whatever is unusual about the call, the origin is lost then, and not wrong.
                with contextlib.suppress(RuntimeError, TypeError, IndexError, ValueError, AttributeError):
                    found = self._moved(name, func, args, kwargs)
        else:
            inputs = frozenset().union(*(origin.inputs for _, origin in origins))
            found = [self._beside(name, args, kwargs, origins, output) for output in outputs]
        found = found if found is not None and len(found) == len(outputs) else [None] * len(outputs)
        for output, padded_output in zip(outputs, found, strict=True):
            fits = padded_output is not None and padded_output.shape == output.shape
            self._known[output] = Origin(inputs, padded_output if fits else None, gathered)

    # Functions that move elements.

    def _is_moved(self, name: str, part: Tensor, args: Any, kwargs: Any) -> bool:
        numbers = _MOVES.get(name) or _WRITES[name]
        data = [args[number] for number in numbers if number < len(args)]
        data += [value for key, value in kwargs.items() if key in _DATA_KEYWORDS]
        return any(part is leaf for leaf in _tensors(data))

    def _moved(self, name: str, func: Callable[..., Any], args: Any, kwargs: Any) -> list[Tensor | None]:
        numbers = _MOVES.get(name) or _WRITES[name]
        writes = name in _WRITES

        def label(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)([label(entry) for entry in value])
            if not isinstance(value, Tensor):
                return value
            origin = self.of(value)
            padded = _neutral(value) if origin is None else origin.padded
            if padded is None or not writes:
                return padded
            # Sums of labels must not overflow, and what is written to must be memory of its own.
            return (padded == PADDED if name in _ADDS else padded).to(torch.int32, copy=True).contiguous()

        if writes and name == "setitem" and not isinstance(args[2], Tensor):
            origin = self.of(args[0])
            return [None if origin is None else origin.padded]  # a constant brings no other origin
        moved_args = [label(value) if number in numbers else value for number, value in enumerate(args)]
        moved_kwargs = {key: label(value) if key in _DATA_KEYWORDS else value for key, value in kwargs.items()}
        # Labels lie in memory in another way than the elements that they speak of.
        func = {"view": Tensor.reshape, "view_as": Tensor.reshape_as}.get(name, func)
        if name == "as_strided":
            moved_args[0] = torch.empty_strided(args[0].shape, args[0].stride(), dtype=torch.uint8, device=args[0].device).copy_(
                moved_args[0]
            )
        if name == "pad":
            # Tokens that a model itself adds to a text are padding, too; zeros beside an image or a sound are its edge.
            ids = not args[0].is_floating_point() if args else False
            moved_args = moved_args[:2]
            moved_kwargs = {key: value for key, value in moved_kwargs.items() if key in ("input", "pad")}
            moved_kwargs["value"] = PADDED if ids else NEUTRAL
        result = func(*moved_args, **moved_kwargs)
        if writes:
            written = moved_args[0] if name == "setitem" else result
            return [(written > 0 if name in _ADDS else written).to(torch.uint8)]
        results = result if isinstance(result, tuple | list) else [result]
        return [leaf for leaf in results if isinstance(leaf, Tensor)]

    # Functions whose result stands where one argument stood.

    def _mixed(
        self, name: str, args: Any, kwargs: Any
    ) -> tuple[Tensor | None, Origin | None, Callable[[Tensor], Tensor | None]]:
        number = _MIXES[name]
        operands = args[1:] if name == "einsum" else args
        if name == "einsum" and len(operands) == 1 and isinstance(operands[0], tuple | list):
            operands = operands[0]
        if name == "einsum":
            number = 0
        first = operands[number] if number < len(operands) else kwargs.get("query", kwargs.get("input"))
        other = None
        if isinstance(first, nn.Parameter) and name in ("matmul", "mm", "bmm", "rmatmul", "einsum"):
            # A weight times the inputs: the columns of the result stand where those of the inputs did.
            other = operands[1 - number] if len(operands) == 2 else None
        source = other if isinstance(other, Tensor) else first
        origin = self.of(source) if isinstance(source, Tensor) else None
        if origin is None:
            return None, None, lambda output: None
        padded = origin.padded
        if padded is None:
            return source, origin, lambda output: None
        if name == "einsum":
            place = 0 if source is first else 1
            return source, origin, lambda output: _einsum(str(args[0]), place, padded, output)
        if other is not None:
            return source, origin, lambda output: _expanded(together(padded, -2, keepdim=True), output)
        return source, origin, lambda output: _expanded(together(padded, -1, keepdim=True), output) if padded.ndim else None

    # Everything else: functions of elements, of rows, and of windows.

    def _beside(
        self, name: str, args: Any, kwargs: Any, origins: list[tuple[Tensor, Origin]], output: Tensor
    ) -> Tensor | None:
        source, padded = origins[0][0], origins[0][1].padded
        if padded is None or not output.ndim:
            return None
        if name in ("embedding", "one_hot"):
            return _expanded(padded.unsqueeze(-1), output)
        if name in _CONVOLUTIONS or name in _POOLS:
            return _expanded_frames(name, args, kwargs, padded, output)
        if name in _REDUCTIONS and output.shape != source.shape and len(origins) == 1:
            return _reduced(args, kwargs, padded, output)
        union = None
        for _, origin in origins:
            label = None if origin.padded is None else _expanded(origin.padded, output)
            if label is not None:
                union = label if union is None or union is label else _either(union, label)
        if union is None and output.shape[:-1] == source.shape[:-1]:
            union = _expanded(together(padded, -1, keepdim=True), output)
        return union


def _name(func: Callable[..., Any]) -> str:
    """A function's name without the underscores of methods and of functions that work in place."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return str(getattr(getattr(func, "__self__", None), "__name__", ""))
    return str(name).partition(".")[0].strip("_")


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for entry in tree:
            yield from _tensors(entry)
    elif isinstance(tree, dict):
        for entry in tree.values():
            yield from _tensors(entry)


def _indices(index: Any) -> Iterator[Any]:
    """The parts of an index that pick entries in an order of their own."""
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, list) or (isinstance(part, Tensor) and (part.ndim or part.dtype == torch.bool)):
            yield part


def _neutral(tensor: Tensor) -> Tensor:
    return torch.full((), NEUTRAL, dtype=torch.uint8, device=tensor.device).expand(tensor.shape)


def together(padded: Tensor, dims: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    """What all elements along some dimensions together stand for: padding only if none of them is real."""
    for dim in (dims,) if isinstance(dims, int) else dims:
        if padded.shape[dim] and not padded.stride(dim):
            padded = padded.narrow(dim, 0, 1)  # all alike
    if padded.numel():
        return padded.amin(dims, keepdim=keepdim)
    return padded.sum(dims, keepdim=keepdim).to(torch.uint8)


def _expanded(padded: Tensor, output: Tensor) -> Tensor | None:
    """The label in the shape of an output, if it can be broadcast to it. A dimension in which all are alike fits any."""
    if padded.ndim > output.ndim:
        return None
    if padded.ndim == output.ndim:
        for dim in range(padded.ndim):
            if padded.shape[dim] and not padded.stride(dim):
                padded = padded.narrow(dim, 0, 1)
    pairs = zip(reversed(padded.shape), reversed(output.shape), strict=False)
    return padded.expand(output.shape) if all(size in (1, wanted) for size, wanted in pairs) else None


def _either(a: Tensor, b: Tensor) -> Tensor:
    """Union of two labels of one shape; memory is only taken for the dimensions in which one of them varies."""
    index = tuple(
        slice(0, 1) if not (stride_a or stride_b) else slice(None)
        for stride_a, stride_b in zip(a.stride(), b.stride(), strict=True)
    )
    a_part, b_part = a[index], b[index]
    either = torch.where(a_part == NEUTRAL, b_part, torch.where(b_part == NEUTRAL, a_part, a_part | b_part))
    return either.expand(a.shape)


def _reduced(args: Any, kwargs: Any, padded: Tensor, output: Tensor) -> Tensor | None:
    """A sum over positions stands at a padded one only if all its parts do."""
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if isinstance(dims, int) and not isinstance(dims, bool):
        dims = (dims,)
    if not isinstance(dims, tuple | list) or not all(isinstance(dim, int) for dim in dims):
        return None
    return together(padded, tuple(dims), keepdim=output.ndim == padded.ndim)


def _einsum(equation: str, place: int, padded: Tensor, output: Tensor) -> Tensor | None:
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or place >= len(terms) or len(set(terms[place])) != len(terms[place]):
        return None
    letters = terms[place]
    gone = tuple(number for number, letter in enumerate(letters) if letter not in right)
    label = together(padded, gone) if gone else padded
    kept = [letter for letter in letters if letter in right]
    label = label.permute([kept.index(letter) for letter in right if letter in kept])
    for number, letter in enumerate(right):
        if letter not in kept:
            label = label.unsqueeze(number)
    return _expanded(label, output)


def _expanded_frames(name: str, args: Any, kwargs: Any, padded: Tensor, output: Tensor) -> Tensor | None:
    given = {"stride": None, "padding": 0, "dilation": 1}
    if name in _CONVOLUTIONS:
        kernel = tuple(args[1].shape[2:]) if len(args) > 1 else tuple(kwargs["weight"].shape[2:])
        given["stride"] = 1
        names = ("stride", "padding", "dilation")
        values = dict(zip(names, args[3:6], strict=False))
    else:
        kernel = args[1] if len(args) > 1 else kwargs["kernel_size"]
        names = ("stride", "padding", "dilation" if name.startswith("max") else "ceil_mode")
        values = dict(zip(names, args[2:5], strict=False))
    values |= {key: value for key, value in kwargs.items() if key in given}
    space = int(name[-2])
    shape = _each(kernel, space)
    options = given | {key: value for key, value in values.items() if key in given and value is not None}
    label = frames(padded, shape, options["stride"] or shape, options["padding"], options["dilation"])
    return None if label is None else _expanded(label, output)


def frames(padded: Tensor, kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> Tensor | None:
    """Which of a convolution's frames are padding, of inputs ``[batch, channels, *positions]``: ``[batch, 1, *frames]``.

    A frame is real if it would be there without the padding. A frame at every position stands at that position.
    """
    space = len(kernel)
    strides, dilations = _each(stride, space), _each(dilation, space)
    reach = [dilation * (size - 1) for size, dilation in zip(kernel, dilations, strict=True)]
    if padding == "same":
        pads = [(size + 1) // 2 for size in reach]
    else:
        pads = list(_each(0 if padding == "valid" else padding, space))
    label = (together(padded, -space - 1, keepdim=True) == PADDED).to(torch.uint8)
    for axis in range(-space, 0):
        length, pad = label.shape[axis], pads[axis]
        count = length if padding == "same" else (length + 2 * pad - reach[axis] - 1) // strides[axis] + 1
        if count < 1:
            return None
        if strides[axis] == 1 and pad:
            positions = torch.arange(count, device=label.device).clamp(max=length - 1)
            label = label.index_select(axis, positions)
            continue
        label = label.movedim(axis, -1)
        if pad:  # as at the true end of a sequence, a frame may reach that far beyond it
            edge = label.new_zeros(*label.shape[:-1], pad)
            real = torch.cat([edge, 1 - label, edge], -1)
            real = torch.cat([edge, real, edge], -1).unfold(-1, 2 * pad + 1, 1).amax(-1)
            label = 1 - real
        windows = label.unfold(-1, reach[axis] + 1, strides[axis])[..., :: dilations[axis]]
        label = windows.amax(-1).movedim(-1, axis)
    return label


def _each(value: Any, space: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, tuple | list | torch.Size) else (value,)
    return values * space if len(values) == 1 else values


def frames_of(padded: Tensor, module: nn.Module) -> Tensor | None:
    """Which of the rows that a convolution reads are padding, in one dimension and in their order."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    label = frames(padded, module.kernel_size, module.stride, module.padding, module.dilation)
    return None if label is None else label.reshape(-1)
