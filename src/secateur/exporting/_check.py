"""Is an exported model the same function as the PyTorch model?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from secateur._errors import FormatError
from secateur.engines import EngineModel
from secateur.exporting._function import OF_TOKENS, ExportedFunction
from secateur.exporting._inputs import BATCH, PAST, SEQUENCE, TOTAL, Inputs
from secateur.reports import ExportCheck

_TEXTS = ((1, 16), (3, 7), (2, 33), (1, 1))  # texts, and tokens in each
_PASTS = (0, 5, 0, 9)  # tokens before, in the cache
_ROWS = (1, 3)


def compare(function: ExportedFunction, engine: EngineModel, tolerance: float | None, where: str) -> list[ExportCheck]:
    """Run both on inputs of several sizes, with padding, and return how they differ.

    Args:
        function: the PyTorch model in float32.
        engine: the exported one.
        tolerance: the largest difference that is allowed, as a part of the largest number in each output; None for any
            that is finite.
        where: name of what is checked, for errors.

    Raises:
        FormatError: a difference is larger, an output is missing or has another shape, or is not finite.
    """
    checks = []
    for number, sizes in enumerate(_sizes(function.inputs)):
        tensors = function.inputs.resized(sizes, padded=True, seed=number)
        shape = function.inputs.shape_text(tensors)
        expected = function.named(tensors)
        found = engine(**tensors)
        errors, cosines = [], []
        for name, right in expected.items():
            if name not in found or found[name].shape != right.shape:
                got = list(found[name].shape) if name in found else "none"
                raise FormatError(
                    f"{where}: the output {name} of an input {shape} has the shape {got}, and {list(right.shape)} in "
                    "PyTorch.\nNothing was written. The model cannot be exported with sizes that may be any: give "
                    "dynamic={} and export one size."
                )
            error, cosine = _difference(*_real(name, found[name], right, tensors))
            if not error < float("inf"):
                raise FormatError(
                    f"{where}: the output {name} of an input {shape} has numbers that are not finite, in the exported "
                    "model or in PyTorch.\nNothing was written. Check the weights of the model."
                )
            if tolerance is not None and error > tolerance:
                raise FormatError(
                    f"{where}: the output {name} of an input {shape} differs by {error:.1e} of its scale from "
                    f"PyTorch's, and at most {tolerance:.0e} is allowed.\nNothing was written. Give a larger tolerance "
                    "if that is close enough."
                )
            errors.append(error)
            cosines.append(cosine)
        checks.append(ExportCheck(shape, max(errors), min(cosines)))
    return checks


def _sizes(inputs: Inputs) -> Iterator[dict[str, int]]:
    """Sizes to check at, by name."""
    names = {name for sizes in inputs.sizes.values() for name in sizes.values()}
    usual = {
        name: tensor.shape[place]
        for key, tensor in inputs.tensors.items()
        for place, name in inputs.sizes.get(key, {}).items()
    }
    if inputs.reads_tokens:
        for (rows, tokens), before in zip(_TEXTS, _PASTS, strict=True):
            length = min(tokens, inputs.longest or tokens)
            past = min(before, (inputs.longest or length + before) - length)
            yield {BATCH: rows, SEQUENCE: length, **({PAST: past, TOTAL: past + length} if PAST in names else {})}
        return
    yield usual
    for rows in _ROWS if names else ():
        yield {name: rows if name == BATCH else size * rows for name, size in usual.items()}


def _real(name: str, found: Tensor, right: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both outputs without what stands at padding, where they have a row for each token."""
    mask = tensors.get("attention_mask")
    if mask is None or name not in (*OF_TOKENS, "logits") or right.ndim != 3 or mask.shape != right.shape[:2]:
        return found, right
    return found[mask.bool()], right[mask.bool()]


def _difference(found: Tensor, right: Tensor) -> tuple[float, float]:
    """The largest difference as a part of the largest number, and the cosine. Not finite where a number is not."""
    a, b = found.double().reshape(-1), right.double().reshape(-1)
    if not a.numel():
        return 0.0, 1.0
    if not (a.isfinite().all() and b.isfinite().all()):
        return float("inf"), 0.0
    scale = float(b.abs().max()) or 1.0
    cosine = (
        float(torch.nn.functional.cosine_similarity(a, b, dim=0)) if a.any() and b.any() else float(torch.equal(a, b))
    )
    return float((a - b).abs().max()) / scale, cosine
