"""``secateur inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli._app import show, user_errors
from secateur.cli._options import AsJson
from secateur.reports import Table, TableColumn


def inspect(
    path: Annotated[Path, typer.Argument(help="A .safetensors file or a model directory, dense or packed.")],
    show_all: Annotated[bool, typer.Option("--all", help="List vectors too, not only matrices.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the sparsity of every stored tensor and the patterns that its zeros satisfy, also of packed models."""
    with user_errors():
        from secateur.packing import inspect_stored

        found = [summary for summary in inspect_stored(path) if show_all or len(summary.shape) > 1]
        if as_json:
            rows = [
                {
                    "name": summary.name,
                    "shape": summary.shape,
                    "dtype": summary.dtype,
                    "sparsity": summary.sparsity,
                    "patterns": [str(pattern) for pattern in summary.patterns],
                    "format": summary.format,
                }
                for summary in found
            ]
            print(json.dumps(rows, indent=1))
            return
        columns = (
            TableColumn("tensor"),
            TableColumn("shape", is_number=True),
            TableColumn("dtype"),
            TableColumn("sparsity", is_number=True),
            TableColumn("patterns its zeros satisfy"),
            TableColumn("stored as"),
        )
        cells = tuple(
            (
                summary.name,
                " x ".join(map(str, summary.shape)),
                summary.dtype,
                "" if summary.sparsity is None else f"{summary.sparsity:.2%}",
                ", ".join(map(str, summary.patterns)),
                "" if summary.format == "dense" else summary.format,
            )
            for summary in found
        )
        unknown = sum(summary.sparsity is None for summary in found)
        note = f"{unknown} tensors are parts of quantized weights, which are not read: their zeros are not known."
        show(Table(str(path), columns, cells, (note,) if unknown else ()))
