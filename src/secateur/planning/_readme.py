"""What the output of a plan has beside the model, and what its README says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

JSON, TOML, PAGE = "plan.json", "pipeline.toml", "plan.html"


def say_how(folder: Path, title: str, export: Mapping[str, Any]) -> None:
    """Say in the README of a directory what it is, and how the model is loaded.

    Args:
        folder: the directory, whose own README stays below.
        title: of the plan, in a few words.
        export: the stage that made the model for its engine; empty for PyTorch.
    """
    if export.get("run") == "export":
        lines = 'from secateur.exporting import open_exported\n\nmodel = open_exported("path/to/this/directory")'
        files = "onnx/model.onnx" if export["to"] == "onnx" else "openvino/openvino_model.xml"
        more = f"The file of the engine is `{files}`."
        if export.get("packed"):
            more += " Its packed layers need the library of `secateur.engines.library`."
    else:
        lines, more = 'import secateur\n\nmodel = secateur.load("path/to/this/directory")', "It runs in PyTorch."
    path = folder / "README.md"
    old = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    text = (
        f"# What this is\n\n{title[:1].upper()}{title[1:]}; made by `secateur optimize`. `{TOML}` has the "
        f"stages, and `{PAGE}` the figures. {more}\n\n```python\n{lines}\n```\n"
    )
    front = ""
    if old.startswith("---\n") and "\n---\n" in old[3:]:
        cut = old.index("\n---\n", 3) + 5
        front, old = old[:cut], old[cut:]
    path.write_text(f"{front}{text}\n{old.lstrip()}", encoding="utf-8")
