"""From a function to a directory for another engine: the graph, rewritten, rounded, converted, and checked."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

from secateur._types import Progress
from secateur.engines import ENGINES
from secateur.exporting._check import compare
from secateur.exporting._function import ExportedFunction
from secateur.exporting._onnx import place, write_onnx
from secateur.exporting._opened import files_bytes, open_file
from secateur.exporting._quantize import quantize
from secateur.exporting._settings import ExportSettings
from secateur.exporting._time import measure
from secateur.files import EXPORTED, read_json
from secateur.reports import ExportReport, versions
from secateur.timing import describe_machine

ONNX, OPENVINO = "onnx/model.onnx", "openvino/openvino_model.xml"  # where other libraries look for them
_WORK = ".work"


@dataclass(frozen=True)
class Source:
    """What a function was made from.

    Args:
        nbytes: of its weights.
        notes: for the report.
        began: when the work began, in seconds of ``time.perf_counter``.
    """

    nbytes: int
    notes: tuple[str, ...]
    began: float


def write_exported(
    function: ExportedFunction, made: Path, settings: ExportSettings, source: Source, progress: Progress
) -> ExportReport:
    """Write the files of an engine and the report into a new directory, which is not in its place yet.

    Raises:
        FormatError: the model cannot be exported, or what was exported does something else.
    """
    work = made / _WORK
    work.mkdir()
    steps = 4
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
    progress("following the model", 0, steps)
    graph = _folder(work, "graph") / "model.onnx"
    write_onnx(function, graph)
    progress("checking the graph", 1, steps)
    engine = open_file(graph, report, precision=None, threads=None)
    checks = compare(function, engine, settings.tolerance, "the graph in float32")
    report = replace(report, float32_error=max(check.error for check in checks))
    if settings.int8 and settings.to == "onnx":
        progress("rounding to 8 bits", 2, steps)
        rounded = _folder(work, "int8") / "model.onnx"
        quantized = quantize(graph, rounded)
        graph, report = rounded, replace(report, int8=True, left=dict(quantized.left))
    file = made / report.file
    place(graph, file)
    report = replace(report, precision=settings.precision)
    progress("checking what was written", 3, steps)
    engine = open_file(file, report, precision=None, threads=None)
    rounds = settings.int8 or settings.bfloat16
    checks = compare(function, engine, None if rounds else settings.tolerance, report.file)
    shutil.rmtree(work)
    timings, notes = measure(function, engine, settings.shapes, progress)
    report = replace(
        report,
        nbytes=files_bytes(file),
        checks=tuple(checks),
        timings=tuple(timings),
        notes=(*report.notes, *notes),
        machine=_machine() if timings else {},
        versions={**versions(), settings_engine(settings): ENGINES[settings_engine(settings)].version},
        seconds=time.perf_counter() - source.began,
    )
    (made / EXPORTED).write_text(report.to_json() + "\n", encoding="utf-8")
    if (made / "config.json").is_file():
        _without_weights(made / "config.json")
    return report


def settings_engine(settings: ExportSettings) -> str:
    """Return the name of the engine that runs what the settings make."""
    return "onnxruntime" if settings.to == "onnx" else "openvino"


def _folder(work: Path, name: str) -> Path:
    folder = work / name
    folder.mkdir()
    return folder


def _machine() -> dict[str, str]:
    return {name: value for name, value in describe_machine("").items() if value}


def _without_weights(config: Path) -> None:
    """Take out of a config how weights are stored: there are none beside it."""
    table = read_json(config)
    if table.pop("quantization_config", None) is not None:
        config.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
