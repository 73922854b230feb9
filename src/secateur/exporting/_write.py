"""From a function to a directory for another engine: the graph, rewritten, rounded, converted, and checked."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur import kernels
from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.exporting._calibration import named
from secateur.exporting._check import compare
from secateur.exporting._function import ExportedFunction
from secateur.exporting._fuse import fuse
from secateur.exporting._onnx import place, write_onnx
from secateur.exporting._opened import files_bytes, open_file
from secateur.exporting._openvino import convert
from secateur.exporting._packed_nodes import pack_nodes, save_for_openvino
from secateur.exporting._quantize import quantize
from secateur.exporting._settings import ExportSettings
from secateur.exporting._time import measure
from secateur.files import EXPORTED, read_json, without_claims
from secateur.reports import ExportReport, versions
from secateur.timing import describe_machine

ONNX, OPENVINO = "onnx/model.onnx", "openvino/openvino_model.xml"  # where other libraries look for them
_WORK = ".work"
_STEPS = 4
_SATURATES = (
    "this processor has no VNNI, so that the engine adds products of 8 bits in 16 bits, which saturate: the error is "
    "larger here than where there is VNNI"
)


@dataclass(frozen=True)
class Source:
    """What a function was made from.

    Args:
        nbytes: of its weights.
        notes: for the report.
        began: when the work began, in seconds of ``time.perf_counter``.
        calibration: batches for ranges of 8 bits; None for none.
    """

    nbytes: int
    notes: tuple[str, ...]
    began: float
    calibration: Sequence[Any] | None = None


def write_exported(
    function: ExportedFunction, made: Path, settings: ExportSettings, source: Source, progress: Progress
) -> ExportReport:
    """Write the files of an engine and the report into a new directory, which is not in its place yet.

    Raises:
        FormatError: the model cannot be exported, or what was exported does something else.
    """
    work = made / _WORK
    work.mkdir()
    report = ExportReport(
        model=type(function.model).__name__,
        to=settings.to,
        file=ONNX,
        precision="float32",
        int8=False,
        inputs=function.inputs.described(),
        outputs=function.outputs,
        bytes_before=source.nbytes,
        nbytes=0,
        checks=(),
        float32_error=0.0,
        notes=(*source.notes, *function.notes),
    )
    progress("following the model", 0, _STEPS)
    graph = _folder(work, "graph") / "model.onnx"
    write_onnx(function, graph)
    if settings.to == "onnx":
        progress("rewriting the graph", 1, _STEPS)
        rewritten = _folder(work, "rewritten") / "model.onnx"
        report = replace(report, fused=dict(fuse(graph, rewritten).counts))
        graph = rewritten
    if settings.packed and not settings.int8:
        graph, report = _packed(graph, work, report, int8=False)
    progress("checking the graph", 2, _STEPS)
    engine = open_file(graph, report, precision=None, threads=None)
    checks = compare(function, engine, settings.tolerance, "the graph in float32")
    report = replace(report, checks=tuple(checks), float32_error=max(check.error for check in checks))
    del engine
    progress("writing", 3, _STEPS)
    report = _placed(graph, made, settings, report, source.calibration and named(function.inputs, source.calibration))
    engine = open_file(made / report.file, report, precision=None, threads=None)
    if settings.to != "onnx" or settings.int8:  # else it is the graph that was checked
        tolerance = None if settings.rounds else settings.tolerance
        report = replace(report, checks=tuple(compare(function, engine, tolerance, report.file)))
    shutil.rmtree(work)
    timings, notes = measure(function, engine, settings.shapes, progress)
    if settings.int8 and not settings.packed and not any("vnni" in isa for isa in kernels.isas()):
        notes = [*notes, _SATURATES]
    report = replace(
        report,
        nbytes=files_bytes(made / report.file),
        timings=tuple(timings),
        notes=(*report.notes, *notes),
        machine=_machine() if timings else {},
        versions={**versions(), settings.engine.name: settings.engine.version},
        seconds=time.perf_counter() - source.began,
    )
    (made / EXPORTED).write_text(report.to_json() + "\n", encoding="utf-8")
    if (made / "config.json").is_file():
        _without_weights(made / "config.json")
    return report


def _placed(
    graph: Path,
    made: Path,
    settings: ExportSettings,
    report: ExportReport,
    calibration: Iterable[Mapping[str, Tensor]] | None,
) -> ExportReport:
    """Write the files of the engine from a graph in float32, and say so in the report."""
    report = replace(report, int8=settings.int8, precision=settings.precision)
    if settings.to == "openvino" and settings.packed:
        save_for_openvino(graph, (made / OPENVINO).parent)
        return replace(report, file=OPENVINO)
    if settings.to == "openvino":
        converted = convert(
            graph, (made / OPENVINO).parent, int8=settings.int8, half=settings.bfloat16, calibration=calibration
        )
        return replace(report, file=OPENVINO, notes=(*report.notes, *converted.notes))
    if settings.int8:
        if settings.packed:  # the graph in float32 was checked
            graph, report = _packed(graph, graph.parent.parent, report, int8=True)
        rounded = _folder(graph.parent.parent, "int8") / "model.onnx"
        quantized = quantize(graph, rounded)
        graph, report = rounded, replace(report, left=dict(quantized.left))
    place(graph, made / ONNX)
    return report


def _packed(graph: Path, work: Path, report: ExportReport, int8: bool) -> tuple[Path, ExportReport]:
    """Write the graph with packed layers, and say in the report which products stay dense."""
    packed = _folder(work, "packed") / "model.onnx"
    found = pack_nodes(graph, packed, int8=int8)
    if not found.packed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(found.left.items())[:3])
        raise RecipeError(
            f"no layer of {report.model} is worth packing ({reasons or 'it has no product by a constant weight'}).\n"
            "Prune it further, or leave packed (--packed) out."
        )
    notes = [f"products that stay dense: {count} ({reason})" for reason, count in Counter(found.left.values()).items()]
    counts = {**report.fused, "packed layers": len(found.packed)}
    return packed, replace(report, fused=counts, notes=(*report.notes, *notes))


def _folder(work: Path, name: str) -> Path:
    folder = work / name
    folder.mkdir()
    return folder


def _machine() -> dict[str, str]:
    return {name: value for name, value in describe_machine("").items() if value}


def _without_weights(config: Path) -> None:
    """Take out of a config how weights are stored: there are none beside it."""
    table = read_json(config)
    plain = without_claims({key: value for key, value in table.items() if key != "quantization_config"})
    if plain != table:
        config.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
