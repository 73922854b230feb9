"""Write a function as an ONNX file, with PyTorch's exporter. What it prints and warns of stays inside."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from secateur._errors import FormatError
from secateur.calibration import quiet
from secateur.exporting._function import ExportedFunction

DATA = "model.onnx_data"  # beside the file, of weights that do not fit into one: the name that other libraries look for
LARGEST = 1_500_000_000  # bytes of weights in one file, which cannot have more than 2 GiB
_LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "onnxscript", "onnx_ir")
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


def check_exporter() -> None:
    """Raise unless the packages that write and read ONNX files are here.

    Raises:
        ImportError: one is missing; the message names the extra to install.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'exporting needs {" and ".join(missing)}; install what it needs with: pip install "secateur[onnx]"'
        )


def place(graph: Path, file: Path) -> None:
    """Move a graph to where other libraries look for it, with its weights if they lie beside it.

    Args:
        graph: an ``.onnx`` file, with nothing but its weights in its folder.
        file: where it goes; the folder is made.
    """
    file.parent.mkdir(parents=True)
    beside = [entry for entry in graph.parent.iterdir() if entry != graph]
    if beside:
        import onnx

        model = onnx.load(graph, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = DATA
        onnx.save(model, graph)
        (weights,) = beside
        weights.rename(file.with_name(DATA))
    graph.rename(file)


def write_onnx(function: ExportedFunction, path: Path) -> None:
    """Write a function as an ONNX file; weights of more than ``LARGEST`` bytes lie beside it.

    Raises:
        FormatError: PyTorch's exporter cannot follow the model, with its reason.
    """
    inputs = function.inputs
    sizes = tuple(dict(inputs.sizes.get(name, {})) for name in inputs.names)
    with _silence(), quiet(function):
        try:
            program = torch.onnx.export(
                function,
                tuple(inputs.tensors.values()),
                dynamo=True,
                verbose=False,
                input_names=list(inputs.names),
                output_names=list(function.outputs),
                dynamic_shapes=(sizes,),
            )
            assert program is not None
            _forget_origin(program.model)
            program.save(path, external_data=sum(tensor.nbytes for tensor in function.state_dict().values()) > LARGEST)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # the exporter's own classes, and whatever a model raises while it is traced
            raise FormatError(
                f"{type(function.model).__name__} cannot be exported: PyTorch's exporter says: {_reason(error)}\nA "
                "model that decides by the values of its inputs, or that takes inputs of one size only, cannot be "
                "followed.\nGive dynamic={} if one size is enough."
            ) from None


def _forget_origin(model: Any) -> None:
    """Take out where in the source code each node comes from: long texts, with paths of this machine."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()


def _reason(error: BaseException) -> str:
    """The first cause of an error, in a line: the exporter wraps it in advice on whom to tell."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in _STYLE.sub("", str(error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason'}"[:400]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep what the exporter prints, logs and warns of: it is about its own code, or about what is checked later."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
