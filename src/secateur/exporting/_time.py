"""How fast is an exported model beside the PyTorch model?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.engines import EngineModel
from secateur.exporting._function import ExportedFunction
from secateur.exporting._inputs import BATCH, PAST, SEQUENCE, TOTAL, Inputs
from secateur.reports import ExportTiming
from secateur.timing import ratios, time_in_turn

SHAPES = ((1, 16), (1, 128), (8, 64), (32, 64))  # texts, and tokens in each
_SLOW = 2.0  # seconds of a call; larger inputs than one that takes as long are left out


def measure(
    function: ExportedFunction, engine: EngineModel, shapes: Sequence[tuple[int, int]] | None, progress: Progress
) -> tuple[list[ExportTiming], list[str]]:
    """Time both in turn, with PyTorch's number of threads, on inputs from small to large.

    Args:
        function: the PyTorch model, which runs in eager mode and float32.
        engine: the exported one.
        shapes: how many texts, and tokens in each; None for the usual ones. Of other inputs only how many.
        progress: called with a description, and how much of how much is done.

    Returns:
        The times, and notes on shapes that were left out.
    """
    wanted = sorted(_wanted(function.inputs, shapes), key=_amount)
    found, notes = list[ExportTiming](), list[str]()
    second_per_size = 0.0
    for number, sizes in enumerate(wanted):
        tensors = function.inputs.resized(sizes)
        shape, amount = function.inputs.shape_text(tensors), _amount(sizes)
        if shapes is None and second_per_size * amount > _SLOW:
            notes.append(f"not measured at {shape}: one call would take {second_per_size * amount:.0f} s")
            continue
        progress(f"measuring at {shape}", number, len(wanted))
        calls = {"engine": lambda: engine(**tensors), "pytorch": lambda: function.named(tensors)}  # noqa: B023
        times = time_in_turn(calls, "pytorch", keep=("engine",), alone=True)
        second_per_size = median(times["pytorch"]) / amount
        low, middle, high = ratios(times, "pytorch", "engine")
        engine_ms, pytorch_ms = (1e3 * median(times[name]) for name in ("engine", "pytorch"))
        found.append(ExportTiming(shape, engine_ms, pytorch_ms, middle, low, high))
    return found, notes


def _amount(sizes: Mapping[str, int]) -> int:
    return math.prod(sizes.get(name, 1) for name in (BATCH, SEQUENCE))


def _wanted(inputs: Inputs, shapes: Sequence[tuple[int, int]] | None) -> Iterator[dict[str, int]]:
    asked = SHAPES if shapes is None else shapes
    names = {name for sizes in inputs.sizes.values() for name in sizes.values()}
    if not inputs.reads_tokens:
        numbers = list(dict.fromkeys(rows for rows, _ in asked)) if BATCH in names else [1] if asked else []
        yield from ({BATCH: number} for number in numbers)
        return
    for rows, tokens in asked:
        if shapes is not None and inputs.longest is not None and tokens > inputs.longest:
            raise RecipeError(
                f"the shape {rows}x{tokens} is longer than the {inputs.longest} tokens that the model takes. Give a "
                "shorter one."
            )
        length = min(tokens, inputs.longest or tokens)
        yield {BATCH: rows, SEQUENCE: length, **({PAST: 0, TOTAL: length} if PAST in names else {})}
