"""Rules for operations that combine entries: products, attention, norms, sums, and writing into a tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from secateur.graph._labels import Labels, Layer
from secateur.graph._rules import (
    Call,
    Rule,
    Tracing,
    combined,
    each_layer,
    fused,
    held,
    pairs_of,
    pointwise,
    stopped,
    unknown,
)

# The axes of a product: matrices, rows of the first factor, what is summed over, columns of the second.
_BATCH, _ROWS, _SUM, _COLUMNS = range(4)
_FIXED_FACTOR = "it is multiplied by values of fixed size"


def _product(
    trace: Tracing, call: Call, a: Labels, b: Labels, a_shape: Sequence[int], b_shape: Sequence[int]
) -> Labels:
    """Return the labels of a product, on the four axes. A factor that lacks one has it with size 1."""
    ledger = trace.ledger
    sides = [list(a.layers), list(b.layers)]
    for own, other, labels, shape in ((0, 1, b, b_shape), (1, 0, a, a_shape)):
        if shape[_BATCH] > 1 and not labels.uniform and not any(x.shape[_BATCH] > 1 for x in sides[other]):
            left = [ledger.fuse(layer, [_BATCH], call.operation, _FIXED_FACTOR) for layer in sides[own]]
            sides[own] = [layer for layer in left if layer.size > 1]
    for first in sides[0]:
        for second in sides[1]:
            if first.shape[_BATCH] > 1 and second.shape[_BATCH] > 1:
                ledger.unite(first, second)
    summed = [[layer for layer in side if layer.shape[_SUM] > 1] for side in sides]
    rest = [[layer for layer in side if layer.shape[_SUM] == 1] for side in sides]
    by_batch = all(any(layer.shape[_BATCH] > 1 for layer in side) for side in sides)
    if by_batch and not (a.parametric or b.parametric):  # a product for each head, as of queries and keys
        for layer in (*sides[0], *sides[1]):
            ledger.attends(layer)
    if all(summed):
        is_weight = (a.parametric or b.parametric) and not (
            by_batch and any(layer.shape[_BATCH] > 1 for layer in (*summed[0], *summed[1]))
        )
        if is_weight:
            for first in summed[0]:
                for second in summed[1]:
                    ledger.unite(first, second)
            for layer in summed[1] if b.parametric else summed[0]:
                ledger.reads(layer)
        else:
            reason = "two computed tensors are multiplied along it"
            left_over = [[ledger.fuse(layer, [_SUM], call.operation, reason) for layer in side] for side in summed]
            for first in left_over[0]:
                for second in left_over[1]:
                    if any(x > 1 and y > 1 for x, y in zip(first.shape, second.shape, strict=True)):
                        ledger.unite(first, second)
            rest = [[*rest[0], *left_over[0]], [*rest[1], *left_over[1]]]
    else:
        for index in (0, 1):
            for layer in summed[index]:
                rest[index].append(ledger.fuse(layer, [_SUM], call.operation, _FIXED_FACTOR))
    weak = all(labels.weak for labels in (a, b) if labels.layers)
    return Labels(ledger.merged([*rest[0], *rest[1]]), weak=weak)


def _on(axes: tuple[int, ...], labels: Labels) -> Labels:
    """Labels of a factor on the four axes of a product, given which of them its own are."""

    def change(layer: Layer) -> Layer:
        shape = [1] * 4
        for axis, size in zip(axes, layer.shape, strict=True):
            shape[axis] = size
        order = sorted(range(len(axes)), key=lambda place: axes[place])
        return layer.transpose(order).reshape(shape)

    return each_layer(labels, change)


def _sizes(axes: tuple[int, ...], tensor: Tensor) -> list[int]:
    shape = [1] * 4
    for axis, size in zip(axes, tensor.shape, strict=True):
        shape[axis] = size
    return shape


def _multiplied(trace: Tracing, call: Call, a: Tensor, b: Tensor) -> Labels:
    """Labels of ``a @ b``, of two or three dimensions each."""
    first = (_ROWS, _SUM) if a.ndim == 2 else (_BATCH, _ROWS, _SUM)
    second = (_SUM, _COLUMNS) if b.ndim == 2 else (_BATCH, _SUM, _COLUMNS)
    made = _product(trace, call, _on(first, trace.of(a)), _on(second, trace.of(b)), _sizes(first, a), _sizes(second, b))
    is_batched = a.ndim == 3 or b.ndim == 3
    return each_layer(made, lambda layer: layer.squeeze(_SUM) if is_batched else layer.squeeze((_BATCH, _SUM)))


def _matmul(trace: Tracing, call: Call) -> None:
    a, b = call.tensors[:2]
    trace.set(call.result, _multiplied(trace, call, a, b))


def _added(trace: Tracing, call: Call) -> None:
    bias, a, b = call.tensors[:3]
    if call.name == "addbmm":
        return unknown(trace, call)
    made = _multiplied(trace, call, a, b)
    shape = tuple(call.result.shape)
    return trace.set(
        call.result, _data(combined(trace, call, [(trace.of(bias), bias.shape), (made, shape)], len(shape)))
    )


def _data(labels: Labels) -> Labels:
    return Labels(labels.layers)


def _vectors(trace: Tracing, call: Call) -> None:
    a, b = call.tensors[:2]
    first = (_ROWS, _SUM) if a.ndim == 2 else (_SUM,)
    made = _product(
        trace, call, _on(first, trace.of(a)), _on((_SUM,), trace.of(b)), _sizes(first, a), _sizes((_SUM,), b)
    )
    if call.result.ndim:
        trace.set(call.result, each_layer(made, lambda layer: layer.squeeze((_BATCH, _SUM, _COLUMNS))))


def _linear(trace: Tracing, call: Call) -> None:
    x, weight, *bias = call.tensors
    rows = int(np.prod(x.shape[:-1]))
    labels = trace.of(x)
    outer = [layer for layer in labels.layers if layer.shape[-1] == 1]
    inner = Labels(tuple(layer for layer in labels.layers if layer.shape[-1] > 1), labels.parametric, labels.uniform)
    flat = fused(trace, call, inner, range(x.ndim - 1), "rows of a linear layer are alike")
    flat = each_layer(flat, lambda layer: layer.reshape(1, -1))
    made = _product(
        trace,
        call,
        _on((_ROWS, _SUM), flat),
        _on((_COLUMNS, _SUM), trace.of(weight)),
        [1, rows, x.shape[-1], 1],
        _sizes((_COLUMNS, _SUM), weight),
    )
    lead = (1,) * (x.ndim - 1)
    made = each_layer(made, lambda layer: layer.reshape((*lead, -1)))
    made = Labels(trace.ledger.merged([*made.layers, *outer]))
    if bias:
        made = combined(trace, call, [(made, call.result.shape), (trace.of(bias[0]), bias[0].shape)], call.result.ndim)
    trace.set(call.result, _data(made))


def _grouped(trace: Tracing, call: Call) -> None:
    """Rows one after the other, each multiplied by one of a stack of matrices."""
    x, stack = call.tensors[:2]
    if x.ndim != 2 or stack.ndim != 3:
        return unknown(trace, call)
    reason = "rows are sent to matrices by their number"
    weight = stopped(trace, call, trace.of(stack), [0], reason)
    weight = each_layer(weight, lambda layer: layer.squeeze(0))
    rows, columns = (_ROWS, _SUM), (_SUM, _COLUMNS)
    shape = [1, 1, stack.shape[1], stack.shape[2]]
    made = _product(trace, call, _on(rows, trace.of(x)), _on(columns, weight), _sizes(rows, x), shape)
    return trace.set(call.result, each_layer(made, lambda layer: layer.squeeze((_BATCH, _SUM))))


def _convolution(trace: Tracing, call: Call) -> None:
    x, weight = call.tensors[:2]
    bias = call.given.get("bias")
    groups = int(call.given.get("groups") or 1)
    out, inner = (1, 0) if call.given.get("transposed") else (0, 1)
    space = range(2, x.ndim)
    labels = fused(trace, call, trace.of(x), [0, *space], "a kernel moves along it")
    labels = each_layer(labels, lambda layer: layer.reshape(-1))
    kernel = stopped(trace, call, trace.of(weight), space, "it is a position of a kernel")
    kernel = each_layer(kernel, lambda layer: layer.reshape(layer.shape[:2]))
    if groups == 1:
        axes = (_COLUMNS, _SUM) if out == 0 else (_SUM, _COLUMNS)
        sizes = [1, 1, weight.shape[inner], weight.shape[out]]
        made = _product(trace, call, _on((_SUM,), labels), _on(axes, kernel), [1, 1, x.shape[1], 1], sizes)
        made = each_layer(made, lambda layer: layer.reshape(-1))
    else:
        made = _in_groups(trace, call, labels, kernel, groups, out)
    shape = (1, -1, *[1] * len(space))
    if isinstance(bias, Tensor):
        made = combined(trace, call, [(made, [call.result.shape[1]]), (trace.of(bias), bias.shape)], 1)
    trace.set(call.result, _data(each_layer(made, lambda layer: layer.reshape(shape))))


def _in_groups(trace: Tracing, call: Call, labels: Labels, kernel: Labels, groups: int, out: int) -> Labels:
    """Labels ``[channels]`` of what a convolution of several groups returns: only whole groups can go."""
    ledger = trace.ledger
    reason = "a convolution has the same number of channels in each of its groups"
    by_group = [ledger.fuse(layer.reshape(groups, -1), [1], call.operation, reason) for layer in labels.layers]
    for layer in kernel.layers:
        # The dimension that has the groups is the first of the two, whichever way the convolution goes.
        if layer.shape[0] > 1:
            by_group.append(ledger.fuse(layer.reshape(groups, -1), [1], call.operation, reason))
        if layer.shape[1] > 1:
            ledger.fix(layer, call.operation, reason)
    if not labels.layers:
        for layer in by_group:
            ledger.fix(layer, call.operation, "its input has a fixed number of channels")
        return Labels()
    width = call.result.shape[1] // groups
    whole = [np.repeat(layer, width, axis=1).reshape(-1) for layer in by_group if layer.size > 1]
    return Labels(ledger.merged(whole))


def _attention(trace: Tracing, call: Call) -> None:
    query, key, value = call.tensors[:3]
    reason = "attention computes with all of a head"
    parts = []
    for tensor in (query, key, value):
        labels = fused(trace, call, trace.of(tensor), [tensor.ndim - 1], reason)
        labels = stopped(trace, call, labels, [tensor.ndim - 2], reason)
        if (shared := query.shape[-3] // tensor.shape[-3]) > 1:  # a key/value head for several query heads
            labels = labels.moved(
                np.repeat(layer, shared, -3) if layer.shape[-3] > 1 else layer for layer in labels.layers
            )
        parts.append((labels, [*query.shape[:-2], 1, 1]))
        for layer in trace.of(tensor).layers:
            if layer.shape[-1] > 1:
                trace.ledger.attends(layer)
    mask = call.given.get("attn_mask", call.given.get("attn_bias"))
    if isinstance(mask, Tensor):
        parts.append(
            (stopped(trace, call, trace.of(mask), [mask.ndim - 2, mask.ndim - 1], reason), [*mask.shape[:-2], 1, 1])
        )
    outputs = call.outputs
    trace.set(outputs[0], _data(combined(trace, call, parts, query.ndim)))


def _layer_norm(trace: Tracing, call: Call) -> None:
    x = call.input
    count = len(list(pairs_of(call.given["normalized_shape"])))
    labels = trace.of(x)
    if trace.joins_norms:
        labels = held(trace, call, labels, range(x.ndim - count, x.ndim), "a norm is computed over it")
    operands = [(labels, tuple(x.shape)), *((trace.of(tensor), tuple(tensor.shape)) for tensor in call.tensors[1:])]
    trace.set(call.outputs[0], _data(combined(trace, call, operands, x.ndim, "a norm is computed over it")))


def _batch_norm(trace: Tracing, call: Call) -> None:
    x, *others = call.tensors
    lead = x.ndim - 2
    operands = [(trace.of(x), tuple(x.shape))]
    for tensor in others:
        labels = each_layer(trace.of(tensor), lambda layer: layer.reshape(layer.shape + (1,) * lead))
        operands.append((labels, (*tensor.shape, *[1] * lead)))
    trace.set(call.outputs[0], _data(combined(trace, call, operands, x.ndim)))


def _group_norm(trace: Tracing, call: Call) -> None:
    x, *others = call.tensors
    groups, channels = int(call.given["group"]), x.shape[1]
    lead = x.ndim - 2
    reason = "a norm is computed over a group of channels"

    def change(layer: Layer) -> Layer:
        if layer.shape[1] == 1:
            return layer
        grouped = layer.reshape(layer.shape[0], groups, channels // groups, *layer.shape[2:])
        left = trace.ledger.fuse(grouped, [2], call.operation, reason)
        return np.repeat(left, channels // groups, 2).reshape(layer.shape)

    operands = [(each_layer(trace.of(x), change), tuple(x.shape))]
    for tensor in others:
        labels = each_layer(trace.of(tensor), lambda layer: layer.reshape(layer.shape + (1,) * lead))
        operands.append((labels, (*tensor.shape, *[1] * lead)))
    trace.set(call.outputs[0], _data(combined(trace, call, operands, x.ndim, reason)))


def _reduce(trace: Tracing, call: Call) -> None:
    if call.name in ("max", "min") and len(call.tensors) > 1:
        return pointwise(trace, call)
    x = call.input
    axes = call.axes(x.ndim)
    is_norm = call.name in ("mean", "norm", "linalg_vector_norm", "var", "std", "var_mean")
    labels = trace.of(x)
    if is_norm and not trace.joins_norms:
        labels = each_layer(labels, lambda layer: None if any(layer.shape[axis] > 1 for axis in axes) else layer)
    else:
        labels = fused(trace, call, labels, axes, f"{call.name} is computed over it")
    for output in call.outputs:
        keeps = output.ndim == x.ndim
        trace.set(output, labels if keeps else each_layer(labels, lambda layer: layer.squeeze(axes)))
    return None


def _along(trace: Tracing, call: Call) -> None:
    x = call.input
    given = call.given.get("dim")
    labels = held(
        trace,
        call,
        trace.of(x),
        call.axes(x.ndim) if given is not None else range(x.ndim),
        f"{call.name.strip('_')} is computed over it",
    )
    for output in call.outputs:
        trace.set(output, labels if output.ndim == x.ndim else Labels())


def _in_space(trace: Tracing, call: Call) -> None:
    x = call.input
    count = next(int(mark) for mark in call.name if mark.isdigit())
    labels = held(trace, call, trace.of(x), range(x.ndim - count, x.ndim), "a window moves along it")
    for output in call.outputs:
        trace.set(output, labels)


def _glu(trace: Tracing, call: Call) -> None:
    """One half of the channels gates the other."""
    dim = int(call.given["dim"]) % call.input.ndim
    size = call.input.shape[dim] // 2

    def change(layer: Layer) -> Layer:
        if layer.shape[dim] == 1:
            return layer
        first, second = layer.take(range(size), dim), layer.take(range(size, 2 * size), dim)
        trace.ledger.unite(first, second)
        return first

    trace.set(call.result, each_layer(trace.of(call.input), change))


def _copy(trace: Tracing, call: Call) -> None:
    target, source = call.tensors[:2]
    if call.name != "copy":
        return unknown(trace, call)
    labels = trace.of(target)
    if labels.layers or target.shape == source.shape:
        made = combined(
            trace,
            call,
            [(Labels(labels.layers, uniform=not labels.layers), target.shape), (trace.of(source), source.shape)],
            target.ndim,
        )
        if target._is_view() and not labels.layers:
            return unknown(trace, call, "it is written into a part of another tensor")
        return trace.set(call.result, made)
    return unknown(trace, call, "it is written into another tensor")


def _write(trace: Tracing, call: Call) -> None:
    """Rows are written at places of a tensor that hold nothing else along the other dimensions."""
    target = call.input
    source = call.given.get("source", call.given.get("src", call.given.get("values")))
    if not isinstance(source, Tensor):
        return trace.set(call.result, trace.of(target))
    if call.name in ("index_put", "masked_scatter"):
        if trace.of(source).layers or trace.of(target).layers:
            return _put(trace, call, target, source)
        return None
    dim = int(call.given["dim"]) % max(1, target.ndim)
    operands = [
        (
            stopped(trace, call, trace.of(tensor), [dim], "rows are written by their number"),
            [1 if axis == dim else size for axis, size in enumerate(tensor.shape)],
        )
        for tensor in (target, source)
    ]
    return trace.set(call.result, _data(combined(trace, call, operands, target.ndim)))


def _put(trace: Tracing, call: Call, target: Tensor, source: Tensor) -> None:
    indices = call.given.get("indices")
    if call.name != "index_put" or indices is None:
        return unknown(trace, call)
    taken = sum(
        (index.ndim if index.dtype.is_floating_point is False and str(index.dtype) == "torch.bool" else 1)
        for index in indices
        if index is not None
    )
    if any(index is None for index in indices[:taken]) or source.ndim < target.ndim - taken:
        return unknown(trace, call)
    rest = target.ndim - taken
    operands = []
    for tensor in (target, source):
        labels = stopped(trace, call, trace.of(tensor), range(tensor.ndim - rest), "rows are written by their number")
        labels = each_layer(labels, lambda layer: layer.reshape(layer.shape[layer.ndim - rest :]))
        operands.append((labels, tuple(tensor.shape[tensor.ndim - rest :])))
    made = combined(trace, call, operands, rest)
    return trace.set(call.result, each_layer(_data(made), lambda layer: layer.reshape((1,) * taken + layer.shape)))


_NAMES: dict[Rule, str] = {
    # Not all of them have the tag that tells pointwise operations.
    pointwise: "hardswish hardsigmoid hardtanh log_sigmoid_forward mish softplus elu celu selu _prelu_kernel",
    _glu: "glu",
    _matmul: "mm bmm _int_mm",
    _added: "addmm baddbmm addbmm",
    _vectors: "mv dot vdot",
    _linear: "linear",
    _grouped: "_grouped_mm _scaled_grouped_mm",
    _convolution: (
        "convolution _convolution mkldnn_convolution cudnn_convolution _slow_conv2d_forward slow_conv3d "
        "_conv_depthwise2d thnn_conv2d"
    ),
    _attention: (
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
        "_scaled_dot_product_fused_attention_overrideable scaled_dot_product_attention"
    ),
    _layer_norm: "native_layer_norm layer_norm _fused_rms_norm rms_norm",
    _batch_norm: (
        "native_batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit cudnn_batch_norm "
        "batch_norm miopen_batch_norm _batch_norm_with_update _batch_norm_no_update"
    ),
    _group_norm: "native_group_norm",
    _reduce: (
        "sum mean amax amin argmax argmin max min prod logsumexp norm linalg_vector_norm var std var_mean "
        "std_mean median nanmedian all any nansum count_nonzero aminmax mode"
    ),
    _along: (
        "_softmax _log_softmax _safe_softmax softmax log_softmax cumsum cumprod logcumsumexp topk sort "
        "argsort kthvalue cummax cummin renorm"
    ),
    _in_space: (
        "max_pool1d_with_indices max_pool1d avg_pool1d _adaptive_avg_pool1d adaptive_avg_pool1d "
        "adaptive_max_pool1d mkldnn_max_pool1d upsample_nearest1d _upsample_nearest_exact1d "
        "max_pool2d_with_indices max_pool2d avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d "
        "adaptive_max_pool2d mkldnn_max_pool2d upsample_nearest2d _upsample_nearest_exact2d "
        "max_pool3d_with_indices max_pool3d avg_pool3d _adaptive_avg_pool3d adaptive_avg_pool3d "
        "adaptive_max_pool3d mkldnn_max_pool3d upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d "
        "upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa "
        "_upsample_bicubic2d_aa grid_sampler_2d grid_sampler_3d"
    ),
    _copy: "copy set_source_tensor slice_scatter select_scatter",
    _write: "index_add index_copy scatter_add scatter scatter_reduce index_put masked_scatter",
}
PRODUCTS: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names.split()}
