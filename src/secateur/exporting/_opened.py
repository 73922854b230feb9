"""Open a directory that has a model for another engine. What its report says is not trusted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from secateur._checks import integer, one_of
from secateur._errors import FormatError, StatisticsError, naming
from secateur.engines import Default, EngineModel, engine_for
from secateur.exporting._inputs import PAST
from secateur.files import EXPORTED, is_there, read_config, read_json
from secateur.reports import ExportedInput, ExportReport


def is_exported(path: str | Path) -> bool:
    """Return whether a directory has a model that was exported for another engine.

    Args:
        path: of the directory.
    """
    return is_there(Path(path) / EXPORTED)


def read_report(path: str | Path) -> ExportReport:
    """Return the report in a directory that was exported.

    Raises:
        FormatError: there is none, or it is not what this version writes, or names a file that is not in the directory.
    """
    path = Path(path)
    if not is_exported(path):
        raise FormatError(
            f"{path} has no model for another engine: it has no {EXPORTED}.\nExport one first: secateur export "
            "MODEL_DIR --to onnx --output OUT."
        )
    try:
        report = ExportReport.from_dict(read_json(path / EXPORTED))
    except ValueError as error:
        raise FormatError(f"{path / EXPORTED} is {error}.\nExport the model again.") from None
    file = PurePosixPath(report.file)
    if file.is_absolute() or ".." in file.parts or not report.file or "\0" in report.file or "\\" in report.file:
        raise FormatError(
            f"{path / EXPORTED} names the file {report.file!r:.80}, and a file in the directory was expected.\nExport "
            "the model again."
        )
    if not is_there(path / report.file):
        raise FormatError(f"{path} lacks {report.file}, which {EXPORTED} names. Complete the directory first.")
    return report


def exported_bytes(path: str | Path) -> int:
    """Return the size of the files of the model in a directory that was exported.

    Raises:
        FormatError: see :func:`read_report`.
    """
    return files_bytes(Path(path) / read_report(path).file)


def files_bytes(file: Path) -> int:
    """Return the size of a file of an engine, and of those with its weights beside it."""
    return sum(entry.stat().st_size for entry in file.parent.iterdir() if entry.is_file())


def open_exported(path: str | Path, *, precision: str | None = None, threads: int | None = None) -> EngineModel:
    """Open a directory that :func:`secateur.export` or ``secateur export`` wrote, to be called like a PyTorch model.

    Args:
        path: of the directory.
        precision: in which the engine computes what is not in 8 bits: ``"float32"``, or for OpenVINO ``"bfloat16"``;
            None for the one that the model was exported for.
        threads: to compute with; None for PyTorch's number.

    Returns:
        A module that takes inputs by position or by name, and returns outputs by name, as items and as attributes.
        Inputs such as ``attention_mask`` may be left out.

    Raises:
        FormatError: the directory is not such a one, or the engine does not take the file.
        RecipeError: the engine does not compute in that precision.
        KernelError: the processor does not.
        ImportError: the engine is not installed.

    Example:
        >>> import tempfile, torch, secateur
        >>> from secateur.exporting import open_exported
        >>> model = torch.nn.Linear(4, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = secateur.export(model, torch.randn(1, 4), f"{folder}/out", shapes=())
        ...     outputs = open_exported(f"{folder}/out")(torch.ones(3, 4))
        >>> torch.allclose(outputs["output"], model(torch.ones(3, 4)), atol=1e-5)
        True
    """
    path = Path(path)
    report = read_report(path)
    if threads is not None:
        integer("threads", threads, 1)
    config = SimpleNamespace(**read_config(path)) if is_there(path / "config.json") else None
    return open_file(path / report.file, report, precision=precision, threads=threads, config=config)


def open_file(
    file: Path, report: ExportReport, *, precision: str | None, threads: int | None, config: Any = None
) -> EngineModel:
    """Open a file as its report describes it. For the arguments see :func:`open_exported`."""
    engine = engine_for(file)
    engine.check()
    with naming(engine.title):
        precision = one_of("precision", report.precision if precision is None else precision, engine.precisions)
    session = engine.load(file, precision, threads)
    described = {entry.name: entry for entry in report.inputs}
    if set(session.inputs) != set(described) or set(session.outputs) != set(report.outputs):
        raise FormatError(
            f"{file} takes {', '.join(session.inputs)} and gives {', '.join(session.outputs)}; its report says "
            f"{', '.join(described)} and {', '.join(report.outputs)}.\nThey do not belong together: export the model "
            "again."
        )
    defaults = {name: default_of(entry) for name, entry in described.items() if entry.default}
    return EngineModel(session, defaults, config)


def default_of(entry: ExportedInput) -> Default:
    """Return what makes an input that was left out from those that were given.

    Raises:
        FormatError: there is no such default.
    """
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise FormatError(f"the input {entry.name} has the dtype {entry.dtype!r:.40}, which PyTorch has not.")

    def ones(given: Mapping[str, Tensor]) -> Tensor:
        rows, length = _texts(given)
        return torch.ones(rows, _before(given) + length, dtype=dtype)

    def zeros(given: Mapping[str, Tensor]) -> Tensor:
        return torch.zeros(_texts(given), dtype=dtype)

    def positions(given: Mapping[str, Tensor]) -> Tensor:
        (rows, length), before = _texts(given), _before(given)
        return torch.arange(before, before + length, dtype=dtype).expand(rows, length).contiguous()

    def empty(given: Mapping[str, Tensor]) -> Tensor:
        rows = _texts(given)[0]
        sizes = [0 if size == PAST else rows if isinstance(size, str) else size for size in entry.shape]
        return torch.zeros(sizes, dtype=dtype)

    makers = {"ones": ones, "zeros": zeros, "positions": positions, "empty": empty}
    sizes = [size for size in entry.shape if isinstance(size, int)]
    if entry.default == "empty" and (PAST not in entry.shape or any(size < 0 for size in sizes)):
        raise FormatError(
            f"the input {entry.name} of the shape {list(entry.shape)} cannot be empty.\nExport the model again."
        )
    if entry.default not in makers:
        raise FormatError(
            f"the input {entry.name} has the default {entry.default!r:.40}; known are {', '.join(makers)}.\nExport the "
            "model again."
        )
    return makers[entry.default]


def _texts(given: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many texts were given, and how many tokens in each."""
    tokens = given.get("input_ids", next(iter(given.values())))
    if tokens.ndim < 2:
        raise StatisticsError(f"token ids must be [texts, tokens], got {list(tokens.shape)}. Add the first dimension.")
    return tokens.shape[0], tokens.shape[1]


def _before(given: Mapping[str, Tensor]) -> int:
    """How many tokens the cache has."""
    return next((tensor.shape[2] for name, tensor in given.items() if name.startswith("past_key_values")), 0)
