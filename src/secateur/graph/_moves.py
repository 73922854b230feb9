"""Rules for operations that move entries: labels move as they do."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.graph._labels import Labels, Layer, compressed, reshaped
from secateur.graph._rules import Call, Rule, Tracing, each_layer, fused, stopped, unknown


def _same(trace: Tracing, call: Call) -> None:
    labels = trace.of(call.input)
    if call.name in ("zeros_like", "ones_like", "full_like", "fill", "zero"):
        labels = Labels(labels.layers, uniform=True)
    for output in call.outputs:
        trace.set(output, labels)


def _made(trace: Tracing, call: Call) -> None:
    shape = tuple(call.result.shape)
    # Whoever is computed with it must keep its sizes, and so all must that it is shared by.
    layers = [
        trace.ledger.new(size).reshape([-1 if axis == place else 1 for place in range(len(shape))])
        for axis, size in enumerate(shape)
    ]
    trace.set(call.result, Labels(uniform=True).moved(layers))


def _view(trace: Tracing, call: Call) -> None:
    old, new = tuple(call.input.shape), tuple(call.result.shape)
    if call.input.dtype.itemsize != call.result.dtype.itemsize:  # view(dtype)
        return unknown(trace, call)

    def change(layer: Layer) -> Layer:
        moved, splits = reshaped(layer, old, new)
        if moved.shape != layer.shape and sum(size > 1 for size in new) != sum(size > 1 for size in old):
            trace.ledger.rearranged(layer)
        for axes in splits:
            if sum(moved.shape[axis] > 1 for axis in axes) > 1:
                trace.ledger.grid(moved)
        return moved

    return trace.set(call.result, each_layer(trace.of(call.input), change))


def _permute(trace: Tracing, call: Call) -> None:
    ndim = call.input.ndim
    if call.name.startswith("permute"):
        order = list(call.axes(ndim, "dims"))
    elif call.name.startswith("t_") or call.name in ("t", "numpy_T"):
        order = list(reversed(range(ndim)))
    else:
        order = list(range(ndim))
        first, second = (int(call.given.get(key, place)) % ndim for key, place in (("dim0", -2), ("dim1", -1)))
        order[first], order[second] = second, first
    trace.set(call.result, each_layer(trace.of(call.input), lambda layer: layer.transpose(order)))


def _expand(trace: Tracing, call: Call) -> None:
    added = call.result.ndim - call.input.ndim
    labels = each_layer(trace.of(call.input), lambda layer: layer.reshape((1,) * added + layer.shape))
    trace.set(call.result, labels)


def _squeeze(trace: Tracing, call: Call) -> None:
    old, new = tuple(call.input.shape), tuple(call.result.shape)
    trace.set(call.result, each_layer(trace.of(call.input), lambda layer: reshaped(layer, old, new)[0]))


def _select(trace: Tracing, call: Call) -> None:
    dim = int(call.given["dim"]) % call.input.ndim
    labels = fused(trace, call, trace.of(call.input), [dim], "one of them is selected by its number")
    trace.set(call.result, each_layer(labels, lambda layer: layer.squeeze(dim)))


def _unbind(trace: Tracing, call: Call) -> None:
    dim = int(call.given["dim"]) % call.input.ndim
    labels = fused(trace, call, trace.of(call.input), [dim], "it is taken apart into a fixed number of parts")
    for output in call.outputs:
        trace.set(output, each_layer(labels, lambda layer: layer.squeeze(dim)))


def _slice(trace: Tracing, call: Call) -> None:
    dim = int(call.given["dim"]) % call.input.ndim
    size = call.input.shape[dim]
    begin, end, step = (call.given.get(key) for key in ("start", "end", "step"))
    if call.name == "narrow":
        begin, end = call.given["start"], int(call.given["start"]) + int(call.given["length"])
    begin, end, step = slice(begin, end, step).indices(size)
    _cut(trace, call, dim, [(range(begin, end, step), call.result)])


def _split(trace: Tracing, call: Call) -> None:
    dim = int(call.given["dim"]) % call.input.ndim
    parts, begin = [], 0
    for output in call.outputs:
        parts.append((range(begin, begin + output.shape[dim]), output))
        begin += output.shape[dim]
    _cut(trace, call, dim, parts)


def _cut(trace: Tracing, call: Call, dim: int, parts: list[tuple[range, Tensor]]) -> None:
    """Labels of ranges along a dimension. Where to cut moves with its size, or is a number that somebody keeps."""
    labels, size = trace.of(call.input), call.input.shape[dim]
    for layer in labels.layers:
        if (
            layer.shape[dim] == 1
            or not any(len(part) for part, _ in parts)
            or all(part == range(size) for part, _ in parts)
        ):
            continue
        first = parts[0][0]
        if first.step > 1 and len(first) * first.step == size:  # x[..., ::2]: every part has its share of each step
            grid = layer.reshape((*layer.shape[:dim], len(first), first.step, *layer.shape[dim + 1 :]))
            trace.ledger.unite(grid, grid.min(axis=dim + 1, keepdims=True))
            continue
        ranges = [part for part, _ in parts if len(part)]
        if trace.adapts and len({len(part) for part in ranges}) == 1:
            grid = layer.reshape((*layer.shape[:dim], -1, len(first), *layer.shape[dim + 1 :]))
            trace.ledger.unite(grid, grid.min(axis=dim, keepdims=True))
            continue
        reason = f"a part of fixed size is cut out: {len(ranges[0])} of {size}"
        trace.ledger.cut(layer, dim, ranges, call.operation, reason)
    for part, output in parts:
        rows = np.asarray(part, dtype=np.int64)
        trace.set(
            output,
            labels.moved(layer if layer.shape[dim] == 1 else layer.take(rows, dim) for layer in labels.layers),
        )


def _cat(trace: Tracing, call: Call) -> None:
    tensors = [tensor for tensor in call.tensors if tensor.numel()] or call.tensors
    is_new = "stack" in call.name
    ndim, shape = call.result.ndim, tuple(call.result.shape)
    dim = int(call.given.get("dim") or 0) % ndim
    labels = [trace.of(tensor) for tensor in tensors]
    if is_new:
        labels = [each_layer(side, lambda layer: np.expand_dims(layer, dim)) for side in labels]
    widths = [1 if is_new else tensor.shape[dim] for tensor in tensors]
    plain = [axis for axis in range(ndim) if axis != dim]
    along = [layer for side in labels for layer in side.layers if layer.shape[dim] > 1]
    axes = {axis for layer in along for axis in range(ndim) if layer.shape[axis] > 1}
    core = tuple(shape[axis] if axis in axes else 1 for axis in range(ndim))
    parts: list[Layer] = []
    placed: set[int] = set()
    for side, width in zip(labels, widths, strict=True):
        wanted = tuple(width if axis == dim else core[axis] for axis in range(ndim))
        own = [layer for layer in side.layers if layer.shape[dim] > 1]
        # A part that goes as a whole along that dimension has the same label there, if it has one at all.
        own += [layer for layer in side.layers if any(layer.shape[axis] > 1 for axis in axes)]
        fits = [layer for layer in own if all(n in (1, w) for n, w in zip(layer.shape, wanted, strict=True))]
        placed |= {id(layer) for layer in fits[:1]}
        parts.append(np.broadcast_to(fits[0], wanted) if fits else np.zeros(wanted, np.int64))
    # All other dimensions are as in an elementwise operation.
    left: list[Layer] = [np.concatenate(parts, axis=dim)] if along else []
    reason = "it is joined with values of fixed size"
    for layer in (layer for side in labels for layer in side.layers if layer.shape[dim] == 1):
        lacks = any(not side.uniform and not any(_meet(layer, x, plain) for x in side.layers) for side in labels)
        kept = trace.ledger.hold(layer, plain, call.operation, reason) if lacks else layer
        left += [] if id(layer) in placed and not lacks else [kept]
    weak = all(side.weak for side in labels if side.layers)
    parametric = all(side.parametric for side in labels)
    trace.set(call.result, Labels(parametric=parametric, weak=weak).moved(trace.ledger.merged(left)))


def _meet(a: Layer, b: Layer, axes: list[int]) -> bool:
    return any(a.shape[axis] > 1 and b.shape[axis] > 1 for axis in axes)


def _pad(trace: Tracing, call: Call) -> None:
    amounts = [int(amount) for amount in call.given.get("pad") or call.given["padding"]]
    ndim = call.input.ndim

    def change(layer: Layer) -> Layer:
        for place in range(len(amounts) // 2):
            axis, (before, after) = ndim - 1 - place, amounts[2 * place : 2 * place + 2]
            if layer.shape[axis] > 1 and (before or after):
                # What is added stays, and what is cut off was there.
                cut = [range(layer.shape[axis])]
                trace.ledger.cut(layer, axis, cut, call.operation, "it is padded or cut by fixed numbers")
                layer = layer.take(np.arange(max(0, -before), layer.shape[axis] - max(0, -after)), axis)
                widths = [(max(0, before), max(0, after)) if a == axis else (0, 0) for a in range(ndim)]
                layer = np.pad(layer, widths)
        return layer

    trace.set(call.result, each_layer(trace.of(call.input), change))


def _repeat(trace: Tracing, call: Call) -> None:
    repeats = [int(count) for count in call.given.get("repeats") or call.given["dims"]]
    added = call.result.ndim - call.input.ndim
    repeats = [1] * (call.result.ndim - len(repeats)) + repeats

    def change(layer: Layer) -> Layer:
        layer = layer.reshape((1,) * added + layer.shape)
        return np.tile(layer, [count if size > 1 else 1 for count, size in zip(repeats, layer.shape, strict=True)])

    trace.set(call.result, each_layer(trace.of(call.input), change))


def _unfold(trace: Tracing, call: Call) -> None:
    dim = int(call.given["dimension"]) % max(1, call.input.ndim)
    labels = fused(trace, call, trace.of(call.input), [dim], "windows move along it")
    trace.set(call.result, each_layer(labels, lambda layer: layer[..., None]))


def _im2col(trace: Tracing, call: Call) -> None:
    labels = fused(trace, call, trace.of(call.input), [-2, -1], "windows move along it")
    positions = int(np.prod(call.given["kernel_size"]))
    labels = each_layer(labels, lambda layer: layer.squeeze(-1))
    trace.set(
        call.result,
        each_layer(labels, lambda layer: np.repeat(layer, positions, -2) if layer.shape[-2] > 1 else layer),
    )


def _within(trace: Tracing, call: Call) -> None:
    axes: tuple[int, ...] = (-2, -1) if call.name in ("tril", "triu") else call.axes(call.input.ndim, "dims")
    labels = trace.of(call.input)
    axes = tuple(axis % labels.layers[0].ndim for axis in axes) if labels.layers else ()
    trace.set(call.result, stopped(trace, call, labels, axes, "its order along this dimension matters"))


def _by_doing(trace: Tracing, call: Call) -> None:
    """Move the labels as the operation moves the entries."""
    if call.name == "as_strided" and call.input.shape == call.result.shape:
        trace.set(call.result, trace.of(call.input))
        return
    if call.name == "as_strided":
        unknown(trace, call)
        return
    operation = getattr(torch.ops.aten, call.name)
    given = {key: value for key, value in call.given.items() if not isinstance(value, Tensor)}

    def change(layer: Layer) -> Layer:
        whole = torch.from_numpy(np.ascontiguousarray(np.broadcast_to(layer, tuple(call.input.shape))))
        with torch.utils._python_dispatch._disable_current_modes():
            moved: Any = operation(whole.double(), **given)  # some take no integers
        made = compressed(moved.long().numpy(), range(moved.ndim))
        trace.ledger.grid(made)
        return made

    trace.set(call.result, each_layer(trace.of(call.input), change))


def _look_up(trace: Tracing, call: Call) -> None:
    """Entries are picked by numbers or by a mask, which nobody could correct."""
    labels, ndim = trace.of(call.input), call.input.ndim
    reason = "entries are looked up by their number"
    if call.name in ("index", "_unsafe_index"):
        indices = list(call.given["indices"])
        trace.set(call.result, _indexed(trace, call, labels, indices))
    elif call.name == "masked_select":
        stopped(trace, call, labels, range(ndim), "entries are picked by a mask")
    elif call.name == "embedding":
        labels = stopped(trace, call, labels, [0], reason)
        added = call.result.ndim - 1
        trace.set(call.result, each_layer(labels, lambda layer: layer.reshape((1,) * added + layer.shape[1:])))
    else:
        dim = int(call.given["dim"]) % ndim
        labels = stopped(trace, call, labels, [dim], reason)
        if call.name != "index_select":  # the numbers have a size of their own along all dimensions
            index = trace.of(call.given["index"] if "index" in call.given else call.given["indices"])
            shape = tuple(call.result.shape)
            kept = each_layer(
                labels,
                lambda layer: (
                    layer
                    if all(layer.shape[axis] in (1, shape[axis]) for axis in range(layer.ndim))
                    else trace.ledger.fix(layer, call.operation, reason)
                ),
            )
            labels = Labels(trace.ledger.merged([*kept.layers, *index.layers]))
        trace.set(call.result, labels)
    for tensor in call.tensors[1:]:
        if call.name in ("index", "_unsafe_index", "embedding", "index_select"):
            for layer in trace.of(tensor).layers:
                trace.ledger.fix(layer, call.operation, "it holds the numbers of entries")


def _indexed(trace: Tracing, call: Call, labels: Labels, indices: list[Any]) -> Labels:
    """The labels of ``x[..., numbers, ...]``."""
    spans: list[tuple[int, int]] = []  # of each index, the first of the dimensions that it takes, and how many
    axis = 0
    for index in indices:
        count = index.ndim if isinstance(index, Tensor) and index.dtype == torch.bool else 1
        spans.append((axis, count))
        axis += count
    taken = [
        place for (first, count), index in zip(spans, indices, strict=True) if index is not None
        for place in range(first, first + count)
    ]  # fmt: skip
    labels = stopped(trace, call, labels, taken, "entries are looked up by their number")
    ndim = call.input.ndim
    added = call.result.ndim - (ndim - len(taken))
    together = taken == list(range(taken[0], taken[0] + len(taken))) if taken else True
    place = taken[0] if taken and together else 0

    def change(layer: Layer) -> Layer:
        left = [size for axis, size in enumerate(layer.shape) if axis not in taken]
        before = len([axis for axis in range(place) if axis not in taken])
        return layer.reshape([*left[:before], *[1] * added, *left[before:]])

    return each_layer(labels, change)


_NAMES: dict[Rule, str] = {
    _same: (
        "clone detach alias _to_copy contiguous lift_fresh lift_fresh_copy lift positive detach_copy _conj "
        "resolve_conj native_dropout zeros_like ones_like empty_like full_like rand_like randn_like dropout "
        "fill zero bernoulli is_pinned pin_memory set_data"
    ),
    _made: (
        "full zeros ones empty scalar_tensor new_zeros new_ones new_full new_empty empty_strided new_empty_strided"
    ),
    _view: "view _unsafe_view reshape _reshape_alias view_copy _reshape_copy",
    _permute: "permute transpose t numpy_T mT movedim permute_copy transpose_copy t_copy swapaxes",
    _expand: "expand expand_copy broadcast_to",
    _squeeze: "unsqueeze unsqueeze_copy squeeze squeeze_copy",
    _select: "select select_copy",
    _unbind: "unbind unbind_copy",
    _slice: "slice slice_copy narrow",
    _split: "split split_with_sizes unsafe_split unsafe_split_with_sizes split_copy split_with_sizes_copy",
    _cat: "cat concat stack _stack",
    _pad: (
        "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
        "replication_pad2d replication_pad3d"
    ),
    _repeat: "repeat tile",
    _unfold: "unfold",
    _im2col: "im2col",
    _within: "flip roll rot90 tril triu fft_fft",
    _by_doing: "as_strided pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle diagonal",
    _look_up: "embedding index_select gather take_along_dim index masked_select _unsafe_index",
}
MOVES: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}
