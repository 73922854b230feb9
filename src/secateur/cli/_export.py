"""``secateur export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli._app import say, user_errors
from secateur.cli._options import Output, Overwrite


def export(
    packed: Annotated[Path, typer.Argument(help="Directory that secateur pack wrote.")],
    output: Output,
    overwrite: Overwrite = False,
) -> None:
    """Write a packed model as a plain dense one, zeros included, that any tool reads."""
    with user_errors():
        from secateur.packing import export_directory

        export_directory(packed, output, overwrite=overwrite)
        say(f"written to {output}")
