"""From an ONNX file to OpenVINO's own files, in floating point or in 8 bits.

Weights become int8 constants with a scale for each output channel, tables of embeddings with a scale for each row:
OpenVINO reads such constants without a float copy. Then there are two ways to compute.

- Without calibration inputs OpenVINO rounds the inputs of products while it computes, in groups of 64 numbers, where
  the processor has instructions for products of int8 numbers. It does so only in float32; in bfloat16 it reads the
  weights in 8 bits and multiplies in bfloat16.
- With calibration inputs the file says the range of each product's inputs. That is faster, and whatever lies outside of
  the range is cut off. Ranges of input channels are made alike first, by SmoothQuant's exchange of scales between
  inputs and weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from secateur._errors import FormatError, RecipeError, StatisticsError
from secateur.engines import import_openvino
from secateur.formats import encode

_NAME = "openvino_model"  # the name that sentence-transformers and optimum look for
_GROUP = 64  # inputs that share a scale; 32, OpenVINO's own, is slower, and 128 less accurate
_SMOOTHING = 0.8  # of a channel's range that goes into the weights; 0.5 to 0.9 measured on a sentence encoder
_FEWEST = 256  # smaller weights stay: there is nothing to gain
_LARGE = 65536  # bytes of a constant that is worth a line, if it stays in floating point
_LEVELS = 256
_SCALE = "/scale"  # behind the name of a weight


@dataclass(frozen=True)
class Converted:
    """What was written.

    Args:
        files: the graph and its weights.
        nbytes: of both.
        in_8_bits: names of the weights and tables that are stored in 8 bits.
        ranges: how many inputs of products have their range in the file; 0 without calibration inputs.
        notes: what stayed in floating point, and why.
    """

    files: tuple[Path, ...]
    nbytes: int
    in_8_bits: tuple[str, ...] = ()
    ranges: int = 0
    notes: tuple[str, ...] = ()


class _Use(NamedTuple):
    """A weight where a node reads it."""

    name: str
    weight: np.ndarray
    entry: Any  # the node's input
    node: Any
    axes: tuple[int, ...]  # that are summed over, or the row of a table

    @property
    def is_table(self) -> bool:
        return bool(self.node.get_type_name() == "Gather")

    @property
    def source(self) -> tuple[str, int]:
        """The output that the product takes in."""
        output = self.node.input_value(0)
        return output.get_node().get_friendly_name(), output.get_index()


@dataclass
class _Range:
    """Smallest and largest values of a product's inputs, for each channel."""

    low: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.float32))
    high: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.float32))

    def see(self, rows: np.ndarray) -> None:
        if len(rows):
            self.low, self.high = np.minimum(self.low, rows.min(0)), np.maximum(self.high, rows.max(0))


def convert(
    source: Path,
    folder: Path,
    *,
    int8: bool,
    half: bool = False,
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> Converted:
    """Write ``openvino_model.xml`` and ``openvino_model.bin``.

    Args:
        source: an ``.onnx`` file of float32 numbers.
        folder: where to write; made if it is not there.
        int8: store weights and tables of embeddings in 8 bits, and compute products in 8 bits.
        half: without ``int8``: store weights in 16 bits. The file is half as large and exact to about 3 digits.
        calibration: inputs by name, as arrays or CPU tensors, for ranges of products' inputs. An input
            ``attention_mask`` says which of their rows count.

    Returns:
        What was written, and what is in 8 bits.

    Raises:
        FormatError: OpenVINO does not read the file, or it has weights that are not finite.
        RecipeError: calibration inputs without ``int8``.
        StatisticsError: calibration inputs that are missing, not finite, or that the model cannot compute.
    """
    openvino = import_openvino()
    if calibration is not None and not int8:
        raise RecipeError("calibration inputs set ranges for 8 bits, and int8 is off. Leave them out, or give int8.")
    core = openvino.Core()
    try:
        model = core.read_model(source)
    except Exception as error:  # RuntimeError, and whatever its layers raise
        raise FormatError(f"{source} is not a model that OpenVINO takes: {error}") from None
    done = Converted((), 0)
    if int8:
        _simplify(model)
        uses = list(_uses(model))
        ranges = {} if calibration is None else _observe(model.clone(), calibration)
        done = _to_8_bits(model, uses, ranges)
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / f"{_NAME}.xml", folder / f"{_NAME}.bin"
    openvino.save_model(model, files[0], compress_to_fp16=half and not int8)
    nbytes = sum(file.stat().st_size for file in files)
    return Converted(files, nbytes, done.in_8_bits, done.ranges, done.notes)


def _simplify(model: Any) -> None:
    """Rewrite what OpenVINO's own passes over 8 bits, or ours, do not take, without changing a number.

    Products read their constants themselves, and not what a reshaping or a transposition makes of them. One part of a
    tensor is taken out as a slice and then squeezed: OpenVINO moves scales of a product behind what takes its parts,
    and leaves them in the rank of before, so that outputs get a dimension too many.
    """
    ops = import_openvino().opset13
    for node in model.get_ops():
        if node.get_type_name() == "Gather" and node.input_value(1).get_partial_shape() == _scalar():
            index = ops.unsqueeze(node.input_value(1), ops.constant([0]))
            part = ops.gather(node.input_value(0), index, node.input_value(2))
            part.set_friendly_name(f"{node.get_friendly_name()}/slice")
            _replace(node, ops.squeeze(part, node.input_value(2)))
            continue
        if node.get_type_name() not in ("MatMul", "Convolution", "GroupConvolution"):
            continue
        between = node.input_value(1).get_node()
        constant = between.input_value(0).get_node() if between.get_input_size() else between
        if constant.get_type_name() != "Constant" or not between.output(0).get_partial_shape().is_static:
            continue
        if between.get_type_name() == "Reshape":
            copy = ops.constant(constant.data.reshape(list(between.output(0).get_shape())))
            copy.set_friendly_name(constant.get_friendly_name())
            node.input(1).replace_source_output(copy.output(0))
        elif between.get_type_name() == "Transpose" and node.get_type_name() == "MatMul" and constant.data.ndim == 2:
            turned = node.get_attributes()
            product = ops.matmul(node.input_value(0), constant, turned["transpose_a"], not turned["transpose_b"])
            _replace(node, product)


def _scalar() -> Any:
    return import_openvino().PartialShape([])


def _replace(node: Any, by: Any) -> None:
    """Put a node in the place of another, under its names."""
    names = node.output(0).get_names()
    by.set_friendly_name(node.get_friendly_name())
    node.output(0).replace(by.output(0))
    by.output(0).set_names(names)


def _uses(model: Any) -> Iterator[_Use]:
    """Every weight and every table of embeddings that can be stored in 8 bits."""
    for constant in model.get_ops():
        if constant.get_type_name() != "Constant" or constant.get_element_type().get_type_name() != "f32":
            continue
        weight = constant.data
        if weight.size < _FEWEST:
            continue
        for entry in constant.output(0).get_target_inputs():
            axes = _summed(entry.get_node(), entry.get_index(), weight.ndim)
            if axes:
                if not np.isfinite(weight).all():
                    raise FormatError(
                        f"{constant.get_friendly_name()} has values that are not finite, which 8 bits cannot hold.\n"
                        "Repair the model's weights."
                    )
                yield _Use(constant.get_friendly_name(), weight, entry, entry.get_node(), axes)


def _summed(node: Any, index: int, dims: int) -> tuple[int, ...]:
    """Axes of a weight that a node sums over, so that all others may have a scale of their own."""
    kind = node.get_type_name()
    if kind == "MatMul" and index == 1 and dims == 2 and node.input_value(0).get_node().get_type_name() != "Constant":
        return (1,) if node.get_attributes()["transpose_b"] else (0,)
    if kind == "Convolution" and index == 1:
        return tuple(range(1, dims))
    if kind == "GroupConvolution" and index == 1:
        return tuple(range(2, dims))
    if kind == "Gather" and index == 0 and dims == 2:
        axis = node.input_value(2).get_node()
        return (1,) if axis.get_type_name() == "Constant" and int(axis.data) == 0 else ()
    return ()


def _has_range(use: _Use) -> bool:
    """Whether the file can say the range of a product's inputs."""
    if use.is_table or use.node.get_attributes().get("transpose_a", False):
        return False
    return bool(use.node.input_value(0).get_partial_shape().rank.is_static)


def _observe(model: Any, calibration: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], _Range]:
    """Run calibration inputs, and return the range of what products take in, by its place."""
    openvino = import_openvino()
    channels = {use.source: use.node.get_type_name() == "MatMul" for use in _uses(model) if _has_range(use)}
    nodes = {node.get_friendly_name(): node for node in model.get_ops()}
    before = len(model.outputs)
    if channels:
        model.add_outputs([nodes[name].output(index) for name, index in channels])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    inputs = [entry.get_any_name() for entry in compiled.inputs]
    ranges = {place: _Range() for place in channels}
    batches = 0
    for number, batch in enumerate(calibration):
        missing = [name for name in inputs if name not in batch]
        if missing:
            raise StatisticsError(
                f"calibration input {number} lacks {', '.join(missing)}. Give each input of the model."
            )
        try:
            request.start_async({name: np.ascontiguousarray(batch[name]) for name in inputs})
            request.wait()  # `infer` loses errors on one thread
        except Exception as error:  # RuntimeError, and whatever its layers raise
            raise StatisticsError(f"OpenVINO cannot compute calibration input {number}: {error}") from None
        mask = np.asarray(batch["attention_mask"]).astype(bool) if "attention_mask" in batch else None
        for position, (place, by_channel) in enumerate(channels.items()):
            found = request.get_tensor(compiled.outputs[before + position]).data
            if not np.isfinite(found).all():
                raise StatisticsError(f"calibration input {number} gives values that are not finite at {place[0]}.")
            if not by_channel:
                ranges[place].see(found.reshape(-1, 1))
            elif mask is not None and mask.shape == found.shape[:-1]:
                ranges[place].see(found[mask])
            else:
                ranges[place].see(found.reshape(-1, found.shape[-1]))
        batches += 1
    if not batches:
        raise StatisticsError("there are no calibration inputs, and ranges come from them. Give at least one.")
    return ranges


def _to_8_bits(model: Any, uses: list[_Use], ranges: Mapping[tuple[str, int], _Range]) -> Converted:
    """Exchange weights for int8 constants, and round what products take in where its range is known."""
    ops = import_openvino().opset13
    groups: dict[tuple[str, int], list[_Use]] = {}
    for use in uses:
        if _has_range(use) and use.source in ranges:
            groups.setdefault(use.source, []).append(use)
        else:
            use.entry.replace_source_output(_in_8_bits(ops, use, use.weight))
    for place, group in groups.items():
        rounded, smooth = _rounded(ops, group, ranges[place])
        for use in group:
            shape = [1] * use.weight.ndim
            if smooth.size > 1:
                shape[use.axes[0]] = smooth.size
            use.entry.replace_source_output(_in_8_bits(ops, use, use.weight * smooth.reshape(shape)))
            use.node.input(0).replace_source_output(rounded)
    model.validate_nodes_and_infer_types()
    if not ranges:
        model.set_rt_info(str(_GROUP), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    return Converted((), 0, tuple(dict.fromkeys(use.name for use in uses)), len(groups), tuple(_left(model)))


def _in_8_bits(ops: Any, use: _Use, weight: np.ndarray) -> Any:
    """An int8 constant and its scales, which OpenVINO reads as one weight."""
    kept = tuple(axis for axis in range(weight.ndim) if axis not in use.axes)
    order = (*kept, *use.axes)  # rows of outputs
    turned = np.array(weight.transpose(order), order="C")  # a copy: constants of a file cannot be written
    rows = math.prod(weight.shape[axis] for axis in kept)
    codes, scales = encode(torch.from_numpy(turned).reshape(rows, -1), torch.int8)
    assert scales is not None
    rounded = codes.numpy().reshape(turned.shape).transpose(np.argsort(order))
    scale = scales.numpy().reshape([1 if axis in use.axes else size for axis, size in enumerate(weight.shape)])
    stored = ops.constant(np.ascontiguousarray(rounded))
    stored.set_friendly_name(f"{use.name}/int8")
    factors = ops.constant(scale)
    factors.set_friendly_name(f"{use.name}{_SCALE}")
    return ops.multiply(ops.convert(stored, "f32"), factors).output(0)


def _rounded(ops: Any, group: list[_Use], seen: _Range) -> tuple[Any, np.ndarray]:
    """What products of a group take in, rounded to 8 bits; and by what its channels are divided first."""
    low, high = seen.low, seen.high
    inputs = group[0].node.input_value(0)
    one = [1] * inputs.get_partial_shape().rank.get_length()  # in the rank of the inputs, else OpenVINO may change it
    smooth = np.ones(1, dtype=np.float32)
    if len(low) > 1:  # of channels
        largest = np.maximum(-low, high)
        weights = np.max([np.abs(use.weight).max(axis=1 - use.axes[0]) for use in group], axis=0)
        usable = (largest > 0) & (weights > 0)
        ratio = np.where(usable, largest, 1) ** _SMOOTHING / np.where(usable, weights, 1) ** (1 - _SMOOTHING)
        smooth = np.where(usable, ratio / np.exp(np.log(ratio[usable]).mean()) if usable.any() else 1, 1)
        smooth = smooth.astype(np.float32)
        low, high = low / smooth, high / smooth
        inputs = ops.multiply(inputs, ops.constant((1 / smooth).reshape([*one[:-1], -1]))).output(0)
    least, most = float(low.min()), float(high.max())
    if len(low) == 1 and least < 0:  # of convolutions, whose padding is zero: as many steps on both sides of it
        step = max(-least, most) / (_LEVELS // 2 - 1)
        least, most = -step * (_LEVELS // 2), step * (_LEVELS // 2 - 1)
    else:  # zero is a step
        step = (most - least) / (_LEVELS - 1) or 1.0
        least = round(least / step) * step
        most = least + (_LEVELS - 1) * step
    ends = [ops.constant(np.full(one, end, dtype=np.float32)) for end in (least, most)]
    return ops.fake_quantize(inputs, *ends, *ends, _LEVELS).output(0), smooth


def _left(model: Any) -> Iterator[str]:
    """A line for each large constant that stays in floating point."""
    for constant in model.get_ops():
        if constant.get_type_name() != "Constant" or not constant.get_element_type().is_real():
            continue
        name, nbytes = constant.get_friendly_name(), constant.data.nbytes
        if nbytes >= _LARGE and not name.endswith(_SCALE):
            readers = sorted({entry.get_node().get_type_name() for entry in constant.output(0).get_target_inputs()})
            yield f"{name} ({nbytes:,} bytes) stays in floating point: {', '.join(readers)} has no 8 bits here."
